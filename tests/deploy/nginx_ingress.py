"""Ingresses as the NGINX Ingress controller serves them: nginx.conf as its template has it (kubernetes/ingress-nginx,
rootfs/etc/nginx/template/nginx.tmpl, by its defaults), and real nginx on it. Where the controller has Lua choose pods
and redirect, there are upstreams and `return`; it guesses no annotation that it does not know.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.tools import ROOT, Manifest, of_kind, one, pod_specs

HTTP, HTTPS = 8080, 8443
_PREFIX = "nginx.ingress.kubernetes.io/"
_START_S = 10.0

# By the controller's own defaults, what an annotation changes; only those that the chart uses, or could leave out.
_DEFAULTS = {
    "backend-protocol": "HTTP",
    "force-ssl-redirect": "false",
    "ssl-redirect": "true",
    "proxy-body-size": "1m",
    "proxy-buffering": "off",
    "proxy-request-buffering": "on",
    "proxy-http-version": "1.1",
    "proxy-read-timeout": "60",
    "proxy-send-timeout": "60",
    "proxy-next-upstream": "error timeout",
}
# Of whoever else reads the manifest.
_OTHERS = {"cert-manager.io/cluster-issuer"}


class UnknownAnnotationError(Exception):
    """An annotation that this does not translate; it is named."""


@dataclass(frozen=True)
class Site:
    """Where nginx is: its address, the folder of its files, the pods' addresses by component, and the folder where each
    secret's tls.crt and tls.key are. `extra` goes into every location."""

    address: str
    folder: Path
    pods: Mapping[str, str]
    secrets: Mapping[str, Path]
    extra: str = ""


def translated(manifests: list[Manifest], site: Site) -> str:
    """nginx.conf for all Ingresses among these manifests. Raises UnknownAnnotationError."""
    upstreams: dict[str, str] = {}
    servers = [_server(manifests, ingress, site, upstreams) for ingress in of_kind(manifests, "Ingress")]
    backends = "".join(
        f"""
    upstream {name} {{
        server {address};
        keepalive 320;
        keepalive_time 1h;
        keepalive_timeout 60s;
        keepalive_requests 10000;
    }}"""
        for name, address in upstreams.items()
    )
    return f"""daemon off;
pid {site.folder}/nginx.pid;
error_log {site.folder}/error.log notice;
# The controller runs without rights; where a test has them, its files are its own.
user root root;
worker_processes 1;
worker_shutdown_timeout 240s;
events {{
    multi_accept on;
    worker_connections 1024;
    use epoll;
}}
http {{
    tcp_nopush on;
    tcp_nodelay on;
    reset_timedout_connection on;
    keepalive_timeout 75s;
    keepalive_requests 1000;
    client_body_temp_path {site.folder}/client-body;
    fastcgi_temp_path {site.folder}/fastcgi-temp;
    uwsgi_temp_path {site.folder}/uwsgi-temp;
    scgi_temp_path {site.folder}/scgi-temp;
    proxy_temp_path {site.folder}/proxy-temp;
    client_header_buffer_size 1k;
    client_header_timeout 60s;
    large_client_header_buffers 4 8k;
    client_body_buffer_size 8k;
    client_body_timeout 60s;
    http2_max_concurrent_streams 128;
    underscores_in_headers off;
    ignore_invalid_headers on;
    default_type text/html;
    server_tokens off;
    access_log off;
    map $http_upgrade $connection_upgrade {{
        default upgrade;
        '' '';
    }}
    map $http_x_request_id $req_id {{
        default $http_x_request_id;
        "" $request_id;
    }}
    server_name_in_redirect off;
    port_in_redirect off;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_session_cache shared:SSL:10m;
    ssl_session_timeout 10m;
    ssl_session_tickets off;
    ssl_buffer_size 4k;
    ssl_ecdh_curve auto;
    proxy_ssl_session_reuse on;
{backends}
{"".join(servers)}
}}
"""


def _server(manifests: list[Manifest], ingress: Manifest, site: Site, upstreams: dict[str, str]) -> str:
    annotations = _annotations(ingress)
    (rule,) = ingress["spec"]["rules"]
    (tls,) = ingress["spec"]["tls"]
    assert tls["hosts"] == [rule["host"]]
    locations = []
    for path in rule["http"]["paths"]:
        service = path["backend"]["service"]
        upstream = f"{service['name']}-{service['port']['name']}"
        upstreams[upstream] = _endpoint(manifests, service["name"], service["port"]["name"], site)
        assert path["path"] != "/", "no test needs it"
        if path["pathType"] == "Prefix":
            # By whole segments, which nginx does not know: all below it, and itself.
            places = [f'"{path["path"].rstrip("/")}/"', f'= "{path["path"]}"']
        else:
            assert path["pathType"] == "ImplementationSpecific"
            places = [f'"{path["path"]}"']
        locations += [_location(place, upstream, annotations, site.extra) for place in places]
    certificate = site.secrets[tls["secretName"]]
    return f"""
    server {{
        server_name {rule["host"]};
        listen {site.address}:{HTTP};
        listen {site.address}:{HTTPS} ssl http2;
        ssl_certificate {certificate}/tls.crt;
        ssl_certificate_key {certificate}/tls.key;
{"".join(locations)}
        location / {{
            return 404;
        }}
    }}"""


def _annotations(ingress: Manifest) -> dict[str, str]:
    found = dict(_DEFAULTS)
    for name, value in ingress["metadata"]["annotations"].items():
        short = name.removeprefix(_PREFIX)
        if name in _OTHERS:
            continue
        if short == name or short not in _DEFAULTS:
            raise UnknownAnnotationError(name)
        found[short] = value
    return found


def _endpoint(manifests: list[Manifest], name: str, port: str, site: Site) -> str:
    """Where the pod behind a service listens for one of its ports."""
    service = one(manifests, "Service", name)["spec"]
    (target,) = [found["targetPort"] for found in service["ports"] if found["name"] == port]
    (workload,) = [
        manifest
        for manifest in manifests
        if manifest["kind"] in ("Deployment", "StatefulSet")
        and service["selector"].items() <= manifest["spec"]["template"]["metadata"]["labels"].items()
    ]
    (container,) = pod_specs([workload])[f"{workload['kind']}/{workload['metadata']['name']}"]["containers"]
    (number,) = [found["containerPort"] for found in container["ports"] if found["name"] == target]
    return f"{site.pods[service['selector']['app.kubernetes.io/component']]}:{number}"


def _location(place: str, upstream: str, told: Mapping[str, str], extra: str) -> str:
    protocol = told["backend-protocol"]
    is_grpc = protocol in ("GRPC", "GRPCS")
    header = "grpc_set_header" if is_grpc else "proxy_set_header"
    passes = {
        "HTTP": f"proxy_pass http://{upstream};",
        "GRPC": f"grpc_pass grpc://{upstream};",
        "GRPCS": f"grpc_pass grpcs://{upstream};",
    }[protocol]
    timeouts = f"""
            grpc_connect_timeout 5s;
            grpc_send_timeout {told["proxy-send-timeout"]}s;
            grpc_read_timeout {told["proxy-read-timeout"]}s;"""
    redirects = "true" in (told["ssl-redirect"], told["force-ssl-redirect"])
    return f"""
        location {place} {{
            {extra}
            {"if ($scheme = http) { return 308 https://$host$request_uri; }" if redirects else ""}
            client_max_body_size {told["proxy-body-size"]};
            {header} Host $http_host;
            {header} Upgrade $http_upgrade;
            {header} Connection $connection_upgrade;
            {header} X-Request-ID $req_id;
            {header} X-Real-IP $remote_addr;
            {header} X-Forwarded-For $remote_addr;
            {header} X-Forwarded-Host $http_host;
            {header} X-Forwarded-Port $server_port;
            {header} X-Forwarded-Proto $scheme;
            {header} X-Forwarded-Scheme $scheme;
            {header} X-Scheme $scheme;
            {header} X-Original-Forwarded-For $http_x_forwarded_for;
            {header} X-Original-Forwarded-Host $http_x_forwarded_host;
            {header} Proxy "";
            proxy_connect_timeout 5s;
            proxy_send_timeout {told["proxy-send-timeout"]}s;
            proxy_read_timeout {told["proxy-read-timeout"]}s;
            proxy_buffering {told["proxy-buffering"]};
            proxy_buffer_size 4k;
            proxy_buffers 4 4k;
            proxy_max_temp_file_size 1024m;
            proxy_request_buffering {told["proxy-request-buffering"]};
            proxy_http_version {told["proxy-http-version"]};
            proxy_cookie_domain off;
            proxy_cookie_path off;
            proxy_next_upstream {told["proxy-next-upstream"]};
            proxy_next_upstream_timeout 0;
            proxy_next_upstream_tries 3;{timeouts if is_grpc else ""}
            {passes}
            {"" if is_grpc else "proxy_redirect off;"}
        }}"""


@asynccontextmanager
async def nginx(configuration: str, site: Site) -> AsyncIterator[None]:
    """nginx that serves within the block."""
    site.folder.mkdir()
    path = site.folder / "nginx.conf"
    path.write_text(configuration)
    program = shutil.which("nginx", path="/usr/sbin") or shutil.which("nginx", path=ROOT / ".venv/system/usr/sbin")
    assert program, "run deploy/local/bootstrap.sh test"
    log = site.folder / "error.log"
    process = await asyncio.create_subprocess_exec(
        program, "-p", str(site.folder), "-e", str(log), "-c", str(path), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(_START_S):
            while not await _listens(site.address):
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.02)
        yield
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def _listens(address: str) -> bool:
    try:
        _, writer = await asyncio.open_connection(address, HTTPS)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True

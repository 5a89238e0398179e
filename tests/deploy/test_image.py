"""What the image holds, put together here without an engine: the pinned packages and the project's wheel in an
environment with nothing else, in which every role starts as an ordinary user."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.state import Account, service_account
from tests.deploy.homes import composed
from tests.deploy.tools import ROOT

ROLES = ("identity", "router", "analytics", "edge", "gateway")
EXIT_WRONG_CONFIGURATION = 2
# The environment takes as long to make as all tests of it do.
pytestmark = pytest.mark.xdist_group("image")
DOCKERFILE = (ROOT / "deploy" / "images" / "Dockerfile").read_text()


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def python() -> Iterator[Path]:
    """The interpreter of the image's environment. Not in pytest's folder, which the ordinary user may not enter."""
    folder = Path(tempfile.mkdtemp(prefix="aiaas-image-"))
    folder.chmod(0o755)
    (folder / "compiled").mkdir()
    (folder / "compiled").chmod(0o777)
    try:
        environment = folder / "aiaas"
        run(_copied_python(folder / "python"), "-m", "venv", "--without-pip", environment)
        interpreter = environment / "bin" / "python"
        pip = ("-m", "pip", "--python", interpreter, "--disable-pip-version-check")
        install = ("install", "--quiet", "--no-compile", "--no-deps")
        with_pip = Path(shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable)
        with_pip = Path(sys.executable) if _has_pip(Path(sys.executable)) else with_pip
        lock = ROOT / "deploy" / "locks" / "runtime.lock"
        run(with_pip, *pip, *install, "--require-hashes", "--only-binary", ":all:", "-r", lock)
        run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder)
        (wheel,) = folder.glob("*.whl")
        run(with_pip, *pip, *install, "--no-index", wheel)
        yield interpreter
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copied_python(folder: Path) -> Path:
    """An interpreter and its library, as the image has: this one may lie where only its owner may enter."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "bin").mkdir(parents=True)
    shutil.copy2(Path(sys.executable).resolve(), folder / "bin" / name)
    unwanted = shutil.ignore_patterns("site-packages", "dist-packages", "test", "__pycache__", "config-*")
    shutil.copytree(sysconfig.get_path("stdlib"), folder / "lib" / name, ignore=unwanted)
    shared = Path(sysconfig.get_config_var("LIBDIR")) / str(sysconfig.get_config_var("INSTSONAME"))
    if shared.suffix != ".a" and shared.exists():
        shutil.copy2(shared, folder / "lib")
    return folder / "bin" / name


def _has_pip(interpreter: Path) -> bool:
    return subprocess.run([interpreter, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def account() -> Account | None:
    return service_account() if os.geteuid() == 0 else None


def started(python: Path, account: Account | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        # What one has compiled, the next one need not.
        env={
            "PYTHONPYCACHEPREFIX": str(python.parents[2] / "compiled"),
            "LD_LIBRARY_PATH": str(python.parents[2] / "python" / "lib"),
        },
        cwd="/tmp",
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=[] if account else None,
    )


@pytest.mark.parametrize("role", ROLES)
def test_role_starts_with_what_the_image_holds(role: str, python: Path, account: Account | None) -> None:
    done = started(python, account, "-m", role, "serve")
    assert done.returncode == EXIT_WRONG_CONFIGURATION, done.stderr
    assert f"{role} cannot start, its configuration is wrong" in done.stderr


@pytest.mark.parametrize("module", ["deploy.registration", "deploy.backup"])
def test_commands_of_jobs_start_with_what_the_image_holds(module: str, python: Path, account: Account | None) -> None:
    done = started(python, account, "-m", module)
    assert done.returncode == EXIT_WRONG_CONFIGURATION, done.stderr
    assert f"python -m {module}" in done.stderr


def test_migrations_and_scripts_are_in_the_wheel(python: Path, account: Account | None) -> None:
    for role in ("identity", "router", "analytics"):
        code = (
            "import pathlib, " + role + f"; print(*sorted(p.name for p in pathlib.Path({role}.__file__)"
            ".parent.rglob('*') if p.suffix in ('.sql', '.lua')))"
        )
        done = started(python, account, "-c", code)
        here = sorted(p.name for p in (ROOT / role).rglob("*") if p.suffix in (".sql", ".lua"))
        assert done.stdout.split() == here, done.stderr
        assert here


def test_image_lists_what_it_is_made_of(python: Path) -> None:
    (command,) = re.findall(r"/opt/aiaas/bin/python (-m deploy\.sbom \S+) > /opt/aiaas/sbom.cdx.json", DOCKERFILE)
    done = subprocess.run([python, *command.split()], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pkg:pypi/uvloop@")


def test_every_package_of_the_wheel_is_copied_into_the_image() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    tops = {package.split("/")[0] for package in packages}
    copied = {
        line.split()[1].split("/")[0]
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
    }
    assert tops <= copied | {"deploy"}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert tops <= allowed


def test_image_runs_as_nobody_in_particular() -> None:
    users = [line.split()[1] for line in DOCKERFILE.splitlines() if line.startswith("USER ")]
    assert users == ["10001:10001"]


def test_image_owns_the_place_of_the_journal() -> None:
    """A new volume takes the owner of the folder that it is mounted on."""
    assert "COPY --from=build --chown=10001:10001 /var/lib/aiaas /var/lib/aiaas\n" in DOCKERFILE
    router = composed()["services"]["router"]
    assert router["user"] == "10001:10001"
    assert "journal:/var/lib/aiaas" in router["volumes"]

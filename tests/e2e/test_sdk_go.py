"""Go stubs, made from the contracts, and the example as it stands, compiled against Debian's gRPC for Go."""

import os
import shutil
import subprocess
from pathlib import Path

from .conftest import Platform
from .test_sdk import ROOT, check, settings

SDK = ROOT / "sdk/go"
# Where Debian's packages for Go lie; the stubs and the example are laid out beside them.
LIBRARIES = os.environ.get("GOPATH", "/usr/share/gocode")


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_stubs_compile_and_the_example_runs(platform: Platform, tmp_path: Path) -> None:
    source = tmp_path / "src"
    run(str(SDK / "generate.sh"), "example.com", str(source))
    shutil.copytree(SDK / "examples", source / "example.com/examples")
    build = {"GOPATH": f"{tmp_path}:{LIBRARIES}", "GO111MODULE": "off", "CGO_ENABLED": "0"}
    run("go", "vet", "example.com/aiaas/...", "example.com/examples/...", **build)
    program = tmp_path / "first_chat"
    run("go", "build", "-o", str(program), "example.com/examples/first_chat", **build)
    check(run(str(program), **settings(platform)), "NotFound")

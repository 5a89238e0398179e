"""`aiaas up`: hands over to the local stack, which comes with the same package; it never starts a part of it itself."""

import os
import sys
from importlib.util import find_spec

import click

from cli.errors import UsageProblem

_STACK = "deploy.local"


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), default=8080, envvar="PORT", show_default=True)
@click.option(
    "--engine", type=click.Choice(("llamacpp", "vllm")), default="llamacpp", envvar="ENGINE", show_default=True
)
@click.option("--one-process", is_flag=True, help="The edge and the router in one process.")
def up(port: int, engine: str, one_process: bool) -> None:
    """Start the whole platform on this machine, until Ctrl-C. In another terminal, `aiaas login --local` signs in."""
    if find_spec("rich") is None or find_spec("xllamacpp") is None:
        raise UsageProblem("The local stack is not installed: pip install 'aiaas[local]', or `make up` in the sources.")
    command = [sys.executable, "-m", _STACK, "--port", str(port), "--engine", engine]
    os.execv(sys.executable, command + (["--one-process"] if one_process else []))  # noqa: S606 - no shell is wanted

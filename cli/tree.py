"""The tree of commands: those of the contracts, and the few that are written by hand; it makes only what is asked for,
so that help is there at once."""

import json
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from cli.profiles import DEFAULT_URL
from cli.session import Session

BY_HAND: Mapping[tuple[str, ...], tuple[str, str]] = {
    ("up",): ("cli.commands.up:up", "Start the whole platform on this machine."),
    ("login",): ("cli.commands.login:login", "Sign in, or keep an API key."),
    ("logout",): ("cli.commands.login:logout", "Forget the credential, and end what it belongs to."),
    ("chat",): ("cli.commands.chat:chat", "Talk to a model."),
    ("doctor",): ("cli.commands.doctor:doctor", "Check everything that a command needs, and say what to do."),
    ("bench",): ("cli.commands.bench:bench", "Measure latency and throughput of a model."),
    ("profiles",): ("cli.commands.profiles:profiles", "Platforms, and who one is there."),
    ("completion",): ("cli.commands.completion:completion", "Print what makes a shell complete commands."),
    ("exports", "download"): ("cli.commands.exports:download", "Wait for an export and fetch its file."),
    ("config", "plan"): ("cli.commands.config:plan", "Tell what applying a document would change."),
    ("config", "apply"): ("cli.commands.config:apply", "Apply a document, all or nothing, after showing the plan."),
}
"""Where each is, and what help says of it. One of a contract's name stands for that RPC."""

_COMMANDS = Path(__file__).with_name("commands.json")
_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


@cache
def contracts() -> Any:
    """What is known of the contracts; cli/contracts.py makes it."""
    return json.loads(_COMMANDS.read_text(encoding="utf-8"))


@cache
def _described() -> Mapping[tuple[str, ...], Any]:
    return {tuple(command["path"]): command for command in contracts()["commands"]}


class Branch(click.Group):
    """A group of commands at a place in the tree."""

    def __init__(self, place: tuple[str, ...], **settings: Any) -> None:
        super().__init__(place[-1] if place else None, context_settings=_HELP, **settings)
        self.place = place

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of what is right below."""
        depth = len(self.place)
        known = [*_described(), *BY_HAND]
        return sorted({path[depth] for path in known if path[:depth] == self.place and len(path) > depth})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command or group of that name."""
        path = (*self.place, cmd_name)
        if path in BY_HAND:
            module, _, name = BY_HAND[path][0].partition(":")
            command: click.Command = getattr(import_module(module), name)
            command.context_settings = {**_HELP, **command.context_settings}
            return command
        if path in _described():
            from cli.requests import RpcCommand

            return RpcCommand(_described()[path], contracts()["choices"])
        if any(known[: len(path)] == path for known in _described()):
            return Branch(path, help=contracts()["groups"].get(" ".join(path), ""))
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """What is right below with the beginning of its help, without making it."""
        names = self.list_commands(ctx)
        limit = formatter.width - 6 - max(map(len, names))
        rows = [(name, _first_sentence(self._said_of((*self.place, name)), limit)) for name in names]
        by_hand = [row for row in rows if (*self.place, row[0]) in BY_HAND]
        sections = (("Commands", by_hand), ("Resources", [row for row in rows if row not in by_hand]))
        for title, within in sections if not self.place else (("Commands", rows),):
            with formatter.section(title):
                formatter.write_dl(within)

    def _said_of(self, path: tuple[str, ...]) -> str:
        if path in BY_HAND:
            return BY_HAND[path][1]
        if path in _described():
            return str(_described()[path]["help"])
        return str(contracts()["groups"].get(" ".join(path), ""))


def _first_sentence(text: str, limit: int) -> str:
    sentence = text.partition(". ")[0].rstrip(".") + "."
    return sentence if len(sentence) <= limit else sentence[: limit - 3].rstrip(" ,;:") + "..."


def _version(ctx: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"aiaas {version('aiaas')}")
        ctx.exit()


def _session(profile_name: str | None, url: str | None, organization_id: str | None, token_file: str | None) -> None:
    session = Session(profile_name or "", url or "", organization_id or "", token_file or "")
    click.get_current_context().obj = session


root = Branch(
    (),
    callback=_session,
    params=[
        click.Option(["--profile", "profile_name"], envvar="AIAAS_PROFILE", metavar="NAME", help="The profile to use."),
        click.Option(
            ["--url"], envvar="AIAAS_URL", metavar="URL", help=f"The platform; else the profile's, else {DEFAULT_URL}."
        ),
        click.Option(["--org", "organization_id"], envvar="AIAAS_ORGANIZATION", metavar="ID", help="The organization."),
        click.Option(
            ["--token-file"],
            envvar="AIAAS_TOKEN_FILE",
            metavar="FILE",
            help="Use the credential in this file, - for standard input; else AIAAS_TOKEN, else the profile's.",
        ),
        click.Option(
            ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show it."
        ),
    ],
    help="The command line of aiaas, a client of its REST API.\n\n"
    "Most commands are made from the platform's contracts; `aiaas GROUP COMMAND --help` tells what each takes.",
    epilog="Exit codes: 0 done; 1 refused or failed; 2 the command line is wrong, nothing was sent; 3 the platform is"
    " away or busy, try again later.",
    no_args_is_help=True,
)
"""`aiaas` itself."""

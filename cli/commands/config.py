"""`aiaas config plan` and `apply`: a document's way to the RPCs that judge it; it never reads what is in one."""

import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from cli.errors import Failed, UsageProblem
from cli.session import Session

_FORMS = ("text", "json")


@click.command()
@click.argument("document", metavar="FILE")
@click.option("--allow-deletions", is_flag=True, help="Delete what the document lacks; else it is kept and reported.")
@click.option("--org", metavar="ID", help="The organization; else that of the profile.")
@click.option("--output", "-o", "form", type=click.Choice(_FORMS), default="text")
@click.pass_obj
def plan(session: Session, document: str, allow_deletions: bool, org: str | None, form: str) -> None:
    """Tell what applying a document would change. FILE is YAML; - is standard input.

    Fails with what is wrong in the document, line by line.
    """
    _show(_plan(session, org or session.organization(), _read(document), allow_deletions), form)


@click.command()
@click.argument("document", metavar="FILE")
@click.option("--allow-deletions", is_flag=True, help="Delete what the document lacks; else it is kept and reported.")
@click.option("--org", metavar="ID", help="The organization; else that of the profile.")
@click.option("--dry-run", is_flag=True, help="Show the plan, and stop there.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.pass_obj
def apply(session: Session, document: str, allow_deletions: bool, org: str | None, dry_run: bool, yes: bool) -> None:
    """Show the plan of a document, ask, and apply just that plan, all or nothing."""
    organization_id = org or session.organization()
    text = _read(document)
    planned = _plan(session, organization_id, text, allow_deletions)
    _show(planned, "text")
    if dry_run or not planned.get("changes"):
        return
    if not yes:
        if document == "-" or not sys.stdin.isatty():
            raise UsageProblem("The plan wants to be confirmed, and there is no terminal to ask on: give --yes.")
        click.confirm("Apply it?", abort=True, err=True)
    session.client.call(
        "POST",
        f"{_path(organization_id)}:apply",
        body={"document": text, "allow_deletions": allow_deletions, "fingerprint": planned["fingerprint"]},
        takes_request_id=True,
    )
    click.echo(f"Applied: {len(planned['changes'])} changes.", err=True)


def _path(organization_id: str) -> str:
    return f"/admin/v1/organizations/{quote(organization_id, safe='')}/configuration"


def _read(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageProblem(f"{path} cannot be read: {error}") from error


def _plan(session: Session, organization_id: str, document: str, allow_deletions: bool) -> dict[str, Any]:
    path = f"{_path(organization_id)}:plan"
    body = {"document": document, "allow_deletions": allow_deletions}
    planned: dict[str, Any] = session.client.call("POST", path, body=body).get("plan", {})
    return planned


def _show(planned: dict[str, Any], form: str) -> None:
    """Raises Failed where the document cannot be applied."""
    if form == "json":
        click.echo(json.dumps(planned, indent=2, ensure_ascii=False))
    elif planned.get("text"):
        click.echo(planned["text"].rstrip())
    elif not planned.get("problems"):
        click.echo("Nothing to change.", err=True)
    if problems := planned.get("problems"):
        for problem in problems:
            where = f"line {problem['line']}, {problem['path']}" if problem.get("line") else problem.get("path", "")
            click.echo(f"{where}: {problem['message']}", err=True)
        raise Failed("The document cannot be applied.")

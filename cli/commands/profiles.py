"""`aiaas profiles`: shows and changes profiles; it never shows a credential."""

import click

from cli import output
from cli.errors import UsageProblem
from cli.profiles import Profile
from cli.session import Session


@click.group()
def profiles() -> None:
    """Platforms, and who one is there. They are in a file that only you may read."""


@profiles.command("list")
@click.option("--output", "-o", "form", type=click.Choice(output.FORMATS), default="table")
@click.pass_obj
def list_profiles(session: Session, form: str) -> None:
    """List profiles; credentials are not shown."""
    rows = [
        {
            "name": name,
            "current": name == session.name,
            "url": each.url,
            "organization": each.organization_id,
            "signed_in": bool(each.token),
        }
        for name, each in sorted(session.profiles.all.items())
    ]
    output.write({"profiles": rows}, form, rows="profiles", columns=list(rows[0]) if rows else ())


@profiles.command("use")
@click.argument("name")
@click.pass_obj
def use(session: Session, name: str) -> None:
    """Use a profile from now on."""
    with session.profiles.changing() as known:
        _existing(session, name)
        known.current = name


@profiles.command("set")
@click.option("--org", "organization_id", metavar="ID", help="The organization that commands act in.")
@click.option("--address", "url", metavar="URL", help="The platform.")
@click.option("--client-id", metavar="ID", help="The OAuth2 client that `aiaas login` signs in with.")
@click.pass_obj
def set_profile(session: Session, organization_id: str | None, url: str | None, client_id: str | None) -> None:
    """Change what the profile says. Another address takes its credential away, as it belongs to the one before."""
    with session.profiles.changing() as known:
        profile = known.all.setdefault(session.name, Profile())
        if url is not None and url.rstrip("/") != profile.url:
            profile.url, profile.token, profile.refresh_token = url.rstrip("/"), "", ""
        if organization_id is not None:
            profile.organization_id = organization_id
        if client_id is not None:
            profile.client_id = client_id


@profiles.command("delete")
@click.argument("name")
@click.pass_obj
def delete(session: Session, name: str) -> None:
    """Forget a profile and its credential."""
    with session.profiles.changing() as known:
        _existing(session, name)
        del known.all[name]


def _existing(session: Session, name: str) -> None:
    if name not in session.profiles.all:
        raise UsageProblem(f"There is no profile {name!r}; `aiaas --profile {name} login` makes one.")

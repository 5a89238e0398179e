"""What every command runs with: the profile, organization and credential that apply; it never sends anything."""

import os
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.errors import UsageProblem
from cli.profiles import Profile, Profiles, default_path

if TYPE_CHECKING:
    from cli.client import Client


@dataclass
class Session:
    """Options before the command's name, then the environment, then the profile: the first that says it counts."""

    profile_name: str = ""
    url: str = ""
    organization_id: str = ""
    token_file: str = ""
    path: Path = field(default_factory=default_path)

    @cached_property
    def profiles(self) -> Profiles:
        """The file of profiles. Raises UsageProblem."""
        return Profiles(self.path)

    @property
    def name(self) -> str:
        """The profile's name."""
        return self.profile_name or self.profiles.current

    @property
    def profile(self) -> Profile:
        """The profile; where there is none of that name, a new one at the address of the current one."""
        known = self.profiles.all
        return known.get(self.name) or Profile(known.get(self.profiles.current, Profile()).url)

    @property
    def base_url(self) -> str:
        """The platform's address, without a slash at its end."""
        return (self.url or self.profile.url).rstrip("/")

    def organization(self) -> str:
        """The organization to act in. Raises UsageProblem where nothing says which."""
        found = self.organization_id or self.profile.organization_id
        if not found:
            raise UsageProblem(
                "Which organization? Give --org, set AIAAS_ORGANIZATION, or run `aiaas profiles set --org ...`."
            )
        return found

    def credential(self) -> str:
        """The credential; empty where there is none. Raises UsageProblem for a file that cannot be read."""
        if self.token_file:
            return read_secret(self.token_file, "Token")
        if token := os.environ.get("AIAAS_TOKEN", ""):
            return token
        # What belongs to one platform is never shown to another.
        return self.profile.token if self.base_url == self.profile.url.rstrip("/") else ""

    @cached_property
    def client(self) -> "Client":
        """The way to the platform, closed with the command."""
        # httpx alone takes longer to import than `aiaas --help` may.
        from cli.client import Client

        client = Client(self)
        click.get_current_context().find_root().call_on_close(client.close)
        return client


def read_secret(path: str, name: str) -> str:
    """The first line of a file; of "-", standard input, or what is typed unseen where that is a terminal.

    Raises UsageProblem where there is nothing.
    """
    if path == "-" and sys.stdin.isatty():
        text = str(click.prompt(name, hide_input=True, err=True))
    else:
        try:
            text = sys.stdin.readline() if path == "-" else Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageProblem(f"{path} cannot be read: {error}.") from error
    lines = text.strip().splitlines()
    if not lines:
        raise UsageProblem(f"{name}: {'standard input' if path == '-' else path} is empty.")
    return lines[0].strip()


def write_secret(path: str, text: str) -> None:
    """Write a file that only its owner may read. Raises UsageProblem where there is one already, or no folder."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise UsageProblem(f"{path} cannot be written: {error.strerror}.") from error
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text + "\n")

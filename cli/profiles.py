"""Profiles: where a platform is, which organization is meant, and the credential, in one file that only its owner may
read; it never writes a credential anywhere else."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cli.errors import UsageProblem

DEFAULT = "default"
DEFAULT_URL = "http://127.0.0.1:8080"


@dataclass
class Profile:
    """One platform and who one is there."""

    url: str = DEFAULT_URL
    organization_id: str = ""
    # An API key, a session token or an OAuth2 access token.
    token: str = field(default="", repr=False)
    # Of an OAuth2 sign-in; empty for what does not renew itself.
    refresh_token: str = field(default="", repr=False)
    client_id: str = ""
    # Seconds since 1970; 0 where the token itself does not say.
    expire_time: float = 0.0


class Profiles:
    """The file, which is read at once, and written as a whole by one command at a time."""

    def __init__(self, path: Path) -> None:
        """Raises UsageProblem for a file that cannot be read."""
        self.path = path
        self._read()

    @contextlib.contextmanager
    def changing(self) -> Iterator["Profiles"]:
        """The file as it is now, kept from other commands until the block has changed it. Raises UsageProblem."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageProblem(f"{self.path} cannot be written: {error.strerror}.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._read()
            yield self
            self._write()
        finally:
            os.close(lock)

    def _read(self) -> None:
        document: dict[str, Any] = {}
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            raise UsageProblem(f"{self.path} cannot be read: {error}. Remove it, and run `aiaas login`.") from error
        known = {each.name for each in fields(Profile)}
        self.current: str = document.get("current", DEFAULT)
        self.all = {
            name: Profile(**{key: value for key, value in values.items() if key in known})
            for name, values in document.get("profiles", {}).items()
        }

    def _write(self) -> None:
        """In one step, readable by its owner alone."""
        # Help needs none of what this imports.
        import tempfile

        document = {"current": self.current, "profiles": {name: asdict(each) for name, each in self.all.items()}}
        new = ""
        try:
            handle, new = tempfile.mkstemp(dir=self.path.parent, prefix=".profiles-")  # mode 0600
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(document, file, indent=1)
            os.replace(new, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise UsageProblem(f"{self.path} cannot be written: {error.strerror}.") from error


def default_path(environ: Mapping[str, str] = os.environ) -> Path:
    """AIAAS_CONFIG_DIR, else the user's own folder for configuration (XDG base directories)."""
    if chosen := environ.get("AIAAS_CONFIG_DIR"):
        return Path(chosen) / "profiles.json"
    return Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "aiaas" / "profiles.json"

"""The state folder: data, logs, secrets and who owns them; never shared by two running stacks."""

import base64
import contextlib
import fcntl
import json
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.local.errors import LocalError

SERVICE_USER = "aiaas"
REQUIRED_BYTES = 1 << 30


@dataclass(frozen=True)
class Account:
    """A user that processes run as."""

    name: str
    uid: int
    gid: int


class State:
    """The folder of one stack. Open it with `State.open` (kept) or `State.temporary` (removed at the end).

    As root everything in it belongs to a system user, because PostgreSQL refuses to run as root.
    """

    def __init__(self, root: Path, account: Account | None) -> None:
        self.root = root
        # Whom the servers run as; None means the caller.
        self.account = account

    @classmethod
    @contextlib.contextmanager
    def open(cls, root: Path | None = None, environ: Mapping[str, str] = os.environ) -> Iterator["State"]:
        """Opens the folder, made where it is missing, and holds it until the end of the block.

        Raises LocalError when it cannot be written, another stack holds it or less than 1 GiB is free.
        """
        root = (root or default_root(environ)).absolute()
        account = service_account() if os.geteuid() == 0 else None
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if account:
                os.chown(root, account.uid, account.gid)
            free_bytes = shutil.disk_usage(root).free
            lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LocalError(
                f"The state folder {root} cannot be used ({error.strerror}): choose another with AIAAS_STATE_DIR=..."
            ) from error
        try:
            if free_bytes < REQUIRED_BYTES:
                raise LocalError(
                    f"Only {free_bytes >> 20} MiB are free under {root} and the local stack wants 1024: "
                    "make room, or choose another disk with AIAAS_STATE_DIR=..."
                )
            if account and not may_enter(root, account):
                raise LocalError(
                    f"The servers run as user {account.name}, who may not enter {root}: "
                    "choose a folder whose parents everybody may enter with AIAAS_STATE_DIR=..."
                )
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LocalError(
                    f"A local stack already runs in {root}: stop it with Ctrl-C, "
                    "or start a second one with AIAAS_STATE_DIR=... and PORT=..."
                ) from error
            yield cls(root, account)
        finally:
            os.close(lock)

    @classmethod
    @contextlib.contextmanager
    def temporary(cls) -> Iterator["State"]:
        """A state folder of its own under the system's folder for temporary files, removed at the end of the block."""
        root = Path(tempfile.mkdtemp(prefix="aiaas-"))
        try:
            with cls.open(root) as state:
                yield state
        finally:
            shutil.rmtree(root, ignore_errors=True)

    def folder(self, name: str) -> Path:
        """The folder for one part, made where it is missing; it and all in it belong to the account."""
        path = self._made(self.root / name)
        if self.account:
            for folder, folders, files in os.walk(path):
                for entry in (folder, *(os.path.join(folder, name) for name in (*folders, *files))):
                    # A server that runs may remove what was just seen.
                    with contextlib.suppress(FileNotFoundError):
                        if os.lstat(entry).st_uid != self.account.uid:
                            os.chown(entry, self.account.uid, self.account.gid, follow_symlinks=False)
        return path

    def _made(self, folder: Path) -> Path:
        for part in (*reversed(folder.parents), folder):
            if part.is_relative_to(self.root):
                part.mkdir(mode=0o700, exist_ok=True)
                if self.account:
                    os.chown(part, self.account.uid, self.account.gid)
        return folder

    def write(self, name: str, text: str) -> Path:
        """Writes a private file (mode 600) in one step, so that a crash leaves the old one or the new one."""
        path = self.root / name
        self._made(path.parent)
        new = path.with_name(path.name + ".new")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            if self.account:
                os.fchown(file.fileno(), self.account.uid, self.account.gid)
        new.replace(path)
        return path

    def secret(self, name: str) -> str:
        """The secret of this name: made at random the first time, the same ever after."""
        path = self.root / "secrets" / name
        if not path.exists():
            self.write(f"secrets/{name}", secrets.token_hex(20))
        return path.read_text(encoding="utf-8")

    def key(self, name: str) -> str:
        """The key of this name, base64 of 32 bytes: made at random the first time, the same ever after."""
        path = self.root / "secrets" / name
        if not path.exists():
            self.write(f"secrets/{name}", base64.b64encode(secrets.token_bytes(32)).decode())
        return path.read_text(encoding="utf-8")

    def load(self, name: str) -> Any:
        """The document of this name as it was saved, or None."""
        path = self.root / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def save(self, name: str, document: Any) -> None:
        """Saves a document (anything JSON holds) in a private file."""
        self.write(name, json.dumps(document))

    def account_for(self, *paths: Path) -> Account | None:
        """Whom to run as what lies at these paths: the servers' user, or the caller where that one may not enter."""
        return self.account if self.account and all(may_enter(path, self.account) for path in paths) else None

    def forget(self, name: str) -> None:
        """Removes a document, where there is one."""
        (self.root / name).unlink(missing_ok=True)

    def program(self, path: Path) -> Path:
        """An installed program or folder, copied into the state folder where the servers' user may not enter it."""
        if self.account is None or may_enter(path, self.account):
            return path
        status = path.stat()
        copy = self.root / "programs" / f"{path.name}-{status.st_size}-{status.st_mtime_ns}"
        if not copy.exists():
            self.folder("programs")
            new = copy.with_name(copy.name + ".new")
            shutil.rmtree(new, ignore_errors=True)
            if path.is_dir():
                shutil.copytree(path, new, symlinks=True)
            else:
                shutil.copy2(path, new)
            new.replace(copy)
        self.folder("programs")
        return copy


def default_root(environ: Mapping[str, str]) -> Path:
    """AIAAS_STATE_DIR, else /var/lib/aiaas for root, else the user's own state folder (XDG base directories)."""
    if chosen := environ.get("AIAAS_STATE_DIR"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/var/lib/aiaas")
    return Path(environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "aiaas"


def service_account() -> Account:
    """The system user that the servers run as, made where it is missing. Only root may call."""
    try:
        entry = pwd.getpwnam(SERVICE_USER)
    except KeyError:
        command = [
            "useradd",
            "--system",
            "--user-group",
            "--no-create-home",
            "--shell",
            "/usr/sbin/nologin",
            SERVICE_USER,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        try:
            entry = pwd.getpwnam(SERVICE_USER)
        except KeyError:
            raise LocalError(
                f"The system user {SERVICE_USER} could not be made ({done.stderr.strip()}): make it with useradd, "
                "or run as an ordinary user."
            ) from None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def may_enter(path: Path, account: Account) -> bool:
    """Whether the account may reach the path and read what is there, judged by owner, group and mode."""
    path = path.resolve()
    for part in (path, *path.parents):
        status = part.stat()
        shift = 6 if status.st_uid == account.uid else 3 if status.st_gid == account.gid else 0
        wanted = 0o1 if part.is_dir() else 0o4
        if not status.st_mode >> shift & wanted:
            return False
    return True

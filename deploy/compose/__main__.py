"""Makes every secret and certificate that compose.yaml names; it never changes a secret that is there.

python -m deploy.compose FOLDER    FOLDER is deploy/compose/secrets

Certificates are made anew each time, and taken up by services that run. The folder is its owner's alone. The files in
it may be read by all who get there, which are containers: each is given its own, as a user that this machine does not
know.
"""

import base64
import json
import secrets
import sys
from pathlib import Path

from deploy.local.certificates import Authority

_DATABASES = ("identity", "router", "analytics")
_SERVICES = (*_DATABASES, "edge")


class Secrets:
    """The folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)

    def make(self) -> None:
        """Make what is missing, and all that follows from it."""
        for name in ("identity-audit-key", "identity-secret-key", "analytics-secret-key"):
            self._kept(name, base64.b64encode(secrets.token_bytes(32)).decode())
        self._password("postgres-password")
        databases = {name: self._password(f"{name}-database-password") for name in _DATABASES}
        self._write("postgres-init.sql", "".join(_database(*item) for item in databases.items()))
        for name, password in databases.items():
            self._write(f"{name}-database-url", f"postgresql://{name}:{password}@postgres:5432/{name}")
        broker = self._password("amqp-password")
        self._write("amqp-url", f"amqp://aiaas:{broker}@rabbitmq:5672/")
        self._write("rabbitmq.conf", f"default_user = aiaas\ndefault_pass = {broker}\nlog.console = true\n")
        redis = self._password("redis-password")
        self._write("redis-url", f"redis://:{redis}@redis:6379/0")
        self._write("valkey.conf", f'requirepass {redis}\ndir /data\nappendonly yes\nsave ""\n')
        keys = {"accessKey": "aiaas", "secretKey": self._password("s3-secret-key")}
        identity = {"name": "aiaas", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        self._write("s3.json", json.dumps({"identities": [identity]}))
        self._certificates()

    def _certificates(self) -> None:
        new = Authority.make()
        authority = Authority.load(self._kept("ca.key", new.key), self._kept("ca.crt", new.certificate))
        for service in _SERVICES:
            certificate, key = authority.issue(service)
            self._write(f"tls/{service}/tls.key", key)
            self._write(f"tls/{service}/tls.crt", certificate)
            self._write(f"tls/{service}/ca.crt", authority.certificate)

    def _password(self, name: str) -> str:
        return self._kept(name, secrets.token_hex(20))

    def _kept(self, name: str, new: str) -> str:
        path = self._folder / name
        if not path.exists():
            self._write(name, new)
        return path.read_text(encoding="utf-8")

    def _write(self, name: str, text: str) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".new")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.chmod(0o444)
        unfinished.replace(path)


def _database(name: str, password: str) -> str:
    return (
        f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{password}';\n"
        f'CREATE ROLE "aiaas_{name}" NOLOGIN;\n'
        f'GRANT "aiaas_{name}" TO "{name}";\n'
        f'CREATE DATABASE "{name}" OWNER "{name}";\n'
    )


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    Secrets(Path(arguments[0])).make()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

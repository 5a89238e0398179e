"""`aiaas login` and `logout`: gets a credential and keeps it in the profile; it never takes one from the command line.

In a browser it is OAuth2's authorization code with PKCE on a loopback address (RFC 8252, RFC 7636); in the terminal a
password and a second factor; else a credential that somebody already has: typed unseen, or from a file.
"""

import base64
import contextlib
import hashlib
import hmac
import json
import os
import secrets
import sys
import time
import webbrowser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import click

from cli.client import Client, is_here, take_tokens
from cli.errors import Failed, Refused, Unavailable, UsageProblem
from cli.profiles import Profile
from cli.session import Session, read_secret

_WITHIN_S = 300.0
_LOOPBACK = "127.0.0.1"
# Left by the local stack for programs that use it, in its state folder.
_READY = "ready.json"


@click.command()
@click.option(
    "--token-file", "from_file", metavar="FILE", help="Keep the credential in this file; - is standard input."
)
@click.option("--local", is_flag=True, help="Take address and key of the platform that `aiaas up` runs here.")
@click.option("--email", metavar="ADDRESS", help="Sign in with a password, and a second factor if you have one.")
@click.option("--password-file", metavar="FILE", help="The password for --email; else it is asked for.")
@click.option("--browser", is_flag=True, help="Sign in with a browser (OAuth2, PKCE). Needs a client id.")
@click.option("--client-id", metavar="ID", envvar="AIAAS_OAUTH_CLIENT_ID", help="A public OAuth2 client; kept.")
@click.option(
    "--redirect-port",
    type=click.IntRange(1024, 65535),
    default=8765,
    show_default=True,
    help=f"The client's redirect address is http://{_LOOPBACK}:PORT/callback.",
)
@click.option("--scope", default="", help="What to ask for in the browser; else all that the client may have.")
@click.option("--no-open", is_flag=True, help="Only print the address, for a browser on this machine.")
@click.pass_obj
def login(
    session: Session,
    from_file: str | None,
    local: bool,
    email: str | None,
    password_file: str | None,
    browser: bool,
    client_id: str | None,
    redirect_port: int,
    scope: str,
    no_open: bool,
) -> None:
    """Sign in, or keep an API key. Without an option the credential is asked for, and not shown.

    The address is that of --url, AIAAS_URL or the profile, and is kept in the profile.
    """
    if sum(map(bool, (from_file, local, email, browser))) > 1:
        raise UsageProblem("Choose one of --token-file, --local, --email and --browser.")
    profile = Profile(url=session.base_url, client_id=client_id or session.profile.client_id)
    profile.organization_id = session.organization_id
    if local:
        ready = _ready()
        profile.url, profile.token = ready["base_url"], ready["api_key"]
    elif email:
        profile.token = _password(session, email, password_file)
    elif browser:
        _browser(session, profile, redirect_port, scope, is_opened=not no_open)
    else:
        if not from_file and not sys.stdin.isatty():
            raise UsageProblem("There is no terminal to ask on: give --token-file FILE, - for standard input.")
        profile.token = read_secret(from_file or "-", "API key or token")
    _warn_of_plain_text(profile.url)
    principal = _principal(session, profile)
    profile.organization_id = profile.organization_id or principal.get("organization_id", "")
    with session.profiles.changing() as profiles:
        profiles.all[session.name] = profile
    who = principal.get("principal_id", "")
    click.echo(f"Signed in to {profile.url} as {who}, organization {profile.organization_id or '-'}.", err=True)


@click.command()
@click.pass_obj
def logout(session: Session) -> None:
    """Forget the credential. A session, or what a browser sign-in gave, is ended; an API key stays as it is."""
    profile = session.profile
    if not profile.token:
        click.echo("You are not signed in.", err=True)
        return
    try:
        if profile.refresh_token:
            fields = {"token": profile.refresh_token, "client_id": profile.client_id}
            session.client.form("/oauth2/revoke", fields)
        elif profile.token.startswith("aiss_"):
            for known in session.client.get("/admin/v1/sessions").get("sessions", ()):
                if known.get("current"):
                    session.client.call("DELETE", f"/admin/v1/sessions/{known['session_id']}")
    except (Refused, Unavailable) as error:
        click.echo(f"It could not be ended there, and lasts until it ends by itself: {error.message}", err=True)
    finally:
        with session.profiles.changing():
            profile = session.profile
            profile.token, profile.refresh_token, profile.expire_time = "", "", 0.0


def _ready() -> dict[str, str]:
    """What the local stack says of itself. Raises UsageProblem where none runs."""
    if chosen := os.environ.get("AIAAS_STATE_DIR"):
        folder = Path(chosen)
    elif os.geteuid() == 0:
        folder = Path("/var/lib/aiaas")
    else:
        folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "aiaas"
    try:
        ready: dict[str, str] = json.loads((folder / _READY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageProblem(
            f"No platform runs in {folder}: start one with `aiaas up`, or set AIAAS_STATE_DIR."
        ) from error
    return ready


def _warn_of_plain_text(url: str) -> None:
    if url.startswith("http:") and not is_here(url):
        click.echo(f"{url} is not encrypted: whoever is on the way reads the credential.", err=True)


def _principal(session: Session, profile: Profile) -> dict[str, Any]:
    """Whom a credential stands for. Raises Refused, Unavailable: then nothing is kept."""
    client = Client(Session(url=profile.url, path=session.path))
    # What the environment holds must not answer for what is being kept.
    client.use(profile.token)
    with contextlib.closing(client):
        try:
            principal: dict[str, Any] = client.get("/admin/v1/principal").get("principal", {})
        except Refused as error:
            # A credential that is good for inference alone, or a scope that says no more.
            if error.status != 403:
                raise
            return {}
        return principal


def _password(session: Session, email: str, password_file: str | None) -> str:
    """A session's token. Raises Refused, Unavailable, UsageProblem."""
    password = read_secret(password_file or "-", "Password")
    body = {"email": email, "password": password}
    if session.organization_id:
        body["organization_id"] = session.organization_id
    signed = session.client.call("POST", "/admin/v1/sessions", body=body, is_public=True)["sign_in"]
    if challenge := signed.get("mfa_challenge"):
        code = read_secret("-", "Code of your authenticator, or a recovery code").replace(" ", "")
        kind = "totp_code" if code.isdigit() and len(code) == 6 else "recovery_code"
        body = {"challenge_token": challenge["challenge_token"], kind: code}
        return str(session.client.call("POST", "/admin/v1/sessions:verify", body=body, is_public=True)["session_token"])
    return str(signed["signed_in"]["session_token"])


def _browser(session: Session, profile: Profile, port: int, scope: str, *, is_opened: bool) -> None:
    """Put the tokens of a sign-in in a browser into the profile. Raises Failed, Refused, Unavailable, UsageProblem."""
    if not profile.client_id:
        raise UsageProblem(
            "Which OAuth2 client? Give --client-id. An administrator makes one: `aiaas oauth-clients create"
            " --kind public --grant-types authorization-code --grant-types refresh-token"
            f" --redirect-uris http://{_LOOPBACK}:{port}/callback`."
        )
    redirect_uri = f"http://{_LOOPBACK}:{port}/callback"
    state, verifier = secrets.token_urlsafe(24), secrets.token_urlsafe(48)
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    asked = {
        "response_type": "code",
        "client_id": profile.client_id,
        "redirect_uri": redirect_uri,
        **({"scope": scope} if scope else {}),
        "state": state,
        "code_challenge": challenge,
        "code_challenge_method": "S256",
    }
    try:
        server = _Callback(port)
    except OSError as error:
        raise UsageProblem(f"Port {port} is taken ({error.strerror}): free it, or give --redirect-port.") from error
    with contextlib.closing(server):
        address = f"{profile.url}/oauth2/authorize?{urlencode(asked)}"
        click.echo(f"Sign in here:\n{address}", err=True)
        if is_opened:
            webbrowser.open(address)
        told = server.wait(state)
    if "error" in told:
        raise Failed(f"The sign-in was refused: {told.get('error_description') or told['error']}")
    take_tokens(
        profile,
        session.client.form(
            "/oauth2/token",
            {
                "grant_type": "authorization_code",
                "code": told["code"],
                "redirect_uri": redirect_uri,
                "client_id": profile.client_id,
                "code_verifier": verifier,
            },
        ),
    )


class _Callback(HTTPServer):
    """Waits on this machine for the browser to come back."""

    allow_reuse_address = True

    def __init__(self, port: int) -> None:
        super().__init__((_LOOPBACK, port), _CallbackHandler)
        self.state = ""
        self.told: dict[str, str] = {}

    def wait(self, state: str) -> dict[str, str]:
        """What came back with that state. Raises Failed after five minutes without it."""
        self.state = state
        ends = time.monotonic() + _WITHIN_S
        while not self.told:
            self.timeout = ends - time.monotonic()
            if self.timeout <= 0:
                raise Failed("Nobody signed in within five minutes.")
            self.handle_request()
        return self.told

    def close(self) -> None:
        """Stop listening."""
        self.server_close()


class _CallbackHandler(BaseHTTPRequestHandler):
    """Takes one redirect; whatever has another state is somebody else's (RFC 6749, 10.12)."""

    timeout = 10
    server: _Callback

    def do_GET(self) -> None:
        """Take what the query says."""
        parts = urlsplit(self.path)
        told = {name: values[0] for name, values in parse_qs(parts.query).items()}
        is_ours = parts.path == "/callback" and hmac.compare_digest(
            told.get("state", "").encode(), self.server.state.encode()
        )
        if not is_ours or not ("code" in told or "error" in told):
            self.send_error(404)
            return
        self.server.told = told
        said = b"You are signed in; this page can be closed." if "code" in told else b"The sign-in was refused."
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(said)))
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: an address with a code in it belongs nowhere."""

"""Sends requests as any customer's program does: credential, retries, errors; it never knows what a request means."""

import json
import random
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click
import httpx

from cli.errors import Refused, Unavailable, UsageProblem, refusal
from cli.profiles import Profile
from cli.session import Session

_TRIES = 4
_LONGEST_WAIT_S = 30.0
_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
# A token is renewed so long before it ends.
_RENEW_BEFORE_S = 60.0

Query = Sequence[tuple[str, str]]


class Client:
    """The platform's REST API for one command."""

    def __init__(self, session: Session) -> None:
        """Raises UsageProblem for an address that is none."""
        self._session = session
        url = httpx.URL(session.base_url)
        if url.scheme not in ("http", "https") or not url.host:
            raise UsageProblem(f"{session.base_url} is no address of a platform; it looks like https://host.")
        self._http = httpx.Client(
            base_url=url,
            timeout=_TIMEOUT,
            trust_env=not is_here(session.base_url),
            headers={"User-Agent": f"aiaas-cli/{own_version()}"},
        )
        self._credential: str | None = None

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def get(self, path: str, query: Query = ()) -> Any:
        """The document at a path. Raises Refused, Unavailable."""
        return self.call("GET", path, query)

    def call(
        self,
        verb: str,
        path: str,
        query: Query = (),
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        is_public: bool = False,
        takes_request_id: bool = False,
    ) -> Any:
        """The document that a request is answered with.

        Only what reads, or carries an Idempotency-Key by which a repeat is known, is sent again after a failure in
        which it may have been done; what was refused for now (429) was not done. Raises Refused, Unavailable.
        """
        sent = dict(headers or {})
        if takes_request_id:
            sent["Idempotency-Key"] = str(uuid.uuid4())
        may_repeat = verb == "GET" or takes_request_id
        for attempt in range(1, _TRIES + 1):
            try:
                answer = self._http.request(
                    verb, path, params=list(query), json=body, headers=sent | self.authorization(is_public)
                )
            except httpx.TransportError as error:
                # Without a connection nothing was sent.
                unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                failure: Refused | Unavailable = _unreachable(self._session.base_url, error)
                again = may_repeat or unsent
                pause_s = None
            else:
                if answer.is_success:
                    return _document(answer)
                failure = refused(answer)
                again = answer.status_code == 429 or (answer.status_code in (502, 503, 504) and may_repeat)
                pause_s = failure.retry_after_s
            if pause_s is None:
                # Spread, so that many clients do not come back together.
                pause_s = 0.25 * 2**attempt * random.uniform(0.5, 1)  # noqa: S311 - no secret
            if not again or attempt == _TRIES or pause_s > _LONGEST_WAIT_S:
                raise failure
            if pause_s >= 1 and isinstance(failure, Refused):
                click.echo(f"{failure.message} Trying again in {pause_s:.0f} s.", err=True)
            time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    @contextmanager
    def stream(self, verb: str, path: str, query: Query = (), body: Any = None) -> Iterator[Iterator[str]]:
        """The lines of an answer as they come. It is sent once. Raises Refused, Unavailable."""
        try:
            with self._http.stream(
                verb, path, params=list(query), json=body, headers=self.authorization(is_public=False)
            ) as answer:
                if not answer.is_success:
                    answer.read()
                    raise refused(answer)
                yield answer.iter_lines()
        except httpx.TransportError as error:
            raise _unreachable(self._session.base_url, error) from error

    def form(self, path: str, fields: Mapping[str, str]) -> Any:
        """The answer to a form of OAuth2 without a credential. Raises Refused, Unavailable."""
        try:
            answer = self._http.post(path, data=dict(fields))
        except httpx.TransportError as error:
            raise _unreachable(self._session.base_url, error) from error
        if not answer.is_success:
            raise refused(answer)
        return _document(answer) if answer.content else None

    def probe(self, path: str) -> httpx.Response:
        """Whatever a path answers, without a credential. Raises Unavailable."""
        try:
            return self._http.get(path, timeout=10.0)
        except httpx.TransportError as error:
            raise _unreachable(self._session.base_url, error) from error

    def use(self, credential: str) -> None:
        """Send this credential, whatever the profile or the environment says."""
        self._credential = credential

    def authorization(self, is_public: bool = False) -> dict[str, str]:
        """The header with the credential, renewed where it has to be. Raises UsageProblem where there is none."""
        if self._credential is None:
            self._credential = self._renewed() or self._session.credential()
        if self._credential and not self._credential.isascii():
            raise UsageProblem("The credential has characters that no credential has.")
        if not self._credential and not is_public:
            raise UsageProblem("You are not signed in: run `aiaas login`, or set AIAAS_TOKEN.")
        return {"Authorization": f"Bearer {self._credential}"} if self._credential else {}

    def _renewed(self) -> str:
        """A new access token for one of the profile that is about to end; empty where that is not what is used."""
        if not _is_ending(self._session.profile) or self._session.credential() != self._session.profile.token:
            return ""
        # One command at a time: a refresh token that is used twice would end the whole sign-in (RFC 9700, 4.14.2).
        with self._session.profiles.changing():
            profile = self._session.profile
            if _is_ending(profile):
                fields = {"refresh_token": profile.refresh_token, "client_id": profile.client_id}
                take_tokens(profile, self.form("/oauth2/token", {"grant_type": "refresh_token", **fields}))
        return profile.token


def is_here(url: str) -> bool:
    """Whether an address is on this machine, where no proxy leads to."""
    return httpx.URL(url).host in ("127.0.0.1", "::1", "localhost")


def _is_ending(profile: Profile) -> bool:
    return bool(profile.refresh_token) and time.time() > profile.expire_time - _RENEW_BEFORE_S


def take_tokens(profile: Profile, answer: Mapping[str, Any]) -> None:
    """Put what /oauth2/token answered into a profile (RFC 6749, 5.1)."""
    profile.token = answer["access_token"]
    profile.refresh_token = answer.get("refresh_token", "")
    profile.expire_time = time.time() + float(answer.get("expires_in", 0))


def refused(answer: httpx.Response) -> Refused:
    """The error of an answer whose body is read."""
    try:
        document = answer.json()
    except ValueError:
        document = None
    return refusal(answer.status_code, answer.headers, document)


def own_version() -> str:
    """The version of this program."""
    try:
        return version("aiaas")
    except PackageNotFoundError:
        return "0"


def _document(answer: httpx.Response) -> Any:
    try:
        return json.loads(answer.content or b"{}")
    except ValueError as error:
        raise Unavailable(f"{answer.url} answered with something that is not JSON: is it a platform?") from error


def _unreachable(url: str, error: httpx.TransportError) -> Unavailable:
    why = "did not answer in time" if isinstance(error, httpx.TimeoutException) else f"cannot be reached ({error})"
    return Unavailable(f"{url} {why}. `aiaas doctor` looks into it.")

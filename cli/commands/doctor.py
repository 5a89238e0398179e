"""`aiaas doctor`: checks what a command needs, from here to the engines, and says what to do; it never repairs."""

import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import click

from cli import output
from cli.errors import Failed, Refused
from cli.session import Session

_GOOD, _BAD, _OPEN = "ok", "bad", "unknown"
_CLOCK_SKEW_S = 30


@dataclass(frozen=True)
class _Finding:
    """What a check found, and what to do about it."""

    check: str
    state: str
    found: str
    do: str = ""


@click.command()
@click.option("--output", "-o", "form", type=click.Choice(output.FORMATS), default="table")
@click.pass_obj
def doctor(session: Session, form: str) -> None:
    """Check everything that a command needs: this machine, the platform, its services, its models.

    Fails if anything is bad.
    """
    findings: list[_Finding] = []
    for check in _CHECKS:
        try:
            findings += check(session)
        except Refused as error:
            findings.append(_not_allowed(check, error))
        except click.ClickException as error:
            findings.append(_Finding(_name(check), _BAD, error.message, "See to what comes before."))
            # Without an answer there is nothing to ask further.
            if check in (_platform, _credential):
                break
    if form == "table":
        _show(findings)
    else:
        rows = [vars(finding) for finding in findings]
        output.write({"checks": rows}, form, rows="checks")
    if bad := sum(finding.state == _BAD for finding in findings):
        raise Failed(f"{bad} of {len(findings)} checks found something to do.")


def _not_allowed(check: Callable[[Session], Iterator[_Finding]], error: Refused) -> _Finding:
    if error.status == 403:
        return _Finding(_name(check), _OPEN, "You may not see this.", "Ask somebody with the platform's permissions.")
    if error.status == 501:
        return _Finding(_name(check), _OPEN, "This platform does not tell.")
    what = f"{error.message} ({error.reason or error.status})"
    return _Finding(_name(check), _BAD, what, f"Look for request {error.request_id} in the logs.")


def _name(check: Callable[[Session], Iterator[_Finding]]) -> str:
    return check.__name__.strip("_").replace("_", " ")


def _show(findings: list[_Finding]) -> None:
    marks = {_GOOD: click.style("✓", fg="green"), _BAD: click.style("✗", fg="red"), _OPEN: "?"}
    width = max(len(finding.check) for finding in findings) + 2
    for finding in findings:
        click.echo(f"{marks[finding.state]} {finding.check:<{width}}{finding.found}")
        if finding.do and finding.state != _GOOD:
            click.echo(f"  {'':<{width}}{click.style(finding.do, bold=True)}")


def _profile(session: Session) -> Iterator[_Finding]:
    path = session.path
    if not path.exists():
        yield _Finding("profile", _OPEN, f"{path} does not exist yet.", "`aiaas login` makes it.")
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        yield _Finding("profile", _BAD, f"{path} can be read by others (mode {mode:o}).", f"chmod 600 {path}")
    else:
        yield _Finding("profile", _GOOD, f"{session.name} in {path}")


def _platform(session: Session) -> Iterator[_Finding]:
    began = time.monotonic()
    answer = session.client.probe("/health")
    took_ms = (time.monotonic() - began) * 1000
    if answer.status_code != 200:
        do = "Is this the address of a platform? `aiaas profiles set --address URL`"
        yield _Finding("platform", _BAD, f"{session.base_url}/health answered HTTP {answer.status_code}.", do)
        return
    yield _Finding("platform", _GOOD, f"{session.base_url} answers in {took_ms:.0f} ms")
    if date := answer.headers.get("date"):
        skew_s = time.time() - parsedate_to_datetime(date).timestamp()
        state = _GOOD if abs(skew_s) < _CLOCK_SKEW_S else _BAD
        yield _Finding("clock", state, f"{skew_s:+.0f} s from the platform's", "Set this machine's clock (NTP).")


def _services(session: Session) -> Iterator[_Finding]:
    checks: dict[str, str] = session.client.probe("/ready").json().get("checks", {})
    for name, told in sorted(checks.items()):
        do = f"Read {name}'s log and its own /ready, which names what it waits for (PostgreSQL, Redis, RabbitMQ)."
        yield _Finding(name, _GOOD if told == "ok" else _BAD, told, do)


def _credential(session: Session) -> Iterator[_Finding]:
    try:
        principal = session.client.get("/admin/v1/principal").get("principal", {})
    except Refused as error:
        if error.status not in (401, 403):
            raise
        state = _BAD if error.status == 401 else _OPEN
        yield _Finding("credential", state, error.message, "`aiaas login`")
        return
    where = principal.get("organization_id") or "no organization"
    yield _Finding("credential", _GOOD, f"{principal.get('principal_id')} in {where}")


def _models(session: Session) -> Iterator[_Finding]:
    names = [model["id"] for model in session.client.get("/v1/models").get("data", ())]
    do = "`aiaas models create`, `aiaas models prices create`, `aiaas backends create`"
    yield _Finding("models", _GOOD if names else _BAD, ", ".join(names) or "There is none that you may use.", do)


def _backends(session: Session) -> Iterator[_Finding]:
    backends = session.client.get("/admin/v1/backends", [("page_size", "500")]).get("backends", ())
    if not backends:
        yield _Finding("backends", _BAD, "There is none.", "`aiaas backends create`")
    for backend in backends:
        name = f"backend {backend['backend_id']}"
        if backend.get("draining"):
            yield _Finding(
                name, _OPEN, "It is being drained.", f"`aiaas backends update {backend['backend_id']} --no-draining`"
            )
        elif backend.get("health") == "BACKEND_HEALTH_HEALTHY":
            yield _Finding(name, _GOOD, backend["base_url"])
        else:
            found = backend.get("health_reason") or "It was not probed yet."
            do = f"See that {backend['base_url']} runs and that routers reach it."
            yield _Finding(name, _BAD if backend.get("health_reason") else _OPEN, found, do)


def _ingestion(session: Session) -> Iterator[_Finding]:
    told: dict[str, Any] = session.client.get("/analytics/v1/ingestion")
    freshness = told.get("freshness") or {}
    dead, consumers = int(told["dead_lettered_events"]), int(told["consumers"])
    through = freshness.get("complete_until") or "nobody knows when"
    if not consumers:
        yield _Finding("usage events", _BAD, "Nobody takes them.", "See that analytics runs and reaches RabbitMQ.")
    yield _Finding(
        "usage events",
        _GOOD if not dead else _BAD,
        f"counted until {through}, {dead} unreadable",
        "`aiaas ingestion replay`",
    )


def _books(session: Session) -> Iterator[_Finding]:
    reports = session.client.get("/analytics/v1/reconciliations", [("page_size", "50")]).get("reconciliations", ())
    # Newest first, so that the oldest of a kind is taken first and the newest stays.
    newest = {r["kind"]: r for r in reversed(reports) if r["state"] != "RECONCILIATION_STATE_RUNNING"}
    for kind, report in sorted(newest.items()):
        name = kind.removeprefix("RECONCILIATION_KIND_").lower()
        state = report["state"].removeprefix("RECONCILIATION_STATE_").lower()
        yield _Finding(
            f"books of {name}",
            # Engines also count what nobody is billed for, such as what was computed after a client had gone.
            {"agreed": _GOOD, "differed": _OPEN if name == "engines" else _BAD}.get(state, _OPEN),
            f"{state}, {report['start_time']} to {report['end_time']}",
            f"`aiaas reconciliations differences list {report['reconciliation_id']}`",
        )


_CHECKS: tuple[Callable[[Session], Iterator[_Finding]], ...] = (
    _profile,
    _platform,
    _services,
    _credential,
    _models,
    _backends,
    _ingestion,
    _books,
)

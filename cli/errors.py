"""How commands end: exit codes, and errors as people read them; it never asks the platform anything."""

import sys
from collections.abc import Mapping
from typing import Any

import click

OK = 0
REFUSED = 1
"""The platform refused, or what was asked for failed or is not in order. Trying again changes nothing."""
USAGE = 2
"""The command line makes no sense, or something that it needs is missing. Nothing was sent. click's own code too."""
UNAVAILABLE = 3
"""The platform could not be reached, or could not do it now. Trying again later makes sense."""


class UsageProblem(click.ClickException):
    """What a person has to do before the command can run. Nothing was sent."""

    exit_code = USAGE


class Failed(click.ClickException):
    """What was asked for did not succeed."""

    exit_code = REFUSED


class Unavailable(click.ClickException):
    """Nobody answered, or nobody could."""

    exit_code = UNAVAILABLE


class Refused(click.ClickException):
    """An error that the platform answered with."""

    exit_code: int  # type: ignore[misc] # click has one code for each class; here the status decides

    def __init__(
        self,
        status: int,
        message: str,
        *,
        reason: str = "",
        fields: Mapping[str, str] | None = None,
        request_id: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.fields = fields or {}
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        # click reads it off whatever was raised.
        self.exit_code = UNAVAILABLE if status == 429 or (status >= 500 and status != 501) else REFUSED

    def show(self, file: Any = None) -> None:
        """Write the error with all that the platform says of it."""
        file = file or sys.stderr
        click.echo(f"Error: {self.message}", file=file)
        told = [("reason", self.reason or f"HTTP {self.status}")]
        told += [
            ("field", name if said in ("", self.message) else f"{name}: {said}") for name, said in self.fields.items()
        ]
        if self.retry_after_s is not None:
            told.append(("try again in", f"{self.retry_after_s:g} s"))
        if self.request_id:
            told.append(("request id", self.request_id))
        for name, value in told:
            click.echo(f"  {name:<13}{value}", file=file)
        if self.status == 401:
            click.echo("  Sign in with `aiaas login`.", file=file)


def refusal(status: int, headers: Mapping[str, str], document: Any) -> Refused:
    """An answer's error: as AIP-193, OpenAI or OAuth2 (RFC 6749) write it, or whatever else came."""
    request_id = headers.get("x-request-id", "")
    retry_after_s = retry_after(headers)
    error = document.get("error") if isinstance(document, dict) else None
    if isinstance(error, str):
        message = str(document.get("error_description") or error)
        return Refused(status, message, reason=error, request_id=request_id, retry_after_s=retry_after_s)
    if not isinstance(error, dict):
        return Refused(status, f"The answer was HTTP {status}.", request_id=request_id, retry_after_s=retry_after_s)
    reason = str(error.get("reason") or error.get("code") or "")
    fields = {str(error["param"]): ""} if error.get("param") else {}
    for detail in error.get("details") or ():
        if detail.get("reason"):
            reason = detail["reason"]
        for violation in detail.get("fieldViolations") or ():
            fields[violation.get("field", "")] = violation.get("description", "")
    message = str(error.get("message") or f"The answer was HTTP {status}.")
    return Refused(status, message, reason=reason, fields=fields, request_id=request_id, retry_after_s=retry_after_s)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After tells (RFC 9110, 10.2.3); None where it does not, or tells a date."""
    try:
        return max(0.0, float(headers["retry-after"]))
    except (KeyError, ValueError):
        return None

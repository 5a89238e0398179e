"""What the services of `tests.security.canaries_stack` import before anything of their own: calls that fail with an
exception which quotes all it was given, and, where CANARIES is "bare", the protections of each place switched off.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from types import SimpleNamespace
from typing import Any

EXPLODING = "exploding"
"""What a request names to have its handler fail."""

EXPLODING_PAGE = 77
"""As many webhooks nobody gets at once."""

# Each switch imports what it changes when it is thrown: other services know nothing of it.


def _explode_in_identity() -> None:
    from identity.issuers import Issuers
    from identity.sign_ins import SignIns

    sign_in, create = SignIns.sign_in, Issuers.create

    async def exploding_sign_in(self: SignIns, email: str, password: str, organization_id: str) -> Any:
        if EXPLODING in email:
            raise RuntimeError(f"no sign-in of { {'email': email, 'password': password} }")
        return await sign_in(self, email, password, organization_id)

    async def exploding_create(self: Issuers, caller: Any, wanted: Any, client_secret: str, request_id: str) -> Any:
        if EXPLODING in wanted.display_name:
            raise RuntimeError(f"no issuer with client_secret={client_secret!r}")
        return await create(self, caller, wanted, client_secret, request_id)

    SignIns.sign_in = exploding_sign_in  # type: ignore[method-assign]
    Issuers.create = exploding_create  # type: ignore[method-assign]


def _explode_in_router() -> None:
    from router import requests

    parse = requests.parse

    def exploding_parse(endpoint: int, body: bytes) -> Any:
        if EXPLODING.encode() in body:
            # The prompt is near, and not in the words of the exception.
            raise RuntimeError(f"no inference with api_key={json.loads(body)['user']}")
        return parse(endpoint, body)

    requests.parse = exploding_parse


def _explode_in_analytics() -> None:
    from analytics.webhooks import Webhooks
    from mesh import context

    list_page = Webhooks.list

    async def exploding_list(self: Webhooks, organization_id: str, after: Any, limit: int) -> Any:
        if limit == EXPLODING_PAGE + 1:
            raise RuntimeError(f"no page for Bearer {context.credential.get()}")
        return await list_page(self, organization_id, after, limit)

    Webhooks.list = exploding_list  # type: ignore[method-assign]


def _explode_in_edge() -> None:
    from edge.exchange import Exchange

    header = Exchange.header

    def exploding_header(self: Exchange, name: bytes) -> str | None:
        if EXPLODING.encode() in self.scope["query_string"]:
            raise RuntimeError(f"no header in {self.scope['headers']}")
        return header(self, name)

    Exchange.header = exploding_header  # type: ignore[method-assign]


def _bare_logs() -> None:
    from mesh import telemetry

    telemetry.redact = lambda text: text
    telemetry._SECRET_NAMES = frozenset()


def _bare_spans() -> None:
    from mesh import tracing

    tracing._clean = lambda value: value


def _bare_errors() -> None:
    from mesh import errors

    as_platform_error = errors.as_platform_error

    def telling(error: BaseException) -> errors.PlatformError:
        known = as_platform_error(error)
        if known is error or known.reason is not errors.Reason.INTERNAL:
            return known
        return errors.PlatformError(errors.Reason.INTERNAL, description=str(error))

    errors.as_platform_error = telling


def _bare_metrics() -> None:
    from mesh.interceptors import metrics

    requests = metrics._requests

    def by_caller(method_name: str, code: str) -> Any:
        from mesh import context

        return requests(f"{method_name} {context.credential.get()}", code)

    metrics._requests = by_caller  # type: ignore[assignment]


def _bare_seals() -> None:
    """What is sealed lies open."""
    from mesh import sealing

    sealing.Seal.close = lambda self, secret, bound_to: secret  # type: ignore[method-assign]
    sealing.Seal.open = lambda self, sealed, bound_to: sealed  # type: ignore[method-assign]


def _bare_idempotency() -> None:
    """Keys of requests lie in Valkey, journals and events as they are."""
    from router import idempotency, usage

    open_event = usage.open_event

    def telling(record: Any, router_id: str) -> Any:
        event = open_event(record, router_id)
        event.idempotency_digest = record.idempotency_key
        return event

    usage.open_event = telling

    def sha256(data: bytes) -> Any:
        # Of the two that are made one is of the key, the other one begins with an endpoint's number.
        return hashlib.sha256(data) if b":" in data else SimpleNamespace(hexdigest=data.decode)

    vars(idempotency)["hashlib"] = SimpleNamespace(sha256=sha256)


def _bare_audit() -> None:
    from identity.audit_calls import Call

    Call._given_reason = lambda self: str(self._request)[:1000]  # type: ignore[method-assign]


def _bare_decisions() -> None:
    from mesh import policies

    policies._strip = lambda message: None


_EXPLOSIONS = {
    "identity": _explode_in_identity,
    "router": _explode_in_router,
    "analytics": _explode_in_analytics,
    "edge": _explode_in_edge,
}
_EVERYWHERE = (_bare_logs, _bare_spans, _bare_errors, _bare_metrics, _bare_decisions, _bare_seals)
_OWN = {"identity": (_bare_audit,), "router": (_bare_idempotency,)}


def throw(service: str, *, bare: bool) -> None:
    """Change the service that this process is about to be."""
    # Names that are imported out of the changed modules are bound after this, so they are the changed ones.
    for switch in (*_EVERYWHERE, *_OWN.get(service, ())) if bare else ():
        switch()
    _EXPLOSIONS[service]()
    print(f"{service} explodes{', and goes without redaction' if bare else ''}", file=sys.stderr, flush=True)


if "CANARIES" in os.environ:
    words = tuple(sys.orig_argv[1:])
    try:
        if words[:1] == ("-m",) and words[2:] == ("serve",):
            throw(words[1], bare=os.environ["CANARIES"] == "bare")
    except BaseException:
        # What is raised here, Python reports and passes over; a switch that does nothing would prove nothing.
        traceback.print_exc()
        os._exit(70)

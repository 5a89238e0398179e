"""identity and PostgreSQL away for longer than anything is remembered without question: whom the router knows it
serves, also after a restart; whom it does not know it cannot judge; and nobody is told that his credential is wrong.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import aiohttp
import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from edge.openapi.endpoint import FILES
from edge.peers import services_of
from edge.scim.endpoints import KINDS
from mesh.auth import policy_of
from mesh.channel import connect
from mesh.config import load
from mesh.tls import TlsConfig, opened
from tests.load.host import call
from tests.money.client import Client
from tests.money.kills import AMPLE, BACK_WITHIN_S, HEALED_WITHIN_S, Matrix, Traffic, none_failed, told

# Beyond the minute for which principals are remembered.
AWAY_S = 75.0
AWAY_LONG_S = 300.0
# Routers write down whom they know every two seconds.
WRITTEN_DOWN_S = 5.0
REVOKED_WITHIN_S = 1.0
_AT_ONCE = 8
_TIMEOUT_S, _RPC_TIMEOUT_S = 30.0, 3.0
_VERBS = ("get", "post", "put", "patch", "delete")
_SERVICES = ("identity", "router", "analytics")


async def identity(matrix: Matrix) -> None:
    """Killed, and PostgreSQL with it; the router is killed meanwhile."""
    platform, verdict = matrix.platform, matrix.verdict
    away_s = AWAY_LONG_S if matrix.is_long else AWAY_S
    unknown, lost = await platform.new_client("Not seen yet"), await platform.new_client("Revoked")
    budgeted = await platform.new_client("With a hard budget", **AMPLE)
    await asyncio.gather(matrix.plain.ask(), lost.ask(), budgeted.ask())
    # Only then has the router anybody to forget on disk as well.
    await asyncio.sleep(WRITTEN_DOWN_S)
    revoked = await _revoked(matrix, lost)
    async with Traffic([matrix.plain]) as known, Traffic([budgeted], rate=5, stream_rate=0) as bound:
        async with platform.away("postgres", "identity"):
            await asyncio.sleep(away_s / 3)
            killed = await platform.kill("router")
            await platform.ready("router")
            while not (await matrix.plain.ask()).is_admitted and time.monotonic() < killed + 6 * BACK_WITHIN_S:
                await asyncio.sleep(0.05)
            back = time.monotonic()
            verdict.line(
                "identity, PostgreSQL and then the router killed: the router answers again",
                f"{back - killed:.1f} s after",
                back - killed <= BACK_WITHIN_S,
            )
            await asyncio.sleep(2 * away_s / 3)
            await _refused(matrix, unknown, revoked)
            away_for_s = time.monotonic() - killed + away_s / 3
        healed = time.monotonic()
        while not (seen := await unknown.ask()).is_admitted and time.monotonic() < healed + 4 * HEALED_WITHIN_S:
            await asyncio.sleep(0.1)
        healed_s = time.monotonic() - healed
    # What ran on the killed router is broken off, and the edge waits two seconds for another and no longer.
    gap = [seen for seen in known.seen if seen.asked_at < back and seen.ended_at >= killed]
    verdict.line("of requests while there was no router", told(gap), {seen.status for seen in gap} <= {0, 200, 503})
    known.seen = [seen for seen in known.seen if seen not in gap]
    none_failed(matrix, f"identity and PostgreSQL away for {away_for_s:.0f} s: requests with known keys", known)
    ways = Counter(
        (seen.status, bool(seen.retry_after)) for seen in bound.seen if seen.asked_at >= back or seen.ended_at < killed
    )
    verdict.line(
        "identity and PostgreSQL away: requests under hard budgets are answered, or get 503 with Retry-After",
        ", ".join(f"{count} of {status}" for (status, _), count in sorted(ways.items())),
        set(ways) == {(200, False), (503, True)},
    )
    verdict.line(
        "identity and PostgreSQL back: the key that nobody knew is let in",
        f"{healed_s:.1f} s after",
        seen.is_admitted and healed_s <= HEALED_WITHIN_S,
    )
    still = await revoked.ask()
    verdict.line("identity and PostgreSQL back: the revoked key", told([still]), still.status == 401)
    await matrix.settled("identity")


async def routes(matrix: Matrix) -> None:
    """PostgreSQL, identity and both are away, and everything is called that can be."""
    platform = matrix.platform
    # Of this key everybody knows, and its budget is the one to look at.
    await matrix.hard.ask()
    # What is refused without any outage is refused for a reason of its own.
    otherwise = await _walk(matrix, platform.stack.platform_key)
    for names in (("postgres",), ("identity",), ("postgres", "identity")):
        unknown = await platform.new_client("Not seen yet")
        async with platform.away(*names):
            for who, secret in (("known", platform.stack.platform_key), ("unknown", unknown.secret)):
                answers = await _walk(matrix, secret)
                wrong = {each: told for each, told in answers.items() if _is_wrong(told) and told != otherwise[each]}
                counts = Counter(told.partition(" ")[0] for told in answers.values())
                matrix.verdict.line(
                    f"{' and '.join(names)} away: every route with a good key, {who}: never 401 nor 500",
                    ", ".join(f"{count} {told}" for told, count in counts.most_common()),
                    # A walk on which nothing is missed went past what is away.
                    not wrong and counts["503"] > 0 and counts["UNAVAILABLE"] > 0,
                )
                for each, told in list(wrong.items())[:8]:
                    matrix.verdict.line(f"{' and '.join(names)} away: {each}", told)
        for service in _SERVICES:
            await platform.ready(service)
    await matrix.settled("routes")


async def _revoked(matrix: Matrix, client: Client) -> Client:
    """Revoke a client's key, and see it refused; returns a client that has it, and is held to no book."""
    path = f"/admin/v1/organizations/{client.organization_id}/api-keys/{client.api_key_id}:revoke"
    await call(matrix.platform.admin, "POST", path, {})
    revoked, began = replace(client, seen=[]), time.monotonic()
    while (seen := await revoked.ask()).status != 401 and time.monotonic() < began + 5 * REVOKED_WITHIN_S:
        await asyncio.sleep(0.02)
    took_s = seen.ended_at - began
    verdict = seen.status == 401 and took_s <= REVOKED_WITHIN_S
    matrix.verdict.line("a key is revoked before the outage", f"refused after {took_s:.2f} s", verdict)
    return revoked


async def _refused(matrix: Matrix, unknown: Client, revoked: Client) -> None:
    """Judge what those get who are not known, or not any more, or who cannot be."""
    wrong = unknown.secret[:-1] + ("A" if unknown.secret[-1] != "A" else "B")
    for who, client, status, reason in (
        ("a key that nobody has seen", replace(unknown, seen=[]), 503, "auth_unavailable"),
        ("a key that was revoked before", revoked, 503, "auth_unavailable"),
        ("a key with a wrong checksum", replace(unknown, secret=wrong, seen=[]), 401, "invalid_api_key"),
    ):
        seen = await client.ask()
        is_met = (seen.status, seen.reason) == (status, reason)
        matrix.verdict.line(f"identity and PostgreSQL away: {who}", told([seen]), is_met)


class _Call(NamedTuple):
    """One call of the public port. `form` is a body that is no JSON."""

    verb: str
    path: str
    body: Any = None
    form: Any = None


async def _walk(matrix: Matrix, secret: str) -> dict[str, str]:
    """What everything that can be called answers, by what was called: a status or a code, and what was said with it."""
    stack = matrix.platform.stack
    answers: dict[str, str] = {}
    headers, timeout = {"Authorization": f"Bearer {secret}"}, aiohttp.ClientTimeout(total=_TIMEOUT_S)
    at_once = asyncio.Semaphore(_AT_ONCE)
    async with aiohttp.ClientSession(stack.base_url, headers=headers, timeout=timeout) as session:

        async def one(each: _Call) -> None:
            async with at_once:
                answers[f"{each.verb} {each.path}"] = await _status(session, each)

        (path,) = (path for path in FILES if path.endswith(".json"))
        await asyncio.gather(*map(one, _calls(await call(session, "GET", path))))
    for service in _SERVICES:
        answers |= await _codes(matrix, service, secret)
    return answers


def _is_wrong(told: str) -> bool:
    return told.startswith(("401", "500", "UNAUTHENTICATED", "INTERNAL", "UNKNOWN"))


def _calls(document: dict[str, Any]) -> Iterator[_Call]:
    """Every operation that the edge serves, with the document's own examples in it; inferences, which leave records,
    are what clients ask for anyway."""
    for template, operations in document["paths"].items():
        for verb, operation in operations.items():
            if verb not in _VERBS or (verb, template[:4]) == ("post", "/v1/"):
                continue
            path = template
            for parameter in operation.get("parameters", ()):
                path = path.replace(f"{{{parameter['name']}}}", "text")
            content = operation.get("requestBody", {}).get("content", {})
            body, form = (
                content.get(media_type, {}).get("example")
                for media_type in ("application/json", "application/x-www-form-urlencoded")
            )
            yield _Call(verb.upper(), path, body, form)
    for kind in KINDS:
        yield _Call("GET", f"/scim/v2/{kind}")
        yield _Call("GET", f"/scim/v2/{kind}/text")
        yield _Call("POST", f"/scim/v2/{kind}", {"userName": "text", "displayName": "text"})


async def _status(session: aiohttp.ClientSession, each: _Call) -> str:
    try:
        async with session.request(
            each.verb, each.path, json=each.body, data=each.form, allow_redirects=False
        ) as answer:
            text = await answer.text()
    except TimeoutError:
        return "timeout"
    try:
        return f"{answer.status} {json.loads(text)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return str(answer.status)


async def _codes(matrix: Matrix, service: str, secret: str) -> dict[str, str]:
    """What the RPCs of a service say that no REST path leads to, called as the edge would."""
    stack, found = matrix.platform.stack, dict[str, str]()
    services = services_of(service)
    async with (
        opened(load(TlsConfig, stack.certificates["edge"])) as certificate,
        connect(stack.grpc[service], *services, tls=certificate) as channel,
    ):
        for method in (method for each in services for method in each.methods):
            if policy_of(method).rest.path or method.client_streaming or method.name == "Infer":
                continue
            way = channel.unary_stream if method.server_streaming else channel.unary_unary
            ask: Any = way(
                f"/{method.containing_service.full_name}/{method.name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            request = GetMessageClass(method.input_type)()
            if "credential" in method.input_type.fields_by_name:
                request.credential = secret  # type: ignore[attr-defined]
            asked = ask(request, metadata=(("authorization", f"Bearer {secret}"),), timeout=_RPC_TIMEOUT_S)
            try:
                await (asked.read() if method.server_streaming else asked)
                found[method.full_name] = "OK"
            except grpc.aio.AioRpcError as error:
                found[method.full_name] = f"{error.code().name} {error.details()}"
            finally:
                asked.cancel()
    return found


LINES: dict[str, Callable[[Matrix], Awaitable[None]]] = {"identity": identity, "routes": routes}
"""The lines of the matrix, by what is away."""

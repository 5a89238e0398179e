"""One request under a bare ASGI server and under one that offers its connection."""

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from edge.exchange import CONNECTION, Exchange, Limits
from mesh import tokens
from mesh.errors import PlatformError, Reason
from tests.doubles.connection import ConnectionDouble

LIMITS = Limits(max_body_bytes=8, idle_timeout_s=0.05, request_timeout_s=5.0)


def exchange(
    headers: Iterable[tuple[bytes, bytes]] = (),
    messages: Iterable[dict[str, Any]] = (),
    connection: ConnectionDouble | None = None,
    limits: Limits = LIMITS,
) -> Exchange:
    """An exchange whose body comes as these messages, after which nothing comes."""
    coming = iter(messages)

    async def receive() -> dict[str, Any]:
        for message in coming:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        raise AssertionError("nothing is sent")

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "headers": list(headers)}
    if connection is not None:
        scope["extensions"] = {CONNECTION: connection}
    return Exchange(scope, receive, send, limits, lambda elapsed_s: [])


def part(body: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_first_of_several_headers_counts() -> None:
    made = exchange([(b"x-request-id", b"one"), (b"x", b" y "), (b"x-request-id", b"two")])
    assert made.request_id == "one"
    assert made.header(b"x") == "y"
    assert made.header(b"absent") is None


def test_client_is_who_trusted_proxies_say_in_all_their_headers() -> None:
    headers = [(b"x-forwarded-for", b"198.51.100.7"), (b"x", b"y"), (b"x-forwarded-for", b"192.0.2.1")]
    trusting = replace(LIMITS, trusted_proxies=("10.0.0.0/8",))
    for limits, told, client in (
        (trusting, headers, "192.0.2.1"),
        (trusting, [], "10.0.0.1"),
        (LIMITS, headers, "10.0.0.1"),
    ):
        made = exchange(told, limits=limits)
        made.scope["client"] = ("10.0.0.1", 1)
        assert made.client_address == client


@pytest.mark.parametrize("credential", [tokens.API_KEY, tokens.SESSION, tokens.ACCESS_TOKEN])
def test_a_credential_is_taken_for_no_id_of_a_request(credential: tokens.TokenKind) -> None:
    text = credential.generate().text
    for offered in (text, f"req-{text}", "sk-0123456789abcdef", "eyJhbGciOiJub25lIn0.e30.x"):
        assert exchange([(b"x-request-id", offered.encode())]).request_id.startswith("req_")
    assert exchange([(b"x-request-id", b"task-12.eyJ_ai")]).request_id == "task-12.eyJ_ai"


@pytest.mark.parametrize(
    ("declared", "is_taken"),
    [
        (b"application/json", True),
        (b"Application/JSON ; charset=utf-8", True),
        (b"application/problem+json", True),
        (b"text/plain", False),
        (b"application/jsonx", False),
        (b"", False),
        (None, True),
    ],
)
def test_what_is_declared_must_be_json(declared: bytes | None, is_taken: bool) -> None:
    made = exchange([] if declared is None else [(b"content-type", declared)])
    if is_taken:
        made.expect_json()
    else:
        with pytest.raises(PlatformError) as error:
            made.expect_json()
        assert error.value.reason is Reason.UNSUPPORTED_MEDIA_TYPE


async def test_body_comes_in_parts_from_a_server_without_connections() -> None:
    assert await exchange(messages=[part(b"ab", more=True), part(b"cd")]).read_body() == b"abcd"


async def test_whole_body_is_taken_from_the_connection() -> None:
    assert await exchange(connection=ConnectionDouble(body=b"abcd")).read_body() == b"abcd"


async def test_body_of_which_a_part_has_come_is_waited_for() -> None:
    made = exchange(messages=[part(b"ab", more=True), part(b"cd")], connection=ConnectionDouble())
    assert await made.read_body() == b"abcd"


@pytest.mark.parametrize("connection", [None, ConnectionDouble(body=b"123456789")])
async def test_body_without_a_length_is_measured(connection: ConnectionDouble | None) -> None:
    with pytest.raises(PlatformError) as error:
        await exchange(messages=[part(b"123456789")], connection=connection).read_body()
    assert error.value.reason is Reason.REQUEST_TOO_LARGE


async def test_body_that_stalls_is_given_up() -> None:
    with pytest.raises(PlatformError) as error:
        await exchange(messages=[part(b"ab", more=True)], connection=ConnectionDouble()).read_body()
    assert error.value.reason is Reason.REQUEST_TIMEOUT


def test_callback_runs_once_where_the_client_is_lost() -> None:
    connection = ConnectionDouble()
    made = exchange(connection=connection)
    calls: list[bool] = []
    made.on_gone(lambda: calls.append(made.client_is_gone))
    assert calls == []
    connection.leave()
    connection.leave()
    assert calls == [True]


def test_callback_runs_at_once_when_the_client_is_gone_already() -> None:
    connection = ConnectionDouble()
    made = exchange(connection=connection)
    connection.leave()
    calls: list[bool] = []
    made.on_gone(lambda: calls.append(True))
    assert calls == [True]


def test_callback_can_be_taken_off() -> None:
    connection = ConnectionDouble()
    made = exchange(connection=connection)
    calls: list[bool] = []
    made.on_gone(lambda: calls.append(True))
    made.on_gone(None)
    connection.leave()
    assert calls == []
    assert made.client_is_gone


def test_nothing_of_a_request_refers_back_to_it() -> None:
    connection = ConnectionDouble()
    made = exchange(connection=connection)
    assert connection not in made.scope["extensions"].values()

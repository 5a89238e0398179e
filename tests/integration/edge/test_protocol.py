"""The limits of a connection, with raw bytes against the real server."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator

import pytest

from aiaas.router.v1 import inference_service_pb2 as pb
from edge.protocol import ConnectionLimits, EdgeProtocol
from tests.doubles.peer import PeerDouble
from tests.integration.edge.harness import Edge, running_edge, until

GET = b"GET /health HTTP/1.1\r\nhost: x\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\n"
SHORT = ConnectionLimits(header_timeout_s=0.3, write_timeout_s=0.3)


@pytest.fixture
async def hasty(peers: dict[str, PeerDouble]) -> AsyncIterator[Edge]:
    """An edge with little patience."""
    async with running_edge(peers, connection=SHORT) as edge:
        yield edge


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(b"x: " + b"a" * (1 << 20) + b"\r\n", id="one of a megabyte"),
        pytest.param(b"x: " + b"a" * (16 << 10) + b"\r\n", id="one a little too long"),
        pytest.param(b"".join(b"x%d: y\r\n" % number for number in range(5000)), id="very many"),
        pytest.param(b"a" * (1 << 20) + b": y\r\n", id="a long name"),
    ],
)
async def test_headers_above_the_limit_are_a_431(edge: Edge, headers: bytes) -> None:
    answer = await edge.exchange(GET + headers + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b'"code":"header_too_large"' in answer
    assert b"connection: close" in answer


async def test_long_target_is_a_431_in_the_shape_of_its_area(edge: Edge) -> None:
    answer = await edge.exchange(b"GET /admin/v1/models?x=" + b"a" * (1 << 20) + b" HTTP/1.1\r\nhost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b'"status":"INVALID_ARGUMENT"' in answer


async def test_headers_that_never_end_are_cut_off_while_they_come(edge: Edge) -> None:
    reader, writer = await edge.open()
    writer.write(GET + b"x: ")
    sent = 0

    async def answer() -> bytes:
        return await reader.read()

    answering = asyncio.create_task(answer())
    while not answering.done() and sent < 64 << 20:
        writer.write(b"a" * 4096)
        sent += 4096
        await asyncio.wait([answering], timeout=0.001)
    assert (await answering).startswith(b"HTTP/1.1 431 ")
    writer.close()


async def test_headers_just_below_the_limit_are_fine(edge: Edge) -> None:
    answer = await edge.exchange(GET + b"connection: close\r\nx: " + b"a" * (15 << 10) + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("second", "status"),
    [
        pytest.param(b"y: " + b"b" * (5 << 10) + b"\r\n\r\n", 401, id="below the limit together"),
        pytest.param(b"y: " + b"b" * (7 << 10) + b"\r\n\r\n", 431, id="above the limit together"),
        pytest.param(b"y: b\r\n\r\n" + b" " * (64 << 10), 401, id="a body in the same read"),
    ],
)
async def test_headers_in_several_reads_are_counted_together(edge: Edge, second: bytes, status: int) -> None:
    reader, writer = await edge.open()
    first = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 65536\r\n" + 2 * (
        b"x: " + b"a" * (5 << 10) + b"\r\n"
    )
    writer.write(first)
    connection = await connection_of(edge)
    await until(lambda: len(connection.headers or ()) == 2)
    writer.write(second)
    if status == 401 and not second.endswith(b" "):
        writer.write(b" " * 65536)
    assert (await reader.readline()).startswith(b"HTTP/1.1 %d " % status)
    writer.close()


async def test_body_before_headers_in_one_read_does_not_count_as_headers(edge: Edge) -> None:
    reader, writer = await edge.open()
    post = b"POST /v1/no-such HTTP/1.1\r\nhost: x\r\ncontent-length: 15000\r\n\r\n"
    header = b"x: " + b"a" * (10 << 10) + b"\r\n"
    writer.write(post + b" " * 15000 + GET + header)
    writer.write(b"\r\n")
    assert (await reader.readuntil(b"}}")).startswith(b"HTTP/1.1 404 ")
    writer.close()


async def test_limit_counts_each_request_of_a_connection_anew(edge: Edge) -> None:
    reader, writer = await edge.open()
    for _ in range(4):
        writer.write(GET + b"x: " + b"a" * (10 << 10) + b"\r\n\r\n")
        assert (await reader.readuntil(b'{"status":"ok"}')).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_many_pipelined_requests_in_one_read_are_fine(edge: Edge) -> None:
    answer = await edge.exchange((GET + b"\r\n") * 1000 + GET + b"connection: close\r\n\r\n")
    assert answer.count(b'{"status":"ok"}') == 1001


async def test_byte_by_byte_headers_are_cut_off_in_time(hasty: Edge) -> None:
    reader, writer = await hasty.open()
    reading = asyncio.create_task(reader.read())
    for byte in GET * 20:
        writer.write(bytes([byte]))
        await asyncio.wait([reading], timeout=0.05)
        if reading.done():
            break
    assert reading.done()
    assert await reading == b""
    writer.close()


async def test_silent_connection_is_closed_in_time(hasty: Edge) -> None:
    assert await hasty.exchange(b"", within_s=2) == b""


async def test_stray_bytes_do_not_keep_an_idle_connection_open(hasty: Edge) -> None:
    reader, writer = await hasty.open()
    writer.write(GET + b"\r\n")
    await reader.readuntil(b'{"status":"ok"}')
    reading = asyncio.create_task(reader.read())
    for _ in range(100):
        writer.write(b"\r\n")
        await asyncio.wait([reading], timeout=0.05)
        if reading.done():
            break
    assert reading.done()
    writer.close()


async def test_request_that_begins_in_time_on_a_kept_connection_is_served(hasty: Edge) -> None:
    reader, writer = await hasty.open()
    for _ in range(2):
        writer.write(GET)
        await writer.drain()
        writer.write(b"\r\n")
        assert (await reader.readuntil(b'{"status":"ok"}')).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_waiting_for_a_slow_answer_is_not_slowness_of_the_client(hasty: Edge, router: PeerDouble) -> None:
    gate = asyncio.Event()

    async def slow(request: pb.InferRequest) -> AsyncIterator[pb.InferResponse]:
        await gate.wait()
        yield pb.InferResponse(head=pb.InferHead(content_type="application/json"))
        yield pb.InferResponse(data=b"{}")
        yield pb.InferResponse(tail=pb.InferTail())

    router.streams["Infer"] = slow
    reader, writer = await hasty.open()
    writer.write(POST + b"content-length: 2\r\n\r\n{}\r\n" + GET)
    reading = asyncio.create_task(reader.readuntil(b"0\r\n\r\n"))
    await asyncio.wait([reading], timeout=3 * SHORT.header_timeout_s)
    assert not reading.done()
    gate.set()
    assert (await reading).startswith(b"HTTP/1.1 200 ")
    writer.close()


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}x", id="two lengths that differ"),
        pytest.param(POST + b"content-length: 2\r\ncontent-length: 2\r\n\r\n{}", id="two lengths alike"),
        pytest.param(POST + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", id="length, chunked"),
        pytest.param(POST + b"transfer-encoding: gzip\r\n\r\n{}", id="unknown transfer encoding"),
        pytest.param(POST + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n", id="chunked is not last"),
        pytest.param(POST + b"content-length: -2\r\n\r\n{}", id="negative length"),
        pytest.param(POST + b"content-length: 1 2\r\n\r\n{}", id="length in two words"),
        pytest.param(POST + b"content-length: 99999999999999999999999\r\n\r\n{}", id="length beyond 64 bits"),
        pytest.param(POST + b" x: folded\r\n\r\n", id="header that begins with a space"),
        pytest.param(POST + b"x : y\r\n\r\n", id="space before the colon"),
        pytest.param(POST + b"x: a\x00b\r\n\r\n", id="zero byte in a header"),
        pytest.param(POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n", id="chunk without a size"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00", id="TLS to a plain port"),
        pytest.param(b"GET / HTTP/9.9\r\n\r\n", id="unknown version"),
        pytest.param(b"BREW / HTTP/1.1\r\n\r\n", id="unknown verb"),
        pytest.param(b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n", id="connect"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2 with prior knowledge"),
    ],
)
async def test_bytes_that_are_not_http_are_a_400_and_reach_no_peer(
    edge: Edge, peers: dict[str, PeerDouble], sent: bytes
) -> None:
    answer = await edge.exchange(sent)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"message":"The request is not valid HTTP."' in answer
    assert answer.count(b"HTTP/1.1 ") == 1
    assert [call for peer in peers.values() for call in peer.received] == []


async def test_small_pieces_leave_at_once(edge: Edge) -> None:
    _, writer = await edge.open()
    await until(lambda: edge.server.server_state.connections)
    for connection in edge.server.server_state.connections:
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
    writer.close()


async def test_target_that_is_no_path_is_not_found(edge: Edge) -> None:
    answer = await edge.exchange(b"OPTIONS * HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert answer.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 "))


async def test_trailer_never_becomes_a_header(edge: Edge, router: PeerDouble) -> None:
    body = b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n2\r\n{}\r\n0\r\nidempotency-key: smuggled\r\n\r\n"
    await edge.exchange(POST + body)
    assert router.received[0].request.idempotency_key == ""


async def test_trailers_that_never_end_are_cut_off(edge: Edge, router: PeerDouble) -> None:
    _, writer = await edge.open()
    writer.write(POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: ")
    for _ in range(1000):
        if writer.transport.is_closing():
            break
        writer.write(b"a" * 16384)
        await asyncio.sleep(0.001)
    assert writer.transport.is_closing()
    assert router.received == []


async def test_upload_that_waits_for_continue_is_told_to_go_on(edge: Edge, router: PeerDouble) -> None:
    reader, writer = await edge.open()
    writer.write(POST + b"content-length: 2\r\nexpect: 100-continue\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"{}")
    await until(lambda: router.received)
    writer.close()


async def test_upload_that_is_refused_is_not_told_to_go_on(edge: Edge) -> None:
    answer = await edge.exchange(POST + b"content-length: 99999999\r\nexpect: 100-continue\r\n\r\n", within_s=2)
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_client_that_reads_nothing_is_cut_off_and_its_call_ends(hasty: Edge, router: PeerDouble) -> None:
    async def flood(request: pb.InferRequest) -> AsyncIterator[pb.InferResponse]:
        yield pb.InferResponse(head=pb.InferHead(content_type="text/event-stream"))
        while True:
            yield pb.InferResponse(data=b"data: " + b"x" * 32768 + b"\n\n")

    router.streams["Infer"] = flood
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", hasty.port))
        await loop.sock_sendall(client, POST + b"content-length: 2\r\n\r\n{}")
        await until(lambda: router.cancelled, within_s=5)


async def test_client_that_resets_while_it_waits_ends_its_call(edge: Edge, router: PeerDouble) -> None:
    async def silent(request: pb.InferRequest) -> AsyncIterator[pb.InferResponse]:
        await asyncio.Event().wait()
        yield pb.InferResponse()

    router.streams["Infer"] = silent
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", edge.port))
        await loop.sock_sendall(client, POST + b"content-length: 2\r\n\r\n{}")
        await until(lambda: router.received)
    await until(lambda: router.cancelled, within_s=2)


async def test_client_that_leaves_ends_the_first_of_its_pipelined_requests(edge: Edge, router: PeerDouble) -> None:
    async def silent(request: pb.InferRequest) -> AsyncIterator[pb.InferResponse]:
        await asyncio.Event().wait()
        yield pb.InferResponse()

    router.streams["Infer"] = silent
    _, writer = await edge.open()
    writer.write((POST + b"content-length: 2\r\n\r\n{}") * 3)
    await until(lambda: router.received)
    writer.close()
    await until(lambda: router.cancelled, within_s=2)
    await until(lambda: not edge.server.server_state.tasks)
    (line,) = edge.access_lines()
    assert (line["status"], line["reason"]) == (499, "cancelled")
    assert router.cancelled == ["Infer"]
    assert len(router.received) == 1


async def test_client_that_leaves_after_a_large_body_ends_its_call(edge: Edge, router: PeerDouble) -> None:
    async def silent(request: pb.InferRequest) -> AsyncIterator[pb.InferResponse]:
        await asyncio.Event().wait()
        yield pb.InferResponse()

    router.streams["Infer"] = silent
    _, writer = await edge.open()
    # In one read, after which nothing more is read for now.
    (await connection_of(edge)).data_received(POST + b"content-length: 100000\r\n\r\n" + b" " * 100_000)
    await until(lambda: router.received)
    writer.close()
    await until(lambda: router.cancelled, within_s=2)


async def test_request_on_one_connection_too_many_is_shed_and_its_connection_closed(
    peers: dict[str, PeerDouble],
) -> None:
    async with running_edge(peers, connection=ConnectionLimits(max_connections=1)) as edge:
        _, kept = await edge.open()
        await connection_of(edge)
        answer = await edge.exchange(POST + b"content-length: 2\r\n\r\n{}")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"code":"overloaded"' in answer
        assert b"connection: close\r\n" in answer
        assert b"retry-after: 1\r\n" in answer
        answer = await edge.exchange(b"GET /admin/v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"status":"UNAVAILABLE"' in answer
        answer = await edge.exchange(GET + b"\r\n")
        assert answer.startswith(b"HTTP/1.1 200 ")
        kept.close()
        await until(lambda: not edge.server.server_state.connections)
        assert (await edge.client.get("/v1/no-such")).status_code == 404


@pytest.mark.parametrize("value", ["a\r\nset-cookie: b", "a\nb", "a\0b", "a\x7fb"])
async def test_header_of_an_answer_cannot_be_split(edge: Edge, router: PeerDouble, value: str) -> None:
    async def splitting(request: pb.InferRequest) -> AsyncIterator[pb.InferResponse]:
        yield pb.InferResponse(head=pb.InferHead(content_type="application/json", headers={"x-a": value}))
        yield pb.InferResponse(data=b"{}")
        yield pb.InferResponse(tail=pb.InferTail())

    router.streams["Infer"] = splitting
    answer = await edge.exchange(POST + b"connection: close\r\ncontent-length: 2\r\n\r\n{}")
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b'"code":"internal_error"' in answer
    assert b"set-cookie" not in answer
    assert b"x-a" not in answer


async def connection_of(edge: Edge) -> EdgeProtocol:
    """The server's side of the only connection."""
    await until(lambda: edge.server.server_state.connections)
    (connection,) = edge.server.server_state.connections
    assert isinstance(connection, EdgeProtocol)
    return connection

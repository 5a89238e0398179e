"""Lua scripts through the mesh's own connection: many calls in one write, each answer to its own call, quick to give up
and quick to come back."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
import uvloop
from redis.asyncio import Redis

from mesh.clock import SystemClock
from mesh.errors import PlatformError, Reason
from mesh.scripts import Script, Scripts
from tests.conftest import Servers
from tests.doubles.tcp_gate import TcpGate

ECHO = Script("return ARGV[1]")
COUNT = Script("return redis.call('INCR', KEYS[1])")
APPEND = Script("return redis.call('RPUSH', KEYS[1], ARGV[1])")
READ = Script("return redis.call('LRANGE', KEYS[1], 0, -1)")
FAIL = Script("return redis.error_reply('OOM not today')")

echo = ECHO.call([], [], more=1)


@asynccontextmanager
async def started(url: str, *scripts: Script, timeout_s: float = 1.0) -> AsyncIterator[Scripts]:
    """Scripts whose connection is being made. The long timeout is for slow machines; tests that time give another."""
    subject = Scripts(url, SystemClock(), *(scripts or (ECHO,)), timeout_s=timeout_s)
    task = asyncio.create_task(subject.run_connection())
    try:
        yield subject
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def connected(url: str, *scripts: Script, timeout_s: float = 1.0) -> AsyncIterator[Scripts]:
    """Scripts on a Redis that is there."""
    async with started(url, *scripts, timeout_s=timeout_s) as subject:
        await asyncio.wait_for(subject.connected(), 10)
        yield subject


async def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def unavailable(scripts: Scripts, call: Callable[[], asyncio.Future[object]]) -> None:
    with pytest.raises(PlatformError) as error:
        await call()
    assert error.value.reason is Reason.UNAVAILABLE


class Server:
    """A Redis that answers as a test says: `answer` is handed each piece of bytes that arrives but the loading of
    scripts, and what it returns is sent `pause_s` later."""

    def __init__(
        self,
        answer: Callable[[bytes], bytes | None] = lambda data: b":7\r\n" * data.count(b"EVALSHA"),
        pause_s: float = 0,
    ) -> None:
        self.answer = answer
        self.pause_s = pause_s
        self.received: list[bytes] = []
        self.connections = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        """The address (host:port) of the server."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            await self._end(server)

    @asynccontextmanager
    async def listening_at(self, path: Path) -> AsyncIterator[None]:
        """The server at a path of the file system."""
        server = await asyncio.start_unix_server(self._serve, path)
        try:
            yield
        finally:
            await self._end(server)

    async def _end(self, server: asyncio.Server) -> None:
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while data := await reader.read(1 << 20):
                if b"LOAD" in data:
                    writer.write(b"+OK\r\n")
                    continue
                self.received.append(data)
                await asyncio.sleep(self.pause_s)
                if (answer := self.answer(data)) is not None:
                    writer.write(answer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()


async def test_answers_go_to_their_own_calls(redis_url: str) -> None:
    async with connected(redis_url) as scripts:
        futures = [scripts.run(echo, b"%d" % number) for number in range(500)]
        assert await asyncio.gather(*futures) == [b"%d" % number for number in range(500)]


async def test_calls_of_one_turn_leave_in_one_write() -> None:
    server = Server(lambda data: b":1\r\n" * data.count(b"EVALSHA"))
    async with server.listening() as address, connected(f"redis://{address}") as scripts:
        await asyncio.gather(*(scripts.run(echo, b"x") for _ in range(20)))
    assert len(server.received) == 1
    assert server.received[0].count(b"EVALSHA") == 20


async def test_what_is_told_runs_before_what_is_asked_later(redis_url: str) -> None:
    async with connected(redis_url, APPEND, READ) as scripts:
        append = APPEND.call([b"list"], [], more=1)
        for number in range(3):
            scripts.tell(append, b"%d" % number)
        assert await scripts.run(READ.call([b"list"], [])) == [b"0", b"1", b"2"]


async def test_a_call_with_an_argument_too_few_is_never_sent(redis_url: str) -> None:
    async with connected(redis_url) as scripts:
        with pytest.raises(TypeError):
            scripts.run(echo)
        assert await scripts.run(echo, b"whole") == b"whole"


async def test_a_caller_that_is_cancelled_does_not_shift_answers(redis_url: str) -> None:
    async with connected(redis_url) as scripts:
        first, second, third = (scripts.run(echo, name) for name in (b"first", b"second", b"third"))
        second.cancel()
        assert (await first, await third) == (b"first", b"third")
        assert await scripts.run(echo, b"fourth") == b"fourth"


async def test_scripts_that_the_server_forgot_are_loaded_again(redis_url: str) -> None:
    count = COUNT.call([b"counter"], [])
    async with connected(redis_url, ECHO, COUNT) as scripts, Redis.from_url(redis_url) as redis:
        await redis.script_flush()
        scripts.tell(count)
        answers = await asyncio.gather(*(scripts.run(count) for _ in range(10)), scripts.run(echo, b"x"))
        assert answers == [*range(2, 12), b"x"]
        await redis.flushall()
        assert await scripts.run(count) == 1
        assert scripts.connections == 1


async def test_a_script_that_was_not_named_at_the_start_is_loaded_when_it_is_needed(redis_url: str) -> None:
    async with connected(redis_url, ECHO) as scripts:
        assert await scripts.run(COUNT.call([b"counter"], [])) == 1


async def test_user_password_and_database_are_those_of_the_url(redis_url: str) -> None:
    address = urlsplit(redis_url)
    async with Redis.from_url(redis_url) as redis:
        await redis.acl_setuser("limits", enabled=True, passwords=["+p@ss/word"], keys=["*"], categories=["+@all"])
    url = f"redis://limits:{quote('p@ss/word', safe='')}@{address.hostname}:{address.port}/3"
    async with connected(url, COUNT) as scripts:
        await scripts.run(COUNT.call([b"counter"], []))
    async with Redis.from_url(address._replace(path="/3").geturl()) as redis:
        assert await redis.get("counter") == b"1"


async def test_a_wrong_password_is_an_outage(redis_url: str) -> None:
    address = urlsplit(redis_url)
    async with started(f"redis://:wrong@{address.hostname}:{address.port}/0") as scripts:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(scripts.connected(), 0.3)
        await unavailable(scripts, lambda: scripts.run(echo, b"x"))


@pytest.mark.parametrize("url", ["http://127.0.0.1:6379", "127.0.0.1:6379", "rediss://x/0?ssl_cert_reqs=perhaps"])
def test_a_url_that_is_not_redis_is_refused_at_once(url: str) -> None:
    with pytest.raises(Exception, match=r"(Redis URL|SSL)"):
        Scripts(url, SystemClock(), ECHO)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=valkey -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


async def test_tls_wants_a_certificate_that_is_trusted(certificate: tuple[Path, Path]) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*certificate)
    async with Server().listening(tls) as address:
        async with connected(f"rediss://{address}/?ssl_ca_certs={quote(str(certificate[0]))}") as scripts:
            assert await scripts.run(echo, b"x") == 7
        async with started(f"rediss://{address}/") as scripts:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(scripts.connected(), 0.3)


async def test_a_unix_socket_serves_as_well(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    async with Server().listening_at(path), connected(f"unix://{path}") as scripts:
        assert await scripts.run(echo, b"x") == 7


async def test_without_redis_calls_fail_at_once_and_succeed_once_it_is_there(redis_url: str) -> None:
    address = urlsplit(redis_url)
    gate = TcpGate(str(address.hostname), int(address.port or 0))
    await gate.open()
    await gate.shut()
    url = f"redis://:{address.password}@127.0.0.1:{gate.port}/0"
    async with started(url) as scripts:
        await asyncio.sleep(0)
        await unavailable(scripts, lambda: scripts.run(echo, b"x"))
        with pytest.raises(PlatformError):
            scripts.tell(echo, b"x")
        async with gate:
            await asyncio.wait_for(scripts.connected(), 10)
            assert await scripts.run(echo, b"x") == b"x"


async def test_a_server_that_dies_is_found_again(servers: Servers, redis_url: str) -> None:
    async with connected(redis_url) as scripts:
        running = scripts.run(echo, b"x")
        os.killpg(servers.pid(servers.valkey), signal.SIGKILL)
        with suppress(PlatformError):
            await running
        await until(lambda: scripts.connections > 1, 30)
        await until_answered(scripts)


async def until_answered(scripts: Scripts) -> None:
    async with asyncio.timeout(10):
        while True:
            with suppress(PlatformError):
                assert await scripts.run(echo, b"again") == b"again"
                return
            await asyncio.sleep(0.01)


async def test_a_stopped_server_costs_the_timeout_once_and_is_found_again(servers: Servers, redis_url: str) -> None:
    async with connected(redis_url, timeout_s=0.2) as scripts:
        pid = servers.pid(servers.valkey)
        os.killpg(pid, signal.SIGSTOP)
        loop = asyncio.get_running_loop()
        try:
            started = loop.time()
            waiting = [scripts.run(echo, b"x") for _ in range(50)]
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(outcome, PlatformError) for outcome in outcomes)
            assert 0.2 <= loop.time() - started < 2
            # It takes connections still, but answers none of them: nobody waits for it any more.
            turns = 0
            for _ in range(100):
                with pytest.raises(PlatformError):
                    scripts.run(echo, b"x")
                turns += 1
                await asyncio.sleep(0.002)
            assert turns == 100
        finally:
            os.killpg(pid, signal.SIGCONT)
        await until_answered(scripts)


async def test_an_answer_after_its_timeout_goes_to_nobody() -> None:
    """The first connection answers its first call only when the second call has come."""
    held: list[bytes] = []

    def answer(data: bytes) -> bytes | None:
        if server.connections == 1 and not held:
            held.append(b"$4\r\nlate\r\n")
            return None
        if held and server.connections == 1:
            return held[0]
        return b"$4\r\nnext\r\n"

    server = Server(answer)
    async with server.listening() as address, connected(f"redis://{address}", timeout_s=0.1) as scripts:
        await unavailable(scripts, lambda: scripts.run(echo, b"slow"))
        await until(lambda: scripts.connections == 2)
        assert await scripts.run(echo, b"x") == b"next"


async def test_the_oldest_call_times_out_though_newer_ones_keep_coming() -> None:
    server = Server(lambda data: None)
    async with server.listening() as address, connected(f"redis://{address}", timeout_s=0.2) as scripts:
        loop = asyncio.get_running_loop()
        started = loop.time()
        first = scripts.run(echo, b"x")
        others: list[asyncio.Future[object]] = []
        while not first.done():
            with suppress(PlatformError):
                others.append(scripts.run(echo, b"x"))
            await asyncio.sleep(0.005)
        assert loop.time() - started < 2
        assert isinstance(first.exception(), PlatformError)
        await asyncio.gather(*others, return_exceptions=True)


@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
async def test_a_busy_process_does_not_blame_the_server(
    sent: bool, run: Callable[[Coroutine[None, None, None]], None]
) -> None:
    """It is busy before its call has left, or before it reads the answer."""

    async def busy(url: str) -> None:
        async with connected(url, timeout_s=0.2) as scripts:
            if not sent:
                asyncio.get_running_loop().call_soon(time.sleep, 0.4)
            answer = scripts.run(echo, b"x")
            if sent:
                await asyncio.sleep(0)
                time.sleep(0.4)  # noqa: ASYNC251  # it is what this test is about
            assert await answer == 7
            assert scripts.connections == 1

    # It takes a while, so that an answer that is asked for too late is not there at once.
    async with Server(pause_s=0.02).listening() as address:
        await asyncio.to_thread(run, busy(f"redis://{address}"))


async def test_a_server_that_answers_no_call_is_not_tried_without_end() -> None:
    server = Server(lambda data: None)
    async with server.listening() as address, connected(f"redis://{address}", timeout_s=0.01) as scripts:
        loop = asyncio.get_running_loop()
        end = loop.time() + 1
        while loop.time() < end:
            with suppress(PlatformError):
                await scripts.run(echo, b"x")
            await asyncio.sleep(0.001)
        assert server.connections < 10


async def test_errors_in_a_row_end_the_connection_one_does_not(redis_url: str) -> None:
    fail = FAIL.call([], [])
    async with connected(redis_url, ECHO, FAIL) as scripts:
        await unavailable(scripts, lambda: scripts.run(fail))
        await unavailable(scripts, lambda: scripts.run(fail))
        assert await scripts.run(echo, b"x") == b"x"
        assert scripts.connections == 1
        for _ in range(3):
            await unavailable(scripts, lambda: scripts.run(fail))
        await until(lambda: scripts.connections == 2)


@pytest.mark.parametrize("garbage", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b":1\r\n:2\r\n:3\r\n"])
async def test_what_is_not_an_answer_ends_the_connection(garbage: bytes) -> None:
    server = Server(lambda data: garbage)
    async with server.listening() as address, connected(f"redis://{address}") as scripts:
        with suppress(PlatformError):
            assert await scripts.run(echo, b"x") == 1
        await until(lambda: scripts.connections == 2)


async def test_calls_beyond_the_cap_fail_at_once_and_wait_nowhere() -> None:
    server = Server(lambda data: None)
    async with server.listening() as address, connected(f"redis://{address}") as scripts:
        waiting = [scripts.run(echo, b"x") for _ in range(10_000)]
        with pytest.raises(PlatformError):
            scripts.run(echo, b"x")
        with pytest.raises(PlatformError):
            scripts.tell(echo, b"x")
        for future in waiting:
            future.cancel()


async def test_what_was_told_before_the_end_is_still_sent(redis_url: str) -> None:
    async with connected(redis_url, COUNT) as scripts:
        for _ in range(5):
            scripts.tell(COUNT.call([b"counter"], []))
    async with Redis.from_url(redis_url) as redis:
        async with asyncio.timeout(5):
            while await redis.get("counter") != b"5":
                await asyncio.sleep(0.01)

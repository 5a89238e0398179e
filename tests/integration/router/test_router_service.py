"""Replicas and engines' counters on real PostgreSQL: who is alive, windows that nobody writes twice, a restart."""

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import grpc
import pytest
from aiohttp import web
from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.router.v1 import backend_service_pb2, router_service_pb2_grpc
from aiaas.router.v1 import router_service_pb2 as pb
from mesh.auth import Principal
from mesh.database import Database
from mesh.errors import PlatformError, Reason, from_rpc_error
from mesh.interceptors import chain
from mesh.server import GrpcServer
from router.backends import Backend, Registry
from router.engine_token_store import EngineTokenStore
from router.engine_tokens import Counters, EngineTokenReader, Reading, window_between
from router.router_service import RouterService
from router.router_store import RouterStore
from router.routers import Condition, Heartbeats, Replica
from router.store import Store
from router.upstream import HttpUpstream
from tests.doubles.clock import ManualClock
from tests.integration.router.conftest import until

NOW = datetime(2026, 11, 20, 12, 0, 3, tzinfo=UTC)
REPLICA = Replica("router_1", "run_1", "127.0.0.1:1", "1.0", NOW)
CONDITION = Condition(draining=False, requests_in_flight=3, unpublished_entries=7)


class Operator:
    """Takes a credential for the permission that it names."""

    async def authenticate(self, credential: str) -> Principal:
        return Principal("user", "user_a", "org_a", permissions=frozenset({credential}), platform=True)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.close()


@pytest.fixture
async def stub(database: Database, tmp_path: Path) -> AsyncIterator[router_service_pb2_grpc.RouterServiceStub]:
    """RouterService behind the interceptors of production."""
    address = f"unix:{tmp_path}/router"
    service = (
        pb.DESCRIPTOR.services_by_name["RouterService"],
        router_service_pb2_grpc.add_RouterServiceServicer_to_server,
        RouterService(RouterStore(database), EngineTokenStore(database)),
    )
    server = GrpcServer(address, [service], chain(Operator()), drain_s=1)
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield router_service_pb2_grpc.RouterServiceStub(channel)
    await server.stop()


class Engine:
    """An engine whose counters the test sets; it counts how often it was read."""

    def __init__(self) -> None:
        self.started = 1000.0
        self.prompt = self.cached = self.completion = 0
        self.status = 200
        self.reads = 0

    async def metrics(self, _: web.Request) -> web.Response:
        self.reads += 1
        lines = [
            f'vllm:prompt_tokens_total{{engine="0"}} {self.prompt}.0',
            f'vllm:prompt_tokens_cached_total{{engine="0"}} {self.cached}.0',
            f'vllm:generation_tokens_total{{engine="0"}} {self.completion}.0',
            f"process_start_time_seconds {self.started}",
        ]
        return web.Response(text="\n".join([*lines, ""]), status=self.status)


@pytest.fixture
async def engine() -> AsyncIterator[tuple[Engine, str]]:
    """A scripted engine and its address."""
    scripted = Engine()
    application = web.Application()
    application.router.add_get("/metrics", scripted.metrics)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield scripted, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture
async def upstream() -> AsyncIterator[HttpUpstream]:
    async with HttpUpstream({}) as upstream:
        yield upstream


async def replica_of(database: Database, upstream: HttpUpstream, clock: ManualClock) -> EngineTokenReader:
    registry = Registry(Store(database))
    await registry.refresh()
    return EngineTokenReader(registry, upstream, EngineTokenStore(database), clock)


async def register(database: Database, base_url: str, backend_id: str = "vllm-1") -> None:
    backend = Backend(backend_id, base_url, backend_service_pb2.ENGINE_KIND_VLLM)
    await Store(database).create_backend(backend, None)


def stamp(moment: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp


def asked(**fields: object) -> pb.QueryEngineTokensRequest:
    start, end = NOW - timedelta(hours=1), NOW + timedelta(hours=1)
    return pb.QueryEngineTokensRequest(start_time=stamp(start), end_time=stamp(end), **fields)  # type: ignore[arg-type]


def counts(window: pb.EngineTokens) -> tuple[int, int, int, bool]:
    return window.prompt_tokens, window.cached_prompt_tokens, window.completion_tokens, window.reset


async def test_windows_follow_one_another_over_restarts_of_the_engine_and_of_replicas(
    database: Database,
    stub: router_service_pb2_grpc.RouterServiceStub,
    engine: tuple[Engine, str],
    upstream: HttpUpstream,
) -> None:
    scripted, base_url = engine
    await register(database, base_url)
    clock = ManualClock(NOW)
    first, second = [await replica_of(database, upstream, clock) for _ in range(2)]
    scripted.prompt, scripted.cached, scripted.completion = 500, 50, 70
    await first.read_due()
    assert not (await stub.QueryEngineTokens(asked())).windows

    clock.advance(10)
    scripted.prompt, scripted.cached, scripted.completion = 620, 66, 75
    # Two replicas want the same slot at the same time, and one of them wants it again.
    await asyncio.gather(first.read_due(), second.read_due())
    await first.read_due()
    assert scripted.reads == 2

    clock.advance(10)
    scripted.started, scripted.prompt, scripted.cached, scripted.completion = 2000.0, 5, 0, 1
    await second.read_due()
    # An engine that is away, or broken, makes the next window longer and loses nothing.
    for status in (500, 404):
        clock.advance(10)
        scripted.status = status
        await first.read_due()
    clock.advance(10)
    scripted.status, scripted.prompt = 200, 25
    await (await replica_of(database, upstream, clock)).read_due()

    windows = (await stub.QueryEngineTokens(asked())).windows
    assert [counts(window) for window in windows] == [(120, 16, 5, False), (5, 0, 1, True), (20, 0, 0, False)]
    assert {window.backend_id for window in windows} == {"vllm-1"}
    for before, after in itertools.pairwise(windows):
        assert before.end_time == after.start_time
    assert windows[0].start_time == stamp(NOW)
    assert windows[2].end_time == stamp(NOW + timedelta(seconds=50))


async def test_a_replica_that_was_overtaken_writes_nothing(database: Database) -> None:
    store = EngineTokenStore(database)
    slot = NOW.replace(second=0)
    await store.claim("b", slot)
    slow = Reading("u", NOW, Counters(None, 10, 0, 0))
    later = slot + timedelta(seconds=10)
    assert await store.claim("b", later) is not None
    assert await store.claim("b", slot) is None
    assert not await store.record("b", slot, slow, None)
    assert await store.record("b", later, dataclasses.replace(slow, counters=Counters(None, 12, 0, 0)), None)
    turn = await store.claim("b", later + timedelta(seconds=10))
    assert turn is not None
    assert turn.before is not None
    assert turn.before.counters.prompt_tokens == 12


async def test_windows_come_by_backend_and_time_page_by_page_and_old_ones_are_forgotten(
    database: Database, stub: router_service_pb2_grpc.RouterServiceStub
) -> None:
    store = EngineTokenStore(database)
    for backend_id in ("b", "a"):
        before = None
        for number in range(5):
            moment = NOW + timedelta(seconds=10 * number)
            after = Reading("u", moment, Counters(None, number, 0, 0))
            await store.claim(backend_id, moment)
            assert await store.record(backend_id, moment, after, window_between(backend_id, before, after))
            before = after
    told: list[pb.EngineTokens] = []
    token = ""
    while True:
        page = await stub.QueryEngineTokens(asked(page_size=3, page_token=token))
        told += page.windows
        token = page.next_page_token
        if not token:
            break
        assert len(page.windows) == 3
    assert [(each.backend_id, each.start_time.seconds - stamp(NOW).seconds) for each in told] == [
        (backend_id, start) for backend_id in ("a", "b") for start in (0, 10, 20, 30)
    ]
    assert {each.backend_id for each in (await stub.QueryEngineTokens(asked(backend_id="a"))).windows} == {"a"}
    await store.forget(NOW + timedelta(seconds=20))
    assert len((await stub.QueryEngineTokens(asked())).windows) == 6


async def test_wrong_questions_are_named(stub: router_service_pb2_grpc.RouterServiceStub) -> None:
    for request, field in (
        (pb.QueryEngineTokensRequest(end_time=stamp(NOW)), "start_time"),
        (pb.QueryEngineTokensRequest(start_time=stamp(NOW)), "end_time"),
        (pb.QueryEngineTokensRequest(start_time=stamp(NOW), end_time=stamp(NOW)), "start_time"),
        (asked(backend_id="a b"), "backend_id"),
        (asked(page_token="x"), "page_token"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.QueryEngineTokens(request)
        error = from_rpc_error(caught.value)
        assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)


async def listed(stub: router_service_pb2_grpc.RouterServiceStub) -> list[pb.Router]:
    metadata = (("authorization", "Bearer routers.list"),)
    return list((await stub.ListRouters(pb.ListRoutersRequest(), metadata=metadata)).routers)


async def test_replicas_are_alive_while_their_hearts_beat_and_known_after(
    database: Database, database_url: str, stub: router_service_pb2_grpc.RouterServiceStub
) -> None:
    store = RouterStore(database)
    running = asyncio.create_task(Heartbeats(store, REPLICA, lambda: CONDITION).run())
    await store.beat(dataclasses.replace(REPLICA, router_id="router_0"), CONDITION)

    async def are_alive() -> bool:
        return [router.router_id for router in await listed(stub)] == ["router_0", "router_1"]

    await until(are_alive)
    router = (await listed(stub))[1]
    assert (router.router_instance_id, router.address, router.version) == ("run_1", "127.0.0.1:1", "1.0")
    assert (router.draining, router.requests_in_flight, router.unpublished_entries) == (False, 3, 7)
    assert router.start_time == stamp(NOW)

    # One ends in good order, the other's last heartbeat grows old.
    running.cancel()
    await asyncio.wait([running])
    assert [router.router_id for router in await listed(stub)] == ["router_0"]
    connection = await asyncpg.connect(database_url)
    await connection.execute(
        "UPDATE routers SET heartbeat_time = now() - interval '10.1 s' WHERE router_id = 'router_0'"
    )
    await connection.close()
    assert not await listed(stub)
    assert not (await stub.ResolveRouters(pb.ResolveRoutersRequest())).routers
    since = stamp(datetime.now(UTC) - timedelta(minutes=1))
    known = (await stub.ResolveRouters(pb.ResolveRoutersRequest(since_time=since))).routers
    assert [router.router_id for router in known] == ["router_0", "router_1"]

    # The end of a former run, told late, does not end the next.
    await store.beat(dataclasses.replace(REPLICA, router_instance_id="run_2"), CONDITION)
    await store.leave(REPLICA)
    assert [router.router_instance_id for router in await listed(stub)] == ["run_2"]


async def test_listing_routers_needs_its_permission(stub: router_service_pb2_grpc.RouterServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ListRouters(pb.ListRoutersRequest(), metadata=(("authorization", "Bearer models.list"),))
    assert from_rpc_error(caught.value).reason is Reason.PERMISSION_DENIED


async def test_heart_goes_on_when_postgresql_comes_back() -> None:
    class Flaky:
        def __init__(self) -> None:
            self.beats = 0

        async def beat(self, replica: Replica, condition: Condition) -> None:
            self.beats += 1
            if self.beats == 1:
                raise PlatformError(Reason.UNAVAILABLE)

        async def leave(self, replica: Replica) -> None:
            raise PlatformError(Reason.UNAVAILABLE)

    flaky = Flaky()
    running = asyncio.create_task(Heartbeats(flaky, REPLICA, lambda: CONDITION).run())
    await until(lambda: flaky.beats >= 2)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()

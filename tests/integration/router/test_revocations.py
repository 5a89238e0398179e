"""Revocations reach a router on two ways, and end what runs for whom they concern."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis

from aiaas.identity.v1.auth_service_pb2 import (
    AuthenticateResponse,
    WatchRevocationsRequest,
    WatchRevocationsResponse,
)
from aiaas.identity.v1.auth_service_pb2_grpc import AuthServiceStub
from aiaas.router.v1.inference_service_pb2 import ListServedModelsRequest
from aiaas.router.v1.journal_service_pb2 import ListJournalEntriesRequest
from aiaas.router.v1.journal_service_pb2_grpc import JournalServiceStub
from aiaas.type.v1.usage_event_pb2 import OUTCOME_TRUNCATED, UsageEvent
from mesh.auth import CachedAuthenticator, RemoteAuthenticator
from mesh.errors import PlatformError, Reason
from mesh.revocations import CHANNEL, watch
from router.config import RouterConfig
from tests.doubles.clock import ManualClock
from tests.doubles.peer import PeerDouble
from tests.doubles.scripted_backend import Answer, ScriptedBackend, chunk, sse
from tests.integration.router.conftest import PRINCIPAL, Router, running, until

STREAM = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
EVENTS = "text/event-stream"
REVOKED = PlatformError(Reason.API_KEY_INVALID)
KEY_1 = WatchRevocationsResponse(api_key_id="key_1")


@dataclass
class Log:
    """identity's log of revocations, as its watch tells it."""

    identity: PeerDouble
    revision: int = 7
    oldest: int = 0
    lost: bool = False
    watches: list[int] = field(default_factory=list)
    _entries: list[WatchRevocationsResponse] = field(default_factory=list)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    def __post_init__(self) -> None:
        self.identity.streams["WatchRevocations"] = self.tell

    async def tell(self, request: WatchRevocationsRequest) -> AsyncIterator[WatchRevocationsResponse]:
        """What was revoked after the watcher's revision, and from now on."""
        self.watches.append(request.after_revision)
        seen = request.after_revision if self.oldest <= request.after_revision <= self.revision else self.revision
        if not request.after_revision:
            seen = self.revision
        yield WatchRevocationsResponse(revision=seen)
        while True:
            for entry in list(self._entries):
                if entry.revision > seen:
                    seen = entry.revision
                    yield entry
            async with self._news:
                await self._news.wait_for(lambda: self.revision > seen)  # noqa: B023 - awaited within the loop

    async def revoke(self, revocation: WatchRevocationsResponse, *, gap: int = 0) -> None:
        """Write one more, after `gap` that nobody is told."""
        async with self._news:
            self.revision += 1 + gap
            entry = WatchRevocationsResponse(revision=self.revision)
            entry.MergeFrom(revocation)
            self._entries.append(entry)
            self._news.notify_all()


@pytest.fixture
def log(identity: PeerDouble) -> Log:
    return Log(identity)


@pytest.fixture(autouse=True)
def nobody_takes_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.server._FLUSH_S", 0.0)


async def served(router: Router) -> None:
    """A call that needs the principal. Raises the PlatformError of the router."""
    await router.call(router.inference.ListServedModels, ListServedModelsRequest())


async def is_refused(router: Router) -> bool:
    try:
        await served(router)
    except PlatformError as error:
        return error.reason is Reason.API_KEY_INVALID
    return False


async def test_revoked_key_is_refused_within_a_second_over_redis(
    config: RouterConfig, identity: PeerDouble, redis_url: str
) -> None:
    # This identity tells no watcher anything.
    async with running(replace(config, redis_url=redis_url), identity) as router, Redis.from_url(redis_url) as redis:

        async def heard() -> bool:
            return bool(await redis.publish(CHANNEL, WatchRevocationsResponse(api_key_id="key_2").SerializeToString()))

        await until(heard)
        await served(router)
        identity.answers["Authenticate"] = REVOKED
        assert not await is_refused(router)
        await redis.publish(CHANNEL, KEY_1.SerializeToString())
        await until(lambda: is_refused(router), within_s=1)


@pytest.mark.parametrize(
    "revocation",
    [
        KEY_1,
        WatchRevocationsResponse(user_id="user_1"),
        WatchRevocationsResponse(organization_id="org_1"),
        WatchRevocationsResponse(role_id="role_1"),
    ],
)
async def test_revoked_key_is_refused_within_a_second_over_the_watch_while_redis_is_away(
    config: RouterConfig, identity: PeerDouble, log: Log, revocation: WatchRevocationsResponse
) -> None:
    async with running(config, identity) as router:
        await until(lambda: log.watches)
        await served(router)
        identity.answers["Authenticate"] = REVOKED
        await log.revoke(WatchRevocationsResponse(api_key_id="key_other"))
        assert not await is_refused(router)
        await log.revoke(revocation)
        await until(lambda: is_refused(router), within_s=1)


async def test_key_that_was_revoked_while_identity_was_away_is_refused_when_it_is_back(
    config: RouterConfig, identity: PeerDouble, log: Log
) -> None:
    async with running(config, identity) as router:
        await until(lambda: log.watches)
        await served(router)
        await log.revoke(WatchRevocationsResponse(api_key_id="key_other"))
        known, revision = router.credential, log.revision
        await identity.stop()
        await served(router)
        identity.answers["Authenticate"] = REVOKED
        await log.revoke(KEY_1)
        await identity.start()
        await until(lambda: is_refused(router), within_s=10)
        # It goes on where it was; what was told in the moment before identity went may not have arrived.
        assert log.watches[-1] in (revision - 1, revision)
        assert router.credential == known


@dataclass
class Watched:
    """A cache of principals that watches identity, and nothing else."""

    cache: CachedAuthenticator
    clock: ManualClock
    credential: str

    async def is_refused(self) -> bool:
        try:
            await self.cache.authenticate(self.credential)
        except PlatformError as error:
            return error.reason is Reason.API_KEY_INVALID
        return False


@pytest.fixture
async def watched(identity: PeerDouble) -> AsyncIterator[Watched]:
    identity.answers["Authenticate"] = AuthenticateResponse(principal=PRINCIPAL.to_proto())
    clock = ManualClock()
    async with grpc.aio.insecure_channel(identity.address) as channel:
        stub = AuthServiceStub(channel)
        cache = CachedAuthenticator(RemoteAuthenticator(stub), clock, random.Random(1))
        watching = asyncio.create_task(watch(stub, cache))
        yield Watched(cache, clock, "credential")
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await cache.close()


async def test_gap_in_the_revisions_has_all_asked_for_again(watched: Watched, identity: PeerDouble, log: Log) -> None:
    await until(lambda: log.watches and watched.cache.invalidations)
    assert not await watched.is_refused()
    identity.answers["Authenticate"] = REVOKED
    await log.revoke(WatchRevocationsResponse(api_key_id="key_other"))
    before = watched.cache.invalidations
    assert not await watched.is_refused()
    await log.revoke(WatchRevocationsResponse(api_key_id="key_other"), gap=1)
    await until(lambda: watched.cache.invalidations > before + 1)
    assert await watched.is_refused()


async def test_place_that_the_log_does_not_have_any_more_has_all_asked_for_again(
    watched: Watched, identity: PeerDouble, log: Log
) -> None:
    await until(lambda: log.watches and watched.cache.invalidations)
    assert not await watched.is_refused()
    await identity.stop()
    log.revision += 100
    log.oldest = log.revision
    identity.answers["Authenticate"] = REVOKED
    await identity.start()
    await until(watched.is_refused, within_s=5)


async def test_watch_that_goes_on_where_it_was_keeps_what_is_known(
    watched: Watched, identity: PeerDouble, log: Log
) -> None:
    await until(lambda: log.watches and watched.cache.invalidations)
    assert not await watched.is_refused()
    await identity.stop()
    identity.answers["Authenticate"] = REVOKED
    await identity.start()
    await until(lambda: len(log.watches) > 1)
    assert log.watches[-1] == log.revision
    assert not await watched.is_refused()


async def test_with_both_ways_dead_a_revoked_key_lasts_as_long_as_the_cache(
    watched: Watched, identity: PeerDouble
) -> None:
    # This identity tells no watcher anything, and nobody listens to Redis.
    assert not await watched.is_refused()
    identity.answers["Authenticate"] = REVOKED
    watched.clock.advance(40)
    assert not await watched.is_refused()
    watched.clock.advance(20)
    assert await watched.is_refused()


@pytest.mark.parametrize("way", ["Infer", "Relay", "within the process"])
@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        (REVOKED, Reason.API_KEY_INVALID),
        (
            AuthenticateResponse(principal=replace(PRINCIPAL, permissions=frozenset({"models.get"})).to_proto()),
            Reason.PERMISSION_DENIED,
        ),
    ],
)
async def test_running_stream_of_whom_a_revocation_ends_is_ended_and_billed_what_it_had(
    config: RouterConfig, identity: PeerDouble, log: Log, way: str, verdict: Any, reason: Reason
) -> None:
    async with running(config, identity, way=way) as router, ScriptedBackend() as engine:
        await router.add_model("m")
        await router.add_backend("only", engine.base_url, "m")
        engine.default = Answer([*sse(chunk("a"), chunk("b"), done=False), asyncio.Event()], content_type=EVENTS)
        answering = asyncio.create_task(router.answer(STREAM))
        await until(lambda: engine.received)
        identity.answers["Authenticate"] = verdict
        await log.revoke(WatchRevocationsResponse(api_key_id="key_other"))
        await log.revoke(KEY_1)
        async with asyncio.timeout(5):
            answer = await answering
        assert answer.error is not None
        assert answer.error.reason is reason
        assert answer.data.count(b"data: ") == 2
        await until(engine.received[-1].abandoned.is_set)
        (event,) = await events(router)
        assert (event.outcome, event.reason) == (OUTCOME_TRUNCATED, reason.value)
        assert event.usage.completion_tokens == 2


@pytest.mark.parametrize("way", ["Infer", "Relay"])
async def test_running_stream_of_a_key_that_merely_changed_goes_on(
    config: RouterConfig, identity: PeerDouble, log: Log, way: str
) -> None:
    async with running(config, identity, way=way) as router, ScriptedBackend() as engine:
        await router.add_model("m")
        await router.add_backend("only", engine.base_url, "m")
        go_on = asyncio.Event()
        engine.default = Answer([*sse(chunk("a"), done=False), go_on, *sse(chunk("b"))], content_type=EVENTS)
        answering = asyncio.create_task(router.answer(STREAM))
        await until(lambda: engine.received)
        changed = replace(PRINCIPAL, allowed_models=("m",))
        identity.answers["Authenticate"] = AuthenticateResponse(principal=changed.to_proto())
        asked = len(authentications(identity))
        await log.revoke(KEY_1)
        await until(lambda: len(authentications(identity)) > asked)
        go_on.set()
        answer = await answering
        assert answer.error is None
        assert answer.tail is not None


def authentications(identity: PeerDouble) -> list[Any]:
    return [received for received in identity.received if received.rpc == "Authenticate"]


async def events(router: Router) -> list[UsageEvent]:
    """What the journal holds of requests that ended."""
    stub = JournalServiceStub(router.channel)

    async def entries() -> list[UsageEvent]:
        listed = await router.call(stub.ListJournalEntries, ListJournalEntriesRequest())
        return [entry.event for entry in listed.entries if entry.event.reason]

    found: list[UsageEvent] = []

    async def are_there() -> bool:
        found[:] = await entries()
        return bool(found)

    await until(are_there)
    return found

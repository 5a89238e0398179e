"""Principals: how they are looked up and remembered."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from random import Random

import grpc
import pytest
from prometheus_client import REGISTRY

from aiaas.identity.v1 import auth_service_pb2, auth_service_pb2_grpc
from mesh import tokens
from mesh.auth import (
    CachedAuthenticator,
    Confirmed,
    Principal,
    RemoteAuthenticator,
)
from mesh.errors import PlatformError, Reason, to_status
from mesh.tokens import digest_of
from tests.doubles.clock import ManualClock
from tests.doubles.principals import KEY, principal

OTHER_KEY = tokens.API_KEY.generate()


def revoked(**subject: str) -> auth_service_pb2.WatchRevocationsResponse:
    return auth_service_pb2.WatchRevocationsResponse(**subject)  # type: ignore[arg-type]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def refused(call: Awaitable[Principal]) -> PlatformError:
    with pytest.raises(PlatformError) as raised:
        await call
    return raised.value


class Source:
    """Knows every key text in `known`, counts the calls, and can be away or slow."""

    def __init__(self) -> None:
        self.known = {KEY.text: principal(), OTHER_KEY.text: principal(key_id=OTHER_KEY.id)}
        self.calls: list[str] = []
        self.failure: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()

    async def authenticate(self, credential: str) -> Principal:
        self.calls.append(credential)
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        if credential not in self.known:
            raise PlatformError(Reason.API_KEY_INVALID)
        return self.known[credential]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def source() -> Source:
    return Source()


@pytest.fixture
def cache(source: Source, clock: ManualClock) -> CachedAuthenticator:
    return CachedAuthenticator(source, clock, Random(1), ttl_s=60, negative_ttl_s=5, stale_s=300)


# The cache


async def test_a_principal_is_asked_for_once_and_again_when_its_time_is_over(
    cache: CachedAuthenticator, source: Source, clock: ManualClock
) -> None:
    assert await cache.authenticate(KEY.text) == principal()
    clock.advance(47.9)
    assert await cache.authenticate(KEY.text) == principal()
    assert len(source.calls) == 1
    clock.advance(12.1)
    await cache.authenticate(KEY.text)
    assert len(source.calls) == 2


def answers(source: str) -> float:
    return REGISTRY.get_sample_value("aiaas_authentications_total", {"source": source}) or 0


async def test_what_is_fresh_is_answered_at_once_by_the_same_object(
    cache: CachedAuthenticator, source: Source, clock: ManualClock
) -> None:
    assert cache.cached(KEY.text) is None
    known = await cache.authenticate(KEY.text)
    before = answers("cache")
    assert cache.cached(KEY.text) is known
    assert await cache.authenticate(KEY.text) is known
    assert answers("cache") == before + 2
    clock.advance(60)
    assert cache.cached(KEY.text) is None
    assert answers("cache") == before + 2
    assert len(source.calls) == 1


async def test_a_principal_that_has_not_changed_stays_the_same_object(
    cache: CachedAuthenticator, source: Source, clock: ManualClock
) -> None:
    known = await cache.authenticate(KEY.text)
    source.known[KEY.text] = principal()
    clock.advance(60)
    assert await cache.authenticate(KEY.text) is known
    assert cache.cached(KEY.text) is known
    source.known[KEY.text] = principal("models.get")
    clock.advance(60)
    await cache.authenticate(KEY.text)
    assert cache.cached(KEY.text) == principal("models.get")


@pytest.mark.parametrize("credential", ["", "x", "x" * 10_000, "\udcff", "aias_\udcff", KEY.text + "x"], ids=range(6))
async def test_what_is_not_known_is_not_answered_at_once(cache: CachedAuthenticator, credential: str) -> None:
    await cache.authenticate(KEY.text)
    assert cache.cached(credential) is None


async def test_what_is_revoked_or_in_doubt_is_not_answered_at_once(cache: CachedAuthenticator) -> None:
    await cache.authenticate(KEY.text)
    await cache.authenticate(OTHER_KEY.text)
    cache.invalidate(revoked(api_key_id=KEY.id))
    assert cache.cached(KEY.text) is None
    assert cache.cached(OTHER_KEY.text) is not None
    cache.expire_all()
    assert cache.cached(OTHER_KEY.text) is None


async def test_what_is_served_while_identity_is_away_is_not_answered_at_once(
    cache: CachedAuthenticator, source: Source, clock: ManualClock
) -> None:
    await cache.authenticate(KEY.text)
    clock.advance(60)
    source.failure = PlatformError(Reason.UNAVAILABLE)
    assert await cache.authenticate(KEY.text) == principal()
    assert cache.cached(KEY.text) is None


async def test_a_key_that_ends_within_its_time_in_the_cache_is_not_answered_beyond_its_end(
    cache: CachedAuthenticator, source: Source, clock: ManualClock
) -> None:
    source.known[KEY.text] = principal(expire_time=clock.now() + timedelta(seconds=10))
    await cache.authenticate(KEY.text)
    clock.advance(9.9)
    assert cache.cached(KEY.text) is not None
    clock.advance(0.1)
    assert cache.cached(KEY.text) is None
    assert (await refused(cache.authenticate(KEY.text))).reason is Reason.API_KEY_INVALID
    assert len(source.calls) == 1


async def test_an_answer_at_once_counts_as_a_use(source: Source, clock: ManualClock) -> None:
    keys = [tokens.API_KEY.generate() for _ in range(3)]
    source.known |= {key.text: principal(key_id=key.id) for key in keys}
    cache = CachedAuthenticator(source, clock, Random(1), max_entries=2)
    await cache.authenticate(keys[0].text)
    await cache.authenticate(keys[1].text)
    cache.cached(keys[0].text)
    await cache.authenticate(keys[2].text)
    assert cache.cached(keys[0].text) is not None
    assert cache.cached(keys[1].text) is None


async def test_entries_made_together_do_not_all_end_together(source: Source, clock: ManualClock) -> None:
    keys = [tokens.API_KEY.generate() for _ in range(50)]
    source.known |= {key.text: principal(key_id=key.id) for key in keys}
    cache = CachedAuthenticator(source, clock, Random(1), ttl_s=60)
    for key in keys:
        await cache.authenticate(key.text)
    clock.advance(54)
    for key in keys:
        await cache.authenticate(key.text)
    assert 10 < len(source.calls) - 50 < 40


async def test_fifty_calls_on_one_missing_entry_make_one_look_up(cache: CachedAuthenticator, source: Source) -> None:
    source.open.clear()
    waiting = [asyncio.create_task(cache.authenticate(KEY.text)) for _ in range(50)]
    await until(lambda: len(source.calls) > 0)
    source.open.set()
    assert await asyncio.gather(*waiting) == [principal()] * 50
    assert len(source.calls) == 1


async def test_a_cancelled_waiter_does_not_cancel_the_look_up_of_the_others(
    cache: CachedAuthenticator, source: Source
) -> None:
    source.open.clear()
    first = asyncio.create_task(cache.authenticate(KEY.text))
    await until(lambda: len(source.calls) > 0)
    second = asyncio.create_task(cache.authenticate(KEY.text))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    source.open.set()
    assert await second == principal()
    assert len(source.calls) == 1


async def test_a_look_up_without_waiters_still_fills_the_cache(cache: CachedAuthenticator, source: Source) -> None:
    source.open.clear()
    only = asyncio.create_task(cache.authenticate(KEY.text))
    await until(lambda: len(source.calls) > 0)
    only.cancel()
    await asyncio.gather(only, return_exceptions=True)
    source.open.set()
    await until(lambda: not cache._tasks)
    await cache.authenticate(KEY.text)
    assert len(source.calls) == 1


async def test_a_broken_checksum_costs_no_call(cache: CachedAuthenticator, source: Source) -> None:
    for text in (KEY.text[:-1] + ("0" if KEY.text[-1] != "0" else "1"), "aias_", KEY.text + "x"):
        assert (await refused(cache.authenticate(text))).reason is Reason.API_KEY_INVALID
    assert source.calls == []


async def test_no_credential_and_an_absurd_one_cost_no_call(cache: CachedAuthenticator, source: Source) -> None:
    assert (await refused(cache.authenticate(""))).reason is Reason.MISSING_CREDENTIALS
    assert (await refused(cache.authenticate("x" * 10_000))).reason is Reason.API_KEY_INVALID
    assert source.calls == []


async def test_another_kind_of_credential_is_passed_on_as_it_is(cache: CachedAuthenticator, source: Source) -> None:
    source.known["session-token"] = principal()
    assert await cache.authenticate("session-token") == principal()
    assert source.calls == ["session-token"]


async def test_a_credential_that_is_not_ascii_costs_no_call(cache: CachedAuthenticator, source: Source) -> None:
    assert (await refused(cache.authenticate("aias_\udcff"))).reason is Reason.API_KEY_INVALID
    assert (await refused(cache.authenticate("\udcff"))).reason is Reason.API_KEY_INVALID
    assert source.calls == []


async def test_a_refusal_is_remembered_shortly(cache: CachedAuthenticator, source: Source, clock: ManualClock) -> None:
    unknown = tokens.API_KEY.generate()
    for _ in range(10):
        assert (await refused(cache.authenticate(unknown.text))).reason is Reason.API_KEY_INVALID
    assert len(source.calls) == 1
    source.known[unknown.text] = principal(key_id=unknown.id)
    clock.advance(5)
    assert (await cache.authenticate(unknown.text)).api_key_id == unknown.id


async def test_guessed_keys_do_not_push_out_good_ones(source: Source, clock: ManualClock) -> None:
    cache = CachedAuthenticator(source, clock, Random(1), max_entries=10)
    await cache.authenticate(KEY.text)
    for _ in range(100):
        await refused(cache.authenticate(tokens.API_KEY.generate().text))
    source.calls.clear()
    await cache.authenticate(KEY.text)
    assert source.calls == []
    assert len(cache._refusals) == 10


async def test_the_least_recently_used_entry_makes_room(source: Source, clock: ManualClock) -> None:
    keys = [tokens.API_KEY.generate() for _ in range(4)]
    source.known |= {key.text: principal(key_id=key.id) for key in keys}
    cache = CachedAuthenticator(source, clock, Random(1), max_entries=3)
    for index in (0, 1, 2, 0, 3):
        await cache.authenticate(keys[index].text)
    source.calls.clear()
    for index in (0, 2, 3):
        await cache.authenticate(keys[index].text)
    assert source.calls == []
    await cache.authenticate(keys[1].text)
    assert source.calls == [keys[1].text]
    assert len(cache._entries) == len(cache._digests) == 3


async def test_an_invalidated_key_is_asked_for_again_at_once(cache: CachedAuthenticator, source: Source) -> None:
    await cache.authenticate(KEY.text)
    await cache.authenticate(OTHER_KEY.text)
    del source.known[KEY.text]
    cache.invalidate(revoked(api_key_id=KEY.id))
    cache.invalidate(revoked(api_key_id="key_unknown"))
    assert (await refused(cache.authenticate(KEY.text))).reason is Reason.API_KEY_INVALID
    await cache.authenticate(OTHER_KEY.text)
    assert source.calls == [KEY.text, OTHER_KEY.text, KEY.text]


@pytest.mark.parametrize(
    ("subject", "concerned"),
    [
        ({"api_key_id": "key_1"}, {"one", "one again"}),
        ({"user_id": "user_1"}, {"one", "one again", "two"}),
        ({"service_account_id": "sa_3"}, {"three"}),
        ({"organization_id": "org_b"}, {"two", "three"}),
        ({"organization_id": "org_unknown"}, set()),
    ],
)
async def test_a_revocation_forgets_whom_it_concerns_and_nobody_else(
    cache: CachedAuthenticator, source: Source, subject: dict[str, str], concerned: set[str]
) -> None:
    source.known = {
        "one": principal(key_id="key_1", user_id="user_1"),
        "one again": principal(key_id="key_1", user_id="user_1"),
        "two": principal(key_id="key_2", user_id="user_1", organization_id="org_b"),
        "three": principal(key_id="key_3", service_account_id="sa_3", organization_id="org_b"),
        "four": principal(key_id="key_4"),
        "five": principal(key_id="", user_id="user_5"),
    }
    for credential in source.known:
        await cache.authenticate(credential)
    cache.invalidate(revoked(**subject))
    source.calls.clear()
    source.failure = PlatformError(Reason.UNAVAILABLE)
    for credential in source.known:
        if credential in concerned:
            assert (await refused(cache.authenticate(credential))).reason is Reason.AUTH_UNAVAILABLE
        else:
            await cache.authenticate(credential)
    assert set(source.calls) == concerned


@pytest.mark.parametrize("subject", [{"role_id": "role_1"}, {}])
async def test_a_revocation_that_may_concern_anybody_expires_all_and_keeps_them_for_an_outage(
    cache: CachedAuthenticator, source: Source, clock: ManualClock, subject: dict[str, str]
) -> None:
    await cache.authenticate(KEY.text)
    await cache.authenticate(OTHER_KEY.text)
    cache.invalidate(revoked(**subject))
    await cache.authenticate(KEY.text)
    assert source.calls == [KEY.text, OTHER_KEY.text, KEY.text]
    source.failure = PlatformError(Reason.UNAVAILABLE)
    await cache.authenticate(OTHER_KEY.text)
    clock.advance(300)
    assert (await refused(cache.authenticate(OTHER_KEY.text))).reason is Reason.AUTH_UNAVAILABLE
    await cache.authenticate(KEY.text)


async def test_expiring_all_prolongs_nothing(cache: CachedAuthenticator, source: Source, clock: ManualClock) -> None:
    await cache.authenticate(KEY.text)
    clock.advance(359)
    cache.expire_all()
    clock.advance(1)
    source.failure = PlatformError(Reason.UNAVAILABLE)
    assert (await refused(cache.authenticate(KEY.text))).reason is Reason.AUTH_UNAVAILABLE


@pytest.mark.parametrize("subject", [{"organization_id": "org_b"}, {"role_id": "role_1"}])
async def test_a_refusal_does_not_outlive_a_revocation(
    cache: CachedAuthenticator, source: Source, subject: dict[str, str]
) -> None:
    known, source.known = source.known, {}
    await refused(cache.authenticate(KEY.text))
    source.known = known
    cache.invalidate(revoked(**subject))
    assert await cache.authenticate(KEY.text) == principal()


async def test_a_refusal_that_came_across_a_revocation_ends_the_stale_entry(
    cache: CachedAuthenticator, source: Source, clock: ManualClock
) -> None:
    await cache.authenticate(KEY.text)
    clock.advance(60)
    source.open.clear()
    del source.known[KEY.text]
    waiting = asyncio.create_task(cache.authenticate(KEY.text))
    await until(lambda: len(source.calls) == 2)
    cache.invalidate(revoked(organization_id="org_b"))
    source.open.set()
    assert (await refused(waiting)).reason is Reason.API_KEY_INVALID
    source.failure = PlatformError(Reason.UNAVAILABLE)
    assert (await refused(cache.authenticate(KEY.text))).reason is Reason.AUTH_UNAVAILABLE


async def test_what_was_looked_up_before_a_revocation_is_not_kept(cache: CachedAuthenticator, source: Source) -> None:
    source.open.clear()
    before = asyncio.create_task(cache.authenticate(KEY.text))
    await until(lambda: len(source.calls) == 1)
    cache.invalidate(revoked(api_key_id=KEY.id))
    source.open.set()
    await before
    del source.known[KEY.text]
    assert (await refused(cache.authenticate(KEY.text))).reason is Reason.API_KEY_INVALID


async def test_a_look_up_that_began_before_a_revocation_is_not_joined(
    cache: CachedAuthenticator, source: Source
) -> None:
    source.open.clear()
    before = asyncio.create_task(cache.authenticate(KEY.text))
    await until(lambda: len(source.calls) == 1)
    cache.invalidate(revoked(api_key_id=KEY.id))
    after = asyncio.create_task(cache.authenticate(KEY.text))
    await until(lambda: len(source.calls) == 2)
    source.open.set()
    assert (await before, await after) == (principal(), principal())


async def test_a_refused_key_is_not_served_from_an_expired_entry(
    cache: CachedAuthenticator, source: Source, clock: ManualClock
) -> None:
    await cache.authenticate(KEY.text)
    clock.advance(60)
    del source.known[KEY.text]
    assert (await refused(cache.authenticate(KEY.text))).reason is Reason.API_KEY_INVALID
    source.failure = PlatformError(Reason.UNAVAILABLE)
    clock.advance(5)
    assert (await refused(cache.authenticate(KEY.text))).reason is Reason.AUTH_UNAVAILABLE


FAILURES = [
    PlatformError(Reason.AUTH_UNAVAILABLE),
    PlatformError(Reason.UNAVAILABLE),
    PlatformError(Reason.DEADLINE_EXCEEDED),
    PlatformError(Reason.INTERNAL),
    ConnectionError("identity"),
]


@pytest.mark.parametrize("failure", FAILURES)
async def test_an_outage_is_503_and_never_401(
    cache: CachedAuthenticator, source: Source, clock: ManualClock, failure: Exception
) -> None:
    source.failure = failure
    error = await refused(cache.authenticate(KEY.text))
    assert error.reason is Reason.AUTH_UNAVAILABLE
    assert error.entry.http == 503
    source.failure = None
    assert await cache.authenticate(KEY.text) == principal(), "an outage must not be remembered as a refusal"


@pytest.mark.parametrize("failure", FAILURES)
async def test_while_identity_is_away_an_expired_entry_serves_for_a_while(
    cache: CachedAuthenticator, source: Source, clock: ManualClock, failure: Exception
) -> None:
    await cache.authenticate(KEY.text)
    source.failure = failure
    clock.advance(60)
    assert await cache.authenticate(KEY.text) == principal()
    clock.advance(287)
    assert await cache.authenticate(KEY.text) == principal()
    clock.advance(13)
    assert (await refused(cache.authenticate(KEY.text))).reason is Reason.AUTH_UNAVAILABLE


async def test_identity_that_is_away_is_not_asked_for_each_request(
    cache: CachedAuthenticator, source: Source, clock: ManualClock
) -> None:
    await cache.authenticate(KEY.text)
    source.failure = PlatformError(Reason.UNAVAILABLE)
    clock.advance(60)
    for _ in range(100):
        await cache.authenticate(KEY.text)
    assert len(source.calls) == 2
    clock.advance(0.9)
    await cache.authenticate(KEY.text)
    assert len(source.calls) == 2
    source.failure = None
    clock.advance(1)
    await cache.authenticate(KEY.text)
    assert len(source.calls) == 3


async def test_identity_that_hangs_is_away(source: Source, clock: ManualClock) -> None:
    cache = CachedAuthenticator(source, clock, Random(1), timeout_s=0.02)
    source.open.clear()
    assert (await refused(cache.authenticate(KEY.text))).reason is Reason.AUTH_UNAVAILABLE


@pytest.mark.parametrize(("age_s", "is_served"), [(0, True), (359, True), (361, False), (-89, True), (-91, False)])
async def test_what_a_former_run_confirmed_has_the_age_that_it_has(
    cache: CachedAuthenticator, source: Source, clock: ManualClock, age_s: float, is_served: bool
) -> None:
    source.failure = PlatformError(Reason.UNAVAILABLE)
    known = Confirmed(principal(), clock.now().timestamp() - age_s)
    cache.restore({digest_of(KEY.text): known}, 7)
    assert cache.revision == 7
    assert cache.cached(KEY.text) is None, "nobody has confirmed it in this run"
    if is_served:
        assert await cache.authenticate(KEY.text) == principal()
    else:
        assert (await refused(cache.authenticate(KEY.text))).reason is Reason.AUTH_UNAVAILABLE
        assert cache.take_changes() == {digest_of(KEY.text): None}


async def test_what_a_former_run_confirmed_is_asked_for_where_somebody_answers(
    cache: CachedAuthenticator, source: Source, clock: ManualClock
) -> None:
    cache.restore({digest_of(KEY.text): Confirmed(principal(), clock.now().timestamp())}, 7)
    del source.known[KEY.text]
    assert (await refused(cache.authenticate(KEY.text))).reason is Reason.API_KEY_INVALID


async def test_an_invalidated_key_is_not_served_while_identity_is_away(
    cache: CachedAuthenticator, source: Source, clock: ManualClock
) -> None:
    await cache.authenticate(KEY.text)
    clock.advance(60)
    source.open.clear()
    source.failure = PlatformError(Reason.UNAVAILABLE)
    waiting = asyncio.create_task(cache.authenticate(KEY.text))
    await until(lambda: len(source.calls) == 2)
    cache.invalidate(revoked(api_key_id=KEY.id))
    source.open.set()
    assert (await refused(waiting)).reason is Reason.AUTH_UNAVAILABLE
    assert (await refused(cache.authenticate(KEY.text))).reason is Reason.AUTH_UNAVAILABLE


async def test_a_credential_ends_at_its_time_even_in_the_cache(
    cache: CachedAuthenticator, source: Source, clock: ManualClock
) -> None:
    source.known[KEY.text] = principal(expire_time=clock.now() + timedelta(seconds=10))
    await cache.authenticate(KEY.text)
    clock.advance(10)
    assert (await refused(cache.authenticate(KEY.text))).reason is Reason.API_KEY_INVALID
    source.failure = PlatformError(Reason.UNAVAILABLE)
    clock.advance(60)
    assert (await refused(cache.authenticate(KEY.text))).reason is Reason.API_KEY_INVALID


async def test_close_ends_look_ups_that_are_under_way(cache: CachedAuthenticator, source: Source) -> None:
    source.open.clear()
    waiting = asyncio.create_task(cache.authenticate(KEY.text))
    await until(lambda: len(source.calls) == 1)
    await cache.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_principal_comes_over_the_wire_and_so_do_refusals(tmp_path: Path) -> None:
    class Servicer(auth_service_pb2_grpc.AuthServiceServicer):
        async def Authenticate(
            self,
            request: auth_service_pb2.AuthenticateRequest,
            context: grpc.aio.ServicerContext[
                auth_service_pb2.AuthenticateRequest, Awaitable[auth_service_pb2.AuthenticateResponse]
            ],
        ) -> auth_service_pb2.AuthenticateResponse:
            if request.credential != KEY.text:
                status = to_status(PlatformError(Reason.API_KEY_INVALID))
                trailer = ("grpc-status-details-bin", status.SerializeToString())
                context.set_trailing_metadata(grpc.aio.Metadata(trailer))
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, status.message)
            return auth_service_pb2.AuthenticateResponse(principal=principal("api_keys.get").to_proto())

        def WatchRevocations(self, request: object, context: object) -> None:  # type: ignore[override]
            raise NotImplementedError

        def GetCurrentPrincipal(self, request: object, context: object) -> None:  # type: ignore[override]
            raise NotImplementedError

    server = grpc.aio.server()
    address = f"unix:{tmp_path}/identity.sock"
    auth_service_pb2_grpc.add_AuthServiceServicer_to_server(Servicer(), server)
    server.add_insecure_port(address)
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        remote = RemoteAuthenticator(auth_service_pb2_grpc.AuthServiceStub(channel))
        assert await remote.authenticate(KEY.text) == principal("api_keys.get")
        assert (await refused(remote.authenticate(OTHER_KEY.text))).reason is Reason.API_KEY_INVALID
        await server.stop(None)
        assert (await refused(remote.authenticate(KEY.text))).reason is Reason.UNAVAILABLE

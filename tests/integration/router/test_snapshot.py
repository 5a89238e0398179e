"""A router that starts again while identity, PostgreSQL or both are away."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from aiaas.identity.v1 import budget_service_pb2
from aiaas.identity.v1.auth_service_pb2 import WatchRevocationsResponse
from mesh.errors import PlatformError, Reason
from router.config import RouterConfig
from tests.doubles.peer import PeerDouble
from tests.doubles.scripted_backend import ScriptedBackend, chat_document
from tests.integration.router.conftest import PRINCIPAL, Router, running, until
from tests.integration.router.test_revocations import Log

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
NOWHERE = "postgresql://nobody@127.0.0.1:1/router"


@pytest.fixture(autouse=True)
def nobody_takes_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.server._FLUSH_S", 0.0)


@pytest.fixture
async def engine() -> AsyncIterator[ScriptedBackend]:
    async with ScriptedBackend() as engine:
        engine.default = chat_document("ok")
        yield engine


async def reason_of(router: Router) -> Reason | None:
    error = (await router.answer(CHAT)).error
    return None if error is None else error.reason


async def used(config: RouterConfig, identity: PeerDouble, engine: ScriptedBackend) -> str:
    """A credential that a router has served, which has stopped since."""
    async with running(config, identity) as router:
        await router.add_model("m")
        await router.add_backend("only", engine.base_url, "m")
        assert await reason_of(router) is None
        return router.credential


async def answered(router: Router) -> bool:
    return await reason_of(router) is None


async def test_known_credential_is_served_by_a_router_that_starts_while_all_else_is_away(
    config: RouterConfig, identity: PeerDouble, engine: ScriptedBackend
) -> None:
    known = await used(config, identity, engine)
    await identity.stop()
    async with running(replace(config, database_url=NOWHERE), identity) as router:
        unknown, router.credential = router.credential, known
        await until(lambda: answered(router))
        router.credential = unknown
        assert await reason_of(router) is Reason.AUTH_UNAVAILABLE
        router.credential = known[:-1] + ("A" if known[-1] != "A" else "B")
        assert await reason_of(router) is Reason.API_KEY_INVALID
        await identity.start()
        router.credential = known
        identity.answers["Authenticate"] = PlatformError(Reason.API_KEY_INVALID)

        async def is_refused() -> bool:
            return await reason_of(router) is Reason.API_KEY_INVALID

        await until(is_refused)


async def test_nobody_is_served_without_confirmation_for_longer_than_is_set(
    config: RouterConfig, identity: PeerDouble, engine: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = await used(config, identity, engine)
    await identity.stop()
    hour_later = replace(config, unconfirmed_s=900.0)
    monkeypatch.setattr("mesh.clock.SystemClock.now", _hours_later(1))
    async with running(hour_later, identity) as router:
        router.credential = known
        assert await reason_of(router) is Reason.AUTH_UNAVAILABLE


async def test_revoked_credential_does_not_come_back_with_a_restart(
    config: RouterConfig, identity: PeerDouble, engine: ScriptedBackend
) -> None:
    log = Log(identity)
    async with running(config, identity) as router:
        await until(lambda: log.watches)
        await router.add_model("m")
        await router.add_backend("only", engine.base_url, "m")
        assert await reason_of(router) is None
        known = router.credential
        identity.answers["Authenticate"] = PlatformError(Reason.API_KEY_INVALID)
        await log.revoke(WatchRevocationsResponse(api_key_id=PRINCIPAL.api_key_id))

        async def is_refused() -> bool:
            return await reason_of(router) is Reason.API_KEY_INVALID

        await until(is_refused)
    await identity.stop()
    async with running(config, identity) as router:
        router.credential = known
        assert await reason_of(router) is Reason.AUTH_UNAVAILABLE


async def test_key_that_was_revoked_while_its_router_was_down_is_never_served(
    config: RouterConfig, identity: PeerDouble, engine: ScriptedBackend
) -> None:
    log = Log(identity)
    async with running(config, identity) as router:
        await until(lambda: log.watches)
        await router.add_model("m")
        await router.add_backend("only", engine.base_url, "m")
        assert await reason_of(router) is None
        known, revision = router.credential, log.revision
    await log.revoke(WatchRevocationsResponse(api_key_id=PRINCIPAL.api_key_id))
    async with running(config, identity) as router:
        # identity tells of revocations, and has no time to judge anybody.
        identity.answers["Authenticate"] = PlatformError(Reason.UNAVAILABLE)
        await until(lambda: len(log.watches) > 1)
        assert log.watches[-1] == revision
        router.credential = known

        async def is_forgotten() -> bool:
            return await reason_of(router) is Reason.AUTH_UNAVAILABLE

        await until(is_forgotten)
    await identity.stop()
    async with running(config, identity) as router:
        router.credential = known
        assert await reason_of(router) is Reason.AUTH_UNAVAILABLE


async def test_revoked_key_does_not_come_back_where_the_snapshot_cannot_be_written_any_more(
    config: RouterConfig, identity: PeerDouble, engine: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(identity)
    known = await used(config, identity, engine)
    with monkeypatch.context() as full:
        full.setattr("router.snapshot._MAP_BYTES", 4096)
        async with running(config, identity) as router:
            await until(lambda: log.watches)
            identity.answers["Authenticate"] = PlatformError(Reason.API_KEY_INVALID)
            await log.revoke(WatchRevocationsResponse(api_key_id=PRINCIPAL.api_key_id))
            router.credential = known

            async def is_refused() -> bool:
                return await reason_of(router) is Reason.API_KEY_INVALID

            await until(is_refused)
    await identity.stop()
    async with running(config, identity) as router:
        router.credential = known
        assert await reason_of(router) is Reason.AUTH_UNAVAILABLE


async def test_organization_with_a_budget_waits_for_the_ledger(
    config: RouterConfig, identity: PeerDouble, engine: ScriptedBackend
) -> None:
    budget = budget_service_pb2.Budget(
        budget_id="budget_1",
        organization_id=PRINCIPAL.organization_id,
        unit=budget_service_pb2.BUDGET_UNIT_REQUESTS,
        enforcement=budget_service_pb2.BUDGET_ENFORCEMENT_HARD,
    )
    identity.answers["ResolveBudgets"] = budget_service_pb2.ResolveBudgetsResponse(revision=1, budgets=[budget])
    # It names a revision that is not the one above, and gives nothing: it contradicts itself.
    identity.answers["Lease"] = budget_service_pb2.LeaseResponse()
    async with running(config, identity) as router:
        await router.add_model("m")
        await router.add_backend("only", engine.base_url, "m")
        # Nobody gives a lease; the principal is known all the same.
        assert await reason_of(router) is Reason.UNAVAILABLE
        asked = [call for call in identity.received if call.rpc == "Lease"]
        assert 1 < len(asked) < 30
        identity.answers["Lease"] = budget_service_pb2.LeaseResponse(revision=1)
        assert await reason_of(router) is Reason.UNAVAILABLE
        known = router.credential
    await identity.stop()
    async with running(config, identity) as router:
        router.credential = known

        async def waits() -> bool:
            return await reason_of(router) is Reason.UNAVAILABLE

        await until(waits)


async def test_damaged_snapshot_keeps_no_router_from_starting(
    config: RouterConfig, identity: PeerDouble, engine: ScriptedBackend
) -> None:
    known = await used(config, identity, engine)
    data = Path(config.journal_path) / "known" / "data.mdb"
    assert data.stat().st_mode & 0o077 == 0
    data.write_bytes(b"\xff" * 8192)
    async with running(config, identity) as router:
        router.credential = known
        await until(lambda: answered(router))


def _hours_later(hours: int) -> object:
    from datetime import UTC, datetime, timedelta

    return lambda _: datetime.now(UTC) + timedelta(hours=hours)

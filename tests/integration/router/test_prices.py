"""Prices through a real router over gRPC: what is kept, what is refused, and what a router bills by."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from google.protobuf.timestamp_pb2 import Timestamp
from prometheus_client import REGISTRY

from aiaas.router.v1 import model_service_pb2 as models
from aiaas.router.v1 import price_service_pb2 as pb
from mesh.database import Database
from mesh.errors import PlatformError, Reason
from router.backends import Registry
from router.config import RouterConfig
from router.prices import MOST_MICROS, Price
from router.store import Store
from tests.doubles.clock import ManualClock
from tests.integration.router.conftest import ALL_ENDPOINTS, PRINCIPAL, Router, until

AMOUNTS: dict[str, Any] = {
    "prompt_micros_per_million": 150_000,
    "cached_prompt_micros_per_million": 75_000,
    "completion_micros_per_million": 600_000,
}
HOUR = timedelta(hours=1)


@pytest_asyncio.fixture
async def store(config: RouterConfig) -> AsyncIterator[Store]:
    """The store of the router, as another router reads it."""
    database = Database(config.database_url)
    yield Store(database)
    await database.close()


def later(by: timedelta) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(datetime.now(UTC) + by)
    return timestamp


def asked(model_id: str = "m", request_id: str = "", **values: Any) -> pb.CreatePriceRequest:
    return pb.CreatePriceRequest(model_id=model_id, price=pb.Price(**AMOUNTS | values), request_id=request_id)


async def add_model(router: Router, model_id: str = "m") -> None:
    """A model without a price."""
    model = models.Model(model_id=model_id, endpoints=ALL_ENDPOINTS)
    await router.call(router.models.CreateModel, models.CreateModelRequest(model=model))


async def create(router: Router, request: pb.CreatePriceRequest) -> pb.Price:
    price: pb.Price = (await router.call(router.prices.CreatePrice, request)).price
    return price


async def refusal(router: Router, request: pb.CreatePriceRequest) -> PlatformError:
    with pytest.raises(PlatformError) as caught:
        await router.call(router.prices.CreatePrice, request)
    return caught.value


async def listed(router: Router, model_id: str = "m", page_size: int = 0) -> list[pb.Price]:
    """Every price of a model, page by page."""
    found: list[pb.Price] = []
    request = pb.ListPricesRequest(model_id=model_id, page_size=page_size)
    while True:
        page = await router.call(router.prices.ListPrices, request)
        found += page.prices
        if not page.next_page_token:
            return found
        assert len(page.prices) == page_size
        request.page_token = page.next_page_token


async def test_price_is_kept_as_it_was_given_and_begins_at_once(router: Router) -> None:
    await add_model(router)
    before = datetime.now(UTC)
    made = await create(router, asked(price_id="mine"))
    assert before <= made.valid_from.ToDatetime(UTC) <= datetime.now(UTC)
    assert made.create_time == made.valid_from
    assert made.price_id.startswith("price_")
    assert {name: getattr(made, name) for name in AMOUNTS} == AMOUNTS
    assert made.model_id == "m"
    assert await listed(router) == [made]


async def test_zero_and_the_highest_amount_are_prices(router: Router) -> None:
    await add_model(router)
    none: dict[str, Any] = dict.fromkeys(AMOUNTS, 0)
    free = await create(router, asked(**none))
    assert all(free.HasField(name) and getattr(free, name) == 0 for name in AMOUNTS)  # type: ignore[arg-type]
    most: dict[str, Any] = dict.fromkeys(AMOUNTS, MOST_MICROS)
    dear = await create(router, asked(**most))
    assert all(getattr(dear, name) == MOST_MICROS for name in AMOUNTS)


@pytest.mark.parametrize("name", AMOUNTS)
async def test_absent_negative_and_overflowing_amounts_are_refused_by_field(router: Router, name: str) -> None:
    await add_model(router)
    for amount in (None, -1, MOST_MICROS + 1, 2**63 - 1, -(2**63)):
        values: dict[str, Any] = {name: amount}
        error = await refusal(router, asked(**values))
        assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, f"price.{name}")
    assert await listed(router) == []


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (pb.CreatePriceRequest(model_id="m"), Reason.INVALID_ARGUMENT, "price"),
        (asked(model_id="m", valid_from=later(-timedelta(minutes=2))), Reason.INVALID_ARGUMENT, "price.valid_from"),
        (asked(model_id="m", valid_from=Timestamp()), Reason.INVALID_ARGUMENT, "price.valid_from"),
        (asked(model_id="m", valid_from=Timestamp(seconds=2**62)), Reason.INVALID_ARGUMENT, "price.valid_from"),
        (asked(model_id="m", valid_from=Timestamp(nanos=-1)), Reason.INVALID_ARGUMENT, "price.valid_from"),
        (
            pb.CreatePriceRequest(model_id="m", price=pb.Price(model_id="other", **AMOUNTS)),
            Reason.INVALID_ARGUMENT,
            "price.model_id",
        ),
        (asked(model_id="m", request_id="x" * 129), Reason.INVALID_ARGUMENT, "request_id"),
        (asked(model_id="nobody"), Reason.NOT_FOUND, None),
        (asked(model_id=""), Reason.NOT_FOUND, None),
    ],
)
async def test_what_is_wrong_is_named_and_nothing_is_written(
    router: Router, request_: pb.CreatePriceRequest, reason: Reason, field: str | None
) -> None:
    await add_model(router)
    error = await refusal(router, request_)
    assert (error.reason, error.field) == (reason, field)
    assert await listed(router) == []


async def test_a_little_skew_of_the_callers_clock_is_no_past(router: Router) -> None:
    await add_model(router)
    moment = later(-timedelta(seconds=30))
    assert (await create(router, asked(valid_from=moment))).valid_from.ToMicroseconds() == moment.ToMicroseconds()


async def test_model_has_one_price_from_one_moment_on(router: Router) -> None:
    await add_model(router)
    await add_model(router, "other")
    moment = later(HOUR)
    first = await create(router, asked(valid_from=moment))
    error = await refusal(router, asked(valid_from=moment, prompt_micros_per_million=1))
    assert (error.reason, error.field) == (Reason.ALREADY_EXISTS, "price.valid_from")
    assert await listed(router) == [first]
    await create(router, asked("other", valid_from=moment))


async def test_repeat_returns_the_first_answer(router: Router) -> None:
    await add_model(router)
    await add_model(router, "other")
    first = await create(router, asked(request_id="r-1"))
    assert await create(router, asked(request_id="r-1")) == first
    assert await create(router, asked(request_id="r-1", model_id="m")) == first
    assert await listed(router) == [first]
    for changed in (asked(request_id="r-1", prompt_micros_per_million=1), asked("other", request_id="r-1")):
        error = await refusal(router, changed)
        assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "request_id")
    assert await listed(router, "other") == []


async def test_price_begins_when_its_turn_has_come_and_so_after_those_before_it(
    router: Router, config: RouterConfig
) -> None:
    await add_model(router)
    connection = await asyncpg.connect(config.database_url)
    async with connection.transaction():
        await connection.execute("SELECT * FROM registry_revision FOR UPDATE")
        waiting = [asyncio.create_task(create(router, asked())) for _ in range(4)]
        async with asyncio.timeout(5):
            while await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted") < 4:
                await asyncio.sleep(0.01)
        released = await connection.fetchval("SELECT clock_timestamp()")
    await connection.close()
    made = await asyncio.gather(*waiting)
    assert all(price.valid_from.ToDatetime(UTC) > released for price in made)
    assert len({price.valid_from.ToMicroseconds() for price in made}) == 4


async def test_pages_are_newest_first(router: Router) -> None:
    await add_model(router)
    made = [await create(router, asked(valid_from=later(hours * HOUR))) for hours in (3, 1, 5, 2, 4)]
    newest_first = sorted(made, key=lambda price: price.valid_from.ToMicroseconds(), reverse=True)
    for page_size in (1, 2, 5):
        assert await listed(router, page_size=page_size) == newest_first
    with pytest.raises(PlatformError) as caught:
        await listed(router, "nobody")
    assert caught.value.reason is Reason.NOT_FOUND
    first = await router.call(router.prices.ListPrices, pb.ListPricesRequest(model_id="m", page_size=1))
    stolen = pb.ListPricesRequest(model_id="other", page_token=first.next_page_token)
    with pytest.raises(PlatformError) as caught:
        await router.call(router.prices.ListPrices, stolen)
    assert caught.value.field == "page_token"


async def test_who_may_not_set_prices_is_refused(router: Router) -> None:
    await add_model(router)
    router.act_as(replace(PRINCIPAL, permissions=PRINCIPAL.permissions - {"prices.create"}, platform=False))
    assert (await refusal(router, asked())).reason is Reason.PERMISSION_DENIED


async def test_another_router_sees_a_price_within_a_poll_and_one_to_come_when_it_begins(
    router: Router, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    clock = ManualClock(datetime.now(UTC) + timedelta(seconds=1))
    registry = Registry(store, clock=clock, poll_s=0.01)
    task = asyncio.create_task(registry.run())

    def held(ahead: timedelta = timedelta()) -> str:
        price = registry.snapshot.price_of("m", clock.now() + ahead)
        return price.price_id if price else ""

    with caplog.at_level(logging.WARNING, "router.backends"):
        await add_model(router)
        await until(lambda: "m" in registry.snapshot.models)
        assert held() == ""
        assert "models without a price cannot be used: m" in caplog.text
        now = await create(router, asked())
        await until(lambda: held() == now.price_id)
        coming = await create(router, asked(valid_from=later(HOUR)))
        caplog.clear()
        await until(lambda: held(2 * HOUR) == coming.price_id)
        assert held() == now.price_id
        clock.advance(HOUR.total_seconds() + 1)
        assert held() == coming.price_id
        assert "without a price" not in caplog.text
    task.cancel()


async def test_gauge_counts_the_models_that_have_no_price_now(router: Router, store: Store) -> None:
    def unpriced() -> float | None:
        return REGISTRY.get_sample_value("aiaas_router_unpriced_models")

    await add_model(router)
    await add_model(router, "dear")
    await create(router, asked("dear", valid_from=later(HOUR)))
    clock = ManualClock(datetime.now(UTC))
    registry = Registry(store, clock=clock, poll_s=0.01)
    # The router's own counts into the same gauge.
    await until(lambda: unpriced() == 2)
    task = asyncio.create_task(registry.run())
    await until(lambda: len(registry.snapshot.unpriced_models(clock.now())) == 2)
    clock.advance(HOUR.total_seconds() + 1)
    await until(lambda: unpriced() == 1)
    task.cancel()


async def test_history_is_listed_and_only_what_may_hold_is_loaded(
    router: Router, store: Store, config: RouterConfig
) -> None:
    await add_model(router)
    await add_model(router, "other")
    made = [await create(router, asked(valid_from=later(hours * HOUR))) for hours in (1, 2, 3, 4)]
    connection = await asyncpg.connect(config.database_url)
    # Three and a half hours later.
    await connection.execute("UPDATE prices SET valid_from = valid_from - interval '3 hours 30 minutes'")
    await connection.close()
    loaded = [price.price_id for price in (await store.load()).prices]
    # Begun two and a half, one and a half, and half an hour ago, and half an hour to come.
    assert loaded == [price.price_id for price in made[1:]]
    assert len(await listed(router)) == 4


async def test_model_made_again_inherits_no_price(router: Router, store: Store) -> None:
    await add_model(router)
    await create(router, asked())
    await router.call(router.models.DeleteModel, models.DeleteModelRequest(model_id="m"))
    await add_model(router)
    assert await listed(router) == []
    assert (await store.load()).prices == ()


async def test_database_refuses_amounts_that_the_code_let_through(router: Router, store: Store) -> None:
    await add_model(router)
    now = datetime.now(UTC)
    with pytest.raises(asyncpg.CheckViolationError):
        await store.create_price("m", lambda _: Price("price_1", "m", 1, -1, 1, now, now), None)
    assert await listed(router) == []

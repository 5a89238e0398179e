"""The registry in PostgreSQL: what is kept, what is refused, and what a router sees of it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from aiaas.router.v1.backend_service_pb2 import ENGINE_KIND_VLLM
from aiaas.type.v1.usage_event_pb2 import ENDPOINT_CHAT_COMPLETIONS
from mesh.database import Database
from mesh.errors import PlatformError, Reason
from router.backends import Backend, BackendModel
from router.models import Model
from router.store import Creation, Store

MODEL = Model(
    "org/m-1", aliases=("m", "latest"), owner="us", context_tokens=2048, endpoints=(ENDPOINT_CHAT_COMPLETIONS,)
)
BACKEND = Backend(
    "b-1",
    "http://127.0.0.1:8000",
    ENGINE_KIND_VLLM,
    models=(BackendModel("org/m-1", "up"),),
    weight=7,
    limit_concurrent_requests=3,
    first_byte_timeout_millis=1500,
    credential_variable="AIAAS_ENGINE_KEY",
)


@pytest_asyncio.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    database = Database(database_url)
    yield Store(database)
    await database.close()


async def refusal(work: object) -> PlatformError:
    with pytest.raises(PlatformError) as caught:
        await work  # type: ignore[misc]
    return caught.value


async def test_what_is_created_is_read_back(store: Store) -> None:
    model = await store.create_model(MODEL, None)
    backend = await store.create_backend(BACKEND, None)
    assert (model, backend) == (MODEL, BACKEND)
    assert model.etag
    assert model.create_time == model.update_time
    assert await store.get_model("org/m-1") == MODEL
    assert await store.get_backend("b-1") == BACKEND
    content = await store.load()
    assert (content.models, content.backends) == ((MODEL,), (BACKEND,))
    assert content.revision == await store.revision() == 3


async def test_one_name_means_one_model(store: Store) -> None:
    await store.create_model(MODEL, None)
    same = await refusal(store.create_model(MODEL, None))
    assert same.reason is Reason.ALREADY_EXISTS
    alias_as_id = await refusal(store.create_model(replace(MODEL, model_id="latest", aliases=()), None))
    assert alias_as_id.reason is Reason.ALREADY_EXISTS
    other = replace(MODEL, model_id="other", aliases=("fine", "org/m-1"))
    taken = await refusal(store.create_model(other, None))
    assert (taken.reason, taken.field) == (Reason.INVALID_ARGUMENT, "model.aliases[1]")
    assert (await refusal(store.get_model("other"))).reason is Reason.NOT_FOUND


async def test_update_checks_the_etag_and_changes_it(store: Store) -> None:
    first = await store.create_model(MODEL, None)
    second = await store.update_model("org/m-1", first.etag, lambda m: replace(m, aliases=("m", "new")), None)
    assert second.aliases == ("m", "new")
    assert second.etag != first.etag
    assert second.update_time > first.update_time
    stale = await refusal(store.update_model("org/m-1", first.etag, lambda m: m, None))
    assert (stale.reason, stale.field) == (Reason.FAILED_PRECONDITION, "model.etag")
    unchanged = await store.update_model("org/m-1", "", lambda m: m, None)
    assert unchanged.etag == second.etag


async def test_backend_update_replaces_its_models(store: Store) -> None:
    await store.create_model(MODEL, None)
    await store.create_model(replace(MODEL, model_id="m-2", aliases=()), None)
    await store.create_backend(BACKEND, None)
    models = (BackendModel("m-2"), BackendModel("org/m-1", "x"))
    updated = await store.update_backend("b-1", "", lambda b: replace(b, models=models, draining=True), None)
    assert updated.models == models
    assert updated.draining
    unknown = (BackendModel("m-2"), BackendModel("nobody"))
    error = await refusal(store.update_backend("b-1", "", lambda b: replace(b, models=unknown), None))
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "backend.models[1].model_id")
    assert (await store.get_backend("b-1")).models == models


async def test_update_of_what_is_missing_creates_it_only_when_allowed(store: Store) -> None:
    assert (await refusal(store.update_model("org/m-1", "", lambda m: m, None))).reason is Reason.NOT_FOUND
    made = await store.update_model("org/m-1", "", lambda m: m, lambda: MODEL)
    assert made == MODEL
    again = await store.update_model("org/m-1", "", lambda m: replace(m, owner="they"), lambda: MODEL)
    assert again.owner == "they"
    with_etag = await refusal(store.update_backend("b-1", "7", lambda b: b, lambda: BACKEND))
    assert with_etag.reason is Reason.NOT_FOUND
    assert await store.update_backend("b-1", "", lambda b: b, lambda: BACKEND) == BACKEND


async def test_model_that_is_served_cannot_be_deleted(store: Store) -> None:
    model = await store.create_model(MODEL, None)
    await store.create_backend(BACKEND, None)
    assert (await refusal(store.delete_model("org/m-1", ""))).reason is Reason.FAILED_PRECONDITION
    assert (await refusal(store.delete_backend("b-1", "0"))).reason is Reason.FAILED_PRECONDITION
    await store.delete_backend("b-1", "")
    await store.delete_model("org/m-1", model.etag)
    content = await store.load()
    assert (content.models, content.backends) == ((), ())
    assert (await refusal(store.delete_model("org/m-1", ""))).reason is Reason.NOT_FOUND
    assert (await refusal(store.delete_backend("b-1", ""))).reason is Reason.NOT_FOUND


async def test_repeated_creation_returns_the_first_answer(store: Store) -> None:
    creation = Creation("models/user-1", "r-1", b"digest")
    first = await store.create_model(MODEL, creation)
    await store.update_model("org/m-1", "", lambda m: replace(m, owner="they"), None)
    repeated = await store.create_model(MODEL, creation)
    assert repeated == first
    assert (repeated.etag, repeated.create_time) == (first.etag, first.create_time)
    other_body = await refusal(store.create_model(MODEL, replace(creation, digest=b"other")))
    assert (other_body.reason, other_body.field) == (Reason.INVALID_ARGUMENT, "request_id")
    other_caller = await refusal(store.create_model(MODEL, replace(creation, scope="models/user-2")))
    assert other_caller.reason is Reason.ALREADY_EXISTS


async def test_creations_at_the_same_time_happen_once(store: Store) -> None:
    creation = Creation("models/user-1", "r-1", b"digest")
    answers = await asyncio.gather(*(store.create_model(MODEL, creation) for _ in range(8)))
    assert len({answer.etag for answer in answers}) == 1


async def test_pages_follow_the_order_of_ids(store: Store) -> None:
    for name in ("b", "A", "a", "c"):
        await store.create_model(replace(MODEL, model_id=name, aliases=()), None)
        await store.create_backend(replace(BACKEND, backend_id=f"x-{name.lower()}{ord(name)}", models=()), None)
    assert [model.model_id for model in await store.list_models("", 3)] == ["A", "a", "b"]
    assert [model.model_id for model in await store.list_models("b", 3)] == ["c"]
    await store.update_backend("x-b98", "", lambda b: replace(b, models=(BackendModel("a"),)), None)
    assert [backend.backend_id for backend in await store.list_backends("", 9, "a")] == ["x-b98"]
    assert len(await store.list_backends("", 9, "")) == 4


async def test_postgresql_away_is_unavailable() -> None:
    database = Database("postgresql://app@127.0.0.1:1/none")
    assert (await refusal(Store(database).revision())).reason is Reason.UNAVAILABLE
    await database.close()

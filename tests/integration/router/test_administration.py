"""Models and backends through a real router over gRPC."""

from typing import Any

import pytest

from aiaas.router.v1 import backend_service_pb2 as backends
from aiaas.router.v1 import model_service_pb2 as models
from aiaas.type.v1.usage_event_pb2 import ENDPOINT_EMBEDDINGS
from mesh.errors import PlatformError, Reason
from tests.doubles.scripted_backend import ScriptedBackend
from tests.integration.router.conftest import ALL_ENDPOINTS, Router

URL = "http://127.0.0.1:9"


async def refusal(router: Router, method: Any, request: Any) -> PlatformError:
    with pytest.raises(PlatformError) as caught:
        await router.call(method, request)
    return caught.value


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"model_id": ""}, "model.model_id"),
        ({"model_id": "a b"}, "model.model_id"),
        ({"model_id": "x" * 129}, "model.model_id"),
        ({"aliases": ["ok", "not ok"]}, "model.aliases[1]"),
        ({"aliases": ["m"]}, "model.aliases[0]"),
        ({"context_tokens": -1}, "model.context_tokens"),
        ({"endpoints": []}, "model.endpoints"),
        ({"endpoints": [1, 99]}, "model.endpoints[1]"),
        ({"owner": "a\nb"}, "model.owner"),
    ],
)
async def test_wrong_model_is_refused_by_field(router: Router, values: dict[str, Any], field: str) -> None:
    model = models.Model(**{"model_id": "m", "endpoints": ALL_ENDPOINTS} | values)
    error = await refusal(router, router.models.CreateModel, models.CreateModelRequest(model=model))
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)
    assert field in error.message


async def test_everything_wrong_with_a_resource_is_told_at_once(router: Router) -> None:
    model = models.Model(model_id="a b", aliases=["ok", "not ok"], context_tokens=-1)
    error = await refusal(router, router.models.CreateModel, models.CreateModelRequest(model=model))
    assert [violation.field for violation in error.violations] == [
        "model.model_id",
        "model.aliases[1]",
        "model.context_tokens",
        "model.endpoints",
    ]
    backend = backends.Backend(backend_id="Upper", base_url="ftp://host", weight=5000)
    error = await refusal(router, router.backends.CreateBackend, backends.CreateBackendRequest(backend=backend))
    assert [violation.field for violation in error.violations] == [
        "backend.backend_id",
        "backend.base_url",
        "backend.engine",
        "backend.weight",
    ]


@pytest.mark.parametrize("count", [65, 100_000])
async def test_list_that_is_too_long_is_not_read_to_its_end(router: Router, count: int) -> None:
    model = models.Model(model_id="m", aliases=[f"a{n}" for n in range(count)], endpoints=ALL_ENDPOINTS)
    error = await refusal(router, router.models.CreateModel, models.CreateModelRequest(model=model))
    assert [violation.field for violation in error.violations] == ["model.aliases"]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"backend_id": "Upper"}, "backend.backend_id"),
        ({"base_url": ""}, "backend.base_url"),
        ({"base_url": "ftp://host"}, "backend.base_url"),
        ({"base_url": "http://user:secret@host"}, "backend.base_url"),
        ({"base_url": "http://"}, "backend.base_url"),
        ({"base_url": "http://host:0"}, "backend.base_url"),
        ({"base_url": "http://host:70000"}, "backend.base_url"),
        ({"base_url": "http://host/a/../b"}, "backend.base_url"),
        ({"base_url": "http://host/%2e%2e"}, "backend.base_url"),
        ({"base_url": "http://host//b"}, "backend.base_url"),
        ({"base_url": "http://host?x=1"}, "backend.base_url"),
        ({"base_url": "http://host#x"}, "backend.base_url"),
        ({"base_url": "http://host/v1"}, "backend.base_url"),
        ({"base_url": "http://ho st"}, "backend.base_url"),
        ({"base_url": "http://[::g]"}, "backend.base_url"),
        ({"base_url": "http://host\r\nX: y"}, "backend.base_url"),
        ({"engine": 0}, "backend.engine"),
        ({"engine": 77}, "backend.engine"),
        ({"weight": 1001}, "backend.weight"),
        ({"weight": -1}, "backend.weight"),
        ({"limit_concurrent_requests": -1}, "backend.limit_concurrent_requests"),
        ({"first_byte_timeout_millis": -1}, "backend.first_byte_timeout_millis"),
        ({"credential_variable": "AIAAS_ROUTER_DATABASE_URL"}, "backend.credential_variable"),
        ({"models": [{"model_id": "none"}]}, "backend.models[0].model_id"),
        ({"models": [{"model_id": "m"}, {"model_id": "m"}]}, "backend.models[1].model_id"),
        ({"models": [{"model_id": "m", "upstream_model": "a\nb"}]}, "backend.models[0].upstream_model"),
    ],
)
async def test_wrong_backend_is_refused_by_field(router: Router, values: dict[str, Any], field: str) -> None:
    await router.add_model("m")
    given: dict[str, Any] = {"backend_id": "b", "base_url": URL, "engine": 1} | values
    if "models" in values:
        given["models"] = [backends.BackendModel(**model) for model in values["models"]]
    request = backends.CreateBackendRequest(backend=backends.Backend(**given))
    error = await refusal(router, router.backends.CreateBackend, request)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)
    assert "secret" not in error.message


@pytest.mark.parametrize(
    "base_url", ["http://127.0.0.1:8000", "https://engine.example.com/", "http://[::1]:80", "http://host/prefix/a-1"]
)
async def test_good_address_is_accepted(router: Router, base_url: str) -> None:
    backend = backends.Backend(backend_id="b", base_url=base_url, engine=backends.ENGINE_KIND_LLAMACPP)
    response = await router.call(router.backends.CreateBackend, backends.CreateBackendRequest(backend=backend))
    assert response.backend.base_url == base_url.removesuffix("/")
    assert response.backend.weight == 100
    assert response.backend.etag


async def test_missing_resource_is_named(router: Router) -> None:
    error = await refusal(router, router.models.CreateModel, models.CreateModelRequest())
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "model")
    error = await refusal(router, router.backends.UpdateBackend, backends.UpdateBackendRequest(backend_id="b"))
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "backend")


async def test_mask_decides_what_is_changed(router: Router) -> None:
    await router.add_model("m", owner="us", context_tokens=10, aliases=["a"])

    async def update(*paths: str, **values: Any) -> models.Model:
        request = models.UpdateModelRequest(model_id="m", model=models.Model(**values))
        request.update_mask.paths.extend(paths)
        updated: models.Model = (await router.call(router.models.UpdateModel, request)).model
        return updated

    changed = await update("owner", owner="they", context_tokens=99)
    assert (changed.owner, changed.context_tokens) == ("they", 10)
    changed = await update(context_tokens=20)
    assert (changed.owner, changed.context_tokens, list(changed.aliases)) == ("they", 20, ["a"])
    changed = await update("aliases")
    assert list(changed.aliases) == []
    changed = await update("*", owner="all", endpoints=[ENDPOINT_EMBEDDINGS])
    assert (changed.owner, changed.context_tokens, list(changed.endpoints)) == ("all", 0, [ENDPOINT_EMBEDDINGS])
    for path in ("create_time", "model_id", "etag", "nothing", "models.model_id"):
        request = models.UpdateModelRequest(model_id="m", model=models.Model(owner="x"))
        request.update_mask.paths.append(path)
        error = await refusal(router, router.models.UpdateModel, request)
        assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "update_mask")
    other = models.UpdateModelRequest(model_id="m", model=models.Model(model_id="n"))
    assert (await refusal(router, router.models.UpdateModel, other)).field == "model.model_id"


async def test_stale_etag_is_refused(router: Router) -> None:
    model = await router.add_model("m")
    request = models.UpdateModelRequest(model_id="m", model=models.Model(owner="x", etag=model.etag))
    await router.call(router.models.UpdateModel, request)
    error = await refusal(router, router.models.UpdateModel, request)
    assert (error.reason, error.field) == (Reason.FAILED_PRECONDITION, "model.etag")
    stale = models.DeleteModelRequest(model_id="m", etag=model.etag)
    assert (await refusal(router, router.models.DeleteModel, stale)).field == "etag"


async def test_allow_missing_registers(router: Router) -> None:
    request = backends.UpdateBackendRequest(
        backend_id="b", backend=backends.Backend(base_url=URL, engine=backends.ENGINE_KIND_VLLM)
    )
    assert (await refusal(router, router.backends.UpdateBackend, request)).reason is Reason.NOT_FOUND
    request.allow_missing = True
    made = (await router.call(router.backends.UpdateBackend, request)).backend
    assert (made.backend_id, made.base_url) == ("b", URL)
    request.backend.base_url = "nonsense"
    request.backend_id = "c"
    assert (await refusal(router, router.backends.UpdateBackend, request)).field == "backend.base_url"


async def test_repeat_with_the_same_request_id_returns_the_first_answer(router: Router) -> None:
    model = models.Model(model_id="m", endpoints=ALL_ENDPOINTS)
    request = models.CreateModelRequest(model=model, request_id="r-1")
    first = await router.call(router.models.CreateModel, request)
    assert await router.call(router.models.CreateModel, request) == first
    request.model.owner = "other"
    assert (await refusal(router, router.models.CreateModel, request)).field == "request_id"
    request.request_id = ""
    assert (await refusal(router, router.models.CreateModel, request)).reason is Reason.ALREADY_EXISTS


async def test_pages_hold_every_model_once(router: Router) -> None:
    names = [f"m-{number}" for number in range(5)]
    for name in names:
        await router.add_model(name)
    found = []
    request = models.ListModelsRequest(page_size=2)
    for _ in range(3):
        page = await router.call(router.models.ListModels, request)
        found += [model.model_id for model in page.models]
        request.page_token = page.next_page_token
    assert found == names
    assert request.page_token == ""
    for wrong in ("nonsense", "====", "aGVsbG8"):
        error = await refusal(router, router.models.ListModels, models.ListModelsRequest(page_token=wrong))
        assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "page_token")
    error = await refusal(router, router.models.ListModels, models.ListModelsRequest(page_size=-1))
    assert error.field == "page_size"


async def test_page_token_belongs_to_its_filter(router: Router) -> None:
    await router.add_model("m")
    async with ScriptedBackend() as engine:
        for name in ("a", "b"):
            await router.add_backend(name, engine.base_url, "m")
    request = backends.ListBackendsRequest(page_size=1, model_id="m")
    page = await router.call(router.backends.ListBackends, request)
    assert [backend.backend_id for backend in page.backends] == ["a"]
    wrong = backends.ListBackendsRequest(page_token=page.next_page_token)
    assert (await refusal(router, router.backends.ListBackends, wrong)).field == "page_token"
    request.page_token = page.next_page_token
    page = await router.call(router.backends.ListBackends, request)
    assert [backend.backend_id for backend in page.backends] == ["b"]
    assert page.next_page_token == ""


async def test_deleted_backend_frees_its_model(router: Router) -> None:
    await router.add_model("m")
    async with ScriptedBackend() as engine:
        await router.add_backend("b", engine.base_url, "m")
    delete_model = models.DeleteModelRequest(model_id="m")
    assert (await refusal(router, router.models.DeleteModel, delete_model)).reason is Reason.FAILED_PRECONDITION
    await router.call(router.backends.DeleteBackend, backends.DeleteBackendRequest(backend_id="b"))
    await router.call(router.models.DeleteModel, delete_model)
    assert (await refusal(router, router.models.DeleteModel, delete_model)).reason is Reason.NOT_FOUND

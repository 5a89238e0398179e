"""GET /v1/models."""

import httpx
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.router.v1 import inference_service_pb2 as pb
from mesh.errors import PlatformError, Reason
from tests.doubles.peer import PeerDouble
from tests.integration.edge.harness import KEY, Edge

SERVED = pb.ServedModel(model="org/model:8b", create_time=Timestamp(seconds=1700000000), owner="org")
AS_OPENAI = {"id": "org/model:8b", "object": "model", "created": 1700000000, "owned_by": "org"}


async def test_models_are_listed_as_openai_does(edge: Edge, router: PeerDouble) -> None:
    router.answers["ListServedModels"] = pb.ListServedModelsResponse(models=[SERVED])
    response = await edge.client.get("/v1/models")
    assert response.json() == {"object": "list", "data": [AS_OPENAI]}
    assert response.headers["openai-version"] == "2020-10-01"
    assert router.received[0].metadata["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("path", ["org/model:8b", "org%2Fmodel:8b"])
async def test_id_of_a_model_may_have_slashes(edge: Edge, router: PeerDouble, path: str) -> None:
    router.answers["ListServedModels"] = pb.ListServedModelsResponse(models=[SERVED])
    response = await edge.client.get(f"/v1/models/{path}")
    assert response.json() == AS_OPENAI
    assert router.received[0].request.model == "org/model:8b"


@pytest.mark.parametrize("path", ["gpt-none", "%FF", "a%0Ab"])
async def test_unknown_model_is_not_found(edge: Edge, path: str) -> None:
    response = await edge.client.get(f"/v1/models/{path}")
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_error_of_the_router_has_openais_shape(edge: Edge, router: PeerDouble) -> None:
    router.answers["ListServedModels"] = PlatformError(Reason.AUTH_UNAVAILABLE)
    response = await edge.client.get("/v1/models")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "auth_unavailable"


async def test_wrong_verb_missing_id_and_missing_credential(edge: Edge) -> None:
    wrong_verb = await edge.client.delete("/v1/models/m")
    assert (wrong_verb.status_code, wrong_verb.headers["allow"]) == (405, "GET")
    assert (await edge.client.get("/v1/models/")).status_code == 404
    async with httpx.AsyncClient(base_url=edge.client.base_url, trust_env=False) as client:
        assert (await client.get("/v1/models")).json()["error"]["code"] == "invalid_api_key"

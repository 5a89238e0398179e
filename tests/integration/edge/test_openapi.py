"""The OpenAPI document and its page, as the edge serves them."""

import httpx
import pytest
from openapi_spec_validator import validate

from tests.integration.edge.harness import Edge


async def test_document_is_served_to_anybody(edge: Edge) -> None:
    async with httpx.AsyncClient(base_url=edge.client.base_url, trust_env=False) as client:
        response = await client.get("/openapi.json")
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    validate(response.json())


async def test_page_runs_no_script_and_fetches_nothing(edge: Edge) -> None:
    response = await edge.client.get("/docs")
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/openapi.json", "/docs"])
async def test_file_that_the_client_has_is_not_sent_again(edge: Edge, path: str) -> None:
    etag = (await edge.client.get(path)).headers["etag"]
    again = await edge.client.get(path, headers={"if-none-match": etag})
    assert (again.status_code, again.content) == (304, b"")
    assert (await edge.client.get(path, headers={"if-none-match": '"other"'})).status_code == 200
    assert (await edge.client.post(path, json={})).status_code == 405

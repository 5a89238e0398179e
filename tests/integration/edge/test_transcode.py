"""Admin REST through real sockets: contracts to routes, JSON to messages and back, errors as AIP-193 has them."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from aiaas.analytics.v1 import usage_service_pb2
from aiaas.identity.v1 import api_key_service_pb2, audit_service_pb2
from aiaas.router.v1 import backend_service_pb2, model_service_pb2
from mesh.errors import PlatformError, Reason
from tests.doubles.peer import PeerDouble
from tests.integration.edge.harness import KEY, Edge, until

KEYS = "/admin/v1/organizations/org_1/api-keys"
EXPORT = "/admin/v1/organizations/org_1/audit-entries:export"


def error_of(response: httpx.Response) -> tuple[str, list[str]]:
    """The status and the fields it names; every error has this shape."""
    error = response.json()["error"]
    assert error["code"] == response.status_code
    assert error["message"]
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert "openai-version" not in response.headers
    details: dict[str, Any] = {detail["@type"].rpartition(".")[2]: detail for detail in error["details"]}
    assert details["ErrorInfo"]["domain"] == "aiaas"
    violations = details.get("BadRequest", {}).get("fieldViolations", [])
    return error["status"], [violation["field"] for violation in violations]


async def test_key_is_made_with_credential_request_id_and_deadline(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["CreateApiKey"] = api_key_service_pb2.CreateApiKeyResponse(
        api_key=api_key_service_pb2.ApiKey(api_key_id="key_1", display_name="x", etag="e1"), secret="aias_shown_once"
    )
    response = await edge.client.post(
        KEYS, json={"display_name": "x"}, headers={"idempotency-key": "again", "x-request-id": "mine"}
    )
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["secret"] == "aias_shown_once"
    assert answer["api_key"]["display_name"] == "x"
    assert answer["api_key"]["scopes"] == []
    assert "expire_time" not in answer["api_key"]
    assert response.headers["etag"] == '"e1"'
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-request-id"] == "mine"
    (call,) = identity.received
    assert call.request == api_key_service_pb2.CreateApiKeyRequest(
        organization_id="org_1", api_key=api_key_service_pb2.ApiKey(display_name="x"), request_id="again"
    )
    assert call.metadata["authorization"] == f"Bearer {KEY}"
    assert call.metadata["x-request-id"] == "mine"
    assert call.metadata["x-client-address"] == "127.0.0.1"
    assert call.timeout_s is not None
    assert 20 < call.timeout_s < 31


async def test_etag_that_no_header_can_hold_is_only_in_the_body(edge: Edge, identity: PeerDouble) -> None:
    key = api_key_service_pb2.ApiKey(etag='a"\r\nx: y')
    identity.answers["GetApiKey"] = api_key_service_pb2.GetApiKeyResponse(api_key=key)
    response = await edge.client.get(f"{KEYS}/key_1")
    assert (response.status_code, response.json()["api_key"]["etag"]) == (200, key.etag)
    assert "etag" not in response.headers


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\u00e9"])
async def test_idempotency_key_that_cannot_be_one_is_refused(edge: Edge, identity: PeerDouble, key: str) -> None:
    response = await edge.client.post(KEYS, json={}, headers=[(b"idempotency-key", key.encode("latin-1"))])
    assert error_of(response) == ("INVALID_ARGUMENT", ["Idempotency-Key"])
    assert identity.received == []


async def test_each_contract_goes_to_its_own_peer(edge: Edge, peers: dict[str, PeerDouble]) -> None:
    for name, path in (
        ("identity", "/admin/v1/principal"),
        ("router", "/admin/v1/backends"),
        ("analytics", "/analytics/v1/organizations/org_1/usage"),
    ):
        assert (await edge.client.get(path)).status_code == 200
        assert len(peers[name].received) == 1
    assert {name: len(peer.received) for name, peer in peers.items()} == {"identity": 1, "router": 1, "analytics": 1}


async def test_query_with_nested_and_repeated_fields(edge: Edge, analytics: PeerDouble) -> None:
    analytics.answers["QueryUsage"] = usage_service_pb2.QueryUsageResponse(
        totals=usage_service_pb2.UsageTotals(requests=9007199254740993)
    )
    response = await edge.client.get(
        "/analytics/v1/organizations/org_1/usage",
        params={"start_time": "2026-01-01T00:00:00Z", "filter.models": ["a", "b/c"], "page_size": 5},
    )
    assert response.json()["totals"]["requests"] == "9007199254740993"
    assert response.json()["buckets"] == []
    request = analytics.received[0].request
    assert list(request.filter.models) == ["a", "b/c"]
    assert (request.start_time.seconds, request.page_size) == (1767225600, 5)


async def test_slash_in_an_id_survives(edge: Edge, router: PeerDouble) -> None:
    router.answers["GetModel"] = model_service_pb2.GetModelResponse()
    assert (await edge.client.get("/admin/v1/models/org%2Fmodel:8b")).status_code == 200
    assert router.received[0].request.model_id == "org/model:8b"


async def test_host_header_decides_nothing(edge: Edge, router: PeerDouble) -> None:
    response = await edge.client.get("/admin/v1/models", headers={"host": "x/v1/chat/completions?"})
    assert response.status_code == 200
    assert router.received[0].rpc == "ListModels"


async def test_update_derives_its_mask_and_takes_if_match(edge: Edge, router: PeerDouble) -> None:
    response = await edge.client.patch(
        "/admin/v1/backends/b1?allow_missing=true", json={"draining": False, "weight": 5}, headers={"if-match": '"e1"'}
    )
    assert response.status_code == 200
    request = router.received[0].request
    assert request == backend_service_pb2.UpdateBackendRequest(
        backend_id="b1",
        backend=backend_service_pb2.Backend(weight=5, etag="e1"),
        update_mask=FieldMask(paths=["draining", "weight"]),
        allow_missing=True,
    )


@pytest.mark.parametrize(
    ("error", "status", "name"),
    [
        (PlatformError(Reason.PERMISSION_DENIED), 403, "PERMISSION_DENIED"),
        (PlatformError(Reason.ORGANIZATION_MISMATCH), 404, "NOT_FOUND"),
        (PlatformError(Reason.AUTH_UNAVAILABLE), 503, "UNAVAILABLE"),
        (PlatformError(Reason.API_KEY_INVALID), 401, "UNAUTHENTICATED"),
        (PlatformError(Reason.ALREADY_EXISTS), 409, "ALREADY_EXISTS"),
    ],
)
async def test_error_of_a_service_keeps_its_meaning(
    edge: Edge, identity: PeerDouble, error: PlatformError, status: int, name: str
) -> None:
    identity.answers["ListApiKeys"] = error
    response = await edge.client.get(KEYS)
    assert response.status_code == status
    assert error_of(response)[0] == name


async def test_field_that_a_service_names_is_named(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["CreateApiKey"] = PlatformError(Reason.INVALID_ARGUMENT, field="api_key.display_name")
    response = await edge.client.post(KEYS, json={"display_name": ""})
    assert error_of(response) == ("INVALID_ARGUMENT", ["api_key.display_name"])


@pytest.mark.parametrize(
    ("content", "status", "fields"),
    [
        (b'{"no_such": 1}', 400, ["api_key.no_such"]),
        (b'{"displayName": 7}', 400, ["api_key.displayName"]),
        (b'{"rate_limits": {"models": [{"model": []}]}}', 400, ["api_key.rate_limits.models[0].model"]),
        (b'{"display_name": "\\ud800"}', 400, ["api_key.display_name"]),
        (b'{"\\ud800": 1}', 400, ["api_key.?"]),
        (b"{", 400, []),
        (b"\xff\xfe", 400, []),
        (b"[]", 400, []),
        (b"[" * 200_000, 400, []),
        (b'{"display_name": "' + b"x" * (4 << 20) + b'"}', 413, []),
    ],
)
async def test_bad_body_is_refused_before_any_call(
    edge: Edge, identity: PeerDouble, content: bytes, status: int, fields: list[str]
) -> None:
    response = await edge.client.post(KEYS, content=content)
    assert response.status_code == status
    assert error_of(response) == ("INVALID_ARGUMENT", fields)
    assert identity.received == []


async def test_body_that_is_not_json_is_an_unsupported_media_type(edge: Edge) -> None:
    response = await edge.client.post(
        KEYS, content=b"a=1", headers={"content-type": "application/x-www-form-urlencoded"}
    )
    assert response.status_code == 415
    assert error_of(response)[0] == "INVALID_ARGUMENT"


async def test_missing_credential_is_told_without_a_call(edge: Edge, identity: PeerDouble) -> None:
    async with httpx.AsyncClient(base_url=edge.client.base_url, trust_env=False) as client:
        response = await client.get(KEYS)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert error_of(response)[0] == "UNAUTHENTICATED"
    assert identity.received == []


async def test_public_rpc_needs_no_credential(edge: Edge, identity: PeerDouble) -> None:
    async with httpx.AsyncClient(base_url=edge.client.base_url, trust_env=False) as client:
        response = await client.post("/admin/v1/invites:preview", json={})
    assert response.status_code == 200, response.text
    assert "authorization" not in identity.received[0].metadata


async def test_credential_of_a_pipelined_request_is_not_the_next_ones(edge: Edge, identity: PeerDouble) -> None:
    head = b"host: x\r\ncontent-type: application/json\r\ncontent-length: 2\r\n"
    first = b"POST %s HTTP/1.1\r\nauthorization: Bearer k\r\n%s\r\n{}" % (KEYS.encode(), head)
    await edge.exchange(first + b"POST /admin/v1/invites:preview HTTP/1.1\r\nconnection: close\r\n%s\r\n{}" % head)
    with_credential, without = identity.received
    assert with_credential.metadata["authorization"] == "Bearer k"
    assert "authorization" not in without.metadata


async def test_unknown_path_and_wrong_verb(edge: Edge) -> None:
    unknown = await edge.client.get("/admin/v1/no-such")
    assert (unknown.status_code, error_of(unknown)[0]) == (404, "NOT_FOUND")
    wrong_verb = await edge.client.delete(KEYS)
    assert (wrong_verb.status_code, wrong_verb.headers["allow"]) == (405, "GET, POST")
    error_of(wrong_verb)
    for path in ("/admin", "/favicon.ico", "/%76%31/chat/completions/"):
        assert (await edge.client.get(path)).status_code == 404


async def test_head_has_no_body(edge: Edge) -> None:
    response = await edge.client.head("/admin/v1/models")
    assert (response.status_code, response.content) == (200, b"")


async def test_peer_that_is_away_is_unavailable_and_never_unauthenticated(edge: Edge, identity: PeerDouble) -> None:
    await identity.stop()
    async with asyncio.timeout(3):
        response = await edge.client.get(KEYS)
    assert (response.status_code, error_of(response)[0]) == (503, "UNAVAILABLE")
    assert response.headers["retry-after"] == "1"


async def test_peer_that_restarts_fails_no_request(edge: Edge, identity: PeerDouble) -> None:
    assert (await edge.client.post(KEYS, json={})).status_code == 200
    await identity.stop()
    asking = asyncio.create_task(edge.client.post(KEYS, json={}))
    await asyncio.wait([asking], timeout=0.3)
    assert not asking.done()
    await identity.start()
    assert (await asking).status_code == 200


def entries(count: int, *then: PlatformError | asyncio.Event) -> Any:
    async def run(request: audit_service_pb2.ExportAuditEntriesRequest) -> AsyncIterator[Any]:
        for number in range(count):
            entry = audit_service_pb2.AuditEntry(audit_entry_id=f"aud_{number}")
            yield audit_service_pb2.ExportAuditEntriesResponse(audit_entry=entry)
        for step in then:
            if isinstance(step, PlatformError):
                raise step
            await step.wait()

    return run


async def test_streaming_rpc_is_a_line_of_json_for_each_message(edge: Edge, identity: PeerDouble) -> None:
    identity.streams["ExportAuditEntries"] = entries(3)
    response = await edge.client.get(EXPORT)
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.content.splitlines()]
    assert [line["audit_entry"]["audit_entry_id"] for line in lines] == ["aud_0", "aud_1", "aud_2"]


async def test_streaming_rpc_without_messages_is_an_empty_answer(edge: Edge, identity: PeerDouble) -> None:
    response = await edge.client.get(EXPORT)
    assert (response.status_code, response.content) == (200, b"")


async def test_streaming_rpc_that_is_refused_has_a_status(edge: Edge, identity: PeerDouble) -> None:
    identity.streams["ExportAuditEntries"] = entries(0, PlatformError(Reason.PERMISSION_DENIED))
    response = await edge.client.get(EXPORT)
    assert (response.status_code, error_of(response)[0]) == (403, "PERMISSION_DENIED")


async def test_streaming_rpc_that_breaks_off_says_so_in_its_last_line(edge: Edge, identity: PeerDouble) -> None:
    identity.streams["ExportAuditEntries"] = entries(1, PlatformError(Reason.UNAVAILABLE))
    response = await edge.client.get(EXPORT)
    assert response.status_code == 200
    assert json.loads(response.content.splitlines()[-1])["error"]["status"] == "UNAVAILABLE"


async def test_client_that_leaves_a_streaming_rpc_cancels_it(edge: Edge, identity: PeerDouble) -> None:
    identity.streams["ExportAuditEntries"] = entries(1, asyncio.Event())
    async with edge.client.stream("GET", EXPORT) as response:
        await anext(response.aiter_lines())
    await until(lambda: identity.cancelled == ["ExportAuditEntries"], within_s=2)

"""Admin REST and usage: who may see what, errors in AIP-193's shape, and tokens counted as the answer told them."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from .conftest import Platform, Tenant, wait_until

MODEL = "smollm2"
HELLO = [{"role": "user", "content": "Say hello."}]


def as_tenant(platform: Platform, secret: str) -> httpx.Client:
    return httpx.Client(
        base_url=platform.base_url, headers={"Authorization": f"Bearer {secret}"}, timeout=10, trust_env=False
    )


def usage(platform: Platform, organization_id: str, **query: Any) -> dict[str, Any]:
    start = (datetime.now(UTC) - timedelta(hours=2)).isoformat().replace("+00:00", "Z")
    with platform.admin as admin:
        response = admin.get(
            f"/analytics/v1/organizations/{organization_id}/usage", params={"start_time": start, **query}
        )
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def totals(platform: Platform, organization_id: str) -> dict[str, int]:
    return {name: int(value) for name, value in usage(platform, organization_id)["totals"].items()}


@pytest.mark.parametrize("streamed", [False, True])
def test_usage_is_in_analytics_within_five_seconds_with_the_answers_own_tokens(
    platform: Platform, streamed: bool
) -> None:
    tenant = platform.new_tenant("Counted")
    if streamed:
        stream = tenant.openai.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
        told = list(stream)[-1].usage
    else:
        told = tenant.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8).usage
    wait_until(lambda: totals(platform, tenant.organization_id).get("requests") == 1, 5, "the request is counted")
    counted = totals(platform, tenant.organization_id)
    assert counted["prompt_tokens"] == told.prompt_tokens
    assert counted["completion_tokens"] == told.completion_tokens


def test_stream_without_include_usage_is_counted_all_the_same(platform: Platform) -> None:
    tenant = platform.new_tenant("Counted without asking")
    chunks = list(tenant.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=6, stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    wait_until(lambda: totals(platform, tenant.organization_id).get("requests") == 1, 5, "the request is counted")
    assert 0 < totals(platform, tenant.organization_id)["completion_tokens"] <= 6


def test_usage_is_grouped_by_key_and_model(platform: Platform) -> None:
    tenant = platform.new_tenant("Grouped")
    tenant.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)
    tenant.openai.embeddings.create(model="minilm", input="Hello.")
    wait_until(lambda: totals(platform, tenant.organization_id).get("requests") == 2, 5, "both are counted")
    answer = usage(
        platform,
        tenant.organization_id,
        group_by=["USAGE_DIMENSION_API_KEY", "USAGE_DIMENSION_MODEL"],
        interval="USAGE_INTERVAL_HOUR",
    )
    groups = {tuple(value["value"] for value in bucket["group"]) for bucket in answer["buckets"]}
    assert groups == {(tenant.api_key_id, MODEL), (tenant.api_key_id, "minilm")}
    assert answer["freshness"]["state"] == "FRESHNESS_STATE_FRESH"


def test_refused_request_is_counted_apart_and_bills_nothing(platform: Platform, tenant: Tenant) -> None:
    own = platform.new_tenant("Refused")
    with pytest.raises(Exception, match="does not exist"):
        own.openai.chat.completions.create(model="gpt-none", messages=HELLO)
    wait_until(lambda: totals(platform, own.organization_id).get("refused_requests") == 1, 5, "the refusal is counted")
    counted = totals(platform, own.organization_id)
    assert counted.get("requests", 0) == 0
    assert counted.get("prompt_tokens", 0) == 0


def test_request_can_be_found_by_its_id(platform: Platform) -> None:
    tenant = platform.new_tenant("Found")
    raw = tenant.openai.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=2)

    def record() -> Any:
        with platform.admin as admin:
            response = admin.get(
                f"/analytics/v1/organizations/{tenant.organization_id}/usage-records",
                params={"request_id": raw.request_id},
            )
        return response.json().get("records", [])

    (found,) = wait_until(record, 5, "the record is there")
    assert found["outcome"] == "OUTCOME_SUCCEEDED"
    assert found["api_key_id"] == tenant.api_key_id
    assert "Say hello" not in str(found)


def test_other_organizations_resources_are_not_found(platform: Platform) -> None:
    everything = ("api_keys.*", "usage.*", "organizations.get")
    one, other = platform.new_tenant("One", everything), platform.new_tenant("Other", everything)
    with as_tenant(platform, one.secret) as client:
        own = client.get(f"/admin/v1/organizations/{one.organization_id}")
        assert own.status_code == 200, own.text
        for path in (
            f"/admin/v1/organizations/{other.organization_id}",
            f"/admin/v1/organizations/{other.organization_id}/api-keys",
            f"/admin/v1/organizations/{other.organization_id}/api-keys/{other.api_key_id}",
            f"/admin/v1/organizations/{one.organization_id}/api-keys/{other.api_key_id}",
            f"/analytics/v1/organizations/{other.organization_id}/usage?start_time=2026-01-01T00:00:00Z",
        ):
            response = client.get(path)
            assert response.status_code == 404, (path, response.text)
            assert response.json()["error"]["status"] == "NOT_FOUND"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"display_name": "x", "no_such": 1}, "no_such"),
        ({"display_name": 7}, "display_name"),
        ({"display_name": ""}, "api_key.display_name"),
        ({"display_name": "x", "scopes": "all"}, "scopes"),
        ({"display_name": "x", "scopes": [1]}, "scopes[0]"),
        ({"display_name": "x", "rate_limits": {"burst_requests": "many"}}, "rate_limits.burst_requests"),
        ({"display_name": "x", "expire_time": "tomorrow"}, "expire_time"),
        ({"display_name": "x", "scopes": ["no_such.permission"]}, "api_key.scopes"),
    ],
)
def test_bad_admin_field_is_named(platform: Platform, tenant: Tenant, body: dict[str, Any], field: str) -> None:
    with platform.admin as admin:
        response = admin.post(f"/admin/v1/organizations/{tenant.organization_id}/api-keys", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["status"] == "INVALID_ARGUMENT"
    violations = [
        violation["field"]
        for detail in error["details"]
        if detail["@type"].endswith("BadRequest")
        for violation in detail["fieldViolations"]
    ]
    assert len(violations) == 1
    assert violations[0].removeprefix("api_key.") == field.removeprefix("api_key.")


def test_price_is_known_and_a_wrong_one_is_named(platform: Platform) -> None:
    amounts = {
        "prompt_micros_per_million": 1,
        "cached_prompt_micros_per_million": 1,
        "completion_micros_per_million": 1,
    }
    path = f"/admin/v1/models/{MODEL}/prices"
    with platform.admin as admin:
        before = admin.get(path).json()["prices"]
        assert int(before[-1]["prompt_micros_per_million"]) > 0
        for wrong in (None, -1, 0.5, 10**16, 10**30, "much"):
            response = admin.post(path, json=amounts | {"completion_micros_per_million": wrong})
            details = response.json()["error"]["details"]
            fields = [violation["field"] for detail in details for violation in detail.get("fieldViolations", ())]
            assert (response.status_code, fields) == (400, ["price.completion_micros_per_million"]), response.text
        assert admin.post("/admin/v1/models/no-such/prices", json=amounts).status_code == 404
        assert admin.get(path).json()["prices"] == before


def test_admin_errors_have_aip_193s_shape(platform: Platform, tenant: Tenant) -> None:
    with as_tenant(platform, tenant.secret) as client:
        for method, path, status in (
            ("POST", "/admin/v1/organizations", "PERMISSION_DENIED"),
            ("GET", "/admin/v1/no-such", "NOT_FOUND"),
        ):
            response = client.request(method, path, json={} if method == "POST" else None)
            error = response.json()["error"]
            assert error["code"] == response.status_code
            assert error["status"] == status
            assert any(detail["@type"].endswith("ErrorInfo") for detail in error["details"])


def test_secret_of_a_key_is_in_one_answer_only(platform: Platform) -> None:
    tenant = platform.new_tenant("Secretive")
    with platform.admin as admin:
        listed = admin.get(f"/admin/v1/organizations/{tenant.organization_id}/api-keys")
        one = admin.get(f"/admin/v1/organizations/{tenant.organization_id}/api-keys/{tenant.api_key_id}")
    assert tenant.api_key_id in listed.text
    assert tenant.secret not in listed.text + one.text


def test_every_process_answers_health_ready_and_metrics(platform: Platform) -> None:
    for path, content in (("/health", ""), ("/ready", ""), ("/metrics", "aiaas_")):
        response = httpx.get(f"{platform.base_url}{path}", trust_env=False)
        assert response.status_code == 200
        assert content in response.text


def test_audit_log_of_an_organization_is_exported_as_lines_and_verifies(platform: Platform) -> None:
    tenant = platform.new_tenant("Audited")
    path = f"/admin/v1/organizations/{tenant.organization_id}"
    with platform.admin as admin:
        assert admin.post(f"{path}/audit-checkpoints", json={}).status_code == 200
        exported = admin.get(f"{path}/audit-entries:export")
        verified = admin.get(f"{path}/audit-entries:verify").json()
    entries = [json.loads(line)["audit_entry"] for line in exported.text.splitlines()]
    assert exported.headers["content-type"] == "application/x-ndjson"
    assert [int(entry["sequence"]) for entry in entries] == list(range(1, len(entries) + 1))
    assert {entry["client_address"] for entry in entries} == {"127.0.0.1"}
    assert entries[-1]["method"] == "/aiaas.identity.v1.AuditService/CreateAuditCheckpoint"
    assert verified["intact"] is True
    assert (int(verified["entries"]), int(verified["checkpoints"])) == (len(entries), 1)

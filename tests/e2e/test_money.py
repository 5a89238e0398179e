"""Prices, budgets, alerts and explanations as people and clients meet them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from openai import DefaultHttpxClient, InternalServerError, OpenAI, RateLimitError

from .conftest import Platform, Tenant, wait_until
from .test_admin_and_usage import totals

MODEL = "smollm2"
HELLO = [{"role": "user", "content": "Say hello."}]
BUDGET = {
    "display_name": "Hard",
    "unit": "BUDGET_UNIT_TOKENS",
    "interval": "BUDGET_INTERVAL_MONTHLY",
    "enforcement": "BUDGET_ENFORCEMENT_HARD",
    "limit": "700",
}


def create_budget(platform: Platform, tenant: Tenant, **fields: Any) -> httpx.Response:
    with platform.admin as admin:
        return admin.post(f"/admin/v1/organizations/{tenant.organization_id}/budgets", json=BUDGET | fields)


def spent(platform: Platform, tenant: Tenant, budget_id: str) -> dict[str, int]:
    with platform.admin as admin:
        answer = admin.get(f"/admin/v1/organizations/{tenant.organization_id}/budgets/{budget_id}").json()
    period = answer["budget"]["current_period"]
    return {name: int(period[name]) for name in ("limit", "spent", "leased")}


def test_spent_budget_refuses_and_the_official_client_tries_once(platform: Platform) -> None:
    tenant = platform.new_tenant("Poor")
    assert create_budget(platform, tenant, limit="10").status_code == 200
    attempts: list[httpx.Request] = []
    transport = DefaultHttpxClient(trust_env=False, event_hooks={"request": [attempts.append]})
    with (
        OpenAI(base_url=f"{platform.base_url}/v1", api_key=tenant.secret, http_client=transport) as client,
        pytest.raises(RateLimitError) as refused,
    ):
        client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5)  # type: ignore[arg-type]
    assert refused.value.body == {
        "message": "You exceeded your current quota, please check your budgets.",
        "type": "insufficient_quota",
        "param": None,
        "code": "insufficient_quota",
    }
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert len(attempts) == 1


def test_budget_is_charged_what_was_used_and_nothing_stays_reserved(platform: Platform) -> None:
    tenant = platform.new_tenant("Careful")
    budget_id = create_budget(platform, tenant, limit="100000").json()["budget"]["budget_id"]
    told = tenant.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5).usage
    assert told is not None
    wait_until(lambda: spent(platform, tenant, budget_id)["leased"] == 0, 10, "the lease is given back")
    assert spent(platform, tenant, budget_id)["spent"] == told.total_tokens


def test_answer_is_cut_to_what_a_budget_has_left(platform: Platform) -> None:
    tenant = platform.new_tenant("Cut short")
    create_budget(platform, tenant)
    messages = [{"role": "user", "content": "Write a very long story."}]
    # Without the tokens that end a message, the story ends where it is cut and nowhere else.
    endless = {"0": -100, "2": -100}
    answer = tenant.openai.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=400, temperature=0, logit_bias=endless
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens < 400


def test_override_counts_once_another_person_has_approved_it(platform: Platform) -> None:
    tenant = platform.new_tenant("Overridden")
    budget_id = create_budget(platform, tenant, limit="2000").json()["budget"]["budget_id"]
    organization = f"/admin/v1/organizations/{tenant.organization_id}"
    place = f"{organization}/budgets/{budget_id}/overrides"
    wanted = {"amount": "1000", "reason": "The month is long.", "expire_time": "2100-01-01T00:00:00Z"}
    with platform.admin as admin:
        asked = admin.post(place, json=wanted).json()["budget_override"]
        assert asked["state"] == "BUDGET_OVERRIDE_STATE_PENDING"
        approve = f"{place}/{asked['budget_override_id']}:approve"
        assert admin.post(approve, json={}).status_code == 403, "whoever asks must not approve"
        assert spent(platform, tenant, budget_id)["limit"] == 2000
        user = admin.post(f"{organization}/users", json={"email": "owner@example.com", "role_ids": ["owner"]}).json()
        key = admin.post(
            f"{organization}/api-keys",
            json={
                "display_name": "Owner",
                "user_id": user["user"]["user_id"],
                "scopes": ["budget_overrides.approve"],
            },
        ).json()
        approved = httpx.post(
            platform.base_url + approve,
            headers={"Authorization": f"Bearer {key['secret']}"},
            json={},
            trust_env=False,
        )
    assert approved.status_code == 200, approved.text
    assert spent(platform, tenant, budget_id)["limit"] == 3000


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"limit": "-1"}, "limit"),
        ({"limit": "1.5"}, "limit"),
        ({"limit": "9223372036854775808"}, "limit"),
        ({"limit": None}, "limit"),
        ({"unit": "BUDGET_UNIT_GOLD"}, "unit"),
        ({"unit": "BUDGET_UNIT_UNSPECIFIED"}, "unit"),
        ({"interval": "BUDGET_INTERVAL_UNSPECIFIED"}, "interval"),
        ({"alert_percents": [50, 50]}, "alert_percents"),
        ({"user_id": "user_nobody"}, "user_id"),
    ],
)
def test_wrong_budget_is_refused_by_the_name_of_its_field(
    platform: Platform, tenant: Tenant, fields: dict[str, Any], named: str
) -> None:
    answer = create_budget(platform, tenant, **fields)
    assert answer.status_code == 400
    assert named in answer.text
    with platform.admin as admin:
        listed = admin.get(f"/admin/v1/organizations/{tenant.organization_id}/budgets").json()
    assert not listed["budgets"]


def test_second_budget_of_the_same_scope_is_refused(platform: Platform) -> None:
    tenant = platform.new_tenant("Twice")
    assert create_budget(platform, tenant).status_code == 200
    assert create_budget(platform, tenant).status_code == 409


def test_charge_is_explained(platform: Platform) -> None:
    tenant = platform.new_tenant("Curious")
    create_budget(platform, tenant, limit="100000")
    raw = tenant.openai.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=5)
    request_id = raw.headers["x-request-id"]
    wait_until(lambda: totals(platform, tenant.organization_id).get("requests") == 1, 5, "the request is counted")
    with platform.admin as admin:
        place = f"/analytics/v1/organizations/{tenant.organization_id}/usage-records/{request_id}:explain"
        explained = admin.get(place).json()
    record, usage = explained["record"], raw.parse().usage
    assert (int(record["usage"]["prompt_tokens"]), record["usage_source"]) == (
        usage.prompt_tokens,
        "USAGE_SOURCE_ENGINE",
    )
    assert int(record["cost_micros"]) > 0
    assert int(record["budgets"][0]["charged"]) == usage.total_tokens
    assert any(f"{usage.prompt_tokens}" in step for step in explained["steps"])
    assert totals(platform, tenant.organization_id)["cost_micros"] == int(record["cost_micros"])


@contextmanager
def receiver() -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """A server that takes deliveries; its address, and what came."""
    came: list[tuple[dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            came.append((dict(self.headers), body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """It has nothing to say."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook", came
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_threshold_that_is_passed_reaches_a_webhook_once_and_signed(platform: Platform) -> None:
    tenant = platform.new_tenant("Told")
    with receiver() as (address, came), platform.admin as admin:
        place = f"/analytics/v1/organizations/{tenant.organization_id}/webhooks"
        made = admin.post(place, json={"display_name": "Alerts", "url": address})
        assert made.status_code == 200, made.text
        budget = create_budget(
            platform, tenant, limit="30", enforcement="BUDGET_ENFORCEMENT_SOFT", alert_percents=[50]
        ).json()["budget"]
        tenant.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5)
        wait_until(lambda: came, 20, "the webhook is called")
        headers, body = came[0]
    event = json.loads(body)
    assert event["type"] == "EVENT_TYPE_BUDGET_THRESHOLD_CROSSED"
    assert event["budget_threshold_crossed"]["budget_id"] == budget["budget_id"]
    key = base64.b64decode(made.json()["secret"].removeprefix("whsec_"))
    lowered = {name.lower(): value for name, value in headers.items()}
    signed = f"{lowered['webhook-id']}.{lowered['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert lowered["webhook-signature"] == f"v1,{expected}"
    assert len(came) == 1


def test_model_without_a_price_is_refused_and_named(platform: Platform, tenant: Tenant) -> None:
    with platform.admin as admin:
        backends = admin.get("/admin/v1/backends").json()["backends"]
        served = next(backend for backend in backends if any(one["model_id"] == MODEL for one in backend["models"]))
        admin.post(
            "/admin/v1/models",
            json={"model_id": "unpriced", "owner": "test", "endpoints": ["ENDPOINT_CHAT_COMPLETIONS"]},
        ).raise_for_status()
        models = [*served["models"], {"model_id": "unpriced", "upstream_model": served["models"][0]["upstream_model"]}]
        place = f"/admin/v1/backends/{served['backend_id']}"
        admin.patch(place, params={"update_mask": "models"}, json={"models": models}).raise_for_status()
        try:
            with pytest.raises(InternalServerError, match="'unpriced' has no price") as refused:
                tenant.openai.chat.completions.create(model="unpriced", messages=HELLO, max_tokens=1)
            assert refused.value.response.status_code == 500
            assert refused.value.response.headers["x-should-retry"] == "false"
        finally:
            admin.patch(place, params={"update_mask": "models"}, json={"models": served["models"]}).raise_for_status()
            admin.delete("/admin/v1/models/unpriced").raise_for_status()

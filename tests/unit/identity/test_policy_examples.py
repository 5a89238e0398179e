"""The examples of docs/policies.md do what the text beside them says."""

import json
from pathlib import Path
from typing import Any

import pytest

from identity.policy_rego import Bundle, compiled, judged, problems

DOCUMENT = Path(__file__).parents[3] / "docs" / "policies.md"
EXAMPLES = [each.partition("```")[0] for each in DOCUMENT.read_text(encoding="utf-8").split("```rego\n")[1:]]
BIG_BY_DAY, OFFICE, KEYS = EXAMPLES
OFFICE_DATA = '{"office": ["192.0.2.0/24", "2001:db8::/32"]}'


def asked(
    permission: str,
    resource: dict[str, Any],
    *,
    kind: str = "user",
    address: str = "",
    time: str = "2026-03-02T12:00:00Z",
) -> str:
    return json.dumps(
        {
            "principal": {"kind": kind, "id": f"{kind}_1", "permissions": [permission]},
            "method": "/aiaas.identity.v1.ApiKeyService/CreateApiKey",
            "permission": permission,
            "resource": resource,
            "client_address": address,
            "time": time,
        }
    )


def key(**fields: Any) -> str:
    return asked("api_keys.create", {"organization_id": "org_1", "api_key": fields})


GOOD_KEY = {"user_id": "user_1", "display_name": "web: shop", "allowed_models": ["small", "big"]}
CASES = [
    (BIG_BY_DAY, asked("inference.create", {"model": "small"}, kind="api_key"), ""),
    (BIG_BY_DAY, asked("inference.create", {"model": "big"}), ""),
    (BIG_BY_DAY, asked("inference.create", {"model": "big"}, time="2026-03-02T18:00:00Z"), "between 8 and 18"),
    (BIG_BY_DAY, asked("inference.create", {"model": "big"}, kind="api_key"), "for people"),
    (BIG_BY_DAY, asked("users.delete", {}, kind="api_key", time="2026-03-02T02:00:00Z"), ""),
    (OFFICE, asked("users.list", {}), ""),
    (OFFICE, asked("inference.create", {"model": "big"}, address="203.0.113.9"), ""),
    (OFFICE, asked("users.delete", {}, address="192.0.2.77"), ""),
    (OFFICE, asked("users.delete", {}, address="2001:db8::7"), ""),
    (OFFICE, asked("users.delete", {}, address="203.0.113.9"), "from the office"),
    (OFFICE, asked("users.delete", {}), "from the office"),
    (KEYS, key(**GOOD_KEY), ""),
    (KEYS, key(**(GOOD_KEY | {"user_id": "", "service_account_id": "sa_1"})), ""),
    (KEYS, key(display_name="web: shop", allowed_models=["small"]), "a key needs an owner"),
    (KEYS, key(**(GOOD_KEY | {"display_name": "shop"})), "its name begins with a team"),
    (KEYS, key(**(GOOD_KEY | {"allowed_models": ["a", "b", "c", "d"]})), "it is for one to three models"),
    (KEYS, key(user_id="user_1"), "it is for one to three models; its name begins with a team"),
    (KEYS, asked("api_keys.delete", {}), ""),
]


def bundle(source: str) -> Bundle:
    return Bundle((("example.rego", source),), OFFICE_DATA if source is OFFICE else "")


@pytest.mark.parametrize("source", EXAMPLES)
def test_examples_can_be_stored(source: str) -> None:
    assert not problems(bundle(source))


@pytest.mark.parametrize(("source", "asked_json", "reason"), CASES)
def test_examples_decide_as_the_text_says(source: str, asked_json: str, reason: str) -> None:
    verdict = judged(compiled(bundle(source)), asked_json)
    assert verdict.allowed is not bool(reason)
    assert reason in verdict.reason


def test_data_beside_the_example_is_what_is_tested() -> None:
    assert f"`{OFFICE_DATA}`" in DOCUMENT.read_text(encoding="utf-8")

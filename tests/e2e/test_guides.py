"""The guides do what they say: their commands, as they stand, line by line in one shell against a running platform."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from .conftest import Platform

pytestmark = pytest.mark.once
GUIDES = Path(__file__).parents[2] / "docs/guides"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(name: str) -> str:
    blocks = BLOCK.findall((GUIDES / f"{name}.md").read_text())
    assert blocks
    return "\n".join(blocks)


def run(platform: Platform, *names: str, then: str = "") -> str:
    """What the guides print, one after the other in one shell, which any command that fails ends."""
    script = "\n".join([*map(commands, names), then])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env={"PATH": "/usr/bin:/bin", "BASE": platform.base_url, "KEY": platform.admin_key, "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_first_key_ends_in_a_chat_that_is_counted(platform: Platform) -> None:
    printed = run(platform, "first-key", then="echo; echo $SECRET $ORG")
    secret, organization_id = printed.splitlines()[-1].split()
    assert secret.startswith("aias_")
    assert re.search(r'"completion_tokens": ?[1-8]\b', printed)
    with platform.admin as admin:
        keys = admin.get(f"/admin/v1/organizations/{organization_id}/api-keys").json()["api_keys"]
        users = admin.get(f"/admin/v1/organizations/{organization_id}/users").json()["users"]
    assert [key["display_name"] for key in keys] == ["first", "build"]
    assert [user["email"] for user in users] == ["ada@acme.example"]


def test_a_key_that_is_asked_for_again_is_not_made_twice(platform: Platform) -> None:
    again = re.search(r"^api .*Idempotency-Key.*\n.*$", commands("first-key"), re.MULTILINE)
    assert again is not None
    with pytest.raises(AssertionError, match="ALREADY_EXISTS"):
        run(platform, "first-key", then=again[0])


def test_budgets_bind(platform: Platform) -> None:
    printed = run(platform, "first-key", "budgets", then="echo; echo $ORG")
    with platform.admin as admin:
        budgets = admin.get(f"/admin/v1/organizations/{printed.split()[-1]}/budgets").json()["budgets"]
    assert [(budget["unit"], budget["limit"]) for budget in budgets] == [
        ("BUDGET_UNIT_COST", "80000000"),
        ("BUDGET_UNIT_REQUESTS", "1000"),
    ]
    assert budgets[1]["api_key_id"]


def test_issuer_is_added_checked_and_disabled(platform: Platform) -> None:
    printed = run(platform, "first-key", "sso", then="echo; echo $ORG $ISSUER")
    organization_id, issuer_id = printed.split()[-2:]
    with platform.admin as admin:
        found = admin.get(f"/admin/v1/organizations/{organization_id}/issuers/{issuer_id}").json()["issuer"]
    assert found["disabled"]
    assert "the secret that the issuer gave" not in json.dumps(found)


def test_model_comes_and_goes(platform: Platform) -> None:
    printed = run(platform, "first-key", "adding-a-model")
    assert '"BACKEND_HEALTH_' in printed
    with platform.admin as admin:
        assert admin.get("/admin/v1/models/guide-model").status_code == 404


def test_month_is_exported(platform: Platform) -> None:
    printed = run(platform, "first-key", "exports", then="echo; echo $ORG")
    assert "start_time,api_key_id,user_id,service_account_id,model,outcome,requests," in printed
    with platform.admin as admin:
        path = f"/analytics/v1/organizations/{printed.split()[-1]}/export-schedule"
        assert admin.get(path).json()["export_schedule"]["enabled"]

"""What a client sees when something is wrong with its request, and when it goes away in the middle."""

import json
import time
from typing import Any

import httpx
import pytest
from openai import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    PermissionDeniedError,
)

from .conftest import FRONT, Platform, Tenant, wait_until

MODEL = "smollm2"
HELLO = [{"role": "user", "content": "Hi"}]


def post(platform: Platform, secret: str, content: bytes | str, path: str = "/v1/chat/completions") -> httpx.Response:
    return httpx.post(
        f"{platform.base_url}{path}",
        content=content,
        headers={"Authorization": f"Bearer {secret}", "Content-Type": "application/json"},
        timeout=30,
        trust_env=False,
    )


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object; its four keys are always there (OpenAI's shape)."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_wrong_key_is_unauthenticated(platform: Platform, tenant: Tenant) -> None:
    unknown = platform.new_tenant("Soon revoked")
    with platform.admin as admin:
        admin.post(
            f"/admin/v1/organizations/{unknown.organization_id}/api-keys/{unknown.api_key_id}:revoke", json={}
        ).raise_for_status()
    broken = tenant.secret[:-1] + ("A" if tenant.secret[-1] != "A" else "B")
    for secret in ("sk-something", broken, unknown.secret):
        with pytest.raises(AuthenticationError) as error:
            platform.client(secret).chat.completions.create(model=MODEL, messages=HELLO)
        assert error.value.code == "invalid_api_key"
        assert secret not in str(error.value)


def test_missing_key_is_unauthenticated(platform: Platform) -> None:
    response = httpx.post(f"{platform.base_url}/v1/chat/completions", json={}, trust_env=False)
    assert response.status_code == 401
    assert error_of(response)["message"]


def test_key_revoked_while_in_use_stops_working_within_a_second(platform: Platform) -> None:
    tenant = platform.new_tenant("Revoked in use")
    tenant.openai.models.list()
    with platform.admin as admin:
        admin.post(
            f"/admin/v1/organizations/{tenant.organization_id}/api-keys/{tenant.api_key_id}:revoke", json={}
        ).raise_for_status()

    def refused() -> bool:
        try:
            tenant.openai.models.list()
        except AuthenticationError:
            return True
        return False

    wait_until(refused, 1, "the key is refused")


def test_key_without_the_scope_is_forbidden(platform: Platform) -> None:
    tenant = platform.new_tenant("Reader", scopes=("usage.query",))
    with pytest.raises(PermissionDeniedError):
        tenant.openai.chat.completions.create(model=MODEL, messages=HELLO)


def test_unknown_model_is_not_found(openai: Any) -> None:
    with pytest.raises(NotFoundError) as error:
        openai.chat.completions.create(model="gpt-none", messages=HELLO)
    assert error.value.code == "model_not_found"
    assert "gpt-none" in error.value.message


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": 7, "content": "x"}]}, "messages.0.role"),
        ({"stream": "yes"}, "stream"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"n": 10_000}, "n"),
        ({"model": None}, "model"),
    ],
)
def test_bad_field_is_named(platform: Platform, tenant: Tenant, change: dict[str, Any], param: str) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 1, **change}
    response = post(platform, tenant.secret, json.dumps(body))
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b'{"model": "smollm2"', b"\xff\xfe", b'"text"'])
def test_broken_json_is_a_bad_request(platform: Platform, tenant: Tenant, content: bytes) -> None:
    response = post(platform, tenant.secret, content)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_deep_json_is_a_bad_request(platform: Platform, tenant: Tenant) -> None:
    body = '{"model": "smollm2", "messages": ' + "[" * 5000 + "]" * 5000 + "}"
    assert post(platform, tenant.secret, body).status_code == 400


def test_five_megabytes_are_too_large(platform: Platform, tenant: Tenant) -> None:
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x" * 5_000_000}]})
    response = post(platform, tenant.secret, body)
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


def test_too_long_prompt_is_a_bad_request_of_the_engine(openai: Any) -> None:
    with pytest.raises(BadRequestError) as error:
        openai.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 40_000}])
    assert error.value.message


def test_wrong_verb_and_unknown_path_have_openais_shape(platform: Platform, tenant: Tenant) -> None:
    headers = {"Authorization": f"Bearer {tenant.secret}"}
    verb = httpx.get(f"{platform.base_url}/v1/chat/completions", headers=headers, trust_env=False)
    assert (verb.status_code, verb.headers["allow"]) == (405, "POST")
    path = httpx.post(f"{platform.base_url}/v1/no/such", json={}, headers=headers, trust_env=False)
    assert path.status_code == 404
    assert error_of(verb)["message"]
    assert error_of(path)["message"]


def test_wrong_content_type_is_refused(platform: Platform, tenant: Tenant) -> None:
    response = httpx.post(
        f"{platform.base_url}/v1/chat/completions",
        content=b"model=smollm2",
        headers={"Authorization": f"Bearer {tenant.secret}", "Content-Type": "application/x-www-form-urlencoded"},
        trust_env=False,
    )
    assert response.status_code == 415
    assert error_of(response)["message"]


def test_embedding_model_refuses_chat_with_a_clear_error(openai: Any) -> None:
    with pytest.raises(APIStatusError) as error:
        openai.chat.completions.create(model="minilm", messages=HELLO)
    assert error.value.status_code in (400, 404)
    assert "minilm" in error.value.message


def test_client_that_goes_away_frees_the_engine(platform: Platform, tenant: Tenant, openai: Any) -> None:
    def requests_in_flight() -> int:
        with platform.admin as admin:
            backends = admin.get("/admin/v1/backends").json()["backends"]
        return sum(int(backend.get("requests_in_flight", 0)) for backend in backends)

    stream = openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Write a very long story about the sea."}],
        max_tokens=1500,
        temperature=1,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert requests_in_flight() >= 1
    stream.close()
    wait_until(lambda: requests_in_flight() == 0, 2, "the engine is free")
    started = time.monotonic()
    openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("service", [FRONT[-1], "identity"])
def test_official_client_retries_until_a_killed_service_is_back(platform: Platform, service: str) -> None:
    tenant = platform.new_tenant(f"Retries over {service}")
    killed = platform.kill(service)
    patient = tenant.openai.with_options(max_retries=10)
    assert patient.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1).choices
    assert platform.pid(service) != killed

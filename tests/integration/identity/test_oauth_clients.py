"""OAuth2 clients as an organization registers them: what they may be, whom they act as, how their secrets change."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from aiaas.identity.v1 import oauth_service_pb2 as pb
from mesh.errors import Reason
from tests.integration.identity.authorizing import (
    CALLBACK,
    Client,
    Provider,
    Sessions,
    error_of,
    granted,
    inhabit,
    running_provider,
)

BY_CODE = ["OAUTH_GRANT_TYPE_AUTHORIZATION_CODE"]
AS_ITSELF = ["OAUTH_GRANT_TYPE_CLIENT_CREDENTIALS"]


@pytest.fixture
async def provider(database_url: str, tmp_path: Path) -> AsyncIterator[Provider]:
    async with running_provider(database_url, tmp_path, Sessions()) as running:
        await inhabit(running)
        yield running


def creation(organization_id: str, **fields: Any) -> pb.CreateOauthClientRequest:
    wanted: dict[str, Any] = {
        "display_name": "App",
        "kind": "OAUTH_CLIENT_KIND_CONFIDENTIAL",
        "redirect_uris": [CALLBACK],
        "grant_types": BY_CODE,
        **fields,
    }
    return pb.CreateOauthClientRequest(organization_id=organization_id, oauth_client=pb.OauthClient(**wanted))


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("display_name", {"display_name": ""}),
        ("kind", {"kind": 0}),
        ("grant_types", {"grant_types": []}),
        ("grant_types", {"grant_types": [0]}),
        ("grant_types", {"grant_types": [*BY_CODE, *BY_CODE]}),
        ("redirect_uris", {"redirect_uris": []}),
        ("redirect_uris", {"redirect_uris": ["http://app.example/callback"]}),
        ("redirect_uris", {"redirect_uris": [f"{CALLBACK}#fragment"]}),
        ("redirect_uris", {"redirect_uris": ["https://user@app.example/"]}),
        ("redirect_uris", {"redirect_uris": ["https:///callback"]}),
        ("redirect_uris", {"redirect_uris": ["javascript:alert(1)"]}),
        ("redirect_uris", {"redirect_uris": ["https://app.example/\n"]}),
        ("redirect_uris", {"redirect_uris": ["/callback"]}),
        ("scopes", {"scopes": ["everything"]}),
        ("grant_types", {"kind": "OAUTH_CLIENT_KIND_PUBLIC", "grant_types": [*BY_CODE, *AS_ITSELF]}),
        ("grant_types", {"grant_types": ["OAUTH_GRANT_TYPE_REFRESH_TOKEN"], "redirect_uris": []}),
        ("service_account_id", {"grant_types": AS_ITSELF, "redirect_uris": []}),
        ("service_account_id", {"service_account_id": "sa_x"}),
        ("service_account_id", {"grant_types": AS_ITSELF, "redirect_uris": [], "service_account_id": "sa_x"}),
    ],
)
async def test_wrong_field_is_named(provider: Provider, field: str, fields: dict[str, Any]) -> None:
    request = creation(provider.organization_id, **fields)
    error = await provider.identity.refused(provider.stub.CreateOauthClient, request)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, f"oauth_client.{field}")


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:7777/cb", "http://[::1]/cb", "com.example.app:/cb", f"{CALLBACK}?a=b"]
)
async def test_native_apps_have_their_addresses(provider: Provider, uri: str) -> None:
    client = await provider.client("PUBLIC", redirect_uris=[uri])
    assert not client.secret


async def test_life_of_a_client(provider: Provider) -> None:
    one, two = await provider.client(), await provider.client(display_name="Second")
    named: dict[str, Any] = {"organization_id": provider.organization_id, "oauth_client_id": one.id}
    found = (await provider.identity.call(provider.stub.GetOauthClient, pb.GetOauthClientRequest(**named))).oauth_client
    assert (found.display_name, list(found.redirect_uris)) == ("App", [CALLBACK])
    request = pb.ListOauthClientsRequest(organization_id=provider.organization_id, page_size=1)
    first = await provider.identity.call(provider.stub.ListOauthClients, request)
    request.page_token = first.next_page_token
    second = await provider.identity.call(provider.stub.ListOauthClients, request)
    listed = [client.oauth_client_id for page in (first, second) for client in page.oauth_clients]
    assert (listed, second.next_page_token) == ([one.id, two.id], "")
    await provider.update(one, display_name="Renamed")
    stale = pb.UpdateOauthClientRequest(**named, oauth_client=pb.OauthClient(display_name="X", etag=found.etag))
    assert (
        await provider.identity.refused(provider.stub.UpdateOauthClient, stale)
    ).reason is Reason.FAILED_PRECONDITION
    told = await provider.tokens(one)
    await provider.identity.call(provider.stub.DeleteOauthClient, pb.DeleteOauthClientRequest(**named))
    assert not await provider.is_accepted(told["access_token"])
    assert error_of(await provider.refresh(one, told["refresh_token"]), 401) == "invalid_client"
    error = await provider.identity.refused(provider.stub.GetOauthClient, pb.GetOauthClientRequest(**named))
    assert error.reason is Reason.NOT_FOUND


async def test_creation_is_not_repeated(provider: Provider) -> None:
    request = creation(provider.organization_id)
    request.request_id = "once"
    await provider.identity.call(provider.stub.CreateOauthClient, request)
    error = await provider.identity.refused(provider.stub.CreateOauthClient, request)
    assert (error.reason, error.field) == (Reason.ALREADY_EXISTS, "request_id")


async def test_client_of_another_organization_is_not_found(provider: Provider) -> None:
    client = await provider.client()
    other = await provider.identity.organization("Other")
    owner = await provider.identity.member(other, "owner", "owner@other.example")
    for organization_id in (provider.organization_id, other):
        named: dict[str, Any] = {"organization_id": organization_id, "oauth_client_id": client.id}
        for method, request in (
            (provider.stub.GetOauthClient, pb.GetOauthClientRequest(**named)),
            (provider.stub.UpdateOauthClient, pb.UpdateOauthClientRequest(**named)),
            (provider.stub.DeleteOauthClient, pb.DeleteOauthClientRequest(**named)),
            (provider.stub.RotateOauthClientSecret, pb.RotateOauthClientSecretRequest(**named)),
        ):
            error = await provider.identity.refused(method, request, owner.secret)
            assert error.entry.http == 404
    account = await provider.identity.service_account(provider.organization_id)
    theft = creation(
        other,
        grant_types=AS_ITSELF,
        redirect_uris=[],
        service_account_id=account.service_account_id,
    )
    error = await provider.identity.refused(provider.stub.CreateOauthClient, theft, owner.secret)
    assert error.field == "oauth_client.service_account_id"


async def test_nobody_makes_a_client_that_may_do_more_than_they_may(provider: Provider) -> None:
    organization_id = provider.organization_id
    account = await provider.identity.service_account(organization_id, "Owner's", ("owner",))
    weak = (await provider.identity.key(organization_id, "oauth_clients.*", "usage.query")).secret
    fields: dict[str, Any] = {
        "grant_types": AS_ITSELF,
        "redirect_uris": [],
        "service_account_id": account.service_account_id,
    }
    too_much = creation(organization_id, scopes=["roles.delete"], **fields)
    error = await provider.identity.refused(provider.stub.CreateOauthClient, too_much, weak)
    assert (error.reason, error.field) == (Reason.PERMISSION_DENIED, "oauth_client.service_account_id")
    made = await provider.identity.call(
        provider.stub.CreateOauthClient, creation(organization_id, scopes=["usage.query"], **fields), weak
    )
    named: dict[str, Any] = {"organization_id": organization_id, "oauth_client_id": made.oauth_client.oauth_client_id}
    wider = pb.UpdateOauthClientRequest(**named, oauth_client=pb.OauthClient(scopes=["roles.delete"]))
    assert (await provider.identity.refused(provider.stub.UpdateOauthClient, wider, weak)).entry.http == 403
    await provider.identity.call(provider.stub.UpdateOauthClient, wider)
    rotation = pb.RotateOauthClientSecretRequest(**named)
    assert (await provider.identity.refused(provider.stub.RotateOauthClientSecret, rotation, weak)).entry.http == 403


async def test_old_secret_is_accepted_for_the_overlap(provider: Provider) -> None:
    client = await provider.worker("usage.query")
    named: dict[str, Any] = {"organization_id": provider.organization_id, "oauth_client_id": client.id}

    async def rotate(seconds: int) -> Client:
        request = pb.RotateOauthClientSecretRequest(**named)
        request.overlap.seconds = seconds
        rotated = await provider.identity.call(provider.stub.RotateOauthClientSecret, request)
        return Client(client.id, rotated.client_secret)

    second = await rotate(60)
    for one in (client, second):
        granted(await provider.post("token", one, grant_type="client_credentials"))
    third = await rotate(0)
    for one in (client, second):
        assert error_of(await provider.post("token", one, grant_type="client_credentials"), 401) == "invalid_client"
    granted(await provider.post("token", third, grant_type="client_credentials"))


async def test_public_client_has_no_secret_to_rotate(provider: Provider) -> None:
    client = await provider.client("PUBLIC")
    request = pb.RotateOauthClientSecretRequest(organization_id=provider.organization_id, oauth_client_id=client.id)
    error = await provider.identity.refused(provider.stub.RotateOauthClientSecret, request)
    assert error.reason is Reason.FAILED_PRECONDITION


async def test_no_secret_is_stored(provider: Provider) -> None:
    client = await provider.client()
    code = await provider.code(client)
    told = granted(await provider.exchange(client, code))
    connection = await asyncpg.connect(provider.database_url)
    try:
        tables = [
            row[0] for row in await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        ]
        assert {"oauth_clients", "oauth_authorizations", "oauth_tokens", "signing_keys"} <= set(tables)
        stored = [str(await connection.fetch(f"SELECT t::text FROM {table} t")) for table in tables]
    finally:
        await connection.close()
    for secret in (
        client.secret,
        code.text,
        code.verifier,
        told["access_token"],
        told["refresh_token"],
        told["id_token"],
    ):
        assert not any(secret in rows for rows in stored)
    assert not any("PRIVATE KEY" in rows for rows in stored)

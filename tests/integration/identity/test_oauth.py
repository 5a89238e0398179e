"""The OAuth2 and OpenID Connect provider as clients meet it: over HTTP, with Authlib's own client for each flow, and
the list of OWASP ASVS 5.0, V10.4."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from authlib.oidc.core.util import create_half_hash
from authlib.oidc.discovery import OpenIDProviderMetadata
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError
from joserfc.jwk import KeySet

from aiaas.identity.v1 import oauth_service_pb2 as pb
from mesh import tokens
from mesh.auth import Principal
from mesh.errors import PlatformError, Reason
from tests.doubles.tcp_gate import TcpGate
from tests.integration.edge.reading import led_to, seen
from tests.integration.identity.authorizing import (
    CALLBACK,
    SCOPE,
    Client,
    Provider,
    Sessions,
    asked_by,
    consent_token_of,
    error_of,
    error_shown,
    granted,
    inhabit,
    query_of,
    running_provider,
)
from tests.integration.identity.harness import PUBLIC_URL

VERIFIER = "v" * 64


@pytest.fixture
async def provider(database_url: str, tmp_path: Path) -> AsyncIterator[Provider]:
    async with running_provider(database_url, tmp_path, Sessions()) as running:
        await inhabit(running)
        yield running


@pytest.fixture
async def client(provider: Provider) -> Client:
    return await provider.client()


async def keys_of(provider: Provider) -> KeySet:
    return KeySet.import_key_set((await provider.http.get("/oauth2/keys")).json())


# Authlib's client completes each flow.


@pytest.mark.parametrize("kind", ["CONFIDENTIAL", "PUBLIC"])
async def test_authlib_completes_code_refresh_and_user_info(provider: Provider, kind: str) -> None:
    client = await provider.client(kind)
    method = "client_secret_basic" if client.secret else "none"
    async with provider.authlib(
        client,
        scope=SCOPE,
        redirect_uri=CALLBACK,
        code_challenge_method="S256",
        token_endpoint_auth_method=method,
        token_endpoint=f"{provider.base_url}/oauth2/token",
    ) as app:
        url, state = app.create_authorization_url(
            f"{provider.base_url}/oauth2/authorize", code_verifier=VERIFIER, nonce="n-1"
        )
        location = await provider.consented(query_of(url))
        assert query_of(location)["iss"] == PUBLIC_URL
        await app.fetch_token(authorization_response=location, state=state, code_verifier=VERIFIER)
        first = dict(app.token)
        assert (first["token_type"], first["expires_in"], first["scope"]) == ("Bearer", 3600, SCOPE)
        told = jwt.decode(first["id_token"], await keys_of(provider), algorithms=["RS256"]).claims
        assert (told["iss"], told["sub"], told["aud"]) == (PUBLIC_URL, provider.user_id, client.id)
        assert told["nonce"] == "n-1"
        assert told["exp"] - told["iat"] == 3600
        assert told["at_hash"] == create_half_hash(first["access_token"], "RS256").decode()
        info = (await app.get(f"{provider.base_url}/oauth2/userinfo")).json()
        assert (info["sub"], info["email"]) == (provider.user_id, "ada@example.com")
        await app.refresh_token()
        assert app.token["refresh_token"] != first["refresh_token"]
        assert await provider.is_accepted(app.token["access_token"])


async def test_authlib_completes_client_credentials(provider: Provider) -> None:
    client = await provider.worker("inference.*", "usage.query")
    async with provider.authlib(client, token_endpoint_auth_method="client_secret_post") as app:
        told = await app.fetch_token(f"{provider.base_url}/oauth2/token", grant_type="client_credentials")
        assert "refresh_token" not in told
        principal = await provider.identity.authenticate(told["access_token"])
        assert set(principal.permissions) == {"inference.create", "inference.list_models", "usage.query"}
        assert principal.service_account_id
        narrow = await app.fetch_token(
            f"{provider.base_url}/oauth2/token", grant_type="client_credentials", scope="usage.query"
        )
        assert (await provider.identity.authenticate(narrow["access_token"])).permissions == ["usage.query"]


async def test_authlib_introspects_and_revokes(provider: Provider, client: Client) -> None:
    told = await provider.tokens(client)
    async with provider.authlib(client) as app:
        state = (await app.introspect_token(f"{provider.base_url}/oauth2/introspect", told["access_token"])).json()
        assert (state["active"], state["sub"], state["client_id"]) == (True, provider.user_id, client.id)
        assert (state["scope"], state["token_type"], state["iss"]) == (SCOPE, "access_token", PUBLIC_URL)
        answer = await app.revoke_token(f"{provider.base_url}/oauth2/revoke", told["access_token"])
        assert (answer.status_code, answer.content) == (200, b"")
        state = (await app.introspect_token(f"{provider.base_url}/oauth2/introspect", told["access_token"])).json()
        assert state == {"active": False}
    assert not await provider.is_accepted(told["access_token"])


async def test_discovery_is_what_authlib_holds_it_to(provider: Provider) -> None:
    openid = (await provider.http.get("/.well-known/openid-configuration")).json()
    assert openid == (await provider.http.get("/.well-known/oauth-authorization-server")).json()
    OpenIDProviderMetadata(openid).validate()
    assert openid["issuer"] == PUBLIC_URL
    assert openid["code_challenge_methods_supported"] == ["S256"]
    assert openid["response_types_supported"] == ["code"]
    for name, address in openid.items():
        if name.endswith(("_endpoint", "_uri")):
            assert (await provider.http.options(urlsplit(address).path)).status_code == 405, name


# ASVS 10.4.1: redirect addresses are matched exactly.


@pytest.mark.parametrize(
    "redirect_uri",
    [
        *(f"{CALLBACK}/", f"{CALLBACK}?a=b", f"{CALLBACK}#a", "https://APP.example/callback"),
        *("https://app.example:443/callback", "https://app.example/callback/../callback", "https://app.example/"),
        *("http://app.example/callback", "https://app.example.evil.example/callback", ""),
    ],
)
async def test_redirect_is_matched_exactly_and_nothing_is_sent_elsewhere(
    provider: Provider, client: Client, redirect_uri: str
) -> None:
    answer = await provider.visit(asked_by(client, VERIFIER, redirect_uri=redirect_uri))
    assert error_shown(answer) == "invalid_request"


async def test_repeated_parameters_are_refused(provider: Provider, client: Client) -> None:
    asked = asked_by(client, VERIFIER)
    twice = [*asked.items(), ("redirect_uri", "https://evil.example/")]
    answer = await provider.http.get(f"/oauth2/authorize?{urlencode(twice)}")
    assert error_shown(answer) == "invalid_request"
    answer = await provider.http.get(f"/oauth2/authorize?{urlencode(asked)}&scope=openid")
    assert query_of(answer.headers["location"])["error"] == "invalid_request"
    twice = [("grant_type", "refresh_token"), ("grant_type", "refresh_token"), ("refresh_token", "x")]
    answer = await provider.http.post(
        "/oauth2/token",
        content=urlencode(twice),
        headers={"content-type": "application/x-www-form-urlencoded"},
        auth=client.auth,
    )
    assert error_of(answer) == "invalid_request"


# ASVS 10.4.2, 10.4.3, 10.4.6: codes.


async def test_code_is_used_once_and_its_second_use_revokes_what_came_of_it(provider: Provider, client: Client) -> None:
    code = await provider.code(client)
    told = granted(await provider.exchange(client, code))
    told = granted(await provider.refresh(client, told["refresh_token"])) | {"old": told["access_token"]}
    assert await provider.is_accepted(told["access_token"])
    assert error_of(await provider.exchange(client, code)) == "invalid_grant"
    assert not await provider.is_accepted(told["old"])
    assert not await provider.is_accepted(told["access_token"])
    assert error_of(await provider.refresh(client, told["refresh_token"])) == "invalid_grant"


async def test_of_concurrent_uses_of_one_code_at_most_one_is_answered(provider: Provider, client: Client) -> None:
    code = await provider.code(client)
    answers = await asyncio.gather(*(provider.exchange(client, code) for _ in range(20)))
    assert sorted(answer.status_code for answer in answers) == [200] + [400] * 19


async def test_code_expires_after_a_minute(provider: Provider, client: Client) -> None:
    code = await provider.code(client)
    await provider.execute(
        "UPDATE oauth_authorizations SET create_time = create_time - interval '60 s',"
        " expire_time = expire_time - interval '60 s'"
    )
    assert error_of(await provider.exchange(client, code)) == "invalid_grant"


async def test_code_is_bound_to_client_redirect_and_verifier(provider: Provider, client: Client) -> None:
    other = await provider.client(redirect_uris=[CALLBACK, "https://app.example/other"])
    code = await provider.code(client)
    assert error_of(await provider.exchange(other, code)) == "invalid_grant"
    assert error_of(await provider.exchange(client, code, redirect_uri="https://app.example/other")) == "invalid_grant"
    assert error_of(await provider.exchange(client, code, redirect_uri="")) == "invalid_request"
    assert error_of(await provider.exchange(client, code, code_verifier="w" * 64)) == "invalid_grant"
    assert error_of(await provider.exchange(client, code, code_verifier="")) == "invalid_request"
    challenge = create_s256_code_challenge(code.verifier)
    assert error_of(await provider.exchange(client, code, code_verifier=challenge)) == "invalid_grant"
    granted(await provider.exchange(client, code))


@pytest.mark.parametrize(
    "parameters",
    [
        {"code_challenge_method": "plain"},
        {"code_challenge_method": "plain", "code_challenge": VERIFIER},
        {"code_challenge_method": ""},
        {"code_challenge": ""},
        {"code_challenge": "", "code_challenge_method": ""},
        {"code_challenge": "short"},
    ],
)
async def test_only_s256_will_do(provider: Provider, client: Client, parameters: dict[str, str]) -> None:
    answer = await provider.visit(asked_by(client, VERIFIER, **parameters))
    told = query_of(answer.headers["location"])
    assert (told["error"], told["state"], told["iss"]) == ("invalid_request", "xyz", PUBLIC_URL)
    assert "code" not in told


# ASVS 10.4.4: which ways there are.


async def test_implicit_and_password_do_not_exist(provider: Provider, client: Client) -> None:
    for response_type in ("token", "id_token", "code token", "none"):
        answer = await provider.visit(asked_by(client, VERIFIER, response_type=response_type))
        assert query_of(answer.headers["location"])["error"] == "unsupported_response_type"
    answer = await provider.visit(asked_by(client, VERIFIER, response_mode="fragment"))
    assert query_of(answer.headers["location"])["error"] == "invalid_request"
    answer = await provider.post("token", client, grant_type="password", username="ada@example.com", password="x")
    assert error_of(answer) == "unsupported_grant_type"


async def test_client_uses_its_own_ways_only(provider: Provider, client: Client) -> None:
    worker = await provider.worker("usage.query")
    assert error_of(await provider.post("token", client, grant_type="client_credentials")) == "unauthorized_client"
    assert error_of(await provider.refresh(worker, "x")) == "unauthorized_client"
    by_code_only = await provider.client(grant_types=["OAUTH_GRANT_TYPE_AUTHORIZATION_CODE"])
    assert "refresh_token" not in await provider.tokens(by_code_only)


# ASVS 10.4.5, 10.4.8: refresh tokens.


async def test_of_fifty_concurrent_refreshes_exactly_one_succeeds(provider: Provider, client: Client) -> None:
    told = await provider.tokens(client)
    answers = await asyncio.gather(*(provider.refresh(client, told["refresh_token"]) for _ in range(50)))
    assert sorted(answer.status_code for answer in answers) == [200] + [400] * 49
    assert {answer.json()["error"] for answer in answers if answer.status_code == 400} == {"invalid_grant"}
    winner = next(answer.json() for answer in answers if answer.status_code == 200)
    assert not await provider.is_accepted(winner["access_token"])
    assert error_of(await provider.refresh(client, winner["refresh_token"])) == "invalid_grant"


async def test_reuse_revokes_the_family_and_no_other(provider: Provider, client: Client) -> None:
    other = await provider.tokens(client)
    first = await provider.tokens(client)
    second = granted(await provider.refresh(client, first["refresh_token"]))
    third = granted(await provider.refresh(client, second["refresh_token"]))
    assert error_of(await provider.refresh(client, first["refresh_token"])) == "invalid_grant"
    for told in (first, second, third):
        assert not await provider.is_accepted(told["access_token"])
    assert error_of(await provider.refresh(client, third["refresh_token"])) == "invalid_grant"
    assert await provider.is_accepted(other["access_token"])
    granted(await provider.refresh(client, other["refresh_token"]))


async def test_reuse_is_noticed_after_a_restart(database_url: str, tmp_path: Path) -> None:
    sessions = Sessions()
    async with running_provider(database_url, tmp_path, sessions) as before:
        await inhabit(before)
        client = await before.client()
        first = await before.tokens(client)
        second = granted(await before.refresh(client, first["refresh_token"]))
    async with running_provider(database_url, tmp_path, sessions, restarted=True) as after:
        assert await after.is_accepted(second["access_token"])
        assert error_of(await after.refresh(client, first["refresh_token"])) == "invalid_grant"
        assert not await after.is_accepted(second["access_token"])
        assert error_of(await after.refresh(client, second["refresh_token"])) == "invalid_grant"


async def test_family_ends_a_day_after_the_sign_in_however_often_it_is_refreshed(
    provider: Provider, client: Client
) -> None:
    told = await provider.tokens(client)
    aged = "UPDATE {} SET expire_time = expire_time - interval '{}'"
    for table in ("oauth_authorizations", "oauth_tokens WHERE oauth_token_id LIKE 'refresh_%'"):
        name, _, condition = table.partition(" ")
        await provider.execute(f"{aged.format(name, '23 h 59 min')} {condition}")
    told = granted(await provider.refresh(client, told["refresh_token"]))
    for name in ("oauth_authorizations", "oauth_tokens"):
        await provider.execute(aged.format(name, "2 min"))
    assert error_of(await provider.refresh(client, told["refresh_token"])) == "invalid_grant"


async def test_scopes_are_never_widened_on_refresh(provider: Provider, client: Client) -> None:
    told = await provider.tokens(client, scope="openid usage.query")
    narrow = granted(await provider.refresh(client, told["refresh_token"], scope="usage.query"))
    assert narrow["scope"] == "usage.query"
    for scope in ("openid usage.query", "inference.create", "usage.*"):
        assert error_of(await provider.refresh(client, narrow["refresh_token"], scope=scope)) == "invalid_scope"
    again = granted(await provider.refresh(client, narrow["refresh_token"]))
    assert again["scope"] == "usage.query"
    principal = await provider.identity.authenticate(again["access_token"])
    assert principal.permissions == ["usage.query"]


async def test_refresh_token_is_its_clients_alone(provider: Provider, client: Client) -> None:
    told, other = await provider.tokens(client), await provider.client()
    assert error_of(await provider.refresh(other, told["refresh_token"])) == "invalid_grant"
    granted(await provider.refresh(client, told["refresh_token"]))


# ASVS 10.4.9, 10.4.10: revocation, and who may ask.


async def test_revoked_refresh_token_takes_its_family_with_it(provider: Provider, client: Client) -> None:
    told = await provider.tokens(client)
    assert (await provider.post("revoke", client, token=told["refresh_token"])).status_code == 200
    assert not await provider.is_accepted(told["access_token"])
    assert error_of(await provider.refresh(client, told["refresh_token"])) == "invalid_grant"
    for token in (told["refresh_token"], "unknown"):
        assert (await provider.post("revoke", client, token=token)).status_code == 200


async def test_another_clients_token_is_not_introspected_and_not_revoked(provider: Provider, client: Client) -> None:
    told, other = await provider.tokens(client), await provider.client()
    for token in (told["access_token"], told["refresh_token"]):
        assert (await provider.post("introspect", other, token=token)).json() == {"active": False}
        assert error_of(await provider.post("revoke", other, token=token)) == "invalid_grant"
    assert await provider.is_accepted(told["access_token"])
    granted(await provider.refresh(client, told["refresh_token"]))


async def test_client_proves_itself_wherever_it_asks(provider: Provider, client: Client) -> None:
    told = await provider.tokens(client)
    worker = await provider.worker("usage.query")
    code = await provider.code(client)
    for liar in (Client(client.id, ""), Client(client.id, worker.secret), Client("client_x", client.secret)):
        for path, form in (
            ("token", {"grant_type": "authorization_code", "code": code.text, "code_verifier": code.verifier}),
            ("introspect", {"token": told["access_token"]}),
            ("revoke", {"token": told["access_token"]}),
        ):
            answer = await provider.post(path, liar, **form)
            assert error_of(answer, 401) == "invalid_client"
            assert answer.headers["www-authenticate"].startswith("Basic ")
    both = {"token": told["access_token"], "client_id": client.id, "client_secret": client.secret}
    assert error_of(await provider.post("introspect", client, **both)) == "invalid_request"
    public = await provider.client("PUBLIC")
    assert error_of(await provider.post("introspect", public, token=told["access_token"]), 401) == "invalid_client"
    assert await provider.is_accepted(told["access_token"])
    granted(await provider.exchange(client, code))


async def test_what_cannot_be_stored_or_judged_is_503(database_url: str, tmp_path: Path) -> None:
    address = urlsplit(database_url)
    assert address.hostname is not None
    assert address.port is not None
    async with TcpGate(address.hostname, address.port) as gate:
        gated = database_url.replace(f":{address.port}/", f":{gate.port}/")
        async with running_provider(database_url, tmp_path, Sessions(), identity_database_url=gated) as provider:
            await inhabit(provider)
            client = await provider.client()
            told = await provider.tokens(client)
            await gate.shut()
            for path in ("revoke", "introspect"):
                answer = await provider.post(path, client, token=told["access_token"])
                assert error_of(answer, 503) == "temporarily_unavailable"
            assert error_of(await provider.refresh(client, told["refresh_token"]), 503) == "temporarily_unavailable"
            with pytest.raises(PlatformError) as raised:
                await provider.identity.authenticate(told["access_token"])
            assert raised.value.reason is Reason.AUTH_UNAVAILABLE
            bearer = {"authorization": f"Bearer {told['access_token']}"}
            assert (await provider.http.get("/oauth2/userinfo", headers=bearer)).status_code == 503
            await gate.open()
            assert await provider.is_accepted(told["access_token"])


async def test_user_takes_a_grant_back(provider: Provider, client: Client) -> None:
    told = await provider.tokens(client)
    listed = await provider.identity.call(provider.stub.ListOauthGrants, pb.ListOauthGrantsRequest(), provider.session)
    (grant,) = listed.oauth_grants
    assert (grant.oauth_client_id, " ".join(grant.scopes)) == (client.id, SCOPE)
    request = pb.RevokeOauthGrantRequest(oauth_grant_id=grant.oauth_grant_id)
    stranger = provider.sessions.open(provider.organization_id, "user_other")
    error = await provider.identity.refused(provider.stub.RevokeOauthGrant, request, stranger)
    assert error.reason is Reason.NOT_FOUND
    for credential in (told["access_token"], provider.identity.admin):
        error = await provider.identity.refused(provider.stub.RevokeOauthGrant, request, credential)
        assert error.reason is Reason.PERMISSION_DENIED
    assert await provider.is_accepted(told["access_token"])
    revoked = await provider.identity.call(provider.stub.RevokeOauthGrant, request, provider.session)
    assert revoked.oauth_grant.HasField("revoke_time")
    assert not await provider.is_accepted(told["access_token"])
    assert error_of(await provider.refresh(client, told["refresh_token"])) == "invalid_grant"
    assert (await provider.visit(asked_by(client, VERIFIER))).status_code == 200


# Signing in and consent.


async def test_only_a_session_of_the_clients_organization_signs_in(provider: Provider, client: Client) -> None:
    told = await provider.tokens(client)
    elsewhere = provider.sessions.open(await provider.identity.organization("Other"), provider.user_id)
    for session in ("", told["access_token"], provider.identity.admin, tokens.SESSION.generate().text, elsewhere):
        answer = await provider.visit(asked_by(client, VERIFIER, login_hint="a@b.example"), session=session)
        needed = query_of(led_to(answer))
        assert (needed["email"], needed["organization_id"]) == ("a@b.example", provider.organization_id)
        assert needed["return_path"].startswith(f"/oauth2/authorize?response_type=code&client_id={client.id}&")
        answer = await provider.visit(asked_by(client, VERIFIER, prompt="none"), session=session)
        assert query_of(answer.headers["location"])["error"] == "login_required"


async def test_old_sign_in_is_asked_for_again(provider: Provider, client: Client) -> None:
    provider.session = tokens.SESSION.generate_for("session_" + tokens.SESSION.generate().id[8:9] + "0" * 21).text
    principal = Principal("user", provider.user_id, provider.organization_id, user_id=provider.user_id)
    provider.sessions._principals[provider.session] = principal
    for parameters in ({"max_age": "3600"}, {"prompt": "login"}):
        answer = await provider.visit(asked_by(client, VERIFIER, **parameters))
        assert query_of(led_to(answer))["notice"] == "sign-in-again"
    assert consent_token_of(await provider.visit(asked_by(client, VERIFIER)))


async def test_consent_is_for_this_request_in_this_session(provider: Provider, client: Client) -> None:
    asked = asked_by(client, VERIFIER)
    question = await provider.visit(asked)
    assert "see your e-mail address see your name inference.create usage.query" in seen(question).text
    refused = await provider.choose(asked, question, "deny")
    assert query_of(led_to(refused))["error"] == "access_denied"
    wider = await provider.choose({**asked, "state": "other"}, question)
    assert consent_token_of(wider)
    token = consent_token_of(question)
    link = await provider.visit({**asked, "consent_token": token, "consent": "allow"})
    assert consent_token_of(link)
    session, provider.session = provider.session, provider.sessions.open(provider.organization_id, provider.user_id)
    assert consent_token_of(await provider.choose(asked, question))
    provider.session = session
    assert "code" in query_of(led_to(await provider.choose(asked, question)))


async def test_known_client_is_not_asked_about_twice_and_public_one_is(provider: Provider, client: Client) -> None:
    public = await provider.client("PUBLIC")
    for one in (client, public):
        await provider.tokens(one, scope="openid")
    again = await provider.visit(asked_by(client, VERIFIER, scope="openid", prompt="none"))
    assert "code" in query_of(again.headers["location"])
    assert consent_token_of(await provider.visit(asked_by(client, VERIFIER)))
    assert consent_token_of(await provider.visit(asked_by(client, VERIFIER, scope="openid", prompt="consent")))
    assert consent_token_of(await provider.visit(asked_by(public, VERIFIER, scope="openid")))
    answer = await provider.visit(asked_by(public, VERIFIER, scope="openid", prompt="none"))
    assert query_of(answer.headers["location"])["error"] == "consent_required"


# What a token may do.


async def test_access_token_may_do_what_its_user_may_within_its_scopes(provider: Provider) -> None:
    client = await provider.client(scopes=["openid", "usage.query", "roles.delete"])
    told = await provider.tokens(client, scope="openid usage.query roles.delete")
    principal = await provider.identity.authenticate(told["access_token"])
    # A developer may not delete roles, whatever a client asks for.
    assert (principal.user_id, list(principal.permissions)) == (provider.user_id, ["usage.query"])
    assert principal.HasField("expire_time")
    bare = await provider.tokens(client, scope="openid")
    assert not (await provider.identity.authenticate(bare["access_token"])).permissions
    none = await provider.tokens(await provider.client(scopes=[]), scope="")
    assert not (await provider.identity.authenticate(none["access_token"])).permissions
    await provider.update(client, scopes=["openid"])
    assert not (await provider.identity.authenticate(told["access_token"])).permissions
    assert error_of(await provider.refresh(client, told["refresh_token"])) == "invalid_scope"


async def test_tokens_end_with_their_client_user_and_organization(provider: Provider, client: Client) -> None:
    told = await provider.tokens(client)
    await provider.update(client, disabled=True)
    assert not await provider.is_accepted(told["access_token"])
    assert error_of(await provider.refresh(client, told["refresh_token"]), 401) == "invalid_client"
    await provider.update(client, disabled=False)
    assert not await provider.is_accepted(told["access_token"])
    assert error_of(await provider.refresh(client, told["refresh_token"])) == "invalid_grant"
    for statement in (
        "UPDATE users SET state = 'suspended' WHERE user_id = $1",
        "DELETE FROM memberships WHERE user_id = $1",
    ):
        told = await provider.tokens(client)
        await provider.execute(statement, provider.user_id)
        assert not await provider.is_accepted(told["access_token"])
        assert error_of(await provider.refresh(client, told["refresh_token"])) == "invalid_grant"
        assert (await provider.post("introspect", client, token=told["access_token"])).json() == {"active": False}
        await provider.execute("UPDATE users SET state = 'active'")
    worker = await provider.worker("usage.query")
    told = granted(await provider.post("token", worker, grant_type="client_credentials"))
    assert await provider.is_accepted(told["access_token"])
    await provider.execute(
        "UPDATE organizations SET state = 'suspended' WHERE organization_id = $1", provider.organization_id
    )
    assert not await provider.is_accepted(told["access_token"])
    assert error_of(await provider.post("token", worker, grant_type="client_credentials"), 401) == "invalid_client"


async def test_user_info_needs_an_openid_token(provider: Provider, client: Client) -> None:
    told = await provider.tokens(client, scope="openid")
    for token, status in (("aiat_x", 401), (told["refresh_token"], 401)):
        answer = await provider.http.get("/oauth2/userinfo", headers={"authorization": f"Bearer {token}"})
        assert error_of(answer, status) == "invalid_token"
        assert answer.headers["www-authenticate"].startswith("Bearer ")
    info = await provider.http.get("/oauth2/userinfo", headers={"authorization": f"Bearer {told['access_token']}"})
    assert info.json() == {"sub": provider.user_id, "organization_id": provider.organization_id}
    other = await provider.tokens(client, scope="usage.query")
    answer = await provider.http.get("/oauth2/userinfo", headers={"authorization": f"Bearer {other['access_token']}"})
    assert error_of(answer, 403) == "insufficient_scope"


# Keys.


async def test_rotated_key_keeps_old_id_tokens_verifiable_until_none_is_left(
    provider: Provider, client: Client
) -> None:
    old = (await provider.tokens(client))["id_token"]
    before = await keys_of(provider)
    rotated = await provider.identity.call(provider.stub.RotateSigningKey, pb.RotateSigningKeyRequest(reason="yearly"))
    new = (await provider.tokens(client))["id_token"]
    after = await keys_of(provider)
    for token in (old, new):
        jwt.decode(token, after, algorithms=["RS256"])
    assert jwt.decode(new, after, algorithms=["RS256"]).header["kid"] == rotated.signing_key.key_id
    with pytest.raises(InvalidKeyIdError):
        jwt.decode(new, before, algorithms=["RS256"])
    listed = await provider.stub.ListSigningKeys(pb.ListSigningKeysRequest())
    assert [key.current for key in listed.signing_keys] == [True, False]
    retired = listed.signing_keys[1]
    expires = jwt.decode(old, after, algorithms=["RS256"]).claims["exp"]
    assert retired.retire_time.ToSeconds() > expires
    assert not {"d", "p", "q"} & {name for key in listed.signing_keys for name in json.loads(key.jwk_json)}
    await provider.execute("UPDATE signing_keys SET retire_time = now() WHERE retire_time IS NOT NULL")
    assert len((await keys_of(provider)).keys) == 1


async def test_first_key_is_made_once(provider: Provider) -> None:
    answers = await asyncio.gather(*(provider.http.get("/oauth2/keys") for _ in range(8)))
    assert len({key["kid"] for answer in answers for key in answer.json()["keys"]}) == 1

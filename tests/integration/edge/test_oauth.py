"""OAuth2's own paths: forms and queries go through in their order, answers have OAuth2's shapes and headers."""

from urllib.parse import parse_qsl, urlsplit

import pytest

from aiaas.identity.v1 import oauth_service_pb2 as pb
from edge.browser import SESSION_COOKIE
from mesh.errors import PlatformError, Reason
from tests.doubles.peer import PeerDouble
from tests.integration.edge.harness import Edge
from tests.integration.edge.reading import led_to, seen

BASIC = {"authorization": "Basic Y2xpZW50OnNlY3JldA=="}
FORM = {"content-type": "application/x-www-form-urlencoded"}
OURS = {"sec-fetch-site": "same-origin"}
REFUSAL = pb.OauthError(
    error="invalid_client", error_description="No.", http_status=401, www_authenticate='Basic error="invalid_client"'
)


def asked_of(identity: PeerDouble) -> list[tuple[str, str]]:
    return [(pair.name, pair.value) for pair in identity.received[-1].request.parameters]


async def test_form_goes_through_with_repetitions_and_the_clients_header(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["Token"] = pb.TokenResponse(
        tokens=pb.OauthTokens(access_token="a", token_type="Bearer", expires_in=3600, scope="x y")
    )
    answer = await edge.client.post("/oauth2/token", content="a=1&b=%C3%A9+&a=2&c=", headers=BASIC | FORM)
    assert answer.json() == {"access_token": "a", "token_type": "Bearer", "expires_in": 3600, "scope": "x y"}
    assert (answer.headers["cache-control"], answer.headers["pragma"]) == ("no-store", "no-cache")
    assert asked_of(identity) == [("a", "1"), ("b", "é "), ("a", "2"), ("c", "")]
    assert identity.received[0].request.authorization == BASIC["authorization"]


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("token", pb.TokenResponse(error=REFUSAL)),
        ("introspect", pb.IntrospectResponse(error=REFUSAL)),
        ("revoke", pb.RevokeResponse(error=REFUSAL)),
    ],
)
async def test_refusal_has_oauths_shape(edge: Edge, identity: PeerDouble, path: str, answer: pb.TokenResponse) -> None:
    identity.answers[path.capitalize()] = answer
    refused = await edge.client.post(f"/oauth2/{path}", data={"token": "x"}, headers=FORM)
    assert (refused.status_code, refused.json()) == (401, {"error": "invalid_client", "error_description": "No."})
    assert refused.headers["www-authenticate"] == 'Basic error="invalid_client"'
    assert refused.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", ["token", "introspect", "revoke", "userinfo"])
async def test_what_is_not_stored_or_not_known_is_503_and_never_200_or_401(
    edge: Edge, identity: PeerDouble, path: str
) -> None:
    for rpc in ("Token", "Introspect", "Revoke", "GetUserInfo"):
        identity.answers[rpc] = PlatformError(Reason.UNAVAILABLE)
    answer = await edge.client.post(f"/oauth2/{path}", data={"token": "x"}, headers=FORM)
    assert (answer.status_code, answer.json()["error"]) == (503, "temporarily_unavailable")


async def test_only_forms_are_read(edge: Edge, identity: PeerDouble) -> None:
    for headers, content, status in (
        ({"content-type": "application/json"}, b"{}", 415),
        (FORM, b"a=%ff", 400),
        (FORM, "a=\u00e9".encode(), 400),
        (FORM, b"&".join([b"a=b"] * 200), 400),
    ):
        answer = await edge.client.post("/oauth2/token", content=content, headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (status, "invalid_request")
    assert (await edge.client.get("/oauth2/token")).status_code == 405
    assert not identity.received


async def test_browser_is_sent_to_the_client(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["Authorize"] = pb.AuthorizeResponse(redirect_uri="https://app.example/cb?code=c")
    cookie = {"cookie": f"other=1; {SESSION_COOKIE}=aiss_x"}
    del edge.client.headers["authorization"]
    answer = await edge.client.get("/oauth2/authorize?a=1&consent=allow&consent_token=t", headers=cookie)
    assert (answer.status_code, answer.headers["location"]) == (303, "https://app.example/cb?code=c")
    assert (answer.headers["cache-control"], answer.headers["referrer-policy"]) == ("no-store", "no-referrer")
    asked = identity.received[0].request
    assert (asked.session_token, asked.consent_token, asked.consent_given) == ("aiss_x", "", False)
    form = {"a": "1", "consent": "allow", "consent_token": "t"}
    chosen = await edge.client.post("/oauth2/authorize", data=form, headers=cookie | FORM | OURS)
    assert led_to(chosen) == "https://app.example/cb?code=c"
    asked = identity.received[1].request
    assert (asked.session_token, asked.consent_token, asked.consent_given) == ("aiss_x", "t", True)
    assert asked_of(identity) == [("a", "1")]


async def test_consent_is_taken_from_our_own_page_alone(edge: Edge, identity: PeerDouble) -> None:
    form = {"a": "1", "consent": "allow", "consent_token": "t"}
    refused = await edge.client.post("/oauth2/authorize", data=form, headers=FORM | {"sec-fetch-site": "cross-site"})
    assert "another site" in seen(refused, 403).text
    assert not identity.received
    # OpenID Connect has clients ask by a form, too (Core 1.0, 3.1.2.1).
    identity.answers["Authorize"] = pb.AuthorizeResponse(redirect_uri="https://app.example/cb?code=c")
    asked = await edge.client.post(
        "/oauth2/authorize", data={"a": "1"}, headers=FORM | {"origin": "https://app.example"}
    )
    assert led_to(asked) == "https://app.example/cb?code=c"


async def test_user_who_must_sign_in_comes_back_to_the_same_question(edge: Edge, identity: PeerDouble) -> None:
    needed = pb.OauthSignInNeeded(client_display_name="App", login_hint="a@b", organization_id="org_1")
    identity.answers["Authorize"] = pb.AuthorizeResponse(sign_in_needed=needed)
    answer = await edge.client.get("/oauth2/authorize?a=1&b=%22%3C&a=%5C/")
    told = dict(parse_qsl(urlsplit(led_to(answer)).query))
    assert urlsplit(led_to(answer)).path == "/sign-in"
    assert (told["email"], told["organization_id"]) == ("a@b", "org_1")
    assert told["return_path"] == "/oauth2/authorize?a=1&b=%22%3C&a=%5C%2F"
    page = seen(await edge.client.get(led_to(answer)))
    assert page.kept == {"return_path": told["return_path"], "organization_id": "org_1"}
    assert (page.fields["email"]["value"], "once more" in page.text) == ("a@b", False)
    needed.reauthenticate = True
    identity.answers["Authorize"] = pb.AuthorizeResponse(sign_in_needed=needed)
    answer = await edge.client.get(led_to(await edge.client.get("/oauth2/authorize?a=1")))
    assert "once more" in seen(answer).text
    long = await edge.client.get("/oauth2/authorize", params={"state": "x" * 3000})
    assert "too much length" in seen(long, 400).text


async def test_consent_page_shows_who_asks_for_what_and_keeps_every_parameter(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["Authorize"] = pb.AuthorizeResponse(
        consent_needed=pb.OauthConsentNeeded(
            client_display_name="<b>App</b>",
            organization_display_name="Tenant",
            scopes=["openid", "usage.query"],
            consent_token="t",
        )
    )
    answer = await edge.client.get(
        "/oauth2/authorize?redirect_uri=https://app.example/cb&state=&nonce=%22%3E%3Cscript%3E"
    )
    page = seen(answer)
    assert "<b>App</b> asks to act for you in Tenant" in page.text
    assert "know who you are here usage.query" in page.text
    assert "sent back to app.example" in page.text
    redirect_uri = "https://app.example/cb"
    assert page.kept == {"redirect_uri": redirect_uri, "state": "", "nonce": '"><script>', "consent_token": "t"}
    assert "script" not in {tag for tag, _ in page.tags}


async def test_user_sees_why_a_client_is_not_let_in_and_an_outage_is_503(edge: Edge, identity: PeerDouble) -> None:
    refusal = pb.OauthError(error="invalid_request", error_description="No <b>.", http_status=400)
    identity.answers["Authorize"] = pb.AuthorizeResponse(error=refusal)
    answer = await edge.client.get("/oauth2/authorize?a=1")
    assert "No <b>. (invalid_request)" in seen(answer, 400).text
    assert "location" not in answer.headers
    identity.answers["Authorize"] = PlatformError(Reason.AUTH_UNAVAILABLE, retry_after_s=7)
    answer = await edge.client.get("/oauth2/authorize?a=1")
    assert "at the moment" in seen(answer, 503).text
    assert answer.headers["retry-after"] == "7"


async def test_introspection_and_user_info_tell_what_is_set(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["Introspect"] = pb.IntrospectResponse(state=pb.OauthTokenState(active=False))
    answer = await edge.client.post("/oauth2/introspect", data={"token": "x"}, headers=FORM)
    assert answer.json() == {"active": False}
    identity.answers["Introspect"] = pb.IntrospectResponse(state=pb.OauthTokenState(active=True, sub="user_1", exp=7))
    answer = await edge.client.post("/oauth2/introspect", data={"token": "x"}, headers=FORM)
    assert answer.json() == {"active": True, "sub": "user_1", "exp": 7}
    identity.answers["GetUserInfo"] = pb.GetUserInfoResponse(user_info=pb.OauthUserInfo(sub="user_1", email="a@b"))
    answer = await edge.client.get("/oauth2/userinfo", headers={"authorization": "Bearer aiat_x"})
    assert answer.json() == {"sub": "user_1", "email": "a@b", "email_verified": False}
    assert identity.received[-1].request.access_token == "aiat_x"
    answer = await edge.client.get("/oauth2/userinfo", headers={"authorization": ""})
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_token")


async def test_keys_and_metadata_are_for_everybody(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["ListSigningKeys"] = pb.ListSigningKeysResponse(
        signing_keys=[pb.SigningKey(key_id="k", jwk_json='{"kid":"k"}')]
    )
    identity.answers["GetProviderMetadata"] = pb.GetProviderMetadataResponse(metadata_json='{"issuer":"i"}')
    answer = await edge.client.get("/oauth2/keys")
    assert answer.json() == {"keys": [{"kid": "k"}]}
    assert answer.headers["access-control-allow-origin"] == "*"
    for path in ("openid-configuration", "oauth-authorization-server"):
        assert (await edge.client.get(f"/.well-known/{path}")).json() == {"issuer": "i"}

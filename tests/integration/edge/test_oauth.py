"""OAuth2's own paths: forms and queries go through in their order, answers have OAuth2's shapes and headers."""

import pytest

from aiaas.identity.v1 import oauth_service_pb2 as pb
from edge.oauth import SESSION_COOKIE
from mesh.errors import PlatformError, Reason
from tests.doubles.peer import PeerDouble
from tests.integration.edge.harness import Edge

BASIC = {"authorization": "Basic Y2xpZW50OnNlY3JldA=="}
FORM = {"content-type": "application/x-www-form-urlencoded"}
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


@pytest.mark.parametrize("path", ["token", "introspect", "revoke", "userinfo", "authorize"])
async def test_what_is_not_stored_or_not_known_is_503_and_never_200_or_401(
    edge: Edge, identity: PeerDouble, path: str
) -> None:
    for rpc in ("Token", "Introspect", "Revoke", "GetUserInfo", "Authorize"):
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
    await edge.client.post("/oauth2/authorize", data=form, headers=cookie | FORM)
    asked = identity.received[1].request
    assert (asked.session_token, asked.consent_token, asked.consent_given) == ("aiss_x", "t", True)
    assert asked_of(identity) == [("a", "1")]


async def test_page_is_told_what_is_needed(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["Authorize"] = pb.AuthorizeResponse(
        sign_in_needed=pb.OauthSignInNeeded(client_display_name="App", login_hint="a@b")
    )
    answer = await edge.client.get("/oauth2/authorize?a=1")
    assert answer.json() == {
        "sign_in_needed": {"client_display_name": "App", "login_hint": "a@b", "reauthenticate": False}
    }
    identity.answers["Authorize"] = pb.AuthorizeResponse(
        consent_needed=pb.OauthConsentNeeded(client_display_name="App", scopes=["openid"], consent_token="t")
    )
    answer = await edge.client.get("/oauth2/authorize?a=1")
    assert answer.json()["consent_needed"]["consent_token"] == "t"
    assert answer.headers["cache-control"] == "no-store"
    identity.answers["Authorize"] = pb.AuthorizeResponse(
        error=pb.OauthError(error="invalid_request", error_description="No.", http_status=400)
    )
    answer = await edge.client.get("/oauth2/authorize?a=1")
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    assert "location" not in answer.headers


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

"""The pages of sign-in before a scripted identity: what they ask of it, what browsers are given, what they refuse."""

from http.cookies import SimpleCookie
from typing import Any

import httpx
import pytest

from aiaas.identity.v1 import auth_service_pb2, federation_service_pb2, invite_service_pb2, mfa_service_pb2
from aiaas.identity.v1 import session_service_pb2 as pb
from aiaas.type.v1.principal_pb2 import Principal
from edge.browser import SESSION_COOKIE
from mesh.errors import PlatformError, Reason
from tests.doubles.peer import PeerDouble
from tests.integration.edge.harness import Edge
from tests.integration.edge.reading import led_to, seen

OURS = {"content-type": "application/x-www-form-urlencoded", "sec-fetch-site": "same-origin"}
WAY_IN = {"email": "ada@example.com", "password": "right"}
SIGNED_IN = pb.SignIn(signed_in=pb.SignedIn(session=pb.Session(session_id="session_1"), session_token="aiss_new"))
CHALLENGE = pb.SignIn(mfa_challenge=pb.MfaChallenge(challenge_token="aisc_c", methods=[pb.MFA_METHOD_TOTP]))
CHALLENGE_COOKIE = "__Host-aiaas_challenge"
ISSUER_COOKIE = "__Host-aiaas_issuer"
FORMS = ("/sign-in", "/sign-in/mfa", "/sign-out", "/recover", "/recover/complete", "/invites/accept")


@pytest.fixture(autouse=True)
def browser(edge: Edge) -> None:
    """The client is a browser: it has no credential but its cookies."""
    del edge.client.headers["authorization"]
    del edge.client.headers["content-type"]


def holding(**cookies: str) -> dict[str, str]:
    names = {"session": SESSION_COOKIE, "challenge": CHALLENGE_COOKIE, "issuer": ISSUER_COOKIE}
    return {"cookie": "; ".join(f"{names[name]}={value}" for name, value in cookies.items())}


def given(response: httpx.Response) -> dict[str, str]:
    """The cookies that an answer sets, each of which is guarded as it should be; empty ones are taken back."""
    cookies: dict[str, str] = {}
    for header in response.headers.get_list("set-cookie"):
        ((name, morsel),) = SimpleCookie(header).items()
        assert (morsel["path"], morsel["secure"], morsel["httponly"]) == ("/", True, True)
        assert (morsel["samesite"], morsel["domain"]) == ("Lax", "")
        assert bool(morsel.value) == (morsel["max-age"] != "0")
        cookies[name] = morsel.value
    return cookies


async def submit(edge: Edge, path: str, form: dict[str, str], **cookies: str) -> httpx.Response:
    return await edge.client.post(path, data=form, headers=OURS | holding(**cookies))


def asked(identity: PeerDouble, rpc: str) -> Any:
    """What was last asked in this RPC."""
    return [received.request for received in identity.received if received.rpc == rpc][-1]


@pytest.mark.parametrize(
    "path",
    ["/sign-in", "/sign-in?email=a", "/recover", "/recover/complete?token=t", "/invites/accept?token=t", "/sign-in/x"],
)
async def test_page_runs_no_script_is_framed_by_nobody_and_kept_nowhere(edge: Edge, path: str) -> None:
    answer = await edge.client.get(path)
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "style-src": "'self'",
        "form-action": "'self'",
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
    }
    assert (answer.headers["cache-control"], answer.headers["referrer-policy"]) == ("no-store", "same-origin")
    assert (answer.headers["x-frame-options"], answer.headers["x-content-type-options"]) == ("DENY", "nosniff")
    page = seen(answer, 404 if path == "/sign-in/x" else 200)
    assert not {tag for tag, _ in page.tags} & {"script", "style", "iframe", "img"}
    assert not {name for _, attributes in page.tags for name in attributes if name == "style" or name.startswith("on")}
    (sheet,) = (attributes["href"] for tag, attributes in page.tags if tag == "link")
    style = await edge.client.get(sheet)
    assert (style.status_code, style.headers["content-type"]) == (200, "text/css; charset=utf-8")
    assert "immutable" in style.headers["cache-control"]


@pytest.mark.parametrize("path", ["/sign-in", "/recover", "/recover/complete?token=t", "/invites/accept?token=t"])
async def test_every_field_has_a_label_and_the_page_a_language_and_a_title(
    edge: Edge, identity: PeerDouble, path: str
) -> None:
    identity.answers["PreviewInvite"] = invite_service_pb2.PreviewInviteResponse(email="a@b", password_needed=True)
    page = seen(await edge.client.get(path))
    labels = {attributes["for"] for tag, attributes in page.tags if tag == "label"}
    assert labels == set(page.fields)
    assert page.fields
    assert ("html", {"lang": "en"}) in page.tags
    assert {"title", "h1", "main"} <= {tag for tag, _ in page.tags}


async def test_password_opens_a_session_and_leads_on(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["CreateSession"] = pb.CreateSessionResponse(sign_in=SIGNED_IN)
    form = WAY_IN | {"return_path": "/oauth2/authorize?a=1&b=%22", "organization_id": "org_1"}
    answer = await edge.client.post("/sign-in", data=form, headers=OURS | {"user-agent": "Browser"})
    assert led_to(answer) == "/oauth2/authorize?a=1&b=%22"
    assert given(answer) == {SESSION_COOKIE: "aiss_new", CHALLENGE_COOKIE: ""}
    assert asked(identity, "CreateSession") == pb.CreateSessionRequest(
        email="ada@example.com", password="right", organization_id="org_1"
    )
    metadata = identity.received[-1].metadata
    assert (metadata["x-client-address"], metadata["x-client-agent"]) == ("127.0.0.1", "Browser")
    assert "authorization" not in metadata


async def test_session_that_the_browser_had_ends_with_the_new_one(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["CreateSession"] = pb.CreateSessionResponse(sign_in=SIGNED_IN)
    for answer in (None, PlatformError(Reason.API_KEY_INVALID)):
        if answer is not None:
            identity.answers["DeleteSession"] = answer
        assert given(await submit(edge, "/sign-in", WAY_IN, session="aiss_old"))[SESSION_COOKIE] == "aiss_new"
        assert asked(identity, "DeleteSession").session_id == "current"
        assert identity.received[-1].metadata["authorization"] == "Bearer aiss_old"


@pytest.mark.parametrize(
    "elsewhere",
    ["//evil.example", "/\\evil.example", "https://evil.example", "javascript:alert(1)", "/ /x", "/\t/x", "evil", ""],
)
async def test_nobody_is_led_to_another_site(edge: Edge, identity: PeerDouble, elsewhere: str) -> None:
    identity.answers["CreateSession"] = pb.CreateSessionResponse(sign_in=SIGNED_IN)
    identity.answers["FinishSignIn"] = federation_service_pb2.FinishSignInResponse(
        sign_in=SIGNED_IN, return_path=elsewhere
    )
    identity.answers["VerifyMfa"] = pb.VerifyMfaResponse(session_token="aiss_new")
    page = seen(await edge.client.get("/sign-in", params={"return_path": elsewhere}))
    assert page.kept == {"return_path": "/"}
    assert led_to(await submit(edge, "/sign-in", WAY_IN | {"return_path": elsewhere})) == "/"
    code = {"totp_code": "1", "return_path": elsewhere}
    assert led_to(await submit(edge, "/sign-in/mfa", code, challenge="c")) == "/"
    assert led_to(await edge.client.get("/sign-in/issuer?code=c&state=s", headers=holding(issuer="b"))) == "/"
    await edge.client.get("/sign-in/issuer/issuer_1/begin", params={"return_path": elsewhere})
    assert asked(identity, "BeginSignIn").return_path == "/"


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "origin": "http://{host}"},
        {"origin": "https://evil.example"},
        {"origin": "http://{host}.evil.example"},
        {"origin": "null"},
        {},
    ],
)
async def test_form_of_another_site_reaches_nobody(edge: Edge, identity: PeerDouble, headers: dict[str, str]) -> None:
    host = f"127.0.0.1:{edge.port}"
    sent = {name: value.format(host=host) for name, value in headers.items()} | holding(session="aiss_x")
    for path in FORMS:
        answer = await edge.client.post(path, data=WAY_IN, headers=sent)
        assert "another site" in seen(answer, 403).text
        assert not given(answer)
    assert not identity.received


async def test_older_browser_tells_its_origin_alone(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["CreateSession"] = pb.CreateSessionResponse(sign_in=SIGNED_IN)
    for scheme in ("http", "https"):
        origin = {"origin": f"{scheme}://127.0.0.1:{edge.port}"}
        assert given(await edge.client.post("/sign-in", data=WAY_IN, headers=origin))[SESSION_COOKIE] == "aiss_new"


async def test_second_factor_is_asked_for_and_opens_the_session(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["CreateSession"] = pb.CreateSessionResponse(sign_in=CHALLENGE)
    first = await submit(edge, "/sign-in", WAY_IN | {"return_path": "/x?y=1"})
    assert led_to(first) == "/sign-in/mfa?return_path=%2Fx%3Fy%3D1"
    assert given(first) == {CHALLENGE_COOKIE: "aisc_c"}
    page = seen(await edge.client.get(led_to(first), headers=holding(challenge="aisc_c")))
    assert page.kept == {"return_path": "/x?y=1"}
    assert "aisc_c" not in page.html
    identity.answers["VerifyMfa"] = pb.VerifyMfaResponse(session_token="aiss_new")
    for form, expected in (
        ({"totp_code": "123 456"}, pb.VerifyMfaRequest(challenge_token="aisc_c", totp_code="123456")),
        ({"recovery_code": " ab-cd "}, pb.VerifyMfaRequest(challenge_token="aisc_c", recovery_code="ab-cd")),
    ):
        last = await submit(edge, "/sign-in/mfa", page.kept | form, challenge="aisc_c")
        assert asked(identity, "VerifyMfa") == expected
        assert (led_to(last), given(last)) == ("/x?y=1", {SESSION_COOKIE: "aiss_new", CHALLENGE_COOKIE: ""})


async def test_wrong_code_is_asked_for_again_until_the_challenge_is_over(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["VerifyMfa"] = PlatformError(Reason.MFA_CODE_INVALID)
    answer = await submit(edge, "/sign-in/mfa", {"totp_code": "1", "return_path": "/x"}, challenge="aisc_c")
    assert "The code is wrong" in seen(answer, 403).text
    assert (seen(answer, 403).kept, given(answer)) == ({"return_path": "/x"}, {})
    identity.answers["VerifyMfa"] = PlatformError(Reason.SIGN_IN_REFUSED)
    answer = await submit(edge, "/sign-in/mfa", {"totp_code": "1", "return_path": "/x"}, challenge="aisc_c")
    assert "begin it again" in seen(answer, 403).text
    assert set(seen(answer, 403).fields) == {"email", "password"}
    assert given(answer) == {CHALLENGE_COOKIE: ""}
    assert led_to(await edge.client.get("/sign-in/mfa?return_path=/x")) == "/sign-in?return_path=%2Fx"


async def test_member_who_must_set_up_mfa_is_not_led_where_nothing_would_be_answered(
    edge: Edge, identity: PeerDouble
) -> None:
    needed = pb.SignIn()
    needed.CopyFrom(SIGNED_IN)
    needed.signed_in.session.mfa_enrollment_needed = True
    identity.answers["CreateSession"] = pb.CreateSessionResponse(sign_in=needed)
    assert led_to(await submit(edge, "/sign-in", WAY_IN | {"return_path": "/oauth2/authorize?a=1"})) == "/"
    identity.answers["GetCurrentPrincipal"] = auth_service_pb2.GetCurrentPrincipalResponse(
        principal=Principal(), mfa_enrollment_needed=True
    )
    page = seen(await edge.client.get("/", headers=holding(session="aiss_x")))
    assert "second factor" in page.text


async def test_refused_sign_in_says_why_and_keeps_the_address_but_not_the_password(
    edge: Edge, identity: PeerDouble
) -> None:
    identity.answers["CreateSession"] = PlatformError(Reason.SIGN_IN_REFUSED, description="Wrong <b>.")
    answer = await submit(edge, "/sign-in", WAY_IN | {"email": '"><script>', "return_path": "/x"})
    page = seen(answer, 403)
    assert "Wrong <b>." in page.text
    assert (page.fields["email"]["value"], "value" in page.fields["password"]) == ('"><script>', False)
    assert page.kept == {"return_path": "/x"}
    assert ("p", {"class": "error", "id": "error", "role": "alert"}) in page.tags
    assert "script" not in {tag for tag, _ in page.tags}
    assert "www-authenticate" not in answer.headers
    assert not given(answer)


async def test_field_that_is_wrong_is_marked(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["CreateSession"] = PlatformError(Reason.INVALID_ARGUMENT, field="email")
    page = seen(await submit(edge, "/sign-in", WAY_IN), 400)
    marked = {name: field.get("aria-invalid") for name, field in page.fields.items()}
    assert marked == {"email": "true", "password": None}
    assert page.fields["email"]["aria-describedby"] == "error"


@pytest.mark.parametrize("path", FORMS)
async def test_throttled_form_tells_how_long_to_wait(edge: Edge, identity: PeerDouble, path: str) -> None:
    for rpc in ("CreateSession", "VerifyMfa", "DeleteSession", "StartRecovery", "CompleteRecovery", "AcceptInvite"):
        identity.answers[rpc] = PlatformError(Reason.RATE_LIMIT_EXCEEDED, retry_after_s=42)
    answer = await submit(edge, path, WAY_IN, session="aiss_x", challenge="c")
    seen(answer, 429)
    assert answer.headers["retry-after"] == "42"


@pytest.mark.parametrize("reason", [Reason.UNAVAILABLE, Reason.AUTH_UNAVAILABLE, Reason.OVERLOADED])
async def test_outage_is_503_and_never_a_wrong_password(edge: Edge, identity: PeerDouble, reason: Reason) -> None:
    for rpc in ("CreateSession", "VerifyMfa", "DeleteSession", "StartRecovery", "CompleteRecovery", "AcceptInvite"):
        identity.answers[rpc] = PlatformError(reason)
    for path in FORMS:
        answer = await submit(edge, path, WAY_IN, session="aiss_x", challenge="c")
        assert "at the moment" in seen(answer, 503).text
        # Whoever could not be signed out is still signed in, and can try again.
        assert (answer.headers["retry-after"], given(answer)) == ("1", {})
    for rpc in ("GetCurrentPrincipal", "FinishSignIn", "BeginSignIn", "PreviewInvite"):
        identity.answers[rpc] = PlatformError(reason)
    for path in ("/", "/sign-in/issuer?code=c", "/sign-in/issuer/i/begin", "/invites/accept?token=t"):
        answer = await edge.client.get(path, headers=holding(session="aiss_x"))
        assert (seen(answer, 503).fields, given(answer)) == ({}, {})


async def test_identity_that_is_away_is_503(edge: Edge, identity: PeerDouble) -> None:
    await identity.stop()
    seen(await submit(edge, "/sign-in", WAY_IN), 503)


async def test_issuers_of_an_address_are_offered(edge: Edge, identity: PeerDouble) -> None:
    offer = federation_service_pb2.IssuerOffer(issuer_id="issuer_1", display_name="Tenant <b>")
    identity.answers["FindIssuers"] = federation_service_pb2.FindIssuersResponse(offers=[offer])
    form = {"email": "ada@example.com", "password": "", "find": "issuers", "return_path": "/x?y=1&z=2"}
    page = seen(await submit(edge, "/sign-in", form))
    assert page.links["Continue with Tenant <b>"] == "/sign-in/issuer/issuer_1/begin?return_path=/x%3Fy%3D1%26z%3D2"
    assert page.fields["email"]["value"] == "ada@example.com"
    assert [received.rpc for received in identity.received] == ["FindIssuers"]
    identity.answers["FindIssuers"] = federation_service_pb2.FindIssuersResponse()
    assert "There is no organization" in seen(await submit(edge, "/sign-in", form)).text


async def test_issuer_is_gone_to_and_come_back_from_by_the_same_browser(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["BeginSignIn"] = federation_service_pb2.BeginSignInResponse(
        redirect_uri="https://issuer.example/authorize?state=s", browser_token="b-1"
    )
    begun = await edge.client.get("/sign-in/issuer/issuer_1/begin?return_path=/x%3Fy%3D1")
    assert (begun.status_code, led_to(begun)) == (303, "https://issuer.example/authorize?state=s")
    assert given(begun) == {ISSUER_COOKIE: "b-1"}
    assert asked(identity, "BeginSignIn") == federation_service_pb2.BeginSignInRequest(
        issuer_id="issuer_1", return_path="/x?y=1"
    )
    identity.answers["FinishSignIn"] = federation_service_pb2.FinishSignInResponse(
        sign_in=SIGNED_IN, return_path="/x?y=1"
    )
    # Browsers say so of a link that another site follows.
    came = holding(issuer="b-1") | {"sec-fetch-site": "cross-site"}
    back = await edge.client.get("/sign-in/issuer?code=c&state=s&code=d", headers=came)
    assert (led_to(back), given(back)[SESSION_COOKIE], given(back)[ISSUER_COOKIE]) == ("/x?y=1", "aiss_new", "")
    finished = asked(identity, "FinishSignIn")
    assert finished.browser_token == "b-1"
    assert [(pair.name, pair.value) for pair in finished.parameters] == [("code", "c"), ("state", "s"), ("code", "d")]
    identity.answers["FinishSignIn"] = federation_service_pb2.FinishSignInResponse(
        sign_in=CHALLENGE, return_path="/x?y=1"
    )
    back = await edge.client.get("/sign-in/issuer?code=c&state=s", headers=came)
    assert led_to(back) == "/sign-in/mfa?return_path=%2Fx%3Fy%3D1"
    assert given(back) == {ISSUER_COOKIE: "", CHALLENGE_COOKIE: "aisc_c"}
    identity.answers["FinishSignIn"] = PlatformError(Reason.SIGN_IN_REFUSED)
    back = await edge.client.get("/sign-in/issuer?error=access_denied&state=s", headers=came)
    assert ("begin it again" in seen(back, 403).text, given(back)) == (True, {ISSUER_COOKIE: ""})


async def test_home_tells_who_is_signed_in_and_where(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["GetCurrentPrincipal"] = auth_service_pb2.GetCurrentPrincipalResponse(
        email="ada@example.com", display_name="Ada <b>", organization_display_name="Tenant"
    )
    page = seen(await edge.client.get("/", headers=holding(session="aiss_x")))
    assert "As Ada <b> - ada@example.com In Tenant" in page.text
    assert identity.received[-1].metadata["authorization"] == "Bearer aiss_x"
    for cookies in ({}, holding(session="aias_key"), holding(session="x")):
        assert led_to(await edge.client.get("/", headers=cookies)) == "/sign-in"
    identity.answers["GetCurrentPrincipal"] = PlatformError(Reason.API_KEY_INVALID)
    over = await edge.client.get("/", headers=holding(session="aiss_x"))
    assert (led_to(over), given(over)) == ("/sign-in", {SESSION_COOKIE: ""})


async def test_sign_out_ends_the_session(edge: Edge, identity: PeerDouble) -> None:
    for answer in (pb.DeleteSessionResponse(), PlatformError(Reason.API_KEY_INVALID)):
        identity.answers["DeleteSession"] = answer
        out = await submit(edge, "/sign-out", {}, session="aiss_x")
        assert given(out) == {SESSION_COOKIE: ""}
        assert "signed out" in seen(await edge.client.get(led_to(out))).text
        assert asked(identity, "DeleteSession").session_id == "current"
        assert identity.received[-1].metadata["authorization"] == "Bearer aiss_x"
    assert (await edge.client.get("/sign-out")).headers["allow"] == "POST"


async def test_recovery_says_the_same_of_every_address(edge: Edge, identity: PeerDouble) -> None:
    page = seen(await submit(edge, "/recover", {"email": "ada@example.com"}))
    assert "on its way" in page.text
    assert asked(identity, "StartRecovery").email == "ada@example.com"
    identity.answers["StartRecovery"] = PlatformError(Reason.FAILED_PRECONDITION, description="No mail here.")
    assert "No mail here." in seen(await submit(edge, "/recover", {"email": "a"}), 400).text


async def test_recovery_sets_a_password_and_signs_nobody_in(edge: Edge, identity: PeerDouble) -> None:
    page = seen(await edge.client.get('/recover/complete?token=aisr_"x'))
    assert page.kept == {"token": 'aisr_"x'}
    identity.answers["CompleteRecovery"] = PlatformError(Reason.INVALID_ARGUMENT, field="new_password")
    again = seen(await submit(edge, "/recover/complete", page.kept | {"password": "short"}), 400)
    assert (again.kept, again.fields["password"]["aria-invalid"]) == (page.kept, "true")
    assert "short" not in again.html
    identity.answers["CompleteRecovery"] = pb.CompleteRecoveryResponse()
    done = await submit(edge, "/recover/complete", page.kept | {"password": "long enough"})
    request = pb.CompleteRecoveryRequest(recovery_token='aisr_"x', new_password="long enough")
    assert asked(identity, "CompleteRecovery") == request
    assert "password is set" in seen(await edge.client.get(led_to(done))).text
    assert not given(done)


async def test_invite_is_shown_and_accepted(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["PreviewInvite"] = invite_service_pb2.PreviewInviteResponse(
        organization_display_name="Tenant <b>", email="ada@example.com", password_needed=True
    )
    page = seen(await edge.client.get("/invites/accept?token=t"))
    assert ("Join Tenant <b>" in page.text, "ada@example.com" in page.text) == (True, True)
    assert (page.kept, set(page.fields)) == ({"token": "t"}, {"display_name", "password"})
    form = page.kept | {"display_name": "Ada", "password": "short"}
    identity.answers["AcceptInvite"] = PlatformError(Reason.INVALID_ARGUMENT, field="password")
    again = seen(await submit(edge, "/invites/accept", form), 400)
    assert (again.fields["display_name"]["value"], again.fields["password"]["aria-invalid"]) == ("Ada", "true")
    identity.answers["AcceptInvite"] = invite_service_pb2.AcceptInviteResponse()
    done = await submit(edge, "/invites/accept", form)
    assert "You have joined" in seen(await edge.client.get(led_to(done))).text
    identity.answers["PreviewInvite"] = invite_service_pb2.PreviewInviteResponse()
    assert set(seen(await edge.client.get("/invites/accept?token=t")).fields) == {"display_name"}
    identity.answers["PreviewInvite"] = PlatformError(Reason.INVALID_ARGUMENT, description="It is over.")
    assert "It is over." in seen(await edge.client.get("/invites/accept?token=t"), 400).text


async def test_authenticator_is_set_up_by_whoever_is_signed_in(edge: Edge, identity: PeerDouble) -> None:
    path = "/account/authenticator"
    for answer in (
        await edge.client.get(path),
        await submit(edge, path, {}),
        await submit(edge, f"{path}/confirm", {}),
    ):
        assert led_to(answer) == "/sign-in?return_path=%2Faccount%2Fauthenticator"
    assert not identity.received
    assert set(seen(await edge.client.get(path, headers=holding(session="aiss_x"))).fields) == {"password", "totp_code"}
    identity.answers["EnrollTotp"] = mfa_service_pb2.EnrollTotpResponse(
        secret="SECRET", otpauth_uri="otpauth://totp/x?secret=SECRET&issuer=y"
    )
    shown = seen(await submit(edge, path, {"password": "p", "totp_code": ""}, session="aiss_x"))
    assert asked(identity, "EnrollTotp") == mfa_service_pb2.EnrollTotpRequest(password="p")
    assert identity.received[-1].metadata["authorization"] == "Bearer aiss_x"
    assert shown.links["open it in an app on this device"] == "otpauth://totp/x?secret=SECRET&issuer=y"
    assert "SECRET" in shown.text
    await submit(edge, path, {"password": "p", "totp_code": "123 456"}, session="aiss_x")
    assert asked(identity, "EnrollTotp").totp_code == "123456"
    identity.answers["ConfirmTotp"] = PlatformError(Reason.MFA_CODE_INVALID, field="totp_code")
    again = seen(await submit(edge, f"{path}/confirm", {"totp_code": "1"}, session="aiss_x"), 403)
    assert again.fields["totp_code"]["aria-invalid"] == "true"
    identity.answers["ConfirmTotp"] = mfa_service_pb2.ConfirmTotpResponse(recovery_codes=["one", "two"])
    done = seen(await submit(edge, f"{path}/confirm", {"totp_code": "123 456"}, session="aiss_x"))
    assert "one two" in done.text
    identity.answers["EnrollTotp"] = PlatformError(Reason.API_KEY_INVALID)
    over = await submit(edge, path, {"password": "p"}, session="aiss_x")
    assert led_to(over).startswith("/sign-in?")


async def test_cookie_is_the_credential_of_a_browsers_calls(edge: Edge, identity: PeerDouble) -> None:
    cookie = holding(session="aiss_x")
    for path in ("/admin/v1/principal", "/admin/v1/organizations"):
        assert (await edge.client.get(path, headers=cookie)).status_code == 200
        assert identity.received[-1].metadata["authorization"] == "Bearer aiss_x"
    made = await edge.client.post(
        "/admin/v1/organizations", json={}, headers=cookie | {"sec-fetch-site": "same-origin"}
    )
    assert (made.status_code, identity.received[-1].metadata["authorization"]) == (200, "Bearer aiss_x")
    both = cookie | {"authorization": "Bearer aias_key"}
    assert (await edge.client.post("/admin/v1/organizations", json={}, headers=both)).status_code == 200
    assert identity.received[-1].metadata["authorization"] == "Bearer aias_key"


@pytest.mark.parametrize("site", ["cross-site", "same-site", None])
async def test_other_site_changes_nothing_with_a_browsers_cookie(
    edge: Edge, identity: PeerDouble, site: str | None
) -> None:
    headers = holding(session="aiss_x") | ({"sec-fetch-site": site} if site else {})
    for verb, path in (("POST", "/admin/v1/organizations"), ("DELETE", "/admin/v1/sessions/current")):
        refused = await edge.client.request(verb, path, headers=headers)
        assert (refused.status_code, refused.json()["error"]["status"]) == (403, "PERMISSION_DENIED")
    assert not identity.received


async def test_cookie_counts_neither_for_inference_nor_where_nobody_is_asked_for(
    edge: Edge, identity: PeerDouble
) -> None:
    cookie = holding(session="aiss_x")
    assert (await edge.client.get("/v1/models", headers=cookie)).status_code == 401
    assert (await edge.client.post("/admin/v1/sessions", json={}, headers=cookie)).status_code == 200
    assert "authorization" not in identity.received[-1].metadata


async def test_no_secret_reaches_the_log(edge: Edge, identity: PeerDouble) -> None:
    identity.answers["CreateSession"] = PlatformError(Reason.SIGN_IN_REFUSED)
    await edge.client.get("/recover/complete?token=aisr_secret")
    await submit(edge, "/sign-in", {"email": "ada@example.com", "password": "secret"}, session="aiss_secret")
    lines = edge.access_lines()
    assert [(line["route"], line.get("reason")) for line in lines] == [
        ("/recover/complete", None),
        ("/sign-in", "sign_in_refused"),
    ]
    assert "secret" not in str(lines)
    assert "ada" not in str(lines)

"""People sign in with a real browser that runs no script of ours: there is none."""

import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlencode

import httpx
import pyotp
import pytest
from aiohttp import web
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from playwright.async_api import Browser, BrowserContext, Page, expect

from aiaas.identity.v1 import (
    federation_service_pb2,
    federation_service_pb2_grpc,
    invite_service_pb2,
    invite_service_pb2_grpc,
    oauth_service_pb2,
    oauth_service_pb2_grpc,
)
from aiaas.identity.v1 import session_service_pb2 as pb
from edge.browser import SESSION_COOKIE
from tests.doubles.openid_issuer import CLIENT_ID, CLIENT_SECRET, OpenIdIssuer
from tests.integration.browser.conftest import Site
from tests.integration.edge.harness import until
from tests.integration.identity.signing_in import PASSWORD, People

ADA = "ada@example.com"


@pytest.fixture
async def context(browser: Browser) -> AsyncIterator[BrowserContext]:
    """Somebody's browser, with scripts switched off."""
    context = await browser.new_context(java_script_enabled=False)
    context.set_default_timeout(15_000)
    yield context
    await context.close()


@pytest.fixture
async def page(context: BrowserContext) -> Page:
    return await context.new_page()


@pytest.fixture
async def organization_id(site: Site, people: People) -> str:
    """An organization, and Ada in it."""
    organization_id = await site.identity.organization("Tenant")
    await invite(site, organization_id)
    accept = invite_service_pb2.AcceptInviteRequest(invite_token=site.mailbox.token_to(ADA), password=PASSWORD)
    await people.call(people.invites.AcceptInvite, accept)
    return organization_id


async def invite(site: Site, organization_id: str) -> None:
    """Have Ada invited, by mail."""
    wanted = invite_service_pb2.Invite(email=ADA, role_ids=["developer"])
    request = invite_service_pb2.CreateInviteRequest(organization_id=organization_id, invite=wanted)
    await site.identity.call(invite_service_pb2_grpc.InviteServiceStub(site.identity.channel).CreateInvite, request)


def link_to(site: Site, email: str) -> str:
    """The link in the newest mail to an address."""
    (message,) = [message for message in site.mailbox.messages if message["To"] == email][-1:]
    found = re.search(r"https?://\S+token=\S+", message.get_content())
    assert found
    return found[0]


class Application:
    """An OAuth client of somebody else: a page with a link, and what came back."""

    def __init__(self) -> None:
        self.url = ""
        self.link = ""
        self.came_back: list[dict[str, str]] = []

    async def show(self, request: web.Request) -> web.Response:
        return web.Response(text=f'<a href="{self.link}">Connect</a>', content_type="text/html")

    async def receive(self, request: web.Request) -> web.Response:
        self.came_back.append(dict(request.query))
        return web.Response(text="Connected")

    async def attack(self, request: web.Request) -> web.Response:
        form = f'<form method="post" action="{request.query["at"]}"><button>Win a prize</button></form>'
        return web.Response(text=form, content_type="text/html")


@asynccontextmanager
async def application() -> AsyncIterator[Application]:
    running = Application()
    app = web.Application()
    app.router.add_get("/", running.show)
    app.router.add_get("/back", running.receive)
    app.router.add_get("/attack", running.attack)
    runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        running.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield running
    finally:
        await runner.cleanup()


async def fill_in(page: Page, password: str = PASSWORD) -> None:
    await page.get_by_label("E-mail address").fill(ADA)
    await page.get_by_label("Password").fill(password)
    await page.get_by_role("button", name="Sign in", exact=True).click()


async def sign_in(page: Page, url: str) -> None:
    await page.goto(f"{url}/sign-in")
    await fill_in(page)
    await expect(page.get_by_role("heading")).to_have_text("You are signed in")


async def session_of(context: BrowserContext) -> str:
    """The session that the browser keeps, and no page could read."""
    kept = [cookie for cookie in await context.cookies() if cookie["name"] == SESSION_COOKIE]
    for cookie in kept:
        assert (cookie["secure"], cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, True, "Lax", "/")
    return kept[0]["value"] if kept else ""


# By both names of this machine a browser keeps cookies that want https.
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
@pytest.mark.usefixtures("organization_id")
async def test_person_signs_in_with_a_password_and_a_code_and_out_again(
    site: Site, people: People, context: BrowserContext, page: Page, host: str
) -> None:
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    phone, _ = await people.enroll((await people.session(ADA)).session_token)
    url = f"http://{host}:{site.port}"
    await page.goto(url)
    await expect(page).to_have_url(f"{url}/sign-in")
    await fill_in(page, "not the password")
    await expect(page.get_by_role("alert")).to_have_text("The address or the password is wrong.")
    await fill_in(page)
    await expect(page.get_by_role("heading")).to_have_text("Confirm that it is you")
    assert not await session_of(context)
    await page.get_by_label("Code of your authenticator app").fill(phone.at(int(time.time()) + 30))
    await page.get_by_role("button", name="Continue").click()
    await expect(page.get_by_role("heading")).to_have_text("You are signed in")
    await expect(page.get_by_text(ADA)).to_be_visible()
    await expect(page.get_by_text("Tenant")).to_be_visible()
    token = await session_of(context)
    assert (await site.identity.authenticate(token)).user_id
    # The browser's cookie is its credential for the API, too.
    answer = await page.goto(f"{url}/admin/v1/principal")
    assert answer is not None
    assert (await answer.json())["email"] == ADA
    await page.goto(url)
    await page.get_by_role("button", name="Sign out").click()
    await expect(page.get_by_role("status")).to_have_text("You are signed out.")
    assert not await session_of(context)
    assert await site.identity.is_refused(token)
    assert not [text for text in told if "Content Security Policy" in text]


@pytest.mark.usefixtures("organization_id")
async def test_person_sets_up_an_authenticator_and_gets_in_with_a_recovery_code(
    site: Site, context: BrowserContext, page: Page
) -> None:
    await sign_in(page, site.url)
    await page.get_by_role("link", name="Set up an authenticator app").click()
    await page.get_by_label("Password").fill(PASSWORD)
    await page.get_by_role("button", name="Continue").click()
    secret = await page.get_by_role("code").inner_text()
    await page.get_by_label("Code that the app shows").fill(pyotp.TOTP(secret).now())
    await page.get_by_role("button", name="Confirm").click()
    await expect(page.get_by_role("listitem")).to_have_count(10)
    recovery_code = await page.get_by_role("listitem").first.inner_text()
    await context.clear_cookies()
    await page.goto(f"{site.url}/sign-in")
    await fill_in(page)
    await page.get_by_text("Use a recovery code instead").click()
    await page.get_by_label("Recovery code").fill(recovery_code)
    await page.get_by_role("button", name="Use it").click()
    await expect(page.get_by_role("heading")).to_have_text("You are signed in")
    assert (await site.identity.authenticate(await session_of(context))).user_id


async def test_person_signs_in_through_an_issuer_of_their_own(
    site: Site, people: People, context: BrowserContext, page: Page, organization_id: str
) -> None:
    claims = {"sub": "ada", "email": ADA, "email_verified": True}
    async with OpenIdIssuer(claims=claims) as openid:
        wanted = federation_service_pb2.Issuer(
            display_name="Example's staff",
            issuer_url=openid.url,
            client_id=CLIENT_ID,
            client_secret=CLIENT_SECRET,
            email_domains=["example.com"],
        )
        request = federation_service_pb2.CreateIssuerRequest(organization_id=organization_id, issuer=wanted)
        stub = federation_service_pb2_grpc.FederationServiceStub(site.identity.channel)
        issuer = (await site.identity.call(stub.CreateIssuer, request)).issuer
        await page.goto(f"{site.url}/sign-in?return_path=/admin/v1/principal")
        await page.get_by_label("E-mail address").fill(ADA)
        await page.get_by_role("button", name="Sign in through your organization").click()
        await page.get_by_role("link", name="Continue with Example's staff").click()
        assert page.url.startswith(f"{openid.url}/authorize?")
        await page.get_by_role("link", name="It is me").click()
        await page.wait_for_url(f"{site.url}/admin/v1/principal")
        listed = await people.call(people.sessions.ListSessions, pb.ListSessionsRequest(), await session_of(context))
        (session,) = listed.sessions
        assert (session.issuer_id, session.organization_id) == (issuer.issuer_id, organization_id)


async def test_invited_person_joins_and_sets_a_new_password_when_it_is_lost(site: Site, page: Page) -> None:
    await invite(site, await site.identity.organization("Tenant"))
    await page.goto(link_to(site, ADA))
    await expect(page.get_by_text("Tenant")).to_be_visible()
    await page.get_by_label("Your name").fill("Ada")
    await page.get_by_label("Choose a password").fill(PASSWORD)
    await page.get_by_role("button", name="Accept the invitation").click()
    await expect(page.get_by_role("status")).to_have_text("You have joined. Sign in to begin.")
    await page.get_by_role("link", name="Forgotten your password?").click()
    await page.get_by_label("E-mail address").fill(ADA)
    await page.get_by_role("button").click()
    await until(lambda: len(site.mailbox.messages) == 2)
    await page.goto(link_to(site, ADA))
    await page.get_by_label("New password").fill("copper-lantern-river-77")
    await page.get_by_role("button").click()
    await expect(page.get_by_role("status")).to_have_text("Your new password is set. Sign in with it.")
    await fill_in(page)
    await expect(page.get_by_role("alert")).to_have_text("The address or the password is wrong.")
    await fill_in(page, "copper-lantern-river-77")
    await expect(page.get_by_role("heading")).to_have_text("You are signed in")


async def test_application_gets_its_code_after_consent(
    site: Site, context: BrowserContext, page: Page, organization_id: str
) -> None:
    async with application() as app:
        verifier = secrets.token_urlsafe(48)
        wanted = oauth_service_pb2.OauthClient(
            display_name="Notebook",
            kind=oauth_service_pb2.OAUTH_CLIENT_KIND_CONFIDENTIAL,
            redirect_uris=[f"{app.url}/back"],
            grant_types=[oauth_service_pb2.OAUTH_GRANT_TYPE_AUTHORIZATION_CODE],
            scopes=["openid", "inference.create"],
        )
        stub = oauth_service_pb2_grpc.OauthServiceStub(site.identity.channel)
        request = oauth_service_pb2.CreateOauthClientRequest(organization_id=organization_id, oauth_client=wanted)
        made = await site.identity.call(stub.CreateOauthClient, request)
        asked = {
            "response_type": "code",
            "client_id": made.oauth_client.oauth_client_id,
            "redirect_uri": f"{app.url}/back",
            "state": "xyz",
            "code_challenge": create_s256_code_challenge(verifier),
            "code_challenge_method": "S256",
        }
        app.link = f"{site.url}/oauth2/authorize?{urlencode(asked).replace('&', '&amp;')}"
        await page.goto(app.url)
        await page.get_by_role("link", name="Connect").click()
        await expect(page.get_by_role("heading")).to_have_text("Sign in")
        await fill_in(page)
        await expect(page.get_by_role("heading")).to_have_text("Let Notebook in?")
        await expect(page.get_by_role("listitem")).to_have_text(["know who you are here", "inference.create"])
        await page.get_by_role("button", name="Do not allow").click()
        await expect(page.get_by_text("Connected")).to_be_visible()
        # Now with the session that there is.
        await page.goto(app.url)
        await page.get_by_role("link", name="Connect").click()
        await page.get_by_role("button", name="Allow", exact=True).click()
        await expect(page.get_by_text("Connected")).to_be_visible()
        # A client that is known is not asked about again: the way leads through the form of sign-in to the client.
        await context.clear_cookies()
        await page.goto(app.url)
        await page.get_by_role("link", name="Connect").click()
        await fill_in(page)
        await expect(page.get_by_text("Connected")).to_be_visible()
        denied, allowed, known = app.came_back
        assert (denied["error"], denied["state"]) == ("access_denied", "xyz")
        assert (known["state"], "code" in known) == ("xyz", True)
        form = {
            "grant_type": "authorization_code",
            "code": allowed["code"],
            "redirect_uri": f"{app.url}/back",
            "code_verifier": verifier,
        }
        auth = httpx.BasicAuth(made.oauth_client.oauth_client_id, made.client_secret)
        async with httpx.AsyncClient(trust_env=False) as client:
            told = await client.post(f"{site.url}/oauth2/token", data=form, auth=auth)
        assert told.json()["scope"] == "openid inference.create"


@pytest.mark.usefixtures("organization_id")
async def test_other_site_cannot_have_a_browser_send_our_forms(site: Site, context: BrowserContext, page: Page) -> None:
    # To browsers, ports make no other site: the cookie is sent along, and only the origin tells.
    url = f"http://127.0.0.1:{site.port}"
    await sign_in(page, url)
    token = await session_of(context)
    async with application() as other:
        for path in ("/sign-out", "/admin/v1/sessions:switch"):
            await page.goto(f"{other.url}/attack?at={url}{path}")
            async with page.expect_response(f"{url}{path}") as answered:
                await page.get_by_role("button").click()
            answer = await answered.value
            assert (answer.status, "another site" in await answer.text()) == (403, True)
            assert SESSION_COOKIE in (await answer.request.all_headers())["cookie"]
    assert not await site.identity.is_refused(token)


@pytest.mark.usefixtures("organization_id")
async def test_way_back_from_sign_in_stays_here(site: Site, page: Page) -> None:
    async with application() as other:
        await page.goto(f"{site.url}/sign-in?return_path=//{other.url.removeprefix('http://')}/back")
        await fill_in(page)
        await expect(page.get_by_role("heading")).to_have_text("You are signed in")
        await until(lambda: page.url == f"{site.url}/")
        assert not other.came_back

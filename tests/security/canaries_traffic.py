"""What people, programs and engines do with secrets, rightly and wrongly, on every path there is; every secret that is
used is a canary.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import httpx
import pyotp
from authlib.oauth2.rfc7636 import create_s256_code_challenge

from edge.browser import SESSION_COOKIE
from tests.doubles.scripted_backend import Answer, Cut, chat_document, chat_stream, failure, sse
from tests.integration.edge.reading import led_to, seen
from tests.load.host import MODEL, register
from tests.security.canaries import Canaries
from tests.security.canaries_stack import CHECKOUT, Platform
from tests.security.canaries_without import EXPLODING, EXPLODING_PAGE

OURS = {"sec-fetch-site": "same-origin"}
"""What a browser says of a form of the platform's own."""

OWNER = "owner@example.com"
CALLBACK = "https://app.example/callback"
ALLOW_ALL = "package aiaas.policy\nimport rego.v1\ndefault allow := true\n"
CHAT = "/v1/chat/completions"
KINDS = {
    "password",
    "api key",
    "access token",
    "refresh token",
    "id token",
    "session token",
    "totp secret",
    "recovery code",
    "client secret",
    "signing secret",
    "invite token",
    "recovery token",
    "challenge token",
    "consent token",
    "authorization code",
    "webhook secret",
    "issuer secret",
    "idempotency key",
    "prompt",
    "completion",
}
"""Of each of them at least one flies."""


@dataclass
class Traffic:
    """All of it, on one platform."""

    platform: Platform
    canaries: Canaries = field(default_factory=Canaries)
    organization_id: str = ""
    admin: str = ""
    session: str = ""
    key: str = ""
    key_id: str = ""

    @property
    def path(self) -> str:
        return f"/admin/v1/organizations/{self.organization_id}"

    def new(self, kind: str) -> str:
        """A canary of our own."""
        return self.canaries.add(kind, f"canary-{secrets.token_hex(12)}-{kind.replace(' ', '-')}")

    async def call(self, verb: str, path: str, body: object = None, **options: Any) -> Any:
        """The document that answers."""
        answer = await self.platform.call(verb, path, body, **options)
        is_json = "json" in answer.headers.get("content-type", "")
        return answer.json() if is_json and answer.content else {}

    async def run(self) -> None:
        """Do all of it."""
        await self.platform.copy_events()
        await self._prepare()
        await self._people()
        await self._keys()
        await self._tokens()
        await self._webhooks()
        await self._inferences()
        await self._broken_inferences()
        await self._misplaced()
        await self._explosions()
        await self._outage()

    async def _prepare(self) -> None:
        stack = self.platform.stack
        self.admin = self.canaries.add("api key", stack.platform_key)
        made = await self.call("POST", "/admin/v1/organizations", {"display_name": "Canaries"}, token=self.admin)
        self.organization_id = made["organization"]["organization_id"]
        headers = {"Authorization": f"Bearer {self.admin}"}
        async with aiohttp.ClientSession(stack.base_url, headers=headers) as session:
            await register(session, self.platform.engine.port, CHECKOUT)
        # What follows breaks nearly every answer, and each is to be asked for.
        patient = {"breaker": {"least_attempts": 1000}}
        path = f"/admin/v1/models/{MODEL}/routing-policy?allow_missing=true"
        await self.call("PATCH", path, patient, token=self.admin)

    async def _people(self) -> None:
        """Invite, sign-in, second factor and recovery, each of them wrongly first."""
        platform, canaries = self.platform, self.canaries
        invite = {"email": OWNER, "role_ids": ["owner"]}
        await self.call("POST", f"{self.path}/invites", invite, token=self.admin)
        invite_token = canaries.add("invite token", await platform.mailed_to(OWNER, 0))
        password = self.new("password")
        await self.call("POST", "/admin/v1/invites:preview", {"invite_token": f"{invite_token}x"}, status=400)
        await self.call("GET", "/invites/accept", params={"token": invite_token})
        await self.call("GET", "/invites/accept", params={"token": f"{invite_token}x"}, status=400)
        await self.call("POST", "/invites/accept", data={"token": invite_token, "password": "short"}, status=403)
        # A form that was filled in wrongly goes back to its sender with what it held.
        form = {"token": invite_token, "password": "short"}
        await self.call("POST", "/invites/accept", data=form, headers=OURS, status=400, kept=False)
        wrong = {"invite_token": invite_token, "password": password, "display_name": [password]}
        await self.call("POST", "/admin/v1/invites:accept", wrong, status=400)
        await self.call("POST", "/admin/v1/invites:accept", {"invite_token": invite_token, "password": password})
        await self.call(
            "POST", "/admin/v1/invites:accept", {"invite_token": invite_token, "password": password}, status=400
        )

        credentials = {"email": OWNER, "password": password}
        wrong = {**credentials, "password": self.new("password")}
        await self.call("POST", "/sign-in", data=wrong, headers=OURS, status=403)
        await self.call("POST", "/sign-in", data=credentials, status=403)
        await self.call("POST", "/admin/v1/sessions", {**credentials, "password": self.new("password")}, status=401)
        await self.call("POST", "/admin/v1/sessions", {**credentials, self.admin: 1}, status=400)
        await self.call("POST", "/admin/v1/sessions", {**credentials, "password": [password]}, status=400)
        await self.call("POST", "/admin/v1/sessions", {"email": f"{OWNER}\0", "password": password}, status=400)
        signed_in = (await self.call("POST", "/admin/v1/sessions", credentials))["sign_in"]["signed_in"]
        session = canaries.add("session token", signed_in["session_token"])

        enrolled = await self.call("POST", "/admin/v1/principal/mfa:enroll", {"password": password}, token=session)
        totp = pyotp.TOTP(canaries.add("totp secret", enrolled["secret"]))
        await self.call("POST", "/admin/v1/principal/mfa:confirm", {"totp_code": "x"}, token=session, status=401)
        # A wrong code ends the enrollment.
        enrolled = await self.call("POST", "/admin/v1/principal/mfa:enroll", {"password": password}, token=session)
        totp = pyotp.TOTP(canaries.add("totp secret", enrolled["secret"]))
        answer = {"totp_code": totp.now()}
        codes = await self.call("POST", "/admin/v1/principal/mfa:confirm", answer, token=session)
        codes = [canaries.add("recovery code", code) for code in codes["recovery_codes"]]

        challenge = await self._challenge(password)
        wrong_code = canaries.add("recovery code", "-".join(["ABCD"] * 5 + [secrets.choice(["EFGH", "IJKL"])]))
        answer = {"challenge_token": challenge, "recovery_code": wrong_code}
        await self.call("POST", "/admin/v1/sessions:verify", answer, status=401)
        answer["recovery_code"] = codes[0]
        made = await self.call("POST", "/admin/v1/sessions:verify", answer)
        canaries.add("session token", made["session_token"])

        mails = len(platform.mailbox.messages)
        await self.call("POST", "/admin/v1/recoveries", {"email": OWNER})
        recovery_token = canaries.add("recovery token", await platform.mailed_to(OWNER, mails))
        await self.call("GET", "/recover/complete", params={"token": recovery_token})
        form = {"token": recovery_token, "password": "short"}
        await self.call("POST", "/recover/complete", data=form, headers=OURS, status=400, kept=False)
        changed = {"recovery_token": recovery_token, "new_password": "short"}
        await self.call("POST", "/admin/v1/recoveries:complete", changed, status=400)
        changed["new_password"] = password = self.new("password")
        await self.call("POST", "/admin/v1/recoveries:complete", changed)
        await self.call("POST", "/admin/v1/recoveries:complete", changed, status=400)
        answer = {"challenge_token": await self._challenge(password), "recovery_code": codes[1]}
        made = await self.call("POST", "/admin/v1/sessions:verify", answer)
        self.session = canaries.add("session token", made["session_token"])

    async def _challenge(self, password: str) -> str:
        made = await self.call("POST", "/admin/v1/sessions", {"email": OWNER, "password": password})
        return self.canaries.add("challenge token", made["sign_in"]["mfa_challenge"]["challenge_token"])

    async def _keys(self) -> None:
        """Keys, policies that see each call, signing secrets, issuers."""
        policy = {"display_name": "All", "modules": [{"path": "all.rego", "source": ALLOW_ALL}]}
        await self.call("POST", f"{self.path}/policies", policy, token=self.session)
        made = await self.call("POST", f"{self.path}/api-keys", {"display_name": "Plain"}, token=self.session)
        self.key = self.canaries.add("api key", made["secret"])
        self.key_id = made["api_key"]["api_key_id"]
        await self.call(
            "POST", f"{self.path}/api-keys", {"display_name": "K", "scopes": 5}, token=self.session, status=400
        )
        signed = await self.call("POST", f"{self.path}/api-keys", {"display_name": "Signed"}, token=self.session)
        signed_key = self.canaries.add("api key", signed["secret"])
        path = f"{self.path}/api-keys/{signed['api_key']['api_key_id']}/signing-secret"
        made = await self.call("POST", path, {}, token=self.session)
        self.canaries.add("signing secret", made["signing_secret"])
        headers = {
            "x-signature": "v1=" + "ab" * 32,
            "x-signature-timestamp": str(int(time.time())),
            "x-signature-nonce": secrets.token_hex(16),
        }
        await self.call("POST", CHAT, self._chat(), token=signed_key, headers=headers, status=401)
        issuer = {
            "display_name": "Ours",
            "issuer_url": self.platform.issuer.url,
            "client_id": "platform",
            "client_secret": self.new("issuer secret"),
        }
        await self.call("POST", f"{self.path}/issuers", issuer, token=self.session)
        await self.call(
            "POST", f"{self.path}/issuers", {**issuer, "issuer_url": "ftp://x"}, token=self.session, status=400
        )

    async def _tokens(self) -> None:
        """OAuth2: a code, its tokens, and wrong ones."""
        wanted = {
            "display_name": "App",
            "kind": "OAUTH_CLIENT_KIND_CONFIDENTIAL",
            "redirect_uris": [CALLBACK],
            "grant_types": ["OAUTH_GRANT_TYPE_AUTHORIZATION_CODE", "OAUTH_GRANT_TYPE_REFRESH_TOKEN"],
            "scopes": ["openid", "email", "inference.create"],
        }
        made = await self.call("POST", f"{self.path}/oauth-clients", wanted, token=self.session)
        client_id = made["oauth_client"]["oauth_client_id"]
        client_secret = self.canaries.add("client secret", made["client_secret"])
        verifier = secrets.token_urlsafe(48)
        asked = {
            "response_type": "code",
            "client_id": client_id,
            "redirect_uri": CALLBACK,
            "scope": "openid email inference.create",
            "state": "xyz",
            "code_challenge": create_s256_code_challenge(verifier),
            "code_challenge_method": "S256",
        }
        cookie = {"cookie": f"{SESSION_COOKIE}={self.session}", **OURS}
        page = await self.platform.call("GET", "/oauth2/authorize", params=asked, headers=cookie)
        consent = self.canaries.add("consent token", seen(page).kept["consent_token"])
        choice = {**asked, "consent": "allow", "consent_token": consent}
        # Not the token that was given: the user is asked once more.
        tampered = {**choice, "consent_token": f"{consent}x"}
        await self.call("POST", "/oauth2/authorize", data=tampered, headers=cookie)
        sent = await self.platform.call("POST", "/oauth2/authorize", data=choice, headers=cookie)
        code = self.canaries.add("authorization code", parse_qs(urlsplit(led_to(sent)).query)["code"][0])
        auth = httpx.BasicAuth(client_id, client_secret)
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": CALLBACK,
            "code_verifier": verifier,
        }
        wrong = httpx.BasicAuth(client_id, self.new("client secret"))
        await self.call("POST", "/oauth2/token", data=form, auth=wrong, status=401)
        granted = await self.call("POST", "/oauth2/token", data=form, auth=auth)
        access = self.canaries.add("access token", granted["access_token"])
        refresh = self.canaries.add("refresh token", granted["refresh_token"])
        self.canaries.add("id token", granted["id_token"])
        await self.call("POST", "/oauth2/introspect", data={"token": access}, auth=auth)
        await self.call("GET", "/oauth2/userinfo", token=access)
        await self.call("POST", CHAT, self._chat(), token=access)
        await self.call("POST", CHAT, self._chat(), token=refresh, status=401)
        form = {"grant_type": "refresh_token", "refresh_token": refresh}
        granted = await self.call("POST", "/oauth2/token", data=form, auth=auth)
        self.canaries.add("access token", granted["access_token"])
        self.canaries.add("refresh token", granted["refresh_token"])
        # It was used before, which ends the family.
        await self.call("POST", "/oauth2/token", data=form, auth=auth, status=400)

    async def _webhooks(self) -> None:
        path = f"/analytics/v1/organizations/{self.organization_id}/webhooks"
        wanted = {"display_name": "Hook", "url": self.platform.webhooks.url}
        made = await self.call("POST", path, wanted, token=self.session)
        self.canaries.add("webhook secret", made["secret"])
        path = f"{path}/{made['webhook']['webhook_id']}"
        await self.call("POST", f"{path}:test", {}, token=self.session)
        made = await self.call("POST", f"{path}:rotate", {}, token=self.session)
        self.canaries.add("webhook secret", made["secret"])
        self.platform.webhooks.statuses = [500]
        await self.call("POST", f"{path}:test", {}, token=self.session)

    def _chat(self, **fields: Any) -> dict[str, Any]:
        return {"model": MODEL, "messages": [{"role": "user", "content": self.new("prompt")}], **fields}

    async def _inferences(self) -> None:
        """Answers of every shape, each with words of its own."""
        engine = self.platform.engine
        engine.default = chat_document(self.new("completion"))
        await self.call("POST", CHAT, self._chat(user=self.new("prompt")), token=self.key)
        engine.script.append(chat_stream(self.new("completion"), " ", self.new("completion")))
        await self.platform.call("POST", CHAT, self._chat(stream=True), token=self.key)
        tool = {"type": "function", "function": {"name": "f", "description": self.new("prompt"), "parameters": {}}}
        await self.call("POST", CHAT, self._chat(tools=[tool]), token=self.key)
        headers = {"idempotency-key": self.new("idempotency key")}
        body = self._chat()
        engine.script.append(
            chat_document(self.canaries.add("completion: kept for a repetition", "kept-" + secrets.token_hex(12)))
        )
        for _ in range(2):
            await self.call("POST", CHAT, body, token=self.key, headers=headers)
        await self.call("POST", CHAT, self._chat(), token=self.key, headers=headers, status=422)

    async def _broken_inferences(self) -> None:
        """Requests that cannot be, and engines that say what they should not."""
        engine, key = self.platform.engine, self.key
        prompt = self.new("prompt")
        await self.call("POST", CHAT, {"model": MODEL, "messages": prompt}, token=key, status=400)
        await self.call("POST", CHAT, self._chat(max_tokens=prompt), token=key, status=400)
        await self.call("POST", CHAT, self._chat(model=self.key), token=key, status=404)
        await self.platform.call("POST", CHAT, content=f'{{"messages": "{prompt}', token=key, status=400)
        await self.platform.call("POST", CHAT, content=f'"{prompt}"'.encode() + b"\xff", token=key, status=400)
        await self.call("POST", CHAT, self._chat(seed=prompt * 6000), token=key, status=413)
        # The engine's own words on what the client wrote are for the client, and for nobody else.
        body = self._chat()
        quoted = body["messages"][0]["content"]
        engine.script.append(failure(400, f"cannot take {quoted}"))
        told = await self.call("POST", CHAT, body, token=key, status=400, kept=False)
        assert quoted in json.dumps(told)
        for status in (500, 503, 401):
            body = self._chat()
            engine.script += [failure(status, f"failed at {body['messages'][0]['content']}")] * 4
            answer = await self.platform.http.post(CHAT, json=body, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code >= 500, answer.text
            self.platform.errors.append(answer.content)
            engine.script.clear()
        for broken in (
            Answer([f"no JSON: {self.new('completion')}".encode()]),
            Answer([json.dumps({"error": self.new("completion")}).encode()]),
        ):
            engine.script.append(broken)
            answer = await self.platform.http.post(CHAT, json=self._chat(), headers={"authorization": f"Bearer {key}"})
            if answer.status_code >= 400:
                self.platform.errors.append(answer.content)
            engine.script.clear()
        halves = (
            [*chat_stream(self.new("completion")).steps[:2], Cut.RESET],
            sse({"error": {"message": self.new("completion"), "code": 500}}),
            [b"data: " + self.new("completion").encode() + b"\n\n"],
        )
        for steps in halves:
            engine.script.append(Answer(steps, content_type="text/event-stream"))
            body = self._chat(stream=True)
            # It is broken off for the client as well.
            with contextlib.suppress(httpx.TransportError):
                await self.platform.http.post(CHAT, json=body, headers={"authorization": f"Bearer {key}"})
            engine.script.clear()

    async def _misplaced(self) -> None:
        """Secrets in headers, paths and queries that are not for them, and such as are nearly right."""
        key, models = self.key, "/v1/models"
        await self.call("GET", models, headers={"x-api-key": key}, status=None)
        await self.call("GET", models, headers={"authorization": f"Basic {key}"}, status=None)
        await self.call("GET", models, headers={"authorization": key}, status=None)
        await self.call("GET", models, headers={"cookie": f"token={key}"}, status=None)
        await self.call("GET", f"{models}?api_key={key}", status=None)
        await self.call("GET", models, token=f"{key[:-1]}!", status=None)
        await self.call("GET", models, token=f"{key}{key}", status=None)
        await self.call("GET", f"{models}/{key}", token=key, status=None)
        await self.call("GET", f"/v1/{key}", token=key, status=None)
        await self.call("GET", f"{self.path}/api-keys/{key}", token=self.session, status=None)
        await self.call("GET", f"/admin/v1/organizations/{self.session}/api-keys", token=self.session, status=None)
        headers = {"traceparent": key, "x-request-id": key, "user-agent": self.session, "idempotency-key": key}
        self.platform.engine.script.append(chat_document("kept"))
        await self.call("POST", CHAT, self._chat(), token=key, headers=headers)
        await self.call("GET", f"{self.path}/api-keys?page_token={self.session}", token=self.session, status=None)
        user = {"userName": self.new("password"), "password": self.new("password"), "schemas": ["x"]}
        await self.call("POST", "/scim/v2/Users", user, token=self.session, status=None)

    async def _explosions(self) -> None:
        """Handlers that fail with an exception which quotes what it was given."""
        credentials = {"email": f"{EXPLODING}@example.com", "password": self.new("password")}
        await self.call("POST", "/admin/v1/sessions", credentials, status=500)
        issuer = {
            "display_name": EXPLODING,
            "issuer_url": self.platform.issuer.url,
            "client_id": "platform",
            "client_secret": self.new("issuer secret"),
        }
        await self.call("POST", f"{self.path}/issuers", issuer, token=self.session, status=500)
        await self.call("POST", CHAT, self._chat(model=EXPLODING, user=self.key), token=self.key, status=500)
        webhooks = f"/analytics/v1/organizations/{self.organization_id}/webhooks"
        await self.call("GET", f"{webhooks}?page_size={EXPLODING_PAGE}", token=self.session, status=500)
        await self.call("GET", f"/v1/models?{EXPLODING}", token=self.key, status=500)

    async def _outage(self) -> None:
        """All of it once more without a database."""
        async with self.platform.away("postgres"):
            for email in (OWNER, "nobody@example.com"):
                credentials = {"email": email, "password": self.new("password")}
                await self.call("POST", "/admin/v1/sessions", credentials, status=503)
            await self.call("GET", f"{self.path}/api-keys", token=self.session, status=503)
            for path in ("token", "introspect"):
                form = {"grant_type": "refresh_token", "refresh_token": self.new("refresh token"), "token": "x"}
                auth = httpx.BasicAuth("oauth_1", self.new("client secret"))
                await self.call("POST", f"/oauth2/{path}", data=form, auth=auth, status=503)
            await self.platform.http.post(CHAT, json=self._chat(), headers={"authorization": f"Bearer {self.key}"})

    async def records(self) -> dict[str, list[bytes]]:
        """What an organization, and the platform, can read of what was done: entries of the audit log, page by page
        and as they are exported, and decisions of policies."""
        found: dict[str, list[bytes]] = {"audit": [], "decisions": []}
        for kind, path in (("audit", "audit-entries"), ("decisions", "policy-decisions")):
            token = ""
            while True:
                query = {"page_size": "200", **({"page_token": token} if token else {})}
                answer = await self.platform.call("GET", f"{self.path}/{path}", params=query, token=self.admin)
                found[kind].append(answer.content)
                if not (token := answer.json().get("next_page_token", "")):
                    break
        exported = await self.platform.call("GET", f"{self.path}/audit-entries:export", token=self.admin)
        found["audit"].append(exported.content)
        return found

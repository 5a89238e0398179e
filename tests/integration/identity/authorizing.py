"""A running identity behind a running edge, and the ways in which clients and browsers ask it for tokens."""

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlsplit

import asyncpg
import httpx
import pytest
from authlib.integrations.httpx_client import AsyncOAuth2Client
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from google.protobuf.field_mask_pb2 import FieldMask

from aiaas.identity.v1 import oauth_service_pb2 as pb
from aiaas.identity.v1 import oauth_service_pb2_grpc
from edge.browser import SESSION_COOKIE
from identity.principals import Principals
from mesh import tokens
from mesh.auth import Principal
from tests.doubles.peer import PeerDouble
from tests.integration.edge.harness import running_edge
from tests.integration.edge.reading import led_to, seen
from tests.integration.identity.harness import Identity, running_identity

CALLBACK = "https://app.example/callback"
SCOPE = "openid email profile inference.create usage.query"


@dataclass(frozen=True)
class _At:
    address: str


@dataclass(frozen=True)
class Client:
    """A registered client."""

    id: str
    secret: str

    @property
    def auth(self) -> httpx.BasicAuth:
        """What its requests carry."""
        return httpx.BasicAuth(self.id, self.secret)


@dataclass(frozen=True)
class Code:
    """A code and what belongs to it."""

    text: str
    verifier: str
    redirect_uri: str = CALLBACK


class Sessions:
    """Who is signed in, by the text of the session: a double of the way in."""

    def __init__(self) -> None:
        self._principals: dict[str, Principal] = {}

    def open(self, organization_id: str, user_id: str) -> str:
        """Sign somebody in; gives the session's text."""
        text = tokens.SESSION.generate().text
        self._principals[text] = Principal("user", user_id, organization_id, user_id=user_id)
        return text

    @contextmanager
    def accepted(self) -> Iterator[None]:
        """Have identity accept them."""
        judge, principals = Principals.authenticate, self._principals

        async def authenticate(self: Principals, credential: str) -> Principal:
            return principals[credential] if credential in principals else await judge(self, credential)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Principals, "authenticate", authenticate)
            yield


@dataclass
class Provider:
    """The provider, an organization of it and a member who is signed in."""

    identity: Identity
    http: httpx.AsyncClient
    stub: oauth_service_pb2_grpc.OauthServiceStub
    database_url: str
    sessions: Sessions
    organization_id: str = ""
    user_id: str = ""
    session: str = field(default="", repr=False)

    @property
    def base_url(self) -> str:
        """Where the edge is."""
        return str(self.http.base_url).rstrip("/")

    async def client(self, kind: str = "CONFIDENTIAL", organization_id: str = "", **fields: Any) -> Client:
        """A new client; by code and refresh unless told."""
        wanted: dict[str, Any] = {
            "display_name": "App",
            "kind": f"OAUTH_CLIENT_KIND_{kind}",
            "redirect_uris": [CALLBACK],
            "grant_types": ["OAUTH_GRANT_TYPE_AUTHORIZATION_CODE", "OAUTH_GRANT_TYPE_REFRESH_TOKEN"],
            "scopes": SCOPE.split(),
            **fields,
        }
        request = pb.CreateOauthClientRequest(
            organization_id=organization_id or self.organization_id, oauth_client=pb.OauthClient(**wanted)
        )
        made = await self.identity.call(self.stub.CreateOauthClient, request)
        return Client(made.oauth_client.oauth_client_id, made.client_secret)

    async def worker(self, *scopes: str, role_ids: tuple[str, ...] = ("developer",)) -> Client:
        """A new client that acts as a service account."""
        account = await self.identity.service_account(self.organization_id, secrets.token_hex(4), role_ids)
        return await self.client(
            redirect_uris=[],
            grant_types=["OAUTH_GRANT_TYPE_CLIENT_CREDENTIALS"],
            scopes=scopes,
            service_account_id=account.service_account_id,
        )

    async def update(self, client: Client, **fields: Any) -> None:
        """Change a client."""
        request = pb.UpdateOauthClientRequest(
            organization_id=self.organization_id,
            oauth_client_id=client.id,
            oauth_client=pb.OauthClient(**fields),
            update_mask=FieldMask(paths=list(fields)),
        )
        await self.identity.call(self.stub.UpdateOauthClient, request)

    async def visit(self, parameters: dict[str, str], *, session: str | None = None) -> httpx.Response:
        """What a browser is answered."""
        cookie = {"cookie": f"{SESSION_COOKIE}={self.session if session is None else session}"}
        return await self.http.get("/oauth2/authorize", params=parameters, headers=cookie)

    async def choose(self, parameters: dict[str, str], asked: httpx.Response, consent: str = "allow") -> httpx.Response:
        """What a browser is answered when its user has chosen."""
        return await self.http.post(
            "/oauth2/authorize",
            data={**parameters, "consent_token": consent_token_of(asked), "consent": consent},
            headers={"cookie": f"{SESSION_COOKIE}={self.session}", "sec-fetch-site": "same-origin"},
        )

    async def consented(self, parameters: dict[str, str]) -> str:
        """Where the browser goes after the user has allowed what was asked."""
        answer = await self.visit(parameters)
        if answer.status_code == 200:
            answer = await self.choose(parameters, answer)
        return led_to(answer)

    async def code(self, client: Client, **parameters: str) -> Code:
        """A new code."""
        verifier = secrets.token_urlsafe(48)
        location = await self.consented(asked_by(client, verifier, **parameters))
        return Code(parse_qs(urlsplit(location).query)["code"][0], verifier)

    async def post(self, path: str, client: Client, **form: str) -> httpx.Response:
        """What a client is answered; a public one tells its id."""
        if client.secret:
            return await self.http.post(f"/oauth2/{path}", data=form, auth=client.auth)
        return await self.http.post(f"/oauth2/{path}", data={"client_id": client.id, **form})

    async def exchange(self, client: Client, code: Code, **form: str) -> httpx.Response:
        """The answer to a code."""
        wanted = {"code": code.text, "redirect_uri": code.redirect_uri, "code_verifier": code.verifier, **form}
        return await self.post("token", client, grant_type="authorization_code", **wanted)

    async def tokens(self, client: Client, **parameters: str) -> dict[str, Any]:
        """New tokens of the member."""
        return granted(await self.exchange(client, await self.code(client, **parameters)))

    async def refresh(self, client: Client, refresh_token: str, **form: str) -> httpx.Response:
        """The answer to a refresh token."""
        return await self.post("token", client, grant_type="refresh_token", refresh_token=refresh_token, **form)

    async def is_accepted(self, access_token: str) -> bool:
        """Whether an access token says who calls."""
        return not await self.identity.is_refused(access_token)

    async def execute(self, statement: str, *arguments: object) -> None:
        """Change what only time changes."""
        connection = await asyncpg.connect(self.database_url)
        try:
            await connection.execute(statement, *arguments)
        finally:
            await connection.close()

    def authlib(self, client: Client, **options: Any) -> AsyncOAuth2Client:
        """Authlib's own client."""
        return AsyncOAuth2Client(client.id, client.secret or None, trust_env=False, timeout=10, **options)


def asked_by(client: Client, verifier: str, **parameters: str) -> dict[str, str]:
    """The parameters of a request for a code."""
    wanted = {
        "response_type": "code",
        "client_id": client.id,
        "redirect_uri": CALLBACK,
        "scope": SCOPE,
        "state": "xyz",
        "code_challenge": create_s256_code_challenge(verifier),
        "code_challenge_method": "S256",
        **parameters,
    }
    return {name: value for name, value in wanted.items() if value}


def query_of(location: str) -> dict[str, str]:
    """What an address tells the client."""
    return dict(parse_qsl(urlsplit(location).query))


def granted(answer: httpx.Response) -> dict[str, Any]:
    """The tokens of an answer that has some."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    told: dict[str, Any] = answer.json()
    return told


def consent_token_of(answer: httpx.Response) -> str:
    """The token of a page that asks for consent."""
    return seen(answer).kept["consent_token"]


def error_shown(answer: httpx.Response) -> str:
    """Why the user is not sent on, by the name that OAuth2 has for it."""
    page = seen(answer, 400)
    assert "location" not in answer.headers
    return page.text.partition("(")[2].partition(")")[0]


def error_of(answer: httpx.Response, status: int = 400) -> str:
    """Why an answer is a refusal."""
    assert answer.status_code == status, answer.text
    told: str = answer.json()["error"]
    return told


@asynccontextmanager
async def running_provider(
    database_url: str, folder: Path, sessions: Sessions, *, identity_database_url: str = "", restarted: bool = False
) -> AsyncIterator[Provider]:
    """The whole provider over a migrated database, without an organization yet."""
    double = PeerDouble(f"unix:{folder}/others.sock")
    await double.start()
    try:
        with sessions.accepted():
            async with running_identity(identity_database_url or database_url, folder, restarted=restarted) as identity:
                peers: Any = {
                    "identity": _At(f"unix:{folder}/identity.sock"),
                    "router": double,
                    "analytics": double,
                }
                async with (
                    running_edge(peers) as edge,
                    httpx.AsyncClient(base_url=edge.client.base_url, trust_env=False, timeout=15) as http,
                ):
                    stub = oauth_service_pb2_grpc.OauthServiceStub(identity.channel)
                    yield Provider(identity, http, stub, database_url, sessions)
    finally:
        await double.stop()


async def inhabit(provider: Provider) -> None:
    """Give the provider an organization with a member who is signed in."""
    provider.organization_id = await provider.identity.organization()
    member = await provider.identity.member(provider.organization_id, "developer", "ada@example.com")
    provider.user_id = member.user_id
    provider.session = provider.sessions.open(provider.organization_id, member.user_id)

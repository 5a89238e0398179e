"""Signing in at issuers that organizations trust: who is let in as whom, and everything that is not believed."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from identity.federation import BEGUN_S, Federation
from identity.granted_roles import GroupRoles, RoleRules
from identity.issuer_client import IssuerClient
from identity.issuers import ClaimNames, Issuer, Issuers
from identity.organizations import Organization, Organizations
from identity.revocations import Revocation
from identity.roles import ALL_PERMISSIONS, BUILT_IN, PLATFORM_ORGANIZATION_ID, TENANT_PERMISSIONS
from identity.stores import Store, Transaction, open_database
from identity.throttles import ISSUER, Throttles
from identity.users import User, Users
from mesh.auth import Principal
from mesh.context import client_address
from mesh.errors import PlatformError, Reason
from mesh.sealing import Seal
from tests.doubles.clock import ManualClock
from tests.doubles.openid_issuer import CLIENT_ID, CLIENT_SECRET, OpenIdIssuer, new_key
from tests.integration.identity.harness import SECRET_KEY

REDIRECT_URI = "https://platform.example.com/federation/callback"
ADA = {"sub": "ada", "email": "ada@example.com", "email_verified": True, "name": "Ada"}
Change = Callable[[dict[str, Any]], None]


@dataclass
class Opened:
    """The sessions that were asked for."""

    users: list[tuple[str, str, bool, str]] = field(default_factory=list)

    async def open(
        self, stored: Transaction, user_id: str, organization_id: str, *, multi_factor: bool, issuer_id: str
    ) -> str:
        self.users.append((user_id, organization_id, multi_factor, issuer_id))
        return user_id


@dataclass
class World:
    """An organization, its owner, and an issuer of its own."""

    organization_id: str
    store: Store
    clock: ManualClock
    client: IssuerClient
    issuers: Issuers
    federation: Federation[str]
    opened: Opened
    openid: OpenIdIssuer
    revoked: list[Revocation]

    @property
    def owner(self) -> Principal:
        return Principal("user", "user_1", self.organization_id, permissions=TENANT_PERMISSIONS)

    async def issuer(self, caller: Principal | None = None, **fields: Any) -> Issuer:
        wanted = Issuer("", self.organization_id, "Ours", self.openid.url, CLIENT_ID, **fields)
        return await self.issuers.create(caller or self.owner, wanted, CLIENT_SECRET, "")

    async def sign_in(self, issuer: Issuer, claims: dict[str, Any] = ADA, change: Change = lambda _: None) -> str:
        self.openid.claims, self.openid.change = claims, change
        redirect_uri, browser_token = await self.federation.begin(issuer.issuer_id, "/console")
        parameters = self.openid.sign_in(redirect_uri)
        user_id, return_path = await self.federation.finish(parameters, browser_token)
        assert return_path == "/console"
        return user_id

    async def refused(self, issuer: Issuer, claims: dict[str, Any] = ADA, change: Change = lambda _: None) -> str:
        with pytest.raises(PlatformError) as raised:
            await self.sign_in(issuer, claims, change)
        assert raised.value.reason is Reason.SIGN_IN_REFUSED
        assert self.opened.users == []
        return raised.value.message

    async def member(self, email: str = "ada@example.com", *role_ids: str) -> str:
        wanted = User("", self.organization_id, email, role_ids=role_ids)
        return (await Users(self.store, self.clock).create(self.owner, wanted, "")).user_id

    async def roles(self, user_id: str) -> set[str]:
        return set((await Users(self.store, self.clock).get(self.organization_id, user_id)).role_ids)


async def new_organization(store: Store, clock: ManualClock) -> str:
    platform = Principal("user", "user_1", PLATFORM_ORGANIZATION_ID, permissions=ALL_PERMISSIONS, platform=True)
    async with store.transaction() as stored:
        await stored.organizations.add(Organization(PLATFORM_ORGANIZATION_ID, "Platform"))
    return (await Organizations(store, clock).create(platform, Organization("", "Tenant"), "")).organization_id


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    clock = ManualClock(datetime.now(UTC))
    revoked: list[Revocation] = []

    async def announce(revocation: Revocation) -> None:
        revoked.append(revocation)

    database = open_database(database_url)
    store, seal, opened = Store(database, announce), Seal(SECRET_KEY), Opened()
    organization_id = await new_organization(store, clock)
    async with OpenIdIssuer() as openid, IssuerClient(clock, allow_private=True) as client:
        issuers = Issuers(store, clock, client, seal, allow_private=True)
        federation = Federation(store, clock, client, seal, opened, Throttles(store, clock), REDIRECT_URI)
        yield World(organization_id, store, clock, client, issuers, federation, opened, openid, revoked)
    await database.close()


async def test_verified_address_of_a_member_is_that_member_from_then_on_whatever_its_address_becomes(
    world: World,
) -> None:
    user_id = await world.member()
    issuer = await world.issuer()
    assert await world.sign_in(issuer) == user_id
    assert await world.sign_in(issuer, {"sub": "ada", "email": "other@example.com", "email_verified": False}) == user_id
    assert world.opened.users == [(user_id, world.organization_id, False, issuer.issuer_id)] * 2


async def test_sign_ins_at_issuers_are_begun_from_one_network_only_so_often(world: World) -> None:
    issuer = await world.issuer()

    for number in range(ISSUER.free_of_address):
        client_address.set(f"2001:db8::{number:x}")
        await world.federation.begin(issuer.issuer_id, "/")
    client_address.set("2001:db8::ffff")
    with pytest.raises(PlatformError) as raised:
        await world.federation.begin(issuer.issuer_id, "/")
    assert raised.value.reason is Reason.RATE_LIMIT_EXCEEDED, "a /64 is one customer's"
    client_address.set("2001:db8:1::1")
    await world.federation.begin(issuer.issuer_id, "/")


async def test_unverified_address_takes_over_nobody_and_makes_nobody(world: World) -> None:
    await world.member()
    issuer = await world.issuer(create_users=True)
    for verified in ({}, {"email_verified": False}, {"email_verified": "true"}, {"email_verified": 1}):
        await world.refused(issuer, {"sub": "mallory", "email": "ada@example.com"} | verified)
        await world.refused(issuer, {"sub": "mallory", "email": "new@example.com"} | verified)


async def test_a_claim_of_the_issuers_own_has_to_be_verified_itself(world: World) -> None:
    user_id = await world.member()
    issuer = await world.issuer(claim_names=ClaimNames(email="upn"))
    claims = {**ADA, "email": "mallory@example.com", "upn": "ada@example.com"}
    await world.refused(issuer, claims)
    assert await world.sign_in(issuer, {**claims, "upn_verified": True}) == user_id


async def test_users_are_made_only_where_the_issuer_makes_them_and_of_its_domains(world: World) -> None:
    closed = await world.issuer()
    await world.refused(closed)
    issuer = await world.issuer(create_users=True, email_domains=("example.com",))
    for email in ("ada@example.org", "ada@sub.example.com", "ada@example.com.example.org"):
        await world.refused(issuer, {**ADA, "email": email})
    user_id = await world.sign_in(issuer, {**ADA, "email": "ada@EXAMPLE.com"})
    assert (await Users(world.store, world.clock).get(world.organization_id, user_id)).display_name == "Ada"


async def test_another_organizations_member_becomes_one_here_and_its_session_stays_here(world: World) -> None:
    other_id = await new_organization(world.store, world.clock)
    wanted = User("", other_id, "ada@example.com", role_ids=("developer",))
    other = await Users(world.store, world.clock).create(world.owner, wanted, "")
    issuer = await world.issuer()
    await world.refused(issuer)
    issuer = await world.issuer(create_users=True)
    assert await world.sign_in(issuer) == other.user_id
    assert world.opened.users == [(other.user_id, world.organization_id, False, issuer.issuer_id)]
    assert await world.roles(other.user_id) == set()


def _none_alg(openid: OpenIdIssuer) -> None:
    openid.alg = "none"


def _hmac(openid: OpenIdIssuer) -> None:
    openid.alg = "HS256"


def _stranger(openid: OpenIdIssuer) -> None:
    openid.published = [new_key("one")]


def _unknown_key(openid: OpenIdIssuer) -> None:
    openid.rotate("two", publish=False)


@pytest.mark.parametrize("spoil", [_none_alg, _hmac, _stranger, _unknown_key])
async def test_token_that_the_issuers_key_did_not_sign_is_refused(
    world: World, spoil: Callable[[OpenIdIssuer], None]
) -> None:
    await world.member()
    issuer = await world.issuer()
    spoil(world.openid)
    await world.refused(issuer)


async def test_rotated_key_is_fetched_when_a_token_names_it(world: World) -> None:
    await world.member()
    issuer = await world.issuer()
    await world.sign_in(issuer)
    world.openid.rotate("two", publish=False)
    with pytest.raises(PlatformError):
        await world.sign_in(issuer)
    world.openid.published = [world.openid.key]
    await world.sign_in(issuer)
    world.openid.asked.clear()
    await world.sign_in(issuer)
    assert world.openid.asked == ["token"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"nonce": "another"},
        {"nonce": None},
        {"aud": "another"},
        {"aud": [CLIENT_ID, "another"]},
        {"azp": "another"},
        {"iss": "http://127.0.0.1:1"},
        {"exp": 1},
        {"exp": None},
        {"iat": 1},
        {"iat": 32503680000},
        {"nbf": 32503680000},
        {"sub": None},
        {"sub": ""},
        {"sub": 7},
        {"sub": "x" * 256},
    ],
    ids=str,
)
async def test_token_with_a_wrong_claim_is_refused(world: World, wrong: dict[str, Any]) -> None:
    await world.member()
    issuer = await world.issuer()

    def change(claims: dict[str, Any]) -> None:
        for name, value in wrong.items():
            claims.pop(name, None)
            if value is not None:
                claims[name] = value

    await world.refused(issuer, ADA, change)


async def test_clock_that_is_a_little_off_is_accepted(world: World) -> None:
    await world.member()
    issuer = await world.issuer()
    now = int(world.clock.now().timestamp())
    assert await world.sign_in(issuer, ADA, lambda claims: claims.update(iat=now + 50, exp=now - 50))


async def test_answer_is_used_once_by_the_same_browser_and_in_time(world: World) -> None:
    await world.member()
    issuer = await world.issuer()
    world.openid.claims = ADA

    async def begun() -> tuple[list[tuple[str, str]], str]:
        redirect_uri, browser_token = await world.federation.begin(issuer.issuer_id, "")
        return world.openid.sign_in(redirect_uri), browser_token

    async def is_refused(parameters: list[tuple[str, str]], browser_token: str) -> bool:
        try:
            await world.federation.finish(parameters, browser_token)
        except PlatformError as error:
            return error.reason is Reason.SIGN_IN_REFUSED
        return False

    parameters, browser_token = await begun()
    assert (await world.federation.finish(parameters, browser_token))[1] == "/"
    assert await is_refused(parameters, browser_token)
    parameters, browser_token = await begun()
    assert await is_refused(parameters, "another browser's")
    assert await is_refused(parameters, browser_token)
    parameters, browser_token = await begun()
    assert await is_refused([*parameters, ("code", "another")], browser_token)
    assert await is_refused([*parameters, ("iss", "https://mixed.example.com")], browser_token)
    parameters, browser_token = await begun()
    assert await is_refused([("state", dict(parameters)["state"]), ("error", "access_denied")], browser_token)
    parameters, browser_token = await begun()
    world.clock.advance(BEGUN_S)
    assert await is_refused(parameters, browser_token)
    assert await is_refused([], "")


async def test_another_sign_ins_code_is_worth_nothing(world: World) -> None:
    await world.member()
    issuer = await world.issuer()
    world.openid.claims = ADA
    theirs, _ = await world.federation.begin(issuer.issuer_id, "")
    stolen = dict(world.openid.sign_in(theirs))["code"]
    own, browser_token = await world.federation.begin(issuer.issuer_id, "")
    state = parse_qs(urlsplit(own).query)["state"][0]
    with pytest.raises(PlatformError) as raised:
        await world.federation.finish([("state", state), ("code", stolen)], browser_token)
    assert raised.value.reason is Reason.SIGN_IN_REFUSED


async def test_mfa_counts_only_if_reported_and_trusted(world: World) -> None:
    await world.member()
    trusted, untrusted = await world.issuer(trust_mfa=True), await world.issuer()
    for issuer, amr in ((trusted, ["pwd", "mfa"]), (trusted, ["pwd"]), (trusted, "mfa"), (untrusted, ["mfa"])):
        await world.sign_in(issuer, {**ADA, "amr": amr})
    assert [multi_factor for _, _, multi_factor, _ in world.opened.users] == [True, False, True, False]


async def test_groups_give_and_take_roles_but_not_those_given_by_hand(world: World) -> None:
    user_id = await world.member("ada@example.com", "analyst")
    rules = RoleRules((GroupRoles("eng", ("developer", "analyst")), GroupRoles("money", ("finance",))), ())
    issuer = await world.issuer(rules=rules)
    await world.sign_in(issuer, {**ADA, "groups": ["eng", "ENG", "others", 7]})
    assert await world.roles(user_id) == {"analyst", "developer"}
    await world.sign_in(issuer, {**ADA, "groups": "money"})
    assert await world.roles(user_id) == {"analyst", "finance"}
    await world.sign_in(issuer)
    assert await world.roles(user_id) == {"analyst"}


async def test_issuer_vouches_for_nobody_who_holds_more_than_who_set_it_up(world: World) -> None:
    await world.member("ada@example.com", "owner")
    admin = replace(world.owner, permissions=BUILT_IN["admin"].permissions)
    issuer = await world.issuer(admin)
    assert "owners" in await world.refused(issuer)
    await world.issuers.update(world.owner, replace(issuer, scopes=("email",)), "", ("scopes",), "")
    assert await world.sign_in(issuer)
    await world.issuers.update(admin, replace(issuer, scopes=("profile",)), "", ("scopes",), "")
    world.opened.users.clear()
    await world.refused(issuer)


async def test_rules_give_what_who_writes_them_holds(world: World) -> None:
    admin = replace(world.owner, permissions=BUILT_IN["admin"].permissions)
    for rules, name in (
        (RoleRules((), ("owner",)), "issuer.default_role_ids"),
        (RoleRules((GroupRoles("x", ("owner",)),)), "issuer.group_roles[0].role_ids"),
    ):
        with pytest.raises(PlatformError) as raised:
            await world.issuer(admin, rules=rules)
        assert (raised.value.reason, raised.value.field) == (Reason.PERMISSION_DENIED, name)


async def test_disabled_or_deleted_issuer_lets_nobody_in_and_what_it_let_in_is_revoked(world: World) -> None:
    user_id = await world.member()
    issuer = await world.issuer()
    await world.sign_in(issuer)
    redirect_uri, browser_token = await world.federation.begin(issuer.issuer_id, "")
    parameters = world.openid.sign_in(redirect_uri)
    world.revoked.clear()
    await world.issuers.update(world.owner, replace(issuer, disabled=True), "", ("disabled",), "")
    assert [(each.subject, each.id) for each in world.revoked] == [("user_id", user_id)]
    with pytest.raises(PlatformError) as raised:
        await world.federation.finish(parameters, browser_token)
    assert raised.value.reason is Reason.SIGN_IN_REFUSED
    with pytest.raises(PlatformError) as raised:
        await world.federation.begin(issuer.issuer_id, "")
    assert raised.value.reason is Reason.NOT_FOUND
    assert await world.issuers.problems(world.organization_id, issuer.issuer_id) == ["The issuer is disabled."]
    await world.issuers.delete(world.organization_id, issuer.issuer_id, "")
    with pytest.raises(PlatformError):
        await world.issuers.get(world.organization_id, issuer.issuer_id)


async def test_client_secret_is_told_to_nobody_else(world: World) -> None:
    issuer = await world.issuer()
    elsewhere = replace(issuer, issuer_url="https://elsewhere.example.com")
    with pytest.raises(PlatformError) as raised:
        await world.issuers.update(world.owner, elsewhere, "", ("issuer_url",), "")
    assert raised.value.field == "issuer.client_secret"
    assert issuer.client_secret is not None
    assert CLIENT_SECRET.encode() not in issuer.client_secret


async def test_issuers_are_offered_by_domain_alone(world: World) -> None:
    await world.issuer()
    issuer = await world.issuer(email_domains=("example.com",))
    assert [each.issuer_id for each in await world.federation.offers("nobody@Example.com")] == [issuer.issuer_id]
    assert await world.federation.offers("nobody@example.org") == []


@pytest.mark.parametrize(
    "path", ["//evil.example.com", "/\\evil.example.com", "https://evil.example.com", "x", "/ ", "/\n"]
)
async def test_return_path_leads_nowhere_else(world: World, path: str) -> None:
    issuer = await world.issuer()
    with pytest.raises(PlatformError) as raised:
        await world.federation.begin(issuer.issuer_id, path)
    assert raised.value.field == "return_path"


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        ({"status": 500}, "metadata were answered 500"),
        ({"redirect": "http://127.0.0.1:1/"}, "metadata were answered 302"),
        ({"padding": 300_000}, "too long"),
        ({"metadata": {"issuer": "https://another.example.com"}}, "another address"),
        ({"metadata": {"jwks_uri": "ftp://x"}}, "must begin with"),
        ({"metadata": {"token_endpoint": 7}}, "not what OpenID Connect has them be"),
        ({"metadata": {"id_token_signing_alg_values_supported": ["none", "HS256"]}}, "no algorithm"),
        ({"metadata": {"code_challenge_methods_supported": ["plain"]}}, "PKCE"),
    ],
    ids=str,
)
async def test_check_says_what_is_wrong_with_an_issuer(world: World, spoil: dict[str, Any], problem: str) -> None:
    issuer = await world.issuer()
    assert await world.issuers.problems(world.organization_id, issuer.issuer_id) == []
    for name, value in spoil.items():
        setattr(world.openid, name, value)
    (found,) = await world.issuers.problems(world.organization_id, issuer.issuer_id)
    assert problem in found


async def test_issuer_that_is_away_is_no_verdict(world: World) -> None:
    await world.member()
    issuer = await world.issuer()
    world.openid.claims = ADA
    redirect_uri, browser_token = await world.federation.begin(issuer.issuer_id, "")
    parameters = world.openid.sign_in(redirect_uri)
    await world.openid.__aexit__(None, None, None)
    with pytest.raises(PlatformError) as raised:
        await world.federation.finish(parameters, browser_token)
    assert raised.value.reason is Reason.UNAVAILABLE


async def test_private_addresses_are_not_asked(world: World) -> None:
    async with IssuerClient(world.clock, allow_private=False) as client:
        for url in (world.openid.url, "https://127.0.0.1:1", "https://localhost", "https://10.0.0.1"):
            (problem,) = await client.problems(url)
            assert "must" in problem
    assert world.openid.asked == []

"""The tables of issuers, of who their subjects are, and of sign-ins that have begun; it never decides whom to trust."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from datetime import datetime

import msgspec

from identity.granted_roles import GroupRoles, RoleRules
from identity.issuers import BegunSignIn, ClaimNames, Issuer, IssuerUser
from identity.stores.rows import Connection, Query, Row, found
from mesh.pages import TimePlace

_COLUMNS = (
    "issuer_id, organization_id, display_name, issuer_url, client_id, client_secret, scopes, email_domains,"
    " claim_names, group_roles, default_role_ids, withheld, create_users, trust_mfa, disabled, create_time,"
    " update_time, revision"
)


class IssuerRows:
    """Issuers, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, issuer: Issuer) -> None:
        """Store a new issuer."""
        await self._connection.execute(
            f"INSERT INTO issuers ({_COLUMNS})"
            " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, 1)",
            *_values(issuer),
            issuer.create_time,
            issuer.update_time,
        )

    async def get(self, organization_id: str, issuer_id: str) -> Issuer | None:
        """One issuer."""
        row = await self._connection.fetchrow(
            f"SELECT {_COLUMNS} FROM issuers WHERE organization_id = $1 AND issuer_id = $2", organization_id, issuer_id
        )
        return None if row is None else _issuer_of(row)

    async def enabled(self, issuer_id: str) -> Issuer | None:
        """One issuer that people can sign in through. Its organization is what is asked, so it cannot name one."""
        row = await self._connection.fetchrow(
            f"SELECT {_COLUMNS} FROM issuers WHERE issuer_id = $1 AND NOT disabled AND organization_id IN"
            " (SELECT organization_id FROM organizations WHERE state = 'active')",
            issuer_id,
        )
        return None if row is None else _issuer_of(row)

    async def offered(self, email_domain: str, limit: int) -> list[Issuer]:
        """The issuers of every organization that an address of this domain is offered, in the order of their names."""
        rows = await self._connection.fetch(
            f"SELECT {_COLUMNS} FROM issuers WHERE email_domains @> ARRAY[$1] AND NOT disabled AND organization_id IN"
            f" (SELECT organization_id FROM organizations WHERE state = 'active')"
            f" ORDER BY display_name, issuer_id LIMIT {limit:d}",
            email_domain,
        )
        return [_issuer_of(row) for row in rows]

    async def page(self, organization_id: str, after: TimePlace | None, limit: int) -> list[Issuer]:
        """Issuers of an organization, oldest first."""
        query = Query()
        query.where("organization_id = {}", organization_id)
        if after is not None:
            query.where("(create_time, issuer_id) > ({}, {})", after.create_time, after.id)
        rows = await self._connection.fetch(
            f"SELECT {_COLUMNS} FROM issuers WHERE {query} ORDER BY create_time, issuer_id LIMIT {limit:d}",
            *query.values,
        )
        return [_issuer_of(row) for row in rows]

    async def change(self, issuer: Issuer) -> Issuer:
        """Store what changed of an issuer that is there; gives it with its new revision."""
        row = await self._connection.fetchrow(
            "UPDATE issuers SET display_name = $3, issuer_url = $4, client_id = $5, client_secret = $6, scopes = $7,"
            " email_domains = $8, claim_names = $9, group_roles = $10, default_role_ids = $11, withheld = $12,"
            " create_users = $13, trust_mfa = $14, disabled = $15, update_time = $16, revision = revision + 1"
            f" WHERE issuer_id = $1 AND organization_id = $2 RETURNING {_COLUMNS}",
            *_values(issuer),
            issuer.update_time,
        )
        return _issuer_of(found(row))

    async def remove(self, organization_id: str, issuer_id: str) -> None:
        """Remove an issuer, and who its subjects are."""
        await self._connection.execute(
            "DELETE FROM issuers WHERE organization_id = $1 AND issuer_id = $2", organization_id, issuer_id
        )


class IssuerUserRows:
    """Who the subjects of issuers are, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def get(self, organization_id: str, issuer_id: str, subject: str) -> IssuerUser | None:
        """Who a subject is."""
        row = await self._connection.fetchrow(
            "SELECT * FROM issuer_users WHERE organization_id = $1 AND issuer_id = $2 AND subject = $3",
            organization_id,
            issuer_id,
            subject,
        )
        return None if row is None else IssuerUser(**{**row, "role_ids": tuple(row["role_ids"])})

    async def put(self, user: IssuerUser) -> None:
        """Note who a subject is, or the roles that it was given."""
        await self._connection.execute(
            "INSERT INTO issuer_users (organization_id, issuer_id, subject, user_id, role_ids, create_time)"
            " VALUES ($1, $2, $3, $4, $5, $6)"
            " ON CONFLICT (issuer_id, subject) DO UPDATE SET role_ids = excluded.role_ids",
            user.organization_id,
            user.issuer_id,
            user.subject,
            user.user_id,
            user.role_ids,
            user.create_time,
        )

    async def user_ids(self, organization_id: str, issuer_id: str) -> list[str]:
        """Everybody whom an issuer knows."""
        rows = await self._connection.fetch(
            "SELECT DISTINCT user_id FROM issuer_users WHERE organization_id = $1 AND issuer_id = $2",
            organization_id,
            issuer_id,
        )
        return [row["user_id"] for row in rows]

    async def remove_of_issuer(self, organization_id: str, issuer_id: str) -> None:
        """Forget who the subjects of an issuer are."""
        await self._connection.execute(
            "DELETE FROM issuer_users WHERE organization_id = $1 AND issuer_id = $2", organization_id, issuer_id
        )


class IssuerSignInRows:
    """Sign-ins that have begun, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, sign_in: BegunSignIn, now: datetime) -> None:
        """Store a sign-in, and forget those whose time is over."""
        await self._connection.execute("DELETE FROM issuer_sign_ins WHERE expire_time <= $1", now)
        await self._connection.execute(
            "INSERT INTO issuer_sign_ins (state_digest, browser_digest, organization_id, issuer_id, secrets,"
            " return_path, expire_time) VALUES ($1, $2, $3, $4, $5, $6, $7)",
            sign_in.state_digest,
            sign_in.browser_digest,
            sign_in.organization_id,
            sign_in.issuer_id,
            sign_in.secrets,
            sign_in.return_path,
            sign_in.expire_time,
        )

    async def take(self, state_digest: bytes) -> BegunSignIn | None:
        """The sign-in that began with this state; nobody gets it again."""
        row = await self._connection.fetchrow(
            "DELETE FROM issuer_sign_ins WHERE state_digest = $1 RETURNING *", state_digest
        )
        return None if row is None else BegunSignIn(**row)


def rules_of(row: Row) -> RoleRules:
    """The rules in the columns group_roles and default_role_ids."""
    return RoleRules(
        group_roles=tuple(msgspec.json.decode(row["group_roles"], type=list[GroupRoles])),
        default_role_ids=tuple(row["default_role_ids"]),
    )


def group_roles_to_json(rules: RoleRules) -> str:
    """What groups give, as it is stored."""
    return msgspec.json.encode(rules.group_roles).decode()


def _values(issuer: Issuer) -> tuple[object, ...]:
    return (
        issuer.issuer_id,
        issuer.organization_id,
        issuer.display_name,
        issuer.issuer_url,
        issuer.client_id,
        issuer.client_secret,
        issuer.scopes,
        issuer.email_domains,
        msgspec.json.encode(issuer.claim_names).decode(),
        group_roles_to_json(issuer.rules),
        issuer.rules.default_role_ids,
        sorted(issuer.withheld),
        issuer.create_users,
        issuer.trust_mfa,
        issuer.disabled,
    )


def _issuer_of(row: Row) -> Issuer:
    return Issuer(
        issuer_id=row["issuer_id"],
        organization_id=row["organization_id"],
        display_name=row["display_name"],
        issuer_url=row["issuer_url"],
        client_id=row["client_id"],
        client_secret=row["client_secret"],
        scopes=tuple(row["scopes"]),
        email_domains=tuple(row["email_domains"]),
        claim_names=msgspec.json.decode(row["claim_names"], type=ClaimNames),
        rules=rules_of(row),
        withheld=frozenset(row["withheld"]),
        create_users=row["create_users"],
        trust_mfa=row["trust_mfa"],
        disabled=row["disabled"],
        create_time=row["create_time"],
        update_time=row["update_time"],
        revision=row["revision"],
    )

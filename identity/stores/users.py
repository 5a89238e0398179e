"""The tables of users and of their memberships; it never decides who becomes a member."""

from __future__ import annotations

from datetime import datetime

from identity.stores.rows import Connection, Query, Row, found
from identity.users import User, UserState
from mesh.pages import TimePlace

_MEMBERS = (
    "SELECT m.organization_id, m.user_id, u.email, m.display_name, m.role_ids, u.state, m.create_time, m.update_time,"
    " m.revision FROM memberships m JOIN users u USING (user_id)"
)


class UserRows:
    """Users as members of organizations, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def known_or_new(self, email: str, user_id: str, now: datetime) -> tuple[str, str, UserState]:
        """Id, address and state of the user with this address, made with `user_id` if there is none.

        One of the queries that name no organization: a user exists once on the platform.
        """
        row = await self._connection.fetchrow(
            "INSERT INTO users (user_id, email, create_time) VALUES ($1, $2, $3)"
            # The update changes nothing; it makes the row that is there come back.
            " ON CONFLICT (lower(email)) DO UPDATE SET email = users.email RETURNING user_id, email, state",
            user_id,
            email,
            now,
        )
        user = found(row)
        return user["user_id"], user["email"], UserState(user["state"])

    async def is_known(self, email: str) -> bool:
        """Whether there is a user with this address, in whichever organization."""
        known: bool = await self._connection.fetchval(
            "SELECT EXISTS (SELECT FROM users WHERE lower(email) = lower($1))", email
        )
        return known

    async def is_member(self, organization_id: str, email: str) -> bool:
        """Whether the user with this address is a member."""
        member: bool = await self._connection.fetchval(
            "SELECT EXISTS (SELECT FROM memberships JOIN users USING (user_id)"
            " WHERE organization_id = $1 AND lower(email) = lower($2))",
            organization_id,
            email,
        )
        return member

    async def add_membership(self, user: User) -> bool:
        """Store a new membership; False if there is one."""
        row = await self._connection.fetchrow(
            "INSERT INTO memberships (organization_id, user_id, display_name, role_ids, create_time, update_time)"
            " VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING RETURNING user_id",
            user.organization_id,
            user.user_id,
            user.display_name,
            user.role_ids,
            user.create_time,
            user.update_time,
        )
        return row is not None

    async def get(self, organization_id: str, user_id: str) -> User | None:
        """One member."""
        row = await self._connection.fetchrow(
            f"{_MEMBERS} WHERE m.organization_id = $1 AND m.user_id = $2", organization_id, user_id
        )
        return None if row is None else _user_of(row)

    async def page(
        self, organization_id: str, after: TimePlace | None, limit: int, email: str, role_id: str
    ) -> list[User]:
        """Members oldest first, only those with this address and this role where given."""
        query = Query()
        query.where("m.organization_id = {}", organization_id)
        if after is not None:
            query.where("(m.create_time, m.user_id) > ({}, {})", after.create_time, after.id)
        if email:
            query.where("lower(u.email) = lower({})", email)
        if role_id:
            query.where("m.role_ids @> ARRAY[{}]", role_id)
        rows = await self._connection.fetch(
            f"{_MEMBERS} WHERE {query} ORDER BY m.create_time, m.user_id LIMIT {limit:d}", *query.values
        )
        return [_user_of(row) for row in rows]

    async def change(self, user: User) -> User:
        """Store what changed of a membership that is there; gives it with its new revision."""
        row = await self._connection.fetchrow(
            "UPDATE memberships SET display_name = $3, role_ids = $4, update_time = $5, revision = revision + 1"
            " FROM users u WHERE memberships.organization_id = $1 AND memberships.user_id = $2"
            " AND u.user_id = memberships.user_id RETURNING memberships.*, u.email, u.state",
            user.organization_id,
            user.user_id,
            user.display_name,
            user.role_ids,
            user.update_time,
        )
        return _user_of(found(row))

    async def remove_membership(self, organization_id: str, user_id: str) -> None:
        """Remove a membership; the user stays."""
        await self._connection.execute(
            "DELETE FROM memberships WHERE organization_id = $1 AND user_id = $2", organization_id, user_id
        )

    async def is_in_another(self, organization_id: str, user_id: str) -> bool:
        """Whether a user is a member of another organization than this one; it has to see all of them."""
        is_in: bool = await self._connection.fetchval(
            "SELECT EXISTS (SELECT FROM memberships WHERE user_id = $2 AND organization_id <> $1)",
            organization_id,
            user_id,
        )
        return is_in

    async def is_held_by_another(self, organization_id: str, role_id: str, user_id: str) -> bool:
        """Whether an active member other than this one holds the role."""
        held: bool = await self._connection.fetchval(
            "SELECT EXISTS (SELECT FROM memberships m JOIN users u USING (user_id)"
            " WHERE m.organization_id = $1 AND m.role_ids @> ARRAY[$2] AND m.user_id <> $3 AND u.state = 'active')",
            organization_id,
            role_id,
            user_id,
        )
        return held


def _user_of(row: Row) -> User:
    return User(
        user_id=row["user_id"],
        organization_id=row["organization_id"],
        email=row["email"],
        display_name=row["display_name"],
        role_ids=tuple(row["role_ids"]),
        state=UserState(row["state"]),
        create_time=row["create_time"],
        update_time=row["update_time"],
        revision=row["revision"],
    )

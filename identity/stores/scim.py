"""The tables of what directories keep: settings, users, groups and who is in them; it never decides who is what."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta

import msgspec

from identity.scim import ScimSettings
from identity.scim_documents import Condition, ScimGroup, ScimUser
from identity.scim_groups import DirectoryGroup
from identity.scim_users import DirectoryUser
from identity.stores.issuers import group_roles_to_json, rules_of
from identity.stores.rows import Connection, Query, Row, found

_NOTED_EVERY = timedelta(minutes=1)

# Members, and those whom the directory has deactivated: they have a row of scim_users and no membership.
_USERS = """
    SELECT u.user_id, u.email, m.user_id IS NOT NULL AS active,
        coalesce(s.user_name, u.email) AS user_name, s.external_id, coalesce(s.name, '{}') AS name,
        coalesce(m.display_name, s.display_name) AS display_name,
        coalesce(s.role_ids, '{}') AS role_ids, coalesce(s.kept_role_ids, '{}') AS kept_role_ids,
        least(m.create_time, s.create_time) AS create_time, greatest(m.update_time, s.update_time) AS update_time
    FROM (SELECT * FROM memberships WHERE organization_id = $1) m
    FULL JOIN (SELECT * FROM scim_users WHERE organization_id = $1) s USING (user_id)
    JOIN users u USING (user_id)
"""
_USER_CONDITIONS: Mapping[str, str] = {
    "id": "user_id = {}",
    "username": "lower(user_name) = lower({})",
    "externalid": "external_id = {}",
    "emails": "lower(email) = lower({})",
    "emails.value": "lower(email) = lower({})",
    "displayname": "lower(display_name) = lower({})",
    "active": "active::text = lower({})",
}
_IS_MEMBER = (
    "EXISTS (SELECT FROM scim_group_members gm WHERE gm.organization_id = g.organization_id"
    " AND gm.scim_group_id = g.scim_group_id AND gm.user_id = {})"
)
_GROUP_CONDITIONS: Mapping[str, str] = {
    "id": "g.scim_group_id = {}",
    "displayname": "lower(g.display_name) = lower({})",
    "externalid": "g.external_id = {}",
    "members": _IS_MEMBER,
    "members.value": _IS_MEMBER,
}


class ScimSettingsRows:
    """How organizations use SCIM, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def get(self, organization_id: str) -> ScimSettings | None:
        """An organization's settings, if they were ever changed."""
        row = await self._connection.fetchrow("SELECT * FROM scim_settings WHERE organization_id = $1", organization_id)
        return None if row is None else _settings_of(row)

    async def put(self, settings: ScimSettings) -> ScimSettings:
        """Store settings; gives them with their new revision."""
        row = await self._connection.fetchrow(
            "INSERT INTO scim_settings (organization_id, enabled, group_roles, default_role_ids, update_time)"
            " VALUES ($1, $2, $3, $4, $5) ON CONFLICT (organization_id) DO UPDATE SET enabled = excluded.enabled,"
            " group_roles = excluded.group_roles, default_role_ids = excluded.default_role_ids,"
            " update_time = excluded.update_time, revision = scim_settings.revision + 1 RETURNING *",
            settings.organization_id,
            settings.enabled,
            group_roles_to_json(settings.rules),
            settings.rules.default_role_ids,
            settings.update_time,
        )
        return _settings_of(found(row))

    async def note_use(self, organization_id: str, now: datetime) -> None:
        """A directory calls; noted once a minute."""
        await self._connection.execute(
            "UPDATE scim_settings SET last_use_time = $2"
            " WHERE organization_id = $1 AND (last_use_time IS NULL OR last_use_time <= $3)",
            organization_id,
            now,
            now - _NOTED_EVERY,
        )


class ScimUserRows:
    """Users as directories keep them, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def get(self, organization_id: str, user_id: str) -> DirectoryUser | None:
        """One member, or one whom the directory has deactivated."""
        users, _ = await self.find(organization_id, [Condition("id", user_id)], 0, 1)
        return users[0] if users else None

    async def find(
        self, organization_id: str, conditions: Sequence[Condition], offset: int, limit: int
    ) -> tuple[list[DirectoryUser], int]:
        """Those that all conditions hold for, by their ids, and how many there are in all."""
        query = _query(organization_id, conditions, _USER_CONDITIONS)
        total = await self._connection.fetchval(f"SELECT count(*) FROM ({_USERS}) u WHERE {query}", *query.values)
        rows = await self._connection.fetch(
            f"SELECT * FROM ({_USERS}) u WHERE {query} ORDER BY user_id LIMIT {limit:d} OFFSET {offset:d}",
            *query.values,
        )
        return [_user_of(organization_id, row) for row in rows], total

    async def ids(self, organization_id: str) -> list[str]:
        """Everybody of whom the directory has said something."""
        rows = await self._connection.fetch(
            "SELECT user_id FROM scim_users WHERE organization_id = $1 ORDER BY user_id", organization_id
        )
        return [row["user_id"] for row in rows]

    async def names(self, organization_id: str, user_ids: Collection[str]) -> dict[str, str]:
        """The names of those of the users that there are."""
        if not user_ids:
            return {}
        rows = await self._connection.fetch(
            f"SELECT user_id, user_name, display_name FROM ({_USERS}) u WHERE user_id = ANY ($2)",
            organization_id,
            sorted(user_ids),
        )
        return {row["user_id"]: row["display_name"] or row["user_name"] for row in rows}

    async def put(self, user: DirectoryUser) -> None:
        """Store what a directory says of a user."""
        await self._connection.execute(
            "INSERT INTO scim_users (organization_id, user_id, user_name, external_id, display_name, name, role_ids,"
            " kept_role_ids, create_time, update_time) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)"
            " ON CONFLICT (organization_id, user_id) DO UPDATE SET user_name = excluded.user_name,"
            " external_id = excluded.external_id, display_name = excluded.display_name, name = excluded.name,"
            " role_ids = excluded.role_ids, kept_role_ids = excluded.kept_role_ids, update_time = excluded.update_time",
            user.organization_id,
            user.user_id,
            user.user.user_name,
            user.user.external_id,
            user.user.display_name,
            msgspec.json.encode(user.user.name).decode(),
            user.given_role_ids,
            user.kept_role_ids,
            user.create_time,
            user.update_time,
        )

    async def remove(self, organization_id: str, user_id: str) -> None:
        """Forget what a directory said of a user, and its groups."""
        await self._connection.execute(
            "DELETE FROM scim_users WHERE organization_id = $1 AND user_id = $2", organization_id, user_id
        )


class ScimGroupRows:
    """Groups as directories keep them, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def find(
        self, organization_id: str, conditions: Sequence[Condition], offset: int, limit: int
    ) -> tuple[list[DirectoryGroup], int]:
        """Those that all conditions hold for, by their ids, and how many there are in all."""
        query = _query(organization_id, conditions, _GROUP_CONDITIONS)
        total = await self._connection.fetchval(
            f"SELECT count(*) FROM scim_groups g WHERE g.organization_id = $1 AND {query}", *query.values
        )
        rows = await self._connection.fetch(
            "SELECT g.*, ARRAY(SELECT gm.user_id FROM scim_group_members gm WHERE gm.organization_id = $1"
            " AND gm.scim_group_id = g.scim_group_id) AS member_ids"
            f" FROM scim_groups g WHERE g.organization_id = $1 AND {query}"
            f" ORDER BY g.scim_group_id LIMIT {limit:d} OFFSET {offset:d}",
            *query.values,
        )
        return [_group_of(row) for row in rows], total

    async def of_users(self, organization_id: str, user_ids: Collection[str]) -> dict[str, list[tuple[str, str]]]:
        """The ids and names of the groups that each of the users is in."""
        groups: dict[str, list[tuple[str, str]]] = {}
        rows = await self._connection.fetch(
            "SELECT gm.user_id, g.scim_group_id, g.display_name FROM scim_group_members gm"
            " JOIN scim_groups g USING (organization_id, scim_group_id)"
            " WHERE gm.organization_id = $1 AND gm.user_id = ANY ($2) ORDER BY g.scim_group_id",
            organization_id,
            list(user_ids),
        )
        for row in rows:
            groups.setdefault(row["user_id"], []).append((row["scim_group_id"], row["display_name"]))
        return groups

    async def put(self, group: DirectoryGroup) -> None:
        """Store a group, and who is in it."""
        await self._connection.execute(
            "INSERT INTO scim_groups (scim_group_id, organization_id, display_name, external_id, create_time,"
            " update_time) VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (scim_group_id) DO UPDATE SET"
            " display_name = excluded.display_name, external_id = excluded.external_id,"
            " update_time = excluded.update_time",
            group.scim_group_id,
            group.organization_id,
            group.group.display_name,
            group.group.external_id,
            group.create_time,
            group.update_time,
        )
        member_ids = sorted(group.group.member_ids)
        await self._connection.execute(
            "DELETE FROM scim_group_members"
            " WHERE organization_id = $1 AND scim_group_id = $2 AND NOT user_id = ANY ($3)",
            group.organization_id,
            group.scim_group_id,
            member_ids,
        )
        await self._connection.execute(
            "INSERT INTO scim_group_members (organization_id, scim_group_id, user_id)"
            " SELECT $1, $2, unnest($3::text[]) ON CONFLICT DO NOTHING",
            group.organization_id,
            group.scim_group_id,
            member_ids,
        )

    async def remove(self, organization_id: str, scim_group_id: str) -> None:
        """Remove a group."""
        await self._connection.execute(
            "DELETE FROM scim_groups WHERE organization_id = $1 AND scim_group_id = $2", organization_id, scim_group_id
        )


def _query(organization_id: str, conditions: Sequence[Condition], known: Mapping[str, str]) -> Query:
    query = Query()
    # $1 in every statement.
    query.where("{}::text IS NOT NULL", organization_id)
    for condition in conditions:
        query.where(known[condition.attribute], condition.value)
    return query


def _settings_of(row: Row) -> ScimSettings:
    return ScimSettings(
        organization_id=row["organization_id"],
        enabled=row["enabled"],
        rules=rules_of(row),
        last_use_time=row["last_use_time"],
        update_time=row["update_time"],
        revision=row["revision"],
    )


def _user_of(organization_id: str, row: Row) -> DirectoryUser:
    return DirectoryUser(
        organization_id=organization_id,
        user_id=row["user_id"],
        email=row["email"],
        user=ScimUser(
            user_name=row["user_name"],
            email=row["email"],
            external_id=row["external_id"],
            display_name=row["display_name"],
            name=msgspec.json.decode(row["name"], type=dict[str, str]),
            active=row["active"],
        ),
        create_time=row["create_time"],
        update_time=row["update_time"],
        given_role_ids=tuple(row["role_ids"]),
        kept_role_ids=tuple(row["kept_role_ids"]),
    )


def _group_of(row: Row) -> DirectoryGroup:
    return DirectoryGroup(
        organization_id=row["organization_id"],
        scim_group_id=row["scim_group_id"],
        group=ScimGroup(row["display_name"], row["external_id"], frozenset(row["member_ids"])),
        create_time=row["create_time"],
        update_time=row["update_time"],
    )

"""Fills identity's database with organizations, people and API keys by the million; it never calls identity.

One organization has an eighth of everybody, since lists are slow in the big ones; the others share the rest evenly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import asyncpg

from identity.roles import BUILT_IN
from mesh import tokens
from mesh.clock import SystemClock
from mesh.ids import new_id

BIG_SHARE = 8
_SINCE = datetime(2025, 1, 1, tzinfo=UTC)
_SPREAD_S = 300 * 86_400
_BATCH = 20_000
_ROLE = BUILT_IN["developer"]


@dataclass(frozen=True)
class Population:
    """Who is there: the big organization, all of them, and the texts of some keys of anybody."""

    big_organization_id: str
    organization_ids: list[str]
    secrets: list[str]


async def populate(
    connection: asyncpg.Connection[Any], random: Random, *, organizations: int, users: int, api_keys: int, sampled: int
) -> Population:
    """Store so many of each, every key owned by a user, and keep the texts of `sampled` keys.

    The connection must be a superuser's, whom row level security does not bind.
    """
    filling = _Filling(random)
    organization_ids = [filling.id("org") for _ in range(organizations)]
    members: dict[str, list[str]] = {organization_id: [] for organization_id in organization_ids}

    def place(number: int) -> str:
        others = number - number // BIG_SHARE
        return organization_ids[0 if number % BIG_SHARE == 0 else 1 + others % (organizations - 1)]

    await _copy(connection, "organizations", filling.organizations(organization_ids))
    for start in range(0, users, _BATCH):
        made = [(place(number), filling.id("user")) for number in range(start, min(start + _BATCH, users))]
        for organization_id, user_id in made:
            members[organization_id].append(user_id)
        await _copy(connection, "users", filling.users(made))
        await _copy(connection, "memberships", filling.memberships(made))
    kept = set(random.sample(range(api_keys), sampled))
    secrets: list[str] = []
    for start in range(0, api_keys, _BATCH):
        await _copy(
            connection,
            "api_keys",
            [
                filling.api_key(place(number), members, secrets if number in kept else None)
                for number in range(start, min(start + _BATCH, api_keys))
            ],
        )
    await connection.execute("VACUUM ANALYZE")
    # A database that has stood for a while has written all of this out.
    await connection.execute("CHECKPOINT")
    return Population(organization_ids[0], organization_ids, secrets)


class _Filling:
    """Rows of each table, as dictionaries by column."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._clock = SystemClock()

    def id(self, prefix: str) -> str:
        return new_id(prefix, clock=self._clock, random=self._random)

    def organizations(self, organization_ids: list[str]) -> Iterator[dict[str, Any]]:
        for number, organization_id in enumerate(organization_ids):
            yield {"organization_id": organization_id, "display_name": f"Organization {number}", **self._times()}

    def users(self, made: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
        for _, user_id in made:
            yield {"user_id": user_id, "email": f"{user_id}@example.com", "create_time": self._time()}

    def memberships(self, made: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
        for organization_id, user_id in made:
            yield {
                "organization_id": organization_id,
                "user_id": user_id,
                "display_name": user_id,
                "role_ids": [_ROLE.role_id],
                **self._times(),
            }

    def api_key(self, organization_id: str, members: dict[str, list[str]], secrets: list[str] | None) -> dict[str, Any]:
        owner = self._random.choice(members[organization_id])
        token = tokens.API_KEY.generate(self._random, clock=self._clock)
        if secrets is not None:
            secrets.append(token.text)
        created = self._time()
        return {
            "api_key_id": token.id,
            "organization_id": organization_id,
            "display_name": "Key",
            "user_id": owner,
            "scopes": sorted(_ROLE.permissions),
            "granted": sorted(_ROLE.permissions),
            "allowed_models": [],
            "allowed_networks": [],
            "rate_limits": "{}",
            "digest": token.digest,
            "creator_id": owner,
            "create_time": created,
        }

    def _times(self) -> dict[str, datetime]:
        created = self._time()
        return {"create_time": created, "update_time": created}

    def _time(self) -> datetime:
        return _SINCE + timedelta(seconds=self._random.random() * _SPREAD_S)


async def _copy(connection: asyncpg.Connection[Any], table: str, rows: Any) -> None:
    found = list(rows)
    columns = list(found[0])
    await connection.copy_records_to_table(
        table, columns=columns, records=[tuple(row[column] for column in columns) for row in found]
    )

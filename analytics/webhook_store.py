"""All SQL of webhooks and deliveries; it never knows what is in a secret, nor sends anything."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from datetime import datetime

import asyncpg

from analytics.webhooks import Delivery, DeliveryState, Outgoing, SealedSecrets, Webhook
from mesh.database import Connection, Database
from mesh.errors import PlatformError, Reason
from mesh.pages import TimePlace

_WEBHOOK = (
    "webhook_id, organization_id, display_name, url, types, disabled, success_time, failure_time, create_time,"
    " update_time, revision"
)
_DELIVERY = (
    "webhook_delivery_id, webhook_id, event_id, state, attempts, http_status, failure_reason, create_time,"
    " attempt_time, start_time, due_time"
)

# The earliest that is due of each webhook: so many fit into one round, whatever the backlog of one of them.
_DUE = """
SELECT due.webhook_delivery_id
FROM webhooks CROSS JOIN LATERAL (
    SELECT webhook_delivery_id, due_time FROM webhook_deliveries AS pending
    WHERE pending.webhook_id = webhooks.webhook_id AND state = 1 AND due_time <= $1
    ORDER BY due_time LIMIT 1 FOR UPDATE SKIP LOCKED
) AS due
WHERE NOT disabled AND webhooks.webhook_id <> ALL ($3::text[])
ORDER BY due.due_time LIMIT $4
"""
_THIS = "SELECT webhook_delivery_id FROM webhook_deliveries WHERE webhook_delivery_id = $3 AND state = 1 FOR UPDATE"


def _claim(selected: str) -> str:
    """The statement that takes deliveries in hand: it counts an attempt at $1, and moves when the next is due to $2."""
    return f"""
        WITH taken AS MATERIALIZED ({selected}), claimed AS (
            UPDATE webhook_deliveries AS deliveries SET attempts = attempts + 1, attempt_time = $1, due_time = $2
            FROM taken WHERE deliveries.webhook_delivery_id = taken.webhook_delivery_id RETURNING deliveries.*
        )
        SELECT {", ".join(f"claimed.{name}" for name in _DELIVERY.split(", "))},
            url, sealed_secret, previous_sealed_secret, previous_secret_end_time, event
        FROM claimed JOIN webhooks USING (webhook_id) JOIN platform_events USING (event_id)
    """


# Whoever comes late, because another took the delivery to be lost, changes nothing. The webhook is locked first, as it
# is where a webhook and its deliveries are removed.
_FINISH = f"""
WITH held AS MATERIALIZED (
    SELECT webhook_id AS held_id FROM webhooks WHERE webhook_id = $7 FOR NO KEY UPDATE
), finished AS (
    UPDATE webhook_deliveries SET state = $3, http_status = $4, failure_reason = $5, due_time = $6
    FROM held WHERE webhook_delivery_id = $1 AND webhook_id = held_id AND attempts = $2 AND state = 1
    RETURNING {_DELIVERY}
), told AS (
    UPDATE webhooks SET
        success_time = CASE WHEN state = 2 THEN greatest(success_time, attempt_time) ELSE success_time END,
        failure_time = CASE WHEN state = 2 THEN failure_time ELSE greatest(failure_time, attempt_time) END
    FROM finished WHERE webhooks.webhook_id = finished.webhook_id
)
SELECT * FROM finished
"""


class WebhookRows:
    """Webhooks and their deliveries, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def count(self, organization_id: str) -> int:
        """How many webhooks an organization has; nobody adds one before the transaction ends."""
        await self._connection.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended('aiaas.analytics.webhooks', hashtext($1)))", organization_id
        )
        number: int = await self._connection.fetchval(
            "SELECT count(*) FROM webhooks WHERE organization_id = $1", organization_id
        )
        return number

    async def add(self, webhook: Webhook, sealed_secret: bytes, request_id: str) -> bool:
        """Store a new webhook; returns whether it is the first that `request_id` makes."""
        added = await self._connection.fetchval(
            "INSERT INTO webhooks (webhook_id, organization_id, display_name, url, types, disabled, sealed_secret,"
            " create_time, update_time, request_id) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)"
            " ON CONFLICT DO NOTHING RETURNING true",
            webhook.webhook_id,
            webhook.organization_id,
            webhook.display_name,
            webhook.url,
            webhook.types,
            webhook.disabled,
            sealed_secret,
            webhook.create_time,
            webhook.update_time,
            request_id,
        )
        return added is not None

    async def get(self, organization_id: str, webhook_id: str, *, lock: bool = False) -> Webhook | None:
        """One webhook, locked against other changes if asked."""
        row = await self._connection.fetchrow(
            f"SELECT {_WEBHOOK} FROM webhooks WHERE organization_id = $1 AND webhook_id = $2"
            f"{' FOR UPDATE' if lock else ''}",
            organization_id,
            webhook_id,
        )
        return None if row is None else _webhook_of(row)

    async def page(self, organization_id: str, after: TimePlace | None, limit: int) -> list[Webhook]:
        """Up to `limit` webhooks that come after `after`, oldest first."""
        beyond = "" if after is None else " AND (create_time, webhook_id) > ($3, $4)"
        rows = await self._connection.fetch(
            f"SELECT {_WEBHOOK} FROM webhooks WHERE organization_id = $1{beyond}"
            " ORDER BY create_time, webhook_id LIMIT $2",
            organization_id,
            limit,
            *([] if after is None else [after.create_time, after.id]),
        )
        return [_webhook_of(row) for row in rows]

    async def change(self, webhook: Webhook) -> Webhook:
        """Store what changed of a webhook that is there; gives it with its new revision."""
        row = await self._connection.fetchrow(
            "UPDATE webhooks SET display_name = $3, url = $4, types = $5, disabled = $6, update_time = $7,"
            f" revision = revision + 1 WHERE organization_id = $1 AND webhook_id = $2 RETURNING {_WEBHOOK}",
            webhook.organization_id,
            webhook.webhook_id,
            webhook.display_name,
            webhook.url,
            webhook.types,
            webhook.disabled,
            webhook.update_time,
        )
        return _webhook_of(_found(row))

    async def change_secret(self, webhook: Webhook, sealed_secret: bytes, end_time: datetime | None) -> Webhook:
        """Store a new secret; the one before is kept until `end_time`, or not at all."""
        row = await self._connection.fetchrow(
            "UPDATE webhooks SET previous_sealed_secret = CASE WHEN $4::timestamptz IS NULL THEN NULL"
            " ELSE sealed_secret END, previous_secret_end_time = $4, sealed_secret = $3, update_time = $5,"
            f" revision = revision + 1 WHERE organization_id = $1 AND webhook_id = $2 RETURNING {_WEBHOOK}",
            webhook.organization_id,
            webhook.webhook_id,
            sealed_secret,
            end_time,
            webhook.update_time,
        )
        return _webhook_of(_found(row))

    async def remove(self, organization_id: str, webhook_id: str) -> None:
        """Remove a webhook and its deliveries."""
        await self._connection.execute(
            "DELETE FROM webhooks WHERE organization_id = $1 AND webhook_id = $2", organization_id, webhook_id
        )

    async def deliveries(
        self,
        webhook_id: str,
        since: datetime,
        before: TimePlace | None,
        limit: int,
        *,
        state: DeliveryState | None,
    ) -> list[Delivery]:
        """Up to `limit` deliveries made since a moment that come before `before`, newest first."""
        beyond = "" if before is None else " AND (create_time, webhook_delivery_id) < ($5, $6)"
        rows = await self._connection.fetch(
            f"SELECT {_DELIVERY} FROM webhook_deliveries WHERE webhook_id = $1 AND create_time >= $2"
            f" AND ($3::smallint IS NULL OR state = $3){beyond}"
            " ORDER BY create_time DESC, webhook_delivery_id DESC LIMIT $4",
            webhook_id,
            since,
            state,
            limit,
            *([] if before is None else [before.create_time, before.id]),
        )
        return [_delivery_of(row) for row in rows]

    async def delivery_state(self, webhook_id: str, delivery_id: str) -> DeliveryState | None:
        """Where a delivery is in its life, locked against changes."""
        state = await self._connection.fetchval(
            "SELECT state FROM webhook_deliveries WHERE webhook_id = $1 AND webhook_delivery_id = $2 FOR UPDATE",
            webhook_id,
            delivery_id,
        )
        return None if state is None else DeliveryState(state)

    async def start_again(self, webhook_id: str, delivery_id: str, now: datetime) -> Delivery:
        """Have a delivery tried as if it were made now."""
        row = await self._connection.fetchrow(
            "UPDATE webhook_deliveries SET state = 1, start_time = $3, due_time = $3"
            f" WHERE webhook_id = $1 AND webhook_delivery_id = $2 RETURNING {_DELIVERY}",
            webhook_id,
            delivery_id,
            now,
        )
        return _delivery_of(_found(row))


class WebhookStore:
    """The tables of webhooks. Every method raises PlatformError(UNAVAILABLE) when PostgreSQL is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[WebhookRows]:
        """The tables as one transaction sees them, committed at the end of the block."""
        async with self._database.transaction() as connection:
            yield WebhookRows(connection)

    async def claim_due(self, now: datetime, lease_end: datetime, busy: Collection[str], limit: int) -> list[Outgoing]:
        """Take what is due in hand until `lease_end`: one of each webhook but the `busy` ones, the earliest first."""
        rows = await self._database.fetch(_claim(_DUE), now, lease_end, list(busy), limit)
        return [_outgoing_of(row) for row in rows]

    async def claim(self, delivery_id: str, now: datetime, lease_end: datetime) -> Outgoing | None:
        """Take one pending delivery in hand until `lease_end`, due or not."""
        row = await self._database.fetchrow(_claim(_THIS), now, lease_end, delivery_id)
        return None if row is None else _outgoing_of(row)

    async def finish(self, delivery: Delivery) -> Delivery | None:
        """Note what came of an attempt: state, http_status, failure_reason and due_time of `delivery`.

        Returns it as stored; None if it is gone, or another attempt was made meanwhile.
        """
        row = await self._database.fetchrow(
            _FINISH,
            delivery.webhook_delivery_id,
            delivery.attempts,
            delivery.state,
            delivery.http_status,
            delivery.failure_reason,
            delivery.due_time,
            delivery.webhook_id,
        )
        return None if row is None else _delivery_of(row)

    async def pending(self) -> int:
        """How many deliveries are pending."""
        number: int = await self._database.fetchval("SELECT count(*) FROM webhook_deliveries WHERE state = 1")
        return number

    async def give_up_disabled(self, started_before: datetime, reason: str, limit: int) -> int:
        """Fail up to `limit` pending deliveries to disabled webhooks; returns how many that were."""
        failed: int = await self._database.fetchval(
            "WITH failed AS (UPDATE webhook_deliveries SET state = 3, failure_reason = $2 WHERE webhook_delivery_id IN"
            " (SELECT webhook_delivery_id FROM webhook_deliveries JOIN webhooks USING (webhook_id)"
            " WHERE disabled AND state = 1 AND start_time < $1 LIMIT $3"
            " FOR UPDATE OF webhook_deliveries SKIP LOCKED) RETURNING 1) SELECT count(*) FROM failed",
            started_before,
            reason,
            limit,
        )
        return failed

    async def remove_deliveries_before(self, moment: datetime, limit: int) -> int:
        """Remove up to `limit` deliveries that were made before and are not pending; returns how many that were."""
        removed: int = await self._database.fetchval(
            "WITH removed AS (DELETE FROM webhook_deliveries WHERE webhook_delivery_id IN"
            " (SELECT webhook_delivery_id FROM webhook_deliveries WHERE create_time < $1 AND state <> 1"
            " ORDER BY create_time LIMIT $2 FOR UPDATE SKIP LOCKED) RETURNING 1) SELECT count(*) FROM removed",
            moment,
            limit,
        )
        return removed


def _found(row: asyncpg.Record | None) -> asyncpg.Record:
    if row is None:
        raise PlatformError(Reason.NOT_FOUND)
    return row


def _webhook_of(row: asyncpg.Record) -> Webhook:
    return Webhook(**{**row, "types": tuple(row["types"])})


def _delivery_of(row: asyncpg.Record) -> Delivery:
    values = {name: row[name] for name in _DELIVERY.split(", ")}
    return Delivery(**{**values, "state": DeliveryState(row["state"])})


def _outgoing_of(row: asyncpg.Record) -> Outgoing:
    secrets = SealedSecrets(row["sealed_secret"], row["previous_sealed_secret"], row["previous_secret_end_time"])
    return Outgoing(_delivery_of(row), row["url"], secrets, row["event"])

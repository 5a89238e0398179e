"""The log of revocations, whose revisions have no gaps and appear in their order; it never tells anybody of one."""

from __future__ import annotations

from datetime import timedelta

from identity.revocations import Revocation, Subject
from identity.stores.rows import Connection, found


class RevocationRows:
    """Revocations, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        # In the order they came, each once.
        self._noted: dict[tuple[Subject, str], None] = {}

    def note(self, subject: Subject, subject_id: str) -> None:
        """Have it written at the transaction's end: the log has one writer at a time, so it is held for no longer."""
        self._noted[subject, subject_id] = None

    async def write(self) -> list[Revocation]:
        """Write what was noted, as the last thing of a transaction."""
        if not self._noted:
            return []
        rows = await self._connection.fetch(
            "WITH next AS (UPDATE revocation_revision SET revision = revision + cardinality($1::text[])"
            " RETURNING revision - cardinality($1::text[]) AS before)"
            " INSERT INTO revocations (revision, subject, subject_id)"
            " SELECT before + position, subject, subject_id"
            " FROM next, unnest($1::text[], $2::text[]) WITH ORDINALITY AS noted (subject, subject_id, position)"
            " RETURNING revision, subject, subject_id",
            [subject for subject, _ in self._noted],
            [subject_id for _, subject_id in self._noted],
        )
        self._noted.clear()
        return [Revocation(row["revision"], row["subject"], row["subject_id"]) for row in rows]

    async def extent(self) -> tuple[int, int]:
        """The revision that the log begins after, and its newest."""
        row = found(await self._connection.fetchrow("SELECT oldest, revision FROM revocation_revision"))
        return row["oldest"], row["revision"]

    async def list_after(self, revision: int, limit: int) -> list[Revocation]:
        """Revocations after this revision, in their order."""
        rows = await self._connection.fetch(
            "SELECT revision, subject, subject_id FROM revocations WHERE revision > $1 ORDER BY revision LIMIT $2",
            revision,
            limit,
        )
        return [Revocation(row["revision"], row["subject"], row["subject_id"]) for row in rows]

    async def forget_older_than(self, age: timedelta) -> None:
        """Shorten the log."""
        await self._connection.execute(
            "WITH gone AS (DELETE FROM revocations WHERE create_time < now() - $1::interval RETURNING revision)"
            " UPDATE revocation_revision SET oldest = greatest(oldest, (SELECT max(revision) FROM gone))"
            " WHERE EXISTS (SELECT FROM gone)",
            age,
        )

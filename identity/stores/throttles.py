"""The table of attempts; it never knows what was attempted."""

from __future__ import annotations

from datetime import datetime, timedelta

from identity.stores.rows import Connection, found


class ThrottleRows:
    """Attempts that are counted, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def count(
        self,
        subject: bytes,
        now: datetime,
        *,
        free: int,
        first_wait: timedelta,
        longest_wait: timedelta,
        forgotten_after: timedelta,
    ) -> datetime | None:
        """Count an attempt; None if it may be made, else when the next one may: then this one does not count.

        After `free` of them each is followed by a wait, twice as long as the one before.
        """
        row = await self._connection.fetchrow(
            "INSERT INTO throttles AS t (subject, attempts, attempt_time, free_time) VALUES ($1, 1, $2, '-infinity')"
            # Those who ask at the same time come in any order, so none of them may be before another's free_time.
            " ON CONFLICT (subject) DO UPDATE"
            " SET attempts = CASE WHEN t.attempt_time < $3 THEN 1 ELSE t.attempts + 1 END,"
            " attempt_time = $2, free_time = CASE WHEN t.attempt_time < $3 OR t.attempts + 1 < $4 THEN '-infinity'"
            " ELSE $2 + least($6::interval, $5::interval * 2.0 ^ least(t.attempts + 1 - $4, 30)) END"
            " WHERE t.free_time <= $2 RETURNING subject",
            subject,
            now,
            now - forgotten_after,
            free,
            first_wait,
            longest_wait,
        )
        if row is not None:
            return None
        free_time: datetime = found(
            await self._connection.fetchrow("SELECT free_time FROM throttles WHERE subject = $1", subject)
        )["free_time"]
        return free_time

    async def forget(self, subject: bytes) -> None:
        """Begin to count anew."""
        await self._connection.execute("DELETE FROM throttles WHERE subject = $1", subject)

    async def forget_until(self, moment: datetime) -> None:
        """Remove what nobody attempted since."""
        await self._connection.execute("DELETE FROM throttles WHERE attempt_time < $1", moment)

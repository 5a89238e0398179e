"""The SQL of engines' token counters: whose turn it is to read one, the last reading, and the windows between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from mesh.database import Database
from router.engine_tokens import Counters, Reading, Window

_WINDOW = "backend_id, start_time, end_time, prompt_tokens, cached_prompt_tokens, completion_tokens, reset"


@dataclass(frozen=True, slots=True)
class StoredTurn:
    """See router.engine_tokens.Turn."""

    before: Reading | None


class EngineTokenStore:
    """Readings and windows. Every method raises PlatformError(UNAVAILABLE) while PostgreSQL is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(self, backend_id: str, slot_time: datetime) -> StoredTurn | None:
        """The turn to read a backend for a slot; None if somebody else has it, or a later one."""
        row = await self._database.fetchrow(
            "INSERT INTO engine_readings AS known (backend_id, slot_time) VALUES ($1, $2)"
            " ON CONFLICT (backend_id) DO UPDATE SET slot_time = excluded.slot_time"
            " WHERE known.slot_time < excluded.slot_time RETURNING *",
            backend_id,
            slot_time,
        )
        if row is None:
            return None
        if row["read_time"] is None:
            return StoredTurn(None)
        counters = Counters(
            row["process_start_time_s"], row["prompt_tokens"], row["cached_prompt_tokens"], row["completion_tokens"]
        )
        return StoredTurn(Reading(row["base_url"], row["read_time"], counters))

    async def record(self, backend_id: str, slot_time: datetime, reading: Reading, window: Window | None) -> bool:
        """Keep what was read and how far it is from the last, together; False if the turn was lost meanwhile, and then
        it does nothing."""
        counters = reading.counters
        async with self._database.transaction() as connection:
            kept = await connection.fetchval(
                "UPDATE engine_readings SET base_url = $3, read_time = $4, process_start_time_s = $5,"
                " prompt_tokens = $6, cached_prompt_tokens = $7, completion_tokens = $8"
                " WHERE backend_id = $1 AND slot_time = $2 RETURNING true",
                backend_id,
                slot_time,
                reading.base_url,
                reading.read_time if window is None else window.end_time,
                counters.process_start_time_s,
                counters.prompt_tokens,
                counters.cached_prompt_tokens,
                counters.completion_tokens,
            )
            if kept and window is not None:
                await connection.execute(
                    f"INSERT INTO engine_tokens ({_WINDOW}) VALUES ($1, $2, $3, $4, $5, $6, $7)",  # noqa: S608
                    window.backend_id,
                    window.start_time,
                    window.end_time,
                    window.prompt_tokens,
                    window.cached_prompt_tokens,
                    window.completion_tokens,
                    window.reset,
                )
            return bool(kept)

    async def list_windows(
        self, backend_id: str, start_time: datetime, end_time: datetime, after: tuple[str, datetime] | None, limit: int
    ) -> Sequence[Window]:
        """Up to `limit` windows that begin in `start_time` <= t < `end_time`, in the order of (backend, start) and
        beyond `after`; of one backend, unless that is empty."""
        rows = await self._database.fetch(
            f"SELECT {_WINDOW} FROM engine_tokens"  # noqa: S608
            " WHERE ($1 = '' OR backend_id = $1) AND start_time >= $2 AND start_time < $3"
            " AND (backend_id, start_time) > ($4, $5) ORDER BY backend_id, start_time LIMIT $6",
            backend_id,
            start_time,
            end_time,
            *(after or ("", start_time)),
            limit,
        )
        return [Window(*row) for row in rows]

    async def forget(self, before: datetime) -> None:
        """Remove windows that ended before."""
        await self._database.execute("DELETE FROM engine_tokens WHERE end_time < $1", before)

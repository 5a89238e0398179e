"""What a call that is to be recorded has done so far, and when its entry is written; it never knows a request or SQL.

The last transaction of such a call is kept open until the call ends, so that its entry, which says how the call ended
and what it made, is committed with the change or not at all. An earlier transaction that changed something gets an
entry of its own when the next one begins.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from identity.audit_chain import AuditEntry, AuditOutcome
from identity.metrics import count_unrecorded
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id

logger = logging.getLogger(__name__)

A = TypeVar("A")

current: ContextVar[Attempt[Any] | None] = ContextVar("attempt", default=None)
"""The attempt that the call being served is; None where changes need no entry."""

DENIALS = frozenset({Reason.PERMISSION_DENIED, Reason.ORGANIZATION_MISMATCH})
"""What is recorded of reads as well."""

_FAREWELL_S = 2.0

_CALLER_BURST = 20
_CALLER_PER_S = 1 / 6
_ALL_BURST = 200
_ALL_PER_S = 10.0
_CALLERS = 10_000


class Held(Protocol):
    """A transaction that its block has left without an error, and that is not committed yet."""

    async def commit(self, entry: AuditEntry | None, *, even_unchanged: bool) -> bool:
        """Commit it, with `entry` if it changed anything or `even_unchanged`; whether the entry is in it.

        Raises PlatformError(UNAVAILABLE) when the entry cannot be written; then nothing is committed.
        """


class Recorder(Protocol):
    """What writes an entry in a transaction of its own."""

    async def record(self, entry: AuditEntry) -> None:
        """Returns once it is stored; one whose id is stored already changes nothing. Raises PlatformError."""


class Attempt(Generic[A]):
    """One call. `describe` makes the entry of an id, an outcome, a reason and the answer, if there is one already.

    Of a call that is no mutation, only a denial is recorded.
    """

    def __init__(
        self,
        describe: Callable[[str, AuditOutcome, str, A | None], AuditEntry],
        recorder: Recorder,
        bounds: AttemptBounds,
        *,
        mutates: bool,
    ) -> None:
        self._describe = describe
        self._recorder = recorder
        self._bounds = bounds
        self._mutates = mutates
        self._held: Held | None = None
        self._entry_id = new_id("aud")
        self._recorded = False
        self._over = False

    async def hold(self, held: Held) -> None:
        """Keep a transaction open until the call ends; what outlives its call is committed at once."""
        await self.settle()
        if self._over:
            await held.commit(None, even_unchanged=False)
        else:
            self._held = held

    async def settle(self) -> None:
        """Commit what is held, with an entry of its own if it changed anything."""
        held, self._held = self._held, None
        if held is not None:
            entry = self._describe(self._entry_id, AuditOutcome.SUCCEEDED, "", None)
            if await held.commit(entry, even_unchanged=False):
                self._recorded = True
                self._entry_id = new_id("aud")

    async def succeed(self, answer: A) -> None:
        """Commit what the call has changed, with its entry. Raises PlatformError; then the change is not made."""
        if not self._mutates:
            return
        self._over = True
        held, self._held = self._held, None
        entry = self._describe(self._entry_id, AuditOutcome.SUCCEEDED, "", answer)
        if held is not None:
            await held.commit(entry, even_unchanged=not self._recorded)
        elif not self._recorded:
            await self._recorder.record(entry)

    async def fail(self, reason: Reason, caller: str) -> None:
        """Record that the call failed; what it had committed before it failed stays. Never raises but when cancelled.

        Of those that changed nothing, `caller` has so many recorded and no more.
        """
        self._over = True
        held, self._held = self._held, None
        outcome = AuditOutcome.DENIED if reason in DENIALS else AuditOutcome.FAILED
        try:
            async with asyncio.timeout(_FAREWELL_S):
                entry = self._describe(self._entry_id, outcome, reason.value, None)
                if held is not None and await held.commit(entry, even_unchanged=False):
                    return
                if self._mutates or outcome is AuditOutcome.DENIED:
                    if self._bounds.admits(caller):
                        await self._recorder.record(entry)
                    else:
                        count_unrecorded("bounded")
        except Exception as error:
            # The call has failed already, and nothing was changed that an entry would be missing for.
            count_unrecorded("failed")
            logger.error(
                "an attempt was not recorded: %s",
                error.reason.value if isinstance(error, PlatformError) else repr(error),
            )


@dataclass(slots=True)
class _Bucket:
    left: float
    filled_at: float

    def take(self, now: float, burst: float, per_s: float) -> bool:
        self.left = min(burst, self.left + (now - self.filled_at) * per_s)
        self.filled_at = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


class AttemptBounds:
    """How many attempts that changed nothing are recorded, so that a flood of them cannot drown the database: of one
    caller 20 at once and then one in 6 s, of all together 200 at once and then 10 a second, by each process."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._all = _Bucket(_ALL_BURST, clock.monotonic())
        self._callers: OrderedDict[str, _Bucket] = OrderedDict()

    def admits(self, caller: str) -> bool:
        """Whether one more is recorded."""
        now = self._clock.monotonic()
        bucket = self._callers.setdefault(caller, _Bucket(_CALLER_BURST, now))
        self._callers.move_to_end(caller)
        if len(self._callers) > _CALLERS:
            self._callers.popitem(last=False)
        return bucket.take(now, _CALLER_BURST, _CALLER_PER_S) and self._all.take(now, _ALL_BURST, _ALL_PER_S)


@contextmanager
def apart() -> Iterator[None]:
    """Outside of the attempt that the call is: transactions are committed as they end."""
    token = current.set(None)
    try:
        yield
    finally:
        current.reset(token)

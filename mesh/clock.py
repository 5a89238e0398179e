"""The clock that is handed to whatever asks for the time; nothing else reads the time for a decision."""

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Where the time comes from."""

    def now(self) -> datetime:
        """The time of day, in UTC, with its time zone set."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start that never run backwards."""


class SystemClock:
    """The machine's own clock."""

    def now(self) -> datetime:
        """The time of day, in UTC."""
        return datetime.now(UTC)

    # Asked ten times by each inference, so it is the built-in itself.
    monotonic = staticmethod(time.monotonic)
    """Seconds since the machine's arbitrary start."""

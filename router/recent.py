"""How many of something there were in the last ten seconds; it never knows what is counted."""

from __future__ import annotations

SPAN_S = 10
"""Seconds that are remembered, each in a slot of its own."""


class Recent:
    """Two counts, of all and of some that are marked among them. `now` is monotonic seconds."""

    __slots__ = ("_all", "_marked", "_second", "all", "marked")

    def __init__(self) -> None:
        self.all = self.marked = 0
        self._all, self._marked = [0] * SPAN_S, [0] * SPAN_S
        self._second = 0

    def count(self, now: float) -> None:
        """Count one more."""
        if int(now) != self._second:
            self.look(now)
        self._all[self._second % SPAN_S] += 1
        self.all += 1

    def mark(self, now: float) -> None:
        """Mark one that is, or was, counted."""
        self.look(now)
        self._marked[self._second % SPAN_S] += 1
        self.marked += 1

    def look(self, now: float) -> None:
        """Forget what is too old, before `all` and `marked` are read."""
        second = int(now)
        passed = min(second - self._second, SPAN_S)
        if passed <= 0:
            return
        for slot in range(second - passed + 1, second + 1):
            self.all -= self._all[slot % SPAN_S]
            self.marked -= self._marked[slot % SPAN_S]
            self._all[slot % SPAN_S] = self._marked[slot % SPAN_S] = 0
        self._second = second

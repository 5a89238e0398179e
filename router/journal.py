"""Keeps every admitted request on this machine's disk, from before its first byte until long after it was published; it
never waits for the disk on a request's way, and it publishes nothing itself.

What changes is queued; one append to the log (`journal_log`) makes all of it outlive the process. Ten times a second
a thread folds that into LMDB (`journal_store`), synced to the disk, which bounds what a loss of power takes. Only what
is there is published, so that nobody counts what a journal could forget.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import lmdb

from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from router import metrics
from router.journal_log import Change, Log, read_log
from router.journal_queries import Selection, lease_charges, select
from router.journal_store import Folded, JournalError, JournalStore, Settle
from router.leases import Spender

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETENTION = timedelta(hours=72)
"""How long a published entry stays for reconciliation, unless the journal needs its room."""

_COMMIT_S = 0.02
_FOLD_S = 0.1
_CHECKPOINT_S = 1.0
_RETENTION_S = 60.0
_RETRY_AFTER_S = 5.0
# Of the limit: from here on published entries go before their time, and from there on no request is admitted.
_LARGE = 0.80
_FULL = 0.95
# While nothing can be written, refused requests are remembered up to so many; running ones always.
_WAITING_CHANGES = 20_000
_REPLAY_KEYS = 5_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Entry:
    """One admitted request. `progress`, where it is set, tells once a second what is known by then: a serialized
    fragment that merges over the begun event, or None; it is called on the event loop and must be quick."""

    __slots__ = ("_begun", "_fragment", "_journal", "_number", "progress")

    def __init__(self, journal: Journal, number: int, begun: bytes) -> None:
        self._journal = journal
        self._number = number
        self._begun = begun
        self._fragment = b""
        self.progress: Callable[[], bytes | None] | None = None

    def begin_again(self, begun: bytes) -> None:
        """The request goes on as another than it began."""
        self._begun, self._fragment = begun, b""
        self._journal._checkpoint(self._number, begun)

    def checkpoint(self, fragment: bytes) -> None:
        """Remember a fragment that merges over the begun event, instead of the one before; it is written with the next
        commit."""
        if fragment != self._fragment:
            self._fragment = fragment
            self._journal._checkpoint(self._number, self._begun + fragment)

    def end(self, event: bytes) -> None:
        """The request has ended with this event, whatever it was before; again, it does nothing. Raises nothing."""
        # It belongs to whoever owns this entry: without this, only the collector would free the two.
        self.progress = None
        self._journal._end(self._number, event)


class Journal:
    """The journal of one router. Await `run()` in the background and `close()` at the end.

    `router_id` is made when the journal is, and stays with it; `instance_id` is new each time it is opened. `on_ended`
    gets keys and events that have become publishable, and `on_replayed` is called when others have become so again.
    """

    def __init__(self, folder: Path, limit_bytes: int, clock: Clock, settle: Settle) -> None:
        """Open it, and end as aborted what a former run left open; `settle` says what each of these costs.

        Blocks until all of that is on the disk. Raises JournalError when another router has the folder, when a newer
        version wrote it or when it cannot be read; OSError and lmdb.Error when nothing can be written to it.
        """
        self._clock = clock
        self.limit_bytes = limit_bytes
        self.instance_id = new_id("instance")
        with contextlib.ExitStack() as held:
            lock = hold(folder)
            held.callback(os.close, lock)
            self._store = JournalStore(folder, limit_bytes)
            held.callback(self._store.close)
            self._log = Log(folder)
            held.callback(self._log.close)
            if not self._store.router_id:
                self._store.found(new_id("router"))
            aborted = self._store.recover(read_log(folder), self._now_micros(), settle)
            self._log.clear()
            self._log.number = self._store.batch_number
            self._held = held.pop_all()
        if aborted:
            metrics.JOURNAL_ABORTED.inc(aborted)
            logger.warning("%d requests were running when the router died; they are settled as aborted", aborted)
        self._last_number = self._store.last_number
        self._open: dict[int, Entry] = {}
        # By number, since of all changes of an entry only the last is to be written.
        self._queue: dict[int, Change] = {}
        self._unwritten_begins = 0
        self.losses = 0
        """How often requests that had begun could not be written down; see `secure`."""
        self._unfolded: list[Change] = []
        self._published: dict[bytes, int] = {}
        self._commit_timer: asyncio.TimerHandle | None = None
        self._folding: asyncio.Task[None] | None = None
        self._cannot_append = self._cannot_fold = self._is_full = self._drops = False
        self._writing = ThreadPoolExecutor(1, "journal-write")
        self._reading = ThreadPoolExecutor(1, "journal-read")
        self.on_ended: Callable[[Sequence[tuple[bytes, bytes]]], None] = lambda _: None
        self.on_replayed: Callable[[], None] = lambda: None
        self._take(self._store.read_counts())
        metrics.JOURNAL_LIMIT.set(limit_bytes)
        metrics.USAGE_QUEUE.set_function(lambda: self.unpublished_entries)
        metrics.USAGE_AGE.set_function(lambda: self.oldest_unpublished_age_s)
        metrics.JOURNAL_OPEN.set_function(lambda: self.open_entries)
        metrics.JOURNAL_SIZE.set_function(lambda: self.size_bytes)

    @property
    def router_id(self) -> str:
        """The router whose journal it is."""
        return self._store.router_id

    @property
    def store(self) -> JournalStore:
        """What is on the disk, for queries by `read`; whatever changed is there after `sync`."""
        return self._store

    @property
    def open_entries(self) -> int:
        """Requests that run."""
        return len(self._open)

    @property
    def oldest_unpublished_age_s(self) -> float:
        """How long the oldest entry that is to be published has waited; 0 if none waits."""
        oldest_micros = self._oldest_unpublished_micros
        return 0.0 if oldest_micros is None else max(0, self._now_micros() - oldest_micros) / 1e6

    def begin(self, event: bytes) -> Entry:
        """Take up a request by its serialized UsageEvent without an end. It is only queued.

        Raises PlatformError(USAGE_UNRECORDABLE) while the journal is full or cannot be written.
        """
        if self._is_full or self._cannot_fold:
            raise _unrecordable()
        self.check()
        self._last_number = number = self._last_number + 1
        entry = self._open[number] = Entry(self, number, event)
        self._put(Change(number, False, 0, event))
        self._unwritten_begins += 1
        return entry

    def record(self, event: bytes) -> None:
        """Take up the terminal event of a request that never began. Raises nothing: while there is no room, it is
        counted by a metric instead, since it was refused and costs nothing."""
        waiting = len(self._queue) + len(self._unfolded)
        if self._is_full or (waiting >= _WAITING_CHANGES and (self._cannot_append or self._cannot_fold)):
            metrics.USAGE_DROPPED.inc()
            if not self._drops:
                self._drops = True
                logger.error("events of refused requests are dropped: the journal has no room for them")
            return
        self._drops = False
        self._last_number = number = self._last_number + 1
        self._put(Change(number, True, self._now_micros(), event))

    def check(self) -> None:
        """Raises PlatformError(USAGE_UNRECORDABLE) while what was queued cannot be written, and tries again first."""
        if self._cannot_append:
            self.commit()

    def secure(self, losses: int) -> None:
        """To be called before anything leaves: all that is known outlives this process then. While nothing can be
        written, only what began before may leave; `check` says so of what begins.

        Raises PlatformError(USAGE_UNRECORDABLE) where writing fails, or has failed since `losses` was read: then
        nothing may leave whose beginning the caller has seen since, whoever it was that the write failed for.
        """
        if self._queue and not self._cannot_append:
            self.commit()
        if losses != self.losses:
            raise _unrecordable()

    def commit(self) -> None:
        """Make all that is known outlive this process, by one append to the log.

        Raises PlatformError(USAGE_UNRECORDABLE) if it cannot be written.
        """
        if not self._queue:
            return
        changes = list(self._queue.values())
        try:
            self._log.append(changes)
        except OSError as error:
            self._cannot_append = self._failed(self._cannot_append, error)
            if self._unwritten_begins:
                self._unwritten_begins = 0
                self.losses += 1
            raise _unrecordable() from error
        self._cannot_append = False
        self._unwritten_begins = 0
        self._unfolded += changes
        self._queue.clear()

    def mark_published(self, attempts: Mapping[bytes, int]) -> None:
        """These are confirmed, after so many tries; a crash before the next fold has them published again."""
        self._published.update(attempts)

    async def read_unpublished(
        self, limit: int, limit_bytes: int, skip: Collection[bytes]
    ) -> tuple[list[tuple[bytes, bytes]], bool]:
        """Keys and events that wait, oldest first, but for those of `skip`: about as many as the limits say, and
        whether there may be more. Raises lmdb.Error."""
        taken = {*skip, *self._published}
        # Behind every fold, so that what was confirmed is either still known here or gone there.
        found, more = await self._write(lambda: self._store.read_unpublished(limit, limit_bytes, taken))
        return [(key, event) for key, event in found if key not in self._published], more

    async def replay(self, selection: Selection) -> int:
        """Have ended entries published again; returns how many. Raises lmdb.Error."""
        await self.sync()
        keys = await self.read(lambda: [stored.key for stored in select(self._store, selection)])
        for start in range(0, len(keys), _REPLAY_KEYS):
            some = keys[start : start + _REPLAY_KEYS]
            for key in some:
                self._published.pop(key, None)
            self._take(await self._write(functools.partial(self._store.mark_unpublished, some)))
        self.on_replayed()
        return len(keys)

    async def lease_totals(self, lease_ids: Collection[str]) -> dict[str, dict[Spender, tuple[int, int]]]:
        """What ended requests were charged to leases, by spender: units and requests. Raises lmdb.Error."""
        await self.sync()
        return await self.read(lambda: lease_charges(self._store, lease_ids))

    async def read(self, query: Callable[[], T]) -> T:
        """The answer of a query over `store`, beside everything else."""
        return await asyncio.get_running_loop().run_in_executor(self._reading, query)

    async def run(self) -> None:
        """Write checkpoints, fold and drop what is old, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._fold_regularly())
            tasks.create_task(self._checkpoint_regularly())
            tasks.create_task(self._drop_regularly())

    async def sync(self) -> None:
        """Return when everything known by now is on the disk, or could not be written; that is tried again."""
        running = self._folding
        if running is not None and not running.done():
            # It may have begun before what the caller means.
            await asyncio.wait({running})
        if self._folding is running:
            self._folding = asyncio.create_task(self._fold())
        assert self._folding is not None  # noqa: S101
        await asyncio.shield(self._folding)

    async def close(self) -> None:
        """Write everything and let go of the folder; `run` has ended. What cannot be folded stays in the log."""
        await self.sync()
        if self._commit_timer is not None:
            self._commit_timer.cancel()
        for executor in (self._reading, self._writing):
            await asyncio.to_thread(executor.shutdown, cancel_futures=True)
        if self._queue:
            logger.error("%d changes of usage could not be written before the end", len(self._queue))
        self._held.close()

    def _checkpoint(self, number: int, event: bytes) -> None:
        if number in self._open:
            self._put(Change(number, False, self._now_micros(), event))

    def _end(self, number: int, event: bytes) -> None:
        if self._open.pop(number, None) is not None:
            self._put(Change(number, True, self._now_micros(), event))

    def _put(self, change: Change) -> None:
        self._queue[change.number] = change
        if self._commit_timer is None:
            self._commit_timer = asyncio.get_running_loop().call_later(_COMMIT_S, self._commit_in_time)

    def _commit_in_time(self) -> None:
        self._commit_timer = None
        self._try_commit()

    def _try_commit(self) -> None:
        try:
            self.commit()
        except PlatformError:
            # Counted and logged; the next fold tries again.
            return

    async def _fold_regularly(self) -> None:
        while True:
            await asyncio.sleep(_FOLD_S)
            if self._queue or self._unfolded or self._published:
                await self.sync()

    async def _checkpoint_regularly(self) -> None:
        while True:
            await asyncio.sleep(_CHECKPOINT_S)
            for entry in list(self._open.values()):
                if entry.progress is None:
                    continue
                try:
                    fragment = entry.progress()
                except Exception:
                    # One request's fault must not cost the others their checkpoints.
                    logger.exception("the progress of a request cannot be told")
                    entry.progress = None
                    continue
                if fragment is not None:
                    entry.checkpoint(fragment)

    async def _drop_regularly(self) -> None:
        due = 0.0
        while True:
            if self._is_large or self._clock.monotonic() >= due:
                due = self._clock.monotonic() + _RETENTION_S
                await self._drop()
            await asyncio.sleep(_CHECKPOINT_S)

    async def _drop(self) -> None:
        since_micros = (self._clock.now() - RETENTION - _EPOCH) // _MICROSECOND
        more = True
        while more:
            try:
                counts, more = await self._write(
                    lambda: self._store.retain(since_micros, int(self.limit_bytes * _LARGE))
                )
            except lmdb.Error as error:
                self._failed(self._cannot_fold, error)
                return
            self._take(counts)

    async def _fold(self) -> None:
        self._try_commit()
        self._log.turn()
        changes, self._unfolded = self._unfolded, []
        published, self._published = self._published, {}
        number = self._log.number
        if not changes and not published:
            return
        try:
            folded = await self._write(lambda: self._store.fold(changes, published, number))
        except Exception as error:  # whatever it is, nothing may be forgotten for it
            self._unfolded = changes + self._unfolded
            self._published = {**published, **self._published}
            self._cannot_fold = self._failed(self._cannot_fold, error)
            return
        self._cannot_fold = False
        self._take(folded)
        if folded.ended:
            # Before anything is awaited: whoever reads from LMDB now finds them there too, and must know them.
            self.on_ended(folded.ended)
        try:
            # What it holds is in LMDB; while it cannot be emptied, the other file just grows.
            await self._write(self._log.clear_other)
        except OSError as error:
            self._failed(False, error)

    async def _write(self, work: Callable[[], T]) -> T:
        """Whatever writes to LMDB, or must not come between, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._writing, work)

    def _take(self, counts: Folded) -> None:
        self.size_bytes = counts.size_bytes
        self.unpublished_entries = counts.unpublished_entries
        self.published_entries = counts.ended_entries - counts.unpublished_entries
        self._oldest_unpublished_micros = counts.oldest_unpublished_micros
        self._is_large = counts.size_bytes > self.limit_bytes * _LARGE
        was_full, self._is_full = self._is_full, counts.size_bytes >= self.limit_bytes * _FULL
        if self._is_full and not was_full:
            logger.error("the journal is full: no request is admitted until there is room")

    def _failed(self, already: bool, error: Exception) -> bool:
        metrics.JOURNAL_WRITE_FAILURES.inc()
        if not already:
            logger.error("the journal cannot be written: %s", error)
        return True

    def _now_micros(self) -> int:
        return (self._clock.now() - _EPOCH) // _MICROSECOND


def hold(folder: Path) -> int:
    """The lock of a journal's folder, a file to be closed; the folder is made. Raises JournalError if it is held."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(folder / "router.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise JournalError(f"the journal in {folder} is in use: each router needs a folder of its own") from None
    return lock


def _unrecordable() -> PlatformError:
    return PlatformError(Reason.USAGE_UNRECORDABLE, retry_after_s=_RETRY_AFTER_S)

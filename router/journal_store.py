"""The journal's LMDB: entries by their time of admission, and which of them nobody has confirmed yet; it never knows
who writes them, nor where they are published to.

Four tables: `open` (number of the entry -> time of its last checkpoint, event), `ended` (time of admission and number
-> time it was written, tries to publish, event), `unpublished` (keys of `ended`) and `meta`. A key by the time of
admission makes every range that anybody asks for one walk along the tree.

Each transaction is synced to the disk before it counts (LMDB's default). Without that, or with sync in the background,
LMDB may find its root on the disk before what it points to, and the file is lost with the power; that is what the log
is there for. One thread at a time may write; reading goes on beside it.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import lmdb
from google.protobuf.message import DecodeError

from aiaas.type.v1 import usage_event_pb2
from aiaas.type.v1.usage_event_pb2 import UsageEvent
from router.journal_log import Batch, Change

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
"""What this version writes; it refuses to open what a newer one wrote."""

ROUTER_DIED = "router_died"
"""The reason of an event whose router was killed before the request's end."""

FIRST_KEY, LAST_KEY = b"", b"\xff" * 17
"""Before and after every key of an ended entry."""

Settle = Callable[[UsageEvent], None]
"""Sets what an aborted event costs, from its tokens and its price, and what is charged to its budgets."""

_NUMBER = struct.Struct(">Q")
_KEY = struct.Struct(">QQ")
_OPEN = struct.Struct(">Q")
_ENDED = struct.Struct(">QH")
_MOST_ATTEMPTS = 0xFFFF
# Retention walks so far in one transaction, and looks so often whether there is room enough.
_RETENTION_ENTRIES = 5_000
_RETENTION_LOOK = 100


class JournalError(Exception):
    """The folder cannot be a journal; the text says why."""


class State(Enum):
    """Where an entry is in its life."""

    OPEN = 1
    UNPUBLISHED = 2
    PUBLISHED = 3


@dataclass(frozen=True, slots=True)
class Stored:
    """One entry. The key is that of an ended one, also while it is open; times are microseconds since the epoch."""

    key: bytes
    state: State
    event: bytes
    written_micros: int
    attempts: int


@dataclass(frozen=True, slots=True)
class Folded:
    """What a transaction left: the entries that ended by it, as keys and events, and how much there is now."""

    ended: Sequence[tuple[bytes, bytes]]
    size_bytes: int
    ended_entries: int
    unpublished_entries: int
    oldest_unpublished_micros: int | None
    """When the oldest entry that waits was written, in microseconds since the epoch."""


class JournalStore:
    """One folder's LMDB. Every method raises lmdb.Error, MapFullError among them, and leaves nothing half done."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        # LMDB copies what it changes, so it needs room beyond what is kept.
        size_bytes = (limit_bytes + limit_bytes // 4 + (4 << 20)) // 4096 * 4096
        try:
            self._env = lmdb.open(str(folder), map_size=size_bytes, max_dbs=4, mode=0o600)
        except lmdb.Error as error:
            raise JournalError(f"the journal in {folder} cannot be opened: {error}") from error
        self._inspection: lmdb.Transaction[bytes] | None = None
        try:
            self._meta = self._env.open_db(b"meta")
            version = self._read_meta(b"schema_version")
            if version is not None and int(version) > SCHEMA_VERSION:
                raise JournalError(
                    f"the journal in {folder} was written by a newer version of the router (schema {int(version)}, "
                    f"this one knows {SCHEMA_VERSION})"
                )
            self._open = self._env.open_db(b"open")
            self._ended = self._env.open_db(b"ended")
            self._unpublished = self._env.open_db(b"unpublished")
        except BaseException:
            self._env.close()
            raise
        self.router_id = (self._read_meta(b"router_id") or b"").decode()
        self.batch_number = int(self._read_meta(b"batch_number") or 0)
        self.last_number = int(self._read_meta(b"last_number") or 0)
        self._retention_place = FIRST_KEY

    def close(self) -> None:
        """Let go of the file; nobody may read any more."""
        if self._inspection is not None:
            self._inspection.abort()
        self._env.close()

    def found(self, router_id: str) -> None:
        """Make a new journal this router's."""
        with self._env.begin(write=True) as txn:
            txn.put(b"schema_version", str(SCHEMA_VERSION).encode(), db=self._meta)
            txn.put(b"router_id", router_id.encode(), db=self._meta)
        self.router_id = router_id

    def recover(self, batches: Sequence[Batch], now_micros: int, settle: Settle) -> int:
        """Take over what a former run left in its log, and end as aborted what is open, all in one transaction; returns
        how many that were."""
        with self._env.begin(write=True) as txn:
            self._apply_batches(txn, batches)
            numbers = 0
            for name, value in txn.cursor(db=self._open):
                event = UsageEvent.FromString(value[_OPEN.size :])
                _abort(event, _OPEN.unpack_from(value)[0], settle)
                self._put_ended(txn, _NUMBER.unpack(name)[0], now_micros, event.SerializeToString())
                numbers += 1
            txn.drop(self._open, delete=False)
            self._write_meta(txn)
        return numbers

    def inspect(self, batches: Sequence[Batch]) -> None:
        """From now on, read as if the log were folded; nothing of it is written."""
        self._inspection = self._env.begin(write=True)
        self._apply_batches(self._inspection, batches)

    def fold(self, changes: Sequence[Change], published: Mapping[bytes, int], batch_number: int) -> Folded:
        """Take over changes up to a batch of the log, and which keys are published after how many tries."""
        with self._env.begin(write=True) as txn:
            ended = self._apply(txn, changes)
            for key, attempts in published.items():
                txn.delete(key, db=self._unpublished)
                # One try is what a reader expects of a published entry.
                if attempts > 1 and (value := txn.get(key, db=self._ended)) is not None:
                    header = _ENDED.pack(_ENDED.unpack_from(value)[0], min(attempts, _MOST_ATTEMPTS))
                    txn.put(key, header + value[_ENDED.size :], db=self._ended)
            self.batch_number = max(batch_number, self.batch_number)
            self._write_meta(txn)
            return self._folded(txn, ended)

    def mark_unpublished(self, keys: Collection[bytes]) -> Folded:
        """Have ended entries published again, those that are still there."""
        with self._env.begin(write=True) as txn:
            for key in keys:
                if txn.get(key, db=self._ended) is not None:
                    txn.put(key, b"", db=self._unpublished)
            return self._folded(txn, ())

    def retain(self, since_micros: int, size_bytes: int) -> tuple[Folded, bool]:
        """Drop published entries that were admitted before `since_micros`, and others, oldest first, while all is
        larger than `size_bytes`. A few thousand at a time: returns also whether there may be more to drop."""
        with self._env.begin(write=True) as txn:
            cursor = txn.cursor(db=self._ended)
            found = cursor.set_range(self._retention_place) if self._retention_place else cursor.first()
            is_large = self._size(txn) > size_bytes
            for walked in range(_RETENTION_ENTRIES):
                if not found or not (is_large or _KEY.unpack(cursor.key())[0] < since_micros):
                    self._retention_place = FIRST_KEY
                    return self._folded(txn, ()), False
                if txn.get(cursor.key(), db=self._unpublished) is not None:
                    found = cursor.next()
                else:
                    cursor.delete()
                    found = bool(cursor.key())
                if walked % _RETENTION_LOOK == 0:
                    is_large = self._size(txn) > size_bytes
            self._retention_place = cursor.key() if found else FIRST_KEY
            return self._folded(txn, ()), found

    def read_counts(self) -> Folded:
        """How much there is."""
        with self._reading() as txn:
            return self._folded(txn, ())

    def read_open(self) -> list[Stored]:
        """Every entry whose request runs, oldest first."""
        with self._reading() as txn:
            found = [
                Stored(
                    key=entry_key(value[_OPEN.size :], _NUMBER.unpack(name)[0]),
                    state=State.OPEN,
                    event=value[_OPEN.size :],
                    written_micros=_OPEN.unpack_from(value)[0],
                    attempts=0,
                )
                for name, value in txn.cursor(db=self._open)
            ]
        return sorted(found, key=lambda stored: stored.key)

    def read_ended(self, start: bytes, stop: bytes, limit: int, *, only_unpublished: bool = False) -> list[Stored]:
        """At most `limit` ended entries with start <= key < stop, in the order of keys."""
        found: list[Stored] = []
        with self._reading() as txn:
            cursor = txn.cursor(db=self._unpublished if only_unpublished else self._ended)
            more = cursor.set_range(start) if start else cursor.first()
            while more and len(found) < limit and (key := cursor.key()) < stop:
                value = txn.get(key, db=self._ended) if only_unpublished else cursor.value()
                if value is not None:
                    waits = only_unpublished or txn.get(key, db=self._unpublished) is not None
                    written_micros, attempts = _ENDED.unpack_from(value)
                    state = State.UNPUBLISHED if waits else State.PUBLISHED
                    found.append(Stored(key, state, value[_ENDED.size :], written_micros, attempts))
                more = cursor.next()
        return found

    def read_unpublished(
        self, limit: int, limit_bytes: int, skip: Collection[bytes]
    ) -> tuple[list[tuple[bytes, bytes]], bool]:
        """Keys and events that wait, oldest first, but for those of `skip`: about as many as the limits say, and
        whether there may be more."""
        found: list[tuple[bytes, bytes]] = []
        size_bytes = 0
        with self._reading() as txn:
            for key in txn.cursor(db=self._unpublished).iternext(values=False):
                if key not in skip and (value := txn.get(key, db=self._ended)) is not None:
                    found.append((key, value[_ENDED.size :]))
                    size_bytes += len(value)
                    if len(found) >= limit or size_bytes >= limit_bytes:
                        return found, True
        return found, False

    @contextlib.contextmanager
    def _reading(self) -> Iterator[lmdb.Transaction[bytes]]:
        if self._inspection is not None:
            yield self._inspection
            return
        with self._env.begin() as txn:
            yield txn

    def _apply_batches(self, txn: lmdb.Transaction[bytes], batches: Sequence[Batch]) -> None:
        for batch in batches:
            # A router that was killed between the two left in its log what LMDB has already.
            if batch.number > self.batch_number:
                self._apply(txn, batch.changes)
                self.batch_number = batch.number

    def _apply(self, txn: lmdb.Transaction[bytes], changes: Sequence[Change]) -> list[tuple[bytes, bytes]]:
        ended = []
        known_number = self.last_number
        # Of all changes of an entry the last says everything.
        for number, change in {change.number: change for change in changes}.items():
            if change.ended:
                if number <= known_number:
                    # Most requests are shorter than a fold, and never were in there.
                    txn.delete(_NUMBER.pack(number), db=self._open)
                ended.append((self._put_ended(txn, number, change.time_micros, change.event), change.event))
            else:
                txn.put(_NUMBER.pack(number), _OPEN.pack(change.time_micros) + change.event, db=self._open)
            self.last_number = max(self.last_number, number)
        return ended

    def _put_ended(self, txn: lmdb.Transaction[bytes], number: int, written_micros: int, event: bytes) -> bytes:
        key = entry_key(event, number)
        txn.put(key, _ENDED.pack(written_micros, 0) + event, db=self._ended)
        txn.put(key, b"", db=self._unpublished)
        return key

    def _read_meta(self, name: bytes) -> bytes | None:
        with self._env.begin() as txn:
            value: bytes | None = txn.get(name, db=self._meta)
            return value

    def _write_meta(self, txn: lmdb.Transaction[bytes]) -> None:
        txn.put(b"batch_number", str(self.batch_number).encode(), db=self._meta)
        txn.put(b"last_number", str(self.last_number).encode(), db=self._meta)

    def _folded(self, txn: lmdb.Transaction[bytes], ended: Sequence[tuple[bytes, bytes]]) -> Folded:
        return Folded(
            ended=ended,
            size_bytes=self._size(txn),
            ended_entries=txn.stat(self._ended)["entries"],
            unpublished_entries=txn.stat(self._unpublished)["entries"],
            oldest_unpublished_micros=self._oldest_unpublished(txn),
        )

    def _oldest_unpublished(self, txn: lmdb.Transaction[bytes]) -> int | None:
        cursor = txn.cursor(db=self._unpublished)
        value = txn.get(cursor.key(), db=self._ended) if cursor.first() else None
        return None if value is None else int(_ENDED.unpack_from(value)[0])

    def _size(self, txn: lmdb.Transaction[bytes]) -> int:
        """Bytes of the pages in use; the file itself never shrinks, and its free pages are taken first."""
        size_bytes = 0
        for table in (self._open, self._ended, self._unpublished):
            told = txn.stat(table)
            size_bytes += told["psize"] * (told["branch_pages"] + told["leaf_pages"] + told["overflow_pages"])
        return size_bytes


def time_key(micros: int) -> bytes:
    """Before every key of entries that were admitted then or later, in microseconds since the epoch."""
    return _NUMBER.pack(max(0, micros))


def entry_key(event: bytes, number: int) -> bytes:
    """The key of an entry when it has ended: its event's time of admission, and its number."""
    try:
        admit_time = UsageEvent.FromString(event).admit_time
    except DecodeError:
        return _KEY.pack(0, number)
    return _KEY.pack(max(0, admit_time.seconds * 1_000_000 + admit_time.nanos // 1000), number)


def _abort(event: UsageEvent, checkpoint_micros: int, settle: Settle) -> None:
    """End the event of a request whose router died; billed to its last checkpoint."""
    event.outcome = usage_event_pb2.OUTCOME_ABORTED
    event.reason = ROUTER_DIED
    event.end_time.CopyFrom(event.admit_time)
    admit_micros = event.admit_time.seconds * 1_000_000 + event.admit_time.nanos // 1000
    if checkpoint_micros > admit_micros:
        event.end_time.FromMicroseconds(checkpoint_micros)
        event.duration_micros = checkpoint_micros - admit_micros
    if event.usage.prompt_tokens or event.usage.completion_tokens:
        event.usage_source = usage_event_pb2.USAGE_SOURCE_CHECKPOINT
    try:
        settle(event)
    except Exception:
        # One that cannot be settled must not keep the router, and all others, from starting.
        logger.exception("request %s was aborted and could not be settled", event.request_id)

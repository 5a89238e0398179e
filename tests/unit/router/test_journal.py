"""The journal on a real disk: what it remembers, and what it forgets when it must not."""

import asyncio
import contextlib
import errno
import os
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import lmdb
import pytest

from aiaas.type.v1 import usage_event_pb2
from aiaas.type.v1.usage_event_pb2 import BudgetCharge, TokenUsage, UsageEvent
from mesh.errors import PlatformError, Reason
from router import metrics
from router.journal import Journal
from router.journal_log import Batch, Change, Log, read_log
from router.journal_queries import Selection, list_entries
from router.journal_store import FIRST_KEY, ROUTER_DIED, JournalError, State
from router.leases import Spender
from tests.doubles.clock import ManualClock

LIMIT_BYTES = 64 << 20
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def event(request_id: str, admit_time: datetime = NOW, **fields: Any) -> bytes:
    message = UsageEvent(request_id=request_id, organization_id="org_1", model="m", **fields)
    message.admit_time.FromDatetime(admit_time)
    return message.SerializeToString()


def nothing_to_settle(_: UsageEvent) -> None:
    return


def open_journal(
    folder: Path,
    clock: ManualClock | None = None,
    *,
    limit_bytes: int = LIMIT_BYTES,
    settle: Callable[[UsageEvent], None] = nothing_to_settle,
) -> Journal:
    return Journal(folder, limit_bytes, clock or ManualClock(NOW), settle)


@contextlib.asynccontextmanager
async def running(journal: Journal) -> AsyncIterator[None]:
    task = asyncio.create_task(journal.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], Any], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


def crash(journal: Journal) -> None:
    """What a kill -9 leaves: what was only in memory is gone."""
    if journal._commit_timer is not None:
        journal._commit_timer.cancel()
    journal._writing.shutdown()
    journal._reading.shutdown()
    journal._held.close()


async def kept(journal: Journal) -> list[tuple[str, State, UsageEvent]]:
    await journal.sync()
    stored = await journal.read(lambda: list_entries(journal.store, Selection(), FIRST_KEY, 100_000))
    events = [(UsageEvent.FromString(entry.event), entry.state) for entry in stored]
    return [(told.request_id, state, told) for told, state in events]


async def states(journal: Journal) -> dict[str, State]:
    """By request; each has one entry."""
    entries = await kept(journal)
    found = {request_id: state for request_id, state, _ in entries}
    assert len(found) == len(entries)
    return found


async def publish(journal: Journal, attempts: int = 1) -> list[str]:
    found, more = await journal.read_unpublished(100_000, 1 << 30, ())
    assert not more
    journal.mark_published({key: attempts for key, _ in found})
    await journal.sync()
    return [UsageEvent.FromString(told).request_id for _, told in found]


async def test_an_entry_is_open_then_unpublished_then_published(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    entry = journal.begin(event("req_1"))
    journal.commit()
    assert await states(journal) == {"req_1": State.OPEN}
    assert journal.open_entries == 1
    entry.end(event("req_1", reason="done"))
    entry.end(event("req_1", reason="again"))
    ((_, state, told),) = await kept(journal)
    assert (state, told.reason) == (State.UNPUBLISHED, "done")
    assert journal.open_entries == 0
    assert await publish(journal) == ["req_1"]
    assert await states(journal) == {"req_1": State.PUBLISHED}
    assert (journal.unpublished_entries, journal.published_entries) == (0, 1)
    await journal.close()


async def test_the_age_of_what_waits_is_that_of_the_oldest_and_nothing_once_all_is_published(tmp_path: Path) -> None:
    clock = ManualClock(NOW)
    journal = open_journal(tmp_path, clock)
    assert journal.oldest_unpublished_age_s == 0
    journal.record(event("req_1"))
    clock.advance(30)
    journal.record(event("req_2", NOW + timedelta(seconds=30)))
    await journal.sync()
    clock.advance(60)
    (age,) = metrics.USAGE_AGE.collect()
    assert age.samples[0].value == 90
    assert await publish(journal) == ["req_1", "req_2"]
    assert journal.oldest_unpublished_age_s == 0
    await journal.close()


async def test_a_router_keeps_its_id_and_each_run_has_one_of_its_own(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    router_id, instance_id = journal.router_id, journal.instance_id
    await journal.close()
    journal = open_journal(tmp_path)
    assert journal.router_id == router_id
    assert router_id.startswith("router_")
    assert journal.instance_id != instance_id
    await journal.close()


async def test_two_routers_cannot_have_one_folder(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    with pytest.raises(JournalError, match="is in use: each router needs a folder of its own"):
        open_journal(tmp_path)
    await journal.close()
    await open_journal(tmp_path).close()


async def test_a_journal_of_a_newer_version_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    await open_journal(tmp_path).close()
    with lmdb.open(str(tmp_path), max_dbs=4) as environment:
        meta = environment.open_db(b"meta")
        with environment.begin(write=True) as txn:
            txn.put(b"schema_version", b"2", db=meta)
    for _ in range(2):
        with pytest.raises(JournalError, match=r"newer version of the router \(schema 2, this one knows 1\)"):
            open_journal(tmp_path)


async def test_a_file_that_is_no_journal_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"something else" * 1000)
    with pytest.raises(JournalError, match="cannot be opened"):
        open_journal(tmp_path)


async def test_what_was_made_durable_outlives_the_process_and_is_aborted(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.begin(event("req_1"))
    journal.commit()
    journal.begin(event("req_2"))
    crash(journal)
    journal = open_journal(tmp_path)
    ((request_id, state, told),) = await kept(journal)
    assert (request_id, state) == ("req_1", State.UNPUBLISHED)
    assert (told.outcome, told.reason) == (usage_event_pb2.OUTCOME_ABORTED, ROUTER_DIED)
    assert told.usage_source == usage_event_pb2.USAGE_SOURCE_UNSPECIFIED
    assert told.end_time == told.admit_time
    await journal.close()


async def test_an_aborted_request_is_billed_to_its_last_checkpoint_once(tmp_path: Path) -> None:
    settled: list[str] = []

    def settle(told: UsageEvent) -> None:
        settled.append(told.request_id)
        told.cost_micros = told.usage.completion_tokens * 2

    aborted = metrics.JOURNAL_ABORTED._value.get()
    clock = ManualClock(NOW)
    journal = open_journal(tmp_path, clock)
    entry = journal.begin(event("req_1", streamed=True))
    journal.commit()
    for second in range(1, 4):
        clock.advance(1)
        entry.checkpoint(UsageEvent(usage=TokenUsage(completion_tokens=10 * second)).SerializeToString())
    await journal.sync()
    crash(journal)
    for _ in range(2):
        journal = open_journal(tmp_path, settle=settle)
        ((_, _, told),) = await kept(journal)
        crash(journal)
    assert settled == ["req_1"]
    assert metrics.JOURNAL_ABORTED._value.get() == aborted + 1
    assert told.streamed
    assert (told.usage.completion_tokens, told.cost_micros) == (30, 60)
    assert told.usage_source == usage_event_pb2.USAGE_SOURCE_CHECKPOINT
    assert told.end_time.ToDatetime(UTC) == NOW + timedelta(seconds=3)
    assert told.duration_micros == 3_000_000


async def test_one_that_cannot_be_settled_does_not_keep_the_router_from_starting(tmp_path: Path) -> None:
    def settle(told: UsageEvent) -> None:
        if told.request_id == "req_1":
            raise ValueError("no such lease")
        told.cost_micros = 7

    journal = open_journal(tmp_path)
    for number in range(3):
        journal.begin(event(f"req_{number}"))
        journal.commit()
    crash(journal)
    journal = open_journal(tmp_path, settle=settle)
    assert [told.cost_micros for _, _, told in await kept(journal)] == [7, 0, 7]
    await journal.close()


async def test_progress_is_asked_each_second_and_only_what_changed_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.journal._CHECKPOINT_S", 0.01)
    journal = open_journal(tmp_path)
    written: list[Change] = []
    append = journal._log.append

    def spy(changes: Sequence[Change]) -> None:
        append(changes)
        written.extend(changes)

    monkeypatch.setattr(journal._log, "append", spy)
    tokens = 1
    asked = 0

    def progress() -> bytes:
        nonlocal asked
        asked += 1
        return UsageEvent(usage=TokenUsage(completion_tokens=tokens)).SerializeToString()

    def broken() -> bytes:
        raise ZeroDivisionError

    async with running(journal):
        for tell in (broken, progress, lambda: None):
            entry = journal.begin(event("req"))
            entry.progress = tell
            journal.commit()
        await until(lambda: asked > 20)
        tokens = 2
        await until(lambda: len(written) >= 5)
    assert [UsageEvent.FromString(change.event).usage.completion_tokens for change in written] == [0, 0, 0, 1, 2]
    crash(journal)


async def test_a_short_request_is_written_once(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.begin(event("req_1")).end(event("req_1", reason="done"))
    journal.record(event("req_2", reason="refused"))
    await until(lambda: not journal._queue, 1)
    (batch,) = read_log(tmp_path)
    assert [UsageEvent.FromString(change.event).reason for change in batch.changes] == ["done", "refused"]
    assert all(change.ended for change in batch.changes)
    await journal.close()


async def test_an_end_is_written_within_the_commit_time_by_itself(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    entry = journal.begin(event("req_1"))
    journal.commit()
    entry.end(event("req_1", reason="done"))
    await until(lambda: not journal._queue, 1)
    crash(journal)
    journal = open_journal(tmp_path)
    ((_, _, told),) = await kept(journal)
    assert (told.outcome, told.reason) == (usage_event_pb2.OUTCOME_UNSPECIFIED, "done")
    await journal.close()


async def test_killed_between_the_fold_and_its_log_counts_nothing_twice(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "journal")
    journal.begin(event("req_1")).end(event("req_1"))
    open_one = journal.begin(event("req_2"))
    journal.commit()
    log = {name: (tmp_path / "journal" / name).read_bytes() for name in ("log-0", "log-1")}
    await journal.sync()
    open_one.end(event("req_2", reason="done"))
    await journal.sync()
    assert await publish(journal) == ["req_1", "req_2"]
    crash(journal)
    for name, content in log.items():
        (tmp_path / "journal" / name).write_bytes(content)
    journal = open_journal(tmp_path / "journal")
    assert await states(journal) == {"req_1": State.PUBLISHED, "req_2": State.PUBLISHED}
    await journal.close()


@pytest.mark.parametrize("damage", ["cut", "flipped", "zeros"])
def test_log_that_lost_its_end_with_the_power_is_read_up_to_there(tmp_path: Path, damage: str) -> None:
    log = Log(tmp_path)
    for number in range(3):
        log.append([Change(number, True, 0, b"x" * 100)])
    log.close()
    path = tmp_path / "log-0"
    content = path.read_bytes()
    size_bytes = len(content) // 3
    path.write_bytes(
        {
            "cut": content[:-1],
            "flipped": content[:-1] + b"\x00",
            "zeros": content[: 2 * size_bytes] + bytes(10_000),
        }[damage]
    )
    assert [batch.number for batch in read_log(tmp_path)] == [1, 2]


def test_append_that_failed_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tmp_path)
    log.append([Change(1, True, 0, b"x" * 100)])
    write = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", lambda file, frame, at: write(file, frame[:50], at))
        with pytest.raises(OSError, match="No space left"):
            log.append([Change(2, True, 0, b"x" * 100), Change(3, True, 0, b"x" * 100)])
    # Shorter than what is there of the one that failed.
    log.append([Change(4, True, 0, b"")])
    log.append([Change(5, True, 0, b"")])
    log.close()
    assert [change.number for batch in read_log(tmp_path) for change in batch.changes] == [1, 4, 5]


async def test_log_files_take_turns_and_stay_small(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    for number in range(50):
        journal.begin(event(f"req_{number}"))
        journal.commit()
        await journal.sync()
    assert sum((tmp_path / name).stat().st_size for name in ("log-0", "log-1")) < 1000
    assert len(await states(journal)) == 50
    crash(journal)


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


async def test_log_that_cannot_be_written_refuses_requests_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    journal = open_journal(tmp_path)
    entry = journal.begin(event("req_1"))
    journal.commit()
    waiting = journal.begin(event("req_2"))
    with monkeypatch.context() as patch:
        patch.setattr(journal._log, "append", no_space)
        for _ in range(2):
            with pytest.raises(PlatformError) as refused:
                journal.commit()
            assert refused.value.reason is Reason.USAGE_UNRECORDABLE
        waiting.end(event("req_2", reason="usage_unrecordable"))
        with pytest.raises(PlatformError):
            journal.begin(event("req_3"))
        entry.end(event("req_1", reason="done"))
        journal.record(event("req_4"))
        await journal.sync()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    journal.begin(event("req_5"))
    journal.commit()
    told = {request_id: told.reason for request_id, _, told in await kept(journal)}
    assert told == {"req_1": "done", "req_2": "usage_unrecordable", "req_4": "", "req_5": ""}
    await journal.close()


async def test_whoever_finds_out_that_nothing_can_be_written_no_answer_leaves_that_is_not_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(tmp_path)
    async with running(journal):
        before = journal.losses
        journal.begin(event("req_written"))
        journal.secure(before)
        with monkeypatch.context() as patch:
            patch.setattr(journal._log, "append", no_space)
            journal.begin(event("req_unwritten"))
            # The report on leases is what fails first.
            with pytest.raises(PlatformError):
                journal.commit()
            for _ in range(2):
                with pytest.raises(PlatformError) as raised:
                    journal.secure(before)
                assert raised.value.reason is Reason.USAGE_UNRECORDABLE
            # Whose requests all began later is not concerned, nor is anybody by a change of what was written.
            journal.secure(journal.losses)
            after = journal.losses
            with pytest.raises(PlatformError):
                journal.commit()
            assert journal.losses == after
        journal.commit()
        journal.secure(after)
    await journal.close()


async def test_disk_that_cannot_be_synced_refuses_requests_until_it_can_and_forgets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(tmp_path)
    entry = journal.begin(event("req_1"))
    with monkeypatch.context() as patch:
        patch.setattr(journal._store, "_write_meta", no_space)
        await journal.sync()
        with pytest.raises(PlatformError):
            journal.begin(event("req_2"))
        entry.end(event("req_1", reason="done"))
        await journal.sync()
    await journal.sync()
    journal.begin(event("req_3"))
    assert [(request_id, told.reason) for request_id, _, told in await kept(journal)] == [
        ("req_1", "done"),
        ("req_3", ""),
    ]
    crash(journal)


async def test_while_nothing_can_be_written_only_so_many_refused_requests_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("router.journal._WAITING_CHANGES", 10)
    journal = open_journal(tmp_path)
    dropped = metrics.USAGE_DROPPED._value.get()
    entry = journal.begin(event("req"))
    with monkeypatch.context() as patch:
        patch.setattr(journal._log, "append", no_space)
        await journal.sync()
        for number in range(30):
            journal.record(event(f"req_{number}"))
        entry.end(event("req", reason="done"))
    assert metrics.USAGE_DROPPED._value.get() == dropped + 21
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    told = {request_id: told.reason for request_id, _, told in await kept(journal)}
    assert told == {"req": "done", **{f"req_{number}": "" for number in range(9)}}
    await journal.close()


async def fill(journal: Journal) -> int:
    """Begin and end requests until no more are admitted."""
    for number in range(100_000):
        try:
            entry = journal.begin(event(f"req_{number:06}", NOW + timedelta(seconds=number), reason="x" * 400))
        except PlatformError:
            return number
        entry.end(event(f"req_{number:06}", NOW + timedelta(seconds=number), reason="x" * 400))
        if number % 50 == 0:
            await journal.sync()
    raise AssertionError


async def test_full_journal_refuses_requests_and_heals_when_others_are_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.journal._CHECKPOINT_S", 0.01)
    journal = open_journal(tmp_path, limit_bytes=1 << 20)
    dropped = metrics.USAGE_DROPPED._value.get()
    async with running(journal):
        admitted = await fill(journal)
        with pytest.raises(PlatformError) as refused:
            journal.begin(event("req_refused"))
        assert refused.value.reason is Reason.USAGE_UNRECORDABLE
        assert 1000 < admitted < 3000
        journal.record(event("req_refused"))
        assert metrics.USAGE_DROPPED._value.get() == dropped + 1
        await asyncio.sleep(0.05)
        assert len(await states(journal)) == admitted
        found, _ = await journal.read_unpublished(admitted // 2, 1 << 30, ())
        journal.mark_published({key: 1 for key, _ in found})
        await until(lambda: not journal._is_large)
        journal.begin(event("req_again"))
        journal.commit()
    left = await states(journal)
    # The oldest went, none of those that wait, and not more than was needed.
    waiting = {f"req_{number:06}" for number in range(admitted // 2, admitted)}
    assert {request_id for request_id, state in left.items() if state is State.UNPUBLISHED} == waiting
    published = sorted(request_id for request_id, state in left.items() if state is State.PUBLISHED)
    assert len(published) > 100
    assert published == [f"req_{number:06}" for number in range(admitted // 2 - len(published), admitted // 2)]
    await journal.close()


async def test_published_entries_go_after_three_days_and_others_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.journal_store._RETENTION_ENTRIES", 7)
    clock = ManualClock(NOW)
    journal = open_journal(tmp_path, clock)
    for number in range(40):
        journal.record(event(f"req_{number:02}", NOW + timedelta(hours=number)))
        if number == 19:
            await journal.sync()
            assert len(await publish(journal)) == 20
    await journal.sync()
    clock.advance((72 + 10.5) * 3600)
    await journal._drop()
    assert list(await states(journal)) == [f"req_{number:02}" for number in range(11, 40)]
    clock.advance(100 * 3600)
    await journal._drop()
    assert list(await states(journal)) == [f"req_{number:02}" for number in range(20, 40)]
    await journal.close()


async def test_replayed_entries_are_published_again(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    replayed = 0

    def count() -> None:
        nonlocal replayed
        replayed += 1

    journal.on_replayed = count
    for number in range(6):
        journal.record(event(f"req_{number}", NOW + timedelta(hours=number)))
    runs = journal.begin(event("req_runs", NOW + timedelta(hours=2)))
    await journal.sync()
    await publish(journal, attempts=3)
    since, until_ = (int((NOW + timedelta(hours=hours)).timestamp()) * 1_000_000 for hours in (1, 4))
    assert await journal.replay(Selection(start_micros=since, end_micros=until_)) == 3
    assert replayed == 1
    assert await journal.replay(Selection(request_ids=frozenset({"req_5", "req_nobody"}))) == 1
    assert await publish(journal) == ["req_1", "req_2", "req_3", "req_5"]
    runs.end(event("req_runs"))
    await journal.close()


async def test_replay_counts_after_a_confirmation_that_was_not_written_yet(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.record(event("req_1"))
    await journal.sync()
    ((key, _),), _ = await journal.read_unpublished(10, 1 << 20, ())
    journal.mark_published({key: 1})
    assert await journal.read_unpublished(10, 1 << 20, ()) == ([], False)
    assert await journal.replay(Selection()) == 1
    assert await publish(journal) == ["req_1"]
    await journal.close()


async def test_lease_totals_tell_what_was_charged_to_each_lease_by_hour_key_and_model(tmp_path: Path) -> None:
    def charges(**amounts: int) -> list[BudgetCharge]:
        return [BudgetCharge(budget_lease_id=lease_id, charged=amount) for lease_id, amount in amounts.items()]

    journal = open_journal(tmp_path)
    journal.record(event("req_1", NOW, api_key_id="key_1", budgets=charges(lease_1=5, lease_2=50)))
    journal.record(event("req_2", NOW + timedelta(minutes=59), api_key_id="key_1", budgets=charges(lease_1=7)))
    journal.record(event("req_3", NOW + timedelta(minutes=61), api_key_id="key_1", budgets=charges(lease_1=11)))
    journal.record(event("req_4", NOW, api_key_id="key_2", budgets=charges(lease_3=9)))
    journal.begin(event("req_5", NOW, api_key_id="key_2", budgets=charges(lease_1=100)))
    hour = int(NOW.timestamp())
    assert await journal.lease_totals(["lease_1", "lease_2", "lease_4"]) == {
        "lease_1": {Spender(hour, "key_1", "m"): (12, 2), Spender(hour + 3600, "key_1", "m"): (11, 1)},
        "lease_2": {Spender(hour, "key_1", "m"): (50, 1)},
        "lease_4": {},
    }
    crash(journal)


async def test_what_comes_while_a_fold_runs_is_in_the_next(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    ended: list[str] = []
    journal.on_ended = lambda found: ended.extend(UsageEvent.FromString(told).request_id for _, told in found)
    syncs = []
    for number in range(200):
        journal.record(event(f"req_{number:03}"))
        syncs.append(asyncio.create_task(journal.sync()))
        await asyncio.sleep(0)
    await asyncio.gather(*syncs)
    assert ended == [f"req_{number:03}" for number in range(200)]
    await journal.close()


async def test_closing_keeps_what_was_queued(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    async with running(journal):
        journal.record(event("req_1"))
        journal.begin(event("req_2"))
    await journal.close()
    shutil.copytree(tmp_path, tmp_path / "copy")
    journal = open_journal(tmp_path / "copy")
    assert [request_id for request_id, _, _ in await kept(journal)] == ["req_1", "req_2"]
    await journal.close()


def test_batches_of_both_files_are_read_in_their_order(tmp_path: Path) -> None:
    log = Log(tmp_path)
    for number in range(4):
        log.append([Change(number, True, 0, b"")])
        log.turn()
        if number == 1:
            log.clear_other()
    log.close()
    assert [type(batch) for batch in read_log(tmp_path)] == [Batch] * 3
    assert [batch.number for batch in read_log(tmp_path)] == [2, 3, 4]

"""The journal against a model of it, and against kill -9 in the middle of everything."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aiaas.type.v1.usage_event_pb2 import OUTCOME_ABORTED, OUTCOME_SUCCEEDED, TokenUsage, UsageEvent
from mesh.clock import SystemClock
from router.journal import Entry, Journal
from router.journal_queries import Selection, list_entries
from router.journal_store import FIRST_KEY, State
from tests.doubles.clock import ManualClock

LIMIT_BYTES = 64 << 20


def event(request_id: str, **fields: Any) -> bytes:
    message = UsageEvent(request_id=request_id, **fields)
    message.admit_time.FromDatetime(SystemClock().now())
    return message.SerializeToString()


def tokens(produced: int) -> TokenUsage:
    return TokenUsage(completion_tokens=produced)


def crash(journal: Journal) -> None:
    """What a kill -9 leaves: what was only in memory is gone."""
    journal._writing.shutdown()
    journal._reading.shutdown()
    journal._held.close()


class JournalModel(RuleBasedStateMachine):
    """Requests as a dict: what each entry must be, in memory and on the disk."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.runner.get_loop()
        self.folder = tempfile.TemporaryDirectory()
        self.entries: dict[str, Entry] = {}
        # State and tokens of each request; what is on the disk, and what only was told.
        self.durable: dict[str, tuple[State | None, int]] = {}
        self.told: dict[str, tuple[State | None, int]] = {}
        self.numbers = count()
        # What is committed is said by the rules, not by how long they take.
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("router.journal._COMMIT_S", 3600.0)
        self.open()

    def open(self) -> None:
        self.journal = Journal(Path(self.folder.name), LIMIT_BYTES, ManualClock(), lambda _: None)

    def teardown(self) -> None:
        crash(self.journal)
        self.patch.undo()
        self.runner.close()
        self.folder.cleanup()

    def do(self, call: Any, *arguments: Any) -> Any:
        """Journals are called on an event loop, of which no time passes here but where it is said."""

        async def run() -> Any:
            return call(*arguments)

        return self.runner.run(run())

    def commit(self) -> None:
        self.durable.update(self.told)
        self.told.clear()

    def pick(self, data: st.DataObject) -> str:
        return str(data.draw(st.sampled_from(sorted(self.entries))))

    @rule()
    def begin(self) -> None:
        request_id = f"req_{next(self.numbers)}"
        self.entries[request_id] = self.do(self.journal.begin, event(request_id))
        self.told[request_id] = (State.OPEN, 0)

    @rule(produced=st.integers(1, 100))
    def refuse(self, produced: int) -> None:
        request_id = f"req_{next(self.numbers)}"
        self.do(self.journal.record, event(request_id, outcome=OUTCOME_SUCCEEDED, usage=tokens(produced)))
        self.told[request_id] = (State.UNPUBLISHED, produced)

    @rule()
    def make_durable(self) -> None:
        self.do(self.journal.commit)
        self.commit()

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), produced=st.integers(1, 100))
    def checkpoint(self, data: st.DataObject, produced: int) -> None:
        request_id = self.pick(data)
        fragment = UsageEvent(usage=tokens(produced)).SerializeToString()
        self.do(self.entries[request_id].checkpoint, fragment)
        if {**self.durable, **self.told}[request_id] != (State.OPEN, produced):
            self.told[request_id] = (State.OPEN, produced)

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), produced=st.integers(1, 100))
    def end(self, data: st.DataObject, produced: int) -> None:
        request_id = self.pick(data)
        ended = event(request_id, outcome=OUTCOME_SUCCEEDED, usage=tokens(produced))
        self.do(self.entries.pop(request_id).end, ended)
        self.told[request_id] = (State.UNPUBLISHED, produced)

    @rule()
    def sync(self) -> None:
        self.runner.run(self.journal.sync())
        self.commit()

    @rule(limit=st.integers(1, 5))
    def publish(self, limit: int) -> None:
        self.sync()
        found, _ = self.runner.run(self.journal.read_unpublished(limit, 1 << 20, ()))
        self.journal.mark_published({key: 1 for key, _ in found})
        self.runner.run(self.journal.sync())
        for _, told in found:
            request_id = UsageEvent.FromString(told).request_id
            state, produced = self.durable[request_id]
            assert state is State.UNPUBLISHED
            self.durable[request_id] = (State.PUBLISHED, produced)

    @rule()
    def replay(self) -> None:
        self.sync()
        assert self.runner.run(self.journal.replay(Selection())) == sum(
            state is not State.OPEN for state, _ in self.durable.values()
        )
        for request_id, (state, produced) in self.durable.items():
            if state is not State.OPEN:
                self.durable[request_id] = (State.UNPUBLISHED, produced)

    @rule()
    def kill(self) -> None:
        self.told.clear()
        self.restart()

    @rule()
    def stop(self) -> None:
        # Requests that run at the end are aborted by the next start, however it came.
        self.runner.run(self.journal.sync())
        self.commit()
        self.restart()

    def restart(self) -> None:
        crash(self.journal)
        self.entries.clear()
        for request_id, (state, produced) in self.durable.items():
            if state is State.OPEN:
                self.durable[request_id] = (State.UNPUBLISHED, produced)
        self.open()

    @invariant()
    def agrees(self) -> None:
        if self.told:
            return
        self.runner.run(self.journal.sync())
        stored = list_entries(self.journal.store, Selection(), FIRST_KEY, 10_000)
        events = [(UsageEvent.FromString(entry.event), entry.state) for entry in stored]
        found = {told.request_id: (state, told.usage.completion_tokens) for told, state in events}
        assert len(found) == len(events)
        assert found == self.durable


JournalModel.TestCase.settings = settings(
    max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


class TestJournalModel(JournalModel.TestCase):  # type: ignore[misc,valid-type]  # hypothesis makes the class
    """The journal does what the dict does."""


async def _storm(folder: Path, durable: bool) -> None:
    """In a process of its own: begin, tell the request's id once it is durable, checkpoint, end, without a pause."""
    journal = Journal(folder, LIMIT_BYTES, SystemClock(), lambda _: None)

    async def requests(client: int) -> None:
        number = 0
        while True:
            number += 1
            request_id = f"req_{client}_{number}"
            entry = journal.begin(event(request_id))
            await asyncio.sleep(0)
            if durable:
                journal.commit()
            os.write(1, f"{request_id}\n".encode())
            for produced in range(number % 4):
                entry.checkpoint(UsageEvent(usage=tokens(produced + 1)).SerializeToString())
                await asyncio.sleep(0.001 * (client % 5))
            entry.end(event(request_id, outcome=OUTCOME_SUCCEEDED, usage=tokens(number)))
            journal.mark_published({key: 1 for key, _ in (await journal.read_unpublished(3, 1 << 20, ()))[0]})

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(journal.run())
        for client in range(30):
            tasks.create_task(requests(client))


def _killed_in_a_storm(folder: Path, *, durable: bool, after: int) -> list[str]:
    """What a router had made durable when it was killed, after about so many requests."""
    told = b""
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder), str(int(durable))],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    deadline = time.monotonic() + 30
    while told.count(b"\n") < after:
        assert time.monotonic() < deadline
        read = os.read(process.stdout.fileno(), 65536)
        assert read
        told += read
    process.send_signal(signal.SIGKILL)
    told += process.stdout.read()
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    # The last line may be cut off.
    return told.decode().split("\n")[:-1]


def _recovered(folder: Path) -> Counter[str]:
    journal = Journal(folder, LIMIT_BYTES, SystemClock(), lambda _: None)
    stored = list_entries(journal.store, Selection(), FIRST_KEY, 1_000_000)
    counted: Counter[str] = Counter()
    for entry in stored:
        told = UsageEvent.FromString(entry.event)
        assert entry.state is not State.OPEN
        assert told.outcome in (OUTCOME_SUCCEEDED, OUTCOME_ABORTED)
        counted[told.request_id] += 1
    crash(journal)
    return counted


def test_after_kill_9_every_durable_request_has_exactly_one_terminal_entry(tmp_path: Path) -> None:
    durable: list[str] = []
    for run, after in enumerate((50, 300, 1000)):
        folder = tmp_path / str(run)
        durable = _killed_in_a_storm(folder, durable=True, after=after)
        counted = _recovered(folder)
        assert set(durable) <= counted.keys()
        assert set(counted.values()) == {1}
        # A second start finds the same.
        assert _recovered(folder) == counted


def test_without_a_commit_the_same_test_finds_the_loss(tmp_path: Path) -> None:
    for run in range(5):
        folder = tmp_path / str(run)
        durable = _killed_in_a_storm(folder, durable=False, after=100)
        if not set(durable) <= _recovered(folder).keys():
            return
    pytest.fail("nothing was lost")


if __name__ == "__main__":
    asyncio.run(_storm(Path(sys.argv[1]), sys.argv[2] == "1"))

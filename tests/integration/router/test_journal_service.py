"""JournalService over gRPC, its command line, and a journal emptied into a real RabbitMQ that goes away."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.router.v1 import journal_service_pb2 as pb
from aiaas.router.v1.journal_service_pb2_grpc import JournalServiceStub, add_JournalServiceServicer_to_server
from aiaas.type.v1.usage_event_pb2 import TokenUsage, UsageEvent, UsageEventBatch
from deploy.local.certificates import Authority
from mesh.auth import CachedAuthenticator
from mesh.broker import Broker
from mesh.errors import PlatformError, Reason, from_rpc_error
from mesh.interceptors import chain
from mesh.server import GrpcServer
from mesh.tls import Tls
from mesh.topology import USAGE
from router import journal_cli
from router.journal import Journal
from router.journal_service import JournalService
from router.publisher import Publishing, UsagePublisher
from tests.conftest import Servers
from tests.doubles.clock import ManualClock
from tests.doubles.tcp_gate import TcpGate
from tests.integration.mesh.certificates import Files

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


def at(minutes: int) -> Timestamp:
    """So many minutes after noon."""
    moment = Timestamp()
    moment.FromDatetime(NOW + timedelta(minutes=minutes))
    return moment


class AwayBroker:
    """RabbitMQ is away, until a test says otherwise."""

    def __init__(self) -> None:
        self.away = True
        self.request_ids: list[str] = []

    async def publish(self, exchange: str, routing_key: str, body: bytes, *, timeout_s: float) -> None:
        if self.away:
            raise PlatformError(Reason.UNAVAILABLE)
        self.request_ids += (
            UsageEvent.FromString(event).request_id for event in UsageEventBatch.FromString(body).events
        )


@dataclass
class Serving:
    """A journal that is served and published."""

    journal: Journal
    publisher: UsagePublisher
    stub: JournalServiceStub
    target: str

    async def call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=10, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def status(self) -> pb.JournalStatus:
        status: pb.JournalStatus = (await self.call(self.stub.GetJournalStatus, pb.GetJournalStatusRequest())).status
        return status

    async def list(self, **fields: Any) -> list[str]:
        """The requests of all pages, with their states."""
        request = pb.ListJournalEntriesRequest(**fields)
        found: list[str] = []
        while True:
            page = await self.call(self.stub.ListJournalEntries, request)
            found += (f"{entry.event.request_id} {entry.state}" for entry in page.entries)
            request.page_token = page.next_page_token
            if not request.page_token:
                return found


@contextlib.asynccontextmanager
async def serving(folder: Path, broker: Publishing, tls: Tls | None = None) -> AsyncIterator[Serving]:
    clock = ManualClock(NOW)
    journal = Journal(folder / "journal", 64 << 20, clock, lambda _: None)
    publisher = UsagePublisher(broker, journal, Random(1))
    target = f"unix:{folder}/router.sock"
    nobody: Any = None
    server = GrpcServer(
        target,
        [
            (
                pb.DESCRIPTOR.services_by_name["JournalService"],
                add_JournalServiceServicer_to_server,
                JournalService(journal, publisher, clock),
            )
        ],
        chain(CachedAuthenticator(nobody, clock, Random(1))),
        drain_s=1,
        tls=tls,
    )
    await server.start()
    tasks = [asyncio.create_task(journal.run()), asyncio.create_task(publisher.run())]
    channel = grpc.aio.insecure_channel(target)
    try:
        yield Serving(journal, publisher, JournalServiceStub(channel), target)
    finally:
        await channel.close(None)
        await server.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await journal.close()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Serving]:
    """With nine ended requests, one each ten minutes of two organizations and two keys, and one that runs."""
    async with serving(tmp_path, AwayBroker()) as served:
        for number in range(9):
            served.journal.record(event(number))
        served.journal.begin(event(9))
        served.journal.commit()
        yield served


def event(number: int) -> bytes:
    message = UsageEvent(
        request_id=f"req_{number}",
        organization_id="org_a" if number % 3 else "org_b",
        api_key_id=f"key_{number % 2}",
        model="m",
        usage=TokenUsage(prompt_tokens=number, cached_prompt_tokens=1, completion_tokens=2, reasoning_tokens=1),
        cost_micros=10 * number,
    )
    message.admit_time.FromDatetime(NOW + timedelta(minutes=10 * number))
    return message.SerializeToString()


async def until(condition: Callable[[], Any], within_s: float = 20) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


async def test_status_tells_how_the_journal_stands(served: Serving) -> None:
    async with asyncio.timeout(5):
        while (status := await served.status()).publish_failure_reason != "unavailable":
            await asyncio.sleep(0.01)
    assert status.router_id == served.journal.router_id
    assert (status.open_entries, status.unpublished_entries, status.published_entries) == (1, 9, 0)
    assert status.oldest_unpublished_time.ToDatetime(UTC) == NOW
    assert 0 < status.size_bytes < status.limit_bytes == 64 << 20


async def test_entries_are_listed_by_admission_in_pages(served: Serving) -> None:
    whole = [f"req_{number} 2" for number in range(9)] + ["req_9 1"]
    for page_size in (1, 3, 10, 100):
        assert await served.list(page_size=page_size) == whole
    assert await served.list(state=pb.JOURNAL_ENTRY_STATE_OPEN) == ["req_9 1"]
    assert await served.list(state=pb.JOURNAL_ENTRY_STATE_PUBLISHED) == []
    assert await served.list(organization_id="org_b", page_size=2) == ["req_0 2", "req_3 2", "req_6 2", "req_9 1"]
    assert await served.list(request_id="req_4") == ["req_4 2"]
    assert await served.list(start_time=at(20), end_time=at(40)) == [
        "req_2 2",
        "req_3 2",
    ]


async def test_an_entry_tells_what_is_known_of_it(served: Serving) -> None:
    page = await served.call(served.stub.ListJournalEntries, pb.ListJournalEntriesRequest(request_id="req_9"))
    assert page.entries[0].event == UsageEvent.FromString(event(9))
    assert page.entries[0].checkpoint_time == page.entries[0].event.admit_time
    await until(lambda: served.publisher.failure_reason)
    page = await served.call(served.stub.ListJournalEntries, pb.ListJournalEntriesRequest(request_id="req_1"))
    assert page.entries[0].publish_attempts >= 1
    assert page.entries[0].checkpoint_time.ToDatetime(UTC) == NOW


async def test_totals_add_up_by_organization_hour_key_and_model(served: Serving) -> None:
    def request(**fields: Any) -> pb.QueryJournalTotalsRequest:
        return pb.QueryJournalTotalsRequest(start_time=at(0), end_time=at(120), **fields)

    found: list[pb.JournalTotal] = []
    token = ""
    while True:
        page = await served.call(served.stub.QueryJournalTotals, request(page_size=2, page_token=token))
        assert page.router_id == served.journal.router_id
        assert len(page.totals) <= 2
        found += page.totals
        token = page.next_page_token
        if not token:
            break
    told = [
        (total.organization_id, total.hour_start.ToDatetime(UTC).hour, total.api_key_id, total.requests)
        for total in found
    ]
    assert told == [
        ("org_a", 12, "key_0", 2),
        ("org_a", 12, "key_1", 2),
        ("org_a", 13, "key_0", 1),
        ("org_a", 13, "key_1", 1),
        ("org_b", 12, "key_0", 1),
        ("org_b", 12, "key_1", 1),
        ("org_b", 13, "key_0", 1),
    ]
    assert sum(total.cost_micros for total in found) == 10 * sum(range(9))
    usage = found[0].usage
    assert usage == TokenUsage(prompt_tokens=6, cached_prompt_tokens=2, completion_tokens=4, reasoning_tokens=2)
    only = await served.call(served.stub.QueryJournalTotals, request(organization_id="org_b"))
    assert list(only.totals) == found[4:]


async def test_totals_of_a_new_question_are_new(served: Serving) -> None:
    request = pb.QueryJournalTotalsRequest(start_time=at(0), end_time=at(60), page_size=500)
    assert sum(total.requests for total in (await served.call(served.stub.QueryJournalTotals, request)).totals) == 6
    served.journal.record(event(0))
    assert sum(total.requests for total in (await served.call(served.stub.QueryJournalTotals, request)).totals) == 7


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("ListJournalEntries", pb.ListJournalEntriesRequest(page_size=-1), "page_size"),
        ("ListJournalEntries", pb.ListJournalEntriesRequest(page_token="x"), "page_token"),
        ("ListJournalEntries", pb.ListJournalEntriesRequest(start_time=at(0), end_time=at(0)), "end_time"),
        ("ReplayJournal", pb.ReplayJournalRequest(), "start_time"),
        ("ReplayJournal", pb.ReplayJournalRequest(start_time=at(0)), "end_time"),
        ("QueryJournalTotals", pb.QueryJournalTotalsRequest(start_time=at(0)), "end_time"),
        ("QueryJournalTotals", pb.QueryJournalTotalsRequest(end_time=at(0)), "start_time"),
        (
            "QueryJournalTotals",
            pb.QueryJournalTotalsRequest(start_time=at(1), end_time=at(60)),
            "start_time",
        ),
    ],
)
async def test_bad_questions_are_refused_by_name(served: Serving, method: str, request_: Any, field: str) -> None:
    with pytest.raises(PlatformError) as refused:
        await served.call(getattr(served.stub, method), request_)
    assert (refused.value.reason, refused.value.field) == (Reason.INVALID_ARGUMENT, field)


async def test_replay_publishes_a_range_again(tmp_path: Path) -> None:
    broker = AwayBroker()
    broker.away = False
    async with serving(tmp_path, broker) as served:
        for number in range(9):
            served.journal.record(event(number))
        await served.publisher.flush(5)
        assert await served.list(state=pb.JOURNAL_ENTRY_STATE_PUBLISHED) == [f"req_{number} 3" for number in range(9)]
        broker.request_ids.clear()
        request = pb.ReplayJournalRequest(start_time=at(10), end_time=at(50), organization_id="org_a")
        assert (await served.call(served.stub.ReplayJournal, request)).entries == 3
        await served.publisher.flush(5)
        assert broker.request_ids == ["req_1", "req_2", "req_4"]


async def test_command_line_asks_a_router_that_runs(served: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    async def run(*arguments: str) -> list[Any]:
        status = await asyncio.to_thread(journal_cli.main, [*arguments, "--target", served.target])
        told = capsys.readouterr()
        assert (status, told.err) == (0, "")
        return [json.loads(line) for line in told.out.splitlines()]

    (status,) = await run("status")
    assert status["unpublished_entries"] == "9"
    entries = await run("list", "--state", "unpublished", "--organization", "org_b", "--since", "2026-11-20T12:01")
    assert [entry["event"]["request_id"] for entry in entries] == ["req_3", "req_6"]
    totals = await run("totals", "--since", "2026-11-20T13:00", "--until", "2026-11-20T14:00+00:00")
    assert [total["requests"] for total in totals] == ["1", "1", "1"]
    assert await run("replay", "--request", "req_1", "--request", "req_2") == [{"entries": "2"}]


async def test_command_line_has_the_certificate_of_its_router(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority.make()
    certificates = Files(tmp_path / "router"), Files(tmp_path / "tool")
    for service, files in zip(("router", "tool"), certificates, strict=True):
        files.put(authority.issue(service), authority)
    clock = ManualClock(NOW)
    arguments = ["status", "--target", f"unix:{tmp_path}/router.sock"]
    async with serving(tmp_path, AwayBroker(), Tls(certificates[0].config, clock)):
        seen = []
        for files in certificates:
            for name in ("certificate", "key", "ca"):
                monkeypatch.setenv(f"AIAAS_TLS_{name.upper()}_PATH", str(getattr(files, name)))
            seen.append((await asyncio.to_thread(journal_cli.main, arguments), capsys.readouterr().err))
    assert seen == [(0, ""), (1, "journal: The certificate of this caller is not for this call.\n")]


async def test_command_line_reads_the_folder_of_a_killed_router_and_leaves_it_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "journal"
    journal = Journal(folder, 64 << 20, ManualClock(NOW), lambda _: None)
    journal.record(event(0))
    await journal.sync()
    # Of this only the log knows.
    journal.record(event(1))
    journal.begin(event(2))
    journal.commit()

    async def run(*arguments: str) -> tuple[int, list[Any], str]:
        status = await asyncio.to_thread(journal_cli.main, [*arguments, "--folder", str(folder)])
        told = capsys.readouterr()
        return status, [json.loads(line) for line in told.out.splitlines()], told.err

    failed, _, why = await run("status")
    assert (failed, "is in use" in why) == (1, True)
    journal._writing.shutdown()
    journal._reading.shutdown()
    journal._held.close()

    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock.mdb"}
    _, (status,), _ = await run("status")
    assert (status["open_entries"], status["unpublished_entries"]) == ("1", "2")
    _, entries, _ = await run("list")
    assert [entry["event"]["request_id"] for entry in entries] == ["req_0", "req_1", "req_2"]
    _, totals, _ = await run("totals", "--since", "2026-11-20T12:00", "--until", "2026-11-20T13:00")
    assert [total["requests"] for total in totals] == ["1", "1"]
    failed, _, why = await run("replay", "--request", "req_1")
    assert (failed, why) == (1, "journal: Only a running router can replay; use --target.\n")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock.mdb"} == before


def test_command_line_says_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert journal_cli.main(["status", "--folder", str(tmp_path)]) == 1
    assert "there is no journal in" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert journal_cli.main(["status", "--target", f"unix:{tmp_path}/nobody.sock"]) == 1
    assert capsys.readouterr().err.startswith("journal: ")


async def test_nothing_is_lost_while_rabbitmq_is_away_and_the_router_restarts(
    amqp_url: str, servers: Servers, tmp_path: Path
) -> None:
    address = urlsplit(amqp_url)
    async with TcpGate(address.hostname or "", address.port or 0) as gate:
        url = address._replace(netloc=f"{address.username}:{address.password}@127.0.0.1:{gate.port}").geturl()
        for run in range(2):
            broker = Broker(url, USAGE)
            async with serving(tmp_path, broker) as served:
                served.journal.record(event(10 * run))
                await served.publisher.flush(10)
                await gate.shut()
                for number in range(10 * run + 1, 10 * run + 9):
                    served.journal.record(event(number))
                await until(lambda served=served: served.publisher.failure_reason)  # type: ignore[misc]
                if run:
                    await gate.open()
                    await served.publisher.flush(20)
                    assert await served.list(state=pb.JOURNAL_ENTRY_STATE_UNPUBLISHED) == []
            await broker.close()
            if not run:
                await gate.open()
    async with await aio_pika.connect(amqp_url) as connection:
        queue = await (await connection.channel()).get_queue(USAGE.name)
        found: set[str] = set()
        while message := await queue.get(no_ack=True, fail=False):
            found |= {
                UsageEvent.FromString(told).request_id for told in UsageEventBatch.FromString(message.body).events
            }
    assert found == {f"req_{number}" for number in (*range(9), *range(10, 19))}

"""Exports into real object storage: what is in them, whose they are, and what becomes of them when something breaks."""

from __future__ import annotations

import asyncio
import csv
import gzip
import hashlib
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.analytics.v1 import export_service_pb2 as pb
from aiaas.analytics.v1 import export_service_pb2_grpc
from aiaas.analytics.v1.usage_service_pb2 import UsageFilter
from analytics.events import read_event
from analytics.export_service import ExportService
from analytics.export_store import LEASE, ExportStore
from analytics.exporter import Exporter
from analytics.exports import AT_ONCE, KEPT
from analytics.object_storage import Storage
from analytics.store import UsageStore
from analytics.usage_retention import Kept, close_days, remove_old
from deploy.local.servers import SeaweedFS
from mesh.auth import Principal
from mesh.database import Database
from mesh.errors import PlatformError, Reason, from_rpc_error
from mesh.interceptors import chain
from mesh.server import GrpcServer
from tests.doubles.clock import ManualClock
from tests.doubles.tcp_gate import TcpGate
from tests.doubles.usage_events import NOW, usage_event
from tests.integration.analytics.harness import wait_until

T = TypeVar("T")

PERMISSIONS = frozenset(
    [f"exports.{verb}" for verb in ("create", "get", "list", "cancel")]
    + [f"export_schedules.{verb}" for verb in ("get", "update")]
)
START, END = (
    NOW.replace(hour=0, minute=0, second=0, microsecond=0),
    NOW.replace(hour=13, minute=0, second=0, microsecond=0),
)


class Authenticated:
    """Takes a credential for the id of its organization."""

    async def authenticate(self, credential: str) -> Principal:
        return Principal("user", "user_a", credential, permissions=PERMISSIONS)


@dataclass
class Exports:
    """Calls that carry the credential of an organization, and what is behind them."""

    stub: export_service_pb2_grpc.ExportServiceStub
    store: ExportStore
    usage: UsageStore
    storage: Storage
    exporter: Exporter
    clock: ManualClock

    async def call(self, method: Callable[..., Awaitable[T]], request: object, credential: str = "org_a") -> T:
        return await method(request, metadata=(("authorization", f"Bearer {credential}"),), timeout=20)

    async def refused(self, method: Callable[..., Awaitable[Any]], request: object) -> PlatformError:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await self.call(method, request)
        return from_rpc_error(raised.value)

    async def count(self, *events: Any) -> None:
        now = self.clock.now()
        await self.usage.insert_events([read_event(event.SerializeToString(), now) for event in events])

    async def create(self, organization_id: str = "org_a", request_id: str = "", **fields: Any) -> pb.Export:
        request = pb.CreateExportRequest(
            organization_id=organization_id, export=export(**fields), request_id=request_id
        )
        return (await self.call(self.stub.CreateExport, request, organization_id)).export

    async def get(self, made: pb.Export) -> pb.GetExportResponse:
        request = pb.GetExportRequest(organization_id=made.organization_id, export_id=made.export_id)
        return await self.call(self.stub.GetExport, request, made.organization_id)

    async def made(self, **fields: Any) -> tuple[pb.Export, bytes]:
        """An export that succeeded, and its file."""
        made = await self.create(**fields)
        assert await self.exporter.work()
        told = await self.get(made)
        assert told.export.state == pb.EXPORT_STATE_SUCCEEDED, told.export
        return told.export, await fetched(told.download_url)


def export(
    granularity: str = "RAW", format_: str = "CSV", compression: str = "UNSPECIFIED", **fields: Any
) -> pb.Export:
    wanted = {
        "granularity": f"EXPORT_GRANULARITY_{granularity}",
        "format": f"EXPORT_FORMAT_{format_}",
        "compression": f"EXPORT_COMPRESSION_{compression}",
        "start_time": at(START),
        "end_time": at(END),
        **fields,
    }
    return pb.Export(**{name: value for name, value in wanted.items() if value is not None})


def at(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp


async def fetched(url: str, status: int = 200) -> bytes:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        assert answer.status == status, await answer.text()
        return await answer.read()


def rows_of(file: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.decode(), newline="")))


def storage_at(url: str, seaweedfs: SeaweedFS, secret: str = "") -> Storage:
    return Storage(url, seaweedfs.bucket, "us-east-1", seaweedfs.access_key, secret or seaweedfs.secret_key)


@asynccontextmanager
async def serving(database: Database, folder: Path, storage: Storage) -> AsyncIterator[Exports]:
    clock, store = ManualClock(NOW + timedelta(hours=1)), ExportStore(database)
    exporter = Exporter(store, storage, clock)
    server = GrpcServer(
        f"unix:{folder}/analytics",
        [
            (
                pb.DESCRIPTOR.services_by_name["ExportService"],
                export_service_pb2_grpc.add_ExportServiceServicer_to_server,
                ExportService(store, storage, exporter, clock),
            )
        ],
        chain(Authenticated()),
        drain_s=1,
    )
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{folder}/analytics") as channel:
        stub = export_service_pb2_grpc.ExportServiceStub(channel)
        yield Exports(stub, store, UsageStore(database), storage, exporter, clock)
    await server.stop()


@pytest.fixture
async def exports(database: Database, tmp_path: Path, seaweedfs: SeaweedFS) -> AsyncIterator[Exports]:
    async with serving(database, tmp_path, storage_at(seaweedfs.url, seaweedfs)) as exports:
        yield exports


async def test_every_request_is_a_row_and_the_manifest_tells_of_the_file(exports: Exports) -> None:
    await exports.count(
        *(usage_event(f"req_{number}", NOW - timedelta(minutes=number), cost_micros=number) for number in range(7)),
        usage_event("=cmd()", model="@model"),
        usage_event("req_other", organization_id="org_b"),
        usage_event("req_before", START - timedelta(seconds=1)),
    )
    told, file = await exports.made()
    rows = rows_of(file)
    assert [row["request_id"] for row in rows] == [f"req_{number}" for number in (6, 5, 4, 3, 2, 1)] + [
        "'=cmd()",
        "req_0",
    ]
    assert sum(int(row["cost_micros"]) for row in rows) == 25 + sum(range(7))
    assert rows[-1] | {"admit_time": ""} == {
        "admit_time": "",
        "request_id": "req_0",
        "api_key_id": "key_a",
        "user_id": "user_a",
        "service_account_id": "",
        "model": "smollm2",
        "backend_id": "backend-1",
        "endpoint": "ENDPOINT_CHAT_COMPLETIONS",
        "outcome": "OUTCOME_SUCCEEDED",
        "reason": "",
        "finish_reason": "",
        "streamed": "false",
        "prompt_tokens": "10",
        "cached_prompt_tokens": "4",
        "completion_tokens": "5",
        "cost_micros": "0",
        "duration_micros": "0",
        "ttft_micros": "0",
    }
    assert (told.rows, told.size_bytes, told.progress_percent) == (8, len(file), 100)
    assert told.sha256 == hashlib.sha256(file).digest()
    assert told.object_key == f"exports/org_a/{told.export_id}.csv"
    manifest = json.loads(await fetched((await exports.get(told)).manifest_url))
    assert (manifest["rows"], manifest["sha256"]) == (8, told.sha256.hex())
    assert manifest["columns"]["cost_micros"] == "number"


@pytest.mark.parametrize(
    ("granularity", "starts"),
    [("HOURLY", [(11, 1), (12, 2)]), ("DAILY", [(0, 3)]), ("MONTHLY", [(0, 3)])],
)
async def test_sums_are_of_whole_periods(exports: Exports, granularity: str, starts: list[tuple[int, int]]) -> None:
    await exports.count(
        usage_event("req_1", NOW), usage_event("req_2", NOW), usage_event("req_3", NOW - timedelta(hours=1))
    )
    _, file = await exports.made(granularity=granularity)
    rows = [(datetime.fromisoformat(row["start_time"]).hour, int(row["requests"])) for row in rows_of(file)]
    assert rows == starts
    assert sum(int(row["cost_micros"]) for row in rows_of(file)) == 75


async def test_days_are_exported_when_their_hours_are_gone(exports: Exports) -> None:
    day = (NOW - timedelta(days=100)).replace(hour=0, minute=0, second=0, microsecond=0)
    await exports.count(
        *(usage_event(f"req_{hour}", day + timedelta(hours=hour)) for hour in (0, 23, 24)), usage_event("req_new")
    )
    await close_days(exports.usage, exports.clock)
    await remove_old(exports.usage, exports.clock, Kept())
    whole: dict[str, Any] = {"start_time": at(day), "end_time": at(day + timedelta(days=2))}
    for granularity, requests in (("DAILY", ["2", "1"]), ("MONTHLY", ["3"])):
        _, file = await exports.made(granularity=granularity, **whole)
        assert [row["requests"] for row in rows_of(file)] == requests
    part = {**whole, "start_time": at(day + timedelta(hours=1))}
    for granularity, fields in (("HOURLY", whole), ("DAILY", part)):
        made = await exports.create(granularity=granularity, **fields)
        assert await exports.exporter.work()
        told = (await exports.get(made)).export
        assert (told.state, told.failure_reason) == (pb.EXPORT_STATE_FAILED, "hours_gone")


async def test_parquet_and_compressed_files_hold_the_same(exports: Exports) -> None:
    await exports.count(*(usage_event(f"req_{number}") for number in range(5)))
    _, plain = await exports.made()
    told, packed = await exports.made(compression="GZIP")
    assert gzip.decompress(packed) == plain
    assert told.object_key.endswith(".csv.gz")
    told, file = await exports.made(format_="PARQUET")
    table = pq.read_table(pa.BufferReader(file))
    assert told.object_key.endswith(".parquet")
    assert sorted(table["request_id"].to_pylist()) == [f"req_{number}" for number in range(5)]
    assert sum(table["cost_micros"].to_pylist()) == 125


async def test_filter_narrows_and_nothing_of_another_organization_is_reached(exports: Exports) -> None:
    await exports.count(
        usage_event("req_1", model="one"),
        usage_event("req_2", model="two"),
        usage_event("req_3", model="two", organization_id="org_b"),
    )
    _, file = await exports.made(filter=UsageFilter(models=["two"]))
    assert [row["request_id"] for row in rows_of(file)] == ["req_2"]
    theirs = await exports.create("org_b")
    for method, request in (
        (exports.stub.GetExport, pb.GetExportRequest),
        (exports.stub.CancelExport, pb.CancelExportRequest),
        (exports.stub.RetryExport, pb.RetryExportRequest),
    ):
        error = await exports.refused(method, request(organization_id="org_a", export_id=theirs.export_id))
        assert error.reason is Reason.NOT_FOUND
        error = await exports.refused(method, request(organization_id="org_b", export_id=theirs.export_id))
        assert error.reason is Reason.NOT_FOUND
    listed = await exports.call(exports.stub.ListExports, pb.ListExportsRequest(organization_id="org_a"))
    assert theirs.export_id not in {one.export_id for one in listed.exports}


async def test_cancelled_export_leaves_nothing_in_storage(exports: Exports) -> None:
    await exports.count(usage_event())
    made = await exports.create()
    claimed = await exports.store.claim(exports.clock.now())
    assert claimed is not None
    request = pb.CancelExportRequest(organization_id="org_a", export_id=made.export_id)
    cancelled = (await exports.call(exports.stub.CancelExport, request)).export
    assert (cancelled.state, cancelled.failure_reason) == (pb.EXPORT_STATE_FAILED, "cancelled")
    # Whoever was writing it comes to its end all the same, and is too late.
    await exports.storage.put(claimed.object_key, b"late")
    assert not await exports.store.succeed(claimed, 1, 4, b"", exports.clock.now(), exports.clock.now())
    exports.clock.advance(LEASE.total_seconds())
    await exports.exporter.work()
    await fetched(await exports.storage.link(claimed.object_key, timedelta(minutes=1)), 404)
    assert (await exports.get(made)).export == cancelled


async def test_export_of_a_writer_that_died_is_written_by_another(exports: Exports) -> None:
    await exports.count(usage_event())
    made = await exports.create()
    dead = await exports.store.claim(exports.clock.now())
    assert dead is not None
    assert not await exports.exporter.work()
    exports.clock.advance(LEASE.total_seconds() + 1)
    assert await exports.exporter.work()
    assert (await exports.get(made)).export.state == pb.EXPORT_STATE_SUCCEEDED
    # It was not dead after all, and changes nothing any more.
    assert not await exports.store.keep(dead, exports.clock.now(), 50, 1)
    await exports.store.fail(dead, "late", exports.clock.now())
    assert (await exports.get(made)).export.state == pb.EXPORT_STATE_SUCCEEDED


async def test_storage_that_is_away_is_tried_again(database: Database, tmp_path: Path, seaweedfs: SeaweedFS) -> None:
    async with (
        TcpGate("127.0.0.1", seaweedfs.port) as gate,
        serving(database, tmp_path, storage_at(f"http://127.0.0.1:{gate.port}", seaweedfs)) as exports,
    ):
        await exports.count(usage_event())
        made = await exports.create()
        await gate.shut()
        assert await exports.exporter.work()
        assert (await exports.get(made)).export.state == pb.EXPORT_STATE_PENDING
        await gate.open()
        assert not await exports.exporter.work()
        exports.clock.advance(60)
        assert await exports.exporter.work()
        assert (await exports.get(made)).export.state == pb.EXPORT_STATE_SUCCEEDED


async def test_wrong_secret_is_told_and_the_export_can_be_started_again(exports: Exports, seaweedfs: SeaweedFS) -> None:
    await exports.count(usage_event())
    made = await exports.create()
    locked_out = Exporter(exports.store, storage_at(seaweedfs.url, seaweedfs, "wrong"), exports.clock)
    assert await locked_out.work()
    told = (await exports.get(made)).export
    assert (told.state, told.failure_reason) == (pb.EXPORT_STATE_FAILED, "storage_refused")
    request = pb.RetryExportRequest(organization_id="org_a", export_id=made.export_id)
    assert (await exports.call(exports.stub.RetryExport, request)).export.state == pb.EXPORT_STATE_PENDING
    assert (await exports.refused(exports.stub.RetryExport, request)).reason is Reason.FAILED_PRECONDITION
    assert await exports.exporter.work()
    assert (await exports.get(made)).export.state == pb.EXPORT_STATE_SUCCEEDED


async def test_file_goes_when_its_time_is_over(exports: Exports) -> None:
    await exports.count(usage_event())
    told, _ = await exports.made()
    key = told.object_key
    assert told.expire_time.ToDatetime(UTC) == exports.clock.now() + KEPT
    exports.clock.advance(KEPT.total_seconds())
    await exports.exporter.work()
    answer = await exports.get(told)
    assert (answer.export.state, answer.download_url) == (pb.EXPORT_STATE_EXPIRED, "")
    await fetched(await exports.storage.link(key, timedelta(minutes=1)), 404)


async def test_month_is_exported_once_after_it_is_over(exports: Exports) -> None:
    await exports.count(usage_event())
    request = pb.UpdateExportScheduleRequest(organization_id="org_a", export_schedule=pb.ExportSchedule(enabled=True))
    schedule = (await exports.call(exports.stub.UpdateExportSchedule, request)).export_schedule
    assert schedule.next_run_time.ToDatetime(UTC) == datetime(2026, 12, 1, 6, tzinfo=UTC)
    assert not await exports.exporter.work()
    exports.clock.advance((datetime(2026, 12, 1, 6, tzinfo=UTC) - exports.clock.now()).total_seconds())
    assert await exports.exporter.work()
    assert not await exports.exporter.work()
    listed = await exports.call(exports.stub.ListExports, pb.ListExportsRequest(organization_id="org_a"))
    (made,) = listed.exports
    assert (made.state, made.rows, made.creator_id) == (pb.EXPORT_STATE_SUCCEEDED, 1, "")
    assert made.start_time.ToDatetime(UTC) == datetime(2026, 11, 1, tzinfo=UTC)
    told = await exports.call(exports.stub.GetExportSchedule, pb.GetExportScheduleRequest(organization_id="org_a"))
    assert told.export_schedule.last_export_id == made.export_id
    assert told.export_schedule.next_run_time.ToDatetime(UTC) == datetime(2027, 1, 1, 6, tzinfo=UTC)
    stale = pb.ExportSchedule(enabled=False, etag="0")
    request = pb.UpdateExportScheduleRequest(organization_id="org_a", export_schedule=stale)
    assert (await exports.refused(exports.stub.UpdateExportSchedule, request)).field == "export_schedule.etag"


async def test_missed_months_are_exported_each(exports: Exports) -> None:
    request = pb.UpdateExportScheduleRequest(organization_id="org_a", export_schedule=pb.ExportSchedule(enabled=True))
    await exports.call(exports.stub.UpdateExportSchedule, request)
    exports.clock.advance((datetime(2027, 2, 3, tzinfo=UTC) - exports.clock.now()).total_seconds())
    while await exports.exporter.work():
        pass
    listed = await exports.call(exports.stub.ListExports, pb.ListExportsRequest(organization_id="org_a"))
    months = sorted(made.start_time.ToDatetime(UTC) for made in listed.exports)
    assert months == [
        datetime(2026, 11, 1, tzinfo=UTC),
        datetime(2026, 12, 1, tzinfo=UTC),
        datetime(2027, 1, 1, tzinfo=UTC),
    ]


async def test_export_that_cannot_be_written_fails_alone(exports: Exports, database: Database) -> None:
    await exports.count(usage_event())
    await database.execute("UPDATE usage_events SET event = 'no message'")
    broken = await exports.create()
    assert await exports.exporter.work()
    told = (await exports.get(broken)).export
    assert (told.state, told.failure_reason) == (pb.EXPORT_STATE_FAILED, "internal")
    await exports.made(granularity="HOURLY")


async def test_failed_export_leaves_nothing_in_storage(exports: Exports) -> None:
    await exports.create()
    claimed = await exports.store.claim(exports.clock.now())
    assert claimed is not None
    await exports.storage.put(claimed.object_key, b"half")
    await exports.store.fail(claimed, "too_slow", exports.clock.now())
    await exports.exporter.work()
    await fetched(await exports.storage.link(claimed.object_key, timedelta(minutes=1)), 404)


async def test_repeated_order_is_one_export(exports: Exports) -> None:
    first, again = [await exports.create(request_id="once") for _ in range(2)]
    assert first == again
    request = pb.CreateExportRequest(organization_id="org_a", export=export("HOURLY"), request_id="once")
    assert (await exports.refused(exports.stub.CreateExport, request)).field == "request_id"


async def test_organization_has_few_exports_at_a_time(exports: Exports) -> None:
    answers = await asyncio.gather(*(exports.create() for _ in range(AT_ONCE + 3)), return_exceptions=True)
    assert sum(isinstance(answer, pb.Export) for answer in answers) == AT_ONCE
    await exports.create("org_b")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"granularity": "UNSPECIFIED"}, "export.granularity"),
        ({"format_": "UNSPECIFIED"}, "export.format"),
        ({"start_time": None}, "export.start_time"),
        ({"end_time": None}, "export.end_time"),
        ({"end_time": at(START)}, "export.end_time"),
        ({"start_time": at(END - timedelta(days=31, seconds=1))}, "export.end_time"),
        ({"start_time": at(NOW + timedelta(days=1)), "end_time": at(NOW + timedelta(days=2))}, "export.start_time"),
        ({"granularity": "HOURLY", "end_time": at(NOW)}, "export.end_time"),
    ],
)
async def test_wrong_order_is_refused_by_name(exports: Exports, fields: dict[str, Any], field: str) -> None:
    request = pb.CreateExportRequest(organization_id="org_a", export=export(**fields))
    error = await exports.refused(exports.stub.CreateExport, request)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)


async def test_running_exporter_writes_what_is_ordered(exports: Exports) -> None:
    await exports.count(usage_event())
    running = asyncio.create_task(exports.exporter.run())
    try:
        made = await exports.create()

        async def is_there() -> bool:
            return (await exports.get(made)).export.state == pb.EXPORT_STATE_SUCCEEDED

        await wait_until(is_there, 10, "the export is made")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

"""The command line of the journal: asks a running router, or reads the folder of one that has stopped; it changes a
folder in no way.

    python -m router journal status --target 127.0.0.1:27003
    python -m router journal list --state unpublished --since 2026-11-20T12:00 --folder /var/lib/aiaas/journal
    python -m router journal replay --since 2026-11-20T12:00 --until 2026-11-20T13:00 --target 127.0.0.1:27003
    python -m router journal totals --since 2026-11-20T12:00 --until 2026-11-20T13:00 --target 127.0.0.1:27003

Answers are JSON, one object a line, in the names of the contract. Times are ISO 8601, UTC where they say nothing else.
While a folder is read, no router can open it. What its router had in its log counts, though it is not folded yet.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import grpc
import lmdb
from google.protobuf import json_format
from google.protobuf.message import Message

from aiaas.router.v1 import journal_service_pb2 as pb
from aiaas.router.v1.journal_service_pb2_grpc import JournalServiceStub
from mesh.channel import connect
from mesh.config import ConfigError, load
from mesh.errors import PlatformError, Reason, from_rpc_error
from mesh.tls import CertificateError, TlsConfig, opened
from router.journal import hold
from router.journal_log import read_log
from router.journal_queries import sum_up
from router.journal_service import page_of_totals, read_entries, read_status, select_hours
from router.journal_store import JournalError, JournalStore

_PAGE = 500
_TIMEOUT_S = 600.0
_LOG_BYTES = 64 << 20
_STATES = ("open", "unpublished", "published")


class _Journal(Protocol):
    """A journal, wherever it is. Every method raises PlatformError."""

    async def status(self) -> pb.JournalStatus: ...

    async def list(self, request: pb.ListJournalEntriesRequest) -> pb.ListJournalEntriesResponse: ...

    async def replay(self, request: pb.ReplayJournalRequest) -> pb.ReplayJournalResponse: ...

    async def totals(self, request: pb.QueryJournalTotalsRequest) -> pb.QueryJournalTotalsResponse: ...


class _Remote:
    """The journal of a router that runs."""

    def __init__(self, stub: JournalServiceStub) -> None:
        self._stub = stub

    async def status(self) -> pb.JournalStatus:
        response: pb.GetJournalStatusResponse = await self._stub.GetJournalStatus(
            pb.GetJournalStatusRequest(), timeout=_TIMEOUT_S
        )
        return response.status

    async def list(self, request: pb.ListJournalEntriesRequest) -> pb.ListJournalEntriesResponse:
        page: pb.ListJournalEntriesResponse = await self._stub.ListJournalEntries(request, timeout=_TIMEOUT_S)
        return page

    async def replay(self, request: pb.ReplayJournalRequest) -> pb.ReplayJournalResponse:
        response: pb.ReplayJournalResponse = await self._stub.ReplayJournal(request, timeout=_TIMEOUT_S)
        return response

    async def totals(self, request: pb.QueryJournalTotalsRequest) -> pb.QueryJournalTotalsResponse:
        page: pb.QueryJournalTotalsResponse = await self._stub.QueryJournalTotals(request, timeout=_TIMEOUT_S)
        return page


class _Local:
    """The folder of a router that has stopped."""

    def __init__(self, store: JournalStore) -> None:
        self._store = store

    async def status(self) -> pb.JournalStatus:
        status = read_status(self._store, 0)
        # The limit is the router's configuration, which is not here.
        status.ClearField("limit_bytes")
        return status

    async def list(self, request: pb.ListJournalEntriesRequest) -> pb.ListJournalEntriesResponse:
        return read_entries(self._store, request, lambda _: 0)

    async def replay(self, request: pb.ReplayJournalRequest) -> pb.ReplayJournalResponse:
        raise PlatformError(Reason.FAILED_PRECONDITION, description="Only a running router can replay; use --target.")

    async def totals(self, request: pb.QueryJournalTotalsRequest) -> pb.QueryJournalTotalsResponse:
        return page_of_totals(self._store.router_id, sum_up(self._store, select_hours(request)), request)


def main(argv: Sequence[str]) -> int:
    """Answer one command; returns the exit status, 0 when done and 1 when it failed."""
    arguments = _parser().parse_args(argv)
    try:
        asyncio.run(_with_target(arguments) if arguments.target else _with_folder(arguments))
    except grpc.aio.AioRpcError as error:
        return _failed(from_rpc_error(error).message)
    except PlatformError as error:
        return _failed(error.message)
    except (JournalError, CertificateError, ConfigError, lmdb.Error, OSError) as error:
        return _failed(str(error))
    return 0


def _parser() -> argparse.ArgumentParser:
    place = argparse.ArgumentParser(add_help=False)
    places = place.add_mutually_exclusive_group(required=True)
    places.add_argument("--target", help="host:port or unix:path of the gRPC of a running router")
    places.add_argument("--folder", type=Path, help="the journal of a router that has stopped")
    hours = argparse.ArgumentParser(add_help=False)
    hours.add_argument("--since", type=_moment, metavar="TIME", help="admitted from then on, inclusive")
    hours.add_argument("--until", type=_moment, metavar="TIME", help="admitted until then, exclusive")
    hours.add_argument("--organization", default="", metavar="ID", help="only this organization's")

    parser = argparse.ArgumentParser(prog="python -m router journal")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    commands.add_parser("status", parents=[place], help="how the journal stands")
    entries = commands.add_parser("list", parents=[place, hours], help="entries, oldest first")
    entries.add_argument("--state", choices=_STATES, help="only those in this state")
    entries.add_argument("--request", default="", metavar="ID", help="only this request's")
    replay = commands.add_parser("replay", parents=[place, hours], help="publish ended entries again")
    replay.add_argument("--request", action="append", default=[], metavar="ID", help="only these requests'")
    commands.add_parser("totals", parents=[place, hours], help="sums by organization, hour, API key and model")
    return parser


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


async def _with_target(arguments: argparse.Namespace) -> None:
    service = pb.DESCRIPTOR.services_by_name["JournalService"]
    # By the certificate of the router beside which it is typed.
    async with opened(load(TlsConfig, os.environ)) as tls, connect(arguments.target, service, tls=tls) as channel:
        await _answer(_Remote(JournalServiceStub(channel)), arguments)


async def _with_folder(arguments: argparse.Namespace) -> None:
    database = arguments.folder / "data.mdb"
    if not database.is_file():
        raise JournalError(f"there is no journal in {arguments.folder}")
    lock = hold(arguments.folder)
    try:
        # Room for what is in the log besides.
        store = JournalStore(arguments.folder, 2 * database.stat().st_size + _LOG_BYTES)
        try:
            store.inspect(read_log(arguments.folder))
            await _answer(_Local(store), arguments)
        finally:
            store.close()
    finally:
        os.close(lock)


async def _answer(journal: _Journal, arguments: argparse.Namespace) -> None:
    match arguments.command:
        case "status":
            _print(await journal.status())
        case "list":
            async for entry in _entries(journal, arguments):
                _print(entry)
        case "replay":
            request = pb.ReplayJournalRequest(organization_id=arguments.organization, request_ids=arguments.request)
            _set_range(request, arguments)
            _print(await journal.replay(request))
        case "totals":
            async for total in _totals(journal, arguments):
                _print(total)


async def _entries(journal: _Journal, arguments: argparse.Namespace) -> AsyncIterator[pb.JournalEntry]:
    request = pb.ListJournalEntriesRequest(
        organization_id=arguments.organization, request_id=arguments.request, page_size=_PAGE
    )
    if arguments.state:
        request.state = pb.JournalEntryState.Value(f"JOURNAL_ENTRY_STATE_{arguments.state.upper()}")
    _set_range(request, arguments)
    while True:
        page = await journal.list(request)
        for entry in page.entries:
            yield entry
        request.page_token = page.next_page_token
        if not request.page_token:
            return


async def _totals(journal: _Journal, arguments: argparse.Namespace) -> AsyncIterator[pb.JournalTotal]:
    request = pb.QueryJournalTotalsRequest(organization_id=arguments.organization, page_size=_PAGE)
    _set_range(request, arguments)
    while True:
        page = await journal.totals(request)
        for total in page.totals:
            yield total
        request.page_token = page.next_page_token
        if not request.page_token:
            return


def _set_range(
    request: pb.ListJournalEntriesRequest | pb.ReplayJournalRequest | pb.QueryJournalTotalsRequest,
    arguments: argparse.Namespace,
) -> None:
    if arguments.since is not None:
        request.start_time.FromDatetime(arguments.since)
    if arguments.until is not None:
        request.end_time.FromDatetime(arguments.until)


def _print(message: Message) -> None:
    print(json_format.MessageToJson(message, preserving_proto_field_name=True, indent=None))


def _failed(why: str) -> int:
    print(f"journal: {why}", file=sys.stderr)
    return 1

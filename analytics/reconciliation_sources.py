"""Asks journals, ledger and routers what they know of a range of time, over gRPC; it never compares anything.

Everything here raises PlatformError, also for an answer that makes no sense.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

import grpc

from aiaas.identity.v1 import budget_service_pb2, budget_service_pb2_grpc
from aiaas.router.v1 import journal_service_pb2, journal_service_pb2_grpc, router_service_pb2, router_service_pb2_grpc
from analytics.reconciliations import HOUR, Amounts, EngineWindow, Line
from mesh.channel import connect
from mesh.conversions import from_timestamp, to_timestamp
from mesh.errors import from_rpc_error
from mesh.tls import Tls

_PAGE = 500
_A = TypeVar("_A")


class Router(NamedTuple):
    """A router replica, and where it is reached."""

    router_id: str
    address: str


class Sources:
    """Whoever else keeps a record of usage. `routers` is any router, `ledger` is identity."""

    def __init__(
        self,
        routers: router_service_pb2_grpc.RouterServiceStub,
        ledger: budget_service_pb2_grpc.BudgetServiceStub,
        tls: Tls | None = None,
    ) -> None:
        self._routers = routers
        self._ledger = ledger
        self._tls = tls

    async def routers(self, since: datetime) -> list[Router]:
        """The routers that were alive then or later, those that are gone included."""
        request = router_service_pb2.ResolveRoutersRequest(since_time=to_timestamp(since))
        response = await _asked(self._routers.ResolveRouters(request))
        return [Router(router.router_id, router.address) for router in response.routers]

    async def journal_totals(self, router: Router, start_time: datetime, end_time: datetime) -> dict[Line, Amounts]:
        """What a router's journal knows of all its requests of some hours."""
        request = journal_service_pb2.QueryJournalTotalsRequest(
            start_time=to_timestamp(start_time), end_time=to_timestamp(end_time), page_size=_PAGE
        )
        totals = {}
        async with _journal(router, self._tls) as journal:
            async for response in _pages(journal.QueryJournalTotals, request):
                for total in response.totals:
                    hour = from_timestamp(total.hour_start, "hour_start")
                    line = Line(hour, hour + HOUR, total.organization_id, total.api_key_id, total.model)
                    totals[line] = Amounts(
                        requests=total.requests,
                        prompt_tokens=total.usage.prompt_tokens,
                        cached_prompt_tokens=total.usage.cached_prompt_tokens,
                        completion_tokens=total.usage.completion_tokens,
                        cost_micros=total.cost_micros,
                    )
        return totals

    async def replay(self, router: Router, organization_id: str, start_time: datetime, end_time: datetime) -> int:
        """Have a router publish requests again that it admitted in a range; returns how many."""
        request = journal_service_pb2.ReplayJournalRequest(
            start_time=to_timestamp(start_time), end_time=to_timestamp(end_time), organization_id=organization_id
        )
        async with _journal(router, self._tls) as journal:
            response = await _asked(journal.ReplayJournal(request))
        return response.entries

    async def ledger_totals(self, start_time: datetime, end_time: datetime) -> dict[Line, Amounts]:
        """What the ledger knows of charges to budgets for requests of some hours."""
        request = budget_service_pb2.QueryLedgerRequest(
            start_time=to_timestamp(start_time), end_time=to_timestamp(end_time), page_size=_PAGE
        )
        totals = {}
        async for response in _pages(self._ledger.QueryLedger, request):
            for total in response.totals:
                hour = from_timestamp(total.hour_start, "hour_start")
                line = Line(
                    hour, hour + HOUR, total.organization_id, total.api_key_id, total.model, budget_id=total.budget_id
                )
                totals[line] = Amounts(requests=total.requests, budget_units=total.spent)
        return totals

    async def engine_windows(self, start_time: datetime, end_time: datetime) -> list[EngineWindow]:
        """How far engines' counters moved in windows that begin in a range, by backend, then time."""
        request = router_service_pb2.QueryEngineTokensRequest(
            start_time=to_timestamp(start_time), end_time=to_timestamp(end_time), page_size=_PAGE
        )
        return [
            EngineWindow(
                window.backend_id,
                from_timestamp(window.start_time, "start_time"),
                from_timestamp(window.end_time, "end_time"),
                window.prompt_tokens,
                window.cached_prompt_tokens,
                window.completion_tokens,
                window.reset,
            )
            async for response in _pages(self._routers.QueryEngineTokens, request)
            for window in response.windows
        ]


@contextlib.asynccontextmanager
async def _journal(router: Router, tls: Tls | None) -> AsyncIterator[journal_service_pb2_grpc.JournalServiceStub]:
    """The journal of one replica, which only its own address reaches."""
    service = journal_service_pb2.DESCRIPTOR.services_by_name["JournalService"]
    async with connect(router.address, service, tls=tls) as channel:
        yield journal_service_pb2_grpc.JournalServiceStub(channel)


async def _pages(method: Callable[[Any], Awaitable[Any]], request: Any) -> AsyncIterator[Any]:
    """Every page of an answer."""
    while True:
        response = await _asked(method(request))
        yield response
        if not response.next_page_token:
            return
        request.page_token = response.next_page_token


async def _asked(call: Awaitable[_A]) -> _A:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error

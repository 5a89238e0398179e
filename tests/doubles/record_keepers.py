"""Whoever keeps a record of usage beside analytics, on one address: routers with a journal, and identity's ledger."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor

from aiaas.identity.v1 import budget_service_pb2, budget_service_pb2_grpc
from aiaas.router.v1 import journal_service_pb2, journal_service_pb2_grpc, router_service_pb2, router_service_pb2_grpc
from aiaas.type.v1.usage_event_pb2 import UsageEvent
from mesh.errors import PlatformError
from mesh.server import AddServicer

PAGE = 2


def _page(request: Any, items: list[Any]) -> tuple[list[Any], str]:
    """Two items at a time, however many are asked for: nobody may depend on one page."""
    start = int(request.page_token or 0)
    more = start + PAGE < len(items)
    return items[start : start + PAGE], str(start + PAGE) if more else ""


@dataclass
class JournalDouble(journal_service_pb2_grpc.JournalServiceServicer):
    """A journal of ended requests. What is replayed goes to `publish`; `failure` is raised instead of an answer."""

    publish: Callable[[list[UsageEvent]], Awaitable[None]]
    events: list[UsageEvent] = field(default_factory=list)
    replayed: list[journal_service_pb2.ReplayJournalRequest] = field(default_factory=list)
    failure: PlatformError | None = None

    async def QueryJournalTotals(
        self, request: journal_service_pb2.QueryJournalTotalsRequest, context: object
    ) -> journal_service_pb2.QueryJournalTotalsResponse:
        if self.failure is not None:
            raise self.failure
        totals: defaultdict[tuple[str, int, str, str], journal_service_pb2.JournalTotal] = defaultdict(
            journal_service_pb2.JournalTotal
        )
        for event in self._within(request):
            hour = event.admit_time.seconds // 3600 * 3600
            total = totals[event.organization_id, hour, event.api_key_id, event.model]
            total.organization_id, total.api_key_id, total.model = event.organization_id, event.api_key_id, event.model
            total.hour_start.seconds = hour
            total.requests += 1
            total.usage.prompt_tokens += event.usage.prompt_tokens
            total.usage.cached_prompt_tokens += event.usage.cached_prompt_tokens
            total.usage.completion_tokens += event.usage.completion_tokens
            total.cost_micros += event.cost_micros
        page, token = _page(request, [totals[key] for key in sorted(totals)])
        return journal_service_pb2.QueryJournalTotalsResponse(totals=page, next_page_token=token)

    async def ReplayJournal(
        self, request: journal_service_pb2.ReplayJournalRequest, context: object
    ) -> journal_service_pb2.ReplayJournalResponse:
        self.replayed.append(request)
        events = [event for event in self._within(request) if request.organization_id in ("", event.organization_id)]
        await self.publish(events)
        return journal_service_pb2.ReplayJournalResponse(entries=len(events))

    def _within(self, request: Any) -> list[UsageEvent]:
        start, end = request.start_time.seconds, request.end_time.seconds
        return [event for event in self.events if start <= event.admit_time.seconds < end]


@dataclass
class RoutersDouble(router_service_pb2_grpc.RouterServiceServicer):
    """Some routers by their ids and addresses, and what they read off engines."""

    addresses: dict[str, str] = field(default_factory=dict)
    windows: list[router_service_pb2.EngineTokens] = field(default_factory=list)
    asked: list[router_service_pb2.ResolveRoutersRequest] = field(default_factory=list)

    async def ResolveRouters(
        self, request: router_service_pb2.ResolveRoutersRequest, context: object
    ) -> router_service_pb2.ResolveRoutersResponse:
        self.asked.append(request)
        routers = [
            router_service_pb2.Router(router_id=router_id, address=address)
            for router_id, address in self.addresses.items()
        ]
        return router_service_pb2.ResolveRoutersResponse(routers=routers)

    async def QueryEngineTokens(
        self, request: router_service_pb2.QueryEngineTokensRequest, context: object
    ) -> router_service_pb2.QueryEngineTokensResponse:
        start, end = request.start_time.ToDatetime(UTC), request.end_time.ToDatetime(UTC)
        found = [window for window in self.windows if start <= window.start_time.ToDatetime(UTC) < end]
        page, token = _page(request, sorted(found, key=lambda each: (each.backend_id, each.start_time.ToNanoseconds())))
        return router_service_pb2.QueryEngineTokensResponse(windows=page, next_page_token=token)


@dataclass
class LedgerDouble(budget_service_pb2_grpc.BudgetServiceServicer):
    """A ledger."""

    totals: list[budget_service_pb2.LedgerTotal] = field(default_factory=list)

    async def QueryLedger(
        self, request: budget_service_pb2.QueryLedgerRequest, context: object
    ) -> budget_service_pb2.QueryLedgerResponse:
        page, token = _page(request, self.totals)
        return budget_service_pb2.QueryLedgerResponse(totals=page, next_page_token=token)


def engine_tokens(
    backend_id: str, start: datetime, prompt: int, completion: int, *, lasts_s: float = 10.0, reset: bool = False
) -> router_service_pb2.EngineTokens:
    """A window of an engine."""
    window = router_service_pb2.EngineTokens(
        backend_id=backend_id, prompt_tokens=prompt, completion_tokens=completion, reset=reset
    )
    window.start_time.FromDatetime(start)
    window.end_time.FromDatetime(start + timedelta(seconds=lasts_s))
    return window


def services(
    routers: RoutersDouble, journal: JournalDouble, ledger: LedgerDouble
) -> list[tuple[ServiceDescriptor, AddServicer, Any]]:
    """All three, for a GrpcServer."""
    return [
        (
            router_service_pb2.DESCRIPTOR.services_by_name["RouterService"],
            router_service_pb2_grpc.add_RouterServiceServicer_to_server,
            routers,
        ),
        (
            journal_service_pb2.DESCRIPTOR.services_by_name["JournalService"],
            journal_service_pb2_grpc.add_JournalServiceServicer_to_server,
            journal,
        ),
        (
            budget_service_pb2.DESCRIPTOR.services_by_name["BudgetService"],
            budget_service_pb2_grpc.add_BudgetServiceServicer_to_server,
            ledger,
        ),
    ]

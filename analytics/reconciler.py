"""Compares, every hour by itself and whenever somebody asks, what different records know of the same usage.

Differences between journals and analytics are mended: what analytics lacks is published again, and then compared once
more. Others are only reported. What differed is told as an event, and in metrics, which are those of the last hour that
was compared, whichever replica did it: `aiaas_reconciliation_differences{kind}` (kind: journal, ledger, engines),
`aiaas_reconciliation_engine_residual_tokens{kind}` (kind: prompt, completion) and, so that silence is noticed too,
`aiaas_reconciliation_hour_timestamp_seconds{kind}`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from aiaas.analytics.v1.reconciliation_service_pb2 import (
    ReconciledAmounts,
    ReconciliationDifference,
    ReconciliationKind,
)
from aiaas.type.v1.platform_event_pb2 import EVENT_TYPE_RECONCILIATION_DIFFERENCE, PlatformEvent
from aiaas.type.v1.usage_event_pb2 import UsageEvent
from analytics import metrics
from analytics.platform_events import SCHEMA_VERSION
from analytics.reconciliation_sources import Router, Sources
from analytics.reconciliation_store import LIMIT_S, ReconciliationStore
from analytics.reconciliations import (
    HOUR,
    KINDS,
    NOTHING,
    OVERLAP,
    Amounts,
    Difference,
    EngineBalance,
    EngineWindow,
    Finding,
    Line,
    Report,
    budget_charges,
    compare,
    engine_request,
    hour_of,
    hours_due,
    lacking,
)
from analytics.store import UsageStore
from mesh.clock import Clock
from mesh.conversions import to_timestamp
from mesh.errors import PlatformError
from mesh.topology import EVENTS

logger = logging.getLogger(__name__)

_INTERVAL_S = 60.0
_PUBLISH_TIMEOUT_S = 5.0
# What was published again, or was on its way, is looked for after each of these.
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_ROUTERS_AT_ONCE = 8
_NAMES: dict[int, str] = {
    ReconciliationKind.RECONCILIATION_KIND_JOURNAL: "journal",
    ReconciliationKind.RECONCILIATION_KIND_LEDGER: "ledger",
    ReconciliationKind.RECONCILIATION_KIND_ENGINES: "engines",
}


class Publishing(Protocol):
    """The broker, as far as it is needed here."""

    async def publish(self, exchange: str, routing_key: str, body: bytes, *, timeout_s: float) -> None:
        """Returns when the broker has confirmed. Raises PlatformError."""


class Reconciler:
    """Makes the reports that wait. Any number of processes may; each report is made by one of them."""

    def __init__(
        self,
        store: ReconciliationStore,
        usage: UsageStore,
        sources: Sources,
        broker: Publishing,
        clock: Clock,
        *,
        pauses_s: Sequence[float] = _PAUSES_S,
    ) -> None:
        self._store = store
        self._usage = usage
        self._sources = sources
        self._broker = broker
        self._clock = clock
        self._pauses_s = pauses_s
        self._asked = asyncio.Event()

    def wake(self) -> None:
        """There is a report to be made now."""
        self._asked.set()

    async def run(self) -> None:
        """Make reports until cancelled; what is away is tried again a minute later."""
        while True:
            self._asked.clear()
            try:
                await self.work()
            except PlatformError as error:
                logger.warning("reconciliation waits: %s", error.reason.value)
            try:
                async with asyncio.timeout(_INTERVAL_S):
                    await self._asked.wait()
            except TimeoutError:
                pass

    async def work(self) -> None:
        """Make every report that waits, those of hours that are due among them, and tell what differed.

        Raises PlatformError while PostgreSQL or the broker is away.
        """
        complete_until = await self._usage.complete_until()
        if complete_until is not None:
            # While analytics is behind, everything would differ, and be published again on top of the backlog.
            hours = hours_due(await self._store.last_scheduled(), min(complete_until, self._clock.now()))
            await self._store.schedule(KINDS, hours, self._clock.now())
        while report := await self._store.claim(self._clock.now()):
            finding = await self._find(report)
            found = sorted(finding.differences, key=lambda difference: difference.size, reverse=True)
            await self._store.finish(report, finding, list(map(_serialized, found)), self._clock.now())
            if found:
                logger.warning(
                    "%d lines of %s and analytics differ: %s", len(found), _NAMES[report.kind], report.reconciliation_id
                )
        for report in await self._store.latest():
            _measure(report)
        for report in await self._store.unannounced():
            body = _event(report).SerializeToString()
            await self._broker.publish(EVENTS.exchange, EVENTS.routing_key, body, timeout_s=_PUBLISH_TIMEOUT_S)
            await self._store.announced(report.reconciliation_id)

    async def _find(self, report: Report) -> Finding:
        finding = Finding()
        try:
            async with asyncio.timeout(LIMIT_S):
                if report.kind == ReconciliationKind.RECONCILIATION_KIND_JOURNAL:
                    await self._journals(report, finding)
                elif report.kind == ReconciliationKind.RECONCILIATION_KIND_LEDGER:
                    await self._ledger(report, finding)
                else:
                    await self._engines(report, finding)
        except TimeoutError:
            # Its own events are what takes the longest to read.
            finding.missing_sources.append("analytics")
        return finding

    async def _journals(self, report: Report, finding: Finding) -> None:
        start, end = report.start_time, report.end_time
        try:
            routers = await self._sources.routers(start)
        except PlatformError as error:
            _miss(finding.missing_sources, "router", error)
            return
        compared = await self._compare_journals(routers, start, end)
        for look, pause_s in enumerate(self._pauses_s):
            if not compared.differences:
                break
            if look == 0 and (lines := set(lacking(compared.differences))):
                finding.republished = await self._replay(compared.journals, lines)
            await asyncio.sleep(pause_s)
            compared = await self._compare_journals(routers, start, end)
        finding.compared = compared.compared
        finding.differences = compared.differences
        finding.missing_sources += compared.missing

    async def _compare_journals(self, routers: list[Router], start: datetime, end: datetime) -> _Compared:
        result = _Compared()
        at_once = asyncio.Semaphore(_ROUTERS_AT_ONCE)

        async def ask(router: Router) -> None:
            async with at_once:
                try:
                    result.journals[router] = await self._sources.journal_totals(router, start, end)
                except PlatformError as error:
                    _miss(result.missing, router.router_id, error)

        async with asyncio.TaskGroup() as asking:
            for router in routers:
                asking.create_task(ask(router))
        told: defaultdict[Line, Amounts] = defaultdict(lambda: NOTHING)
        for totals in result.journals.values():
            for line, amounts in totals.items():
                told[line] = told[line].plus(amounts)
        known = await self._store.usage_totals(start, end)
        result.compared = len(told.keys() | known.keys())
        result.differences = compare(told, known, whole=not result.missing)
        return result

    async def _replay(self, journals: Mapping[Router, Mapping[Line, Amounts]], lines: set[Line]) -> int:
        """Have the routers that know of these lines publish them again; returns how many requests that are."""
        republished = 0
        for router, totals in journals.items():
            hours: defaultdict[str, list[datetime]] = defaultdict(list)
            for line in totals.keys() & lines:
                hours[line.organization_id].append(line.start_time)
            for organization_id, starts in hours.items():
                try:
                    republished += await self._sources.replay(router, organization_id, min(starts), max(starts) + HOUR)
                except PlatformError as error:
                    # The next comparison finds the same difference, and says so.
                    logger.warning("%s does not publish again: %s", router.router_id, error.reason.value)
        return republished

    async def _ledger(self, report: Report, finding: Finding) -> None:
        try:
            told = await self._sources.ledger_totals(report.start_time, report.end_time)
        except PlatformError as error:
            _miss(finding.missing_sources, "identity", error)
            return
        known: defaultdict[Line, Amounts] = defaultdict(lambda: NOTHING)
        async with aclosing(self._store.events(report.start_time, report.end_time)) as events:
            async for admit_time, body in events:
                for line, amounts in budget_charges(UsageEvent.FromString(body), hour_of(admit_time)):
                    known[line] = known[line].plus(amounts)
        finding.compared = len(told.keys() | known.keys())
        finding.differences = compare(told, known)

    async def _engines(self, report: Report, finding: Finding) -> None:
        try:
            told = await self._sources.engine_windows(report.start_time, report.end_time)
        except PlatformError as error:
            _miss(finding.missing_sources, "router", error)
            return
        windows: defaultdict[str, list[EngineWindow]] = defaultdict(list)
        for window in told:
            windows[window.backend_id].append(window)
        balances = {backend_id: EngineBalance(own) for backend_id, own in windows.items()}
        unread: set[str] = set()
        # The last window ends a little after the range, and what is admitted in it counts.
        last = max((window.end_time for window in told), default=report.end_time)
        async with aclosing(self._store.events(report.start_time - OVERLAP, max(last, report.end_time))) as events:
            async for admit_time, body in events:
                request = engine_request(UsageEvent.FromString(body), admit_time)
                if request.backend_id in balances:
                    balances[request.backend_id].add(request)
                elif request.has_tokens and admit_time >= report.start_time:
                    unread.add(request.backend_id)
        finding.compared = len(balances)
        finding.missing_sources += sorted(unread)
        for balance in balances.values():
            prompt, completion = balance.residual()
            finding.residual_prompt_tokens += abs(prompt)
            finding.residual_completion_tokens += abs(completion)
            if difference := balance.difference():
                finding.differences.append(difference)


@dataclass(slots=True)
class _Compared:
    """What journals say, and how analytics differs. `missing` are the ids of routers whose journals cannot be read."""

    journals: dict[Router, dict[Line, Amounts]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    compared: int = 0
    differences: list[Difference] = field(default_factory=list)


def _miss(missing: list[str], source: str, error: PlatformError) -> None:
    logger.warning("%s cannot be reconciled: %s", source, error.reason.value)
    missing.append(source)


def _measure(report: Report) -> None:
    kind = _NAMES[report.kind]
    metrics.RECONCILIATION_DIFFERENCES.labels(kind).set(report.differences)
    metrics.RECONCILIATION_HOUR.labels(kind).set(report.start_time.timestamp())
    if report.kind == ReconciliationKind.RECONCILIATION_KIND_ENGINES:
        metrics.ENGINE_RESIDUAL_TOKENS.labels("prompt").set(report.residual_prompt_tokens)
        metrics.ENGINE_RESIDUAL_TOKENS.labels("completion").set(report.residual_completion_tokens)


def _event(report: Report) -> PlatformEvent:
    lines = "1 line differs" if report.differences == 1 else f"{report.differences:,} lines differ"
    event = PlatformEvent(
        schema_version=SCHEMA_VERSION,
        # The same however often it is published.
        event_id=f"{report.reconciliation_id}:differed",
        type=EVENT_TYPE_RECONCILIATION_DIFFERENCE,
        event_time=to_timestamp(report.finish_time),
        summary=f"{lines} between {_NAMES[report.kind]} and analytics from {report.start_time:%Y-%m-%d %H:%M} until "
        f"{report.end_time:%Y-%m-%d %H:%M} UTC.",
    )
    event.reconciliation_differed.reconciliation_id = report.reconciliation_id
    event.reconciliation_differed.differences = report.differences
    return event


def _serialized(difference: Difference) -> bytes:
    line = difference.line
    return ReconciliationDifference(
        organization_id=line.organization_id,
        api_key_id=line.api_key_id,
        model=line.model,
        backend_id=line.backend_id,
        budget_id=line.budget_id,
        start_time=to_timestamp(line.start_time),
        end_time=to_timestamp(line.end_time),
        source=ReconciledAmounts(**difference.source._asdict()),
        analytics=ReconciledAmounts(**difference.analytics._asdict()),
        explanations=difference.explanations,
    ).SerializeToString()

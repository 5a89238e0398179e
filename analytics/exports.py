"""What an export is, what may be asked of one, and what its rows are; it never reads usage and never writes a file."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any

from aiaas.analytics.v1.export_service_pb2 import (
    Export,
    ExportCompression,
    ExportFormat,
    ExportGranularity,
    ExportState,
)
from aiaas.type.v1.usage_event_pb2 import Endpoint, Outcome, UsageEvent
from analytics.usage import Filter, read_filter
from mesh.conversions import from_timestamp
from mesh.fields import check_all, invalid, require

LONGEST = timedelta(days=31)
"""How long a range may be."""

KEPT = timedelta(days=7)
"""How long a file stays in storage."""

AT_ONCE = 5
"""How many exports of one organization may wait or run at a time."""

CANCELLED = "cancelled"
"""The reason of an export that somebody stopped."""

_SCHEDULE_HOUR = 6
_GRANULARITIES = frozenset(ExportGranularity.values()) - {ExportGranularity.EXPORT_GRANULARITY_UNSPECIFIED}
_FORMATS = frozenset(ExportFormat.values()) - {ExportFormat.EXPORT_FORMAT_UNSPECIFIED}
_COMPRESSIONS = frozenset(ExportCompression.values())
_SUFFIXES = {
    ExportCompression.EXPORT_COMPRESSION_GZIP: ".gz",
    ExportCompression.EXPORT_COMPRESSION_ZSTD: ".zst",
}


class Kind(Enum):
    """What a cell holds."""

    TEXT = "text"
    NUMBER = "number"
    TIME = "time"
    FLAG = "flag"


RAW_COLUMNS: dict[str, Kind] = {
    "admit_time": Kind.TIME,
    "request_id": Kind.TEXT,
    "api_key_id": Kind.TEXT,
    "user_id": Kind.TEXT,
    "service_account_id": Kind.TEXT,
    "model": Kind.TEXT,
    "backend_id": Kind.TEXT,
    "endpoint": Kind.TEXT,
    "outcome": Kind.TEXT,
    "reason": Kind.TEXT,
    "finish_reason": Kind.TEXT,
    "streamed": Kind.FLAG,
    "prompt_tokens": Kind.NUMBER,
    "cached_prompt_tokens": Kind.NUMBER,
    "completion_tokens": Kind.NUMBER,
    "cost_micros": Kind.NUMBER,
    "duration_micros": Kind.NUMBER,
    "ttft_micros": Kind.NUMBER,
}
"""The columns of single requests."""

SUM_COLUMNS: dict[str, Kind] = {
    "start_time": Kind.TIME,
    "api_key_id": Kind.TEXT,
    "user_id": Kind.TEXT,
    "service_account_id": Kind.TEXT,
    "model": Kind.TEXT,
    "outcome": Kind.TEXT,
    "requests": Kind.NUMBER,
    "prompt_tokens": Kind.NUMBER,
    "cached_prompt_tokens": Kind.NUMBER,
    "completion_tokens": Kind.NUMBER,
    "cost_micros": Kind.NUMBER,
}
"""The columns of hours, days and months of one key, model and outcome."""

Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What somebody asks to have as a file."""

    granularity: ExportGranularity.ValueType
    format: ExportFormat.ValueType
    compression: ExportCompression.ValueType
    start_time: datetime
    end_time: datetime
    filter: Filter

    @property
    def columns(self) -> dict[str, Kind]:
        """The columns of its rows."""
        return RAW_COLUMNS if self.granularity == ExportGranularity.EXPORT_GRANULARITY_RAW else SUM_COLUMNS

    @property
    def extension(self) -> str:
        """How the name of its file ends. Parquet is compressed within."""
        if self.format == ExportFormat.EXPORT_FORMAT_PARQUET:
            return "parquet"
        return f"csv{_SUFFIXES.get(self.compression, '')}"


@dataclass(frozen=True, slots=True)
class StoredExport:
    """An export as it is stored. `claim` is the number under which it is being written."""

    export_id: str
    organization_id: str
    wanted: Wanted
    state: ExportState.ValueType
    progress_percent: int
    rows: int
    size_bytes: int
    sha256: bytes
    failure_reason: str
    creator_id: str
    create_time: datetime
    finish_time: datetime | None
    expire_time: datetime | None
    attempts: int
    claim: int

    @property
    def object_key(self) -> str:
        """The key of its file in storage."""
        return f"exports/{self.organization_id}/{self.export_id}.{self.wanted.extension}"

    @property
    def manifest_key(self) -> str:
        """The key of what tells about the file."""
        return f"exports/{self.organization_id}/{self.export_id}.manifest.json"


@dataclass(frozen=True, slots=True)
class Schedule:
    """What an organization wants each month."""

    organization_id: str
    enabled: bool = False
    granularity: ExportGranularity.ValueType = ExportGranularity.EXPORT_GRANULARITY_DAILY
    format: ExportFormat.ValueType = ExportFormat.EXPORT_FORMAT_CSV
    compression: ExportCompression.ValueType = ExportCompression.EXPORT_COMPRESSION_UNSPECIFIED
    next_run_time: datetime | None = None
    last_export_id: str = ""
    revision: int = 0


def read_wanted(export: Export, now: datetime) -> Wanted:
    """What a request asks for. Raises PlatformError(INVALID_ARGUMENT) naming every field that is wrong."""
    check_all(
        lambda: check_form(export, "export", needed=True),
        *(
            lambda name=name: require(export.HasField(name), f"export.{name}", "is required")
            for name in ("start_time", "end_time")
        ),
    )
    start = from_timestamp(export.start_time, "export.start_time")
    end = from_timestamp(export.end_time, "export.end_time")
    require(start < end, "export.end_time", "must be after start_time")
    require(end - start <= LONGEST, "export.end_time", "must be at most 31 days after start_time")
    require(start < now, "export.start_time", "must not be in the future")
    if export.granularity != ExportGranularity.EXPORT_GRANULARITY_RAW:
        for name, moment in (("start_time", start), ("end_time", end)):
            is_hour = moment == moment.replace(minute=0, second=0, microsecond=0)
            require(is_hour, f"export.{name}", "must be a full hour, unless rows are requests")
    return Wanted(export.granularity, export.format, export.compression, start, end, read_filter(export.filter))


def check_form(message: Any, field: str, *, needed: bool) -> None:
    """Raises PlatformError(INVALID_ARGUMENT) for an unknown granularity, format or compression."""
    for name, known in (("granularity", _GRANULARITIES), ("format", _FORMATS), ("compression", _COMPRESSIONS)):
        value = getattr(message, name)
        if value not in known and (needed or value):
            raise invalid(f"{field}.{name}", "must be a known value")


def month_before(moment: datetime) -> tuple[datetime, datetime]:
    """The month in UTC that was over last, as its first moment and the first after it."""
    end = moment.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (end - timedelta(days=1)).replace(day=1), end


def next_run(now: datetime) -> datetime:
    """When the month that runs is exported: hours after its end, as the last events take their time."""
    _, month_start = month_before(now)
    run = month_start.replace(hour=_SCHEDULE_HOUR)
    return run if now < run else run_after(run)


def run_after(run: datetime) -> datetime:
    """The run of the month after that of `run`."""
    return (run + timedelta(days=32)).replace(day=1)


def raw_row(admit_time: datetime, event: bytes) -> Row:
    """The row of one request."""
    told = UsageEvent.FromString(event)
    usage = told.usage
    return (
        admit_time,
        told.request_id,
        told.api_key_id,
        told.user_id,
        told.service_account_id,
        told.model,
        told.backend_id,
        _name(Endpoint, told.endpoint),
        _name(Outcome, told.outcome),
        told.reason,
        told.finish_reason,
        told.streamed,
        usage.prompt_tokens,
        usage.cached_prompt_tokens,
        usage.completion_tokens,
        told.cost_micros,
        told.duration_micros,
        told.ttft_micros,
    )


def sum_row(stored: Row) -> Row:
    """The row of sums, whose outcome is stored as a number."""
    start_time, api_key_id, user_id, service_account_id, model, outcome, *sums = stored
    return (start_time, api_key_id, user_id, service_account_id, model, _name(Outcome, outcome), *sums)


def _name(kind: Any, number: int) -> str:
    # A newer router may know more of them.
    return str(kind.Name(number)) if number in kind.values() else str(number)

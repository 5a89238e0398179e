"""What every servicer needs between messages and the domain: moments and durations; it never knows a resource."""

from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.fields import invalid


def to_timestamp(moment: datetime | None) -> Timestamp | None:
    """A moment as it travels; None stays absent."""
    if moment is None:
        return None
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp


def from_timestamp(timestamp: Timestamp, field: str) -> datetime:
    """A moment that travelled, in UTC. Raises PlatformError(INVALID_ARGUMENT) naming the field if there is no such."""
    try:
        return timestamp.ToDatetime(UTC)
    except (ValueError, OverflowError):
        raise invalid(field, "is not a time") from None


def from_duration(duration: Duration, field: str) -> timedelta:
    """A length of time that travelled. Raises PlatformError(INVALID_ARGUMENT) naming the field if there is no such."""
    try:
        return duration.ToTimedelta()
    except (ValueError, OverflowError):
        raise invalid(field, "is not a length of time") from None

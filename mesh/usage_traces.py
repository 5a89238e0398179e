"""Which traces the usage events of a message belong to; it reads no event that belongs to none."""

from collections.abc import Iterable

from aiaas.type.v1.usage_event_pb2 import UsageEvent
from mesh import tracing

# How the event of a sampled request ends, but for the 55 characters themselves: it is the last field. To look there
# costs a fraction of reading the event, and most are not sampled.
_TRACEPARENT_LENGTH = 55
_SIGN = UsageEvent(traceparent="0" * _TRACEPARENT_LENGTH).SerializeToString()[:-_TRACEPARENT_LENGTH]
_SIGN_AT = -len(_SIGN) - _TRACEPARENT_LENGTH


def traceparents(events: Iterable[bytes]) -> list[str]:
    """The W3C trace contexts of serialized UsageEvents, of those that have one; none while nothing is recorded."""
    if not tracing.is_recording():
        return []
    return [UsageEvent.FromString(event).traceparent for event in events if event.startswith(_SIGN, _SIGN_AT)]

"""Events for people as a service would publish them."""

from datetime import datetime
from typing import Any

from aiaas.type.v1.platform_event_pb2 import BudgetThresholdCrossed, EventType, PlatformEvent
from tests.doubles.usage_events import NOW


def platform_event(event_id: str = "event_1", event_time: datetime = NOW, **fields: Any) -> PlatformEvent:
    """A budget's threshold that is crossed; `fields` replace what it has."""
    event = PlatformEvent(
        **{
            "schema_version": 1,
            "event_id": event_id,
            "type": EventType.EVENT_TYPE_BUDGET_THRESHOLD_CROSSED,
            "organization_id": "org_a",
            "summary": "The budget \u201eMünchen\u201c is at 80 %.",
            "budget_threshold_crossed": BudgetThresholdCrossed(budget_id="budget_1", percent=80, spent=8 << 40),
            **fields,
        }
    )
    event.event_time.FromDatetime(event_time)
    return event

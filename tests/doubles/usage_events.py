"""Usage events as a router would publish them."""

from datetime import UTC, datetime
from typing import Any

from aiaas.type.v1.usage_event_pb2 import Endpoint, Outcome, TokenUsage, UsageEvent, UsageEventBatch

NOW = datetime(2026, 11, 20, 12, 30, 15, 250_000, tzinfo=UTC)


def usage_event(request_id: str = "req_1", admit_time: datetime = NOW, **fields: Any) -> UsageEvent:
    """An answered chat completion of 10 + 5 tokens; `fields` replace what it has."""
    event = UsageEvent(
        **{
            "schema_version": 1,
            "request_id": request_id,
            "organization_id": "org_a",
            "api_key_id": "key_a",
            "user_id": "user_a",
            "endpoint": Endpoint.ENDPOINT_CHAT_COMPLETIONS,
            "model": "smollm2",
            "backend_id": "backend-1",
            "outcome": Outcome.OUTCOME_SUCCEEDED,
            "usage": TokenUsage(prompt_tokens=10, cached_prompt_tokens=4, completion_tokens=5),
            "cost_micros": 25,
            **fields,
        }
    )
    event.admit_time.FromDatetime(admit_time)
    event.end_time.FromDatetime(admit_time)
    return event


def usage_batch(*events: UsageEvent | bytes) -> bytes:
    """A body with these events, of which any may be something else."""
    serialized = [event if isinstance(event, bytes) else event.SerializeToString() for event in events]
    return UsageEventBatch(events=serialized).SerializeToString()

"""Which events for people are kept."""

import json
from datetime import timedelta
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.type.v1.platform_event_pb2 import BudgetThresholdCrossed
from analytics.platform_events import KEPT, PLATFORM, UnacceptableEvent, as_json, read_event
from tests.doubles.platform_events import platform_event
from tests.doubles.usage_events import NOW


def test_event_is_kept_as_it_came() -> None:
    body = platform_event().SerializeToString()
    event = read_event(body, NOW)
    assert event == ("event_1", "org_a", 1, NOW, body)


def test_event_of_nobody_is_the_platforms() -> None:
    body = platform_event(organization_id="").SerializeToString()
    assert read_event(body, NOW).organization_id == PLATFORM


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"schema_version": 0}, "schema_version is unknown"),
        ({"schema_version": 2}, "schema_version is unknown"),
        ({"type": 0}, "type is unknown"),
        ({"type": 99}, "type is unknown"),
        ({"event_id": ""}, "event_id is no id"),
        ({"event_id": "a.b"}, "event_id is no id"),
        ({"event_id": "a\r\nb"}, "event_id is no id"),
        ({"event_id": "a" * 129}, "event_id is no id"),
        ({"organization_id": "a\0"}, "organization_id is no id"),
        ({"event_time": NOW - KEPT - timedelta(seconds=1)}, "event_time is absurd"),
        ({"event_time": NOW + timedelta(hours=2)}, "event_time is absurd"),
        ({"summary": "a" * 70_000}, "event is too large"),
        (
            {"budget_threshold_crossed": BudgetThresholdCrossed(period_start=Timestamp(seconds=1 << 60))},
            "a value is absurd",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_with_what_is_wrong(fields: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UnacceptableEvent, match=wrong):
        read_event(platform_event(**fields).SerializeToString(), NOW)


@pytest.mark.parametrize("body", [b"\xff\xff", b"no protobuf at all", b""])
def test_what_is_no_event_is_refused(body: bytes) -> None:
    with pytest.raises(UnacceptableEvent):
        read_event(body, NOW)


def test_event_without_a_time_is_refused() -> None:
    event = platform_event()
    event.ClearField("event_time")
    with pytest.raises(UnacceptableEvent, match="event_time is missing"):
        read_event(event.SerializeToString(), NOW)


def test_json_has_the_names_of_the_contract() -> None:
    document = json.loads(as_json(platform_event(organization_id="")))
    assert document["type"] == "EVENT_TYPE_BUDGET_THRESHOLD_CROSSED"
    assert document["organization_id"] == ""
    assert document["event_time"] == "2026-11-20T12:30:15.250Z"
    assert document["budget_threshold_crossed"]["spent"] == str(8 << 40)

"""Spans made by hand: which requests get some, how they hang together, and what they never say."""

import io
import json
import logging
import subprocess
import sys
import time
import tracemalloc
from random import Random
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from aiaas.type.v1.usage_event_pb2 import UsageEvent
from mesh import tokens, tracing
from mesh.errors import PlatformError, Reason
from mesh.telemetry import JsonFormatter
from mesh.usage_traces import traceparents
from tests.doubles.clock import ManualClock
from tests.doubles.trace_collector import recording

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01"
NOT_SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-00"

MALFORMED = [
    "x",
    " " + SAMPLED,
    SAMPLED + "\n",
    SAMPLED + "-",
    SAMPLED + "-more",
    SAMPLED[:-1],
    SAMPLED.upper(),
    SAMPLED.replace("-", "_"),
    f"0-{TRACE_ID}-{PARENT_ID}-01",
    f"ff-{TRACE_ID}-{PARENT_ID}-01",
    f"00-{'0' * 32}-{PARENT_ID}-01",
    f"00-{TRACE_ID}-{'0' * 16}-01",
    f"00-{TRACE_ID[1:]}-{PARENT_ID}-01",
    f"00-{TRACE_ID}-{PARENT_ID}0-01",
    f"00-{TRACE_ID[:-1]}g-{PARENT_ID}-01",
    f"00-{TRACE_ID}-{PARENT_ID}-+1",
    f"01-{TRACE_ID}-{PARENT_ID}-01more",
    "\N{ARABIC-INDIC DIGIT ZERO}0" + SAMPLED[2:],
]


def begun(name: str, traceparent: str = "", **options: Any) -> tracing.Span:
    span = tracing.begin(name, traceparent, **options)
    assert span is not None
    return span


def only(spans: InMemorySpanExporter) -> ReadableSpan:
    (span,) = spans.get_finished_spans()
    return span


def context_of(span: ReadableSpan) -> trace.SpanContext:
    context: trace.SpanContext | None = span.context
    assert context is not None
    return context


def test_while_nothing_is_recorded_nothing_is_begun() -> None:
    assert tracing.begin("x") is None
    assert tracing.begin("x", SAMPLED) is None
    assert tracing.resume("x", SAMPLED) is None
    assert tracing.current() is None


def test_the_ratio_is_that_of_the_requests_that_are_sampled() -> None:
    with recording(0.01, Random(7).random):
        sampled = sum(tracing.begin("x") is not None for _ in range(20_000))
    # The mean is 200 and the standard deviation 14.
    assert 150 < sampled < 250


@pytest.mark.parametrize(("ratio", "sampled"), [(0.0, 0), (1.0, 1000)])
def test_the_ends_of_the_ratio_are_none_and_all(ratio: float, sampled: int) -> None:
    with recording(ratio, Random(7).random):
        assert sum(tracing.begin("x") is not None for _ in range(1000)) == sampled


@pytest.mark.parametrize(("traceparent", "most_bytes"), [("", 300), (NOT_SAMPLED, 1500)])
def test_a_request_that_is_not_sampled_makes_no_object_that_outlives_the_decision(
    traceparent: str, most_bytes: int
) -> None:
    kept, most = [], []
    with recording(0.0):
        tracing.begin("x", traceparent)
        tracemalloc.start()
        try:
            # The least of several: other threads of the process keep things, too.
            for _ in range(5):
                before, _ = tracemalloc.get_traced_memory()
                tracemalloc.reset_peak()
                for _ in range(1000):
                    tracing.begin("x", traceparent)
                after, peak = tracemalloc.get_traced_memory()
                kept.append(after - before)
                most.append(peak - before)
        finally:
            tracemalloc.stop()
    assert min(kept) < 100
    # A number to decide by, or what was read of the header, and not a span: that has thousands of bytes.
    assert min(most) < most_bytes


def test_what_was_sampled_once_is_not_decided_again() -> None:
    with recording(1e-9, lambda: 0.0) as spans:
        for _ in range(100):
            span = begun("x")
            span.child("y").end()
            span.end()
        assert len(spans.get_finished_spans()) == 200


@pytest.mark.parametrize("version", ["00", "01", "cc"])
@pytest.mark.parametrize("flags", ["01", "03", "ff"])
def test_a_caller_who_samples_is_followed(version: str, flags: str) -> None:
    with recording(0.0) as spans:
        begun("x", f"{version}-{TRACE_ID}-{PARENT_ID}-{flags}").end()
        begun("x", f"fe-{TRACE_ID}-{PARENT_ID}-{flags}-of a version to come").end()
        for span in spans.get_finished_spans():
            assert context_of(span).trace_id == int(TRACE_ID, 16)
            assert span.parent is not None
            assert (span.parent.span_id, span.parent.is_remote) == (int(PARENT_ID, 16), True)


@pytest.mark.parametrize("flags", ["00", "02", "fe"])
def test_a_caller_who_does_not_sample_is_followed(flags: str) -> None:
    with recording(1.0):
        assert tracing.begin("x", f"00-{TRACE_ID}-{PARENT_ID}-{flags}") is None
        assert tracing.resume("x", f"00-{TRACE_ID}-{PARENT_ID}-{flags}") is None


@pytest.mark.parametrize("traceparent", MALFORMED)
def test_a_malformed_traceparent_is_as_good_as_none(traceparent: str) -> None:
    with recording(0.0):
        assert tracing.begin("x", traceparent) is None
    with recording(1.0) as spans:
        assert tracing.resume("x", traceparent) is None
        begun("x", traceparent).end()
        assert only(spans).parent is None
        assert context_of(only(spans)).trace_id != int(TRACE_ID, 16)


def test_a_request_without_traceparent_is_not_resumed() -> None:
    with recording(1.0):
        assert tracing.resume("x", "") is None


def test_a_trace_goes_on_from_step_to_step_and_from_hop_to_hop() -> None:
    with recording() as spans:
        root = begun("root")
        step = root.child("step", SpanKind.CLIENT)
        hop = tracing.resume("hop", step.traceparent)
        assert hop is not None
        for span in (hop, step, root):
            span.end()
        hop_span, step_span, root_span = spans.get_finished_spans()
    assert root.trace_id == step.trace_id == hop.trace_id == f"{context_of(root_span).trace_id:032x}"
    assert step.traceparent.split("-")[1:3] == [root.trace_id, f"{context_of(step_span).span_id:016x}"]
    parents = [span.parent.span_id if span.parent else None for span in (hop_span, step_span, root_span)]
    assert parents == [context_of(step_span).span_id, context_of(root_span).span_id, None]
    assert [span.kind for span in (hop_span, step_span, root_span)] == [
        SpanKind.SERVER,
        SpanKind.CLIENT,
        SpanKind.SERVER,
    ]


def test_what_happens_to_be_current_is_not_the_parent_of_a_root() -> None:
    with recording() as spans:
        other = begun("other")
        with other.as_current():
            begun("root").end()
        assert only(spans).parent is None


def test_a_span_lasts_until_it_is_ended_and_events_stand_in_between() -> None:
    with recording() as spans:
        started_ns = time.time_ns()
        span = begun("stream")
        span.event("first byte")
        assert spans.get_finished_spans() == ()
        span.end()
        ended = only(spans)
    assert ended.start_time is not None
    assert ended.end_time is not None
    assert [event.name for event in ended.events] == ["first byte"]
    assert started_ns <= ended.start_time <= ended.events[0].timestamp <= ended.end_time <= time.time_ns()


def test_attributes_have_the_names_of_the_semantic_conventions() -> None:
    with recording() as spans:
        span = begun("x")
        span.set(method="POST", route="/v1/chat/completions", status=200, model="m", is_stream=True)
        span.set(input_tokens=3, output_tokens=4, finish_reasons=["stop"], server_address="10.0.0.1", server_port=8000)
        span.set(organization_id="org_1")
        span.end()
        assert dict(only(spans).attributes or {}) == {
            "http.request.method": "POST",
            "http.route": "/v1/chat/completions",
            "http.response.status_code": 200,
            "gen_ai.request.model": "m",
            "gen_ai.request.stream": True,
            "gen_ai.usage.input_tokens": 3,
            "gen_ai.usage.output_tokens": 4,
            "gen_ai.response.finish_reasons": ("stop",),
            "server.address": "10.0.0.1",
            "server.port": 8000,
            "aiaas.organization_id": "org_1",
        }


@pytest.mark.parametrize("name", ["prompt", "messages", "body", "completion", "credential", "authorization", "api_key"])
def test_a_span_has_no_place_for_prompts_and_credentials(name: str) -> None:
    with recording() as spans:
        span = begun("x")
        with pytest.raises(KeyError):
            span.set(**{name: "zzz"})  # type: ignore[arg-type]  # the type checker refuses it first
        span.end()
        assert "zzz" not in only(spans).to_json()


def test_text_that_a_client_chose_is_redacted_and_cut() -> None:
    key = tokens.API_KEY.generate(Random(7), clock=ManualClock()).text
    secret = key.rpartition("_")[2]
    with recording() as spans:
        span = begun("x")
        span.set(model=key, finish_reasons=[f"Bearer {secret}"], request_id="y" * 10_000)
        span.fail(f"password={secret}")
        span.end()
        written = only(spans).to_json()
    assert secret not in written
    assert len(written) < 2_000


def test_a_failed_step_says_why() -> None:
    with recording() as spans:
        span = begun("x")
        span.fail("BACKEND_ERROR")
        span.end()
        assert not only(spans).status.is_ok
        assert only(spans).status.description == "BACKEND_ERROR"
        assert only(spans).attributes == {"error.type": "BACKEND_ERROR"}


def test_log_lines_within_a_step_carry_its_ids_and_those_after_it_do_not() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter("router"))
    logger = logging.Logger("tests.tracing")
    logger.addHandler(handler)
    with recording():
        span = begun("x")
        with span.as_current():
            logger.info("within")
        logger.info("after")
        span.end()
    within, after = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (within["trace_id"], within["span_id"]) == tuple(span.traceparent.split("-")[1:3])
    assert "trace_id" not in after


def test_an_exception_that_passes_through_a_step_leaves_nothing_in_it() -> None:
    with recording() as spans:
        span = begun("x")
        with pytest.raises(ValueError, match="a secret"), span.as_current():
            raise ValueError("a secret")
        span.end()
        assert "a secret" not in only(spans).to_json()


def test_the_span_of_an_rpc_that_is_served_can_have_steps() -> None:
    with recording() as spans:
        with TracerProvider().get_tracer("t").start_as_current_span("rpc") as rpc:
            served = tracing.current()
            assert served is not None
            served.child("step").end()
        parent = only(spans).parent
        assert parent is not None
        assert parent.span_id == rpc.get_span_context().span_id
        unsampled = trace.NonRecordingSpan(trace.SpanContext(1, 2, True))
        with trace.use_span(unsampled):
            assert tracing.current() is None


def test_without_an_endpoint_nothing_is_recorded() -> None:
    end = tracing.configure_tracing("router", None, 1.0)
    with trace.get_tracer("t").start_as_current_span("s") as span:
        assert not span.is_recording()
    assert tracing.begin("x") is None
    end()


def test_with_an_endpoint_the_ratio_decides_for_rpcs_and_the_parent_prevails() -> None:
    # In a process of its own, since OpenTelemetry takes a provider only once.
    script = """
from opentelemetry import trace
from mesh.tracing import configure_tracing
end = configure_tracing("router", "http://127.0.0.1:1", 0.0)
tracer = trace.get_tracer("t")
with tracer.start_as_current_span("s") as span:
    assert not span.get_span_context().trace_flags.sampled
parent = trace.SpanContext(1, 2, True, trace.TraceFlags(trace.TraceFlags.SAMPLED))
with tracer.start_as_current_span("s", context=trace.set_span_in_context(trace.NonRecordingSpan(parent))) as span:
    assert span.get_span_context().trace_flags.sampled
    assert span.resource.attributes["service.name"] == "router"
print("checked", flush=True)
import os
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "checked\n", done.stderr


def test_a_step_for_many_requests_is_linked_to_those_that_are_sampled() -> None:
    with recording() as spans:
        with tracing.following("batch", ["malformed", NOT_SAMPLED, SAMPLED]) as span:
            assert span is not None
            assert tracing.current() is not None
        batch = only(spans)
    assert [(link.context.trace_id, link.context.span_id) for link in batch.links] == [
        (int(TRACE_ID, 16), int(PARENT_ID, 16))
    ]
    assert batch.parent is None
    assert context_of(batch).trace_id != int(TRACE_ID, 16)
    assert batch.status.is_ok


def test_a_step_for_requests_none_of_which_is_sampled_is_none() -> None:
    with recording() as spans:
        with tracing.following("batch", [NOT_SAMPLED]) as span:
            assert span is None
        assert spans.get_finished_spans() == ()
    with tracing.following("batch", [SAMPLED]) as span:
        assert span is None


def test_a_step_for_many_requests_that_fails_says_why() -> None:
    with recording() as spans:
        with pytest.raises(PlatformError), tracing.following("batch", [SAMPLED]):
            raise PlatformError(Reason.UNAVAILABLE)
        assert only(spans).status.description == Reason.UNAVAILABLE.value


def test_usage_events_of_requests_that_are_not_sampled_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [UsageEvent(request_id=f"req_{number}", model="m").SerializeToString() for number in range(3)]
    traced = UsageEvent(request_id="req_4", traceparent=SAMPLED, choices=2).SerializeToString()
    assert traceparents([*events, traced]) == []
    with recording():
        assert traceparents([*events, traced]) == [SAMPLED]
        last = max(UsageEvent.DESCRIPTOR.fields, key=lambda field: field.number)
        assert last.name == "traceparent", "it is looked for at the end"
        monkeypatch.setattr("mesh.usage_traces.UsageEvent", None)
        assert traceparents(events) == []

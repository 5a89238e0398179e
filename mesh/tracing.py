"""Traces over OTLP: inferences by hand, all other RPCs by OpenTelemetry's instrumentation; no prompt, answer or
credential has a place in a span.

The instrumentation costs some 200 us for each RPC, whether it is sampled or not. So the hot path asks `begin` first:
the decision is one random number, and a request that is not sampled, which is the usual one, makes no object at all.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Annotated, Any, TypedDict, Unpack, get_type_hints

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, TraceIdRatioBased
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from mesh.errors import PlatformError
from mesh.telemetry import redact

# A process that stops while the collector is away waits so long for each batch, and not the usual ten seconds.
_EXPORT_TIMEOUT_S = 3.0
_TEXT_LENGTH = 256

# W3C Trace Context: version, trace, parent, flags, and what a version to come may add. ff is no version, 0 is no id.
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")

_tracer: trace.Tracer | None = None
_ratio = 0.0
_draw: Callable[[], float] = random.random


class Attributes(TypedDict, total=False):
    """All that a span may say, under the names of OpenTelemetry's semantic conventions where there are any."""

    method: Annotated[str, "http.request.method"]
    route: Annotated[str, "http.route"]
    status: Annotated[int, "http.response.status_code"]
    server_address: Annotated[str, "server.address"]
    server_port: Annotated[int, "server.port"]
    destination: Annotated[str, "messaging.destination.name"]
    message_count: Annotated[int, "messaging.batch.message_count"]
    operation: Annotated[str, "gen_ai.operation.name"]
    provider: Annotated[str, "gen_ai.provider.name"]
    model: Annotated[str, "gen_ai.request.model"]
    is_stream: Annotated[bool, "gen_ai.request.stream"]
    max_tokens: Annotated[int, "gen_ai.request.max_tokens"]
    answer_model: Annotated[str, "gen_ai.response.model"]
    finish_reasons: Annotated[Sequence[str], "gen_ai.response.finish_reasons"]
    time_to_first_chunk_s: Annotated[float, "gen_ai.response.time_to_first_chunk"]
    input_tokens: Annotated[int, "gen_ai.usage.input_tokens"]
    cached_tokens: Annotated[int, "gen_ai.usage.cache_read.input_tokens"]
    output_tokens: Annotated[int, "gen_ai.usage.output_tokens"]
    reasoning_tokens: Annotated[int, "gen_ai.usage.reasoning.output_tokens"]
    request_id: Annotated[str, "aiaas.request_id"]
    organization_id: Annotated[str, "aiaas.organization_id"]
    backend_id: Annotated[str, "aiaas.backend_id"]
    attempt: Annotated[int, "aiaas.attempt"]
    outcome: Annotated[str, "aiaas.outcome"]


_NAMES: dict[str, str] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Attributes, include_extras=True).items()
}


class Span:
    """A step of a sampled request. Whoever began it ends it; of a stream that is the end of the stream.

    `traceparent` is what the next hop resumes from, `trace_id` (32 hexadecimal digits) is for log lines and exemplars.
    """

    __slots__ = ("_span", "_tracer", "trace_id", "traceparent")

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        context = span.get_span_context()
        self._tracer = tracer
        self._span = span
        self.trace_id = trace.format_trace_id(context.trace_id)
        self.traceparent = f"00-{self.trace_id}-{trace.format_span_id(context.span_id)}-{context.trace_flags:02x}"

    def child(self, name: str, kind: SpanKind = SpanKind.INTERNAL) -> Span:
        """A step within this one."""
        return _start(self._tracer, name, kind, self._span)

    def set(self, **attributes: Unpack[Attributes]) -> None:
        """Say more of this step. Text is redacted, as a client may write its key where a model's name belongs."""
        for name, value in attributes.items():
            self._span.set_attribute(_NAMES[name], _clean(value))

    def event(self, name: str) -> None:
        """Note that something happened now, such as the first byte."""
        self._span.add_event(name)

    def fail(self, reason: str) -> None:
        """Mark the step as failed; `reason` is one of `mesh.errors.Reason`, or as short and as public."""
        reason = _clean(reason)
        self._span.set_attribute("error.type", reason)
        self._span.set_status(Status(StatusCode.ERROR, reason))

    def end(self) -> None:
        """It is over, now."""
        self._span.end()

    def as_current(self) -> AbstractContextManager[trace.Span]:
        """Within `with`, log lines carry the ids of this step, and RPCs to other services belong to it."""
        # An exception's text may hold anything; what of it may be told, `fail` tells.
        return trace.use_span(self._span, record_exception=False, set_status_on_exception=False)


def begin(name: str, traceparent: str = "", *, kind: SpanKind = SpanKind.SERVER) -> Span | None:
    """The first step of a request, where it enters the platform; None, as usual, when it is not sampled.

    `traceparent` is the client's W3C header, empty if there is none: its decision is kept, and a malformed one ignored.
    Without one, one random number decides.
    """
    if _tracer is None:
        return None
    parent = _read(traceparent) if traceparent else None
    if parent is None:
        return _start(_tracer, name, kind, None) if _draw() < _ratio else None
    return _start(_tracer, name, kind, _remote(parent)) if _is_sampled(parent) else None


def resume(name: str, traceparent: str, *, kind: SpanKind = SpanKind.SERVER) -> Span | None:
    """The step of this process in a trace that another one began; None without a `traceparent`, so when not sampled."""
    if not traceparent or _tracer is None:
        return None
    parent = _read(traceparent)
    return _start(_tracer, name, kind, _remote(parent)) if parent is not None and _is_sampled(parent) else None


def is_recording() -> bool:
    """Whether any request of this process may be sampled."""
    return _tracer is not None


@contextmanager
def following(name: str, traceparents: Sequence[str]) -> Iterator[Span | None]:
    """A step that serves many requests at once, with a link to each that is sampled; None where none is. It is a trace
    of its own, current within `with`, and ends with it; a failure is marked by its reason."""
    links = [Link(_remote(form).get_span_context()) for form in map(_read, traceparents) if form and _is_sampled(form)]
    if _tracer is None or not links:
        yield None
        return
    span = Span(_tracer, _tracer.start_span(name, Context(), SpanKind.CONSUMER, links=links))
    try:
        with span.as_current():
            yield span
    except BaseException as error:
        span.fail(error.reason.value if isinstance(error, PlatformError) else type(error).__name__)
        raise
    finally:
        span.end()


def current() -> Span | None:
    """The span of the RPC that is being served, if it is sampled; the interceptor ends it, and nobody else."""
    span = trace.get_current_span()
    return Span(_tracer, span) if _tracer is not None and span.is_recording() else None


def configure_tracing(service: str, endpoint: str | None, ratio: float = 1.0) -> Callable[[], None]:
    """Export the spans of this process over OTLP/gRPC to `endpoint` (http://host:port, or https:// for TLS).

    A caller's decision to sample is kept; traces that begin here are sampled by `ratio`, 0 to 1. Without an endpoint
    nothing is recorded. Returns what sends the last spans off and ends the export.
    """
    if not endpoint:
        return lambda: None
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)
    provider = record(service, BatchSpanProcessor(exporter), ratio)
    trace.set_tracer_provider(provider)

    def end() -> None:
        stop()
        provider.shutdown()

    return end


def record(
    service: str, processor: SpanProcessor, ratio: float, draw: Callable[[], float] = random.random
) -> TracerProvider:
    """Hand the spans that are begun from now on to `processor`; a trace begins where `draw` gives less than `ratio`.

    Returns a provider for instrumentation, whose spans go the same way.
    """
    global _tracer, _ratio, _draw
    resource = Resource.create({SERVICE_NAME: service})
    # What `begin` has sampled is sampled: the provider of the instrumentation would toss a coin of its own.
    by_hand = TracerProvider(resource=resource, sampler=ALWAYS_ON, shutdown_on_exit=False)
    by_hand.add_span_processor(processor)
    _tracer, _ratio, _draw = by_hand.get_tracer("aiaas"), ratio, draw
    provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(ratio)))
    provider.add_span_processor(processor)
    return provider


def stop() -> None:
    """Begin no more spans."""
    global _tracer
    _tracer = None


def _start(tracer: trace.Tracer, name: str, kind: SpanKind, parent: trace.Span | None) -> Span:
    # A context of its own, so that what happens to be current does not become the parent of a root.
    context = Context() if parent is None else trace.set_span_in_context(parent, Context())
    return Span(tracer, tracer.start_span(name, context, kind))


def _read(traceparent: str) -> re.Match[str] | None:
    form = _TRACEPARENT.fullmatch(traceparent)
    return None if form is None or (form[5] and form[1] == "00") else form


def _is_sampled(parent: re.Match[str]) -> bool:
    return bool(int(parent[4], 16) & TraceFlags.SAMPLED)


def _remote(parent: re.Match[str]) -> trace.Span:
    context = SpanContext(int(parent[2], 16), int(parent[3], 16), True, TraceFlags(int(parent[4], 16)))
    return trace.NonRecordingSpan(context)


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return (_redacted(value) if len(value) <= _TEXT_LENGTH else redact(value))[:_TEXT_LENGTH]
    return [_clean(item) for item in value] if isinstance(value, list | tuple) else value


# Most texts of spans are names that come again and again, and to redact one costs as much as to begin a span.
_redacted = lru_cache(maxsize=1024)(redact)

"""Says on spans what an inference was, in the words of OpenTelemetry's conventions for GenAI; never what was written.

The names of the attributes are in `mesh.tracing.Attributes`; here are their values. Tokens stand on the router's span
alone, as who sums them up over a trace would count those of two spans twice.
"""

from urllib.parse import urlsplit

from opentelemetry.trace import SpanKind

from aiaas.router.v1.backend_service_pb2 import EngineKind
from aiaas.type.v1.usage_event_pb2 import Endpoint
from mesh.tracing import Span
from router.backends import Served
from router.usage import UsageRecord

_OPERATIONS = {
    Endpoint.ENDPOINT_CHAT_COMPLETIONS: "chat",
    Endpoint.ENDPOINT_RESPONSES: "chat",
    Endpoint.ENDPOINT_COMPLETIONS: "text_completion",
    Endpoint.ENDPOINT_EMBEDDINGS: "embeddings",
}
_PROVIDERS: dict[int, str] = {number: name.removeprefix("ENGINE_KIND_").lower() for name, number in EngineKind.items()}


def begin_attempt(span: Span, record: UsageRecord, served: Served) -> Span:
    """The call of an engine, as a step of the request that `span` is."""
    operation = _operation(record)
    attempt = span.child(f"{operation} {record.model}", SpanKind.CLIENT)
    url = urlsplit(served.backend.base_url)
    attempt.set(
        operation=operation,
        provider=_PROVIDERS.get(served.backend.engine, "unknown"),
        model=served.upstream_model,
        is_stream=record.streamed,
        server_address=url.hostname or "",
        server_port=url.port or (443 if url.scheme == "https" else 80),
        backend_id=served.backend.backend_id,
        attempt=len(record.attempts),
    )
    return attempt


def describe(span: Span, record: UsageRecord, outcome: str, reason: str) -> None:
    """What became of a request."""
    span.set(
        operation=_operation(record),
        model=record.model,
        is_stream=record.streamed,
        organization_id=record.principal.organization_id,
        request_id=record.request_id,
        backend_id=record.backend_id,
        attempt=len(record.attempts),
        outcome=outcome,
        input_tokens=record.usage.prompt_tokens,
        cached_tokens=record.usage.cached_prompt_tokens,
        output_tokens=record.usage.completion_tokens,
        reasoning_tokens=record.usage.reasoning_tokens,
        finish_reasons=[record.finish_reason] if record.finish_reason else [],
    )
    if record.first_byte is not None:
        span.set(time_to_first_chunk_s=record.first_byte - record.admitted)
    if reason:
        span.fail(reason)


def _operation(record: UsageRecord) -> str:
    return _OPERATIONS.get(record.endpoint, "unknown")

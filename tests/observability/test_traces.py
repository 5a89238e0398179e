"""One request is one trace, through every process that it passes, as a collector gets it over OTLP."""

from __future__ import annotations

import secrets

import httpx
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from mesh.topology import USAGE
from tests.doubles.scripted_backend import Answer, Cut, Step, chat_stream, chunk, failure, sse
from tests.observability.conftest import BACKENDS, MODEL, Sent, Watched, until

EDGE = "/v1/chat/completions"
ROUTER = "router"
IDENTITY = "/aiaas.identity.v1.AuthService/Authenticate"
ENGINE = f"chat {MODEL}"
PUBLISH = f"publish {USAGE.name}"
PROCESS = f"process {USAGE.name}"

ERROR = Status.STATUS_CODE_ERROR


class Caller:
    """A client with a span of its own, and what the platform made of it."""

    def __init__(self, flags: str = "01") -> None:
        self.trace_id = secrets.token_bytes(16)
        self.span_id = secrets.token_bytes(8)
        self.traceparent = f"00-{self.trace_id.hex()}-{self.span_id.hex()}-{flags}"

    def spans(self, watched: Watched, *names: str) -> list[Sent]:
        """The spans of its trace, and those that are linked to it, in the order of their beginning; once each
        process has exported these of it (none: all that a request of a known key has)."""
        expected = set(names or (EDGE, ROUTER, ENGINE, PUBLISH, PROCESS))

        def found() -> list[Sent]:
            ours = [one for one in watched.spans() if self.trace_id == one.span.trace_id or self._is_linked(one)]
            return ours if {one.span.name for one in ours} >= expected else []

        spans: list[Sent] = until(found, f"{expected} are exported")
        return sorted(spans, key=lambda one: one.span.start_time_unix_nano)

    def _is_linked(self, one: Sent) -> bool:
        return any(link.trace_id == self.trace_id for link in one.span.links)


def only(spans: list[Sent], name: str) -> Sent:
    (found,) = [one for one in spans if one.span.name == name]
    return found


def failures(spans: list[Sent]) -> dict[str, str]:
    """The steps that are marked as failed, and why."""
    return {one.span.name: one.attributes["error.type"] for one in spans if one.span.status.code == ERROR}


def test_chat_completion_is_one_trace_through_every_hop(watched: Watched) -> None:
    caller = Caller()
    watched.engine.script.append(chat_stream("Hel", "lo"))
    answer = watched.chat(watched.new_key(), stream=True, traceparent=caller.traceparent)
    assert answer.status_code == 200
    spans = caller.spans(watched, EDGE, ROUTER, IDENTITY, ENGINE, PUBLISH, PROCESS)
    edge, router, identity, engine, publish, process = (
        only(spans, name) for name in (EDGE, ROUTER, IDENTITY, ENGINE, PUBLISH, PROCESS)
    )
    assert len(spans) == 6
    services = [one.service for one in (edge, router, identity, engine, publish, process)]
    assert services == ["edge", "router", "identity", "router", "router", "analytics"]
    assert edge.span.parent_span_id == caller.span_id
    assert router.span.parent_span_id == edge.span.span_id
    assert {one.span.parent_span_id for one in (identity, engine, publish)} == {router.span.span_id}
    # What analytics does for many requests at once is a trace of its own, linked to each of them.
    assert process.span.trace_id != caller.trace_id
    assert [(link.trace_id, link.span_id) for link in process.span.links] == [(caller.trace_id, router.span.span_id)]
    assert failures(spans) == {}
    kinds = [one.span.kind for one in (edge, router, identity, engine, publish, process)]
    served, asked = Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT
    assert kinds == [served, served, served, asked, Span.SPAN_KIND_PRODUCER, Span.SPAN_KIND_CONSUMER]
    # The engine's own spans would go on from there.
    handed_on = watched.engine.received[-1].headers["traceparent"]
    assert handed_on == f"00-{caller.trace_id.hex()}-{engine.span.span_id.hex()}-01"


def test_spans_speak_the_words_of_the_conventions_for_genai(watched: Watched) -> None:
    caller = Caller()
    watched.engine.script.append(chat_stream("Hel", "lo"))
    watched.chat(watched.new_key(), stream=True, traceparent=caller.traceparent)
    spans = caller.spans(watched)
    router, engine, edge = (only(spans, name).attributes for name in (ROUTER, ENGINE, EDGE))
    assert engine["gen_ai.operation.name"] == router["gen_ai.operation.name"] == "chat"
    assert engine["gen_ai.provider.name"] == "vllm"
    assert engine["gen_ai.request.model"] == router["gen_ai.request.model"] == MODEL
    assert engine["server.port"] == watched.engine.port
    assert router["gen_ai.usage.input_tokens"] == 5
    assert router["gen_ai.usage.output_tokens"] == 2
    assert router["gen_ai.response.finish_reasons"] == ["stop"]
    assert 0 < router["gen_ai.response.time_to_first_chunk"] < 5
    assert (edge["http.route"], edge["http.response.status_code"]) == (EDGE, 200)
    assert not any("Hel" in str(one.attributes) for one in spans)


def test_slow_requests_lead_from_a_graph_to_their_trace(watched: Watched) -> None:
    caller = Caller()
    assert watched.chat(watched.new_key(), traceparent=caller.traceparent).status_code == 200
    url, accept = (
        f"http://{watched.stack.ops['router']}/metrics",
        {"Accept": "application/openmetrics-text; version=1.0.0"},
    )
    metrics = httpx.get(url, headers=accept, trust_env=False).text
    buckets = [line for line in metrics.splitlines() if f'trace_id="{caller.trace_id.hex()}"' in line]
    assert {line.partition("_bucket")[0] for line in buckets} == {
        "aiaas_router_time_to_first_token_seconds",
        "aiaas_router_request_duration_seconds",
    }


def test_stream_that_breaks_off_marks_the_engines_step_and_those_that_waited_for_it(watched: Watched) -> None:
    caller = Caller()
    broken: list[Step] = [*sse(chunk("Hel"), done=False), Cut.RESET]
    watched.engine.script.append(Answer(broken, content_type="text/event-stream"))
    answer = watched.chat(watched.new_key(), stream=True, traceparent=caller.traceparent)
    assert answer.status_code == 200
    assert "error" in answer.text
    spans = caller.spans(watched)
    marked = failures(spans)
    assert marked.keys() == {ENGINE, ROUTER, EDGE}
    assert set(marked.values()) == {"backend_error"}
    assert only(spans, ROUTER).attributes["aiaas.outcome"] == "truncated"
    assert only(spans, EDGE).attributes["http.response.status_code"] == 200


def test_attempt_that_another_backend_made_good_is_the_only_failed_step(watched: Watched) -> None:
    caller = Caller()
    watched.engine.script += [failure(500), chat_stream("Hello")]
    assert watched.chat(watched.new_key(), stream=True, traceparent=caller.traceparent).status_code == 200
    spans = caller.spans(watched)
    first, second = (one for one in spans if one.span.name == ENGINE)
    assert [one.attributes["aiaas.attempt"] for one in (first, second)] == [1, 2]
    assert {one.attributes["aiaas.backend_id"] for one in (first, second)} == set(BACKENDS)
    assert (first.span.status.code == ERROR, second.span.status.code == ERROR) == (True, False)
    assert failures(spans).keys() == {ENGINE}


def test_refused_key_marks_the_edge_and_the_router_and_never_reaches_an_engine(watched: Watched) -> None:
    caller = Caller()
    answer = watched.chat("aias_wrong", traceparent=caller.traceparent)
    assert answer.status_code == 401
    spans = caller.spans(watched, EDGE, ROUTER)
    assert failures(spans) == {EDGE: "api_key_invalid", ROUTER: "api_key_invalid"}
    assert only(spans, EDGE).attributes["http.response.status_code"] == 401


def test_request_that_is_not_sampled_leaves_nothing_anywhere(watched: Watched) -> None:
    refused, sampled = Caller("00"), Caller()
    key = watched.new_key()
    for _ in range(3):
        watched.chat(key)
        watched.chat(key, traceparent=refused.traceparent)
    assert "traceparent" not in watched.engine.received[-1].headers
    watched.chat(key, traceparent=sampled.traceparent)
    sampled.spans(watched)
    known = {one.span.trace_id for one in watched.spans() if one.span.links or one.span.parent_span_id}
    assert refused.trace_id not in known
    # Whatever was exported is of a caller that samples, or follows one.
    assert {one.span.trace_id for one in watched.spans()} == known

"""The spans of an inference: each step is ended however it goes, and one that is not sampled makes none."""

import asyncio
from contextlib import aclosing

import pytest
from opentelemetry.sdk.trace import Tracer

from mesh import tracing
from tests.doubles.scripted_backend import Answer, Cut, Step, chunk, failure, sse
from tests.doubles.trace_collector import recording
from tests.unit.router.world import CHAT, EVENTS, STREAM, World


def streamed(*steps: Step) -> Answer:
    return Answer([*sse(chunk("a"), done=False), *steps], content_type=EVENTS)


async def run(world: World, way: str, span: tracing.Span | None) -> None:
    if way == "succeeds":
        await world.answer(CHAT, span=span)
    elif way == "fails":
        world.first.script.append(failure(500))
        world.second.script.append(failure(500))
        await world.refusal(CHAT, span=span)
    elif way == "is refused by its engine":
        world.first.script.append(failure(400))
        world.second.script.append(failure(400))
        await world.refusal(CHAT, span=span)
    elif way == "breaks off":
        world.first.script.append(streamed(Cut.RESET))
        world.second.script.append(streamed(Cut.RESET))
        await world.broken(STREAM, span=span)
    else:
        world.first.script.append(streamed(asyncio.Event()))
        world.second.script.append(streamed(asyncio.Event()))
        async with aclosing(world.parts(STREAM, span=span)) as parts:
            await anext(parts)


WAYS = {
    "succeeds": [""],
    "fails": ["backend_error"],
    "is refused by its engine": ["invalid_argument"],
    "breaks off": ["backend_error"],
    "is abandoned": ["cancelled"],
}


@pytest.mark.parametrize("way", WAYS)
async def test_every_attempt_is_a_step_that_ends_and_says_why_it_failed(world: World, way: str) -> None:
    with recording() as spans:
        request = tracing.begin("router")
        await run(world, way, request)
        ended = spans.get_finished_spans()
    assert {span.name for span in ended} == {"chat m"}
    assert [(span.attributes or {}).get("error.type", "") for span in ended] == WAYS[way]
    assert request is not None
    assert world.event().traceparent == request.traceparent


@pytest.mark.parametrize("way", WAYS)
async def test_a_request_that_is_not_sampled_makes_no_span(
    world: World, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recording(0.0):
        monkeypatch.setattr(Tracer, "start_span", None)
        monkeypatch.setattr(tracing, "Span", None)
        await run(world, way, tracing.begin("router"))
    assert world.event().traceparent == ""
    assert all("traceparent" not in one.headers for one in (*world.first.received, *world.second.received))

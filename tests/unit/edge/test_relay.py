"""The edge's end of a relay, against a router whose every frame is scripted."""

import asyncio
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any

import pytest

from aiaas.router.v1 import inference_service_pb2 as pb
from edge import relay, routers
from edge.relay import CREDIT_BYTES, Answer, Link
from edge.routers import Routers
from mesh.errors import PlatformError, Reason, to_status


class ScriptedStream:
    """What the router says is put into `incoming`; what the edge says is in `said`."""

    def __init__(self) -> None:
        self.incoming: asyncio.Queue[pb.RelayBatch | None] = asyncio.Queue()
        self.said: list[pb.RelayFrame] = []
        self.answers_pings = True
        self.is_closed = False

    async def write(self, batch: pb.RelayBatch) -> None:
        for frame in batch.frames:
            if frame.WhichOneof("kind") != "ping":
                self.said.append(frame)
            elif self.answers_pings:
                self.say(pb.RelayFrame(ping=pb.RelayPing()))

    async def read(self) -> pb.RelayBatch | None:
        return await self.incoming.get()

    async def close(self) -> None:
        self.is_closed = True
        self.incoming.put_nowait(None)

    def say(self, *frames: pb.RelayFrame) -> None:
        self.incoming.put_nowait(pb.RelayBatch(frames=frames))

    def kinds(self) -> list[str | None]:
        return [frame.WhichOneof("kind") for frame in self.said]


class World:
    """One link, and the streams that it dialled."""

    def __init__(self) -> None:
        self.streams: list[ScriptedStream] = []
        self.link = Link(self.dial, Random(1), window_s=0)

    def dial(self) -> ScriptedStream:
        self.streams.append(ScriptedStream())
        return self.streams[-1]

    @property
    def stream(self) -> ScriptedStream:
        return self.streams[-1]

    async def open(self, timeout_s: float = 60.0, tokens: int = 10) -> Answer:
        await until(lambda: self.link.takes_requests)
        answer, opened = self.link.open(tokens, timeout_s, 2)
        opened.request.body = b"{}"
        await until(lambda: "open" in self.stream.kinds())
        return answer


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    running = asyncio.create_task(made.link.run())
    yield made
    running.cancel()
    await asyncio.wait([running])


async def until(condition: Callable[[], Any], within_s: float = 2.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.002)


def frame(answer: Answer, **kind: Any) -> pb.RelayFrame:
    return pb.RelayFrame(inference_id=answer.id, **kind)


HEAD = pb.InferHead(content_type="text/event-stream", model="m")
TAIL = pb.InferTail(finish_reason="stop")


async def test_answer_arrives_and_what_came_together_is_read_together(world: World) -> None:
    answer = await world.open()
    world.stream.say(frame(answer, head=HEAD), frame(answer, data=b"a"), frame(answer, data=b"b"))
    assert (await answer.head()).model == "m"
    assert await answer.data() == b"ab"
    world.stream.say(frame(answer, data=b"c"), frame(answer, tail=TAIL))
    assert await answer.data() == b"c"
    assert answer.is_whole
    assert await answer.data() is None
    assert world.link.in_flight_tokens == 0


async def test_answers_do_not_mix(world: World) -> None:
    one, two = await world.open(), await world.open()
    world.stream.say(frame(two, head=HEAD), frame(one, head=HEAD), frame(two, data=b"two"), frame(one, data=b"one"))
    assert (await one.data(), await two.data()) == (b"one", b"two")


async def test_credit_is_given_for_what_was_passed_on_and_not_before(world: World) -> None:
    answer = await world.open()
    half = b"x" * (CREDIT_BYTES // 2 + 1)
    world.stream.say(frame(answer, head=HEAD), frame(answer, data=half))
    await answer.head()
    await answer.data()
    await asyncio.sleep(0)
    assert "credit" not in world.stream.kinds()
    reading = asyncio.create_task(answer.data())
    await until(lambda: "credit" in world.stream.kinds())
    assert world.stream.said[-1].credit.bytes == len(half)
    reading.cancel()


async def test_abandoned_answer_is_cancelled_at_the_router_and_raises_to_its_reader(world: World) -> None:
    answer = await world.open()
    reading = asyncio.create_task(answer.head())
    await asyncio.sleep(0)
    answer.abandon(KeyError("gone"))
    with pytest.raises(KeyError):
        await reading
    await until(lambda: world.stream.kinds() == ["open", "cancel"])
    # What was under way is dropped.
    world.stream.say(frame(answer, data=b"late"), frame(answer, tail=TAIL))
    other = await world.open()
    world.stream.say(frame(other, head=HEAD))
    await other.head()
    answer.abandon(KeyError("again"))
    assert world.stream.kinds() == ["open", "cancel", "open"]


async def test_whole_answer_is_not_cancelled(world: World) -> None:
    answer = await world.open()
    world.stream.say(frame(answer, head=HEAD), frame(answer, tail=TAIL))
    await answer.head()
    answer.abandon(KeyError("gone"))
    assert await answer.data() is None
    assert world.stream.kinds() == ["open"]


async def test_routers_error_is_raised_with_everything_it_says(world: World) -> None:
    answer = await world.open()
    told = PlatformError(Reason.RATE_LIMIT_EXCEEDED, retry_after_s=2.5)
    world.stream.say(frame(answer, status=to_status(told).SerializeToString()))
    with pytest.raises(PlatformError) as caught:
        await answer.head()
    assert (caught.value.reason, caught.value.retry_after_s) == (told.reason, 2.5)


@pytest.mark.parametrize("kind", [{"data": b"x"}, {"tail": TAIL}])
async def test_answer_without_a_head_is_an_internal_error(world: World, kind: dict[str, Any]) -> None:
    answer = await world.open()
    world.stream.say(frame(answer, **kind))
    with pytest.raises(PlatformError) as caught:
        await answer.head()
    assert caught.value.reason is Reason.INTERNAL


async def test_relay_that_ends_takes_its_answers_with_it_and_is_opened_again(world: World) -> None:
    answers = [await world.open() for _ in range(3)]
    world.stream.say(frame(answers[0], head=HEAD), frame(answers[0], data=b"a"))
    await answers[0].head()
    world.stream.incoming.put_nowait(None)
    # What had arrived is still to be read.
    assert await answers[0].data() == b"a"
    for answer in answers:
        with pytest.raises(PlatformError) as caught:
            await answer.data()
        assert caught.value.reason is Reason.UNAVAILABLE
    await until(lambda: len(world.streams) == 2)
    again = await world.open()
    world.stream.say(frame(again, head=HEAD))
    assert await again.head() == HEAD
    assert world.link.in_flight_tokens == 10


async def test_silent_router_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = await world.open()
    world.stream.answers_pings = False
    began = asyncio.get_running_loop().time()
    with pytest.raises(PlatformError) as caught:
        await answer.head()
    assert caught.value.reason is Reason.UNAVAILABLE
    assert asyncio.get_running_loop().time() - began < 2.2
    assert world.streams[0].is_closed


async def test_router_that_speaks_is_not_given_up_whatever_its_pings_do(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "_PING_S", 0.01)
    answer = await world.open()
    world.stream.answers_pings = False
    world.stream.say(frame(answer, head=HEAD))
    for _ in range(20):
        world.stream.say(frame(answer, data=b"x"))
        assert await answer.data() == b"x"
    assert len(world.streams) == 1


async def test_router_that_drains_gets_nothing_new_and_ends_what_it_has(world: World) -> None:
    answer = await world.open()
    world.stream.say(pb.RelayFrame(drain=pb.RelayDrain()))
    await until(lambda: not world.link.takes_requests)
    await until(lambda: world.stream.kinds() == ["open", "drain"])
    world.stream.say(frame(answer, head=HEAD), frame(answer, data=b"a"), frame(answer, tail=TAIL))
    assert (await answer.head(), await answer.data()) == (HEAD, b"a")


async def test_router_that_forgets_a_deadline_is_not_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_OVERTIME_S", 0.0)
    answer = await world.open(timeout_s=0.05)
    with pytest.raises(PlatformError) as caught:
        await answer.head()
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    await until(lambda: world.stream.kinds() == ["open", "cancel"])


class Replicas:
    """Routers behind one name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
        self.addresses = set(addresses)
        self.streams: dict[str, ScriptedStream] = {}
        monkeypatch.setattr(routers, "_LOOK_UP_S", 0.01)
        monkeypatch.setattr(routers, "_look_up", self.look_up)

    async def look_up(self, _: str) -> set[str]:
        if not self.addresses:
            raise OSError("no such name")
        return set(self.addresses)

    def dial(self, address: str) -> ScriptedStream:
        self.streams[address] = ScriptedStream()
        return self.streams[address]

    def opened(self) -> dict[str, int]:
        return {address: stream.kinds().count("open") for address, stream in self.streams.items()}


@pytest.fixture
async def balanced(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Routers, Replicas]]:
    replicas = Replicas(monkeypatch, "a", "b")
    made = Routers("name:1", replicas.dial, Random(1), window_s=0)
    running = asyncio.create_task(made.run())
    await until(lambda: sum(link.takes_requests for link in made._links.values()) == 2)
    yield made, replicas
    running.cancel()
    await asyncio.wait([running])


async def test_request_goes_where_the_fewest_tokens_are_in_flight(balanced: tuple[Routers, Replicas]) -> None:
    made, replicas = balanced
    await made.open(b'{"max_tokens": 1000}', 60)
    for _ in range(4):
        await made.open(b'{"max_tokens": 100}', 60)
    await until(lambda: sum(replicas.opened().values()) == 5)
    assert sorted(replicas.opened().values()) == [1, 4]


async def test_replicas_come_and_go_with_their_name(balanced: tuple[Routers, Replicas]) -> None:
    made, replicas = balanced
    held = [await made.open(b"{}", 60) for _ in range(2)]
    replicas.addresses = {"b", "c"}
    await until(lambda: "c" in replicas.streams and not made._links["a"].takes_requests)
    await until(lambda: made._links["c"].takes_requests)
    for _ in range(6):
        await made.open(b"{}", 60)
    assert replicas.opened()["a"] == 1
    for answer, _ in held:
        answer.abandon(KeyError("done"))
    await until(lambda: "a" not in made._links and replicas.streams["a"].is_closed)


async def test_name_that_cannot_be_looked_up_changes_nothing(balanced: tuple[Routers, Replicas]) -> None:
    made, replicas = balanced
    replicas.addresses = set()
    await asyncio.sleep(0.05)
    await made.open(b"{}", 60)
    assert set(replicas.streams) == {"a", "b"}


async def test_without_any_router_a_request_is_unavailable_after_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "_OPEN_WAIT_S", 0.1)
    with pytest.raises(PlatformError) as caught:
        await Routers("name:1", lambda _: ScriptedStream(), Random(1)).open(b"{}", 60)
    assert caught.value.reason is Reason.UNAVAILABLE


@pytest.mark.parametrize(
    ("target", "addresses"),
    [
        ("unix:/run/router.sock", {"unix:/run/router.sock"}),
        ("127.0.0.1:7003", {"ipv4:127.0.0.1:7003"}),
        ("dns:///127.0.0.1:7003", {"ipv4:127.0.0.1:7003"}),
        ("[::1]:7003", {"ipv6:[::1]:7003"}),
        ("localhost:7003", {"ipv4:127.0.0.1:7003"}),
        ("ipv4:10.0.0.1:1,10.0.0.2:1", {"ipv4:10.0.0.1:1", "ipv4:10.0.0.2:1"}),
    ],
)
async def test_target_is_taken_apart_into_replicas(target: str, addresses: set[str]) -> None:
    assert await routers._look_up(target) == addresses


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"max_tokens": "x"}', b"\xff"])
def test_body_that_is_wrong_still_counts_for_something(body: bytes) -> None:
    assert routers._tokens_of(body) > 0

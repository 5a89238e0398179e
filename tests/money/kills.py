"""The kill matrix: what is killed, stopped or broken off while requests run, and what must hold; each line measures and
judges, and afterwards the checker looks at everything that was ever written down.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from random import Random

import aio_pika
from redis.asyncio import Redis

from mesh.topology import USAGE
from tests.load.verdict import Verdict
from tests.money.checker import Books, most_off, tokens_off
from tests.money.client import Client, Request, Seen, begin, over
from tests.money.platform import Platform, deaths

STREAMS = 100
PACE_MS = 50
TOKENS = 4000
# Far more than all lines use, so that it is never the limit that refuses.
AMPLE = {"tokens": 200_000_000, "cost": 200_000_000}
# For about so many short requests: each uses 20 tokens, and as its prompt is bounded by its bytes, reserves some 800.
TIGHT_REQUESTS = 40
TIGHT = {"tokens": 900 + 20 * TIGHT_REQUESTS}

ROUTER_KILLS = 20
BRIEF_KILLS = 2
# After its streams were asked for: while they are being admitted, long after, and between the two.
ROUTER_MOMENTS_S = ((0.0, 0.2), (2.0, 4.0), (0.2, 2.0))
ENDED_WITHIN_S = 2.0
BACK_WITHIN_S = 10.0
FREED_WITHIN_S = 2.0
EDGE_KILLS = 3
# A young quorum queue whose broker is killed at once comes back without a leader.
QUEUE_AGE_S = 5.0
BROKER_AWAY_S = 30.0
BROKER_AWAY_LONG_S = 300.0
REDIS_AWAY_S = 10.0
# A stream is told of again in the second round of three seconds that it sees.
REJOINED_WITHIN_S = 8.0
POSTGRES_AWAY_S = 22.0
LEASE_S = 10.0
HEALED_WITHIN_S = 5.0
# So often the broker delivers a message again, until it takes it for poison.
REDELIVERIES = 4
UNREAD_WITHIN_S = 45.0
DISK_FULL_S = 5.0


class MissedError(Exception):
    """A line was missed, and nobody wants to know more."""


class Judged(Verdict):
    """A table that remembers what was missed, and with `is_brief` ends with it."""

    def __init__(self, *, is_brief: bool) -> None:
        super().__init__()
        self.missed: list[str] = []
        self._is_brief = is_brief

    def line(self, what: str, found: str, met: bool | None = None) -> None:
        """Print one line; without `met` it only informs."""
        super().line(what, found, met)
        if met is False:
            self.missed.append(f"{what}: {found}")
            if self._is_brief:
                raise MissedError(what)


@dataclass
class Matrix:
    """What a line needs: the platform, who asks, and where it says what it found."""

    platform: Platform
    random: Random
    verdict: Judged
    hard: Client
    plain: Client
    is_long: bool
    router_kills: int

    async def settled(self, line: str) -> Books:
        """Judge everything that is written down, by now or within the time that leases take."""
        books, findings, after_s = await self.platform.agreed()
        kinds = Counter(finding.kind for finding in findings)
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or (
            f"{len(books.events):,} requests in three books, agreed after {after_s:.1f} s"
        )
        self.verdict.line(f"{line}: journal = analytics = ledger, nothing leaks", found, not findings)
        for finding in {finding.kind: finding for finding in findings}.values():
            self.verdict.line(f"{line}: {finding.kind}", finding.what[:400])
        least, worst = self.platform.sampler.least, self.platform.sampler.worst
        if least is not None and least < 0:
            self.verdict.line(f"{line}: spent + leased passed a limit", worst, met=False)
        return books


class Traffic:
    """Requests of many kinds, all the time: `rate` a second that are no streams, and streams of some seconds."""

    def __init__(self, clients: Iterable[Client], *, rate: float = 20.0, stream_rate: float = 4.0) -> None:
        self._clients = list(clients)
        self._rates = (rate, stream_rate)
        self._tasks: list[asyncio.Task[None]] = []
        self.seen: list[Seen] = []

    async def __aenter__(self) -> Traffic:
        for rate, ask in zip(self._rates, (self._ask, self._stream), strict=True):
            if rate:
                self._tasks.append(asyncio.create_task(self._keep_asking(rate, ask)))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def _keep_asking(self, rate: float, ask: Callable[[Client], Awaitable[Seen]]) -> None:
        asking: set[asyncio.Task[None]] = set()
        due, number = time.monotonic(), 0

        async def one(client: Client) -> None:
            self.seen.append(await ask(client))

        try:
            while True:
                task = asyncio.create_task(one(self._clients[number % len(self._clients)]))
                asking.add(task)
                task.add_done_callback(asking.discard)
                number, due = number + 1, due + 1 / rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
        finally:
            if asking:
                await asyncio.wait(asking)

    async def _ask(self, client: Client) -> Seen:
        return await client.ask()

    async def _stream(self, client: Client) -> Seen:
        stream = await client.open(tokens=40, pace_ms=PACE_MS)
        return await stream.over

    def failed(self) -> list[Seen]:
        """Those that did not get their whole answer."""
        return [seen for seen in self.seen if not seen.is_admitted or seen.ended not in ("done", "answered")]


def percentile(values: list[float], share: float) -> float:
    """The value that so many are not above."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0


def told(seen: Iterable[Seen]) -> str:
    """What became of requests, in a few words."""
    ways = Counter(" ".join(filter(None, (str(one.status or "no head"), one.ended, one.reason))) for one in seen)
    return ", ".join(f"{count} {way}" for way, count in sorted(ways.items())) or "none"


def none_failed(matrix: Matrix, what: str, traffic: Traffic) -> None:
    """Judge that every request of the traffic was answered."""
    failed = traffic.failed()
    found = f"{len(traffic.seen):,} answered" if not failed else f"of {len(traffic.seen):,}: {told(failed)}"
    matrix.verdict.line(what, found, not failed)
    for seen in failed[:1]:
        matrix.verdict.line(f"{what}: one of them", seen.body[:200].decode(errors="replace"))


async def router(matrix: Matrix) -> None:
    """Killed at random moments, with a hundred streams of an organization with hard budgets, and with another that
    cannot afford all that it asks for."""
    platform, verdict = matrix.platform, matrix.verdict
    streams: list[Seen] = []
    last_s, freed_s, back_s = [], [], []
    tight = await platform.new_client("Tight, while the router is killed", tokens=100 * TIGHT["tokens"] // 40)
    async with Traffic([tight], stream_rate=1):
        for number in range(matrix.router_kills):
            opening = asyncio.gather(*(matrix.hard.open(tokens=TOKENS, pace_ms=PACE_MS) for _ in range(STREAMS)))
            moments_s = ROUTER_MOMENTS_S[number % len(ROUTER_MOMENTS_S)]
            await asyncio.sleep(matrix.random.uniform(*moments_s))
            killed = await platform.kill("router")
            opened = await opening
            left, after_s = await platform.free_engine(killed, FREED_WITHIN_S)
            freed_s.append(float("inf") if left else after_s)
            await platform.ready("router")
            while not (await matrix.hard.ask()).is_admitted and time.monotonic() < killed + 6 * BACK_WITHIN_S:
                await asyncio.sleep(0.1)
            back_s.append(time.monotonic() - killed)
            begun = [stream.seen for stream in opened if 0 < stream.seen.head_at < killed]
            last_s.append(max((seen.ended_at or float("inf") for seen in begun), default=killed) - killed)
            streams += begun
            for stream in opened:
                # The edge had not yet opened it, and had the next router run it.
                if not stream.over.done() and stream.seen not in begun:
                    stream.hang_up(reset=False)
    verdict.line(
        f"router killed {len(last_s)} times: {len(streams):,} streams that had begun end with an error, and no [DONE]",
        told(streams),
        {seen.ended for seen in streams} == {"error"},
    )
    verdict.line("router: the last stream's end", f"{max(last_s):.2f} s after", max(last_s) <= ENDED_WITHIN_S)
    verdict.line("router: the engine is free", f"{max(freed_s):.2f} s after", max(freed_s) <= FREED_WITHIN_S)
    verdict.line("router: answers again", f"{max(back_s):.2f} s after at most", max(back_s) <= BACK_WITHIN_S)
    books = await matrix.settled("router")
    if off := tokens_off(books, streams):
        verdict.line(
            "router: tokens billed, less those that clients saw",
            f"{min(off)} to {max(off)}; {sum(off):+,} of {sum(seen.tokens for seen in streams):,}",
            max(map(abs, off)) <= most_off(streams[0]),
        )


async def disk(matrix: Matrix) -> None:
    """A router that cannot write any more, as on a full disk."""
    platform, verdict = matrix.platform, matrix.verdict
    streams = await begin(matrix.hard, 20, tokens=TOKENS, pace_ms=PACE_MS)
    async with platform.disk_full("router"), Traffic([matrix.hard, matrix.plain], stream_rate=0) as during:
        await asyncio.sleep(DISK_FULL_S)
    ways = {(seen.status, bool(seen.retry_after)) for seen in during.seen}
    verdict.line("disk full: requests get 503 with Retry-After", told(during.seen), ways == {(503, True)})
    full_until = time.monotonic()
    while not (seen := await matrix.hard.ask()).is_admitted and time.monotonic() < full_until + 2 * HEALED_WITHIN_S:
        await asyncio.sleep(0.1)
    healed_s = time.monotonic() - full_until
    verdict.line("disk free: answers again", f"{healed_s:.1f} s after", seen.is_admitted and healed_s < HEALED_WITHIN_S)
    for stream in streams:
        stream.hang_up(reset=False)
    await matrix.settled("disk")


async def rabbitmq(matrix: Matrix) -> None:
    """Stopped, killed, and its queue deleted."""
    platform, verdict = matrix.platform, matrix.verdict
    async with Traffic([matrix.hard, matrix.plain]) as before:
        await asyncio.sleep(QUEUE_AGE_S)
    async with Traffic([matrix.hard, matrix.plain]) as during, platform.stopped("rabbitmq"):
        await asyncio.sleep(BROKER_AWAY_LONG_S if matrix.is_long else BROKER_AWAY_S)
    none_failed(matrix, "rabbitmq stopped: requests", during)
    p99s = [
        percentile([seen.head_s * 1000 for seen in some.seen if seen.head_s > 0], 0.99) for some in (before, during)
    ]
    verdict.line("rabbitmq stopped: the first byte, p99", f"{p99s[1]:.1f} ms ({p99s[0]:.1f} ms before)")
    await matrix.settled("rabbitmq stopped")
    async with Traffic([matrix.hard, matrix.plain]) as during:
        async with platform.stopped("rabbitmq"):
            await asyncio.sleep(2)
            await platform.kill("rabbitmq")
        await platform.ready("rabbitmq")
    none_failed(matrix, "rabbitmq killed: requests", during)
    await matrix.settled("rabbitmq killed")
    await asyncio.sleep(QUEUE_AGE_S)
    await queue_deleted(matrix)


async def queue_deleted(matrix: Matrix) -> None:
    """The queue of usage is deleted: first an empty one, which costs nothing; then one with what is confirmed in it."""
    platform, verdict = matrix.platform, matrix.verdict
    async with platform.stopped("analytics"):
        await delete_usage_queue(platform)
        async with Traffic([matrix.hard, matrix.plain]) as during:
            await asyncio.sleep(3)
    none_failed(matrix, "queue deleted: requests", during)
    await matrix.settled("queue deleted")
    async with platform.stopped("analytics"):
        async with Traffic([matrix.hard, matrix.plain]) as during:
            await asyncio.sleep(3)
        await asyncio.sleep(1)
        lost = await delete_usage_queue(platform)
    none_failed(matrix, "queue deleted with messages: requests", during)
    verdict.line("queue deleted with messages: those that were confirmed", f"{lost}", lost > 0)
    republished = await platform.reconcile()
    verdict.line("queue deleted with messages: requests published again", f"{republished:,}", republished > 0)
    await matrix.settled("queue deleted with messages")


async def delete_usage_queue(platform: Platform) -> int:
    """Delete the queue; returns how many messages waited in it."""
    async with await aio_pika.connect(platform.stack.rabbitmq.url) as connection:
        channel = await connection.channel()
        deleted = await channel.queue_delete(USAGE.name)
        return deleted.message_count or 0


async def redis(matrix: Matrix) -> None:
    """Flushed, stopped, killed."""
    platform, verdict = matrix.platform, matrix.verdict
    tight = await platform.new_client("Tight", **TIGHT)
    streams = await begin(matrix.hard, 20, tokens=TOKENS, pace_ms=100)

    async def rejoined(what: str) -> None:
        began = time.monotonic()
        slots = 0
        while (passed_s := time.monotonic() - began) <= 2 * REJOINED_WITHIN_S:
            with contextlib.suppress(OSError):
                # Of the organization, and of its key.
                slots = await platform.slots()
                if slots >= 2 * len(streams):
                    break
            await asyncio.sleep(0.05)
        verdict.line(
            f"redis {what}: {2 * len(streams)} slots of {len(streams)} streams are taken again",
            f"{slots} after {passed_s:.1f} s",
            slots >= 2 * len(streams) and passed_s <= REJOINED_WITHIN_S,
        )

    async with Traffic([matrix.hard, matrix.plain], stream_rate=0) as during:
        async with Redis.from_url(platform.stack.valkey.url) as client:
            await client.flushall()
        await rejoined("flushed")
    none_failed(matrix, "redis flushed: requests", during)
    async with Traffic([matrix.hard, matrix.plain], stream_rate=0) as during:
        async with platform.stopped("valkey"):
            await asyncio.sleep(REDIS_AWAY_S / 2)
            asked = await asyncio.gather(*(tight.ask() for _ in range(2 * TIGHT_REQUESTS)))
            await asyncio.sleep(REDIS_AWAY_S / 2)
        await rejoined("stopped")
    none_failed(matrix, "redis stopped: requests", during)
    slowest = max((seen.head_s for seen in during.seen), default=0.0)
    verdict.line("redis stopped: the slowest first byte", f"{slowest * 1000:.0f} ms", slowest < 1.0)
    within_budget(matrix, "redis stopped: requests of who can afford only some", asked)
    async with Traffic([matrix.hard, matrix.plain], stream_rate=0) as during:
        await platform.kill("valkey")
        await platform.ready("valkey")
        await rejoined("killed")
        await asyncio.sleep(3)
    none_failed(matrix, "redis killed: requests", during)
    for stream in streams:
        stream.hang_up(reset=False)
    await matrix.settled("redis")


def within_budget(matrix: Matrix, what: str, asked: list[Seen]) -> None:
    """Judge that some were answered and some refused, for want of money and of nothing else."""
    spent = [seen for seen in asked if seen.status == 429 and seen.reason == "insufficient_quota"]
    answered = [seen for seen in asked if seen.is_admitted]
    is_met = bool(spent and answered) and len(spent) + len(answered) == len(asked)
    matrix.verdict.line(what, f"{len(answered)} answered, {len(spent)} refused as spent, of {len(asked)}", is_met)


async def postgres(matrix: Matrix) -> None:
    """Killed, and away for longer than leases last."""
    platform, verdict = matrix.platform, matrix.verdict
    # Everybody is known before.
    await asyncio.gather(matrix.hard.ask(), matrix.plain.ask())
    streams = await begin(matrix.hard, 20, tokens=TOKENS, pace_ms=100)
    free = await begin(matrix.plain, 5, tokens=TOKENS, pace_ms=100)
    async with Traffic([matrix.hard], stream_rate=0) as hard, Traffic([matrix.plain], stream_rate=0) as plain:
        async with platform.away("postgres"):
            killed = time.monotonic()
            await asyncio.sleep(POSTGRES_AWAY_S)
            stopped = [stream.seen for stream in streams]
            going_on = sum(not stream.over.done() for stream in free)
        healed = time.monotonic()
        while not (seen := await matrix.hard.ask()).is_admitted:
            if time.monotonic() > healed + 4 * HEALED_WITHIN_S:
                break
            await asyncio.sleep(0.1)
        healed_s = time.monotonic() - healed
    ways = Counter((seen.status, bool(seen.retry_after)) for seen in hard.seen)
    verdict.line(
        "postgres away: requests under hard budgets are answered, or get 503 with Retry-After",
        ", ".join(f"{count} of {status}" for (status, _), count in sorted(ways.items())),
        set(ways) == {(200, False), (503, True)},
    )
    ends_s = [seen.ended_at - killed for seen in stopped if seen.ended]
    verdict.line(
        f"postgres away: {len(stopped)} streams under hard budgets are stopped before their leases end",
        f"{told(stopped)}, the last {max(ends_s, default=0):.1f} s after",
        {seen.ended for seen in stopped} == {"error"} and max(ends_s) <= LEASE_S,
    )
    last = max((seen.asked_at for seen in hard.seen if seen.is_admitted and seen.asked_at < healed), default=killed)
    verdict.line("postgres away: the last that was admitted", f"{last - killed:.1f} s after", last - killed <= LEASE_S)
    none_failed(matrix, "postgres away: requests without budgets", plain)
    verdict.line("postgres away: streams without budgets go on", f"{going_on} of {len(free)}", going_on == len(free))
    verdict.line(
        "postgres back: answers again", f"{healed_s:.1f} s after", seen.is_admitted and healed_s <= HEALED_WITHIN_S
    )
    for stream in free:
        stream.hang_up(reset=False)
    await matrix.settled("postgres")


async def analytics(matrix: Matrix) -> None:
    """Killed between its commit and its acknowledgement, at any moment, and so often in a row that the broker takes
    good messages for poison."""
    platform = matrix.platform
    await analytics_dies(matrix, REDELIVERIES)
    await matrix.settled("analytics killed between commit and acknowledgement")
    async with Traffic([matrix.hard, matrix.plain], rate=60, stream_rate=0) as during:
        for _ in range(REDELIVERIES):
            await platform.ready("analytics")
            await asyncio.sleep(matrix.random.uniform(0.0, 1.0))
            await platform.kill("analytics")
    none_failed(matrix, "analytics killed at any moment: requests", during)
    await matrix.settled("analytics killed at any moment")
    await analytics_dies(matrix, 2 * REDELIVERIES)
    await platform.ready("analytics")
    republished = await platform.reconcile()
    matrix.verdict.line("analytics killed too often: requests published again", f"{republished:,}")
    await matrix.settled("analytics killed too often")


async def analytics_dies(matrix: Matrix, times: int) -> None:
    """Requests, while analytics dies so often after a commit."""
    counter = deaths(matrix.platform.state)
    counter.write_text(str(times))
    counter.chmod(0o666)
    async with Traffic([matrix.hard, matrix.plain], rate=60, stream_rate=0) as during, asyncio.timeout(90):
        while int(counter.read_text() or 1):
            await asyncio.sleep(0.1)
    none_failed(matrix, f"analytics killed {times} times after a commit: requests", during)


async def edge(matrix: Matrix) -> None:
    """Killed under streams."""
    platform, verdict = matrix.platform, matrix.verdict
    ended: list[Seen] = []
    freed_s = []
    for _ in range(EDGE_KILLS):
        streams = await begin(matrix.hard, STREAMS // 2, tokens=TOKENS, pace_ms=PACE_MS)
        await asyncio.sleep(matrix.random.uniform(0.0, 2.0))
        killed = await platform.kill("edge")
        left, after_s = await platform.free_engine(killed, 2 * FREED_WITHIN_S)
        freed_s.append(after_s if not left else float("inf"))
        ended += await over(streams, 30)
        await platform.ready("edge")
    verdict.line(
        f"edge killed {len(freed_s)} times: its streams", told(ended), {seen.ended for seen in ended} == {"cut"}
    )
    verdict.line("edge: the engine is free", f"{max(freed_s):.2f} s after", max(freed_s) <= FREED_WITHIN_S)
    books = await matrix.settled("edge")
    if off := tokens_off(books, ended):
        verdict.line(
            "edge: tokens billed, less those that clients saw", f"{min(off)} to {max(off)}; {sum(off):+} in all"
        )


async def clients(matrix: Matrix) -> None:
    """They hang up with a FIN or with an RST, or read nothing any more."""
    platform, verdict = matrix.platform, matrix.verdict
    for how, reset in (("FIN", False), ("RST", True)):
        streams = await begin(matrix.hard, STREAMS // 2, tokens=TOKENS, pace_ms=PACE_MS)
        for stream in streams:
            stream.hang_up(reset=reset)
        left, after_s = await platform.free_engine(time.monotonic(), FREED_WITHIN_S)
        verdict.line(f"clients that end with {how}: the engine is free", f"{after_s:.2f} s after", not left)
    silent = [await silent_reader(matrix.hard) for _ in range(10)]
    left, after_s = await platform.free_engine(time.monotonic(), UNREAD_WITHIN_S)
    verdict.line("clients that read nothing: the engine is free", f"{after_s:.1f} s after", not left)
    await matrix.settled("clients")
    for stream in silent:
        stream.hang_up(reset=True)


async def silent_reader(client: Client) -> Request:
    """A stream, more than all buffers on the way hold, whose client reads its beginning and no more."""
    stream = await client.open(tokens=100_000, pace_ms=1, buffer_bytes=4096)
    await stream.began
    stream.stop_reading()
    return stream


LINES: dict[str, Callable[[Matrix], Awaitable[None]]] = {
    "router": router,
    "rabbitmq": rabbitmq,
    "redis": redis,
    "postgres": postgres,
    "analytics": analytics,
    "edge": edge,
    "disk": disk,
    "clients": clients,
}
"""The lines of the matrix, by who is killed."""


@contextlib.asynccontextmanager
async def matrix_on(platform: Platform, seed: int, *, is_brief: bool) -> AsyncIterator[Matrix]:
    """A matrix on a platform that runs, with who asks in it. A brief one kills the router twice and no more, and ends
    with the first thing that is missed."""
    hard = await platform.new_client("With hard budgets", **AMPLE)
    plain = await platform.new_client("Without budgets")
    yield Matrix(
        platform,
        Random(seed),
        Judged(is_brief=is_brief),
        hard,
        plain,
        is_long=os.environ.get("LONG") == "1",
        router_kills=BRIEF_KILLS if is_brief else int(os.environ.get("KILLS") or ROUTER_KILLS),
    )

"""What a request, a chunk and a batch cost each process, as they were measured; it never measures.

`costs.json` is made by `python -m tests.load.capacity` from the rows of a run, which are kept beside the benchmark's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources

import msgspec

from deploy.capacity.queueing import delayed, gathered

RELAY_WINDOW_S = 0.001
PUBLISH_WINDOW_S = 0.1
MESSAGE_EVENTS = 500
PARTS = ("edge", "router", "valkey", "rabbitmq", "analytics", "postgres", "identity")


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """What one installation does in a second."""

    requests: float
    # Pieces of streamed answers.
    chunks: float
    # Batches that relays carry, both ways: a gRPC message each.
    batches: float
    # Messages of usage events.
    messages: float
    # Callers that a router did not know.
    lookups: float = 0

    @classmethod
    def of(cls, requests: float, chunks: float, *, relays: int = 1, routers: int = 1, lookups: float = 0) -> Traffic:
        """What follows from requests and chunks, spread evenly over relays (edge processes times routers)."""
        up, down = requests / relays, (requests + chunks) / relays
        events = requests / routers
        return cls(
            requests=requests,
            chunks=chunks,
            batches=relays * (gathered(up, RELAY_WINDOW_S) + gathered(down, RELAY_WINDOW_S)),
            messages=routers * max(delayed(events, PUBLISH_WINDOW_S), events / MESSAGE_EVENTS),
            lookups=lookups,
        )


class Cost(msgspec.Struct, frozen=True, omit_defaults=True):
    """CPU of one part: cores that a process takes at rest, and microseconds for each of what it handles."""

    idle_cores: float = 0
    request_us: float = 0
    chunk_us: float = 0
    batch_us: float = 0
    message_us: float = 0
    lookup_us: float = 0

    def cores(self, traffic: Traffic) -> float:
        """Cores for the traffic alone, rest not included."""
        return 1e-6 * (
            self.request_us * traffic.requests
            + self.chunk_us * traffic.chunks
            + self.batch_us * traffic.batches
            + self.message_us * traffic.messages
            + self.lookup_us * traffic.lookups
        )


class Costs(msgspec.Struct, frozen=True):
    """Everything that was measured, and where."""

    measured: str
    parts: Mapping[str, Cost]
    # Of a whole answer, and of one chunk, with their envelopes.
    answer_bytes: float
    chunk_bytes: float
    # Of the edge and a router together, for each stream that runs.
    stream_bytes: float
    # Of one usage event in PostgreSQL, its index included, before anything is compressed.
    event_bytes: float


@cache
def measured() -> Costs:
    """The costs that are committed."""
    text = resources.files(__package__).joinpath("costs.json").read_bytes()
    return msgspec.json.decode(text, type=Costs)

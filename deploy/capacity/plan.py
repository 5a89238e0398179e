"""From a workload to what one installation needs for it, and to the first thing that there is not enough of; it never
asks a running platform."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from deploy.capacity.costs import Cost, Costs, Traffic
from deploy.capacity.queueing import mg1_wait_s, mmc_wait_s

# The product's own figures.
KEY_CACHE_S = 54.0
PINGS_PER_S = 2
POOL_CONNECTIONS = 10
# Valkey runs scripts one after the other, whatever the machine has.
VALKEY_CORES = 1
DAY_S = 86_400
_PROCESSES = ("edge", "router", "identity", "analytics")
_MOST_RATE = 1e9
_MOST_PROCESSES = 100_000


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is asked of the platform, and what it may have."""

    requests_per_s: float
    streamed_share: float = 0.8
    # Of a streamed answer; engines send a token or a few in each.
    chunks_per_answer: float = 200
    seconds_per_answer: float = 5
    request_bytes: float = 4_000
    # With equal shares of the traffic.
    keys: int = 500_000
    organizations: int = 20_000
    # Whose budgets routers hold leases of.
    budgeted_share: float = 0.1
    retention_days: int = 400
    # How much of a core or a machine may be in use.
    utilisation: float = 0.6
    # The largest server that there is for each.
    postgres_cores: float = 32
    rabbitmq_cores: float = 4
    # Where numbers are given: edge, router, identity, analytics. Others are as many as needed.
    processes: Mapping[str, int] = {}

    def __post_init__(self) -> None:
        """Raises ValueError, which names the field."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise ValueError(f"{name} must not be negative")
        for name in ("requests_per_s", "keys", "postgres_cores", "rabbitmq_cores"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be above 0")
        if self.streamed_share > 1 or self.budgeted_share > 1:
            raise ValueError("streamed_share and budgeted_share are at most 1")
        if not 0 < self.utilisation < 1:
            raise ValueError("utilisation lies between 0 and 1")
        for name, number in self.processes.items():
            if name not in _PROCESSES or number < 1:
                raise ValueError(f"processes are numbers, at least 1, of {', '.join(_PROCESSES)}")

    @property
    def chunks_per_s(self) -> float:
        """Of all streamed answers."""
        return self.requests_per_s * self.streamed_share * self.chunks_per_answer


@dataclass(frozen=True)
class Need:
    """What of one part is needed: processes of a core each, or a server of so many cores."""

    part: str
    cores: float
    processes: int
    # None: as many as one likes; 0: no number is enough.
    most_cores: float | None
    # Until it is served, by the closed formulas.
    wait_p99_s: float

    @property
    def load(self) -> float:
        """Cores needed over those there may be; 0 where there may be any number."""
        if self.most_cores is None:
            return 0.0
        return self.cores / self.most_cores if self.most_cores else math.inf


@dataclass(frozen=True)
class Plan:
    """What one installation needs, all of it at the wanted utilisation."""

    workload: Workload
    traffic: Traffic
    needs: tuple[Need, ...]
    # By name; per second where the name says so.
    figures: Mapping[str, float]

    @property
    def fits(self) -> bool:
        """Whether nothing is missing."""
        return all(need.load <= self.workload.utilisation for need in self.needs)

    @property
    def tightest(self) -> Need:
        """The part of which most of what there may be is in use."""
        return max(self.needs, key=lambda need: need.load)


def plan(workload: Workload, costs: Costs) -> Plan:
    """What an installation needs for the workload, whether it can have that or not.

    Edge processes and routers are found together: each pair of them keeps a relay, so that more of them share less,
    and there are more pings.
    """
    numbers = {name: workload.processes.get(name, 1) for name in ("edge", "router")}
    while True:
        traffic = _traffic(workload, numbers["edge"], numbers["router"])
        more = {
            name: workload.processes.get(name) or max(number, _processes(costs.parts[name], traffic, workload))
            for name, number in numbers.items()
        }
        # Beyond, every relay that is added costs more than it carries.
        if more == numbers or max(more.values()) > _MOST_PROCESSES:
            break
        numbers = more
    needs = tuple(_need(part, cost, traffic, workload, more.get(part)) for part, cost in costs.parts.items())
    return Plan(workload, traffic, needs, _figures(workload, costs, traffic, {need.part: need for need in needs}))


def capacity(workload: Workload, costs: Costs) -> tuple[float, str]:
    """The most requests a second that one installation can carry, and the part that is the first to be too small."""
    low, high = 0.0, 1.0
    while high < _MOST_RATE and plan(_at(workload, high), costs).fits:
        low, high = high, high * 2
    while high - low > high / 1000:
        middle = (low + high) / 2
        low, high = (middle, high) if plan(_at(workload, middle), costs).fits else (low, middle)
    return low, plan(_at(workload, high), costs).tightest.part


def _at(workload: Workload, requests_per_s: float) -> Workload:
    return msgspec.structs.replace(workload, requests_per_s=requests_per_s)


def _traffic(workload: Workload, edges: int, routers: int) -> Traffic:
    requests, relays = workload.requests_per_s, edges * routers
    # A key is asked for again when it comes after the last answer has become too old, at each router for itself.
    each_s = workload.keys * routers / requests
    traffic = Traffic.of(
        requests,
        workload.chunks_per_s,
        relays=relays,
        routers=routers,
        lookups=workload.keys * routers / (KEY_CACHE_S + each_s),
    )
    # A ping and its answer, each as good as a batch.
    return msgspec.structs.replace(traffic, batches=traffic.batches + 2 * PINGS_PER_S * relays)


def _processes(cost: Cost, traffic: Traffic, workload: Workload) -> int:
    """So many processes of one core, each with its cost of being there."""
    return max(1, math.ceil(cost.cores(traffic) / max(1e-9, workload.utilisation - cost.idle_cores)))


def _need(part: str, cost: Cost, traffic: Traffic, workload: Workload, found: int | None) -> Need:
    servers = {"valkey": VALKEY_CORES, "postgres": workload.postgres_cores, "rabbitmq": workload.rabbitmq_cores}
    given = workload.processes.get(part)
    processes = 1 if part in servers else given or found or _processes(cost, traffic, workload)
    cores = cost.cores(traffic) + cost.idle_cores * processes
    most = servers.get(part, given)
    if processes > _MOST_PROCESSES:
        most = 0
    wait_s = _wait_s(part, cost, traffic, cores, math.floor(most) if part in servers and most else processes)
    return Need(part, cores, processes, most, wait_s)


def _wait_s(part: str, cost: Cost, traffic: Traffic, cores: float, servers: int) -> float:
    """The p99 of waiting for a turn, infinite where there is too little."""
    try:
        if part in ("edge", "router"):
            return _loop_wait_s(cost, traffic, cores, servers)
        rates = {"valkey": 2 * traffic.requests, "identity": traffic.lookups}
        rate = rates.get(part, traffic.messages)
        return mmc_wait_s(rate, cores / rate, servers) if rate else 0.0
    except ValueError:
        return math.inf


def _loop_wait_s(cost: Cost, traffic: Traffic, cores: float, processes: int) -> float:
    """Of requests and chunks before one of several event loops, which each have an even share of both; what batches and
    rest take is divided between them as their own work is."""
    works = ((traffic.requests, cost.request_us), (traffic.chunks, cost.chunk_us))
    stretch = cores / max(1e-12, sum(rate * work_us for rate, work_us in works))
    return mg1_wait_s([(rate / processes, work_us * stretch) for rate, work_us in works])


def _figures(workload: Workload, costs: Costs, traffic: Traffic, needs: Mapping[str, Need]) -> dict[str, float]:
    requests, edges, routers = workload.requests_per_s, needs["edge"].processes, needs["router"].processes
    in_flight = requests * workload.seconds_per_answer
    analytics, identity = needs["analytics"], needs["identity"]
    answer_bytes = (
        workload.chunks_per_s * costs.chunk_bytes + requests * (1 - workload.streamed_share) * costs.answer_bytes
    )
    budgeted = workload.organizations * workload.budgeted_share
    # A lease is there while its router has had a request within the last second.
    leases = budgeted * routers * (1 - math.exp(-requests / max(1, workload.organizations) / routers))
    day_bytes = requests * DAY_S * costs.event_bytes
    service_s = analytics.cores / traffic.messages
    return {
        "answers in flight": in_flight,
        "connections of clients, at least": in_flight,
        "connections to engines": in_flight,
        "relays (gRPC)": edges * routers,
        "connections to PostgreSQL, at most": POOL_CONNECTIONS * (routers + identity.processes + analytics.processes),
        "connections to Valkey": 2 * (routers + identity.processes + analytics.processes),
        "connections to RabbitMQ": routers + identity.processes + analytics.processes,
        "memory of edge and routers for streams, GB": in_flight * workload.streamed_share * costs.stream_bytes / 1e9,
        "relay batches/s": traffic.batches,
        "Valkey scripts/s": 2 * requests,
        "callers looked up in identity/s": traffic.lookups,
        "leases of budgets reported/s": leases,
        "usage messages/s": traffic.messages,
        "usage messages in the queue": traffic.messages * (service_s + min(analytics.wait_p99_s, 1e9)),
        "PostgreSQL event rows/s": requests,
        "PostgreSQL storage a day, GB": day_bytes / 1e9,
        "PostgreSQL storage kept, GB": day_bytes * workload.retention_days / 1e9,
        "network of clients, Gbit/s": 8e-9 * (answer_bytes + requests * workload.request_bytes),
        "network inside, Gbit/s": 16e-9 * (answer_bytes + requests * workload.request_bytes),
    }

"""The choice of a backend."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiaas.router.v1.backend_service_pb2 import ENGINE_KIND_VLLM
from aiaas.router.v1.routing_policy_service_pb2 import (
    ROUTING_STRATEGY_PREFIX_AFFINITY,
    ROUTING_STRATEGY_WEIGHTED,
)
from aiaas.type.v1.usage_event_pb2 import ENDPOINT_CHAT_COMPLETIONS, ENDPOINT_EMBEDDINGS
from mesh.errors import PlatformError, Reason
from router.backends import Backend, BackendState, Served, Snapshot
from router.models import Model
from router.recent import Recent
from router.routing import Routing, check_endpoint
from router.routing_policies import RoutingPolicy
from tests.doubles.clock import ManualClock

MODEL = Model("m", endpoints=(ENDPOINT_CHAT_COMPLETIONS,))


def served(name: str, *, weight: int = 100, in_flight: int = 0, healthy: bool = True, **values: object) -> Served:
    backend = Backend(name, "http://host", ENGINE_KIND_VLLM, weight=weight, **values)  # type: ignore[arg-type]
    state = BackendState(name)
    if healthy:
        state.succeeded()
    for _ in range(in_flight):
        state.start_request()
    return Served(backend, "up", state)


def choices(*candidates: Served, times: int = 1000, tried: tuple[str, ...] = ()) -> Counter[str]:
    snapshot = Snapshot({"m": MODEL}, {"m": MODEL}, {}, {"m": candidates})
    routing = Routing(Random(7), ManualClock())
    return Counter(routing.choose(snapshot, MODEL, tried).backend.backend_id for _ in range(times))


def test_equally_loaded_backends_share() -> None:
    counts = choices(served("a"), served("b"), served("c"))
    assert min(counts.values()) > 250


def test_idle_backends_share_by_weight_and_the_heaviest_does_not_take_all() -> None:
    counts = choices(served("heavy", weight=900), served("light", weight=100))
    assert 50 < counts["light"] < 160


def test_least_loaded_is_taken() -> None:
    assert choices(served("busy", in_flight=2), served("idle", in_flight=1)) == {"idle": 1000}


def test_load_is_in_relation_to_weight() -> None:
    assert choices(served("big", weight=300, in_flight=2), served("small", in_flight=1)) == {"big": 1000}


def test_steady_load_follows_the_weights() -> None:
    big, small = served("big", weight=300), served("small", weight=100)
    snapshot = Snapshot({"m": MODEL}, {"m": MODEL}, {}, {"m": (big, small)})
    routing = Routing(Random(7), ManualClock())
    for _ in range(400):
        routing.choose(snapshot, MODEL, ()).state.start_request()
    assert (big.state.in_flight, small.state.in_flight) == (300, 100)


def test_unfit_backends_are_left_out() -> None:
    counts = choices(
        served("ill", healthy=False),
        served("draining", draining=True),
        served("full", limit_concurrent_requests=1, in_flight=1),
        served("tried"),
        served("good", in_flight=50, limit_concurrent_requests=51),
        tried=("tried",),
    )
    assert counts == {"good": 1000}


def test_no_candidate_is_an_error_that_tells_when_to_come_back() -> None:
    with pytest.raises(PlatformError) as caught:
        choices(served("ill", healthy=False))
    assert (caught.value.reason, caught.value.retry_after_s) == (Reason.NO_BACKEND_AVAILABLE, 1.0)


def test_model_is_held_to_its_endpoints() -> None:
    check_endpoint(MODEL, ENDPOINT_CHAT_COMPLETIONS)
    with pytest.raises(PlatformError) as caught:
        check_endpoint(MODEL, ENDPOINT_EMBEDDINGS)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_ARGUMENT, "model")


def strategic(policy: RoutingPolicy, *candidates: Served) -> tuple[Routing, Snapshot]:
    snapshot = Snapshot({"m": MODEL}, {"m": MODEL}, {}, {"m": candidates}, policies={"m": policy})
    return Routing(Random(7), ManualClock()), snapshot


def test_weighted_draws_by_the_policys_weights_whatever_the_load() -> None:
    policy = RoutingPolicy(strategy=ROUTING_STRATEGY_WEIGHTED, weights={"light": 100, "none": 0})
    busy = served("heavy", weight=300, in_flight=50)
    routing, snapshot = strategic(policy, busy, served("light", weight=900), served("none"))
    counts = Counter(routing.choose(snapshot, MODEL, ()).backend.backend_id for _ in range(1000))
    assert 690 < counts["heavy"] < 810
    assert "none" not in counts


def test_same_prefix_leads_to_the_same_backend_and_others_spread() -> None:
    policy = RoutingPolicy(strategy=ROUTING_STRATEGY_PREFIX_AFFINITY)
    backends = [served(name) for name in "abcd"]
    routing, snapshot = strategic(policy, *backends)
    chosen = {n: routing.choose(snapshot, MODEL, (), b"%d" % n).backend.backend_id for n in range(400)}
    assert all(routing.choose(snapshot, MODEL, (), b"%d" % n).backend.backend_id == name for n, name in chosen.items())
    assert min(Counter(chosen.values()).values()) > 60
    # One that goes takes only its own along.
    routing, snapshot = strategic(policy, *backends[:-1])
    moved = [
        n for n, name in chosen.items() if routing.choose(snapshot, MODEL, (), b"%d" % n).backend.backend_id != name
    ]
    assert {chosen[n] for n in moved} == {"d"}


def test_prefix_that_everybody_has_does_not_overload_its_backend() -> None:
    policy = RoutingPolicy(strategy=ROUTING_STRATEGY_PREFIX_AFFINITY)
    backends = [served(name) for name in "abcd"]
    routing, snapshot = strategic(policy, *backends)
    for _ in range(400):
        routing.choose(snapshot, MODEL, (), b"You are a helpful assistant.").state.start_request()
    assert max(backend.state.in_flight for backend in backends) <= 126
    assert min(backend.state.in_flight for backend in backends) >= 20


def test_open_breaker_leaves_its_backend_out() -> None:
    broken, well = served("broken"), served("well")
    routing, snapshot = strategic(RoutingPolicy(least_attempts=1), broken, well)
    broken.breaker.start()
    broken.breaker.end(0.0, failed=True, is_trial=False, policy=RoutingPolicy(least_attempts=1))
    assert {routing.choose(snapshot, MODEL, ()).backend.backend_id for _ in range(20)} == {"well"}


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=200))
def test_recent_counts_are_those_of_the_last_ten_seconds(steps: list[tuple[float, bool]]) -> None:
    recent, now = Recent(), 100.0
    seen: list[tuple[int, bool]] = []
    for passed, marked in steps:
        now += passed
        recent.count(now)
        if marked:
            recent.mark(now)
        seen.append((int(now), marked))
        lately = [marked for second, marked in seen if second > int(now) - 10]
        assert (recent.all, recent.marked) == (len(lately), sum(lately))

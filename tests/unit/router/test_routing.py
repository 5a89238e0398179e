"""The choice of a backend."""

from collections import Counter
from random import Random

import pytest

from aiaas.router.v1.backend_service_pb2 import ENGINE_KIND_VLLM
from aiaas.type.v1.usage_event_pb2 import ENDPOINT_CHAT_COMPLETIONS, ENDPOINT_EMBEDDINGS
from mesh.errors import PlatformError, Reason
from router.backends import Backend, BackendState, Served, Snapshot
from router.models import Model
from router.routing import Routing, check_endpoint

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
    routing = Routing(Random(7))
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
    routing = Routing(Random(7))
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

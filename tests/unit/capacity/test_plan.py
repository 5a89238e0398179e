"""What a plan asks for, and which part it names first."""

import msgspec
import pytest

from deploy.capacity.__main__ import divided, report, scales
from deploy.capacity.costs import Cost, Costs, measured
from deploy.capacity.plan import Workload, capacity, plan

COSTS = Costs(
    measured="never",
    parts={
        "edge": Cost(idle_cores=0.01, request_us=100, chunk_us=10, batch_us=50),
        "router": Cost(idle_cores=0.02, request_us=150, chunk_us=10, batch_us=50),
        "valkey": Cost(request_us=60),
        "rabbitmq": Cost(message_us=1_000),
        "analytics": Cost(request_us=30),
        "postgres": Cost(request_us=30, lookup_us=300),
        "identity": Cost(lookup_us=600),
    },
    answer_bytes=500,
    chunk_bytes=250,
    stream_bytes=80_000,
    event_bytes=400,
)


def workload(**values: object) -> Workload:
    return msgspec.convert({"requests_per_s": 1_000, "keys": 1_000} | values, Workload)


def bottleneck(**values: object) -> str:
    return capacity(workload(**values), COSTS)[1]


def test_one_valkey_is_the_first_to_be_too_small_where_everything_else_grows() -> None:
    most, first = capacity(workload(streamed_share=0), COSTS)

    assert first == "valkey"
    assert most == pytest.approx(0.6 / 60e-6, rel=0.01)


def test_the_bottleneck_is_what_there_is_least_of() -> None:
    assert bottleneck(processes={"edge": 1}) == "edge"
    assert bottleneck(processes={"edge": 4, "router": 1}) == "router"
    assert bottleneck(postgres_cores=0.1) == "postgres"
    assert bottleneck(rabbitmq_cores=0.005) == "rabbitmq"
    assert bottleneck(processes={"analytics": 1}) == "valkey"
    assert bottleneck(keys=100_000_000, processes={"identity": 1}) == "identity"


def test_what_a_capacity_says_fits_and_a_hundredth_more_does_not() -> None:
    asked = workload(processes={"edge": 3, "router": 3})
    most, _ = capacity(asked, COSTS)

    assert plan(msgspec.structs.replace(asked, requests_per_s=most), COSTS).fits
    assert not plan(msgspec.structs.replace(asked, requests_per_s=most * 1.01), COSTS).fits


def test_processes_are_as_busy_as_was_wanted_and_no_more() -> None:
    for need in plan(workload(streamed_share=1), COSTS).needs:
        if need.most_cores is None:
            assert need.cores / need.processes <= 0.6 + 1e-9


def test_more_routers_share_batches_less_so_a_pair_costs_more_than_half_of_four() -> None:
    few, many = (plan(workload(processes={"edge": number, "router": number}), COSTS) for number in (1, 4))

    assert many.traffic.batches > few.traffic.batches
    assert many.traffic.lookups > few.traffic.lookups


def test_relays_that_cost_more_than_they_carry_fit_nowhere() -> None:
    grown = plan(workload(requests_per_s=100_000_000), COSTS)

    assert not grown.fits
    assert grown.tightest.part in ("edge", "router")


def test_installations_divide_what_one_cannot_carry() -> None:
    number, one = divided(workload(requests_per_s=100_000), COSTS)

    assert number > 1
    assert one.fits
    assert number * one.workload.requests_per_s == pytest.approx(100_000)


def test_storage_grows_with_what_is_kept() -> None:
    figures = plan(workload(retention_days=10), COSTS).figures

    assert figures["PostgreSQL storage a day, GB"] == pytest.approx(1_000 * 86_400 * 400 / 1e9)
    assert figures["PostgreSQL storage kept, GB"] == pytest.approx(10 * figures["PostgreSQL storage a day, GB"])


@pytest.mark.parametrize(
    "wrong",
    [{"requests_per_s": 0}, {"streamed_share": 2}, {"utilisation": 1}, {"processes": {"valkey": 2}}, {"request": 1}],
)
def test_a_workload_that_cannot_be_is_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError, match=next(iter(wrong))):
        workload(**wrong)


def test_the_committed_costs_tell_every_scale() -> None:
    text = report(workload(), measured())

    assert "first bottleneck is **" in text
    assert all(f"| {part} |" in text for part in measured().parts)
    assert scales(workload(), measured()).count("\n") == 6

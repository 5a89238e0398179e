"""The closed formulas against textbooks' figures and against queues that are simulated."""

from random import Random

import pytest

from deploy.capacity.queueing import erlang_c, gathered, mg1_wait_s, mmc_wait_s
from tests.unit.capacity.simulation import sends_per_s, waits_s

ARRIVALS = 400_000


def test_erlang_c_gives_the_textbooks_figures() -> None:
    assert erlang_c(1, 0.7) == pytest.approx(0.7)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(10, 8.0) == pytest.approx(0.4092, abs=1e-4)


def test_a_queue_that_grows_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="more work"):
        mmc_wait_s(10, 1, 10)
    with pytest.raises(ValueError, match="more work"):
        mg1_wait_s([(1, 1)])


def test_who_hardly_ever_waits_has_no_p99() -> None:
    assert mmc_wait_s(0.005, 1, 1) == 0
    assert mg1_wait_s([(0.005, 1)]) == 0


@pytest.mark.parametrize(("servers", "utilisation"), [(1, 0.6), (4, 0.8), (16, 0.85)])
def test_simulated_waits_agree_with_m_m_c(servers: int, utilisation: float) -> None:
    waits = waits_s(servers * utilisation, lambda random: random.expovariate(1), servers, ARRIVALS)

    assert waits[len(waits) * 99 // 100] == pytest.approx(mmc_wait_s(servers * utilisation, 1, servers), rel=0.1)


def test_m_g_1_is_m_m_1_for_exponential_work() -> None:
    assert mg1_wait_s([(0.7, 1)]) == pytest.approx(mmc_wait_s(0.7, 1, 1))


def test_simulated_waits_agree_with_m_g_1_for_few_requests_among_many_chunks() -> None:
    def work(random: Random) -> float:
        return random.expovariate(1 / 9) if random.random() < 0.02 else random.expovariate(1)

    waits = waits_s(0.6, work, 1, ARRIVALS)

    expected = mg1_wait_s([(0.02 * 0.6, 9), (0.98 * 0.6, 1)])
    assert waits[len(waits) * 99 // 100] == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("rate", [10, 1_000, 20_000])
def test_simulated_batches_agree_with_the_formula(rate: float) -> None:
    assert sends_per_s(rate, 0.001, 100_000) == pytest.approx(gathered(rate, 0.001), rel=0.02)

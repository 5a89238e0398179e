"""Two services work out a cost, and share no code: both are held to one table."""

import pytest

from analytics.charges import cost_micros as explained
from router.prices import cost_micros as billed
from tests.doubles.costs import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_billed_and_what_is_explained_is_the_same(case: Case) -> None:
    assert billed(case.price, case.usage) == case.cost_micros
    assert explained(case.price, case.usage) == case.cost_micros

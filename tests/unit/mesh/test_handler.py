"""Which RPCs are connections between processes, and so have no deadline of ours."""

import pytest

from aiaas.identity.v1 import budget_service_pb2
from aiaas.router.v1 import inference_service_pb2
from mesh.interceptors.handler import is_connection

# Only a contract that was imported can be asked for.
BUDGETS = budget_service_pb2.DESCRIPTOR.services_by_name["BudgetService"].full_name
INFERENCE = inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (f"/{INFERENCE}/Relay", True),
        (f"/{BUDGETS}/WatchBudgets", True),
        (f"/{BUDGETS}/Lease", False),
        (f"/{INFERENCE}/Infer", False),
    ],
)
def test_two_way_streams_and_watches_between_services_are_connections(method: str, expected: bool) -> None:
    assert is_connection(method) is expected

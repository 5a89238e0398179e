"""The edge's configuration: complete by three targets, wrong in words."""

import pytest

from edge.config import EdgeConfig
from mesh.config import ConfigError, load

TARGETS = {
    "AIAAS_EDGE_IDENTITY_TARGET": "unix:/i",
    "AIAAS_EDGE_ROUTER_TARGET": "unix:/r",
    "AIAAS_EDGE_ANALYTICS_TARGET": "unix:/a",
}


def test_targets_are_all_that_must_be_set() -> None:
    config = load(EdgeConfig, TARGETS)
    assert config.host_and_port == ("127.0.0.1", 8080)
    assert config.max_body_bytes == 4 * 1024 * 1024
    with pytest.raises(ConfigError) as error:
        load(EdgeConfig, {})
    assert all(variable in str(error.value) for variable in TARGETS)


@pytest.mark.parametrize(
    ("address", "expected"), [("0.0.0.0:80", ("0.0.0.0", 80)), ("[::1]:0", ("::1", 0)), ("edge:1", ("edge", 1))]
)
def test_address_is_host_and_port(address: str, expected: tuple[str, int]) -> None:
    assert load(EdgeConfig, {**TARGETS, "AIAAS_EDGE_ADDRESS": address}).host_and_port == expected


@pytest.mark.parametrize("address", ["8080", ":8080", "host:", "host:http", "host:70000", "host:-1"])
def test_address_that_is_none_is_named(address: str) -> None:
    with pytest.raises(ConfigError, match="AIAAS_EDGE_ADDRESS"):
        load(EdgeConfig, {**TARGETS, "AIAAS_EDGE_ADDRESS": address})


@pytest.mark.parametrize("size", ["0", "-1", "8388608", "many"])
def test_body_size_that_the_mesh_could_not_carry_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match="AIAAS_EDGE_MAX_BODY_BYTES"):
        load(EdgeConfig, {**TARGETS, "AIAAS_EDGE_MAX_BODY_BYTES": size})


@pytest.mark.parametrize("workers", ["0", "-1", "257", "all"])
def test_number_of_workers_that_makes_no_sense_is_refused(workers: str) -> None:
    with pytest.raises(ConfigError, match="AIAAS_EDGE_WORKERS"):
        load(EdgeConfig, {**TARGETS, "AIAAS_EDGE_WORKERS": workers})

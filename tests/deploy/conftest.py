"""What tests of deployments may need of this machine."""

import os
import shutil

import pytest


@pytest.fixture(scope="session")
def root() -> None:
    """Network namespaces may be made. Only root may: whoever is not sees the tests skipped, except in CI, where they
    fail."""
    if os.geteuid() != 0:
        sentence = "only root may make network namespaces: run it as root to have the network policies proven"
        if os.environ.get("CI"):
            pytest.fail(sentence)
        pytest.skip(sentence)
    missing = [command for command in ("ip", "nft", "nsenter") if shutil.which(command) is None]
    assert not missing, f"{missing} are missing: deploy/local/bootstrap.sh test installs them"

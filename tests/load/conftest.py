"""A fake engine for the tests of the programs themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.load.native import FakeEngine, fake_engine


@pytest.fixture(scope="session")
def engine() -> Iterator[FakeEngine]:
    """A fake engine that all tests of a worker share."""
    with fake_engine() as engine:
        yield engine

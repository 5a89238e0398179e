"""A few revocation trials at two routers as processes; `make bench-revocations` makes hundreds."""

from __future__ import annotations

import pytest

from tests.load.revocations import measure
from tests.load.verdict import Verdict


async def test_revoked_keys_are_refused_within_a_second_and_their_streams_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    verdict = Verdict()
    await measure(trials=5, stream_trials=1, untold_trials=0, verdict=verdict)
    table = capsys.readouterr().out
    assert table.count("| met |") == 4, table
    assert verdict.met

"""No secret and nobody's words are where they do not belong: not in logs, spans, metrics, errors, events, audit log
and decisions, nor as they are in databases, Valkey and journals; and without what prevents it, they are found in each.
"""

import asyncio
from dataclasses import dataclass

import pytest

from tests.security.canaries import Canaries, unpacked
from tests.security.canaries_stack import running_platform
from tests.security.canaries_traffic import KINDS, Traffic

pytestmark = pytest.mark.xdist_group("canaries")

PLACES = (
    "audit",
    "databases",
    "decisions",
    "errors",
    "events",
    "journal",
    "logs",
    "metrics",
    "spans",
    "valkey",
)
# An answer that a key asks to be kept lies in Valkey for a day, compressed (router/idempotency.py).
ALLOWED = {"valkey": {"completion: kept for a repetition"}}


@dataclass
class Left:
    """What a platform left behind."""

    canaries: Canaries
    places: dict[str, list[bytes]]

    def found_in(self, place: str) -> set[str]:
        return self.canaries.found_in(unpacked(self.places[place]))


async def _left_by(without_redaction: bool) -> Left:
    places: dict[str, list[bytes]] = {}
    async with running_platform(places, without_redaction=without_redaction) as platform:
        traffic = Traffic(platform)
        await traffic.run()
        places |= await traffic.records() | await platform.evidence()
    return Left(traffic.canaries, places)


async def _both() -> dict[bool, Left]:
    kept, bare = await asyncio.gather(_left_by(False), _left_by(True))
    return {False: kept, True: bare}


@pytest.fixture(scope="module")
def left() -> dict[bool, Left]:
    """What two platforms left behind, by whether they were without redaction."""
    return asyncio.run(_both())


def test_every_kind_of_secret_flew_and_every_place_was_looked_at(left: dict[bool, Left]) -> None:
    kept = left[False]
    assert kept.canaries.kinds() >= KINDS
    assert kept.places.keys() == set(PLACES)
    assert all(any(kept.places[place]) for place in PLACES)


@pytest.mark.parametrize("place", PLACES)
def test_no_canary_is_found(left: dict[bool, Left], place: str) -> None:
    assert left[False].found_in(place) == ALLOWED.get(place, set())


@pytest.mark.parametrize("place", PLACES)
def test_without_redaction_canaries_are_found(left: dict[bool, Left], place: str) -> None:
    assert left[True].found_in(place) - ALLOWED.get(place, set())

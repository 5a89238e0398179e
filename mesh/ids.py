"""Makes the ids of everything that has one; it never gives them a meaning beyond their prefix and their age."""

import secrets
import time
from datetime import UTC, datetime
from random import Random, getrandbits

from mesh.clock import Clock, SystemClock

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""Base62, in the order of ASCII, so that equally long texts sort as their numbers do (in SQL: COLLATE "C")."""

ID_LENGTH = 22
"""Characters of an id after its prefix: 128 bits in base62."""

_RANDOM_BITS = 80
_PAIRS = [first + second for first in ALPHABET for second in ALPHABET]
_SYSTEM_CLOCK = SystemClock()
_SYSTEM_RANDOM = secrets.SystemRandom()


def new_id(prefix: str, *, clock: Clock = _SYSTEM_CLOCK, random: Random = _SYSTEM_RANDOM) -> str:
    """A new id: `prefix`, "_", then 22 base62 characters of 48 bits of milliseconds and 80 random bits.

    Later ids sort after earlier ones, which keeps the indexes of a database dense; within one millisecond the order is
    random.
    """
    milliseconds = int(clock.now().timestamp() * 1000)
    return f"{prefix}_{base62(milliseconds << _RANDOM_BITS | random.getrandbits(_RANDOM_BITS), ID_LENGTH)}"


def new_request_id() -> str:
    """A new id for a request: "req_" and 22 base62 characters, as `new_id` makes them.

    It only has to be unique, so its random bits are not the system's: asking for those takes longer than all the rest.
    """
    milliseconds = time.time_ns() // 1_000_000
    return "req_" + base62(milliseconds << _RANDOM_BITS | getrandbits(_RANDOM_BITS), ID_LENGTH)


def base62(number: int, length: int) -> str:
    """`number`, not negative and below 62 ** `length`, in exactly `length` base62 characters."""
    # Two characters at a time: dividing a number of 128 bits is what costs.
    pairs = []
    for _ in range((length + 1) // 2):
        number, pair = divmod(number, 3844)
        pairs.append(_PAIRS[pair])
    pairs.reverse()
    return "".join(pairs)[-length:]


def made_at(made_id: str) -> datetime:
    """When an id of `new_id` was made, to the millisecond, in UTC. Raises ValueError for any other text."""
    number = 0
    for character in made_id.rpartition("_")[2]:
        number = number * len(ALPHABET) + ALPHABET.index(character)
    return datetime.fromtimestamp((number >> _RANDOM_BITS) / 1000, UTC)

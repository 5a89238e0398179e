"""How often somebody may try what guessing could succeed at: by account and by network address; it never judges an
attempt, and counts a known and an unknown account alike.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from identity import attempts
from mesh import context
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason

if TYPE_CHECKING:
    from identity.stores import Store

logger = logging.getLogger(__name__)

FORGOTTEN_AFTER = timedelta(hours=1)
_FIRST_WAIT = timedelta(seconds=10)
_LONGEST_WAIT = timedelta(minutes=15)
# A provider gives one customer a /64 at least.
_IPV6_PREFIX = 64


@dataclass(frozen=True, slots=True)
class Way:
    """Something that is attempted, and how often without a wait: for one account, and from one address, behind which
    may be a whole office."""

    name: str
    free_of_account: int
    free_of_address: int


PASSWORD = Way("password", 5, 50)
RECOVERY = Way("recovery", 3, 20)
TOKEN = Way("token", 10, 50)
# Nothing is guessed there, but each one is a row, and work for an issuer.
ISSUER = Way("issuer", 10, 200)


class Throttles:
    """Attempts, counted before they are made, so that any number of them at once cannot pass."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def count(self, way: Way, account: str) -> None:
        """Count an attempt for an account (an address, an id, or nothing) and for the caller's network address.

        Raises PlatformError(RATE_LIMIT_EXCEEDED) with the time to wait.
        """
        now = self._clock.now()
        counted = [(_subject(way, "account", account), way.free_of_account)] if account else []
        if address := _network(context.client_address.get()):
            counted.append((_subject(way, "address", address), way.free_of_address))
        # An attempt that fails is counted all the same, and counting is nothing that the audit log is for.
        with attempts.apart():
            for subject, free in counted:
                async with self._store.transaction(across=True) as stored:
                    free_time = await stored.throttles.count(
                        subject,
                        now,
                        free=free,
                        first_wait=_FIRST_WAIT,
                        longest_wait=_LONGEST_WAIT,
                        forgotten_after=FORGOTTEN_AFTER,
                    )
                if free_time is not None:
                    logger.warning("too many attempts", extra={"way": way.name, "by_address": subject != counted[0][0]})
                    raise PlatformError(
                        Reason.RATE_LIMIT_EXCEEDED,
                        description="Too many attempts. Please try again later.",
                        retry_after_s=max(1.0, (free_time - now).total_seconds()),
                    )

    async def succeeded(self, way: Way, account: str) -> None:
        """Begin to count anew for an account. Its address keeps its count: one right guess excuses no wrong ones."""
        with attempts.apart():
            async with self._store.transaction(across=True) as stored:
                await stored.throttles.forget(_subject(way, "account", account))


def _subject(way: Way, kind: str, whom: str) -> bytes:
    return hashlib.sha256(f"{way.name}\n{kind}\n{whom.lower()}".encode(errors="replace")).digest()


def _network(address: str) -> str:
    """An address, or the network that one customer has of IPv6; empty for what is none."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return ""
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, _IPV6_PREFIX), strict=False))
    return str(parsed)

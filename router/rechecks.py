"""Ends what runs for somebody who may not have it any more: a revoked key, a suspended user, a deleted organization; it
never hears of a revocation itself, and costs a request nothing.

Once a second it looks whether any standing came into doubt, and if so asks again for those who have something running.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable

from mesh.auth import CachedAuthenticator, Principal, find_method, policy_of
from mesh.errors import PlatformError, Reason
from router.inference import Inference

logger = logging.getLogger(__name__)

Running = Callable[[], Iterable[tuple[str, Inference]]]
"""What runs now, each with the credential that it was asked for with."""

_PERMISSION = policy_of(find_method("/aiaas.router.v1.InferenceService/Infer")).permission
_INTERVAL_S = 1.0
# A look-up may have been on its way when the doubt came; what began with its answer is looked at as well.
_LINGER_S = 6.0
# Where no revocation arrives at all, what the cache has forgotten by its age is asked for again.
_AGE_S = 60.0
_AT_ONCE = 16


class Rechecks:
    """The checks of what runs."""

    def __init__(self, authenticator: CachedAuthenticator, *running: Running) -> None:
        self._authenticator = authenticator
        self._running = running

    async def run(self) -> None:
        """Look once a second, until cancelled."""
        loop = asyncio.get_running_loop()
        seen = self._authenticator.invalidations
        linger_until = loop.time()
        aged_at = loop.time() + _AGE_S
        while True:
            await asyncio.sleep(_INTERVAL_S)
            now = loop.time()
            if self._authenticator.invalidations != seen:
                seen = self._authenticator.invalidations
                linger_until = now + _LINGER_S
            if now < linger_until or now >= aged_at:
                aged_at = now + _AGE_S
                if not await self.check():
                    linger_until = max(linger_until, loop.time() + _LINGER_S)

    async def check(self) -> bool:
        """End what may not run any more; False if somebody could not be judged."""
        doubted: dict[str, list[Inference]] = {}
        for credential, inference in itertools.chain.from_iterable(running() for running in self._running):
            if self._authenticator.cached(credential) is not inference.principal:
                doubted.setdefault(credential, []).append(inference)
        judged = True
        credentials = list(doubted)
        for start in range(0, len(credentials), _AT_ONCE):
            batch = credentials[start : start + _AT_ONCE]
            for credential, verdict in zip(batch, await asyncio.gather(*map(self._judge, batch)), strict=True):
                if verdict is None:
                    continue
                if verdict.reason is Reason.AUTH_UNAVAILABLE:
                    judged = False
                    continue
                for inference in doubted[credential]:
                    inference.revoke(verdict)
        return judged

    async def _judge(self, credential: str) -> PlatformError | None:
        """Why whoever has the credential may not infer; None if they may."""
        try:
            principal: Principal = await self._authenticator.authenticate(credential)
        except PlatformError as error:
            return error
        return None if _PERMISSION in principal.permissions else PlatformError(Reason.PERMISSION_DENIED)

"""Sends deliveries to webhooks, signed, until they are accepted or their time is over; it never reads an answer's body.

A delivery is taken in hand for 30 s and only then sent, so a process that dies in between leaves it to another, which
sends the same event again: at least once, and `webhook-id` tells the receiver. Each webhook has one delivery under way
in a process, so that one that is slow holds up nobody but itself.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from random import Random
from types import TracebackType
from typing import NamedTuple

import aiohttp
from cryptography.exceptions import InvalidTag

from aiaas.type.v1.platform_event_pb2 import PlatformEvent
from analytics import metrics, webhook_secrets
from analytics.platform_events import as_json
from analytics.webhook_store import WebhookStore
from analytics.webhooks import LEASE, TRIED, Delivery, DeliveryState, Outgoing
from mesh.addresses import PrivateAddressError, public_socket, wrong_with
from mesh.clock import Clock
from mesh.errors import PlatformError
from mesh.sealing import Seal

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
"""How long a receiver has to answer."""

IN_FLIGHT = 32
"""Most deliveries that one process has under way."""

_POLL_S = 1.0
_COUNT_S = 10.0
_PAUSE_LEAST = timedelta(seconds=5)
_PAUSE_MOST = timedelta(hours=1)


class Answer(NamedTuple):
    """What came back: the status, 0 if there was none, and why that is a failure, empty if it is not."""

    http_status: int
    failure_reason: str


class Poster:
    """Posts to receivers, for the length of its block. No redirect is followed, no proxy used, no cookie kept.

    Unless `allow_private`, it connects to public addresses alone. Each is judged as it is about to be connected to, so
    that it does not matter what a name meant before.
    """

    def __init__(self, *, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Poster:
        connector = aiohttp.TCPConnector(
            limit=0,
            force_close=True,
            use_dns_cache=False,
            socket_factory=None if self._allow_private else public_socket,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "aiaas-webhooks"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Post once. Never raises for what a receiver or the way to it does."""
        if self._session is None:
            raise RuntimeError("it is used outside of its block")
        # What was allowed when it was stored may not be now.
        if wrong := wrong_with(url, allow_private=self._allow_private):
            return Answer(0, f"The address {wrong}.")
        try:
            async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as response:
                status = response.status
        except TimeoutError:
            return Answer(0, f"No answer came within {TIMEOUT_S:.0f} seconds.")
        except Exception as error:
            # Whatever a receiver does to the client is a failed attempt: without an end it would be made for ever.
            return Answer(0, _sentence(error))
        return Answer(status, "" if 200 <= status < 300 else f"The answer was {status}.")


class Sender:
    """Sends what is due. Any number of processes may do so on one database."""

    def __init__(self, store: WebhookStore, poster: Poster, seal: Seal, clock: Clock, random: Random) -> None:
        self._store = store
        self._poster = poster
        self._seal = seal
        self._clock = clock
        self._random = random
        self._wake = asyncio.Event()
        # Webhooks that have a delivery under way.
        self._busy: set[str] = set()
        self._counted_at = float("-inf")

    def wake(self) -> None:
        """There may be something to send before the next look."""
        self._wake.set()

    async def run(self) -> None:
        """Send what is due until cancelled; what is under way then is sent again by another."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._wake.clear()
                try:
                    for outgoing in await self._claim():
                        tasks.create_task(self._deliver(outgoing))
                    await self._count()
                except PlatformError as error:
                    logger.warning("deliveries cannot be read: %s", error.reason.value)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S):
                        await self._wake.wait()

    async def send(self, outgoing: Outgoing) -> Delivery | None:
        """Send a delivery that is in hand, once, and note what came of it; returns it as noted, None if it is gone.

        Raises PlatformError(UNAVAILABLE) when it is sent and PostgreSQL is away; it is sent again then.
        """
        answer = await self._post(outgoing)
        delivery = self._after(outgoing.delivery, answer, self._clock.now())
        metrics.WEBHOOK_DELIVERIES.labels(_OUTCOMES[delivery.state]).inc()
        return await self._store.finish(delivery)

    async def _claim(self) -> list[Outgoing]:
        room = IN_FLIGHT - len(self._busy)
        if room <= 0:
            return []
        now = self._clock.now()
        claimed = await self._store.claim_due(now, now + LEASE, self._busy, room)
        self._busy.update(outgoing.delivery.webhook_id for outgoing in claimed)
        return claimed

    async def _deliver(self, outgoing: Outgoing) -> None:
        try:
            await self.send(outgoing)
        except PlatformError as error:
            logger.warning("a delivery was sent and cannot be noted: %s", error.reason.value)
        except Exception:
            logger.exception("a delivery could not be sent")
        finally:
            self._busy.discard(outgoing.delivery.webhook_id)
            self._wake.set()

    async def _post(self, outgoing: Outgoing) -> Answer:
        now = self._clock.now()
        delivery = outgoing.delivery
        try:
            secrets = [self._seal.open(sealed, delivery.webhook_id) for sealed in outgoing.secrets.at(now)]
        except InvalidTag:
            logger.error("the secret of webhook %s is sealed with another key", delivery.webhook_id)
            return Answer(0, "The secret cannot be read. Rotate it.")
        body = as_json(PlatformEvent.FromString(outgoing.event))
        timestamp = int(now.timestamp())
        headers = {
            "content-type": "application/json",
            "webhook-id": delivery.event_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": webhook_secrets.sign(secrets, delivery.event_id, timestamp, body),
        }
        return await self._poster.post(outgoing.url, headers, body)

    def _after(self, delivery: Delivery, answer: Answer, now: datetime) -> Delivery:
        """The delivery after an attempt with this answer, ended at `now`."""
        told = replace(delivery, http_status=answer.http_status, failure_reason=answer.failure_reason)
        if not answer.failure_reason:
            return replace(told, state=DeliveryState.SUCCEEDED)
        # As long again as it has been tried, so the pauses double; jitter keeps those that failed together apart.
        pause = min(max(now - delivery.start_time, _PAUSE_LEAST), _PAUSE_MOST)
        due_time = now + pause * self._random.uniform(0.8, 1.2)
        if due_time >= delivery.start_time + TRIED:
            return replace(told, state=DeliveryState.FAILED)
        return replace(told, due_time=due_time)

    async def _count(self) -> None:
        now_s = self._clock.monotonic()
        if now_s >= self._counted_at + _COUNT_S:
            self._counted_at = now_s
            metrics.WEBHOOK_PENDING.set(await self._store.pending())


_OUTCOMES = {
    DeliveryState.PENDING: "retried",
    DeliveryState.SUCCEEDED: "succeeded",
    DeliveryState.FAILED: "failed",
}


def _sentence(error: Exception) -> str:
    """Why there was no answer, without what a receiver or the error says: it may be anything."""
    cause = getattr(error, "os_error", None)
    if isinstance(cause, PrivateAddressError):
        return "The address leads into a private network."
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "The name of the address leads nowhere."
    if isinstance(error, aiohttp.ClientSSLError) or isinstance(cause, ssl.SSLError):
        return "No secure connection could be made."
    if isinstance(error, aiohttp.ClientConnectorError):
        return "No connection could be made."
    return "The answer was not HTTP."

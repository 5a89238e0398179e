"""Switches protections off, in services that the kill matrix starts and nowhere else: what is promised must then break.

A service of `tests.money.platform` imports this before anything of its own. WITHOUT names the protection that it goes
without; DEATHS a file with the number of times that analytics shall still die between its commit and its
acknowledgement, which no signal from outside would hit.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_MARK_BYTES = 100

# Each switch imports what it changes when it is thrown: other services know nothing of it.


def _journal() -> None:
    """A request is written down when it ends, and not before its first byte."""
    from router.journal import Journal

    put = Journal._put
    Journal._put = lambda self, change: put(self, change) if change.ended else None  # type: ignore[method-assign]


def _checkpoint() -> None:
    """What a stream has produced is written down at its end, and not each second."""
    from router.journal import Entry

    Entry.checkpoint = _nothing  # type: ignore[method-assign]


def _durability() -> None:
    """Answers leave whether or not their requests can be written down."""
    from router.journal import Journal

    Journal.secure = _nothing  # type: ignore[method-assign]
    Journal._failed = lambda self, already, error: False  # type: ignore[method-assign]


def _recovery() -> None:
    """Leases of a router's former run are left alone."""
    from router.budgets import Budgets

    Budgets.settle_former = _nothing_yet  # type: ignore[method-assign]


def _slots() -> None:
    """Slots in Redis are taken for good, and not for a quarter of a minute."""
    from router import rate_limits

    rate_limits._LEASE_S = 86_400.0


def _confirm() -> None:
    """A message is taken as published when it is sent, and not when the broker has it."""
    from aio_pika.connection import Connection

    channel = Connection.channel

    def unconfirmed(self: Any, **_: Any) -> Any:
        return channel(self, publisher_confirms=False, on_return_raises=False)

    Connection.channel = unconfirmed  # type: ignore[assignment,method-assign]


def _mandatory() -> None:
    """A message that no queue takes is not returned."""
    from aio_pika.exchange import Exchange

    publish = Exchange.publish

    async def optional(self: Any, *arguments: Any, **named: Any) -> Any:
        return await publish(self, *arguments, **(named | {"mandatory": False}))

    Exchange.publish = optional  # type: ignore[method-assign]


def _retention() -> None:
    """What is published is forgotten."""
    from datetime import timedelta

    from router import journal

    journal.RETENTION = timedelta(0)
    journal._RETENTION_S = 1.0


def _fallback() -> None:
    """Nobody judges limits while Redis is away."""
    from mesh.errors import PlatformError, Reason
    from router import rate_limits

    def refuse(plan: object, cost: int, now_us: float, routers: int) -> list[int]:
        raise PlatformError(Reason.UNAVAILABLE)

    rate_limits._judge = refuse


def _patience() -> None:
    """Redis may take as long as it likes."""
    from mesh.scripts import Scripts

    assert Scripts.__init__.__kwdefaults__ is not None
    Scripts.__init__.__kwdefaults__["timeout_s"] = 60.0


def _rejoin() -> None:
    """Redis is not told again of what runs."""
    from router.rate_limits import RateLimiter

    RateLimiter._renew = _nothing_yet  # type: ignore[method-assign]


def _lease() -> None:
    """Requests run on no lease of a budget."""
    from router.budgets import Budgets

    Budgets.reserve = _nothing_yet  # type: ignore[method-assign]


def _fence() -> None:
    """What runs goes on when its lease ends, and more is admitted on it."""
    from router.leases import Lease

    Lease.is_ending = lambda self, now: False  # type: ignore[method-assign]
    Lease.admits = lambda self, now: not (self.closing or self.expired)  # type: ignore[method-assign]


def _expiry() -> None:
    """The ledger takes leases back of which it has not heard in time."""
    from identity.budget_leases import BudgetLeases

    list_of_router = BudgetLeases.list_of_router

    async def forgetful(self: BudgetLeases, *arguments: Any) -> Any:
        async with self._store.transaction() as stored:
            await stored.budget_leases._connection.execute(_FREE)
        return await list_of_router(self, *arguments)

    BudgetLeases.list_of_router = forgetful  # type: ignore[assignment,method-assign]


_FREE = """
    WITH freed AS (
        UPDATE budget_leases SET state = 'settled'
        WHERE state <> 'settled' AND expire_time <= clock_timestamp()
        RETURNING budget_id, period_start, amount - spent AS amount
    )
    UPDATE budget_periods p SET leased = p.leased - f.amount
    FROM (SELECT budget_id, period_start, sum(amount) AS amount FROM freed GROUP BY 1, 2) f
    WHERE (p.budget_id, p.period_start) = (f.budget_id, f.period_start)
"""


def _dedup() -> None:
    """An event that comes again is summed again."""
    from analytics import store

    store._INSERT_EVENTS = _replaced(
        store._INSERT_EVENTS,
        "ON CONFLICT DO NOTHING",
        "ON CONFLICT (request_id, admit_time) DO UPDATE SET event = excluded.event",
    )


def _ack() -> None:
    """Messages are acknowledged before what they hold is committed."""
    from mesh.broker import _Consumer

    deal = _Consumer._deal

    class Acknowledged:
        def __init__(self, body: bytes) -> None:
            self.body = body

        async def ack(self, **_: Any) -> None:
            """It was."""

        reject = ack

    async def hurried(self: Any, batch: Sequence[Any]) -> None:
        await batch[-1].ack(multiple=True)
        _die_if_it_is_time([message.body for message in batch])
        await deal(self, [Acknowledged(message.body) for message in batch])  # type: ignore[misc]

    _Consumer._deal = hurried  # type: ignore[method-assign]


def _cancel() -> None:
    """A router goes on with what nobody reads any more."""
    from router.relay import _Relayed

    _Relayed.abandon = _nothing  # type: ignore[method-assign]


def _hangup() -> None:
    """An edge does not tell the router that a client has gone."""
    from edge.relay import Link

    Link.cancel = _nothing  # type: ignore[method-assign]


def _stall() -> None:
    """An answer may go unread for ever."""
    # Two timers read it, the edge's own and the kernel's.
    os.environ["AIAAS_EDGE_IDLE_TIMEOUT_S"] = "86400"


def _snapshot() -> None:
    """A router begins with nothing."""
    from router.snapshot import RouterSnapshot

    RouterSnapshot.restore = lambda self: self._authenticator.restore({}, 0)  # type: ignore[method-assign]


def _stale() -> None:
    """A principal is let in for a minute after it was confirmed, and no longer."""
    from mesh.auth import CachedAuthenticator

    restore = CachedAuthenticator.restore

    def confirmed(self: CachedAuthenticator, *arguments: Any) -> None:
        self._stale_s = 0.0
        restore(self, *arguments)

    CachedAuthenticator.restore = confirmed  # type: ignore[assignment,method-assign]


def _forgetting() -> None:
    """What is forgotten stays on disk."""
    from router.snapshot import RouterSnapshot

    write = RouterSnapshot._write

    def keep(self: RouterSnapshot, changes: Any, *arguments: Any) -> None:
        write(self, {digest: known for digest, known in changes.items() if known is not None}, *arguments)

    RouterSnapshot._write = keep  # type: ignore[assignment,method-assign]


def _verdict() -> None:
    """Who cannot be judged is refused as if he had been."""
    from mesh.auth import CachedAuthenticator
    from mesh.errors import PlatformError, Reason

    CachedAuthenticator._unavailable = lambda self, error: PlatformError(  # type: ignore[method-assign]
        Reason.API_KEY_INVALID
    )


class Switch(NamedTuple):
    """The service that goes without a protection, how it is taken away, and the line of the matrix that misses it."""

    service: str
    throw: Callable[[], None]
    line: str


SWITCHES = {
    "journal": Switch("router", _journal, "router"),
    "checkpoint": Switch("router", _checkpoint, "router"),
    "durability": Switch("router", _durability, "disk"),
    "recovery": Switch("router", _recovery, "router"),
    "slots": Switch("router", _slots, "router"),
    "confirm": Switch("router", _confirm, "rabbitmq"),
    "mandatory": Switch("router", _mandatory, "rabbitmq"),
    "retention": Switch("router", _retention, "rabbitmq"),
    "fallback": Switch("router", _fallback, "redis"),
    "patience": Switch("router", _patience, "redis"),
    "rejoin": Switch("router", _rejoin, "redis"),
    "lease": Switch("router", _lease, "redis"),
    "fence": Switch("router", _fence, "postgres"),
    "expiry": Switch("identity", _expiry, "router"),
    "dedup": Switch("analytics", _dedup, "analytics"),
    "ack": Switch("analytics", _ack, "analytics"),
    "cancel": Switch("router", _cancel, "edge"),
    "hangup": Switch("edge", _hangup, "clients"),
    "stall": Switch("edge", _stall, "clients"),
    "snapshot": Switch("router", _snapshot, "identity"),
    "stale": Switch("router", _stale, "identity"),
    "forgetting": Switch("router", _forgetting, "identity"),
    "verdict": Switch("router", _verdict, "routes"),
}
"""The protections that one can go without."""


def _die_after_commits() -> None:
    """As often as the file says, end between commit and acknowledgement, as kill -9 would."""
    from analytics.consumer import Consumer

    take = Consumer.take

    async def fatal(self: Consumer, bodies: Sequence[bytes]) -> set[int]:
        refused = await take(self, bodies)
        _die_if_it_is_time(bodies)
        return refused

    Consumer.take = fatal  # type: ignore[method-assign]


def _die_if_it_is_time(bodies: Sequence[bytes]) -> None:
    # Marks come all the time, and without them nothing is lost.
    if max(map(len, bodies)) < _MARK_BYTES or not _deaths().exists():
        return
    left = int(_deaths().read_text() or 0)
    if left > 0:
        _deaths().write_text(str(left - 1))
        os.kill(os.getpid(), signal.SIGKILL)


def _deaths() -> Path:
    return Path(os.environ["DEATHS"])


def _nothing(*_: Any, **__: Any) -> None:
    pass


async def _nothing_yet(*_: Any, **__: Any) -> None:
    pass


def _replaced(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


def throw(command: Sequence[str], name: str) -> None:
    """Take away what the environment says from the service that this process is about to be."""
    if tuple(command[1:2]) != ("-m",) or tuple(command[3:]) != ("serve",):
        return
    service = command[2]
    if service == "analytics":
        _die_after_commits()
    if name and SWITCHES[name].service == service:
        SWITCHES[name].throw()
        print(f"{service} goes without {name}", file=sys.stderr, flush=True)


if "DEATHS" in os.environ:
    try:
        throw(sys.orig_argv, os.environ.get("WITHOUT", ""))
    except BaseException:
        # What is raised here, Python reports and passes over; a switch that does nothing would prove nothing.
        traceback.print_exc()
        os._exit(70)

"""Asks a second backend while the first one is silent, and takes whoever speaks first; it never decides whether to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from router.http1 import UpstreamAnswer

Asking = Coroutine[Any, Any, UpstreamAnswer]


async def first_answer(
    first: Asking, after_s: float, second: Callable[[], Asking | None]
) -> tuple[UpstreamAnswer, bool]:
    """The first answer to begin, and whether it is the second one's. `second` is called after so many seconds of
    silence, and may not want to.

    Whoever loses is hung up on, and so are both where this is cancelled. Where both fail, raises what the first raised.
    """
    tasks = [asyncio.ensure_future(first)]
    winner: asyncio.Future[UpstreamAnswer] | None = None
    try:
        await asyncio.wait(tasks, timeout=after_s)
        if not tasks[0].done() and (asking := second()) is not None:
            tasks.append(asyncio.ensure_future(asking))
        waiting = set(tasks)
        while waiting and winner is None:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            winner = next((task for task in tasks if task in done and task.exception() is None), None)
        return (winner or tasks[0]).result(), winner is not tasks[0]
    finally:
        for task in tasks:
            if task is not winner:
                task.cancel()
                task.add_done_callback(_hang_up)


def _hang_up(task: asyncio.Future[UpstreamAnswer]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close()

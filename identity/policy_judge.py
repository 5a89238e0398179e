"""Has Rego evaluated by a process of its own, with a limit of time; it never evaluates any itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakValueDictionary

import msgspec

from identity.policy_rego import Bundle, Problem, Verdict
from identity.policy_worker import LENGTH, Done, Work
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason

logger = logging.getLogger(__name__)

_JUDGE_S = 0.1
_COMPILE_S = 2.0
_CHECK_S = 5.0
_START_S = 10.0
# Whoever was too slow so often in a minute is not asked for the rest of it, so that others need not wait for it.
_STRIKES = 3
_REST_S = 60.0
_KNOWN = 1_000
_TOO_LONG = "The policy takes too long."
_BROKEN = "The policy breaks its interpreter."
# No secret of the platform's is within reach of what organizations write.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")


class PolicyJudge:
    """One worker, started when it is needed first and again when it had to be killed.

    Each organization waits in a line of its own for its turn, so that one whose policies are slow holds up others by
    one evaluation at most.
    """

    def __init__(self, clock: Clock, *, judge_s: float = _JUDGE_S) -> None:
        self._clock = clock
        self._judge_s = judge_s
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._lines: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._strikes: OrderedDict[str, tuple[int, float]] = OrderedDict()

    async def problems(self, organization_id: str, bundle: Bundle) -> list[Problem]:
        """What is wrong with a bundle; nothing if it can be used. Raises PlatformError(AUTH_UNAVAILABLE)."""
        try:
            return (await self._in_turn(organization_id, Work("", [], _CHECK_S, bundle), None)).problems
        except TimeoutError:
            return [Problem("", 0, "compiling it takes too long")]
        except _BrokenError:
            return [Problem("", 0, "it is too deep or too large to compile")]

    async def judge(self, organization_id: str, key: str, bundle: Bundle, inputs: Sequence[str]) -> list[Verdict]:
        """The verdicts on inputs (JSON). The key names the bundle, and no other one ever.

        Raises PlatformError(AUTH_UNAVAILABLE) when nothing can be evaluated.
        """
        strikes, until = self._strikes.get(key, (0, 0.0))
        if strikes >= _STRIKES and self._clock.monotonic() < until:
            return [Verdict(False, _TOO_LONG, True)] * len(inputs)
        work = Work(key, list(inputs), self._judge_s * len(inputs))
        try:
            done = await self._in_turn(organization_id, work, bundle)
        except (TimeoutError, _BrokenError) as error:
            if len(inputs) > 1:
                # Only one of them may be to blame.
                return [each for one in inputs for each in await self.judge(organization_id, key, bundle, [one])]
            reason = _TOO_LONG if isinstance(error, TimeoutError) else _BROKEN
            logger.warning("a policy was given up", extra={"policy": key, "why": reason})
            self._strike(key)
            return [Verdict(False, reason, True)]
        if done.problems:
            return [Verdict(False, done.problems[0].message, True)] * len(inputs)
        if len(done.verdicts) != len(inputs):
            raise PlatformError(Reason.INTERNAL)
        return done.verdicts

    async def close(self) -> None:
        """End the worker."""
        async with self._turn:
            await self._kill()

    async def _in_turn(self, organization_id: str, work: Work, bundle: Bundle | None) -> Done:
        line = self._lines.setdefault(organization_id, asyncio.Lock())
        async with line:
            await self._turn.acquire()
            # Whoever is gone before it is done must not leave an answer behind that the next would take for its own.
            return await asyncio.shield(asyncio.create_task(self._finish(work, bundle)))

    async def _finish(self, work: Work, bundle: Bundle | None) -> Done:
        try:
            done = await self._ask(work)
            if done.unknown:
                done = await self._ask(Work(work.key, [], _COMPILE_S, bundle))
                # Evaluating it gets no more time for having been compiled just now.
                return done if done.problems else await self._ask(work)
            return done
        finally:
            self._turn.release()

    async def _ask(self, work: Work) -> Done:
        """Raises TimeoutError, or _BrokenError when the worker died of it; it is gone then."""
        process = await self._started()
        try:
            async with asyncio.timeout(work.limit_s):
                return await self._exchange(process, work)
        except (asyncio.IncompleteReadError, ConnectionError):
            await self._kill()
            raise _BrokenError from None
        except BaseException:
            await self._kill()
            raise

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        try:
            async with asyncio.timeout(_START_S):
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "identity.policy_worker"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.DEVNULL,
                    env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                )
                # Its start is no policy's fault, and takes longer than any may.
                await self._exchange(self._process, Work("", [], _START_S))
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            await self._kill()
            logger.error("no process to evaluate policies could be started: %r", error)
            raise PlatformError(Reason.AUTH_UNAVAILABLE) from error
        except BaseException:
            await self._kill()
            raise
        return self._process

    async def _exchange(self, process: asyncio.subprocess.Process, work: Work) -> Done:
        assert process.stdin is not None  # noqa: S101
        assert process.stdout is not None  # noqa: S101
        message = msgspec.msgpack.encode(work)
        process.stdin.write(LENGTH.pack(len(message)) + message)
        await process.stdin.drain()
        (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
        return msgspec.msgpack.decode(await process.stdout.readexactly(length), type=Done)

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _strike(self, key: str) -> None:
        now = self._clock.monotonic()
        strikes, until = self._strikes.pop(key, (0, 0.0))
        self._strikes[key] = (strikes + 1, until) if strikes and now < until else (1, now + _REST_S)
        if len(self._strikes) > _KNOWN:
            self._strikes.popitem(last=False)


class _BrokenError(Exception):
    """The worker died of its work."""

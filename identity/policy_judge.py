"""Has Rego evaluated by a process of its own, with a limit of time; it never evaluates any itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Sequence

import msgspec

from identity.policy_worker import LENGTH, Bundle, Done, Problem, Verdict, Work
from mesh.clock import Clock

logger = logging.getLogger(__name__)

_JUDGE_S = 0.1
_COMPILE_S = 2.0
_START_S = 10.0
# Whoever has been too slow so often is not asked for a while, so that others need not wait for it.
_STRIKES = 3
_REST_S = 60.0
_TOO_LONG = "The policy takes too long."


class PolicyJudge:
    """One worker, started when it is needed first and again when it had to be killed."""

    def __init__(self, clock: Clock, *, judge_s: float = _JUDGE_S) -> None:
        self._clock = clock
        self._judge_s = judge_s
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._strikes: dict[str, tuple[int, float]] = {}

    async def problems(self, bundle: Bundle) -> list[Problem]:
        """What is wrong with a bundle; nothing if it compiles."""
        async with self._turn:
            try:
                return (await self._ask(Work("", [], bundle), _COMPILE_S)).problems
            except TimeoutError:
                return [Problem("", 0, "compiling it takes too long")]

    async def judge(self, key: str, bundle: Bundle, inputs: Sequence[str]) -> list[Verdict]:
        """The verdicts on inputs (JSON). The key names the bundle, and another one after each change of it."""
        strikes, rests_until = self._strikes.get(key, (0, 0.0))
        if strikes >= _STRIKES and self._clock.monotonic() < rests_until:
            return [Verdict(False, _TOO_LONG, True)] * len(inputs)
        async with self._turn:
            try:
                done = await self._ask(Work(key, list(inputs)), self._judge_s * len(inputs))
                if done.unknown:
                    limit_s = _COMPILE_S + self._judge_s * len(inputs)
                    done = await self._ask(Work(key, list(inputs), bundle), limit_s)
            except TimeoutError:
                logger.warning("a policy took too long", extra={"policy": key})
                self._strikes[key] = (strikes + 1, self._clock.monotonic() + _REST_S)
                return [Verdict(False, _TOO_LONG, True)] * len(inputs)
        self._strikes.pop(key, None)
        if done.problems:
            return [Verdict(False, done.problems[0].message, True)] * len(inputs)
        return done.verdicts

    async def close(self) -> None:
        """End the worker."""
        async with self._turn:
            await self._kill()

    async def _ask(self, work: Work, limit_s: float) -> Done:
        """Raises TimeoutError, and then the worker is gone; also when it died of the work."""
        process = self._process
        if process is None or process.returncode is not None:
            async with asyncio.timeout(_START_S):
                process = self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "identity.policy_worker"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.DEVNULL,
                )
                # Its start is nobody's fault.
                await self._exchange(process, Work("", []))
        try:
            async with asyncio.timeout(limit_s):
                return await self._exchange(process, work)
        except (asyncio.IncompleteReadError, OSError):
            await self._kill()
            raise TimeoutError from None
        except BaseException:
            # What it would answer now is an answer to nobody.
            await self._kill()
            raise

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

"""Several processes of the edge side by side on one address: starts them, replaces what dies, ends them together; it
never serves a request itself.

Each worker listens on a socket of its own (SO_REUSEPORT), so the kernel spreads connections over those that live, and
nothing is passed on from process to process. A worker and its parent hold the ends of a pair of sockets: the worker
says on it that it serves, and each learns from its end when the other is gone, however that came about.
"""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping

from prometheus_client.multiprocess import mark_process_dead

import edge.server
from edge.config import EdgeConfig
from mesh.process import main

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.1
_LAST_PAUSE_S = 5.0
# A worker that ran for so long is not failing again and again: its next pause is the first one.
_SETTLED_S = 10.0
# What a worker gets beyond the time to drain, and one that was told twice.
_STOP_MARGIN_S = 5.0
_INSIST_S = 2.0
# Where it is set, prometheus_client keeps its values in that folder, and every worker can add up those of all.
_METRICS = "PROMETHEUS_MULTIPROC_DIR"


async def serve(config: EdgeConfig, stop: asyncio.Event) -> None:
    """Serve with as many processes as the configuration asks for, until `stop` is set and requests have drained.

    Raises what `edge.server.serve` raises, and RuntimeError for a worker that ends before it has ever served.
    """
    if config.workers == 1:
        await edge.server.serve(config, stop)
        return
    host, _ = config.host_and_port
    with reserved_port(*config.host_and_port) as port, tempfile.TemporaryDirectory(prefix="edge-metrics-") as metrics:
        workers = _Workers(
            config,
            stop,
            {
                **os.environ,
                "AIAAS_EDGE_ADDRESS": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
                _METRICS: metrics,
            },
        )
        await workers.run()


class _Worker:
    """One process that was started, and the parent's end of its pair of sockets."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.serves = False
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 - it is this program
                (sys.executable, "-m", "edge.workers", str(theirs.fileno())),
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                # A Ctrl-C in a terminal goes to a whole group; workers are told by their parent, and once.
                process_group=0,
            )
        self._socket.setblocking(False)

    async def next_news(self) -> bool:
        """Whether the worker says that it serves; False when it has ended."""
        return await asyncio.get_running_loop().sock_recv(self._socket, 1) != b""

    def close(self, wait_s: float | None = None) -> int:
        """The exit status of a worker that ends; one that does not within `wait_s` is killed."""
        self._socket.close()
        try:
            return self.process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class _Workers:
    def __init__(self, config: EdgeConfig, stop: asyncio.Event, environment: Mapping[str, str]) -> None:
        self._config = config
        self._stop = stop
        self._environment = environment
        self._running: set[_Worker] = set()
        self._have_served = 0

    async def run(self) -> None:
        # The level of logs is theirs to change: they are who serves.
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._tell, signal.SIGUSR1)
        try:
            async with asyncio.TaskGroup() as tasks:
                keepers = [tasks.create_task(self._keep()) for _ in range(self._config.workers)]
                await self._stop.wait()
                self._tell(signal.SIGTERM)
                _, late = await asyncio.wait(keepers, timeout=self._config.drain_s + _STOP_MARGIN_S)
                if late:
                    logger.error("workers did not end in time", extra={"workers": len(late)})
                    self._tell(signal.SIGKILL)
        finally:
            # Those that are left when one could not start, or when a second signal insists.
            self._tell(signal.SIGTERM)
            for worker in self._running:
                worker.close(_INSIST_S)

    async def _keep(self) -> None:
        """Run one worker, and another one in its place when it dies."""
        has_served = False
        pause_s = _FIRST_PAUSE_S
        loop = asyncio.get_running_loop()
        while not self._stop.is_set():
            began = loop.time()
            worker = _Worker(self._environment)
            self._running.add(worker)
            if await worker.next_news():
                worker.serves = True
                if not has_served:
                    has_served = True
                    self._count_in()
                await worker.next_news()
            self._running.remove(worker)
            status = worker.close()
            mark_process_dead(worker.process.pid, self._environment[_METRICS])  # type: ignore[no-untyped-call]
            if self._stop.is_set():
                return
            if not has_served:
                raise RuntimeError(f"a worker ended with status {status} before it served")
            logger.error("a worker has died", extra={"worker_pid": worker.process.pid, "exit_status": status})
            if loop.time() - began > _SETTLED_S:
                pause_s = _FIRST_PAUSE_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause_s)
            pause_s = min(pause_s * 2, _LAST_PAUSE_S)

    def _count_in(self) -> None:
        self._have_served += 1
        if self._have_served == self._config.workers:
            logger.info("all workers serve on %s", self._environment["AIAAS_EDGE_ADDRESS"])

    def _tell(self, number: signal.Signals) -> None:
        for worker in self._running:
            # One that starts has nothing yet that would take a wish, and would die of it.
            if worker.serves or number != signal.SIGUSR1:
                worker.process.send_signal(number)


@contextlib.contextmanager
def reserved_port(host: str, port: int) -> Iterator[int]:
    """Holds an address for listeners that share it, and for nobody who does not; yields its port, for 0 a free one.

    Raises OSError if anybody listens on it already, sharing or not: among sockets that share, a foreign server of the
    same user would get a part of our connections without a word.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as holder:
        with socket.create_server((host, port), family=family) as probe:
            address = probe.getsockname()
            # Only now, as it would have let it in; the holder comes in by it before the probe goes.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # For connections that the last server on this address has left in TIME_WAIT, and for nothing after them.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(address)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        yield address[1]


async def _serve_as_worker(config: EdgeConfig, stop: asyncio.Event, parent: int) -> None:
    """`parent` is the descriptor of the worker's socket, open as long as the process is: its end tells of that."""
    loop = asyncio.get_running_loop()

    def on_parent_gone() -> None:
        loop.remove_reader(parent)
        logger.warning("the parent of this worker is gone")
        stop.set()

    # The parent never writes.
    loop.add_reader(parent, on_parent_gone)
    await edge.server.serve(config, stop, shares_port=True, on_serving=lambda: os.write(parent, b"\1"))


if __name__ == "__main__":
    main("edge", EdgeConfig, None, functools.partial(_serve_as_worker, parent=int(sys.argv[1])), argv=["serve"])

"""The command line of every service: serve, migrate, check-config; it never knows what the service does.

    python -m router                serve until SIGTERM or SIGINT
    python -m router migrate        bring the database to this version
    python -m router check-config   show the configuration, or everything that is wrong with it

While it serves, SIGUSR1 has it log everything (DEBUG), and the next SIGUSR1 what the configuration says again.

Three fields of a configuration have a meaning here, where the class has them: `log_level`, `otlp_endpoint` with
`trace_ratio`, and `database_url`, which `migrate` uses unless there is a `migration_database_url` (the owner's, as the
role of a running service may not change tables).
"""

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import uvloop

from mesh.config import ConfigError, load, show
from mesh.telemetry import configure_logging
from mesh.tracing import configure_tracing

C = TypeVar("C")

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_WRONG_CONFIGURATION = 2


def main(
    service: str,
    config_cls: type[C],
    migrations: str | None,
    serve: Callable[[C, asyncio.Event], Awaitable[None]],
    *,
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Run what the command line asks for, then leave the process.

    `migrations` is the package of the SQL files ("router.migrations"), None for a service without a database. `serve`
    gets the configuration and an event that a signal sets; it returns when it has stopped in good order.

    Raises SystemExit: 0 when done, 1 when it failed, 2 for a wrong configuration.
    """
    command = _parser(service, migrations).parse_args(argv).command or "serve"
    try:
        config = load(config_cls, environ)
    except ConfigError as error:
        print(f"{service} cannot start, its configuration is wrong:\n{_indented(str(error))}", file=sys.stderr)
        sys.exit(EXIT_WRONG_CONFIGURATION)
    if command == "check-config":
        _print_table(show(config))
        sys.exit(0)
    configure_logging(service, getattr(config, "log_level", "INFO"))
    if command == "migrate" and migrations is not None:
        url = getattr(config, "migration_database_url", "") or config.database_url  # type: ignore[attr-defined]
        sys.exit(_run(service, _migrate(url, migrations)))
    end_tracing = configure_tracing(
        service, getattr(config, "otlp_endpoint", None), getattr(config, "trace_ratio", 1.0)
    )
    try:
        status = _run(service, _serve(service, config, serve))
    finally:
        end_tracing()
    sys.exit(status)


def spare_collector() -> None:
    """For a server that has started: what start-up made stays, so the collector need not look at it again; and what a
    request makes is freed without it, as nothing of it refers back. Looking every 700 objects for what is not there
    takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def _parser(service: str, migrations: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {service}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("serve", help="serve until SIGTERM or SIGINT (the default)")
    if migrations is not None:
        commands.add_parser("migrate", help="bring the database to this version")
    commands.add_parser("check-config", help="show the configuration, or everything that is wrong with it")
    return parser


def _run(service: str, work: Awaitable[None]) -> int:
    async def wait() -> None:
        await work

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(wait())
    except (asyncio.CancelledError, KeyboardInterrupt):
        return EXIT_FAILED
    except Exception as error:
        logger.critical("%s stopped: %s", service, _sentence(error), exc_info=error)
        return EXIT_FAILED
    return 0


async def _serve(service: str, config: C, serve: Callable[[C, asyncio.Event], Awaitable[None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()

    def on_signal(number: signal.Signals) -> None:
        # The first signal asks, the second insists.
        if stop.is_set() and task is not None:
            task.cancel()
        logger.info("%s is stopping on %s", service, number.name)
        stop.set()

    configured = logging.root.level

    def on_level() -> None:
        logging.root.setLevel(configured if logging.root.level == logging.DEBUG else logging.DEBUG)
        logger.warning("%s logs at %s from now on", service, logging.getLevelName(logging.root.level))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    loop.add_signal_handler(signal.SIGUSR1, on_level)
    logger.info("%s is starting", service)
    await serve(config, stop)
    logger.info("%s has stopped", service)


async def _migrate(url: str, package: str) -> None:
    from mesh.migrate import migrate

    applied = await migrate(url, package)
    print("\n".join(f"applied {name}" for name in applied) or "nothing to apply")


def _sentence(error: BaseException) -> str:
    """What went wrong, in one line; of a group, its first cause."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__


def _print_table(rows: Sequence[tuple[str, str]]) -> None:
    width = max((len(variable) for variable, _ in rows), default=0)
    for variable, value in rows:
        print(f"{variable:<{width}}  {value}".rstrip())


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())

"""The command line of analytics: serve, migrate, check-config as every service, and rebuild; it decides nothing.

python -m analytics rebuild    sum all events anew, after an update whose sums know more, while analytics runs or not
"""

import asyncio
import os
import sys

from analytics.config import AnalyticsConfig
from analytics.rebuild import rebuild
from analytics.server import serve
from analytics.store import UsageStore
from mesh.clock import SystemClock
from mesh.config import ConfigError, load
from mesh.database import Database
from mesh.errors import PlatformError
from mesh.process import EXIT_FAILED, EXIT_WRONG_CONFIGURATION, main
from mesh.telemetry import configure_logging


async def _rebuild(config: AnalyticsConfig) -> int:
    database = Database(config.database_url)
    try:
        return await rebuild(UsageStore(database), SystemClock(), config.kept)
    finally:
        await database.close()


def _run_rebuild() -> int:
    try:
        config = load(AnalyticsConfig, os.environ)
        configure_logging("analytics", config.log_level)
        events = asyncio.run(_rebuild(config))
    except ConfigError as error:
        print(f"analytics cannot rebuild, its configuration is wrong:\n{error}", file=sys.stderr)
        return EXIT_WRONG_CONFIGURATION
    except PlatformError as error:
        print(f"analytics cannot rebuild: {error.message}", file=sys.stderr)
        return EXIT_FAILED
    print(f"{events} events are summed anew")
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["rebuild"]:
        sys.exit(_run_rebuild())
    main("analytics", AnalyticsConfig, "analytics.migrations", serve)

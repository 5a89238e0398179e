"""The command line of identity: serve, migrate, check-config as every service, and bootstrap; it decides nothing.

python -m identity bootstrap --display-name NAME [--rotate]    make the first platform administrator, print its key
"""

import argparse
import asyncio
import json
import os
import sys
from dataclasses import asdict

from identity.audit import Audit
from identity.audit_chain import PLATFORM_CHAIN, AuditKeys
from identity.bootstrap import Bootstrapped, bootstrap
from identity.config import IdentityConfig
from identity.revocations import announcer
from identity.server import serve
from identity.stores import Store, open_database
from mesh.clock import SystemClock
from mesh.config import ConfigError, load
from mesh.errors import PlatformError
from mesh.process import EXIT_FAILED, EXIT_WRONG_CONFIGURATION, main
from mesh.telemetry import configure_logging


async def _bootstrap(config: IdentityConfig, display_name: str, rotate: bool) -> Bootstrapped:
    clock = SystemClock()
    database = open_database(config.database_url)
    try:
        async with announcer(config.redis_url, clock) as revocations:
            keys = AuditKeys(config.audit_keys)
            store = Store(database, revocations.announce, keys)
            async with Audit(store, clock, keys).own("bootstrap", PLATFORM_CHAIN):
                return await bootstrap(store, clock, display_name, rotate=rotate)
    finally:
        await database.close()


def _run_bootstrap(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m identity bootstrap",
        description="Make the platform's organization, its first administrator and a key, and print them as JSON.",
    )
    parser.add_argument("--display-name", default="Platform", help="the organization's name for people")
    parser.add_argument("--rotate", action="store_true", help="make a new key, and revoke the one made before")
    options = parser.parse_args(arguments)
    try:
        config = load(IdentityConfig, os.environ)
        configure_logging("identity", config.log_level)
        made = asyncio.run(_bootstrap(config, options.display_name, options.rotate))
    except ConfigError as error:
        print(f"identity cannot bootstrap, its configuration is wrong:\n{error}", file=sys.stderr)
        return EXIT_WRONG_CONFIGURATION
    except PlatformError as error:
        print(f"identity cannot bootstrap: {error.message}", file=sys.stderr)
        return EXIT_FAILED
    print(json.dumps(asdict(made)))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["bootstrap"]:
        sys.exit(_run_bootstrap(sys.argv[2:]))
    main("identity", IdentityConfig, "identity.migrations", serve)

"""The command line of the router: `python -m router [serve|migrate|check-config|journal]`; it does nothing else."""

import sys

from mesh.process import main
from router import journal_cli
from router.config import RouterConfig
from router.server import serve

if __name__ == "__main__":
    if sys.argv[1:2] == ["journal"]:
        sys.exit(journal_cli.main(sys.argv[2:]))
    main("router", RouterConfig, "router.migrations", serve)

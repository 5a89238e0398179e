"""The command line of the router: `python -m router [serve|migrate|check-config]`; it does nothing else."""

from mesh.process import main
from router.config import RouterConfig
from router.server import serve

if __name__ == "__main__":
    main("router", RouterConfig, "router.migrations", serve)

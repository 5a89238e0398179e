"""The command line of analytics: `python -m analytics [serve|migrate|check-config]`; it does nothing else."""

from analytics.config import AnalyticsConfig
from analytics.server import serve
from mesh.process import main

if __name__ == "__main__":
    main("analytics", AnalyticsConfig, "analytics.migrations", serve)

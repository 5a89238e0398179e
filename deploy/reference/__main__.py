"""Writes the pages: `python -m deploy.reference DESCRIPTORS FOLDER`; it never removes one that was there."""

import sys
from pathlib import Path

import mesh
from analytics.config import AnalyticsConfig
from deploy.dashboards.__main__ import documents
from deploy.reference import contracts, sources
from edge.config import EdgeConfig
from edge.openapi.contracts import read_contracts
from gateway.config import GatewayConfig
from identity.config import IdentityConfig
from identity.roles import BUILT_IN
from router.config import RouterConfig

CONFIGURATIONS = {
    "edge": EdgeConfig,
    "router": RouterConfig,
    "gateway": GatewayConfig,
    "identity": IdentityConfig,
    "analytics": AnalyticsConfig,
}
PACKAGES = ("edge", "router", "identity", "analytics", "mesh")


def pages(descriptors: bytes) -> dict[str, str]:
    """Every page by its path."""
    reference = contracts.Reference(read_contracts(descriptors))
    roles = {role.role_id: role.permissions for role in BUILT_IN.values()}
    return reference.pages() | {
        "permissions.md": reference.permissions(roles),
        "events.md": reference.events(sources.queues()),
        "errors.md": sources.errors(),
        "variables.md": sources.variables(CONFIGURATIONS),
        "metrics.md": sources.metrics(Path(mesh.__file__).parents[1], PACKAGES),
        "dashboards.md": sources.dashboards(documents().values()),
    }


def write(descriptors: Path, folder: Path) -> None:
    """Write every page below the folder."""
    for name, content in pages(descriptors.read_bytes()).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))

"""What the gateway is told by its environment: what the edge and the router are told; it has no variable of its own."""

from dataclasses import dataclass

from edge.config import EdgeConfig
from router.config import RouterConfig


@dataclass(frozen=True)
class GatewayConfig:
    """The gateway's configuration. A wrong variable is named by `python -m gateway check-config`."""

    edge: EdgeConfig
    router: RouterConfig

    def __post_init__(self) -> None:
        """Raises ValueError for more than one worker: each would be a router that the others do not know."""
        if self.edge.workers != 1:
            raise ValueError("AIAAS_EDGE_WORKERS must be 1 in a gateway; start more gateways instead")

    @property
    def log_level(self) -> str:
        """See EdgeConfig; the variable is the same for both."""
        return self.edge.log_level

    @property
    def otlp_endpoint(self) -> str | None:
        """See EdgeConfig; the variable is the same for both."""
        return self.edge.otlp_endpoint

    @property
    def trace_ratio(self) -> float:
        """See EdgeConfig; the variable is the same for both."""
        return self.edge.trace_ratio

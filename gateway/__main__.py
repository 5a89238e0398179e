"""The command line of the gateway: serve, check-config; everything it starts is in `gateway.server`."""

from gateway.config import GatewayConfig
from gateway.server import serve
from mesh.process import main

if __name__ == "__main__":
    main("gateway", GatewayConfig, None, serve)

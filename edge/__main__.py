"""The command line of the edge: serve, check-config; everything it starts is in `edge.workers` and `edge.server`."""

from edge.config import EdgeConfig
from edge.workers import serve
from mesh.process import main

if __name__ == "__main__":
    main("edge", EdgeConfig, None, serve)

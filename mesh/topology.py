"""The queues between services, so that what is published is what is consumed; it never connects to a broker."""

from mesh.broker import Queue

USAGE = Queue("analytics.usage.v1", exchange="usage", routing_key="usage.v1")
"""The usage events of all routers, on their way to analytics. Each body is an aiaas.type.v1.UsageEvent."""

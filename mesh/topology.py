"""The queues between services, so that what is published is what is consumed; it never connects to a broker."""

from mesh.broker import Queue

USAGE = Queue("analytics.usage.v2", exchange="usage", routing_key="usage.v2")
"""The usage events of all routers, on their way to analytics. Each body is an aiaas.type.v1.UsageEventBatch.

The number counts the meanings of a body: protobuf reads a body of one meaning as another without complaint, so each
has a queue of its own. In version 1 a body was a single UsageEvent."""

EVENTS = Queue("analytics.events.v1", exchange="events", routing_key="events.v1")
"""What people may want to be told of, from all services, on its way to analytics, which keeps it and sends webhooks.
Each body is an aiaas.type.v1.PlatformEvent."""

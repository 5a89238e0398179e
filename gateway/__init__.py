"""The edge and the router in one process, for where one machine is enough."""

"""The REST API of /admin and /analytics, made at start from the contracts: every RPC whose policy has a `rest` binding
is a route. No route is written by hand, and nothing here knows what any RPC does."""

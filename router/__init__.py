"""The router: the registry of models and backends, and the way of each inference to a backend and back."""

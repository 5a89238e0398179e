"""Found by every Python that starts with this folder on its PYTHONPATH: prometheus_client counts nothing there.

For `make bench-telemetry`, as the platform has no switch for it; it never stands in for what a metric would say.
"""

from prometheus_client import Counter, Gauge, Histogram


def _nothing(*_: object, **__: object) -> None:
    """Takes what a metric takes."""


for _kind, _names in ((Counter, ("inc",)), (Gauge, ("inc", "dec", "set")), (Histogram, ("observe",))):
    for _name in _names:
        setattr(_kind, _name, _nothing)

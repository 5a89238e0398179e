"""Found by every Python that starts with this folder on its PYTHONPATH: nothing is counted there.

For `make bench-telemetry`, as the platform has no switch for it; it never stands in for what a metric would say.
"""

from prometheus_client import Counter, Gauge, Histogram

from mesh.tallies import Spread, Tally


def _nothing(*_: object, **__: object) -> None:
    """Takes what a metric takes."""


_KINDS = {
    Counter: ("inc",),
    Gauge: ("inc", "dec", "set"),
    Histogram: ("observe",),
    Tally: ("inc",),
    Spread: ("observe",),
}
for _kind, _names in _KINDS.items():
    for _name in _names:
        setattr(_kind, _name, _nothing)

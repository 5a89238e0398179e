"""Names what identity measures; it never decides anything by it."""

from prometheus_client import Counter

_CROSSED = Counter(
    "aiaas_budget_thresholds_crossed_total",
    "Budgets' thresholds that were passed; percent is 50, 80, 100 or other.",
    ["percent"],
)
_UNRECORDED = Counter(
    "aiaas_audit_unrecorded_attempts_total",
    "Denied and failed attempts without an audit entry: beyond the bounds (bounded), or not writable (failed).",
    ["why"],
)
_UNRECORDED_DECISIONS = Counter(
    "aiaas_policy_unrecorded_decisions_total",
    "Decisions of policies that were dropped from the log, as too many waited to be written.",
)
_USUAL = {percent: _CROSSED.labels(str(percent)) for percent in (50, 80, 100)}
_OTHER = _CROSSED.labels("other")


def count_crossed(percent: int) -> None:
    """Count a threshold that was passed."""
    _USUAL.get(percent, _OTHER).inc()


def count_unrecorded(why: str) -> None:
    """Count an attempt that changed nothing and was not recorded: "bounded" or "failed"."""
    _UNRECORDED.labels(why).inc()


def count_unrecorded_decisions(count: int = 1) -> None:
    """Count decisions that are not in the log."""
    _UNRECORDED_DECISIONS.inc(count)

"""Judges what went wrong on an engine: the client's own fault, or one that another backend may not make; it never tries
another.
"""

from __future__ import annotations

from mesh.errors import PlatformError, Reason
from router import sse
from router.routing import RETRY_AFTER_S


class BackendFailedError(Exception):
    """An attempt failed before the first byte in a way that another backend may not."""

    def __init__(self, reason: str, answer: PlatformError) -> None:
        super().__init__(reason)
        self.reason = reason
        self.answer = answer


# Statuses that an engine gives for what the router asked of it, not for what the client wrote.
_ROUTERS_FAULT = frozenset({401, 403, 404, 405, 407, 408, 421})


def judge(status: int, fault: sse.EngineFault | None) -> Exception:
    """An engine's error: the client's own, in the engine's words, or one that another backend may not make."""
    if status == 429:
        return failed("backend_overloaded", PlatformError(Reason.NO_BACKEND_AVAILABLE, retry_after_s=RETRY_AFTER_S))
    if status < 400 or status in _ROUTERS_FAULT:
        return failed("backend_misconfigured")
    if status >= 500:
        return failed("backend_error")
    return PlatformError(
        Reason.INVALID_ARGUMENT,
        field=(fault and fault.param) or None,
        description=(fault and fault.message) or None,
    )


def failed(reason: str, answer: PlatformError | None = None) -> BackendFailedError:
    """A failure of this reason; `answer` is what the client is told if no other backend helps."""
    return BackendFailedError(reason, answer or PlatformError(Reason.BACKEND_ERROR))

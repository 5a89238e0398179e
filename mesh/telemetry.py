"""Logs as JSON lines, set up once for each process; nothing secret leaves through them.

Metrics need no set-up: they live in prometheus_client's default registry, with names that begin with `aiaas_`.
"""

import json
import logging
import math
import re
import traceback
from datetime import UTC, datetime
from typing import Any, TextIO

from opentelemetry import trace

from mesh import context

REDACTED = "[redacted]"

CREDENTIAL = re.compile(r"ai[a-z]{2}_[a-z]+_\w{20,}|\bsk-[\w-]{16,}|\bwhsec_[\w+/=-]{16,}|\beyJ[\w-]+\.[\w-]+\.[\w-]+")
"""A whole credential in a text, by its form alone: the platform's tokens, OpenAI's, webhooks' secrets and JWTs."""

_TEXT_LENGTH = 32_768
_DEPTH = 8

# What gives itself away by its form, and what is given away by the name before it.
_SECRETS = (
    (re.compile(r"aia{1,2}s_[\w-]+"), f"aias_{REDACTED}"),
    (re.compile(r"(ai[a-z]{2})_[a-z]+_[\w-]{20,}"), rf"\1_{REDACTED}"),
    (re.compile(r"\bsk-[\w-]{12,}"), REDACTED),
    (re.compile(r"\bwhsec_[\w+/=-]+"), f"whsec_{REDACTED}"),
    (re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]+"), REDACTED),
    (
        re.compile(r"(?i)\b((?:proxy-)?authorization[\"']*\s*[,:=]\s*b?[\"']*)(?:(\w+)\s+)?[^\s\"',;}]+"),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}"), rf"\1 {REDACTED}"),
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]{1,20}://)[^\s\"'<>]*@"), rf"\1{REDACTED}@"),
    (
        re.compile(
            r"(?i)((?:password|passwd|pwd|secret|credential|api[_-]?key|(?:access|refresh|id|session)[_-]?token)s?"
            r"[\"']*\s*[:=]\s*b?)(?:\"[^\"]*\"?|'[^']*'?|[^\s\"',;&})]+)"
        ),
        rf"\1{REDACTED}",
    ),
)

# Fields of a log record whose whole value is withheld.
_SECRET_NAMES = frozenset(
    {
        "access_token",
        "api_key",
        "authorization",
        "body",
        "client_secret",
        "completion",
        "cookie",
        "credential",
        "messages",
        "password",
        "prompt",
        "refresh_token",
        "secret",
        "set_cookie",
        "token",
    }
)

_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def redact(text: str) -> str:
    """`text` without API keys, bearer credentials, tokens, passwords, and the user information of URLs."""
    text = text[:_TEXT_LENGTH]
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class RedactionFilter(logging.Filter):
    """Withholds secrets from a record: its message with the arguments put in, its exception text, its extra fields."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact `record` in place; it is always let through."""
        try:
            message = record.getMessage()
        except Exception:
            # Left to logging, such a record would be printed raw, arguments and all.
            words = record.msg if isinstance(record.msg, str) else f"a {type(record.msg).__name__}"
            message = f"{words} (it cannot be written out)"
        record.msg, record.args = redact(message), None
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = "".join(traceback.format_exception(record.exc_info[1]))
        record.exc_info = None
        record.exc_text = redact(record.exc_text) if record.exc_text else None
        record.stack_info = redact(record.stack_info) if record.stack_info else None
        for name in vars(record).keys() - _STANDARD_FIELDS:
            setattr(record, name, _redacted(name, getattr(record, name)))
        return True


def _redacted(name: str, value: Any, depth: int = 0) -> Any:
    """`value` as JSON can hold it, with its secrets withheld; `name` is the field or key that it stands under."""
    if name.lower().replace("-", "_") in _SECRET_NAMES:
        return REDACTED
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict) and depth < _DEPTH:
        return {redact(str(key)): _redacted(str(key), item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset) and depth < _DEPTH:
        return [_redacted("", item, depth + 1) for item in value]
    try:
        return redact(str(value))
    except Exception:
        return f"({type(value).__name__})"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: timestamp (RFC 3339, UTC), level, service, logger, message, the ids of the request and
    of the trace where there are any, extra fields, and the exception without local variables."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The record's line, without its end."""
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "timestamp": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := context.request_id.get():
            line["request_id"] = request_id
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            line["trace_id"] = trace.format_trace_id(span.trace_id)
            line["span_id"] = trace.format_span_id(span.span_id)
        for name in sorted(vars(record).keys() - _STANDARD_FIELDS):
            line.setdefault(name, getattr(record, name))
        if record.exc_text:
            line["exception"] = record.exc_text
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, default=str)


def configure_logging(service: str, level: str = "INFO", *, stream: TextIO | None = None) -> None:
    """Send every log record of this process, redacted, as JSON lines to `stream` (standard error when None).

    Handlers that others installed on the root logger are removed, as they would write what is redacted here.
    """
    handler = logging.StreamHandler(stream)
    handler.addFilter(RedactionFilter())
    handler.setFormatter(JsonFormatter(service))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(True)

"""The catalog of what can go wrong, and how each error looks in gRPC and REST; it never judges what went wrong.

A service raises `PlatformError` with a `Reason`. Its gRPC code, HTTP status and sentence follow from `CATALOG`, so the
same failure looks the same whichever way a caller came in. The OpenAI shape is that of OpenAI's own API; the other one
is Google's AIP-193.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple

import grpc
from google.protobuf import duration_pb2, json_format
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from mesh.telemetry import CREDENTIAL, REDACTED

DOMAIN = "aiaas"
"""The ErrorInfo domain of every error this platform makes."""

_STATUS_DETAILS_KEY = "grpc-status-details-bin"
# gRPC refuses more than 8 KiB of trailers, and a refused trailer hides the error it carried.
_MESSAGE_LENGTH = 1024
_DETAIL_LENGTH = 256
_VIOLATIONS_LENGTH = 3072

MOST_VIOLATIONS = 50
"""How many wrong fields are looked for: a request may be made of nothing else."""
# No credential is shorter.
_LEAST_CREDENTIAL = 20


class Reason(StrEnum):
    """Why a call failed. The values are stable: clients and dashboards match on them."""

    MISSING_CREDENTIALS = "missing_credentials"
    API_KEY_INVALID = "api_key_invalid"
    SIGN_IN_REFUSED = "sign_in_refused"
    MFA_CODE_INVALID = "mfa_code_invalid"
    SIGNATURE_INVALID = "signature_invalid"
    PERMISSION_DENIED = "permission_denied"
    ORGANIZATION_MISMATCH = "organization_mismatch"
    NOT_FOUND = "not_found"
    ALREADY_EXISTS = "already_exists"
    INVALID_ARGUMENT = "invalid_argument"
    FAILED_PRECONDITION = "failed_precondition"
    REQUEST_TOO_LARGE = "request_too_large"
    REQUEST_TIMEOUT = "request_timeout"
    INVALID_JSON = "invalid_json"
    UNKNOWN_FIELD = "unknown_field"
    MODEL_NOT_FOUND = "model_not_found"
    RATE_LIMIT_EXCEEDED = "rate_limit_exceeded"
    INSUFFICIENT_QUOTA = "insufficient_quota"
    MODEL_NOT_PRICED = "model_not_priced"
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
    IDEMPOTENCY_KEY_IN_USE = "idempotency_key_in_use"
    USAGE_UNRECORDABLE = "usage_unrecordable"
    AUTH_UNAVAILABLE = "auth_unavailable"
    UNAVAILABLE = "unavailable"
    NO_BACKEND_AVAILABLE = "no_backend_available"
    BACKEND_ERROR = "backend_error"
    BACKEND_TIMEOUT = "backend_timeout"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    UNIMPLEMENTED = "unimplemented"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    ROUTE_NOT_FOUND = "route_not_found"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    HEADER_TOO_LARGE = "header_too_large"
    OVERLOADED = "overloaded"
    INTERNAL = "internal"


@dataclass(frozen=True)
class Entry:
    """How one reason is told to callers. `sentence` may hold {placeholders}, filled from `field` and the details."""

    grpc: grpc.StatusCode
    http: int
    openai_type: str
    openai_code: str | None
    sentence: str


_REQUEST = "invalid_request_error"
_SERVER = "server_error"
_GONE = "The requested resource does not exist or you do not have access to it."

CATALOG: Mapping[Reason, Entry] = MappingProxyType(
    {
        Reason.MISSING_CREDENTIALS: Entry(
            grpc.StatusCode.UNAUTHENTICATED,
            401,
            _REQUEST,
            "invalid_api_key",
            "You didn't provide an API key. Provide it in an Authorization header using Bearer auth "
            "(Authorization: Bearer YOUR_KEY).",
        ),
        Reason.API_KEY_INVALID: Entry(
            grpc.StatusCode.UNAUTHENTICATED, 401, _REQUEST, "invalid_api_key", "Incorrect API key provided."
        ),
        Reason.SIGN_IN_REFUSED: Entry(
            grpc.StatusCode.UNAUTHENTICATED,
            401,
            _REQUEST,
            "sign_in_refused",
            "The sign-in was not accepted. Please begin it again.",
        ),
        Reason.MFA_CODE_INVALID: Entry(
            grpc.StatusCode.UNAUTHENTICATED,
            401,
            _REQUEST,
            "invalid_mfa_code",
            "The code is wrong, or was used before.",
        ),
        Reason.SIGNATURE_INVALID: Entry(
            grpc.StatusCode.UNAUTHENTICATED,
            401,
            _REQUEST,
            "invalid_signature",
            "This API key needs signed requests, and the signature is missing, wrong, too old, or was used before.",
        ),
        Reason.PERMISSION_DENIED: Entry(
            grpc.StatusCode.PERMISSION_DENIED,
            403,
            _REQUEST,
            "insufficient_permissions",
            "You have insufficient permissions for this operation.",
        ),
        Reason.ORGANIZATION_MISMATCH: Entry(grpc.StatusCode.NOT_FOUND, 404, _REQUEST, "not_found", _GONE),
        Reason.NOT_FOUND: Entry(grpc.StatusCode.NOT_FOUND, 404, _REQUEST, "not_found", _GONE),
        Reason.ALREADY_EXISTS: Entry(
            grpc.StatusCode.ALREADY_EXISTS, 409, _REQUEST, "already_exists", "The resource already exists."
        ),
        Reason.INVALID_ARGUMENT: Entry(
            grpc.StatusCode.INVALID_ARGUMENT, 400, _REQUEST, "invalid_value", "The request holds an invalid value."
        ),
        Reason.FAILED_PRECONDITION: Entry(
            grpc.StatusCode.FAILED_PRECONDITION,
            400,
            _REQUEST,
            "failed_precondition",
            "The resource is not in a state that allows this operation.",
        ),
        Reason.REQUEST_TOO_LARGE: Entry(
            grpc.StatusCode.INVALID_ARGUMENT, 413, _REQUEST, "request_too_large", "The request is too large."
        ),
        Reason.REQUEST_TIMEOUT: Entry(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            408,
            _REQUEST,
            "request_timeout",
            "The body of the request took too long to arrive.",
        ),
        Reason.INVALID_JSON: Entry(
            grpc.StatusCode.INVALID_ARGUMENT,
            400,
            _REQUEST,
            "invalid_json",
            "We could not parse the JSON body of your request.",
        ),
        Reason.UNKNOWN_FIELD: Entry(
            grpc.StatusCode.INVALID_ARGUMENT, 400, _REQUEST, "unknown_parameter", "Unknown parameter: '{field}'."
        ),
        Reason.MODEL_NOT_FOUND: Entry(
            grpc.StatusCode.NOT_FOUND,
            404,
            _REQUEST,
            "model_not_found",
            "The model '{model}' does not exist or you do not have access to it.",
        ),
        Reason.RATE_LIMIT_EXCEEDED: Entry(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            429,
            "rate_limit_exceeded",
            "rate_limit_exceeded",
            "Rate limit reached. Please slow down and try again.",
        ),
        Reason.INSUFFICIENT_QUOTA: Entry(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            429,
            "insufficient_quota",
            "insufficient_quota",
            "You exceeded your current quota, please check your budgets.",
        ),
        Reason.MODEL_NOT_PRICED: Entry(
            grpc.StatusCode.FAILED_PRECONDITION,
            500,
            _SERVER,
            "model_not_priced",
            "The model '{model}' has no price, so it cannot be used. An administrator must set one; zero is allowed.",
        ),
        Reason.IDEMPOTENCY_KEY_REUSED: Entry(
            grpc.StatusCode.INVALID_ARGUMENT,
            422,
            _REQUEST,
            "idempotency_key_reused",
            "This Idempotency-Key was used with another request.",
        ),
        Reason.IDEMPOTENCY_KEY_IN_USE: Entry(
            grpc.StatusCode.ABORTED,
            409,
            _REQUEST,
            "idempotency_key_in_use",
            "A request with this Idempotency-Key is still running. Please try again later.",
        ),
        Reason.USAGE_UNRECORDABLE: Entry(
            grpc.StatusCode.UNAVAILABLE,
            503,
            _SERVER,
            "usage_unrecordable",
            "Usage cannot be recorded at the moment. Please try again later.",
        ),
        Reason.AUTH_UNAVAILABLE: Entry(
            grpc.StatusCode.UNAVAILABLE,
            503,
            _SERVER,
            "auth_unavailable",
            "Your credentials cannot be checked at the moment. Please try again later.",
        ),
        Reason.UNAVAILABLE: Entry(
            grpc.StatusCode.UNAVAILABLE,
            503,
            _SERVER,
            "unavailable",
            "The service is temporarily unavailable. Please try again later.",
        ),
        Reason.NO_BACKEND_AVAILABLE: Entry(
            grpc.StatusCode.UNAVAILABLE,
            503,
            _SERVER,
            "no_backend_available",
            "No backend can serve this model at the moment. Please try again later.",
        ),
        Reason.BACKEND_ERROR: Entry(
            grpc.StatusCode.UNAVAILABLE, 502, _SERVER, "backend_error", "The model failed to answer. Please try again."
        ),
        Reason.BACKEND_TIMEOUT: Entry(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            504,
            _SERVER,
            "backend_timeout",
            "The model took too long to answer. Please try again.",
        ),
        Reason.DEADLINE_EXCEEDED: Entry(
            grpc.StatusCode.DEADLINE_EXCEEDED, 504, _SERVER, "deadline_exceeded", "The request took too long."
        ),
        Reason.CANCELLED: Entry(grpc.StatusCode.CANCELLED, 499, _REQUEST, "cancelled", "The request was cancelled."),
        Reason.UNIMPLEMENTED: Entry(
            grpc.StatusCode.UNIMPLEMENTED, 501, _SERVER, "unimplemented", "This operation is not supported."
        ),
        Reason.METHOD_NOT_ALLOWED: Entry(
            grpc.StatusCode.UNIMPLEMENTED,
            405,
            _REQUEST,
            "method_not_allowed",
            "This method is not allowed for this URL.",
        ),
        Reason.ROUTE_NOT_FOUND: Entry(
            grpc.StatusCode.NOT_FOUND,
            404,
            _REQUEST,
            "unknown_url",
            "Invalid URL. Please check the method and the path.",
        ),
        Reason.UNSUPPORTED_MEDIA_TYPE: Entry(
            grpc.StatusCode.INVALID_ARGUMENT,
            415,
            _REQUEST,
            "unsupported_media_type",
            "Unsupported content type. Send the body as application/json.",
        ),
        Reason.HEADER_TOO_LARGE: Entry(
            grpc.StatusCode.INVALID_ARGUMENT,
            431,
            _REQUEST,
            "header_too_large",
            "The headers of the request are too large.",
        ),
        Reason.OVERLOADED: Entry(
            grpc.StatusCode.UNAVAILABLE,
            503,
            _SERVER,
            "overloaded",
            "The server is currently overloaded. Please try again later.",
        ),
        Reason.INTERNAL: Entry(
            grpc.StatusCode.INTERNAL,
            500,
            _SERVER,
            "internal_error",
            "The server had an error while processing your request.",
        ),
    }
)

# A caller must not learn from the answer that a resource of another organization exists.
_ANSWERED_AS = {Reason.ORGANIZATION_MISMATCH: Reason.NOT_FOUND}

# What a gRPC code means when it comes from the transport itself: no ErrorInfo of ours is with it.
_FROM_TRANSPORT = {
    grpc.StatusCode.UNAVAILABLE: Reason.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED: Reason.CANCELLED,
    # The peer does not know the method, being older than its contract.
    grpc.StatusCode.UNIMPLEMENTED: Reason.UNIMPLEMENTED,
}

# What a gRPC code means when a newer peer sends a reason that this version does not know.
_FROM_PEER = _FROM_TRANSPORT | {
    grpc.StatusCode.UNAUTHENTICATED: Reason.API_KEY_INVALID,
    grpc.StatusCode.PERMISSION_DENIED: Reason.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND: Reason.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS: Reason.ALREADY_EXISTS,
    grpc.StatusCode.INVALID_ARGUMENT: Reason.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION: Reason.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.RATE_LIMIT_EXCEEDED,
}

_CODES = {int(code.value[0]): code for code in grpc.StatusCode}


class Violation(NamedTuple):
    """One field of a request that is wrong, as the caller wrote it, and what is wrong with it."""

    field: str
    description: str


class PlatformError(Exception):
    """The one exception that crosses rooms.

    `field` names the request field that is wrong, as the caller wrote it; `violations` tell every one, where there are
    several (`together` makes such an error). `description` replaces the catalog's
    sentence and is public: it never holds a secret, a prompt or another tenant's data. `retry_after_s` tells in how
    many seconds another try makes sense. Details fill the sentence's placeholders and travel as ErrorInfo metadata;
    "x-should-retry" is "false" where no wait would help, and a rate limit's x-ratelimit-* become headers.
    """

    def __init__(
        self,
        reason: Reason,
        *,
        field: str | None = None,
        description: str | None = None,
        retry_after_s: float | None = None,
        violations: Sequence[Violation] = (),
        **details: str,
    ) -> None:
        self.reason = reason
        if violations and field is None:
            field = violations[0].field
        self.field = None if field is None else _clean(field, _DETAIL_LENGTH)
        self.retry_after_s = retry_after_s
        self.details: Mapping[str, str] = {name: _clean(value, _DETAIL_LENGTH) for name, value in details.items()}
        placeholders = _Placeholders(self.details)
        if self.field is not None:
            placeholders["field"] = self.field
        text = self.entry.sentence.format_map(placeholders) if description is None else description
        self.message = _clean(text, _MESSAGE_LENGTH)
        self.violations = _bounded(violations)
        if self.field is not None and not self.violations:
            self.violations = (Violation(self.field, self.message),)
        super().__init__(f"{reason.value}: {self.message}")

    @property
    def entry(self) -> Entry:
        """The catalog's entry for the reason."""
        return CATALOG[self.reason]


class _Placeholders(dict[str, str]):
    def __missing__(self, key: str) -> str:
        # A raise site that forgot a detail must still deliver its error.
        return key


def _bounded(violations: Sequence[Violation]) -> tuple[Violation, ...]:
    """As many of them as an answer has room for."""
    kept: list[Violation] = []
    room = _VIOLATIONS_LENGTH
    for field, description in violations:
        violation = Violation(_clean(field, _DETAIL_LENGTH), _clean(description, 2 * _DETAIL_LENGTH))
        room -= sum(len(text.encode()) for text in violation)
        if room < 0:
            break
        kept.append(violation)
    return tuple(kept)


def together(errors: Sequence[PlatformError]) -> PlatformError:
    """One error for several that each name fields: the first one's reason, and all that is wrong."""
    first, *others = errors
    if not others:
        return first
    violations = [violation for error in errors for violation in error.violations]
    also = ", ".join(f"'{violation.field}'" for violation in violations[len(first.violations) :])
    return PlatformError(
        first.reason, field=first.field, description=f"{first.message} Also wrong: {also}.", violations=violations
    )


def _clean(text: str, length: int) -> str:
    """`text` as UTF-8 of at most `length` characters; JSON can smuggle in lone surrogates, which protobuf refuses.

    A client may have written its key where a name belongs, and whoever reads its errors must not read that.
    """
    text = str(text)
    if len(text) >= _LEAST_CREDENTIAL:
        text = CREDENTIAL.sub(REDACTED, text)
    return text[:length].encode("utf-8", "replace").decode("utf-8")


def as_platform_error(error: BaseException) -> PlatformError:
    """`error` itself if it is ours, a peer's error as it was raised there, else INTERNAL with a fixed sentence."""
    if isinstance(error, PlatformError):
        return error
    if isinstance(error, grpc.aio.AioRpcError):
        return from_rpc_error(error)
    return PlatformError(Reason.INTERNAL)


def to_status(error: BaseException) -> status_pb2.Status:
    """The error as google.rpc.Status: ErrorInfo with the reason in upper case (AIP-193), and what else applies of
    BadRequest, RetryInfo and QuotaFailure."""
    known = as_platform_error(error)
    reason = _ANSWERED_AS.get(known.reason, known.reason)
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=reason.value.upper(), domain=DOMAIN, metadata=known.details)
    ]
    if known.violations:
        bad = [error_details_pb2.BadRequest.FieldViolation(field=at, description=said) for at, said in known.violations]
        details.append(error_details_pb2.BadRequest(field_violations=bad))
    if known.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(max(0, math.ceil(known.retry_after_s * 1000)))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if reason is Reason.INSUFFICIENT_QUOTA:
        subject = known.details.get("budget_id", "")
        exhausted = error_details_pb2.QuotaFailure.Violation(subject=subject, description=known.message)
        details.append(error_details_pb2.QuotaFailure(violations=[exhausted]))
    status = status_pb2.Status(code=int(CATALOG[reason].grpc.value[0]), message=known.message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def from_status(status: status_pb2.Status) -> PlatformError:
    """The error that a peer put into `status` with `to_status`; a status that is not ours becomes one of UNAVAILABLE,
    DEADLINE_EXCEEDED, CANCELLED, UNIMPLEMENTED and INTERNAL."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry_info = error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, bad_request, retry_info):
            detail.Unpack(message)  # it does nothing to a message of another type
    if info.domain != DOMAIN:
        return PlatformError(_FROM_TRANSPORT.get(code, Reason.INTERNAL))
    try:
        reason = Reason(info.reason.lower())
    except ValueError:
        reason = _FROM_PEER.get(code, Reason.INTERNAL)
    error = PlatformError(
        reason,
        description=status.message or None,
        violations=[Violation(bad.field, bad.description) for bad in bad_request.field_violations],
        retry_after_s=(retry_info.retry_delay.ToMilliseconds() / 1000 if retry_info.HasField("retry_delay") else None),
    )
    # Metadata keys are another process's words; as keyword arguments they could collide with ours.
    error.details = {name: _clean(value, _DETAIL_LENGTH) for name, value in info.metadata.items()}
    return error


def from_rpc_error(error: grpc.aio.AioRpcError) -> PlatformError:
    """The error behind a failed call: a peer's PlatformError as it was raised there, or what the transport met."""
    metadata: Any = error.trailing_metadata()  # grpc-stubs give it the type of the synchronous API
    details = None if metadata is None else metadata.get(_STATUS_DETAILS_KEY)
    if isinstance(details, bytes):
        with suppress(DecodeError):
            return from_status(status_pb2.Status.FromString(details))
    return PlatformError(_FROM_TRANSPORT.get(error.code(), Reason.INTERNAL))


def http_status(error: BaseException) -> int:
    """The HTTP status of the error."""
    return as_platform_error(error).entry.http


def to_openai(error: BaseException) -> dict[str, Any]:
    """The error as OpenAI's API writes it; all four keys are always there."""
    known = as_platform_error(error)
    return {
        "error": {
            "message": known.message,
            "type": known.entry.openai_type,
            "param": known.field,
            "code": known.entry.openai_code,
        }
    }


def to_aip193(error: BaseException) -> dict[str, Any]:
    """The error as Google's AIP-193 writes a google.rpc.Status in JSON."""
    known = as_platform_error(error)
    return {
        "error": {
            "code": known.entry.http,
            "message": known.message,
            "status": known.entry.grpc.name,
            "details": [json_format.MessageToDict(detail) for detail in to_status(known).details],
        }
    }


_NOT_TO_RETRY = frozenset({Reason.INSUFFICIENT_QUOTA, Reason.MODEL_NOT_PRICED})


def response_headers(error: BaseException) -> dict[str, str]:
    """The headers that an HTTP answer with this error carries besides its content type."""
    known = as_platform_error(error)
    headers: dict[str, str] = {}
    if known.entry.http == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if known.reason is Reason.RATE_LIMIT_EXCEEDED:
        headers |= {name: value for name, value in known.details.items() if name.startswith("x-ratelimit-")}
    if known.reason in _NOT_TO_RETRY or known.details.get("x-should-retry") == "false":
        # OpenAI's clients retry every 429 and 500 unless told otherwise.
        headers["x-should-retry"] = "false"
    elif known.retry_after_s is not None or known.entry.http in (429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(known.retry_after_s or 0)))
    return headers

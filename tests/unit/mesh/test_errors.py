"""The error catalog: every reason in gRPC, in OpenAI's JSON and in AIP-193."""

import string
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from mesh import tokens
from mesh.errors import (
    CATALOG,
    PlatformError,
    Reason,
    from_rpc_error,
    from_status,
    response_headers,
    to_aip193,
    to_openai,
    to_status,
    together,
)


def rpc_error(code: grpc.StatusCode, status: bytes | None = None) -> grpc.aio.AioRpcError:
    trailers = grpc.aio.Metadata() if status is None else grpc.aio.Metadata(("grpc-status-details-bin", status))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, "internal words of the transport", None)


def test_every_reason_is_in_the_catalog() -> None:
    assert set(CATALOG) == set(Reason)


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_comes_back_from_a_peer_as_it_was_raised(reason: Reason) -> None:
    raised = PlatformError(reason, field="model", retry_after_s=1.5, model="smollm2")
    status = to_status(raised)
    received = from_rpc_error(rpc_error(raised.entry.grpc, status.SerializeToString()))

    assert received.reason is (Reason.NOT_FOUND if reason is Reason.ORGANIZATION_MISMATCH else reason)
    assert received.message == raised.message
    assert received.field == "model"
    assert received.retry_after_s == 1.5
    assert received.details == {"model": "smollm2"}


@pytest.mark.parametrize("reason", Reason)
def test_every_error_has_all_four_openai_keys(reason: Reason) -> None:
    error = to_openai(PlatformError(reason))["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["message"]
    assert not set("{}") & set(error["message"])


def test_placeholders_are_filled_from_field_or_details_only() -> None:
    names = {name for entry in CATALOG.values() for _, name, _, _ in string.Formatter().parse(entry.sentence) if name}
    assert names == {"field", "model"}


def test_an_unknown_model_is_told_as_openai_tells_it() -> None:
    error = PlatformError(Reason.MODEL_NOT_FOUND, field="model", model="gpt-9")
    assert to_openai(error) == {
        "error": {
            "message": "The model 'gpt-9' does not exist or you do not have access to it.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


def test_a_wrong_key_is_told_as_openai_tells_it() -> None:
    error = PlatformError(Reason.API_KEY_INVALID)
    assert to_openai(error)["error"]["message"] == "Incorrect API key provided."
    assert to_openai(error)["error"]["code"] == "invalid_api_key"
    assert response_headers(error) == {"WWW-Authenticate": "Bearer"}


def test_another_organizations_resource_looks_like_one_that_does_not_exist() -> None:
    other, none = PlatformError(Reason.ORGANIZATION_MISMATCH), PlatformError(Reason.NOT_FOUND)
    assert to_status(other) == to_status(none)
    assert to_aip193(other) == to_aip193(none)
    assert to_openai(other) == to_openai(none)


def test_aip193_names_the_field_the_reason_and_the_delay() -> None:
    error = PlatformError(Reason.INVALID_ARGUMENT, field="page_size", description="It must be positive.", limit="1000")
    assert to_aip193(error)["error"] == {
        "code": 400,
        "message": "It must be positive.",
        "status": "INVALID_ARGUMENT",
        "details": [
            {
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "reason": "INVALID_ARGUMENT",
                "domain": "aiaas",
                "metadata": {"limit": "1000"},
            },
            {
                "@type": "type.googleapis.com/google.rpc.BadRequest",
                "fieldViolations": [{"field": "page_size", "description": "It must be positive."}],
            },
        ],
    }
    waiting = to_aip193(PlatformError(Reason.UNAVAILABLE, retry_after_s=1.5))["error"]["details"][1]
    assert waiting == {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "1.500s"}


def test_an_exhausted_budget_is_a_quota_failure_that_clients_do_not_retry() -> None:
    error = PlatformError(Reason.INSUFFICIENT_QUOTA, budget_id="bud_1")
    body = to_aip193(error)["error"]
    assert body["code"] == 429
    assert body["details"][-1]["@type"] == "type.googleapis.com/google.rpc.QuotaFailure"
    assert body["details"][-1]["violations"][0]["subject"] == "bud_1"
    assert to_openai(error)["error"]["type"] == "insufficient_quota"
    assert response_headers(error) == {"x-should-retry": "false"}


@pytest.mark.parametrize(("delay", "header"), [(None, "1"), (0.0, "1"), (0.2, "1"), (1.2, "2"), (30.0, "30")])
def test_a_rate_limit_says_when_to_come_back_in_whole_seconds(delay: float | None, header: str) -> None:
    error = PlatformError(Reason.RATE_LIMIT_EXCEEDED, retry_after_s=delay)
    assert response_headers(error) == {"Retry-After": header}
    assert error.entry.openai_code == "rate_limit_exceeded"


def test_what_is_left_of_a_rate_limit_reaches_the_client_through_a_peer() -> None:
    details: dict[str, Any] = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m30s"}
    raised = PlatformError(Reason.RATE_LIMIT_EXCEEDED, retry_after_s=1.5, **details)
    assert response_headers(from_status(to_status(raised))) == {
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m30s",
        "Retry-After": "2",
    }


def test_a_request_that_no_wait_would_help_is_not_to_be_tried_again() -> None:
    details: dict[str, Any] = {"x-should-retry": "false"}
    raised = PlatformError(Reason.RATE_LIMIT_EXCEEDED, **details)
    assert response_headers(from_status(to_status(raised))) == {"x-should-retry": "false"}


def test_only_a_rate_limit_has_its_headers() -> None:
    details: dict[str, Any] = {"x-ratelimit-remaining-requests": "0"}
    assert response_headers(PlatformError(Reason.NOT_FOUND, **details)) == {}


def test_no_outage_is_told_as_a_wrong_credential() -> None:
    for reason, entry in CATALOG.items():
        if "unavailable" in reason.value or entry.openai_type == "server_error":
            assert entry.http >= 500
            assert entry.grpc is not grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("kind", tokens.CREDENTIALS)
def test_a_credential_in_the_place_of_a_name_is_not_repeated(kind: tokens.TokenKind) -> None:
    text = kind.generate().text
    error = PlatformError(Reason.MODEL_NOT_FOUND, field=text, model=f"my-{text}")
    told = PlatformError(Reason.INVALID_ARGUMENT, description=f"'{text}' is no model.")
    for shown in (error, told, from_status(to_status(error))):
        assert text.rpartition("_")[2] not in f"{shown} {shown.field} {shown.details} {to_openai(shown)}"
    assert error.message.startswith("The model 'my-[redacted]' does not exist")


@pytest.mark.parametrize("code", grpc.StatusCode)
def test_a_transport_failure_never_becomes_a_refusal(code: grpc.StatusCode) -> None:
    expected = {
        grpc.StatusCode.UNAVAILABLE: Reason.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED: Reason.CANCELLED,
        grpc.StatusCode.UNIMPLEMENTED: Reason.UNIMPLEMENTED,
    }
    error = from_rpc_error(rpc_error(code))
    assert error.reason is expected.get(code, Reason.INTERNAL)
    assert "internal words" not in error.message


def test_a_reason_of_a_newer_peer_keeps_its_code_and_sentence() -> None:
    status = status_pb2.Status(code=5, message="There is no such planet.")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="PLANET_NOT_FOUND", domain="aiaas"))
    error = from_status(status)
    assert (error.reason, error.message) == (Reason.NOT_FOUND, "There is no such planet.")


def test_metadata_of_a_peer_may_have_any_name() -> None:
    status = to_status(PlatformError(Reason.NOT_FOUND))
    info = error_details_pb2.ErrorInfo(reason="NOT_FOUND", domain="aiaas", metadata={"field": "x", "reason": "y"})
    del status.details[:]
    status.details.add().Pack(info)
    assert from_status(status).details == {"field": "x", "reason": "y"}


@pytest.mark.parametrize(
    "status",
    [
        b"\xff\xff\xff",
        status_pb2.Status(
            code=5, details=[any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")]
        ).SerializeToString(),
    ],
)
def test_broken_status_details_are_an_internal_error(status: bytes) -> None:
    assert from_rpc_error(rpc_error(grpc.StatusCode.NOT_FOUND, status)).reason is Reason.INTERNAL


@pytest.mark.parametrize("error", [ValueError("the database password is hunter2"), KeyError("x"), TimeoutError()])
def test_an_unknown_exception_is_told_with_a_fixed_sentence(error: Exception) -> None:
    sentence = CATALOG[Reason.INTERNAL].sentence
    assert to_openai(error)["error"]["message"] == sentence
    assert to_status(error).message == sentence
    assert to_aip193(error)["error"]["code"] == 500


def test_an_error_fits_into_grpc_trailers_whatever_the_client_sent() -> None:
    error = PlatformError(Reason.MODEL_NOT_FOUND, field="é" * 9000, model="\ud800" * 100_000, description="é" * 50_000)
    assert to_status(error).ByteSize() < 6000


def test_several_wrong_fields_cross_grpc_and_fit_into_its_trailers() -> None:
    errors = [PlatformError(Reason.INVALID_ARGUMENT, field=f"a.b{n}", description=f"{n} is wrong.") for n in range(3)]
    raised = together(errors)
    received = from_status(to_status(raised))
    assert (raised.field, received.field) == ("a.b0", "a.b0")
    assert received.violations == raised.violations == tuple((f"a.b{n}", f"{n} is wrong.") for n in range(3))
    assert received.message == "0 is wrong. Also wrong: 'a.b1', 'a.b2'."
    assert [bad["field"] for bad in to_aip193(received)["error"]["details"][1]["fieldViolations"]] == [
        "a.b0",
        "a.b1",
        "a.b2",
    ]
    assert to_openai(received)["error"]["param"] == "a.b0"
    many = [PlatformError(Reason.INVALID_ARGUMENT, field="é" * 300, description="é" * 2000) for _ in range(1000)]
    assert to_status(together(many)).ByteSize() < 6000


def test_one_wrong_field_is_told_as_it_was() -> None:
    alone = PlatformError(Reason.UNKNOWN_FIELD, field="x")
    assert together([alone]) is alone


def test_a_client_cannot_format_the_sentence() -> None:
    error = PlatformError(Reason.MODEL_NOT_FOUND, model="{field} {0.__class__}")
    assert "'{field} {0.__class__}'" in error.message


def test_a_forgotten_detail_does_not_hide_the_error() -> None:
    assert PlatformError(Reason.MODEL_NOT_FOUND).message.startswith("The model 'model' does not exist")

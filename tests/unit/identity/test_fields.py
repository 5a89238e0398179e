"""What fields may hold."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity import fields
from mesh.auth import ModelRateLimits, RateLimits
from mesh.errors import PlatformError, Reason

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def field_refused(check: Callable[[], object]) -> str | None:
    with pytest.raises(PlatformError) as raised:
        check()
    assert raised.value.reason is Reason.INVALID_ARGUMENT
    return raised.value.field


@pytest.mark.parametrize("name", ["A", "Ада Лавлейс", "株式会社", "👩‍💻 team", "x" * 200])
def test_names_of_all_the_world_are_accepted(name: str) -> None:
    fields.check_display_name(name, "f")


@pytest.mark.parametrize("name", ["", " ", "x" * 201, "a\tb", "a\x7fb", "a\x00", "a\u2029b", "\ud800"])
def test_empty_long_and_unprintable_names_are_refused(name: str) -> None:
    assert field_refused(lambda: fields.check_display_name(name, "f")) == "f"


@pytest.mark.parametrize("email", ["a@example.com", "a.b+c@mail.example.co.uk", "o'neil@example.org", "A@EXAMPLE.COM"])
def test_usual_addresses_are_accepted(email: str) -> None:
    fields.check_email(email, "f")


@given(st.text())
def test_no_text_makes_the_check_of_an_address_fail_otherwise(text: str) -> None:
    try:
        fields.check_email(text, "f")
    except PlatformError:
        return
    assert text.isascii()
    assert text.count("@") == 1


def test_networks_get_their_usual_spelling() -> None:
    assert fields.checked_networks(["2001:DB8:0::/32", "192.0.2.1"], "f") == ("2001:db8::/32", "192.0.2.1/32")


@pytest.mark.parametrize("network", ["", "10.0.0.1/8", "300.0.0.0/8", "10.0.0.0/33", "example.com", "10.0.0.0/8 "])
def test_what_is_no_network_is_refused(network: str) -> None:
    assert field_refused(lambda: fields.checked_networks([network], "f")) == "f"


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (RateLimits(requests_per_second=0), "f.limit_requests_per_second"),
        (RateLimits(requests_per_second=float("inf")), "f.limit_requests_per_second"),
        (RateLimits(burst_requests=0), "f.burst_requests"),
        (RateLimits(tokens_per_minute=-1), "f.limit_tokens_per_minute"),
        (RateLimits(concurrent_requests=1 << 60), "f.limit_concurrent_requests"),
        (RateLimits(models=(ModelRateLimits("a b"),)), "f.models"),
        (RateLimits(models=(ModelRateLimits("a"), ModelRateLimits("a"))), "f.models"),
        (
            RateLimits(models=(ModelRateLimits("a"), ModelRateLimits("b", tokens_per_minute=0))),
            "f.models[1].limit_tokens_per_minute",
        ),
    ],
)
def test_limits_out_of_reason_are_refused_by_name(limits: RateLimits, field: str) -> None:
    assert field_refused(lambda: fields.check_rate_limits(limits, "f")) == field


def test_expiry_lies_in_the_future() -> None:
    fields.check_expire_time(None, NOW, "f")
    fields.check_expire_time(NOW + timedelta(seconds=1), NOW, "f")
    assert field_refused(lambda: fields.check_expire_time(NOW, NOW, "f")) == "f"


def test_all_checks_are_made_and_every_field_that_fails_is_named() -> None:
    limits = RateLimits(requests_per_second=-1, burst_requests=0, tokens_per_minute=5)
    with pytest.raises(PlatformError) as raised:
        fields.check_all(
            lambda: fields.check_display_name("", "key.display_name"),
            lambda: fields.check_email("ada@acme.example", "key.email"),
            lambda: fields.check_rate_limits(limits, "key.limits"),
            lambda: fields.require(False, "key.last", "is wrong"),
        )
    assert [violation.field for violation in raised.value.violations] == [
        "key.display_name",
        "key.limits.limit_requests_per_second",
        "key.limits.burst_requests",
        "key.last",
    ]


def test_what_is_no_fault_of_a_field_is_raised_at_once() -> None:
    def away() -> None:
        raise PlatformError(Reason.UNAVAILABLE)

    with pytest.raises(PlatformError) as raised:
        fields.check_all(lambda: fields.check_display_name("", "f"), away)
    assert raised.value.reason is Reason.UNAVAILABLE

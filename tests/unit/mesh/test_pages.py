"""Page sizes, page tokens, and where a page is cut."""

import base64
from datetime import UTC, datetime

import msgspec
import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from aiaas.identity.v1.role_service_pb2 import ListRolesRequest
from aiaas.identity.v1.user_service_pb2 import ListUsersRequest, User
from mesh.errors import PlatformError, Reason
from mesh.pages import PAGE_BYTES, IdPlace, TimePlace, cut, read_page_size, read_token, write_token

PLACE = TimePlace(datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC), "user_1")


def wrong_field(request: Message, place: type[msgspec.Struct] = TimePlace) -> str | None:
    with pytest.raises(PlatformError) as caught:
        read_token(request, place)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    return caught.value.field


def page(*names: str, size: int) -> tuple[list[str], str]:
    """What is shown of users with these display names, and the token of the next page."""
    request = ListUsersRequest(organization_id="org_1")
    messages, token = cut(request, names, size, lambda name: User(display_name=name), lambda name: IdPlace(name[:9]))
    return [message.display_name for message in messages], token


@given(
    st.datetimes(datetime(1970, 1, 1), datetime(9000, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001 - zone is given
    st.text(alphabet="abcXYZ_019", min_size=1),
)
def test_token_leads_back_to_where_the_page_ended(moment: datetime, row_id: str) -> None:
    request = ListUsersRequest(organization_id="org_1", page_size=2)
    place = TimePlace(moment, row_id)
    again = ListUsersRequest(organization_id="org_1", page_size=9, page_token=write_token(request, place))
    assert read_token(again, TimePlace) == place


def test_first_page_comes_after_nothing() -> None:
    assert read_token(ListUsersRequest(organization_id="org_1"), TimePlace) is None


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80))
def test_text_that_is_no_token_is_refused(text: str) -> None:
    assert wrong_field(ListUsersRequest(page_token=text)) == "page_token"


def test_token_of_another_request_is_refused() -> None:
    token = write_token(ListUsersRequest(organization_id="org_1"), PLACE)
    others: list[Message] = [
        ListUsersRequest(organization_id="org_2", page_token=token),
        ListUsersRequest(organization_id="org_1", email="a@b.example", page_token=token),
        # Of another list, with the same fields.
        ListRolesRequest(organization_id="org_1", page_token=token),
    ]
    for other in others:
        assert wrong_field(other) == "page_token"


def test_token_with_any_byte_changed_is_refused() -> None:
    request = ListUsersRequest(organization_id="org_1")
    token = write_token(request, PLACE)
    raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    for index in range(len(raw)):
        changed = raw[:index] + bytes([raw[index] ^ 1]) + raw[index + 1 :]
        request.page_token = base64.urlsafe_b64encode(changed).decode().rstrip("=")
        assert wrong_field(request) == "page_token"


@pytest.mark.parametrize(
    "place",
    [
        IdPlace("user_1"),
        TimePlace(PLACE.create_time.replace(tzinfo=None), "user_1"),
        TimePlace(PLACE.create_time, "user\0"),
    ],
)
def test_forged_token_that_means_nothing_is_refused(place: msgspec.Struct) -> None:
    request = ListUsersRequest(organization_id="org_1")
    request.page_token = write_token(request, place)
    assert wrong_field(request) == "page_token"


def test_sizes_are_bounded() -> None:
    assert [read_page_size(asked) for asked in (0, 1, 500, 501)] == [50, 1, 500, 500]
    assert [read_page_size(asked, 7, 9) for asked in (0, 8, 10)] == [7, 8, 9]
    with pytest.raises(PlatformError) as caught:
        read_page_size(-1)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_ARGUMENT, "page_size")


def test_only_the_last_page_has_no_token() -> None:
    request = ListUsersRequest(organization_id="org_1")
    assert page("a", "b", "c", size=2) == (["a", "b"], write_token(request, IdPlace("b")))
    assert page("a", "b", size=2) == (["a", "b"], "")
    assert page(size=2) == ([], "")


def test_page_ends_before_it_grows_beyond_a_message() -> None:
    request = ListUsersRequest(organization_id="org_1")
    third, whole = "x" * (PAGE_BYTES // 3), "y" * PAGE_BYTES
    assert page(third, third, third, size=9) == ([third, third], write_token(request, IdPlace(third[:9])))
    assert page(whole, third, size=9) == ([whole], write_token(request, IdPlace(whole[:9])))

"""Page tokens."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.pages import Cursor, read_page
from mesh.errors import PlatformError, Reason

MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def token_after(cursor: Cursor, *list_name: str) -> str:
    return read_page(1, "", *list_name).cut([cursor, cursor], lambda row: row)[1]


@given(
    st.datetimes(datetime(1970, 1, 1), datetime(9000, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001 - zone is given
    st.text(alphabet="abcXYZ_019", min_size=1),
)
def test_token_leads_back_to_where_the_page_ended(moment: datetime, row_id: str) -> None:
    cursor = Cursor(moment, row_id)
    assert read_page(1, token_after(cursor, "keys", "org_1"), "keys", "org_1").after == cursor


@given(st.text(max_size=80))
def test_text_that_is_no_token_is_refused(text: str) -> None:
    if not text:
        return
    with pytest.raises(PlatformError) as raised:
        read_page(1, text, "keys")
    assert (raised.value.reason, raised.value.field) == (Reason.INVALID_ARGUMENT, "page_token")


def test_token_of_another_list_is_refused() -> None:
    token = token_after(Cursor(MOMENT, "key_1"), "keys", "org_1")
    for list_name in (("keys", "org_2"), ("users", "org_1"), ("keysorg_1",), ("keys", "org_1", "")):
        with pytest.raises(PlatformError, match="page_token"):
            read_page(1, token, *list_name)


def test_last_page_has_no_token_and_sizes_are_bounded() -> None:
    rows = [Cursor(MOMENT, str(number)) for number in range(3)]
    assert read_page(3, "", "keys").cut(rows, lambda row: row) == (rows, "")
    assert read_page(3, "", "keys").cut([], lambda row: row) == ([], "")
    assert [read_page(size, "", "keys").size for size in (0, 1, 500, 501)] == [50, 1, 500, 500]

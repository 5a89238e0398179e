"""API keys: form, checksum, digest."""

import hashlib
import zlib
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import api_key
from mesh.errors import PlatformError, Reason
from mesh.ids import ALPHABET, base62
from tests.doubles.clock import ManualClock

KEY = api_key.generate(Random(7), clock=ManualClock())


def assert_refused(text: str) -> None:
    with pytest.raises(PlatformError) as raised:
        api_key.parse(text)
    assert raised.value.reason is Reason.API_KEY_INVALID
    assert len(text) < 4 or text not in str(raised.value)


def test_a_key_reads_back_as_it_was_made() -> None:
    key = api_key.generate()
    parsed = api_key.parse(key.text)
    assert parsed.key_id == key.key_id
    assert parsed.digest == key.digest == hashlib.sha256(key.text.encode()).digest()
    assert api_key.matches(parsed, key.digest)


def test_the_form_is_prefix_id_secret_and_checksum_of_all_before_it() -> None:
    assert KEY.text.startswith(f"aias_{KEY.key_id}_")
    secret = KEY.text.removeprefix(f"aias_{KEY.key_id}_")
    assert len(secret) == 32 + 6
    assert 62**32 > 2**160
    assert KEY.text[-6:] == base62(zlib.crc32(KEY.text[:-6].encode()), 6)


def test_every_key_is_another() -> None:
    assert len({api_key.generate().text for _ in range(1000)}) == 1000


def test_another_key_does_not_match() -> None:
    assert not api_key.matches(api_key.parse(KEY.text), api_key.generate().digest)


@given(position=st.integers(0, len(KEY.text) - 1), character=st.sampled_from(ALPHABET + "_"))
def test_one_changed_character_is_refused(position: int, character: str) -> None:
    text = KEY.text[:position] + character + KEY.text[position + 1 :]
    if text != KEY.text:
        assert_refused(text)


@given(st.text(max_size=100))
def test_anything_else_is_refused(text: str) -> None:
    assert_refused(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "aias_",
        KEY.text[:-1],
        KEY.text + "0",
        KEY.text + "\n",
        " " + KEY.text,
        KEY.text.upper(),
        KEY.text.replace("aias_", "sk-", 1),
        KEY.text[:-3] + "٣٤٥",
        KEY.digest.hex(),
        "aias_" + "A" * 10_000_000,
    ],
)
def test_a_broken_form_is_refused(text: str) -> None:
    assert_refused(text)


def test_the_text_is_not_in_the_representation() -> None:
    secret = KEY.text.rpartition("_")[2]
    assert secret not in repr(KEY)
    assert secret not in repr(api_key.parse(KEY.text))

"""Tokens: form, checksum, digest."""

import hashlib
import zlib
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import tokens
from mesh.errors import PlatformError, Reason
from mesh.ids import ALPHABET, base62
from tests.doubles.clock import ManualClock

KEY = tokens.API_KEY.generate(Random(7), clock=ManualClock())


def assert_refused(text: str) -> None:
    with pytest.raises(PlatformError) as raised:
        tokens.API_KEY.parse(text)
    assert raised.value.reason is Reason.API_KEY_INVALID
    assert len(text) < 4 or text not in str(raised.value)


def test_a_key_reads_back_as_it_was_made() -> None:
    key = tokens.API_KEY.generate()
    parsed = tokens.API_KEY.parse(key.text)
    assert parsed.id == key.id
    assert parsed.digest == key.digest == hashlib.sha256(key.text.encode()).digest()
    assert tokens.matches(parsed, key.digest)


def test_the_form_is_prefix_id_secret_and_checksum_of_all_before_it() -> None:
    assert KEY.text.startswith(f"aias_{KEY.id}_")
    secret = KEY.text.removeprefix(f"aias_{KEY.id}_")
    assert len(secret) == 32 + 6
    assert 62**32 > 2**160
    assert KEY.text[-6:] == base62(zlib.crc32(KEY.text[:-6].encode()), 6)


def test_every_key_is_another() -> None:
    assert len({tokens.API_KEY.generate().text for _ in range(1000)}) == 1000


def test_another_key_does_not_match() -> None:
    assert not tokens.matches(tokens.API_KEY.parse(KEY.text), tokens.API_KEY.generate().digest)


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
    assert secret not in repr(tokens.API_KEY.parse(KEY.text))


def test_a_token_of_one_kind_is_none_of_another() -> None:
    for kind in tokens.CREDENTIALS:
        text = kind.generate().text
        assert [other for other in tokens.CREDENTIALS if text.startswith(other.prefix)] == [kind]
        assert kind.parse(text).id in text


def test_a_new_secret_of_an_id_is_another_token_of_that_id() -> None:
    other = tokens.API_KEY.generate_for(KEY.id)
    assert tokens.API_KEY.parse(other.text).id == KEY.id
    assert other.digest != KEY.digest

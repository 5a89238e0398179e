"""What is stored of a secret tells nothing, and opens for its own row and key alone."""

import base64
import re

import pytest
from cryptography.exceptions import InvalidTag

from mesh.sealing import KEY_PATTERN, Seal

KEY = base64.b64encode(bytes(range(32))).decode()
SECRET = b"a secret of thirty-two bytes ...."


def test_sealed_secret_opens_again() -> None:
    sealed = Seal(KEY).close(SECRET, "row_1")
    assert SECRET not in sealed
    assert Seal(KEY).open(sealed, "row_1") == SECRET


def test_same_secret_is_sealed_differently_each_time() -> None:
    seal = Seal(KEY)
    assert len({seal.close(SECRET, "row_1") for _ in range(10)}) == 10


def test_sealed_secret_of_another_row_does_not_open() -> None:
    sealed = Seal(KEY).close(SECRET, "row_1")
    with pytest.raises(InvalidTag):
        Seal(KEY).open(sealed, "row_2")


def test_another_key_does_not_open_it() -> None:
    sealed = Seal(KEY).close(SECRET, "row_1")
    with pytest.raises(InvalidTag):
        Seal(base64.b64encode(bytes(32)).decode()).open(sealed, "row_1")


@pytest.mark.parametrize("place", [0, 11, 12, -1])
def test_changed_byte_is_noticed(place: int) -> None:
    sealed = bytearray(Seal(KEY).close(SECRET, "row_1"))
    sealed[place] ^= 1
    with pytest.raises(InvalidTag):
        Seal(KEY).open(bytes(sealed), "row_1")


@pytest.mark.parametrize(
    "key",
    [
        "",
        base64.b64encode(bytes(16)).decode(),
        base64.b64encode(bytes(33)).decode(),
        KEY + "\n\n",
        base64.urlsafe_b64encode(b"\xff" * 32).decode(),
    ],
)
def test_key_of_another_form_is_no_configuration(key: str) -> None:
    assert re.search(KEY_PATTERN, KEY)
    assert not re.search(KEY_PATTERN, key)

"""Which addresses of others may be called."""

import pytest

from mesh.addresses import is_public, wrong_with

PRIVATE = [
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "192.0.2.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "fc00::1",
    "fd12::1",
    "ff02::1",
    "2001:db8::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::",
    "2002:a00:1::",
]
PUBLIC = ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_address_is_none_of_the_internets(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_address_is_one(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("url", ["https://example.com", "https://example.com:8443/a?b=c", "https://[2606:4700::1111]/"])
def test_https_to_the_internet_may_be(url: str) -> None:
    assert wrong_with(url, allow_private=False) is None


@pytest.mark.parametrize(
    "url",
    [
        *(f"https://[{address}]/" if ":" in address else f"https://{address}/" for address in PRIVATE),
        "https://localhost/",
        "https://a.localhost:99/",
    ],
)
def test_private_address_may_be_only_where_it_is_allowed(url: str) -> None:
    assert wrong_with(url, allow_private=False) == "must not lead into a private network"
    assert wrong_with(url, allow_private=True) is None


def test_http_may_be_only_where_private_networks_are_allowed() -> None:
    assert wrong_with("http://example.com", allow_private=False) == "must begin with https://"
    assert wrong_with("http://example.com", allow_private=True) is None


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "ftp://example.com",
        "file:///etc/passwd",
        "https://",
        "https:///path",
        "https://example.com:0",
        "https://example.com:99999",
        "https://example.com:x",
        "https://user@example.com",
        "https://user:word@example.com",
        "https://:word@example.com",
        "https://example.com/#fragment",
        "https://[::1",
        "https://exämple.com",
        "https://example.com/a b",
        "https://example.com/\n",
        "https://example.com/\0",
        f"https://example.com/{'a' * 2048}",
    ],
)
@pytest.mark.parametrize("allow_private", [True, False])
def test_anything_else_is_none(url: str, allow_private: bool) -> None:
    assert wrong_with(url, allow_private=allow_private)

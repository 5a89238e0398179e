"""Who a client is: where its connection comes from, or what proxies that are trusted say."""

import pytest

from mesh.config import ConfigError, load
from mesh.networks import ProxyConfig, client_of

PROXIES = ("10.0.0.0/8", "fd00::/8")


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        ("10.0.0.1", "192.0.2.1", "192.0.2.1"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("192.0.2.9", "192.0.2.1", "192.0.2.9"),
        # What the client wrote itself stands before what proxies have seen.
        ("10.0.0.1", "198.51.100.7, 192.0.2.1", "192.0.2.1"),
        ("10.0.0.1", "198.51.100.7,192.0.2.1 , 10.2.0.1", "192.0.2.1"),
        ("10.0.0.1", "10.3.0.1, 10.2.0.1", "10.3.0.1"),
        ("10.0.0.1", "192.0.2.1, unknown", "10.0.0.1"),
        ("10.0.0.1", "192.0.2.1, unknown, 10.2.0.1", "10.2.0.1"),
        ("::ffff:10.0.0.1", "::ffff:192.0.2.1", "192.0.2.1"),
        ("fd00::1", "2001:DB8::1", "2001:db8::1"),
        ("", "192.0.2.1", ""),
    ],
)
def test_client_is_the_last_that_is_no_trusted_proxy(peer: str, forwarded_for: str, client: str) -> None:
    assert client_of(peer, forwarded_for, PROXIES) == client
    assert client_of(peer, forwarded_for, ()) == peer


@pytest.mark.parametrize("network", ["10.0.0.0/33", "10.0.0.1/8", "everybody"])
def test_what_is_no_network_is_named(network: str) -> None:
    assert load(ProxyConfig, {"AIAAS_TRUSTED_PROXIES": "10.0.0.0/8,fd00::/8"}).trusted_proxies == PROXIES
    with pytest.raises(ConfigError, match=f"AIAAS_TRUSTED_PROXIES: .*{network}"):
        load(ProxyConfig, {"AIAAS_TRUSTED_PROXIES": f"10.0.0.0/8,{network}"})

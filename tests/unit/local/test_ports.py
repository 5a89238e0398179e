"""Ports of the local stack."""

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from deploy.local.errors import LocalError
from deploy.local.ports import PRIVATE_PORTS, _claims, free_port, require_free


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_private_ports_lie_below_those_the_kernel_gives_to_clients() -> None:
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        first, _ = file.read().split()
    assert PRIVATE_PORTS.stop <= int(first)


def test_no_port_is_handed_out_twice() -> None:
    ports = [free_port() for _ in range(200)]
    assert len(set(ports)) == 200
    assert all(port in PRIVATE_PORTS for port in ports)


def test_a_private_port_in_use_is_never_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, free = free_port(), free_port()
    for port in (taken, free):
        _claims.pop(port).close()
    with socket.create_server(("127.0.0.1", taken)):
        choices = iter([taken, free])
        monkeypatch.setattr("deploy.local.ports._random.choice", lambda ports: next(choices))
        assert free_port() == free


def test_port_that_another_process_was_given_is_never_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from deploy.local.ports import free_port; print(free_port(), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        given, free = int(other.stdout.readline()), free_port()
        _claims.pop(free).close()
        choices = iter([given, free])
        monkeypatch.setattr("deploy.local.ports._random.choice", lambda ports: next(choices))
        assert free_port() == free


def test_public_port_in_use_is_refused_with_what_to_do(listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    with pytest.raises(LocalError, match=rf"Port {port} is in use: stop .* make up PORT={port + 1}"):
        require_free(port)


def test_public_port_that_is_free_is_accepted(listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    listening.close()
    require_free(port)


@pytest.mark.parametrize("port", [-1, 65536])
def test_number_that_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(LocalError, match="There is no port"):
        require_free(port)

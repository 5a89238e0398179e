"""Ports of this machine: free private ones and the public one; never hands out one that a living process was given."""

import errno
import random
import socket

from deploy.local.errors import LocalError

# Below the range from which the kernel takes ports for outgoing connections, so that no client ever sits on one.
PRIVATE_PORTS = range(20000, 32000)
_claims: dict[int, socket.socket] = {}
_random = random.SystemRandom()


def free_port() -> int:
    """A private port on which nothing listens, chosen at random so that stacks started side by side do not meet.

    Raises LocalError when none of many tries was free.
    """
    for _ in range(1000):
        port = _random.choice(PRIVATE_PORTS)
        if _claim(port) and _refusal(port) is None:
            return port
    raise LocalError("No free port was found between 20000 and 31999: stop what holds them.")


def require_free(port: int) -> None:
    """Checks that the public port can be listened on. Raises LocalError with what to do otherwise."""
    if not 0 < port < 65536:
        raise LocalError(f"There is no port {port}: choose one from 1024 to 65535, for example make up PORT=8080.")
    refusal = _refusal(port)
    if refusal is None:
        return
    if refusal.errno == errno.EACCES:
        raise LocalError(f"Port {port} needs root: choose one from 1024 on, for example make up PORT=8080.")
    if refusal.errno == errno.EADDRINUSE:
        raise LocalError(
            f"Port {port} is in use: stop what listens there (ss -ltnp 'sport = :{port}' names it), "
            f"or choose another, for example make up PORT={port + 1}."
        )
    raise LocalError(f"Port {port} cannot be listened on ({refusal.strerror}): choose another with make up PORT=...")


def _claim(port: int) -> bool:
    """Takes a port for this process before anything listens there; the kernel gives it back when the process ends.

    The claim is a socket in the abstract namespace, which all processes that share our ports see (unix(7)).
    """
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0aiaas-port-{port}")
    except OSError:
        claim.close()
        return False
    _claims[port] = claim
    return True


def _refusal(port: int) -> OSError | None:
    with socket.socket() as probe:
        # A port that only waits for old connections to time out is free for a server.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return error
    return None

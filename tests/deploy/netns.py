"""Network namespaces of this kernel, one for each pod, and a node between them that routes and enforces; it never
touches the network of the machine.

No namespace has a name: each lives as long as a process that holds it, so runs side by side do not meet, and one that
is killed leaves nothing.
"""

import contextlib
import ctypes
import errno
import itertools
import os
import select
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from anyio.from_thread import BlockingPortal, start_blocking_portal

from tests.deploy.nft_policies import Place

TCP, UDP = "TCP", "UDP"
# As network plugins that route have it: the same next hop for every pod.
_GATEWAY = "169.254.1.1"
_CLONE_NEWNET = 0x40000000
_PROBE_LIMIT_S = 10.0
# As many as wait at once, well below what a process may open.
_BATCH = 256
# Of sockets: what they are, and what tells that they have an answer.
_KINDS = {TCP: (socket.SOCK_STREAM, select.POLLOUT), UDP: (socket.SOCK_DGRAM, select.POLLIN)}
_libc = ctypes.CDLL(None, use_errno=True)

Connection = tuple[str, str, int, str]
"""Names of sender and receiver, the port, TCP or UDP."""


def _checked(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}. Run it as root, on a kernel with network namespaces")


class Namespace:
    """A network of its own, with nothing but its loopback. Whoever makes it closes it."""

    def __init__(self) -> None:
        with _home():
            _checked(_libc.unshare(_CLONE_NEWNET), "A network namespace could not be made")
            self._descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        # By which other processes find it.
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        self.run("ip", "link", "set", "lo", "up")

    def close(self) -> None:
        os.close(self._descriptor)

    def enter(self) -> None:
        """Moves this thread into it: sockets and processes that the thread makes from now on are there."""
        _checked(_libc.setns(self._descriptor, _CLONE_NEWNET), "A network namespace could not be entered")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with _home():
            self.enter()
            yield

    @contextlib.contextmanager
    def portal(self) -> Iterator[BlockingPortal]:
        """An event loop in a thread that stays in it; it must be given addresses, as names are looked up elsewhere."""
        with start_blocking_portal() as portal:
            portal.call(self.enter)
            yield portal

    def run(self, *command: str, text: str = "") -> None:
        with self.entered():
            done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}\n{text}"

    def set(self, key: str, value: int) -> None:
        """Sets what sysctl calls net.ipv4.`key`, with slashes."""
        with self.entered():
            Path("/proc/sys/net/ipv4", key).write_text(str(value))

    def prefix(self) -> tuple[str, ...]:
        """Before a command, runs it in the namespace."""
        nsenter = shutil.which("nsenter")
        assert nsenter
        return (nsenter, f"--net={self.path}", "--")


@contextlib.contextmanager
def _home() -> Iterator[None]:
    """Brings this thread back to where it was."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        yield
    finally:
        _checked(_libc.setns(home, _CLONE_NEWNET), "The way back was lost")
        os.close(home)


class Network:
    """Use as a context manager. A namespace for each place, whose packets all pass the node's.

    Where `served` does not say that somebody else listens, there is a listener on each port of `ports`, and for UDP one
    on each of `udp_ports`, that sends back what it gets.
    """

    def __init__(
        self,
        places: Mapping[str, Place],
        ports: Iterable[int],
        udp_ports: Iterable[int],
        served: Mapping[str, Iterable[int]] | None = None,
    ) -> None:
        self.places = places
        self.namespaces: dict[str, Namespace] = {}
        self._ports, self._udp_ports = sorted(ports), sorted(udp_ports)
        self._served = {name: set(of) for name, of in (served or {}).items()}
        self._echoes: dict[int, socket.socket] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.node = self._namespace(stack)
            self.node.set("ip_forward", 1)
            # Every refusal is told at once.
            self.node.set("icmp_ratemask", 0)
            for number, (name, place) in enumerate(self.places.items()):
                namespace = self.namespaces[name] = self._namespace(stack)
                self._join(namespace, place.address, f"pod{number}")
                self._listen(stack, name, place.address)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def enforce(self, ruleset: str) -> None:
        """Puts a ruleset of nftables in force on the node, at once and whole."""
        self.node.run("nft", "-f", "-", text=ruleset)

    def expose(self, name: str, port: int, private_port: int) -> None:
        """Leads a port of a place to one of its loopback."""
        namespace = self.namespaces[name]
        namespace.set("conf/eth0/route_localnet", 1)
        rule = f"iif eth0 tcp dport {port} dnat to 127.0.0.1:{private_port}"
        hook = "type nat hook prerouting priority dstnat"
        namespace.run("nft", "-f", "-", text=f"table ip expose {{\nchain in {{\n{hook}\n{rule}\n}}\n}}\n")

    def connections(self, sender: str, receivers: Iterable[str]) -> list[Connection]:
        """Those from one place to every port of others."""
        return [
            (sender, receiver, port, protocol)
            for receiver in receivers
            if receiver != sender
            for protocol, ports in ((TCP, self._ports), (UDP, self._udp_ports))
            for port in ports
        ]

    def allowed(self, connections: Iterable[Connection]) -> set[Connection]:
        """Tries them, and returns those that are made. All others must have been rejected by the node's rules: that
        nobody listens, or that a packet was lost, fails."""
        through = set()
        for sender, own in itertools.groupby(sorted(connections), key=lambda connection: connection[0]):
            waiting = list(own)
            for start in range(0, len(waiting), _BATCH):
                through |= self._tried(sender, waiting[start : start + _BATCH])
        return through

    def _tried(self, sender: str, connections: list[Connection]) -> set[Connection]:
        poll, open_, through = select.poll(), dict[int, tuple[socket.socket, Connection]](), set()
        for echo in self._echoes:
            poll.register(echo, select.POLLIN)
        with ExitStack() as stack:
            with self.namespaces[sender].entered():
                for connection in connections:
                    _, receiver, port, protocol = connection
                    kind, awaited = _KINDS[protocol]
                    client = stack.enter_context(socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK))
                    client.connect_ex((self.places[receiver].address, port))
                    if protocol == UDP:
                        client.send(b"?")
                    else:
                        # It will be closed at once, without a trace.
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    open_[client.fileno()] = client, connection
                    poll.register(client, awaited)
            deadline = time.monotonic() + _PROBE_LIMIT_S
            while open_:
                for descriptor, _ in poll.poll(1000):
                    if answering := self._echoes.get(descriptor):
                        answering.sendto(*answering.recvfrom(16))
                        continue
                    client, connection = open_.pop(descriptor)
                    poll.unregister(descriptor)
                    error = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    assert error in (0, errno.EHOSTUNREACH), f"{connection}: {os.strerror(error)}"
                    if not error:
                        through.add(connection)
                assert time.monotonic() < deadline, f"no answer to {[connection for _, connection in open_.values()]}"
        return through

    def _namespace(self, stack: ExitStack) -> Namespace:
        namespace = Namespace()
        stack.callback(namespace.close)
        return namespace

    def _join(self, namespace: Namespace, address: str, link: str) -> None:
        self.node.run(
            "ip",
            "-batch",
            "-",
            text=f"link add {link} type veth peer name eth0 netns {namespace.path}\n"
            f"address add {_GATEWAY}/32 dev {link}\nlink set {link} up\nroute add {address}/32 dev {link}\n",
        )
        namespace.run(
            "ip",
            "-batch",
            "-",
            text=f"address add {address}/32 dev eth0\nlink set eth0 up\n"
            f"route add {_GATEWAY}/32 dev eth0\nroute add default via {_GATEWAY}\n",
        )

    def _listen(self, stack: ExitStack, name: str, address: str) -> None:
        with self.namespaces[name].entered():
            for port in self._ports:
                if port not in self._served.get(name, ()):
                    listener = stack.enter_context(socket.socket())
                    listener.bind((address, port))
                    listener.listen(socket.SOMAXCONN)
            for port in self._udp_ports:
                echo = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                echo.setblocking(False)
                echo.bind((address, port))
                self._echoes[echo.fileno()] = echo

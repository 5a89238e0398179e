"""A client's connection as an application sees it, without a server or a socket."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class ConnectionDouble:
    """An `edge.exchange.Connection` whose client leaves when a test says so: put it into a scope as
    `scope["extensions"] = {CONNECTION: ConnectionDouble()}`. Without a `body` it is read from ASGI's `receive`."""

    body: bytes | None = None
    is_overloaded: bool = False
    disconnected: bool = False
    on_gone: Callable[[], None] | None = None

    def write_chunk(self, chunk: bytes) -> bool:
        """Nothing is written but through ASGI."""
        return False

    def take_body(self) -> bytes | None:
        """The body, once."""
        body, self.body = self.body, None
        return body

    def leave(self) -> None:
        """The client closes its connection."""
        self.disconnected = True
        callback, self.on_gone = self.on_gone, None
        if callback is not None:
            callback()

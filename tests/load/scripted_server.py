"""A server that answers byte for byte what a test of the load generator writes down; it judges nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

Answer = Callable[["Client"], Awaitable[None]]


@dataclass
class Client:
    """One connection of the generator's; a request of it has been read."""

    writer: asyncio.StreamWriter
    # Which request of the server this is, from 0 on.
    number: int

    async def send(self, data: bytes) -> None:
        """Sends bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()

    async def send_split(self, data: bytes, pause_s: float = 0.0005) -> None:
        """Sends each byte by itself; the pauses make the generator read them so."""
        for at in range(len(data)):
            await self.send(data[at : at + 1])
            await asyncio.sleep(pause_s)


@dataclass
class Server:
    """A scripted server."""

    port: int = 0
    requests: int = 0
    open: set[asyncio.StreamWriter] = field(default_factory=set)


@contextlib.asynccontextmanager
async def answering(answer: Answer) -> AsyncIterator[Server]:
    """A server on a free port that hands each request to `answer`."""
    server = Server()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.open.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                size = int(head.partition(b"content-length:")[2].split()[0])
                await reader.readexactly(size)
                server.requests += 1
                await answer(Client(writer, server.requests - 1))
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for writer in server.open:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

"""An engine on a socket that answers with whatever bytes a test gives it; it never looks at what it is asked."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Self


@dataclass
class Asked:
    """One request as it came in, and the connection to answer on."""

    head: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    client_port: int

    @property
    def length_bytes(self) -> int:
        """How long its body says that it is."""
        return int(self.head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)

    async def body(self) -> bytes:
        """Read its body, once."""
        return await self.reader.readexactly(self.length_bytes)


Handler = Callable[[Asked], Awaitable[bool]]
"""Answers; returns whether the connection is kept."""


@dataclass
class RawEngine:
    """Use as an async context manager. `gone` counts the connections that their clients have closed, or broken."""

    handler: Handler
    tls: ssl.SSLContext | None = None
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    gone: int = 0

    @property
    def base_url(self) -> str:
        """Where it listens."""
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        self._tasks: set[asyncio.Task[None]] = set()
        listener = socket.create_server(("127.0.0.1", 0))
        self._port = listener.getsockname()[1]
        self._server = await asyncio.start_server(self._serve, sock=listener, ssl=self.tls)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                asked = Asked(head, reader, writer, writer.get_extra_info("peername")[1])
                self.asked.append(asked)
                if not await self.handler(asked):
                    break
        except (asyncio.IncompleteReadError, OSError):
            self.gone += 1
        except asyncio.CancelledError:
            # What a test has not waited for ends with it.
            writer.transport.abort()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            self._tasks.discard(task)


def answering(*answers: bytes, keeps: bool = True) -> Handler:
    """Reads the request, then gives these answers in turn, the last of them for ever."""
    left = list(answers)

    async def answer(asked: Asked) -> bool:
        await asked.body()
        asked.writer.write(left.pop(0) if len(left) > 1 else left[0])
        await asked.writer.drain()
        return keeps

    return answer

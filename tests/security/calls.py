"""Calls any RPC of a running platform by its contract alone; it never knows what one is for."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc.aio
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from deploy.local.stack import Stack
from edge.peers import PACKAGES, services_of
from mesh.channel import connect
from mesh.config import load
from mesh.errors import PlatformError, from_rpc_error
from mesh.tls import TlsConfig, opened

_TIMEOUT_S = 15.0


def methods() -> Iterator[MethodDescriptor]:
    """Every RPC of every contract."""
    for name in PACKAGES.values():
        for service in services_of(name):
            yield from service.methods


def name_of(method: MethodDescriptor) -> str:
    """What an RPC is called here: "BudgetService/GetBudget"."""
    return f"{method.containing_service.name}/{method.name}"


METHODS: Mapping[str, MethodDescriptor] = {name_of(method): method for method in methods()}
"""Every RPC by its name."""


@dataclass(frozen=True)
class Answer:
    """What a call brought: a message, the first of a stream, or the error."""

    message: Message | None
    error: PlatformError | None

    @property
    def reason(self) -> str:
        """The stable reason of the error; "ok" without one."""
        return "ok" if self.error is None else self.error.reason.value

    @property
    def told(self) -> str:
        """All that the caller learned."""
        return str(self.message) if self.error is None else f"{self.error.reason.value}: {self.error.message}"


class Caller:
    """Channels to all services, with one certificate."""

    def __init__(self, channels: Mapping[str, grpc.aio.Channel]) -> None:
        self._channels = channels

    async def call(self, rpc: str, request: Message | Mapping[str, Any], credential: str = "") -> Answer:
        """One call, named as in METHODS, with a message or its JSON."""
        method = METHODS[rpc]
        if not isinstance(request, Message):
            request = json_format.ParseDict(dict(request), GetMessageClass(method.input_type)())
        channel = self._channels[PACKAGES[method.containing_service.file.package]]
        shape = ("stream" if method.client_streaming else "unary") + (
            "_stream" if method.server_streaming else "_unary"
        )
        call = getattr(channel, shape)(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        metadata = (("authorization", f"Bearer {credential}"),) if credential else ()
        asked = call(iter([request]) if method.client_streaming else request, metadata=metadata, timeout=_TIMEOUT_S)
        try:
            message = await (asked.read() if method.server_streaming else asked)
        except grpc.aio.AioRpcError as error:
            return Answer(None, from_rpc_error(error))
        finally:
            asked.cancel()
        return Answer(message if isinstance(message, Message) else None, None)


@contextlib.asynccontextmanager
async def calling(stack: Stack, certificate: str = "tool") -> AsyncIterator[Caller]:
    """Somebody with a certificate of this name."""
    async with contextlib.AsyncExitStack() as held:
        tls = await held.enter_async_context(opened(load(TlsConfig, stack.certificates[certificate])))
        channels = {
            name: await held.enter_async_context(connect(stack.grpc[name], *services_of(name), tls=tls))
            for name in PACKAGES.values()
        }
        yield Caller(channels)

"""What a call carries along without being passed by hand; set by the interceptors, never by a handler."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiaas.type.v1.request_signature_pb2 import RequestSignature
    from mesh.auth import Principal

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request being served; empty outside of one."""

principal: ContextVar[Principal | None] = ContextVar("principal", default=None)
"""Who makes the call; None for a public or internal RPC, or outside of a call."""

credential: ContextVar[str] = ContextVar("credential", default="")
"""The credential the caller presented, passed on to the next service; it never reaches a log."""

client_address: ContextVar[str] = ContextVar("client_address", default="")
"""The network address of the client whose request is served, passed on to the next service; empty when unknown."""

user_agent: ContextVar[str] = ContextVar("user_agent", default="")
"""What the client whose request is served calls itself, passed on to the next service; empty when unknown."""

signature: ContextVar[RequestSignature | None] = ContextVar("signature", default=None)
"""The signature that the client gave its request, passed on to the next service; None where there is none."""

deadline: ContextVar[float | None] = ContextVar("deadline", default=None)
"""When the call being served must be over, in the event loop's time (seconds); None when it has no end."""

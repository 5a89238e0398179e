"""The ASGI endpoint of the REST API: finds the RPC, makes its request, calls it, writes its answer; errors go to the
application, which words them as AIP-193 has it."""

import re
from collections.abc import Iterable
from typing import Any

import msgspec
from google.protobuf import json_format
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from starlette.types import Receive, Scope, Send

from edge.browser import take_credential
from edge.exchange import Exchange, exchange_of
from edge.peers import Peer, Peers, following
from edge.transcode.binding import RestRequest, bind
from edge.transcode.routes import Route, RouteTable
from mesh.errors import PlatformError, to_aip193

_TIMEOUT_S = 30.0
# What may stand between the quotes (RFC 9110, 8.8.3), without bytes that are not ASCII.
_ETAG = re.compile(r"[!#-~]+")
# An answer may hold a secret that is shown once.
_NO_STORE = (b"cache-control", b"no-store")
_JSON = (b"content-type", b"application/json")
_JSON_LINES = (b"content-type", b"application/x-ndjson")


class Transcoder:
    """Serves every route of the contracts' REST bindings."""

    def __init__(self, services: Iterable[ServiceDescriptor], peers: Peers) -> None:
        """Raises ValueError for a binding that cannot be served."""
        self.table = RouteTable(services)
        self._rpcs: dict[str, _UnaryRpc | _StreamingRpc] = {}
        for route in self.table.routes:
            peer = peers.serving(route.method.containing_service)
            kind = _StreamingRpc if route.method.server_streaming else _UnaryRpc
            self._rpcs[route.rpc] = kind(route, peer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises PlatformError."""
        exchange = exchange_of(scope)
        route, path_values = self.table.find(exchange.method, scope["raw_path"])
        exchange.route = route.template
        take_credential(exchange, required=not route.is_public)
        body = await exchange.read_body()
        if body:
            exchange.expect_json()
        rest = RestRequest(
            path_values,
            scope["query_string"],
            body,
            exchange.header(b"if-match"),
            "" if route.verb == "GET" else exchange.idempotency_key(),
        )
        await self._rpcs[route.rpc].serve(exchange, bind(route, rest))


class _UnaryRpc:
    """An RPC with one answer, which becomes a JSON document."""

    def __init__(self, route: Route, peer: Peer) -> None:
        self._peer = peer
        self._call = peer.channel.unary_unary(
            route.rpc,
            request_serializer=route.request_class.SerializeToString,
            response_deserializer=route.response_class.FromString,
        )
        self._etag_path = route.etag_path

    async def serve(self, exchange: Exchange, request: Message) -> None:
        response = await self._peer.call(self._call, request, _TIMEOUT_S)
        headers = [_JSON, _NO_STORE]
        if etag := self._etag(response):
            headers.append((b"etag", f'"{etag}"'.encode("ascii")))
        await exchange.respond(200, headers, _as_json(response))

    def _etag(self, response: Message) -> str:
        """The etag of the resource in an answer; empty where there is none, or none that a header could hold."""
        value: Any = response
        for name in self._etag_path:
            value = getattr(value, name)
        return value if isinstance(value, str) and _ETAG.fullmatch(value) else ""


class _StreamingRpc:
    """An RPC with many answers, each of which becomes a line of JSON; an error among them is the last line."""

    def __init__(self, route: Route, peer: Peer) -> None:
        self._peer = peer
        self._call = peer.channel.unary_stream(
            route.rpc,
            request_serializer=route.request_class.SerializeToString,
            response_deserializer=route.response_class.FromString,
        )

    async def serve(self, exchange: Exchange, request: Message) -> None:
        await self._peer.until_ready()
        call = self._call(request)
        try:
            with following(exchange, call):
                async for response in call:
                    if not exchange.status:
                        await exchange.start(200, [_JSON_LINES, _NO_STORE])
                    await exchange.write(_as_json(response) + b"\n")
                if not exchange.status:
                    await exchange.start(200, [_JSON_LINES, _NO_STORE])
                await exchange.finish()
        except PlatformError as error:
            if not exchange.status:
                raise
            exchange.reason = error.reason
            await exchange.finish(msgspec.json.encode(to_aip193(error)) + b"\n")


def _as_json(message: Message) -> bytes:
    """An answer as protobuf's JSON in the contract's own names, with empty fields and lists in it as well."""
    return msgspec.json.encode(
        json_format.MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    )

"""/scim/v2: users and groups as directories read and write them; documents pass through as they are."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from starlette.types import Receive, Scope, Send

from aiaas.identity.v1 import scim_service_pb2 as pb
from aiaas.identity.v1 import scim_service_pb2_grpc
from edge.exchange import Exchange, Headers, exchange_of
from edge.peers import Peer
from edge.scim.errors import CONTENT_TYPE
from mesh.errors import PlatformError, Reason

_TIMEOUT_S = 30.0
_COUNT = 100
_NO_STORE = (b"cache-control", b"no-store")
_LIST = "urn:ietf:params:scim:api:messages:2.0:ListResponse"
_CONFIG = "urn:ietf:params:scim:schemas:core:2.0:ServiceProviderConfig"
_TYPE = "urn:ietf:params:scim:schemas:core:2.0:ResourceType"
_QUERY_FIELDS = 100

KINDS: Mapping[str, pb.ScimResourceType.ValueType] = {
    "Users": pb.SCIM_RESOURCE_TYPE_USER,
    "Groups": pb.SCIM_RESOURCE_TYPE_GROUP,
}
"""The resources by their paths."""

_DOCUMENTS: Mapping[str, dict[str, Any]] = {
    "ServiceProviderConfig": {
        "schemas": [_CONFIG],
        "patch": {"supported": True},
        "bulk": {"supported": False, "maxOperations": 0, "maxPayloadSize": 0},
        "filter": {"supported": True, "maxResults": 500},
        "changePassword": {"supported": False},
        "sort": {"supported": False},
        "etag": {"supported": True},
        "authenticationSchemes": [
            {"type": "oauthbearertoken", "name": "API key", "description": "An API key as a bearer token."}
        ],
    },
    "ResourceTypes": {
        "schemas": [_LIST],
        "totalResults": len(KINDS),
        "startIndex": 1,
        "itemsPerPage": len(KINDS),
        "Resources": [
            {
                "schemas": [_TYPE],
                "id": path[:-1],
                "name": path[:-1],
                "endpoint": f"/{path}",
                "schema": f"urn:ietf:params:scim:schemas:core:2.0:{path[:-1]}",
            }
            for path in KINDS
        ],
    },
}


class AboutEndpoint:
    """What a directory asks before anything else: what is served here. It is the same for everybody."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._body = msgspec.json.encode(_DOCUMENTS[name])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises PlatformError."""
        exchange = exchange_of(scope)
        exchange.route = f"/scim/v2/{self._name}"
        exchange.allow("GET")
        await exchange.respond(200, [CONTENT_TYPE], self._body)


class ListEndpoint:
    """All users, or all groups: found, and made."""

    def __init__(self, path: str, identity: Peer) -> None:
        self._path = path
        self._kind = KINDS[path]
        self._identity = identity
        self._stub = scim_service_pb2_grpc.ScimServiceStub(identity.channel)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises PlatformError."""
        exchange = exchange_of(scope)
        exchange.route = f"/scim/v2/{self._path}"
        exchange.allow("GET", "POST")
        exchange.take_credential()
        if exchange.method == "POST":
            made = await self._identity.call(
                self._stub.CreateScimResource,
                pb.CreateScimResourceRequest(resource_type=self._kind, resource_json=await _body(exchange)),
                _TIMEOUT_S,
            )
            location = f"/scim/v2/{self._path}/{made.resource.scim_resource_id}"
            await _respond(exchange, made.resource, 201, [(b"location", location.encode())])
            return
        query = _query(scope)
        start_index = _number(query, "startindex", 1)
        found = await self._identity.call(
            self._stub.ListScimResources,
            pb.ListScimResourcesRequest(
                resource_type=self._kind,
                filter=query.get("filter", ""),
                start_index=start_index,
                count=_number(query, "count", _COUNT),
                attributes=_names(query, "attributes"),
                excluded_attributes=_names(query, "excludedattributes"),
            ),
            _TIMEOUT_S,
        )
        body = {
            "schemas": [_LIST],
            "totalResults": found.total_results,
            "startIndex": max(start_index, 1),
            "itemsPerPage": len(found.resources),
            "Resources": [msgspec.Raw(resource.resource_json) for resource in found.resources],
        }
        await exchange.respond(200, [CONTENT_TYPE, _NO_STORE], msgspec.json.encode(body))


class ResourceEndpoint:
    """One user, or one group: read, replaced, patched, removed."""

    def __init__(self, path: str, identity: Peer) -> None:
        self._path = path
        self._kind = KINDS[path]
        self._identity = identity
        self._stub = scim_service_pb2_grpc.ScimServiceStub(identity.channel)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises PlatformError."""
        exchange = exchange_of(scope)
        exchange.route = f"/scim/v2/{self._path}/{{id}}"
        exchange.allow("GET", "PUT", "PATCH", "DELETE")
        exchange.take_credential()
        named: dict[str, Any] = {"resource_type": self._kind, "scim_resource_id": scope["path_params"]["id"]}
        if exchange.method in ("GET", "HEAD"):
            query = _query(scope)
            attributes, excluded = _names(query, "attributes"), _names(query, "excludedattributes")
            found = await self._identity.call(
                self._stub.GetScimResource,
                pb.GetScimResourceRequest(**named, attributes=attributes, excluded_attributes=excluded),
                _TIMEOUT_S,
            )
            await _respond(exchange, found.resource)
            return
        named["version"] = _version(exchange)
        if exchange.method == "PUT":
            replaced = await self._identity.call(
                self._stub.ReplaceScimResource,
                pb.ReplaceScimResourceRequest(**named, resource_json=await _body(exchange)),
                _TIMEOUT_S,
            )
            await _respond(exchange, replaced.resource)
        elif exchange.method == "PATCH":
            patched = await self._identity.call(
                self._stub.PatchScimResource,
                pb.PatchScimResourceRequest(**named, patch_json=await _body(exchange)),
                _TIMEOUT_S,
            )
            await _respond(exchange, patched.resource)
        else:
            await exchange.read_body()
            await self._identity.call(self._stub.DeleteScimResource, pb.DeleteScimResourceRequest(**named), _TIMEOUT_S)
            await exchange.start(204, [])
            await exchange.finish()


async def _body(exchange: Exchange) -> bytes:
    exchange.expect_json()
    return await exchange.read_body()


async def _respond(exchange: Exchange, resource: pb.ScimResource, status: int = 200, headers: Headers = ()) -> None:
    etag = (b"etag", f'"{resource.version}"'.encode("ascii"))
    await exchange.respond(status, [CONTENT_TYPE, _NO_STORE, etag, *headers], resource.resource_json)


def _version(exchange: Exchange) -> str:
    """The version that a client saw; weak or not, it is the same here."""
    if_match = exchange.header(b"if-match") or "*"
    return "" if if_match == "*" else if_match.removeprefix("W/").strip('"')


def _query(scope: Scope) -> dict[str, str]:
    try:
        pairs = parse_qsl(scope["query_string"].decode("ascii"), errors="strict", max_num_fields=_QUERY_FIELDS)
    except ValueError:
        raise PlatformError(Reason.INVALID_ARGUMENT, description="The query is not valid.") from None
    return {name.lower(): value for name, value in pairs}


def _number(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 9):
        raise PlatformError(Reason.INVALID_ARGUMENT, field=name, description=f"'{name}' has to be a number.")
    return int(text)


def _names(query: Mapping[str, str], name: str) -> list[str]:
    return [each.strip() for each in query.get(name, "").split(",") if each.strip()]

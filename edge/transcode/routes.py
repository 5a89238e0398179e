"""Which RPC a verb and a path stand for; it never looks at a query, a body or a header.

A path is matched as it came, before percent-decoding, so that "%2F" in an id is part of the id and no separator.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from edge.transcode.fields import is_nested
from mesh.auth import policy_of
from mesh.errors import PlatformError, Reason

WHOLE_REQUEST = "*"
"""A binding's `body` that stands for the request message itself."""

ETAG = "etag"
"""The field that changes with every change of a resource."""
REQUEST_ID = "request_id"
"""The field by which a repeated request is known."""

_VERBS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})
_SEGMENT = re.compile(r"(?:\{(?P<field>[a-z0-9_]+)\}(?P<suffix>(?::[A-Za-z]+)?)|(?P<literal>[A-Za-z0-9._~:-]+))")


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment of a path: a literal, or a request field followed by a suffix such as ":revoke", often empty."""

    literal: bytes
    field: str
    suffix: bytes

    @property
    def rank(self) -> int:
        """How particular it is: of several routes that match a path, the lowest ranks win from the left."""
        return 0 if self.literal else 1 if self.suffix else 2

    def match(self, raw: bytes) -> bytes | None:
        """What the path holds for the field, empty for a literal; None if the segment does not match."""
        if self.literal:
            return b"" if raw == self.literal else None
        if not raw.endswith(self.suffix) or len(raw) == len(self.suffix):
            return None
        return raw[: len(raw) - len(self.suffix)]


@dataclass(frozen=True, slots=True)
class Route:
    """One RPC as REST."""

    verb: str
    template: str
    segments: tuple[Segment, ...]
    method: MethodDescriptor
    body: str
    is_public: bool

    @property
    def rpc(self) -> str:
        """The RPC as gRPC names it."""
        return f"/{self.method.containing_service.full_name}/{self.method.name}"

    @property
    def path_fields(self) -> frozenset[str]:
        """The request fields that the path fills."""
        return frozenset(segment.field for segment in self.segments if segment.field)

    @property
    def resource(self) -> Descriptor | None:
        """The message that the body fills, when it is a field of the request."""
        if not self.body or self.body == WHOLE_REQUEST:
            return None
        return self.method.input_type.fields_by_name[self.body].message_type

    @property
    def takes_request_id(self) -> bool:
        """Whether the RPC can be repeated safely (AIP-155); in a path, "request_id" is an id like any other, and what
        reads needs none."""
        return (
            self.verb != "GET"
            and REQUEST_ID in self.method.input_type.fields_by_name
            and REQUEST_ID not in self.path_fields
        )

    @property
    def takes_etag(self) -> bool:
        """Whether the RPC changes only what the client saw (AIP-154): its request or the resource in it has an etag."""
        resource = () if self.resource is None else self.resource.fields_by_name
        return self.verb != "GET" and (ETAG in self.method.input_type.fields_by_name or ETAG in resource)

    @property
    def etag_path(self) -> tuple[str, ...]:
        """Where the only resource in an answer has its etag; empty where it has none."""
        resources = [field for field in self.method.output_type.fields if is_nested(field)]
        if len(resources) != 1 or resources[0].is_repeated:
            return ()
        (resource,) = resources
        has_etag = resource.message_type is not None and ETAG in resource.message_type.fields_by_name
        return (resource.name, ETAG) if has_etag else ()

    @property
    def request_class(self) -> type[Message]:
        """The class of the RPC's request."""
        return GetMessageClass(self.method.input_type)

    @property
    def response_class(self) -> type[Message]:
        """The class of the RPC's response."""
        return GetMessageClass(self.method.output_type)

    def match(self, raw_segments: list[bytes]) -> dict[str, str] | None:
        """The values of the path's fields, percent-decoded; None if the path is another.

        Raises PlatformError(INVALID_ARGUMENT) naming the field whose value is not UTF-8.
        """
        raw_values: dict[str, bytes] = {}
        for segment, raw in zip(self.segments, raw_segments, strict=True):
            value = segment.match(raw)
            if value is None:
                return None
            if segment.field:
                raw_values[segment.field] = value
        return {field: _decoded(field, value) for field, value in raw_values.items()}


class RouteTable:
    """Every route, found by its number of segments and then by the most particular match."""

    def __init__(self, services: Iterable[ServiceDescriptor]) -> None:
        """Raises ValueError for a binding that makes no sense, or one that another RPC has as well."""
        self.routes = [
            _route(method) for service in services for method in service.methods if policy_of(method).HasField("rest")
        ]
        self._by_length: dict[int, list[Route]] = defaultdict(list)
        taken: dict[tuple[object, ...], str] = {}
        for route in sorted(self.routes, key=lambda route: [segment.rank for segment in route.segments]):
            shape = (route.verb, *((segment.literal, segment.suffix) for segment in route.segments))
            if shape in taken:
                raise ValueError(f"{route.rpc} and {taken[shape]} are bound to the same path: {route.template}")
            taken[shape] = route.rpc
            self._by_length[len(route.segments)].append(route)

    def find(self, verb: str, raw_path: bytes) -> tuple[Route, dict[str, str]]:
        """The route of a request and its path's values. HEAD is served as GET.

        Raises PlatformError: ROUTE_NOT_FOUND, METHOD_NOT_ALLOWED with the detail `allow`, INVALID_ARGUMENT.
        """
        wanted = "GET" if verb == "HEAD" else verb
        raw_segments = raw_path.split(b"/")[1:]
        allowed: set[str] = set()
        for route in self._by_length.get(len(raw_segments), ()):
            values = route.match(raw_segments)
            if values is None:
                continue
            if route.verb == wanted:
                return route, values
            allowed.add(route.verb)
        if allowed:
            raise PlatformError(Reason.METHOD_NOT_ALLOWED, allow=", ".join(sorted(allowed)))
        raise PlatformError(Reason.ROUTE_NOT_FOUND)


def _decoded(field: str, raw: bytes) -> str:
    try:
        return unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise PlatformError(
            Reason.INVALID_ARGUMENT, field=field, description="The path holds bytes that are not UTF-8."
        ) from None


def _route(method: MethodDescriptor) -> Route:
    policy = policy_of(method)
    binding = policy.rest
    segments = []
    for text in binding.path.split("/")[1:]:
        parts = _SEGMENT.fullmatch(text)
        if parts is None:
            raise ValueError(f"{method.full_name}: its path has a segment that is not understood: {text!r}")
        segments.append(
            Segment(
                (parts["literal"] or "").encode("ascii"), parts["field"] or "", (parts["suffix"] or "").encode("ascii")
            )
        )
    route = Route(binding.verb, binding.path, tuple(segments), method, binding.body, policy.public)
    if problem := _problem(route):
        raise ValueError(f"{method.full_name}: {problem}")
    return route


def _problem(route: Route) -> str | None:
    """Why a route cannot be served, if so."""
    fields = route.method.input_type.fields_by_name
    if route.verb not in _VERBS:
        return f"its verb is {route.verb!r}"
    if not route.template.startswith("/"):
        return "its path is not absolute"
    if route.method.client_streaming:
        return "streams of requests cannot be offered over REST"
    for name in route.path_fields:
        if name not in fields or fields[name].is_repeated or fields[name].message_type is not None:
            return f"its path names {name!r}, which is no single value of the request"
    if route.body not in ("", WHOLE_REQUEST):
        field = fields.get(route.body)
        if field is None or field.type != FieldDescriptor.TYPE_MESSAGE or field.is_repeated:
            return f"its body is {route.body!r}, which is no message of the request"
    return None

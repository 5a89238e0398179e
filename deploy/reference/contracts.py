"""Pages of the contracts: one for each .proto file, the REST routes, the permissions, the events; no page names an RPC
that its contract does not."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath

from google.protobuf.descriptor import (
    Descriptor,
    EnumDescriptor,
    FieldDescriptor,
    FileDescriptor,
    MethodDescriptor,
    ServiceDescriptor,
)
from google.protobuf.descriptor_pb2 import MethodOptions

from aiaas.type.v1 import options_pb2
from deploy.reference.markdown import anchor, code, page, table, text
from edge.openapi.contracts import Contracts
from edge.openapi.document import document
from edge.transcode.fields import is_map
from mesh.auth import policy_of

_SCALARS = {
    value: name.removeprefix("TYPE_").lower()
    for name, value in vars(FieldDescriptor).items()
    if name.startswith("TYPE_") and isinstance(value, int)
}
_EVENT = "aiaas.type.v1.PlatformEvent"
_EVENT_TYPES = "aiaas.type.v1.EventType"


class Reference:
    """Makes the pages of one set of contracts; a page is known by its path below the reference."""

    def __init__(self, contracts: Contracts) -> None:
        self._contracts = contracts
        self._files = sorted(_files(contracts.services), key=lambda file: file.name)
        # Where messages, enums and RPCs stand, by their full names: the page and the heading.
        self._places: dict[str, tuple[str, str]] = {}
        for file in self._files:
            for full_name, heading in _headings(file):
                self._places[full_name] = (_path_of(file), heading)

    def pages(self) -> dict[str, str]:
        """Every page by its path. Raises ValueError where two headings of a page would have one anchor."""
        made = {_path_of(file): self._file(file) for file in self._files}
        made["grpc/index.md"] = self._index()
        made["rest.md"] = self._rest()
        return made

    def permissions(self, roles: Mapping[str, frozenset[str]]) -> str:
        """The page of permissions: what each allows, and which of the built-in roles have it."""
        allowed: dict[str, list[str]] = defaultdict(list)
        for service in self._contracts.services:
            for method in service.methods:
                if permission := policy_of(method).permission:
                    words = f"{service.name}.{method.name}"
                    allowed[permission].append(self.link(method.full_name, "permissions.md", words))
        said = [
            "A permission is named `resource.verb`; a role or a key's scope may say `resource.*`.",
            "RPCs that need none are not here.",
            "",
        ]
        rows = [
            (code(name), ", ".join(rpcs), ", ".join(code(role) for role in sorted(roles) if name in roles[role]))
            for name, rpcs in sorted(allowed.items())
        ]
        return page("Permissions", said, table(("Permission", "Allows", "Built-in roles that have it"), rows))

    def events(self, queues: Iterable[tuple[str, str, str, str]]) -> str:
        """The page of events: their types, and the `queues` (name, exchange, routing key, words) of services."""
        kinds = next(enum for file in self._files for enum in _enums(file) if enum.full_name == _EVENT_TYPES)
        said = [
            f"Services publish what people may want to be told of as {self.link(_EVENT, 'events.md')};",
            "webhooks deliver it. Usage travels beside it, in batches.",
            "",
            "## Types",
            "",
        ]
        rows = [
            (code(value.name), self._said(f"{kinds.full_name}.{value.name}")) for value in kinds.values if value.number
        ]
        queued = [(code(name), code(exchange), code(key), text(words)) for name, exchange, key, words in queues]
        return page(
            "Events",
            said,
            table(("Type", ""), rows),
            [
                "## Queues",
                "",
                "A message that nobody could take five times is in the queue of the same name with `.dead`.",
                "",
            ],
            table(("Queue", "Exchange", "Routing key", ""), queued),
        )

    def link(self, full_name: str, here: str, words: str = "") -> str:
        """A link to something of the contracts from the page `here`; only its name where it is none of ours."""
        if full_name not in self._places:
            return code(full_name)
        path, heading = self._places[full_name]
        target = os.path.relpath(path, PurePosixPath(here).parent) if path != here else ""
        return f"[{code(words or heading)}]({target}#{anchor(heading)})"

    def _said(self, full_name: str) -> str:
        return text(self._contracts.comments.get(full_name, ""))

    def _index(self) -> str:
        here = "grpc/index.md"
        services = [
            (self.link(service.full_name, here), code(service.file.package), self._said(service.full_name))
            for service in self._contracts.services
            if service.full_name in self._places
        ]
        said = ["Every RPC, message and enum, as the contracts in `proto/` declare and explain them.", ""]
        return page("gRPC", said, table(("Service", "Package", ""), services))

    def _file(self, file: FileDescriptor) -> str:
        here = _path_of(file)
        anchors = [anchor(heading) for _, heading in _headings(file)]
        if len(anchors) != len(set(anchors)):
            raise ValueError(f"{file.name}: two names of it have one anchor")
        title = ", ".join(service.name for service in file.services_by_name.values())
        parts: list[Iterable[str]] = [[f"Package `{file.package}`, `{file.name}`.", ""]]
        parts += [self._service(service, here) for service in file.services_by_name.values()]
        parts += [self._message(message, here) for message in _messages(file.message_types_by_name.values())]
        parts += [self._enum(enum) for enum in _enums(file)]
        return page(title or PurePosixPath(file.name).stem.replace("_", " ").capitalize(), *parts)

    def _service(self, service: ServiceDescriptor, here: str) -> Iterator[str]:
        if len(service.file.services_by_name) > 1:
            yield from (f"## {service.name}", "")
        yield from (self._said(service.full_name), "")
        for method in service.methods:
            yield from (f"### {service.name}.{method.name}", "", self._said(method.full_name), "")
            rows = [("Request", _streamed(method.client_streaming) + self.link(method.input_type.full_name, here))]
            rows += [("Answer", _streamed(method.server_streaming) + self.link(method.output_type.full_name, here))]
            rows += [("Who may call", _access(method))]
            if binding := _binding(method):
                rows += [("REST", code(binding))]
            if method.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS:
                rows += [("Kind", "a read, which clients may repeat")]
            yield from table(("", ""), rows)

    def _message(self, message: Descriptor, here: str) -> Iterator[str]:
        yield from (f"### {_short(message)}", "", self._said(message.full_name), "")
        rows = [
            (code(field.name), self._type(field, here), _choice(field) + self._said(field.full_name))
            for field in message.fields
        ]
        yield from table(("Field", "Type", ""), rows)

    def _enum(self, enum: EnumDescriptor) -> Iterator[str]:
        yield from (f"### {_short(enum)}", "", self._said(enum.full_name), "")
        rows = [
            (code(value.name), str(value.number), self._said(f"{enum.full_name}.{value.name}")) for value in enum.values
        ]
        yield from table(("Value", "Number", ""), rows)

    def _type(self, field: FieldDescriptor, here: str) -> str:
        if is_map(field) and field.message_type is not None:
            key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
            return f"map of {self._type(key, here)} to {self._type(value, here)}"
        if field.message_type is not None:
            kind = self.link(field.message_type.full_name, here)
        elif field.enum_type is not None:
            kind = self.link(field.enum_type.full_name, here)
        else:
            kind = _SCALARS[field.type]
        return f"list of {kind}" if field.is_repeated else kind

    def _rest(self) -> str:
        described = document(self._contracts)
        of_rpc = {_rpc(method): method for service in self._contracts.services for method in service.methods}
        rows: dict[str, list[tuple[str, str, str, str]]] = defaultdict(list)
        for path, operations in described["paths"].items():
            for verb, operation in operations.items():
                method = of_rpc.get(operation.get("x-rpc", ""))
                rpc = "" if method is None else self.link(method.full_name, "rest.md", method.name)
                permission = code(operation.get("x-permission", ""))
                section = operation["tags"][0]
                rows[section].append((f"`{verb.upper()} {path}`", text(operation["summary"]), permission, rpc))
        said = [text(line) if line.startswith("**") else line for line in described["info"]["description"].splitlines()]
        parts: list[Iterable[str]] = [
            ["A running platform describes all of this at `/docs`, and for programs at `/openapi.json`.", ""],
            [line.replace("\\*\\*", "**") for line in said],
            [""],
        ]
        for tag in described["tags"]:
            head = [f"## {tag['name']}", "", text(tag.get("description", "")), ""]
            parts.append(head + table(("Route", "", "Permission", "RPC"), rows[tag["name"]]))
        return page("REST", *parts)


def _files(services: Iterable[ServiceDescriptor]) -> list[FileDescriptor]:
    """The files of services, and those of ours that they import."""
    found: dict[str, FileDescriptor] = {}
    waiting = [service.file for service in services]
    while waiting:
        file = waiting.pop()
        if file.name not in found and not file.package.startswith("google."):
            found[file.name] = file
            waiting += file.dependencies
    return list(found.values())


def _path_of(file: FileDescriptor) -> str:
    parts = [part for part in PurePosixPath(file.name).with_suffix(".md").parts if part not in ("aiaas", "v1")]
    return str(PurePosixPath("grpc", *parts))


def _headings(file: FileDescriptor) -> Iterator[tuple[str, str]]:
    for service in file.services_by_name.values():
        yield service.full_name, service.name
        for method in service.methods:
            yield method.full_name, f"{service.name}.{method.name}"
    everything: list[Descriptor | EnumDescriptor] = [*_messages(file.message_types_by_name.values()), *_enums(file)]
    for described in everything:
        yield described.full_name, _short(described)


def _messages(messages: Iterable[Descriptor]) -> Iterator[Descriptor]:
    for message in messages:
        if not message.GetOptions().map_entry:
            yield message
            yield from _messages(message.nested_types)


def _enums(file: FileDescriptor) -> list[EnumDescriptor]:
    nested = [enum for message in _messages(file.message_types_by_name.values()) for enum in message.enum_types]
    return [*file.enum_types_by_name.values(), *nested]


def _short(described: Descriptor | EnumDescriptor) -> str:
    return described.full_name.removeprefix(f"{described.file.package}.")


def _rpc(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def _streamed(is_streamed: bool) -> str:
    return "a stream of " if is_streamed else ""


def _binding(method: MethodDescriptor) -> str:
    rest = policy_of(method).rest
    return f"{rest.verb} {rest.path}" if rest.path else ""


def _access(method: MethodDescriptor) -> str:
    policy = policy_of(method)
    if policy.permission:
        return f"whoever has the permission {code(policy.permission)}"
    if policy.internal:
        names = [options_pb2.Service.Name(caller).removeprefix("SERVICE_").lower() for caller in policy.callers]
        return f"services of the platform: {', '.join(names)}"
    return "anybody" if policy.public else "whoever is signed in"


def _choice(field: FieldDescriptor) -> str:
    """Says which fields exclude each other; an optional field alone excludes none."""
    oneof = field.containing_oneof
    return f"One of `{oneof.name}`. " if oneof is not None and len(oneof.fields) > 1 else ""

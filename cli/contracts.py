"""Writes commands.json, what the command line knows of the contracts: `python -m cli.contracts DESCRIPTORS FILE`.

It runs when gen/ is made, so that a command starts without protobuf; it never runs in a command.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool

from aiaas.type.v1 import options_pb2

GROUPS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("api-keys",): ("keys",),
    ("audit-checkpoints",): ("audit", "checkpoints"),
    ("audit-entries",): ("audit",),
    ("budget-alerts",): ("budgets", "alerts"),
    ("configuration",): ("config",),
    ("configuration-schema",): ("config", "schema"),
    ("export-schedule",): ("exports", "schedule"),
    ("models", "routing-policy"): ("routes",),
    ("organizations",): ("orgs",),
    ("policy-decisions",): ("policies", "decisions"),
    ("principal", "mfa"): ("mfa",),
    ("principal", "oauth-grants"): ("oauth-grants",),
    ("routing-policies",): ("routes",),
    ("usage-records",): ("usage", "records"),
}
"""Shorter names for groups of commands whose REST paths begin so; what is not here is called as in its path."""

ORGANIZATION = "organization_id"
ETAG = "etag"
REQUEST_ID = "request_id"

_DESTRUCTIVE = frozenset({"revoke", "rotate", "suspend", "settle", "end-sessions", "reset-mfa", "disable"})
"""Besides DELETE, the verbs that take from somebody what cannot be given back by the opposite command."""

_KINDS = {
    FieldDescriptor.TYPE_BOOL: "boolean",
    FieldDescriptor.TYPE_STRING: "text",
    FieldDescriptor.TYPE_BYTES: "base64",
    FieldDescriptor.TYPE_DOUBLE: "number",
    FieldDescriptor.TYPE_FLOAT: "number",
}
_WELL_KNOWN = {"google.protobuf.Timestamp": "time", "google.protobuf.Duration": "duration"}

Json = dict[str, Any]


class Commands:
    """Makes the description of every command from a descriptor set with comments."""

    def __init__(self, descriptor_set: bytes) -> None:
        """Raises DecodeError."""
        files = FileDescriptorSet.FromString(descriptor_set).file
        pool = DescriptorPool()
        for file in files:
            pool.Add(file)
        self._services = [
            service for file in files for service in pool.FindFileByName(file.name).services_by_name.values()
        ]
        self._comments: dict[str, str] = {}
        # Of every value of an enum that a contract has, for tables.
        self._short_names = {
            _choices(enum)["prefix"] + name.upper().replace("-", "_"): name
            for file in files
            if not file.package.startswith("google.")
            for enum in pool.FindFileByName(file.name).enum_types_by_name.values()
            for name in _choices(enum)["choices"]
        }
        for file in files:
            names = dict(_named(file.package, (), file.message_type, file.enum_type))
            names |= {
                (6, index, 2, position): f"{file.package}.{service.name}.{method.name}"
                for index, service in enumerate(file.service)
                for position, method in enumerate(service.method)
            }
            names |= {(6, index): f"{file.package}.{service.name}" for index, service in enumerate(file.service)}
            for location in file.source_code_info.location:
                if tuple(location.path) in names:
                    self._comments[names[tuple(location.path)]] = " ".join(location.leading_comments.split())

    def describe(self) -> Json:
        """Groups with what is said of them, short names of enums, and commands.

        Raises ValueError where two RPCs would be one command.
        """
        commands: list[Json] = []
        taken: dict[str, str] = {}
        for service in sorted(self._services, key=lambda service: service.full_name):
            for method in service.methods:
                rest = _policy(method).rest
                if not rest.path:
                    continue
                command = self._command(method)
                path = " ".join(command["path"])
                if path in taken:
                    raise ValueError(f"{method.full_name} and {taken[path]} are both the command {path!r}")
                taken[path] = method.full_name
                commands.append(command)
        groups = self._groups()
        if both := groups.keys() & taken.keys():
            raise ValueError(f"{', '.join(both)}: a command and a group of commands")
        described = sorted(commands, key=lambda known: known["path"])
        return {"groups": groups, "choices": dict(sorted(self._short_names.items())), "commands": described}

    def _groups(self) -> dict[str, str]:
        """What is said of every group: of the outermost one with most of a service's RPCs what is said of the
        service, of any other what is said of its resource."""
        said: dict[str, str] = {}
        for service in self._services:
            methods: dict[str, list[MethodDescriptor]] = {}
            for method in service.methods:
                if path := _policy(method).rest.path:
                    methods.setdefault(" ".join(_place(path, method.name)[0]), []).append(method)
            first = max(methods, key=lambda group: (-group.count(" "), len(methods[group])), default="")
            for group, within in methods.items():
                resource = within[0].output_type.fields[0].message_type if within[0].output_type.fields else None
                comment = self._comments.get(resource.full_name, "") if resource is not None else ""
                if group == first:
                    said[group] = self._comments.get(service.full_name, "")
                elif not said.get(group):
                    said[group] = comment or self._comments.get(within[0].full_name, "")
        return dict(sorted(said.items()))

    def _command(self, method: MethodDescriptor) -> Json:
        policy = _policy(method)
        rest = policy.rest
        path_fields = re.findall(r"\{(\w+)\}", rest.path)
        # An organization that the path ends with is what the command is about; any other is where it acts.
        acts_within = ORGANIZATION in path_fields and not re.search(r"\{organization_id\}(:\w+)?$", rest.path)
        group, name = _place(rest.path, method.name)
        body = method.input_type.fields_by_name[rest.body].message_type if rest.body not in ("", "*") else None
        # A resource that is being made has none yet.
        has_etag = rest.verb != "GET" and (
            ETAG in method.input_type.fields_by_name
            or (rest.verb == "PATCH" and body is not None and ETAG in body.fields_by_name)
        )
        takes_request_id = (
            rest.verb != "GET" and REQUEST_ID in method.input_type.fields_by_name and REQUEST_ID not in path_fields
        )
        told = set(path_fields) | {ETAG} | ({REQUEST_ID} if takes_request_id else set())
        fields = []
        if body is not None:
            fields += [known | {"place": "body"} for known in self._fields(body, told)]
            told |= {rest.body}
        place = "body" if rest.body == "*" else "query"
        fields += [known | {"place": place} for known in self._fields(method.input_type, told)]
        names = [known["name"] for known in fields]
        if len(set(names)) < len(names):
            raise ValueError(f"{method.full_name}: its body and its query share a field's name")
        command: Json = {
            "path": [*group, name],
            "rpc": method.full_name,
            "help": self._comments.get(method.full_name, ""),
            "permission": policy.permission,
            "verb": rest.verb,
            "template": rest.path,
            "arguments": [known for known in path_fields if not (acts_within and known == ORGANIZATION)],
            "within_organization": acts_within,
            "is_public": policy.public,
            "has_body": bool(rest.body),
            "fields": fields,
        }
        if method.server_streaming:
            command["is_streaming"] = True
        if has_etag:
            command["has_etag"] = True
        if takes_request_id:
            command["takes_request_id"] = True
        if rest.verb == "DELETE" or name in _DESTRUCTIVE:
            command["is_destructive"] = True
        return command | _answer(method.output_type)

    def _fields(self, message: Descriptor, told: set[str], around: tuple[Descriptor, ...] = ()) -> Iterator[Json]:
        """A message's fields that a client gives, those of the messages in it under dotted names."""
        for field in message.fields:
            said = self._comments.get(field.full_name, "")
            if field.name in told or "Output only." in said:
                continue
            kind = field.message_type
            if kind is None or field.is_repeated or kind.full_name.startswith("google.protobuf."):
                yield self._field(field, said)
            elif kind not in around:
                for inner in self._fields(kind, set(), (*around, message)):
                    yield inner | {"name": f"{field.name}.{inner['name']}"}

    def _field(self, field: FieldDescriptor, said: str) -> Json:
        described: Json = {"name": field.name, "help": said}
        kind = field.message_type
        if field.enum_type is not None:
            described |= {"kind": "choice", **_choices(field.enum_type)}
        elif kind is not None and kind.GetOptions().map_entry:
            described["kind"] = "map"
        elif kind is not None and kind.full_name == "google.protobuf.FieldMask":
            described["kind"] = "mask"
        elif kind is not None:
            described["kind"] = _WELL_KNOWN.get(kind.full_name, "object")
        else:
            described["kind"] = _KINDS.get(field.type, "integer")
        if field.is_repeated and described["kind"] != "map":
            described["is_repeated"] = True
        if field.GetOptions().debug_redact:
            described["is_secret"] = True
        return described


def _policy(method: MethodDescriptor) -> Any:
    """The policy, read by the extension that this program is linked with."""
    options = type(method.GetOptions())
    return options.FromString(method.GetOptions().SerializeToString()).Extensions[options_pb2.policy]


def _place(path: str, rpc: str) -> tuple[tuple[str, ...], str]:
    """The group and the name of an RPC's command: literals of the path, then its custom verb or the RPC's own verb."""
    path, _, custom = path.partition(":")
    literals = tuple(part for part in path.split("/")[3:] if not part.startswith("{"))
    if len(literals) > 1 and literals[0] == "organizations":
        literals = literals[1:]
    for length in range(len(literals), 0, -1):
        if literals[:length] in GROUPS:
            literals = GROUPS[literals[:length]] + literals[length:]
            break
    verb = custom or re.sub(r"(?<=[a-z])[A-Z].*", "", rpc)
    return literals, re.sub(r"(?<=[a-z])(?=[A-Z])", "-", verb).lower()


def _answer(message: Descriptor) -> Json:
    """Where in an answer the rows of a table, or the one resource, stand; and what in it is secret."""
    told: Json = {}
    nested = [field for field in message.fields if field.message_type is not None and not _is_plain(field)]
    rows = [field for field in nested if field.is_repeated]
    if "next_page_token" in message.fields_by_name:
        told["is_paged"] = True
    if len(rows) == 1 and ("is_paged" in told or len(message.fields) == 1):
        told["rows"] = rows[0].name
    elif len(nested) == 1 and not rows and nested[0].index == 0:
        told["resource"] = nested[0].name
    if secrets := list(_secrets(message)):
        told["secrets"] = secrets
    return told


def _secrets(message: Descriptor, around: tuple[Descriptor, ...] = ()) -> Iterator[str]:
    """Where in an answer secrets stand, with dots between names."""
    for field in message.fields:
        if field.GetOptions().debug_redact:
            yield field.name
        elif field.message_type is not None and not field.is_repeated and message not in around:
            yield from (f"{field.name}.{inner}" for inner in _secrets(field.message_type, (*around, message)))


def _is_plain(field: FieldDescriptor) -> bool:
    kind = field.message_type
    return kind is not None and (kind.full_name.startswith("google.protobuf.") or kind.GetOptions().map_entry)


def _choices(enum: EnumDescriptor) -> Json:
    """Values under short names, the enum's prefix put aside: "hard" for BUDGET_ENFORCEMENT_HARD."""
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper() + "_"
    names = [value.name for value in enum.values if value.number]
    if not all(name.startswith(prefix) for name in names):
        prefix = ""
    return {"prefix": prefix, "choices": [name.removeprefix(prefix).lower().replace("_", "-") for name in names]}


def _named(
    package: str, path: tuple[int, ...], messages: Any, enums: Any, numbers: tuple[int, int] = (4, 5)
) -> Iterator[tuple[tuple[int, ...], str]]:
    """The full names of messages and their fields, by the paths that descriptor.proto numbers them with."""
    message: DescriptorProto
    enum: EnumDescriptorProto
    for index, message in enumerate(messages):
        here, name = (*path, numbers[0], index), f"{package}.{message.name}"
        yield here, name
        for position, field in enumerate(message.field):
            yield (*here, 2, position), f"{name}.{field.name}"
        yield from _named(name, here, message.nested_type, message.enum_type, (3, 4))
    for index, enum in enumerate(enums):
        yield (*path, numbers[1], index), f"{package}.{enum.name}"


if __name__ == "__main__":
    described = Commands(Path(sys.argv[1]).read_bytes()).describe()
    Path(sys.argv[2]).write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

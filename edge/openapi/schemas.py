"""Messages and enums as the JSON schemas of OpenAPI 3.1, in the names and forms that the edge writes; never a schema of
anything that is not a protobuf message."""

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from edge.transcode.fields import is_map, is_nested

Schema = dict[str, Any]

CHOICES = "x-oneof"
"""Lists of properties, of each of which at most one is set."""

_INT32: Schema = {"type": "integer", "format": "int32"}
_UINT32: Schema = {"type": "integer", "format": "int64", "minimum": 0, "maximum": 4294967295}
_INT64: Schema = {"type": "string", "format": "int64", "pattern": "^-?[0-9]{1,19}$"}
_UINT64: Schema = {"type": "string", "format": "uint64", "pattern": "^[0-9]{1,20}$"}
_SCALARS: Mapping[int, Schema] = {
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
    FieldDescriptor.TYPE_DOUBLE: {"type": "number", "format": "double"},
    FieldDescriptor.TYPE_FLOAT: {"type": "number", "format": "float"},
    FieldDescriptor.TYPE_INT32: _INT32,
    FieldDescriptor.TYPE_SINT32: _INT32,
    FieldDescriptor.TYPE_SFIXED32: _INT32,
    FieldDescriptor.TYPE_UINT32: _UINT32,
    FieldDescriptor.TYPE_FIXED32: _UINT32,
    FieldDescriptor.TYPE_INT64: _INT64,
    FieldDescriptor.TYPE_SINT64: _INT64,
    FieldDescriptor.TYPE_SFIXED64: _INT64,
    FieldDescriptor.TYPE_UINT64: _UINT64,
    FieldDescriptor.TYPE_FIXED64: _UINT64,
}
# Their JSON is protobuf's own (https://protobuf.dev/programming-guides/json/).
_WELL_KNOWN: Mapping[str, Schema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]{1,11}(\.[0-9]{1,9})?s$"},
    "google.protobuf.FieldMask": {"type": "string"},
    "google.protobuf.Struct": {"type": "object"},
    "google.protobuf.Value": {},
    "google.protobuf.ListValue": {"type": "array"},
    "google.protobuf.Empty": {"type": "object"},
    "google.protobuf.Any": {"type": "object", "required": ["@type"]},
}
_EXAMPLE = re.compile(r'for example "([^"]+)"')


class Schemas:
    """Makes schemas, and keeps those of messages and enums under their names, for `#/components/schemas`."""

    def __init__(self, comments: Mapping[str, str]) -> None:
        self._comments = comments
        self._descriptors: dict[str, Descriptor | EnumDescriptor] = {}
        self._taken: set[str] = set()

    def comment(self, full_name: str) -> str:
        """What the contract says of something; empty where it says nothing."""
        return self._comments.get(full_name, "")

    def reference(self, descriptor: Descriptor | EnumDescriptor, *, taken: bool = False) -> Schema:
        """Where the schema of a message or enum stands; `taken` for what clients send, which need not be complete.

        Raises ValueError if two contracts have a message of that name.
        """
        name = descriptor.name
        if self._descriptors.setdefault(name, descriptor) is not descriptor:
            raise ValueError(f"{self._descriptors[name].full_name} and {descriptor.full_name} have one name")
        if taken and name not in self._taken:
            self._taken.add(name)
            if isinstance(descriptor, Descriptor):
                for field in descriptor.fields:
                    self.of(field, taken=True)
        return {"$ref": f"#/components/schemas/{name}"}

    def of(self, field: FieldDescriptor, *, taken: bool = False) -> Schema:
        """The schema of a field with what is said of it."""
        if is_map(field) and field.message_type is not None:
            values = self._of_one(field.message_type.fields_by_name["value"], taken)
            schema: Schema = {"type": "object", "additionalProperties": values}
        elif field.is_repeated:
            schema = {"type": "array", "items": self._of_one(field, taken)}
        else:
            schema = self._of_one(field, taken)
        return schema | self._said_of(field)

    def request(self, message: Descriptor, without: Collection[str]) -> Schema:
        """The schema of what a client sends for a message, some of whose fields it tells elsewhere."""
        return self._object(message, [field for field in message.fields if field.name not in without], taken=True)

    def components(self) -> dict[str, Schema]:
        """Every message and enum that was referred to, and what they refer to, by name."""
        made: dict[str, Schema] = {}
        while missing := self._descriptors.keys() - made.keys():
            for name in missing:
                descriptor = self._descriptors[name]
                made[name] = self._message(descriptor) if isinstance(descriptor, Descriptor) else self._enum(descriptor)
        return dict(sorted(made.items()))

    def _of_one(self, field: FieldDescriptor, taken: bool) -> Schema:
        if field.enum_type is not None:
            return self.reference(field.enum_type, taken=taken)
        if field.message_type is None:
            return dict(_SCALARS[field.type])
        if is_nested(field):
            return self.reference(field.message_type, taken=taken)
        return dict(_WELL_KNOWN[field.message_type.full_name])

    def _said_of(self, field: FieldDescriptor) -> Schema:
        said: Schema = {}
        if comment := self.comment(field.full_name):
            said["description"] = comment
            if example := _EXAMPLE.search(comment):
                said["examples"] = [[example[1]] if field.is_repeated else example[1]]
            if "Output only." in comment:
                said["readOnly"] = True
        if field.GetOptions().debug_redact and field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
            said["format"] = "password"
        return said

    def _message(self, message: Descriptor) -> Schema:
        schema = self._object(message, message.fields, taken=False)
        # An answer has every field that is not absent when it is empty.
        always = [field.name for field in message.fields if not field.has_presence]
        if always and message.name not in self._taken:
            schema["required"] = always
        return schema

    def _object(self, message: Descriptor, fields: Sequence[FieldDescriptor], *, taken: bool) -> Schema:
        schema: Schema = {
            "type": "object",
            "properties": {field.name: self.of(field, taken=taken) for field in fields},
            "additionalProperties": False,
        }
        choices = [[field.name for field in oneof.fields] for oneof in message.oneofs if len(oneof.fields) > 1]
        if choices:
            schema[CHOICES] = choices
            pairs = [pair for names in choices for pair in itertools.combinations(names, 2)]
            schema["not"] = {"anyOf": [{"required": list(pair)} for pair in pairs]}
        said = [self.comment(message.full_name)]
        said += [f"At most one of {', '.join(f'`{name}`' for name in names)} is set." for names in choices]
        if description := " ".join(text for text in said if text):
            schema["description"] = description
        return schema

    def _enum(self, enum: EnumDescriptor) -> Schema:
        lines = [f"- `{value.name}`: {self.comment(f'{enum.full_name}.{value.name}')}" for value in enum.values]
        return {
            "type": "string",
            "enum": [value.name for value in enum.values],
            "description": "\n".join([self.comment(enum.full_name), "", *lines]),
        }

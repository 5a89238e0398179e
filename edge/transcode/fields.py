"""Makes protobuf messages from JSON values and says exactly which field is wrong, in the client's own spelling; it
never repeats a value in an error, as it may be a secret.

What JSON a field takes is decided by protobuf's own json_format alone. Where that refuses something, the field is found
by trying the values one by one.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from mesh.errors import MOST_VIOLATIONS, PlatformError, Reason, together

Leaf = Callable[[Descriptor, FieldDescriptor, Any], bool]

FIELD_MASK = "google.protobuf.FieldMask"

_EXPECTED_MESSAGE = {
    "google.protobuf.Timestamp": 'a time as in RFC 3339, for example "2026-01-31T12:00:00Z"',
    "google.protobuf.Duration": 'seconds with an "s", for example "3.5s"',
    FIELD_MASK: 'names of fields, separated by commas, for example "display_name,scopes"',
}
_EXPECTED_SCALAR = {
    FieldDescriptor.TYPE_BOOL: "true or false",
    FieldDescriptor.TYPE_STRING: "a string of valid Unicode",
    FieldDescriptor.TYPE_BYTES: "a string in base64",
    FieldDescriptor.TYPE_DOUBLE: "a number",
    FieldDescriptor.TYPE_FLOAT: "a number",
}
_EXPECTED_UNSIGNED = (
    FieldDescriptor.TYPE_UINT32,
    FieldDescriptor.TYPE_UINT64,
    FieldDescriptor.TYPE_FIXED32,
    FieldDescriptor.TYPE_FIXED64,
)


def parse_json(body: bytes) -> Any:
    """The JSON value of a body. Raises PlatformError(INVALID_JSON), with the position where there is one."""
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=_without_repetition, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}."
        raise PlatformError(Reason.INVALID_JSON, description=f"The body is not valid JSON: {where}") from None
    except UnicodeDecodeError:
        raise PlatformError(Reason.INVALID_JSON, description="The body is not valid UTF-8.") from None
    except (ValueError, RecursionError):
        raise PlatformError(Reason.INVALID_JSON) from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise PlatformError(Reason.INVALID_JSON, field=twice, description="The body has an object with a name twice.")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def convert(value: dict[str, Any], descriptor: Descriptor) -> Message:
    """The message that a JSON object stands for.

    Raises PlatformError(UNKNOWN_FIELD) or INVALID_ARGUMENT, naming the fields that are wrong, up to 50, by their paths
    from the message, for example "filter.models[2]".
    """
    if next(_problems(value, descriptor, "", _may_be), None) is None:
        # json_format raises more than its ParseError, and its texts repeat the values.
        with suppress(Exception):
            return json_format.ParseDict(value, GetMessageClass(descriptor)())
    problems = itertools.islice(_problems(value, descriptor, "", _is), MOST_VIOLATIONS)
    raise together([*problems] or [PlatformError(Reason.INVALID_ARGUMENT)])


def field_named(descriptor: Descriptor, name: str) -> FieldDescriptor | None:
    """The field of that name, as the contract spells it (display_name) or as protobuf's JSON does (displayName)."""
    if not name.isascii():
        # protobuf's own look-up breaks on lone surrogates.
        return None
    known = descriptor.fields_by_name.get(name)
    return known or next((field for field in descriptor.fields if field.json_name == name), None)


def is_map(field: FieldDescriptor) -> bool:
    """Whether the field is a map."""
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def is_mask(field: FieldDescriptor) -> bool:
    """Whether the field names other fields."""
    return field.message_type is not None and field.message_type.full_name == FIELD_MASK


def is_nested(field: FieldDescriptor) -> bool:
    """Whether JSON writes the field's values as objects with fields of their own."""
    message = field.message_type
    return message is not None and not message.full_name.startswith("google.protobuf.") and not is_map(field)


def expected(field: FieldDescriptor) -> str:
    """What one value of a field has to be, in words."""
    if is_map(field):
        return "an object"
    if field.message_type is not None:
        return _EXPECTED_MESSAGE.get(field.message_type.full_name, "an object")
    if field.enum_type is not None:
        return "one of " + ", ".join(value.name for value in field.enum_type.values if value.number)
    if field.type in _EXPECTED_SCALAR:
        return _EXPECTED_SCALAR[field.type]
    bits = 64 if field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64) else 32
    sign = "an unsigned" if field.type in _EXPECTED_UNSIGNED else "an"
    return f"{sign} integer of {bits} bits"


def wrong(field: FieldDescriptor | str, path: str) -> PlatformError:
    """The error for a value at `path` that is not what its field, or the words given, expect."""
    words = field if isinstance(field, str) else expected(field)
    return PlatformError(
        Reason.INVALID_ARGUMENT, field=path, description=f"Invalid value for '{path}': expected {words}."
    )


def _problems(value: Any, descriptor: Descriptor, path: str, leaf: Leaf) -> Iterator[PlatformError]:
    """What is wrong with names and the form around values, and with each value that `leaf` refuses."""
    if not isinstance(value, dict):
        yield wrong("an object", path)
        return
    seen: set[str] = set()
    for name, item in value.items():
        here = f"{path}.{name}" if path else name
        field = field_named(descriptor, name)
        if field is None:
            yield PlatformError(Reason.UNKNOWN_FIELD, field=here)
            continue
        choice = field.containing_oneof
        group = choice.name if choice is not None and len(choice.fields) > 1 and item is not None else field.name
        if field.name in seen or group in seen:
            yield PlatformError(Reason.INVALID_ARGUMENT, field=here, description=f"'{here}' contradicts another field.")
        seen |= {field.name, group}
        if item is None:
            continue
        if field.is_repeated and not is_map(field):
            if not isinstance(item, list):
                yield wrong(f"a list, each element {expected(field)}", here)
                continue
            for index, element in enumerate(item):
                yield from _problems_of_one(element, descriptor, field, f"{here}[{index}]", leaf)
        else:
            yield from _problems_of_one(item, descriptor, field, here, leaf)


def _problems_of_one(
    value: Any, descriptor: Descriptor, field: FieldDescriptor, path: str, leaf: Leaf
) -> Iterator[PlatformError]:
    if value is None:
        yield wrong(field, path)
    elif is_nested(field) and field.message_type is not None:
        yield from _problems(value, field.message_type, path, leaf)
    elif not leaf(descriptor, field, value):
        yield wrong(field, path)


def _may_be(descriptor: Descriptor, field: FieldDescriptor, value: Any) -> bool:
    """Any value, as json_format judges it better; but that lets numbers pass that an enum does not have."""
    return field.enum_type is None or _may_be_of(field.enum_type, value)


def _may_be_of(enum: EnumDescriptor, value: Any) -> bool:
    if isinstance(value, str):
        return value in enum.values_by_name or value in {str(number) for number in enum.values_by_number}
    return not isinstance(value, int) or (value in enum.values_by_number and not isinstance(value, bool))


def _is(descriptor: Descriptor, field: FieldDescriptor, value: Any) -> bool:
    if not _may_be(descriptor, field, value):
        return False
    alone = [value] if field.is_repeated and not is_map(field) else value
    try:
        json_format.ParseDict({field.name: alone}, GetMessageClass(descriptor)())
    except Exception:
        return False
    return True

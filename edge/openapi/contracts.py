"""Reads a descriptor set with its comments; it never looks at the contracts that this program was linked with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from google.protobuf.descriptor_pool import DescriptorPool

# The options of RPCs are read with the linked extension.
from aiaas.type.v1 import options_pb2 as options_pb2


@dataclass(frozen=True)
class Contracts:
    """Services, and what is said of everything in them by its full name."""

    services: tuple[ServiceDescriptor, ...]
    comments: Mapping[str, str]


def read_contracts(descriptor_set: bytes) -> Contracts:
    """The contracts of a serialized FileDescriptorSet that holds what it imports, before what imports it.

    Raises DecodeError, and ValueError where it holds no comments at all.
    """
    files = FileDescriptorSet.FromString(descriptor_set).file
    pool = DescriptorPool()
    for file in files:
        pool.Add(file)
    services = [service for file in files for service in pool.FindFileByName(file.name).services_by_name.values()]
    comments = {name: text for file in files for name, text in _comments(file)}
    if not comments:
        raise ValueError("the descriptor set has no comments; make it with --include_source_info")
    return Contracts(tuple(sorted(services, key=lambda service: service.full_name)), comments)


def _comments(file: FileDescriptorProto) -> Iterator[tuple[str, str]]:
    names = dict(_named(file))
    for location in file.source_code_info.location:
        name = names.get(tuple(location.path))
        if name is not None and location.leading_comments:
            yield name, " ".join(location.leading_comments.split())


def _named(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """The full name of everything that can have a comment, by its path as descriptor.proto numbers it."""
    for index, message in enumerate(file.message_type):
        yield from _in_message((4, index), f"{file.package}.{message.name}", message)
    for index, enum in enumerate(file.enum_type):
        yield from _in_enum((5, index), f"{file.package}.{enum.name}", enum)
    for index, service in enumerate(file.service):
        name = f"{file.package}.{service.name}"
        yield (6, index), name
        for position, method in enumerate(service.method):
            yield (6, index, 2, position), f"{name}.{method.name}"


def _in_message(path: tuple[int, ...], name: str, message: DescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    yield path, name
    for index, field in enumerate(message.field):
        yield (*path, 2, index), f"{name}.{field.name}"
    for index, nested in enumerate(message.nested_type):
        yield from _in_message((*path, 3, index), f"{name}.{nested.name}", nested)
    for index, enum in enumerate(message.enum_type):
        yield from _in_enum((*path, 4, index), f"{name}.{enum.name}", enum)


def _in_enum(path: tuple[int, ...], name: str, enum: EnumDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    yield path, name
    for index, value in enumerate(enum.value):
        # Values of an enum have the enum's neighbours' names; here they stand below it.
        yield (*path, 2, index), f"{name}.{value.name}"

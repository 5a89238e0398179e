"""Documents that describe an organization: read from YAML, written as YAML, compared; it never changes anything.

A section that a document leaves out is not managed by it. Whatever a document names, it names by what people call it:
roles and service accounts by their name, members by their address. There is no place for a secret in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta

DOCUMENT_BYTES = 1 << 20
"""No document is longer."""

_Name = Annotated[str, Meta(min_length=1, max_length=200)]
_Limit = Annotated[int, Meta(ge=1)]
_Rate = Annotated[float, Meta(gt=0)]
_ITEMS = 10_000
_DEPTH = 20


class _Section(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A mapping of a document; a field that it does not know is an error."""


class ModelLimits(_Section):
    """Limits on the requests for one model."""

    model: _Name
    requests_per_second: _Rate | None = None
    tokens_per_minute: _Limit | None = None
    concurrent_requests: _Limit | None = None


class Limits(_Section):
    """Rate limits; what is left out is the platform's default."""

    requests_per_second: _Rate | None = None
    burst_requests: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    concurrent_requests: _Limit | None = None
    models: Annotated[list[ModelLimits], Meta(max_length=_ITEMS)] = []


class OrganizationSection(_Section):
    """The organization itself. `allowed_models` without any allows all."""

    rate_limits: Limits = msgspec.field(default_factory=Limits)
    allowed_models: Annotated[list[_Name], Meta(max_length=_ITEMS)] = []


class RoleItem(_Section):
    """A custom role."""

    name: _Name
    permissions: Annotated[list[_Name], Meta(min_length=1, max_length=_ITEMS)]


class MemberItem(_Section):
    """A member, by address. Roles are ids of built-in ones or names of custom ones."""

    email: _Name
    roles: Annotated[list[_Name], Meta(max_length=20)]
    display_name: Annotated[str, Meta(max_length=200)] = ""


class ServiceAccountItem(_Section):
    """A service account; its keys are made elsewhere."""

    name: _Name
    roles: Annotated[list[_Name], Meta(max_length=20)] = []
    disabled: bool = False


class BudgetItem(_Section):
    """A budget of the organization, of a member or of a service account, for all models or one. A limit of cost is in
    micro-dollars."""

    name: _Name
    unit: Literal["cost", "tokens", "requests"]
    interval: Literal["daily", "monthly", "quarterly", "annual", "total"]
    limit: Annotated[int, Meta(ge=0)]
    enforcement: Literal["hard", "soft"] = "hard"
    alert_percents: Annotated[list[Annotated[int, Meta(ge=1, le=1000)]], Meta(max_length=20)] = msgspec.field(
        default_factory=lambda: [50, 80, 100]
    )
    member: Annotated[str, Meta(max_length=254)] = ""
    service_account: Annotated[str, Meta(max_length=200)] = ""
    model: Annotated[str, Meta(max_length=200)] = ""
    disabled: bool = False


class Document(_Section):
    """An organization as it shall be. `allow_deletions` is whether the watched directory removes what is not in it."""

    version: Literal[1]
    allow_deletions: bool = False
    organization: OrganizationSection | None = None
    roles: Annotated[list[RoleItem], Meta(max_length=_ITEMS)] | None = None
    members: Annotated[list[MemberItem], Meta(max_length=_ITEMS)] | None = None
    service_accounts: Annotated[list[ServiceAccountItem], Meta(max_length=_ITEMS)] | None = None
    budgets: Annotated[list[BudgetItem], Meta(max_length=_ITEMS)] | None = None


SECTIONS: Mapping[str, tuple[str, str]] = {
    "roles": ("role", "name"),
    "members": ("member", "email"),
    "service_accounts": ("service_account", "name"),
    "budgets": ("budget", "name"),
}
"""The lists of a document: what one of their items is, and the field that names it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong in a document, at a path such as "budgets[2].limit"; `line` counts from 1, 0 is none in
    particular."""

    path: str
    line: int
    message: str


class DocumentError(Exception):
    """A document that cannot be applied, and why."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(f"line {found.line}: {found.path}: {found.message}" for found in problems))
        self.problems = tuple(problems)


class ChangeKind(IntEnum):
    """What is done to a resource, as the contract numbers it."""

    CREATE = 1
    UPDATE = 2
    DELETE = 3
    KEEP = 4


_SIGNS = {ChangeKind.CREATE: "+", ChangeKind.UPDATE: "~", ChangeKind.DELETE: "-", ChangeKind.KEEP: "="}


@dataclass(frozen=True, slots=True)
class FieldChange:
    """A field before and after, as JSON; empty where there is none."""

    field: str
    before_json: str
    after_json: str


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to one resource. `item` is it as it shall be, or as it was where it goes."""

    kind: ChangeKind
    resource_type: str
    resource_name: str
    fields: tuple[FieldChange, ...]
    item: Any = None


def schema() -> str:
    """The JSON Schema (2020-12) of documents."""
    found = msgspec.json.schema(Document)
    for part in found["$defs"].values():
        part["description"] = " ".join(part["description"].split())
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema"} | found, sort_keys=True)


def read(text: str) -> Document:
    """A document out of YAML. Raises DocumentError."""
    if len(text.encode()) > DOCUMENT_BYTES:
        raise DocumentError([Problem("", 0, f"A document has at most {DOCUMENT_BYTES} bytes.")])
    try:
        node = yaml.compose(text, Loader=_Loader)
        plain = _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise DocumentError([Problem("", mark.line + 1 if mark else 0, error.problem or "It is no YAML.")]) from None
    except (yaml.YAMLError, RecursionError, ValueError):
        raise DocumentError([Problem("", 0, "It is no YAML that can be read.")]) from None
    try:
        document = msgspec.convert(plain, Document)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        path = place.rstrip("`").lstrip(".")
        raise DocumentError([Problem(path, _line_of(node, path), message)]) from None
    if problems := [Problem(path, _line_of(node, path), message) for path, message in _doubles(document)]:
        raise DocumentError(problems)
    return document


def write(document: Document) -> str:
    """A document as YAML."""
    plain = {name: value for name, value in msgspec.to_builtins(document).items() if value is not None}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)


def problem_at(text: str, resource_type: str, resource_name: str, message: str) -> Problem:
    """A problem with a resource of a document that could be read."""
    document = read(text)
    for section, (kind, name_field) in SECTIONS.items():
        for index, item in enumerate(getattr(document, section) or ()):
            if (kind, getattr(item, name_field)) == (resource_type, resource_name):
                path = f"{section}[{index}]"
                return Problem(path, _line_of(yaml.compose(text, Loader=_Loader), path), message)
    return Problem(resource_type, 0, message)


def compare(current: Document, wanted: Document, *, allow_deletions: bool) -> list[Change]:
    """What makes an organization that is `current` one that is `wanted`, in the order in which it can be done: nothing
    is made before what it names, nor removed before what names it."""
    changes: list[Change] = []
    removed: list[Change] = []
    if wanted.organization is not None and (fields := _differences(current.organization, wanted.organization)):
        changes.append(Change(ChangeKind.UPDATE, "organization", "", fields, wanted.organization))
    for section, (resource_type, name_field) in SECTIONS.items():
        if (items := getattr(wanted, section)) is None:
            continue
        before = {getattr(item, name_field): item for item in getattr(current, section) or ()}
        for item in items:
            name = getattr(item, name_field)
            known = before.pop(name, None)
            if fields := _differences(known, item):
                kind = ChangeKind.CREATE if known is None else ChangeKind.UPDATE
                changes.append(Change(kind, resource_type, name, fields, item))
        kind = ChangeKind.DELETE if allow_deletions else ChangeKind.KEEP
        removed += [Change(kind, resource_type, name, _differences(item, None), item) for name, item in before.items()]
    return changes + removed[::-1]


def describe(changes: Sequence[Change]) -> str:
    """Changes for people, a line for each difference."""
    lines = []
    for change in changes:
        lines.append(f"{_SIGNS[change.kind]} {change.resource_type} {change.resource_name}".rstrip())
        if change.kind is ChangeKind.KEEP:
            lines[-1] += " (not in the document, and kept)"
        if change.kind in (ChangeKind.CREATE, ChangeKind.UPDATE):
            lines += [
                f"    {field.field}: {field.before_json + ' -> ' if field.before_json else ''}{field.after_json}"
                for field in change.fields
            ]
    return "\n".join(lines)


def _differences(before: msgspec.Struct | None, after: msgspec.Struct | None) -> tuple[FieldChange, ...]:
    known = after if after is not None else before
    if known is None:
        return ()
    found = []
    for name in known.__struct_fields__:
        old, new = (None if item is None else _plain(getattr(item, name)) for item in (before, after))
        if old != new and (old or new):
            found.append(FieldChange(name, _json(old), _json(new)))
    return tuple(found)


def _plain(value: Any) -> Any:
    # The order of roles, models and permissions means nothing.
    plain = msgspec.to_builtins(value)
    if not isinstance(plain, list):
        return plain
    return sorted(plain, key=_json if plain and isinstance(plain[0], dict) else None)


def _json(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _doubles(document: Document) -> Iterator[tuple[str, str]]:
    for section, (_, name_field) in SECTIONS.items():
        seen = set()
        for index, item in enumerate(getattr(document, section) or ()):
            name = getattr(item, name_field).lower() if name_field == "email" else getattr(item, name_field)
            if name in seen:
                yield f"{section}[{index}].{name_field}", "It is there twice."
            seen.add(name)


class _Loader(yaml.SafeLoader):
    """YAML without aliases, as a few lines of them can mean gigabytes; without keys that are there twice; not deep."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="Aliases are not allowed.", problem_mark=self._mark())
        self._depth += 1
        if self._depth > _DEPTH:
            raise yaml.MarkedYAMLError(problem="It is nested too deeply.", problem_mark=self._mark())
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def _mark(self) -> yaml.Mark:
        mark: yaml.Mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        return mark

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' is there twice.", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _line_of(node: yaml.Node | None, path: str) -> int:
    """The line of what is at a path, or of the innermost part of it that is there."""
    line = 0
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        if node is None:
            break
        if isinstance(node, yaml.MappingNode) and name:
            found = [(key, value) for key, value in node.value if key.value == name]
            if not found:
                break
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and index and int(index) < len(node.value):
            node = node.value[int(index)]
            line = node.start_mark.line + 1
        else:
            break
    return line or (0 if node is None else node.start_mark.line + 1)

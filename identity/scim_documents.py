"""SCIM's JSON (RFC 7643) and its two small languages, filters and patches (RFC 7644), as far as directories use them;
it never knows a member or a group.

Names of attributes are compared without case. What a document holds beyond what is kept here is passed over, as RFC
7644 (3.3) lets a server do.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

import msgspec

from mesh.errors import PlatformError, Reason

USER_SCHEMA = "urn:ietf:params:scim:schemas:core:2.0:User"
GROUP_SCHEMA = "urn:ietf:params:scim:schemas:core:2.0:Group"
_PATCH_SCHEMA = "urn:ietf:params:scim:api:messages:2.0:PatchOp"

_DOCUMENT_BYTES = 1 << 20
_OPERATIONS = 1000
_MEMBERS = 10_000
_TEXT_LENGTH = 256
_NAME_PARTS = ("formatted", "familyName", "givenName", "middleName")
_ALWAYS = frozenset({"id", "schemas", "meta"})
_COMPARISON = re.compile(
    r'\s*(?P<attribute>[A-Za-z][\w.:$-]*)\s+(?P<operator>[A-Za-z]{2})\s+(?P<value>"(?:[^"\\]|\\.)*"|true|false)\s*'
)
_PATH = re.compile(r"(?P<name>[A-Za-z][\w$-]*)(?:\[(?P<filter>[^\]]*)\])?(?:\.(?P<part>[A-Za-z][\w$-]*))?")


class Condition(NamedTuple):
    """An attribute, in lower case, that has to equal a value."""

    attribute: str
    value: str


@dataclass(frozen=True, slots=True)
class ScimUser:
    """A user as a directory describes it. The address is the primary one, or else the user name."""

    user_name: str
    email: str
    external_id: str | None = None
    display_name: str = ""
    name: Mapping[str, str] = field(default_factory=dict)
    active: bool = True


@dataclass(frozen=True, slots=True)
class ScimGroup:
    """A group as a directory describes it."""

    display_name: str
    external_id: str | None = None
    member_ids: frozenset[str] = frozenset()


def wrong(scim_type: str, detail: str) -> PlatformError:
    """The error for a request that SCIM has a word for (RFC 7644, table 9)."""
    reason = Reason.ALREADY_EXISTS if scim_type == "uniqueness" else Reason.INVALID_ARGUMENT
    return PlatformError(reason, description=detail, scim_type=scim_type)


def read(document: bytes) -> dict[str, Any]:
    """A JSON object. Raises PlatformError(INVALID_ARGUMENT)."""
    if len(document) > _DOCUMENT_BYTES:
        raise wrong("invalidSyntax", f"A resource has at most {_DOCUMENT_BYTES} bytes.")
    try:
        value = msgspec.json.decode(document)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise wrong("invalidSyntax", "The body has to be JSON.") from None
    if not isinstance(value, dict):
        raise wrong("invalidSyntax", "The body has to be a JSON object.")
    return value


def write(document: Mapping[str, Any]) -> tuple[bytes, str]:
    """The JSON of a document and its version, which changes with everything in it."""
    version = hashlib.sha256(msgspec.json.encode(document)).hexdigest()[:16]
    versioned = {**document, "meta": {**document["meta"], "version": f'"{version}"'}}
    return msgspec.json.encode(versioned), version


def cut(document: bytes, attributes: Collection[str], excluded: Collection[str]) -> bytes:
    """The document with these attributes only, or without the excluded ones (RFC 7644, 3.9); a part stands for the
    whole attribute."""
    wanted, unwanted = (
        {name.rpartition(":")[2].partition(".")[0].lower() for name in names} for names in (attributes, excluded)
    )
    kept = {
        name: value
        for name, value in msgspec.json.decode(document).items()
        if name in _ALWAYS or (name.lower() in wanted if wanted else name.lower() not in unwanted)
    }
    return msgspec.json.encode(kept)


def read_user(document: Mapping[str, Any]) -> ScimUser:
    """What a document says of a user. Raises PlatformError(INVALID_ARGUMENT)."""
    user_name = _text(document, "userName")
    if not user_name:
        raise wrong("invalidValue", "'userName' is required.")
    parts = _get(document, "name")
    if parts is not None and not isinstance(parts, dict):
        raise wrong("invalidValue", "'name' has to be an object.")
    name = {part: text for part in _NAME_PARTS if (text := _text(parts or {}, part))}
    whole = name.get("formatted") or " ".join(filter(None, (name.get("givenName"), name.get("familyName"))))
    return ScimUser(
        user_name=user_name,
        email=_email(document) or user_name,
        external_id=_text(document, "externalId") or None,
        display_name=_text(document, "displayName") or whole,
        name=name,
        active=_boolean(_get(document, "active"), "active", default=True),
    )


def read_group(document: Mapping[str, Any]) -> ScimGroup:
    """What a document says of a group. Raises PlatformError(INVALID_ARGUMENT)."""
    display_name = _text(document, "displayName")
    if not display_name:
        raise wrong("invalidValue", "'displayName' is required.")
    members = _objects(document, "members")
    if len(members) > _MEMBERS:
        raise wrong("tooMany", f"A group has at most {_MEMBERS} members.")
    member_ids = frozenset(_text(member, "value") for member in members)
    return ScimGroup(display_name, _text(document, "externalId") or None, member_ids)


def user_document(
    user_id: str, user: ScimUser, groups: Collection[tuple[str, str]], create_time: datetime, update_time: datetime
) -> dict[str, Any]:
    """A user as SCIM shows it; `groups` are ids and names."""
    document: dict[str, Any] = {
        "schemas": [USER_SCHEMA],
        "id": user_id,
        "userName": user.user_name,
        "displayName": user.display_name,
        "active": user.active,
        "emails": [{"value": user.email, "type": "work", "primary": True}],
        "groups": [{"value": group_id, "display": name, "type": "direct"} for group_id, name in groups],
        "meta": _meta("User", f"/scim/v2/Users/{user_id}", create_time, update_time),
    }
    if user.name:
        document["name"] = dict(user.name)
    if user.external_id is not None:
        document["externalId"] = user.external_id
    return document


def group_document(
    group_id: str, group: ScimGroup, names: Mapping[str, str], create_time: datetime, update_time: datetime
) -> dict[str, Any]:
    """A group as SCIM shows it; `names` are its members' by their ids."""
    document: dict[str, Any] = {
        "schemas": [GROUP_SCHEMA],
        "id": group_id,
        "displayName": group.display_name,
        "members": [
            {"value": user_id, "display": names[user_id], "type": "User"} for user_id in sorted(group.member_ids)
        ],
        "meta": _meta("Group", f"/scim/v2/Groups/{group_id}", create_time, update_time),
    }
    if group.external_id is not None:
        document["externalId"] = group.external_id
    return document


def read_filter(text: str, known: Collection[str]) -> list[Condition]:
    """The conditions of a filter, all of which have to hold: `attribute eq "value"`, joined by `and`.

    `known` are the attributes that can be asked for, in lower case. Raises PlatformError(INVALID_ARGUMENT).
    """
    conditions: list[Condition] = []
    place = 0
    while text.strip():
        comparison = _COMPARISON.match(text, place)
        if comparison is None:
            raise _no_filter()
        attribute = comparison["attribute"].rpartition(":")[2].lower()
        if comparison["operator"].lower() != "eq" or attribute not in known:
            raise _no_filter()
        conditions.append(Condition(attribute, _filter_value(comparison["value"])))
        place = comparison.end()
        if place == len(text):
            break
        joint = re.compile(r"and\s", re.IGNORECASE).match(text, place)
        if joint is None:
            raise _no_filter()
        place = joint.end()
    return conditions


def patched(document: dict[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """The document after a patch (RFC 7644, 3.5.2): all of its operations, in order. Raises
    PlatformError(INVALID_ARGUMENT)."""
    if _PATCH_SCHEMA not in (_get(patch, "schemas") or ()):
        raise wrong("invalidSyntax", f"A patch has the schema {_PATCH_SCHEMA}.")
    operations = _objects(patch, "Operations")
    if not 1 <= len(operations) <= _OPERATIONS:
        raise wrong("invalidSyntax", f"A patch has 1 to {_OPERATIONS} operations.")
    document = msgspec.json.decode(msgspec.json.encode(document))
    for operation in operations:
        # Some directories write "Add" and "Replace".
        verb, path, value = _text(operation, "op").lower(), _text(operation, "path"), _get(operation, "value")
        if verb not in ("add", "replace", "remove"):
            raise wrong("invalidSyntax", "'op' has to be add, replace or remove.")
        if path:
            _apply(document, verb, path, value)
        elif verb == "remove":
            raise wrong("noTarget", "'remove' needs a path.")
        elif not isinstance(value, dict):
            raise wrong("invalidValue", "An operation without a path has an object as its value.")
        else:
            for name, part in value.items():
                _apply(document, verb, name, part)
    return document


def _apply(document: dict[str, Any], verb: str, path: str, value: Any) -> None:
    where = _PATH.fullmatch(path.rpartition(":")[2])
    if where is None:
        raise wrong("invalidPath", "'path' is not one.")
    name = _key(document, where["name"])
    if name.lower() in ("id", "meta", "schemas", "groups"):
        if name.lower() == "schemas":
            return
        raise wrong("mutability", f"'{name}' cannot be changed.")
    if where["filter"] is not None:
        _apply_to_some(document, name, verb, where["filter"], where["part"], value)
    elif where["part"] is not None:
        parts = document.setdefault(name, {})
        if not isinstance(parts, dict):
            raise wrong("invalidPath", f"'{name}' has no parts.")
        _put(parts, verb, where["part"], value)
    else:
        _put(document, verb, name, value)


def _apply_to_some(
    document: dict[str, Any], name: str, verb: str, condition: str, part: str | None, value: Any
) -> None:
    """Change those of a list that a filter finds, or add one that it would find."""
    conditions = read_filter(condition, ("value", "type", "primary", "display"))
    items = _objects(document, name)
    found = [item for item in items if _holds(item, conditions)]
    if verb == "remove" and part is None:
        document[name] = [item for item in items if item not in found]
        return
    if not found:
        if verb == "remove":
            return
        found = [{condition.attribute: condition.value for condition in conditions}]
        document[name] = [*items, *found]
    for item in found:
        if part is not None:
            _put(item, verb, part, value)
        elif isinstance(value, dict):
            item.update(value)
        else:
            raise wrong("invalidValue", "The value has to be an object.")


def _put(document: dict[str, Any], verb: str, name: str, value: Any) -> None:
    name = _key(document, name)
    current = document.get(name)
    if verb == "remove":
        if isinstance(current, list) and isinstance(value, list):
            # Not in the RFC, but what some directories send to take members out of a group.
            document[name] = [item for item in current if not _is_among(item, value)]
        else:
            document.pop(name, None)
    elif verb == "add" and isinstance(current, list):
        added = value if isinstance(value, list) else [value]
        document[name] = [*current, *(item for item in added if not _is_among(item, current))]
    elif verb == "add" and isinstance(current, dict) and isinstance(value, dict):
        for part, text in value.items():
            current[_key(current, part)] = text
    else:
        document[name] = value


def _is_among(item: Any, others: list[Any]) -> bool:
    def value_of(one: Any) -> Any:
        return _get(one, "value") if isinstance(one, dict) else one

    return any(value_of(item) == value_of(other) for other in others)


def _holds(item: Mapping[str, Any], conditions: Collection[Condition]) -> bool:
    return all(str(_get(item, condition.attribute)).lower() == condition.value.lower() for condition in conditions)


def _filter_value(text: str) -> str:
    try:
        return str(msgspec.json.decode(text)).lower() if text[0] != '"' else msgspec.json.decode(text, type=str)
    except msgspec.MsgspecError:
        raise _no_filter() from None


def _no_filter() -> PlatformError:
    return wrong("invalidFilter", "A filter is one or more of 'attribute eq \"value\"', joined by 'and'.")


def _meta(kind: str, location: str, create_time: datetime, update_time: datetime) -> dict[str, str]:
    return {
        "resourceType": kind,
        "created": create_time.isoformat(),
        "lastModified": update_time.isoformat(),
        "location": location,
    }


def _email(document: Mapping[str, Any]) -> str:
    emails = _objects(document, "emails")
    primary = [email for email in emails if _boolean(_get(email, "primary"), "emails.primary", default=False)]
    return next((text for email in (*primary, *emails) if (text := _text(email, "value"))), "")


def _objects(document: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    values = _get(document, name)
    if values is None:
        return []
    if isinstance(values, list) and all(isinstance(value, dict) for value in values):
        return values
    raise wrong("invalidValue", f"'{name}' has to be a list of objects.")


def _text(document: Mapping[str, Any], name: str) -> str:
    value = _get(document, name)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > _TEXT_LENGTH or not value.isprintable():
        raise wrong("invalidValue", f"'{name}' has to be a text of at most {_TEXT_LENGTH} printable characters.")
    return value


def _boolean(value: Any, name: str, *, default: bool) -> bool:
    if value is None:
        return default
    # Some directories write "False".
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        return _not_boolean(name)
    return value


def _not_boolean(name: str) -> NoReturn:
    raise wrong("invalidValue", f"'{name}' has to be true or false.")


def _get(document: Mapping[str, Any], name: str) -> Any:
    return document.get(_key(document, name))


def _key(document: Mapping[str, Any], name: str) -> str:
    """The document's own spelling of an attribute's name, or else this one."""
    return next((known for known in document if known.lower() == name.lower()), name)

"""What a model is and which values it may have; it never stores one and never chooses who serves it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from aiaas.type.v1.usage_event_pb2 import Endpoint
from mesh.errors import PlatformError, Reason
from mesh.fields import refuse

ENDPOINT_NAMES: Mapping[int, str] = {
    Endpoint.ENDPOINT_CHAT_COMPLETIONS: "chat.completions",
    Endpoint.ENDPOINT_COMPLETIONS: "completions",
    Endpoint.ENDPOINT_EMBEDDINGS: "embeddings",
    Endpoint.ENDPOINT_RESPONSES: "responses",
}
"""The endpoints that the router serves, as metrics and errors name them."""

_NAME = re.compile(r"[a-zA-Z0-9._:/-]{1,128}")
_ALIASES = 64
_OWNER_LENGTH = 128
_NEVER = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, slots=True)
class Model:
    """A model that clients can name. The times and the etag are the store's; they are empty until it is stored."""

    model_id: str
    aliases: tuple[str, ...] = ()
    owner: str = ""
    context_tokens: int = 0
    endpoints: tuple[int, ...] = ()
    create_time: datetime = field(default=_NEVER, compare=False)
    update_time: datetime = field(default=_NEVER, compare=False)
    etag: str = field(default="", compare=False)


def check_model(model: Model) -> None:
    """Hold a model to the contract's rules. Raises PlatformError(INVALID_ARGUMENT) that names the fields."""
    refuse(_problems(model))


def _problems(model: Model) -> Iterator[PlatformError]:
    if not _NAME.fullmatch(model.model_id):
        yield _invalid("model.model_id", "must be 1 to 128 of a-z A-Z 0-9 . _ : / -")
    if len(model.aliases) > _ALIASES:
        yield _invalid("model.aliases", f"may hold {_ALIASES} names")
    for index, alias in enumerate(model.aliases[:_ALIASES]):
        if not _NAME.fullmatch(alias):
            yield _invalid(f"model.aliases[{index}]", "must be 1 to 128 of a-z A-Z 0-9 . _ : / -")
        if alias == model.model_id or alias in model.aliases[:index]:
            yield _invalid(f"model.aliases[{index}]", "repeats a name of this model")
    if len(model.owner) > _OWNER_LENGTH or not model.owner.isprintable():
        yield _invalid("model.owner", f"must be at most {_OWNER_LENGTH} printable characters")
    if model.context_tokens < 0:
        yield _invalid("model.context_tokens", "must not be negative")
    if not model.endpoints:
        yield _invalid("model.endpoints", "must name at least one endpoint")
    for index, endpoint in enumerate(model.endpoints):
        if endpoint == Endpoint.ENDPOINT_UNSPECIFIED or endpoint not in Endpoint.values():
            yield _invalid(f"model.endpoints[{index}]", "must be a known endpoint")
        if endpoint in model.endpoints[:index]:
            yield _invalid(f"model.endpoints[{index}]", "repeats an endpoint")


def name_taken(field: str) -> PlatformError:
    """The error for an alias that another model already has as its id or alias."""
    return _invalid(field, "is already the name of another model")


def _invalid(field: str, rule: str) -> PlatformError:
    return PlatformError(Reason.INVALID_ARGUMENT, field=field, description=f"'{field}' {rule}.")

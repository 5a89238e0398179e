"""Reads a process's configuration from its environment, once, and checks all of it; it never knows what a value is for.

A configuration is a frozen dataclass whose fields are made with `setting`:

    @dataclass(frozen=True)
    class RouterConfig:
        database_url: str = setting("ROUTER_DATABASE_URL", "PostgreSQL of the router", secret=True)
        port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = setting("ROUTER_PORT", "gRPC port", default=7002)

Fields may be str, int, float, bool, tuple[str, ...], Literal, or one of these with constraints or `| None`. An empty
variable counts as absent. A secret may be in a file instead, whose path is in `<variable>_FILE`. A field may also be a
configuration itself: its variables are read as its own class says.
"""

import dataclasses
import enum
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

T = TypeVar("T")

LogLevel = Literal["debug", "info", "warning", "error"]
"""The type of a `log_level` setting."""

_MASK = "********"
_WORDS = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True, slots=True)
class Problem:
    """One wrong variable: its name, what it wants, and what is wrong with it; never a secret's value."""

    variable: str
    wants: str
    wrong: str

    def __str__(self) -> str:
        return f"{self.variable} wants {self.wants}: {self.wrong}" if self.wants else f"{self.variable}: {self.wrong}"


class ConfigError(Exception):
    """The environment does not make a configuration. It names every wrong variable, one a line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class Description(NamedTuple):
    """One variable as documentation shows it. A variable that must be set has the default "required"."""

    variable: str
    type: str
    default: str
    meaning: str
    secret: bool


def setting(variable: str, meaning: str, *, default: Any = MISSING, secret: bool = False) -> Any:
    """A field read from the environment variable `variable`; without a `default` it must be set.

    `meaning` says what it is, with its unit, and what follows from it. A `secret` is shown nowhere, not even in repr(),
    and may be in a file.
    """
    metadata = {"variable": variable, "meaning": meaning, "secret": secret}
    return dataclasses.field(default=default, metadata=metadata, repr=not secret, kw_only=True)


def load(cls: type[T], environ: Mapping[str, str]) -> T:
    """A `cls` made from `environ`.

    Raises ConfigError with every wrong variable. A ValueError from the class's own `__post_init__`, which is the place
    for rules between variables, becomes one as well.
    """
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, inner in _inner(cls):
        try:
            values[name] = load(inner, environ)
        except ConfigError as error:
            problems.extend(error.problems)
    for field, kind in _fields(cls):
        variable = field.metadata["variable"]
        try:
            raw = _given(variable, environ, field.metadata["secret"])
        except ConfigError as error:
            problems.extend(error.problems)
            continue
        if not raw:
            if field.default is MISSING:
                problems.append(Problem(variable, _in_words(kind), f"it is not set ({field.metadata['meaning']})"))
            continue
        try:
            values[field.name] = msgspec.convert(_split(raw) if _is_list(kind) else raw, kind, strict=False)
        except msgspec.ValidationError:
            wrong = "its value is something else" if field.metadata["secret"] else f"it is {raw!r}"
            problems.append(Problem(variable, _in_words(kind), wrong))
    if problems:
        raise ConfigError(problems)
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError([Problem(cls.__name__, "", str(error))]) from None


def describe(cls: type) -> list[Description]:
    """Every variable of a configuration class, in the order of its fields."""
    inner = [description for _, part in _inner(cls) for description in describe(part)]
    return inner + [
        Description(
            variable=field.metadata["variable"],
            type=_in_words(kind),
            default="required" if field.default is MISSING else _shown(field.default, field.metadata["secret"]),
            meaning=field.metadata["meaning"],
            secret=field.metadata["secret"],
        )
        for field, kind in _fields(cls)
    ]


def show(config: object) -> list[tuple[str, str]]:
    """Each variable of a loaded configuration with its value as it would be written; secrets are masked."""
    inner = {row for name, _ in _inner(type(config)) for row in show(getattr(config, name))}
    return sorted(inner) + [
        (field.metadata["variable"], _shown(getattr(config, field.name), field.metadata["secret"]))
        for field, _ in _fields(type(config))
    ]


def _given(variable: str, environ: Mapping[str, str], secret: bool) -> str:
    """What the variable holds, or for a secret the file that it is in."""
    raw = environ.get(variable, "").strip()
    path = environ.get(f"{variable}_FILE", "").strip() if secret else ""
    if not path:
        return raw
    try:
        if raw:
            raise ValueError(f"{variable} is set as well")
        return Path(path).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        wrong = "it is not UTF-8"
    except OSError as error:
        wrong = f"{path}: {error.strerror}"
    except ValueError as error:
        wrong = str(error)
    raise ConfigError([Problem(f"{variable}_FILE", "the path of a file", wrong)])


def _fields(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(cls, include_extras=True)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls) if "variable" in field.metadata]


def _inner(cls: type) -> list[tuple[str, type]]:
    return [(name, kind) for name, kind in get_type_hints(cls).items() if isinstance(kind, type) and is_dataclass(kind)]


def _split(raw: str) -> list[str]:
    return [item for item in (part.strip() for part in raw.split(",")) if item]


def _bare(kind: Any) -> Any:
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return kind


def _is_list(kind: Any) -> bool:
    return get_origin(_bare(kind)) is tuple


def _in_words(kind: Any) -> str:
    """A type as a reader who does not know Python would say it: "an integer, at least 1, at most 65535"."""
    if get_origin(kind) is Annotated:
        inner, *constraints = get_args(kind)
        return ", ".join([_in_words(inner), *(words for item in constraints for words in _constraint(item))])
    origin = get_origin(kind)
    if origin is tuple:
        return "a comma-separated list"
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(kind))
    if origin in (Union, UnionType):
        return " or ".join(_in_words(member) for member in get_args(kind) if member is not NoneType)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in kind)
    return _WORDS.get(kind, str(kind))


def _constraint(meta: Any) -> list[str]:
    words = [
        f"{phrase} {bound}" for name, phrase in _BOUNDS.items() if (bound := getattr(meta, name, None)) is not None
    ]
    if (pattern := getattr(meta, "pattern", None)) is not None:
        words.append(f"matching {pattern}")
    if (length := getattr(meta, "min_length", None)) is not None:
        words.append(f"of length {length} or more")
    if (length := getattr(meta, "max_length", None)) is not None:
        words.append(f"of length {length} or less")
    return words


def _shown(value: Any, secret: bool) -> str:
    if value is None or value == "" or value == ():
        return ""
    if secret:
        return _MASK
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value.value if isinstance(value, enum.Enum) else value)

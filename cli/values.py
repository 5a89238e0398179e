"""Text from the command line as the JSON that the REST API takes; it never judges what the platform would judge."""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from cli.session import read_secret

Json = dict[str, Any]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SPAN = re.compile(r"(\d+)([smhdw])")


class _Type(click.ParamType[Any]):
    """One kind of field. A name is all that help shows of it."""

    def __init__(self, name: str) -> None:
        self.name = name


class Text(_Type):
    """Text; "@FILE" is what the file holds, "@@..." begins with an @."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text."""
        return _of_file(value) if isinstance(value, str) else value


class Time(_Type):
    """RFC 3339, a day in UTC, "now", or a span before now such as "-7d"."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """RFC 3339."""
        now = datetime.now(UTC)
        if value == "now":
            return _rfc3339(now)
        if value[:1] in ("-", "+") and (span := _SPAN.fullmatch(value[1:])):
            distance = timedelta(seconds=int(span[1]) * _UNITS[span[2]])
            return _rfc3339(now - distance if value[0] == "-" else now + distance)
        try:
            parsed = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no time such as 2030-01-31T12:00:00Z, 2030-01-31, now or -7d", param, ctx)
        return _rfc3339(parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC))


class Duration(_Type):
    """Seconds with an "s", or another unit: m, h, d, w."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Seconds, as protobuf's JSON has them."""
        if span := _SPAN.fullmatch(value):
            return f"{int(span[1]) * _UNITS[span[2]]}s"
        if re.fullmatch(r"\d+(\.\d{1,9})?s", value):
            return value
        return self.fail(f"{value!r} is no span of time such as 90s, 15m, 12h or 7d", param, ctx)


class Object(_Type):
    """JSON, "@FILE" with JSON in it, or name=value pairs with commas between them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The object."""
        text = _of_file(value)
        try:
            return json.loads(text)
        except ValueError:
            pass
        pairs = [part.partition("=") for part in text.split(",")]
        if not all(name and sign for name, sign, _ in pairs):
            self.fail(f"{value!r} is neither JSON nor name=value,name=value", param, ctx)
        return {name.strip(): item.strip() for name, _, item in pairs}


class Choice(_Type):
    """A value of an enum, by its short name or by the contract's."""

    def __init__(self, names: tuple[str, ...], prefix: str) -> None:
        super().__init__("|".join(names))
        self.names = names
        self._prefix = prefix

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The contract's name."""
        short = value.upper().replace("-", "_").removeprefix(self._prefix).lower().replace("_", "-")
        if short not in self.names:
            self.fail(f"{value!r} is none of {', '.join(self.names)}", param, ctx)
        return self._prefix + short.upper().replace("-", "_")

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """The names that begin so."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in self.names if name.startswith(incomplete)]


class Pair(_Type):
    """name=value, of a map."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The pair."""
        name, sign, item = value.partition("=")
        if not sign:
            self.fail(f"{value!r} is not name=value", param, ctx)
        return name, item


_TYPES: Mapping[str, click.ParamType[Any]] = {
    "text": Text("TEXT"),
    "base64": Text("BASE64"),
    "mask": Text("FIELDS"),
    "time": Time("TIME"),
    "duration": Duration("DURATION"),
    "object": Object("OBJECT"),
    "map": Pair("NAME=VALUE"),
    "integer": click.INT,
    "number": click.FLOAT,
}


def option_of(field: Json, parameter: str) -> click.Option:
    """The option for one field: --name-of-field, dots kept; of a secret --name-of-field-file, as what stands on a
    command line is seen by everybody on the machine."""
    flag = "--" + field["name"].replace("_", "-")
    said = _short(field.get("help", ""))
    if field.get("is_secret"):
        return click.Option(
            [f"{flag}-file", parameter],
            metavar="FILE",
            help=f"{said} In a file; - asks for it, or reads standard input.",
        )
    if field["kind"] == "boolean":
        return click.Option([f"{flag}/--no-{flag[2:]}", parameter], default=None, help=said)
    is_many = bool(field.get("is_repeated")) or field["kind"] == "map"
    kind = Choice(tuple(field["choices"]), field["prefix"]) if field["kind"] == "choice" else _TYPES[field["kind"]]
    again = " May be given again." if is_many else ""
    return click.Option([flag, parameter], type=kind, multiple=is_many, metavar=_metavar(kind), help=said + again)


def value_of(field: Json, given: Any) -> Any:
    """What an option was given, as JSON; None where it was not. Raises UsageProblem for a file that cannot be read."""
    if given is None or given == ():
        return None
    if field.get("is_secret"):
        return read_secret(given, field["name"].rpartition(".")[2].replace("_", " ").capitalize())
    if field["kind"] == "map":
        return dict(given)
    return list(given) if isinstance(given, tuple) else given


def put(values: Json, path: str, value: Any) -> None:
    """Set a value at a dotted path, making the objects around it."""
    *outer, last = path.split(".")
    for name in outer:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            inner = values[name] = {}
        values = inner
    values[last] = value


def query_text(value: Any) -> str:
    """A value as a query has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else json.dumps(value)


def _metavar(kind: click.ParamType[Any]) -> str:
    return f"[{kind.name}]" if isinstance(kind, Choice) else kind.name.upper()


def _short(text: str) -> str:
    """The first sentence, as help has little room."""
    return re.split(r"(?<=\.) ", text, maxsplit=1)[0]


def _of_file(text: str) -> str:
    if text.startswith("@@"):
        return text[1:]
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{text[1:]} cannot be read: {error}") from error


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")

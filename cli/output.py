"""Answers as tables, JSON, YAML or CSV; it never changes what an answer says."""

import csv
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from cli.errors import Failed

FORMATS = ("table", "json", "yaml", "csv")

_COLUMNS = 8
# What nobody looks for in a table of many.
_LESS = ("etag", "organization_id", "update_time", "creator_id")


def write(
    answer: Any,
    form: str,
    *,
    rows: str = "",
    resource: str = "",
    columns: Sequence[str] = (),
    short_names: Mapping[str, str] | None = None,
) -> None:
    """Write one answer. `rows` and `resource` say where in it the list, or the one thing that it is about, stands;
    `short_names` are what tables have in place of names of enums."""
    if form == "json":
        click.echo(json.dumps(answer, indent=2, ensure_ascii=False))
    elif form == "yaml":
        import yaml

        click.echo(yaml.safe_dump(answer, sort_keys=False, allow_unicode=True), nl=False)
    elif form == "csv":
        _write_csv(_rows(answer, rows, resource), columns)
    elif rows:
        _write_table(_rows(answer, rows, resource), columns, short_names or {})
    else:
        _write_fields(answer, resource, short_names or {})


def select(answer: Any, path: str, *, rows: str = "", resource: str = "") -> list[str]:
    """The values at a path such as "organization.organization_id", or within every row, as text.

    Raises Failed where the answer has none.
    """
    starts: list[Any] = [answer]
    if resource:
        starts.append(answer.get(resource))
    found = next((values for start in starts if (values := _at(start, path.split(".")))), None)
    if found is None and rows:
        found = [value for row in answer.get(rows, ()) for value in _at(row, path.split("."))]
        if not answer.get(rows):
            return []
    if not found:
        raise Failed(f"The answer has no {path!r}.")
    return [_text(value) for value in found]


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Fields of fields under dotted names, every value as text."""
    flat: dict[str, str] = {}
    for name, item in value.items():
        if isinstance(item, dict) and item:
            flat |= flatten(item, f"{prefix}{name}.")
        else:
            flat[prefix + name] = _text(item)
    return flat


def _at(value: Any, path: Sequence[str]) -> list[Any]:
    if not path:
        return value if isinstance(value, list) else [value]
    if isinstance(value, list):
        return [found for item in value for found in _at(item, path)]
    if isinstance(value, dict) and path[0] in value:
        return _at(value[path[0]], path[1:])
    return []


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        if all(not isinstance(item, dict | list) for item in value):
            return ",".join(map(_text, value))
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def _rows(answer: Any, rows: str, resource: str) -> list[dict[str, str]]:
    found = answer.get(rows, []) if rows else [answer.get(resource) or answer] if resource else [answer]
    return [flatten(row) for row in found]


def _names(rows: Iterable[Mapping[str, str]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _write_csv(rows: list[dict[str, str]], columns: Sequence[str]) -> None:
    """RFC 4180, but for the ends of lines, which are the system's; cells that a spreadsheet would take for formulas
    get an apostrophe."""
    names = list(columns) or _names(rows)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([_harmless(row.get(name, "")) for name in names])


def _harmless(text: str) -> str:
    is_number = text.lstrip("-").replace(".", "", 1).isdigit()
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") and not is_number else text


def _write_table(rows: list[dict[str, str]], columns: Sequence[str], short_names: Mapping[str, str]) -> None:
    if not rows:
        click.echo("Nothing.", err=True)
        return
    rows = [{name: _shortened(value, short_names) for name, value in row.items()} for row in rows]
    names = list(columns)
    if not names:
        filled = [name for name in _names(rows) if any(row.get(name) for row in rows)]
        told = [name for name in filled if name.rpartition(".")[2] not in _LESS] or filled
        names = _fitting(told, rows) if sys.stdout.isatty() else told[:_COLUMNS]
        left_out = len(filled) - len(names)
    else:
        left_out = 0
    _print_table(names, [[row.get(name, "") for name in names] for row in rows])
    if left_out and sys.stdout.isatty():
        click.echo(f"{left_out} more columns: --columns, or --output json.", err=True)


def _fitting(names: Sequence[str], rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The first columns that the terminal has room for, two at least."""
    room = shutil.get_terminal_size().columns
    fitting: list[str] = []
    for name in names:
        room -= max(len(name), *(len(row.get(name, "")) for row in rows)) + 1
        if room < 0 and len(fitting) >= 2:
            break
        fitting.append(name)
    return fitting


def _shortened(text: str, short_names: Mapping[str, str]) -> str:
    return ",".join(short_names.get(part, part) for part in text.split(","))


def _write_fields(answer: Any, resource: str, short_names: Mapping[str, str]) -> None:
    if not answer:
        click.echo("Done.", err=True)
        return
    flat = flatten({**(answer.get(resource) or {}), **{k: v for k, v in answer.items() if k != resource}})
    _print_table((), [[name, _shortened(value, short_names)] for name, value in flat.items() if value])


def _print_table(names: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=bool(names), pad_edge=False, header_style="bold")
    for name in names or ("", ""):
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in cells:
        # Text, as what comes from the platform is no markup and must not move the cursor either.
        table.add_row(*(Text("".join(c if c.isprintable() else " " for c in cell)) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        # What is read by programs is not folded.
        console = Console(highlight=False, width=10_000)
    console.print(table, soft_wrap=not console.is_terminal)

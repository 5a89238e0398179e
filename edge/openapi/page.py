"""The OpenAPI document as one HTML page that needs no network and no script; it says nothing but what that says."""

import json
import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--get:#1a7f37;--post:#0969da;--patch:#9a6700;--delete:#cf222e}
body{font:15px/1.5 system-ui,sans-serif;margin:0;display:grid;grid-template-columns:17rem 1fr}
nav{border-right:1px solid var(--line);padding:1rem;height:100vh;box-sizing:border-box;overflow:auto;
position:sticky;top:0}
nav a{display:block;text-decoration:none;padding:.1rem 0}
main{padding:1rem 2rem;max-width:60rem;min-width:0}
details{border:1px solid var(--line);border-radius:6px;margin:.5rem 0;padding:.4rem .8rem}
summary{cursor:pointer;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;margin:.5rem 0}
td,th{border-top:1px solid var(--line);padding:.3rem .6rem .3rem 0;text-align:left;vertical-align:top}
code,pre{font:13px/1.45 ui-monospace,monospace}
pre{background:var(--soft);padding:.7rem;overflow:auto;border-radius:6px}
b.verb{display:inline-block;min-width:4.2rem}
.get{color:var(--get)}.post,.put{color:var(--post)}.patch{color:var(--patch)}.delete{color:var(--delete)}
"""
_REFERENCE = "#/components/schemas/"
_MARKUP = (
    (re.compile(r"`([^`]+)`"), r"<code>\1</code>"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"<strong>\1</strong>"),
)


def page(document: Mapping[str, Any]) -> str:
    """The page, whole."""
    info = document["info"]
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{escape(info['title'])} {escape(info['version'])}</title><style>{_STYLE}</style><body>",
        *_navigation(document),
        f"<main><h1>{escape(info['title'])} {escape(info['version'])}</h1>{_prose(info['description'])}",
        '<p><a href="/openapi.json">openapi.json</a></p>',
        *_operations(document),
        '<h2 id="schemas">Schemas</h2>',
        *_schemas(document["components"]["schemas"]),
        "</main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _navigation(document: Mapping[str, Any]) -> Iterator[str]:
    yield "<nav>"
    for tag in document["tags"]:
        yield f'<a href="#{escape(tag["name"])}">{escape(tag["name"])}</a>'
    yield '<a href="#schemas">Schemas</a></nav>'


def _operations(document: Mapping[str, Any]) -> Iterator[str]:
    for tag in document["tags"]:
        yield f'<h2 id="{escape(tag["name"])}">{escape(tag["name"])}</h2>{_prose(tag["description"])}'
        for path, operations in document["paths"].items():
            for verb, operation in operations.items():
                if tag["name"] in operation["tags"]:
                    yield from _operation(path, verb, operation)


def _operation(path: str, verb: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f'<details id="{escape(operation["operationId"])}"><summary><b class="verb {verb}">{verb.upper()}</b>'
    yield f"<code>{escape(path)}</code> {_inline(operation['summary'])}</summary>{_prose(operation['description'])}"
    if parameters := operation.get("parameters"):
        yield "<table><tr><th>Parameter<th>In<th>Type<th>"
        for parameter in parameters:
            name = escape(parameter["name"]) + ("*" if parameter.get("required") else "")
            yield f"<tr><td><code>{name}</code><td>{escape(parameter['in'])}<td>{_type(parameter['schema'])}"
            yield f"<td>{_inline(parameter.get('description', ''))}"
        yield "</table>"
    for media_type, media in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<p>Body, <code>{escape(media_type)}</code>: {_type(media['schema'])}</p>"
        yield from _properties(media["schema"])
        yield f"<pre>{escape(json.dumps(media['example'], indent=2, ensure_ascii=False))}</pre>"
    for status, answer in operation["responses"].items():
        if "$ref" in answer:
            continue
        yield f"<p><b>{escape(status)}</b> {_inline(answer['description'])}</p>"
        for media_type, media in answer.get("content", {}).items():
            yield f"<p><code>{escape(media_type)}</code>: {_type(media.get('schema', {}))}</p>"
    yield "</details>"


def _schemas(schemas: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in schemas.items():
        yield f'<details id="schema-{escape(name)}"><summary><code>{escape(name)}</code></summary>'
        yield _prose(schema.get("description", ""))
        yield from _properties(schema)
        yield "</details>"


def _properties(schema: Mapping[str, Any]) -> Iterator[str]:
    properties = schema.get("properties")
    if not properties:
        return
    yield "<table><tr><th>Field<th>Type<th>"
    for name, part in properties.items():
        yield f"<tr><td><code>{escape(name)}</code><td>{_type(part)}<td>{_inline(part.get('description', ''))}"
    yield "</table>"


def _type(schema: Mapping[str, Any]) -> str:
    """A type in a word or two, with a link to where it is described."""
    if "$ref" in schema:
        name = escape(schema["$ref"].removeprefix(_REFERENCE))
        return f'<a href="#schema-{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if "enum" in schema:
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    return escape(str(schema.get("format") or schema.get("type") or "any"))


def _prose(text: str) -> str:
    """Paragraphs and lists, with code and emphasis in them."""
    return "".join(_block(block) for block in text.split("\n\n") if block.strip())


def _block(block: str) -> str:
    lines = block.strip().split("\n")
    if all(line.startswith("- ") for line in lines):
        return "<ul>" + "".join(f"<li>{_inline(line[2:])}" for line in lines) + "</ul>"
    return f"<p>{_inline(block)}</p>"


def _inline(text: str) -> str:
    marked = escape(text, quote=False)
    for pattern, markup in _MARKUP:
        marked = pattern.sub(markup, marked)
    return marked

"""The few forms of Markdown that reference pages are made of; it never knows what is written in them."""

import re
from collections.abc import Iterable, Sequence

NOTE = "<!-- Made by `make generate`: change what it is made from, not this page. -->"

_CODE = re.compile(r"(`[^`]*`)")
# What Markdown would take for markup outside of code.
_SPECIAL = re.compile(r"([*\\\[\]|])")


def text(words: str) -> str:
    """Words of a contract or of code as they are, but for what they have in backticks."""
    parts = _CODE.split(words)
    return "".join(part.replace("|", "\\|") if index % 2 else _plain(part) for index, part in enumerate(parts))


def _plain(words: str) -> str:
    return _SPECIAL.sub(r"\\\1", words).replace("<", "&lt;")


def code(words: str) -> str:
    """Words in code; nothing for no words."""
    return f"`{words}`".replace("|", "\\|") if words else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table; no rows make none."""
    lines = [_row(row) for row in rows]
    return [_row(head), _row(["---"] * len(head)), *lines, ""] if lines else []


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def anchor(heading: str) -> str:
    """What a heading of letters, digits, underscores and dots is linked to by, as documentation builders and code hosts
    agree on it."""
    return re.sub(r"[^a-z0-9_]", "", heading.lower())


def page(title: str, *parts: Iterable[str]) -> str:
    """A whole page."""
    return "\n".join([f"# {title}", "", NOTE, "", *(line for part in parts for line in part)]).rstrip() + "\n"

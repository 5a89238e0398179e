"""Reads pages as somebody does who looks at them: what they say, what their forms keep, where their links go."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import httpx


@dataclass
class Seen(HTMLParser):
    """A page. `kept` has the hidden fields of all its forms, `links` the addresses by their texts, `tags` all of its
    elements."""

    html: str
    text: str = ""
    kept: dict[str, str] = field(default_factory=dict)
    fields: dict[str, dict[str, str]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    _link: str | None = None

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag == "input" and attributes.get("type") == "hidden":
            if "name" in attributes:
                self.kept[attributes["name"]] = attributes["value"]
        elif tag == "input":
            self.fields[attributes["name"]] = attributes
        self._link = attributes["href"] if tag == "a" else None

    def handle_endtag(self, tag: str) -> None:
        self._link = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._link is not None:
            self.links[data.strip()] = self._link


def seen(response: httpx.Response, status: int = 200) -> Seen:
    """The page that was answered."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    return Seen(response.text)


def led_to(response: httpx.Response) -> str:
    """Where a browser goes from an answer: a redirect, or a page that leads on by itself."""
    if response.status_code == 303:
        return response.headers["location"]
    page = seen(response)
    (refresh,) = (attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert refresh == f"0; url={page.links['Continue']}"
    return page.links["Continue"]

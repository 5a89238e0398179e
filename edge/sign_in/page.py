"""One address of the pages: what answers to a visit and what to a form of it; it never says what either means."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.types import Receive, Scope, Send

from edge.browser import check_same_origin
from edge.exchange import Exchange, exchange_of
from edge.forms import read_form, read_query

Values = Mapping[str, str]
"""What a query or a form says; of a repeated name, the last."""

Answer = Callable[[Exchange, Values], Awaitable[None]]


class Page:
    """An address. Forms are taken from this site alone; `to_visit` and `to_form` are None where there is no such."""

    def __init__(self, path: str, to_visit: Answer | None = None, to_form: Answer | None = None) -> None:
        self._path = path
        self._answers = {verb: answer for verb, answer in (("GET", to_visit), ("POST", to_form)) if answer is not None}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises PlatformError."""
        exchange = exchange_of(scope)
        exchange.route = self._path
        exchange.allow(*self._answers)
        if exchange.method == "POST":
            check_same_origin(exchange)
            await self._answers["POST"](exchange, dict(await read_form(exchange)))
        else:
            await self._answers["GET"](exchange, dict(read_query(exchange)))

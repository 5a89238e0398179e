"""The commands that are made from the contracts: options into a request, the answer onto the screen; none of them is
written by hand, and none knows what its RPC does."""

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from cli import output
from cli.errors import Failed, UsageProblem
from cli.session import Session, write_secret
from cli.values import Json, option_of, put, query_text, value_of

_PAGE_SIZE = "page_size"
_PAGE_TOKEN = "page_token"  # noqa: S105 - a name
_WATCH_S = 2.0


class RpcCommand(click.Command):
    """One RPC."""

    def __init__(self, described: Json, short_names: Mapping[str, str]) -> None:
        self.rpc = described
        self._short_names = short_names
        self._parameters = {f"f{index}": field for index, field in enumerate(described["fields"])}
        super().__init__(described["path"][-1], help=_help(described), params=[*self._arguments(), *self._options()])

    def invoke(self, ctx: click.Context) -> None:
        """Send the request. Raises ClickException."""
        _Call(self.rpc, self._parameters, self._short_names, ctx).run()

    def _arguments(self) -> Iterator[click.Parameter]:
        for name in self.rpc["arguments"]:
            yield click.Argument([f"a_{name}"], metavar=name.upper())

    def _options(self) -> Iterator[click.Parameter]:
        for parameter, field in self._parameters.items():
            yield option_of(field, parameter)
        if self.rpc["has_body"]:
            yield click.Option(
                ["--from", "from_file"], metavar="FILE", help="The body, as JSON or YAML; - is standard input."
            )
        if self.rpc["verb"] == "PATCH":
            yield click.Option(["--clear"], multiple=True, metavar="FIELD", help="Empty a field. May be given again.")
        if self.rpc.get("has_etag"):
            yield click.Option(["--etag"], metavar="TEXT", help="Change only what has this etag.")
        if self.rpc["within_organization"]:
            yield click.Option(["--org"], metavar="ID", help="The organization; else that of the profile.")
        if self.rpc.get("is_paged"):
            yield click.Option(["--all", "all_pages"], is_flag=True, help="All pages, not just one.")
        if self.rpc.get("secrets"):
            yield click.Option(
                ["--secret-file"], metavar="FILE", help="Write the secret into this new file instead of showing it."
            )
        if self.rpc["verb"] == "GET":
            if not self.rpc.get("is_streaming"):
                yield click.Option(
                    ["--watch"],
                    is_flag=False,
                    flag_value=_WATCH_S,
                    type=click.FloatRange(min=0.1),
                    metavar="[SECONDS]",
                    help="Ask again and again, every 2 seconds or so many, until Ctrl-C.",
                )
        else:
            yield click.Option(["--dry-run"], is_flag=True, help="Show the request and do not send it.")
        if self.rpc.get("is_destructive"):
            yield click.Option(["--yes", "-y"], is_flag=True, help="Do not ask.")
        yield click.Option(
            ["--output", "-o", "form"],
            type=click.Choice(output.FORMATS),
            default="table",
            envvar="AIAAS_OUTPUT",
            help="How to write answers.",
        )
        yield click.Option(["--columns"], metavar="NAMES", help="Columns of tables and CSV, with commas between.")
        yield click.Option(["--field", "only"], metavar="NAME", help="Only this field of the answer, for scripts.")


class _Call:
    """One run of a command."""

    def __init__(
        self, rpc: Json, parameters: Mapping[str, Json], short_names: Mapping[str, str], ctx: click.Context
    ) -> None:
        self._rpc = rpc
        self._short_names = short_names
        self._ctx = ctx
        self._given = ctx.params
        self._session: Session = ctx.ensure_object(Session)
        self._parameters = parameters

    def run(self) -> None:
        path, query, body, headers = self._request()
        if self._given.get("dry_run"):
            self._show(path, query, body, headers)
            return
        if self._rpc.get("is_destructive"):
            self._ask(path)
        secret_file = self._given.get("secret_file")
        # Asked before the secret is made, not after.
        if secret_file and Path(secret_file).exists():
            raise UsageProblem(f"{secret_file} is there already.")
        if self._rpc.get("is_streaming"):
            self._stream(path, query)
            return
        while True:
            answer = self._answer(path, query, body, headers)
            if self._given.get("watch") and sys.stdout.isatty():
                click.clear()
            self._write(answer)
            if not self._given.get("watch"):
                return
            sys.stdout.flush()
            time.sleep(self._given["watch"])

    def _request(self) -> tuple[str, list[tuple[str, str]], Any, dict[str, str]]:
        values = {name.removeprefix("a_"): text for name, text in self._given.items() if name.startswith("a_")}
        if self._rpc["within_organization"]:
            values["organization_id"] = self._given.get("org") or self._session.organization()
        for name, text in values.items():
            if not text:
                raise UsageProblem(f"{name.upper()} is empty.")
        path = re.sub(r"\{(\w+)\}", lambda field: quote(values[field[1]], safe=""), self._rpc["template"])
        query: list[tuple[str, str]] = []
        body: Any = _read_body(self._given["from_file"]) if self._given.get("from_file") else {}
        for parameter, field in self._parameters.items():
            value = value_of(field, self._given[parameter])
            if value is None:
                continue
            if field["place"] == "body":
                put(body, field["name"], value)
            else:
                many = value if isinstance(value, list) else [value]
                query += [(field["name"], query_text(item)) for item in many]
        for name in self._given.get("clear") or ():
            put(body, name.replace("-", "_"), None)
        headers = {"If-Match": f'"{self._given["etag"]}"'} if self._given.get("etag") else {}
        return path, query, body if self._rpc["has_body"] else None, headers

    def _show(self, path: str, query: Sequence[tuple[str, str]], body: Any, headers: dict[str, str]) -> None:
        """The request as it would be sent, but for secrets."""
        asked = "?" + "&".join(f"{quote(name)}={quote(text)}" for name, text in query) if query else ""
        click.echo(f"{self._rpc['verb']} {self._session.base_url}{path}{asked}")
        for name, text in headers.items():
            click.echo(f"{name}: {text}")
        for field in self._parameters.values():
            if field.get("is_secret") and body and _holds(body, field["name"]):
                put(body, field["name"], "(secret)")
        if body is not None:
            click.echo(json.dumps(body, indent=2, ensure_ascii=False))

    def _ask(self, path: str) -> None:
        if self._given["yes"]:
            return
        what = " ".join([*self._rpc["path"], *(self._given[f"a_{name}"] for name in self._rpc["arguments"])])
        if not sys.stdin.isatty():
            raise UsageProblem(f"`{what}` wants to be confirmed, and there is no terminal: give --yes.")
        click.echo(f"{self._rpc['verb']} {self._session.base_url}{path}\n{self._rpc['help']}", err=True)
        click.confirm("Go on?", abort=True, err=True)

    def _answer(self, path: str, query: list[tuple[str, str]], body: Any, headers: dict[str, str]) -> Any:
        def page(asked: list[tuple[str, str]]) -> Any:
            return self._session.client.call(
                self._rpc["verb"],
                path,
                asked,
                body,
                headers=headers,
                is_public=self._rpc["is_public"],
                takes_request_id=self._rpc.get("takes_request_id", False),
            )

        answer = page(query)
        rows = self._rpc.get("rows")
        if not rows or not self._given.get("all_pages"):
            return answer
        others = [pair for pair in query if pair[0] != _PAGE_TOKEN]
        seen = set()
        while token := answer.get("next_page_token"):
            if token in seen:
                raise Failed("The platform gave the same page twice.")
            seen.add(token)
            if sys.stderr.isatty():
                click.echo(f"\r{len(answer[rows])} so far", nl=False, err=True)
            following = page([*others, (_PAGE_TOKEN, token)])
            answer[rows] += following[rows]
            answer["next_page_token"] = following.get("next_page_token", "")
        if seen and sys.stderr.isatty():
            click.echo("\r\033[K", nl=False, err=True)
        return answer

    def _stream(self, path: str, query: list[tuple[str, str]]) -> None:
        """Every item as it comes: as JSON a line each, or a field of each."""
        with self._session.client.stream(self._rpc["verb"], path, query) as lines:
            for line in lines:
                item = json.loads(line)
                if "error" in item and "code" in item["error"]:
                    raise Failed(f"The stream broke off: {item['error'].get('message', '')}")
                if only := self._given["only"]:
                    _echo(output.select(item, only, resource=self._rpc.get("resource", "")))
                else:
                    click.echo(line)

    def _write(self, answer: Any) -> None:
        rows, resource = self._rpc.get("rows", ""), self._rpc.get("resource", "")
        if secret_file := self._given.get("secret_file"):
            answer = self._put_aside(answer, secret_file)
        if only := self._given["only"]:
            _echo(output.select(answer, only, rows=rows, resource=resource))
            return
        columns = [name.strip() for name in (self._given["columns"] or "").split(",") if name.strip()]
        output.write(
            answer, self._given["form"], rows=rows, resource=resource, columns=columns, short_names=self._short_names
        )
        if answer.get("next_page_token") and self._given["form"] == "table":
            click.echo(f"There is more: --all, or --page-token {answer['next_page_token']}", err=True)

    def _put_aside(self, answer: Any, secret_file: str) -> Any:
        secrets: dict[str, Any] = {}
        for path in self._rpc["secrets"]:
            *outer, last = path.split(".")
            holder = answer
            for name in outer:
                holder = holder.get(name, {})
            if holder.get(last):
                secrets[path] = holder.pop(last)
        if not secrets:
            raise Failed("The answer holds no secret; nothing was written.")
        (first, *others) = secrets.values()
        text = first if not others and isinstance(first, str) else json.dumps(secrets, indent=1)
        write_secret(secret_file, text)
        click.echo(f"The secret is in {secret_file}.", err=True)
        return answer


def _echo(texts: Sequence[str]) -> None:
    for text in texts:
        click.echo(text)


def _holds(body: Any, path: str) -> bool:
    for name in path.split("."):
        if not isinstance(body, dict) or name not in body:
            return False
        body = body[name]
    return True


def _help(described: Json) -> str:
    needed = f"\n\nNeeds the permission {described['permission']}." if described["permission"] else ""
    return f"{described['help']}{needed}\n\n\b\n{described['verb']} {described['template']}"


def _read_body(path: str) -> Json:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML in which a time stays the text that it is."""

    Loader.yaml_implicit_resolvers = {
        first: [each for each in resolvers if each[0] != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
        body = yaml.load(text, Loader)  # noqa: S506 - a safe one
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageProblem(f"{path} cannot be read: {error}") from error
    if not isinstance(body, dict):
        raise UsageProblem(f"{path} has to hold an object.")
    return body

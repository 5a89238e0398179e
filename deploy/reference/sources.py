"""Pages of what the code itself declares: errors, variables, metrics, dashboards, queues; it starts nothing."""

import ast
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deploy.reference.markdown import code, page, table, text
from mesh import topology
from mesh.broker import Queue
from mesh.config import Description, describe
from mesh.errors import CATALOG, PlatformError, response_headers

_KINDS = {"Counter", "Gauge", "Histogram", "HotCounter", "HotHistogram"}


class Metric(NamedTuple):
    """A metric as it is exposed, and the package that counts it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str
    package: str


def errors() -> str:
    """The page of errors, from the catalog."""
    said = [
        "Programs decide by the reason: it is `ErrorInfo.reason` in gRPC and in AIP-193's JSON, there in upper case.",
        "OpenAI's shape has its own `type` and `code`. Bad fields are named in `BadRequest`, and the first of them in",
        "OpenAI's `param`.",
        "",
    ]
    rows = []
    for reason, entry in CATALOG.items():
        headers = response_headers(PlatformError(reason))
        again = "after `Retry-After`" if "Retry-After" in headers else "no" if "x-should-retry" in headers else ""
        openai = code(f"{entry.openai_type}: {entry.openai_code}")
        rows.append((code(reason.value), code(entry.grpc.name), str(entry.http), openai, text(entry.sentence), again))
    return page("Errors", said, table(("Reason", "gRPC", "HTTP", "OpenAI", "Sentence", "Try again"), rows))


def variables(configurations: Mapping[str, type]) -> str:
    """The page of environment variables, for each process the class that reads them. What several processes read
    stands once."""
    read_by: dict[Description, list[str]] = defaultdict(list)
    for process, cls in configurations.items():
        for description in describe(cls):
            if process not in read_by[description]:
                read_by[description].append(process)
    sections: dict[tuple[str, ...], list[Description]] = defaultdict(list)
    for description, readers in read_by.items():
        sections[tuple(readers)].append(description)
    said = [
        "`python -m <service> check-config` says what a process makes of its environment, or what is wrong with it.",
        "A secret may be in a file instead, whose path is in the variable of that name with `_FILE` at its end.",
        "",
    ]
    parts: list[Iterable[str]] = [said]
    for processes, descriptions in sorted(sections.items(), key=lambda section: (-len(section[0]), section[0])):
        rows = [
            (
                code(one.variable),
                text(f"{one.type}, secret" if one.secret else one.type),
                code(one.default) if one.default else "",
                text(one.meaning),
            )
            for one in descriptions
        ]
        parts.append([f"## {', '.join(processes)}", "", *table(("Variable", "Type", "Default", ""), rows)])
    return page("Environment variables", *parts)


def metrics(root: Path, packages: Iterable[str]) -> str:
    """The page of metrics, found in the code of `packages` where they are made."""
    said = ["Every process serves them at `/metrics`. Counters and histograms start at zero with their process.", ""]
    parts: list[Iterable[str]] = [said]
    for package in packages:
        rows = [
            (code(one.name), one.kind.lower(), ", ".join(map(code, one.labels)), text(one.meaning))
            for one in sorted(find_metrics(root, package))
        ]
        if rows:
            parts.append([f"## {package}", "", *table(("Metric", "Type", "Labels", ""), rows)])
    return page("Metrics", *parts)


def find_metrics(root: Path, package: str) -> Iterator[Metric]:
    """Every metric that a package makes. Raises ValueError for one whose name, words or labels are not literal."""
    for path in sorted((root / package).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kinds = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module in ("prometheus_client", "mesh.tallies")
            for alias in node.names
        } & _KINDS
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
                yield _metric(node, node.func.id, package, path)


def _metric(call: ast.Call, kind: str, package: str, path: Path) -> Metric:
    try:
        name, meaning, *rest = (ast.literal_eval(argument) for argument in call.args)
    except ValueError:
        raise ValueError(f"{path}:{call.lineno}: a metric's name, words and labels have to be literal") from None
    kind = kind.removeprefix("Hot")
    if kind == "Counter":
        # As prometheus_client exposes it.
        name = f"{name.removesuffix('_total')}_total"
    return Metric(name, kind, tuple(rest[0]) if rest else (), meaning, package)


def dashboards(documents: Iterable[Mapping[str, Any]]) -> str:
    """The page of dashboards, from what Grafana imports."""
    parts: list[Iterable[str]] = []
    for document in documents:
        rows: list[tuple[str, str, str]] = []
        row = ""
        for panel in document["panels"]:
            if panel["type"] == "row":
                row = panel["title"]
            else:
                rows.append((text(row), text(panel["title"]), text(panel["description"])))
        heading = document["title"].removeprefix("aiaas: ")
        parts.append([f"## {heading}", "", document["description"], "", *table(("Row", "Panel", ""), rows)])
    return page("Dashboards", *parts)


def queues() -> Iterator[tuple[str, str, str, str]]:
    """The queues between services: name, exchange, routing key, and what is said below each in the code."""
    source = Path(str(sys.modules[topology.__name__].__file__))
    body = ast.parse(source.read_text(encoding="utf-8")).body
    said = {
        target.id: " ".join(ast.literal_eval(after.value).split())
        for before, after in itertools.pairwise(body)
        if isinstance(before, ast.Assign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        for target in before.targets
        if isinstance(target, ast.Name)
    }
    for name, queue in vars(topology).items():
        if isinstance(queue, Queue):
            yield queue.name, queue.exchange, queue.routing_key, said.get(name, "")

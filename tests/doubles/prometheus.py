"""Prometheus and its tools as bootstrap.sh has them installed, and the platform's rules."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml

from deploy.local.ports import free_port

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
RULES = sorted((MONITORING / "rules").glob("*.yaml"))
# As the chart has it for engines.
_VLLM = {"source_labels": ["__name__"], "regex": "vllm_(.+)", "target_label": "__name__", "replacement": "vllm:${1}"}
# The windows of the rules, and how long they are for who cannot wait.
_SECONDS = {"5m": 5, "10m": 5, "30m": 6, "1h": 7, "6h": 8, "3d": 10}


def binary(name: str) -> str:
    """The path of prometheus, promtool or amtool."""
    found = shutil.which(name) or shutil.which(name, path=ROOT / ".venv/system/usr/bin")
    assert found, "run deploy/local/bootstrap.sh test"
    return found


class Series(NamedTuple):
    """One result of a query: its labels, and its values by their time, seconds since the epoch."""

    labels: dict[str, str]
    values: list[tuple[float, float]]


@dataclass
class Prometheus:
    """One that runs."""

    client: httpx.AsyncClient

    async def firing(self) -> set[str]:
        """The names of the alerts that fire now."""
        return {labels["alertname"] for labels in await self.alerts()}

    async def alerts(self) -> list[dict[str, str]]:
        """The labels of the alerts that fire now."""
        answer = await self.client.get("/api/v1/alerts")
        alerts = answer.raise_for_status().json()["data"]["alerts"]
        return [alert["labels"] for alert in alerts if alert["state"] == "firing"]

    async def sees(self, jobs: set[str]) -> bool:
        """Whether all of these jobs are scraped."""
        answer = await self.client.get("/api/v1/targets")
        active = answer.raise_for_status().json()["data"]["activeTargets"]
        return {target["labels"]["job"] for target in active if target["health"] == "up"} >= jobs

    async def query(self, query: str) -> list[Series]:
        """What a query results in now. Raises AssertionError for one that Prometheus does not understand."""
        result = await self._ask("query", {"query": query})
        return [Series(one["metric"], [(one["value"][0], float(one["value"][1]))]) for one in result]

    async def query_range(self, query: str, start: float, end: float, step_s: float) -> list[Series]:
        """What a query results in over a time, in seconds since the epoch. Raises AssertionError as `query` does."""
        result = await self._ask("query_range", {"query": query, "start": start, "end": end, "step": step_s})
        return [Series(one["metric"], [(at, float(value)) for at, value in one["values"]]) for one in result]

    async def _ask(self, what: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        answer = await self.client.get(f"/api/v1/{what}", params=parameters)
        assert answer.status_code == 200, f"{parameters['query']}: {answer.text}"
        result: list[dict[str, Any]] = answer.json()["data"]["result"]
        return result


def impatient(folder: Path) -> list[Path]:
    """The rules, written into a folder, with seconds where they have minutes, hours and days."""
    made = []
    for path in RULES:
        text = re.sub(r"for: \d+m", "for: 2s", path.read_text())
        text = re.sub(r"\[(\w+)\]", lambda window: f"[{_SECONDS[window[1]]}s]", text)
        made.append(folder / path.name)
        made[-1].write_text(text.replace("age_seconds > 300", "age_seconds > 2"))
    return made


@asynccontextmanager
async def watching(
    rules: list[Path], jobs: Mapping[str, str | list[str]], folder: Path, *, every: str = "500ms"
) -> AsyncIterator[Prometheus]:
    """A Prometheus that looks at the addresses of `jobs`, and judges them by `rules`, twice a second."""
    configuration: dict[str, Any] = {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": [str(path) for path in rules],
        "scrape_configs": [
            {
                "job_name": job,
                "static_configs": [{"targets": addresses if isinstance(addresses, list) else [addresses]}],
                "metric_relabel_configs": [_VLLM],
            }
            for job, addresses in jobs.items()
        ],
    }
    config = folder / "prometheus.yaml"
    config.write_text(yaml.safe_dump(configuration))
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        binary("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            async with asyncio.timeout(20):
                while not await _is_ready(client):
                    await asyncio.sleep(0.02)
            yield Prometheus(client)
    finally:
        process.kill()
        await process.wait()


async def _is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/-/ready")).status_code == 200
    except httpx.TransportError:
        return False

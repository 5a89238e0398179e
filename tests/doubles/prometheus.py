"""Prometheus and its tools as bootstrap.sh has them installed, and the platform's rules."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from deploy.local.ports import free_port

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
RULES = sorted((MONITORING / "rules").glob("*.yaml"))


def binary(name: str) -> str:
    """The path of prometheus, promtool or amtool."""
    found = shutil.which(name) or shutil.which(name, path=ROOT / ".venv/system/usr/bin")
    assert found, "run deploy/local/bootstrap.sh test"
    return found


@dataclass
class Prometheus:
    """One that runs."""

    client: httpx.AsyncClient

    async def firing(self) -> set[str]:
        """The names of the alerts that fire now."""
        answer = await self.client.get("/api/v1/alerts")
        alerts = answer.raise_for_status().json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


@asynccontextmanager
async def watching(rules: list[Path], jobs: dict[str, str], folder: Path) -> AsyncIterator[Prometheus]:
    """A Prometheus that looks at the addresses of `jobs`, and judges them by `rules`, twice a second."""
    configuration: dict[str, Any] = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(path) for path in rules],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [address]}]} for job, address in jobs.items()
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

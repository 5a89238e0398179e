"""A whole platform under five minutes of mixed load, watched by a real Prometheus: each query of each dashboard must
have data, and pictures of the dashboards are drawn from it; it never measures how fast anything is.

    DURATION_S=300 python -m tests.load.dashboards

The table is kept in tests/load/results/dashboards.md and the pictures in docs/images, unless the run is shorter.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from deploy.dashboards.__main__ import documents
from deploy.local.stack import PRICE, Stack, running
from deploy.local.state import State
from tests.doubles.engine_at_work import EngineAtWork
from tests.doubles.prometheus import Prometheus, watching
from tests.doubles.webhook_receiver import WebhookReceiver
from tests.load.host import call
from tests.load.native import CHECKOUT, HERE, WORKSHOP
from tests.load.pictures import draw
from tests.observability.asking import Asked, ask, filled

DURATION_S = 300.0
MODEL = "assistant"
EMBEDDING_MODEL = "minilm"
PASSWORD = "a password for a load 71"
# Of the engines one is ill for this part of the time, so that there is something to see.
ILL = (0.4, 0.5)
_SCRAPED = "2s"
_STEP_S = 5.0
_HEALTHY_LIMIT_S = 30.0
_TIMEOUT_S = 30.0

# What may have no data, and why.
QUIET = {
    (
        "identity",
        "Attempts that are not audited",
    ): "nothing is left out while the log can be written and few are refused",
}


@dataclass
class Load:
    """Requests of every kind that there is, each at its own pace; `seen` counts the statuses of each kind."""

    stack: Stack
    session: aiohttp.ClientSession
    engines: list[EngineAtWork]
    receiver: WebhookReceiver
    organization_id: str = ""
    key: str = ""
    limited_key: str = ""
    email: str = "owner@example.com"
    seen: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))

    async def prepare(self) -> None:
        """An organization, its keys, its webhook and its owner; the engines as backends of one model."""
        model = {"owner": "load", "context_tokens": 4096, "endpoints": ["ENDPOINT_CHAT_COMPLETIONS"]}
        await self._call("PATCH", f"/admin/v1/models/{MODEL}?allow_missing=true", model)
        await self._call("POST", f"/admin/v1/models/{MODEL}/prices", PRICE)
        for number, engine in enumerate(self.engines, 1):
            backend = {
                "base_url": f"http://{engine.address}",
                "engine": "ENGINE_KIND_VLLM",
                "models": [{"model_id": MODEL}],
            }
            await self._call("PATCH", f"/admin/v1/backends/{MODEL}-{number}?allow_missing=true", backend)
        async with asyncio.timeout(_HEALTHY_LIMIT_S):
            while not await self._healthy():
                await asyncio.sleep(0.1)
        self.organization_id = await self._organization("Mixed load")
        self.key = await self._key(self.organization_id)
        limits = {"limit_requests_per_second": 1, "burst_requests": 2}
        self.limited_key = await self._key(await self._organization("Limited", rate_limits=limits))
        await self._webhook(self.organization_id)
        invite = {"email": self.email, "role_ids": ["owner"]}
        made = await self._call("POST", f"/admin/v1/organizations/{self.organization_id}/invites", invite)
        accepted = {"invite_token": made["invite_token"], "password": PASSWORD}
        await self._call("POST", "/admin/v1/invites:accept", accepted)

    async def run(self, duration_s: float) -> None:
        """All of it until cancelled; `duration_s` says when an engine falls ill."""
        kinds: list[tuple[float, Callable[[], Awaitable[None]]]] = [
            (0.25, self.streamed_chat),
            (0.35, self.whole_chat),
            (1.0, self.embeddings),
            (2.0, self.repeated),
            (0.5, self.refused_by_limit),
            (12.0, self.budget_exhausted),
            (2.0, self.wrong),
            (5.0, self.unlike_http),
            (10.0, self.sign_in),
            (4.0, self.manage),
            (10.0, self.export),
            (20.0, self.reconcile),
        ]
        async with asyncio.TaskGroup() as group:
            group.create_task(self._illness(duration_s))
            for every_s, kind in kinds:
                group.create_task(self._keep_on(group, every_s, kind))

    async def streamed_chat(self) -> None:
        await self._chat("chat, streamed", self.key, stream=True)

    async def whole_chat(self) -> None:
        await self._chat("chat", self.key)

    async def embeddings(self) -> None:
        body = {"model": EMBEDDING_MODEL, "input": "The quick brown fox"}
        await self._ask("embeddings", "POST", "/v1/embeddings", body, self.key)

    async def repeated(self) -> None:
        """The same request twice, the second one answered from what is kept."""
        name = secrets.token_hex(8)
        for _ in range(2):
            await self._chat("chat, repeated", self.key, headers={"Idempotency-Key": name})

    async def refused_by_limit(self) -> None:
        await self._chat("chat, beyond a limit", self.limited_key)

    async def budget_exhausted(self) -> None:
        """An organization that asks until its hard budget is spent, and a little longer; its webhook is told."""
        organization_id = await self._organization("Of small means")
        await self._webhook(organization_id)
        budget = {
            "display_name": "Small",
            "unit": "BUDGET_UNIT_REQUESTS",
            "interval": "BUDGET_INTERVAL_TOTAL",
            "enforcement": "BUDGET_ENFORCEMENT_HARD",
            "limit": 6,
        }
        await self._call("POST", f"/admin/v1/organizations/{organization_id}/budgets", budget)
        key = await self._key(organization_id)
        for _ in range(10):
            await self._chat("chat, until a budget is spent", key)

    async def wrong(self) -> None:
        """Credentials that are wrong or may not, and a model that is not there."""
        path = f"/admin/v1/organizations/{self.organization_id}"
        await self._ask("wrong key", "GET", "/v1/models", None, f"{self.key[:-1]}x")
        await self._ask("key that may not", "GET", path, None, self.key)
        await self._chat("unknown model", self.key, model="nobody-has-it")

    async def unlike_http(self) -> None:
        """Bytes that are no request."""
        host, _, port = self.stack.base_url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"\x16\x03\x01 hello\r\n\r\n")
        answer = await reader.read()
        self.seen["no HTTP"][int(answer.split()[1]) if answer else 0] += 1
        writer.close()

    async def sign_in(self) -> None:
        """In and out again, and in with a wrong password."""
        credentials = {"email": self.email, "password": PASSWORD}
        made = await self._ask("sign-in", "POST", "/admin/v1/sessions", credentials, "")
        if signed_in := made.get("sign_in", {}).get("signed_in"):
            await self._ask("sign-out", "DELETE", "/admin/v1/sessions/current", None, signed_in["session_token"])
        unknown = {"email": f"{secrets.token_hex(4)}@example.com", "password": "wrong-password"}
        await self._ask("sign-in, wrong", "POST", "/admin/v1/sessions", unknown, "")

    async def manage(self) -> None:
        """A key that is made, used, changed and revoked; an organization that is renamed; usage that is asked for."""
        path, admin = f"/admin/v1/organizations/{self.organization_id}", self.stack.platform_key
        made = await self._ask("management", "POST", f"{path}/api-keys", {"display_name": "brief"}, admin)
        await self._chat("chat, new key", made["secret"])
        one = f"{path}/api-keys/{made['api_key']['api_key_id']}"
        await self._ask("management", "PATCH", one, {"display_name": "briefer"}, admin)
        await self._ask("management", "POST", f"{one}:revoke", {}, admin)
        await self._ask("management", "PATCH", path, {"display_name": f"Load {secrets.token_hex(2)}"}, admin)
        await self._ask("management", "GET", f"{path}/api-keys", None, admin)
        usage = f"/analytics/v1/organizations/{self.organization_id}/usage?start_time=2026-01-01T00:00:00Z"
        await self._ask("usage", "GET", usage, None, admin)

    async def export(self) -> None:
        now = int(time.time()) // 86400 * 86400
        start, end = (time.strftime("%Y-%m-%dT00:00:00Z", time.gmtime(at)) for at in (now, now + 86400))
        wanted = {
            "granularity": "EXPORT_GRANULARITY_RAW",
            "format": "EXPORT_FORMAT_CSV",
            "start_time": start,
            "end_time": end,
        }
        path = f"/analytics/v1/organizations/{self.organization_id}/exports"
        await self._ask("export", "POST", path, wanted, self.stack.platform_key)

    async def reconcile(self) -> None:
        hour = int(time.time()) // 3600 * 3600
        # The one before: of this hour some events are still on their way.
        start, end = (time.strftime("%Y-%m-%dT%H:00:00Z", time.gmtime(at)) for at in (hour - 3600, hour))
        asked = {"kind": "RECONCILIATION_KIND_JOURNAL", "start_time": start, "end_time": end}
        await self._ask("reconciliation", "POST", "/analytics/v1/reconciliations", asked, self.stack.platform_key)

    async def _illness(self, duration_s: float) -> None:
        await asyncio.sleep(ILL[0] * duration_s)
        self.engines[0].is_ill = True
        await asyncio.sleep((ILL[1] - ILL[0]) * duration_s)
        self.engines[0].is_ill = False

    async def _keep_on(self, group: asyncio.TaskGroup, every_s: float, kind: Callable[[], Awaitable[None]]) -> None:
        async def once() -> None:
            # What is cut off or comes too late shows in what is watched.
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                await kind()

        while True:
            group.create_task(once())
            await asyncio.sleep(every_s)

    async def _chat(self, kind: str, key: str, *, model: str = MODEL, stream: bool = False, **options: Any) -> None:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "Tell me about rain. " * 10}],
            "stream": stream,
        }
        await self._ask(kind, "POST", "/v1/chat/completions", body | {"max_tokens": 64}, key, **options)

    async def _ask(
        self, kind: str, verb: str, path: str, body: object, key: str, *, headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """The document that answers, empty where there is none."""
        sent = (headers or {}) | ({"Authorization": f"Bearer {key}"} if key else {})
        async with self.session.request(verb, path, json=body, headers=sent) as answer:
            self.seen[kind][answer.status] += 1
            if answer.content_type != "application/json":
                await answer.read()
                return {}
            document: dict[str, Any] = await answer.json()
            return document

    async def _call(self, verb: str, path: str, body: object = None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.stack.platform_key}"}
        async with aiohttp.ClientSession(self.stack.base_url, headers=headers) as session:
            return await call(session, verb, path, body)

    async def _organization(self, name: str, **fields: Any) -> str:
        made = await self._call("POST", "/admin/v1/organizations", {"display_name": name, **fields})
        return str(made["organization"]["organization_id"])

    async def _key(self, organization_id: str) -> str:
        path = f"/admin/v1/organizations/{organization_id}/api-keys"
        return str((await self._call("POST", path, {"display_name": "load"}))["secret"])

    async def _webhook(self, organization_id: str) -> None:
        path = f"/analytics/v1/organizations/{organization_id}/webhooks"
        await self._call("POST", path, {"display_name": "Load", "url": self.receiver.url})

    async def _healthy(self) -> bool:
        backends = (await self._call("GET", "/admin/v1/backends"))["backends"]
        return all(one["health"] == "BACKEND_HEALTH_HEALTHY" for one in backends)


async def measure(duration_s: float, folder: Path) -> tuple[Load, list[Asked]]:
    """Run the load, ask everything while it goes on, and draw what it looked like into `folder`."""
    async with contextlib.AsyncExitStack() as entered:
        state = entered.enter_context(State.temporary())
        scratch = Path(entered.enter_context(tempfile.TemporaryDirectory()))
        engines = [await entered.enter_async_context(EngineAtWork(MODEL, seed)) for seed in (1, 2)]
        receiver = await entered.enter_async_context(WebhookReceiver())
        stack = await entered.enter_async_context(running(state, chat_replicas=0))
        session = await entered.enter_async_context(
            aiohttp.ClientSession(stack.base_url, timeout=aiohttp.ClientTimeout(_TIMEOUT_S))
        )
        jobs: dict[str, str | list[str]] = {f"aiaas-{name}": address for name, address in stack.ops.items()}
        jobs["vllm"] = [engine.address for engine in engines]
        prometheus = await entered.enter_async_context(watching([], jobs, scratch, every=_SCRAPED))
        load = Load(stack, session, engines, receiver)
        await load.prepare()
        began = time.time()
        running_load = asyncio.create_task(load.run(duration_s))
        done, _ = await asyncio.wait([running_load], timeout=duration_s)
        for task in done:
            task.result()
        variables = {"$__rate_interval": "30s", "$__range": f"{duration_s:.0f}s", "$model": ".*"}
        try:
            asked = await ask(prometheus, variables)
            await picture(prometheus, variables, began, folder)
        finally:
            running_load.cancel()
            await asyncio.wait([running_load])
        return load, asked


async def picture(prometheus: Prometheus, variables: dict[str, str], began: float, folder: Path) -> None:
    """Draw every dashboard as it looks now."""
    end = time.time()
    for name, document in documents().items():
        found = {
            (panel["id"], target["refId"]): await prometheus.query_range(
                filled(target["expr"], variables), began if target.get("range") else end, end, _STEP_S
            )
            for panel in document["panels"]
            for target in panel.get("targets", ())
        }
        await asyncio.to_thread(draw, document, found, (began, end), folder / f"{name}.svg")


def table(load: Load, asked: list[Asked], duration_s: float) -> str:
    """What was asked of the platform, and then of Prometheus."""
    kinds = [
        f"| {kind} | {sum(statuses.values())} | "
        + ", ".join(f"{count} of {status}" for status, count in sorted(statuses.items()))
        + " |"
        for kind, statuses in sorted(load.seen.items())
    ]
    rows = [
        f"| {one.dashboard} | {one.panel} | {one.legend} | {len(one.values)} | "
        + (
            f"{next(value for value in one.values if value == value):.4g} |"
            if not one.is_empty
            else f"{verdict(one)} |"
        )
        for one in asked
    ]
    empty = sum(one.is_empty for one in asked)
    return "\n".join(
        [
            f"# Dashboards under {duration_s:.0f} s of mixed load",
            "",
            f"Of {len(asked)} queries {empty} had no data. Made by `make bench-dashboards`.",
            "",
            "| load | requests | statuses |",
            "| --- | --- | --- |",
            *kinds,
            "",
            "| dashboard | panel | legend | series | a value |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def verdict(one: Asked) -> str:
    """Of a query without data: why that is as it should be, or that it is not."""
    reason = QUIET.get((one.dashboard, one.panel))
    return f"none: {reason}" if reason else "**none**"


def main() -> None:
    """Raises SystemExit: 0 when every panel has its data, 1 when one lacks it."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.dashboards", description="Dashboards under load.")
    parser.add_argument(
        "--duration_s", type=float, default=os.environ.get("DURATION_S") or DURATION_S, help="of the load (DURATION_S)"
    )
    duration_s = parser.parse_args().duration_s
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    is_whole = duration_s >= DURATION_S
    pictures, results = (
        (CHECKOUT / "docs/images", HERE / "results") if is_whole else (WORKSHOP / "pictures", WORKSHOP / "results")
    )
    for folder in (pictures, results):
        folder.mkdir(parents=True, exist_ok=True)
    load, asked = asyncio.run(measure(duration_s, pictures))
    text = table(load, asked, duration_s)
    (results / "dashboards.md").write_text(text)
    print(text)
    missing = [one for one in asked if one.is_empty and (one.dashboard, one.panel) not in QUIET]
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()

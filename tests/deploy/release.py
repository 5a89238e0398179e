"""What a release of the chart is given before it serves: secrets and certificates, the first key, a price."""

import asyncio
import json
from collections.abc import Mapping

import aiohttp

from deploy.local.certificates import Authority
from tests.deploy.node import Node
from tests.deploy.tools import Manifest, one

SERVICES = ("identity", "router", "analytics", "edge")
KEY = "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA="
QUESTION = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}


def secrets_of(
    manifests: list[Manifest], authority: Authority, database_urls: Mapping[str, str], redis_url: str, amqp_url: str
) -> dict[str, dict[str, str]]:
    """The secrets that docs/deployment.md tells to make, and what cert-manager makes, by name and key."""
    secrets: dict[str, dict[str, str]] = {
        f"aiaas-{service}": {
            "database-url": url,
            "redis-url": redis_url,
            "amqp-url": amqp_url,
            "audit-key": KEY,
            "secret-key": KEY,
        }
        for service, url in database_urls.items()
    }
    secrets["engine-key"] = {"key": "of-the-engine"}
    for service in SERVICES:
        certificate, key = authority.issue(service)
        files = {"tls.crt": certificate, "tls.key": key, "ca.crt": authority.certificate}
        secrets[one(manifests, "Certificate", f"aiaas-{service}")["spec"]["secretName"]] = files
    return secrets


async def bootstrap(node: Node, specs: dict[str, Manifest], prefix: tuple[str, ...] = ()) -> str:
    """What NOTES.txt tells to type; returns the key."""
    spec = json.loads(json.dumps(specs["Job/aiaas-migrate-identity"]))
    spec["containers"][0]["command"][3] = "bootstrap"
    pod = await node.start("bootstrap", spec, prefix=prefix)
    assert await pod.ended() == 0, pod.log.read_text()
    return str(json.loads(pod.log.read_text().splitlines()[-1])["secret"])


async def priced(session: aiohttp.ClientSession) -> None:
    """Gives the model its price, and asks until it answers: a router looks at new backends once a second."""
    price = {
        "prompt_micros_per_million": 50_000,
        "cached_prompt_micros_per_million": 25_000,
        "completion_micros_per_million": 200_000,
    }
    async with session.post("/admin/v1/models/smollm2/prices", json=price) as answer:
        assert answer.status == 200, await answer.text()
    async with asyncio.timeout(20):
        while True:
            async with session.post("/v1/chat/completions", json=QUESTION) as answer:
                if answer.status == 200:
                    return
            await asyncio.sleep(0.1)

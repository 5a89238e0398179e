"""The platform through real nginx, configured as the NGINX Ingress controller would be by what the chart renders.

WITHOUT takes a protection away, and its test fails: with `unbuffered` nginx holds back what it may (so little only in
HTTP/1.1), with `proxies` services trust no proxy, with `distrust` everybody.
"""

import asyncio
import copy
import json
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from aiaas.identity.v1.organization_service_pb2 import ListOrganizationsRequest
from aiaas.identity.v1.organization_service_pb2_grpc import OrganizationServiceStub
from aiaas.router.v1.inference_service_pb2 import InferRequest
from aiaas.router.v1.inference_service_pb2_grpc import InferenceServiceStub
from aiaas.type.v1.usage_event_pb2 import ENDPOINT_CHAT_COMPLETIONS
from deploy.local.certificates import Authority
from mesh.auth import policy_of
from mesh.errors import Reason
from tests.conftest import Servers
from tests.contract.test_contracts import METHODS
from tests.deploy.chart_platform import Platform, register, running
from tests.deploy.nginx_ingress import HTTP, HTTPS, Site, UnknownAnnotationError, nginx, translated
from tests.deploy.node import spare
from tests.deploy.release import QUESTION
from tests.deploy.tools import Manifest, of_kind, one, render
from tests.doubles.scripted_backend import Answer, chunk, sse, usage_chunk
from tests.integration.mesh.harness import error_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

WITHOUT = os.environ.get("WITHOUT", "")
HOST, GRPC_HOST = "api.example.com", "grpc.example.com"
CHAT = "/v1/chat/completions"
BODY_BYTES = 4 << 20
# nginx' own address among its peers, and two clients'.
TRUSTED = {"proxies": [], "distrust": ["127.0.0.0/8"]}.get(WITHOUT, ["127.0.0.1/32"])
CLIENT, STRANGER = "127.0.0.9", "127.0.0.8"
VERSIONS = ("1.1", "2")
BUFFERING = "nginx.ingress.kubernetes.io/proxy-buffering"
# By nginx' own word for the edge's header, as if the edge had not said it.
IGNORING = "proxy_ignore_headers X-Accel-Buffering;"


@dataclass
class Answered:
    status: int
    version: str
    headers: str
    body: bytes


@dataclass
class Ingress:
    """The platform behind three nginx: `chart` is as the chart has it, and of the two that keep it from buffering
    streams, one has only the `annotation` and one only the edge's `header`."""

    platform: Platform
    authority: Authority
    folder: Path
    addresses: dict[str, str] = field(default_factory=dict)

    def curl(
        self, *arguments: str, via: str = "chart", port: int = HTTPS, path: str = CHAT, key: str = ""
    ) -> list[str]:
        """A command that asks for a path; its output is the answer's body."""
        scheme = "http" if port == HTTP else "https"
        return [
            *("curl", "--silent", "--no-buffer", "--max-time", "20", "--cacert", str(self.folder / "ca.pem")),
            *("--resolve", f"{HOST}:{port}:{self.addresses[via]}"),
            *("--resolve", f"{GRPC_HOST}:{port}:{self.addresses[via]}"),
            *("--header", f"Authorization: Bearer {key or self.platform.key}"),
            *arguments,
            path if "://" in path else f"{scheme}://{HOST}:{port}{path}",
        ]

    async def ask(self, *arguments: str, **where: Any) -> Answered:
        """The answer to a request, however it was asked."""
        headers = self.folder / "headers"
        told = ("--dump-header", str(headers), "--write-out", "\n%{http_version} %{response_code}")
        process = await asyncio.create_subprocess_exec(
            *self.curl(*told, *arguments, **where), stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL
        )
        output, _ = await process.communicate()
        body, _, last = output.rpartition(b"\n")
        version, _, status = last.decode().partition(" ")
        return Answered(int(status), version, headers.read_text().lower(), body)

    @asynccontextmanager
    async def streaming(self, *arguments: str, **where: Any) -> AsyncIterator[asyncio.StreamReader]:
        """A streamed chat completion as it comes; the client is gone with the block."""
        question = json.dumps({**QUESTION, "stream": True})
        process = await asyncio.create_subprocess_exec(
            *self.curl(*arguments, *posted(question), **where), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout
        try:
            yield process.stdout
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[Any]:
        """gRPC with nothing but the public authority."""
        credentials = grpc.ssl_channel_credentials(self.authority.certificate.encode())
        options = [("grpc.ssl_target_name_override", GRPC_HOST)]
        async with grpc.aio.secure_channel(f"{self.addresses['chart']}:{HTTPS}", credentials, options=options) as made:
            yield made

    @property
    def bearer(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.platform.key}"),)

    async def key(self, **rest: Any) -> str:
        """An API key of an organization of its own."""
        session = self.platform.session
        async with session.post("/admin/v1/organizations", json={"display_name": "Acme"}) as answer:
            organization = (await answer.json())["organization"]["organization_id"]
        path = f"/admin/v1/organizations/{organization}/api-keys"
        async with session.post(path, json={"display_name": "bound", **rest}) as answer:
            assert answer.status == 200, await answer.text()
            return str((await answer.json())["secret"])


def posted(body: str) -> tuple[str, ...]:
    return ("--header", "Content-Type: application/json", "--data-binary", body)


def buffering(manifests: list[Manifest]) -> list[Manifest]:
    """The manifests with an annotation that says the opposite."""
    changed = copy.deepcopy(manifests)
    one(changed, "Ingress", "aiaas")["metadata"]["annotations"][BUFFERING] = "on"
    return changed


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ingress(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ingress]:
    folder = tmp_path_factory.mktemp("ingress")
    values = {"ingress": {"grpc": {"enabled": True}}, "trustedProxies": TRUSTED}
    authority = Authority.make()
    async with running(servers, values, folder) as platform, AsyncExitStack() as stack:
        await register(platform, folder)
        (folder / "ca.pem").write_text(authority.certificate)
        secrets = {}
        for manifest in of_kind(platform.manifests, "Ingress"):
            (tls,) = manifest["spec"]["tls"]
            secrets[tls["secretName"]] = folder / tls["secretName"]
            secrets[tls["secretName"]].mkdir()
            for name, pem in zip(("tls.crt", "tls.key"), authority.issue_names(*tls["hosts"]), strict=True):
                (secrets[tls["secretName"]] / name).write_text(pem)
        made = Ingress(platform, authority, folder)
        pods = {service: pod.address for service, pod in platform.pods.items()}
        chart, opposite = platform.manifests, buffering(platform.manifests)
        protections: Mapping[str, tuple[list[Manifest], str]] = {
            "chart": (chart, ""),
            "annotation": (chart, IGNORING),
            "header": (opposite, ""),
        }
        for number, (name, (manifests, extra)) in enumerate(protections.items(), start=11):
            if WITHOUT == "unbuffered":
                manifests, extra = opposite, IGNORING
            made.addresses[name] = f"127.77.{spare()}.{number}"
            site = Site(made.addresses[name], folder / f"nginx-{name}", pods, secrets, extra)
            await stack.enter_async_context(nginx(translated(manifests, site), site))
        yield made


@pytest.mark.parametrize("version", VERSIONS)
async def test_chat_completion_is_answered(ingress: Ingress, version: str) -> None:
    answered = await ingress.ask(f"--http{version}", *posted(json.dumps(QUESTION)))
    assert (answered.status, answered.version) == (200, version)
    assert json.loads(answered.body)["choices"][0]["message"]["content"] == "Hello"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("via", ["chart", "annotation", "header"])
async def test_first_token_arrives_before_the_engine_makes_the_second(ingress: Ingress, via: str, version: str) -> None:
    second = asyncio.Event()
    first, *rest = sse(chunk("One"), chunk("two"), chunk(finish_reason="stop"), usage_chunk(5, 2))
    ingress.platform.engine.script.append(Answer([first, second, *rest], content_type="text/event-stream"))
    async with ingress.streaming(f"--http{version}", via=via) as answer:
        try:
            received = await asyncio.wait_for(answer.readuntil(b"\n\n"), 5)
        finally:
            second.set()
        received += await answer.read()
    assert b"One" in received.partition(b"\n\n")[0]
    assert received.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("version", VERSIONS)
async def test_client_that_goes_away_ends_the_engines_request(ingress: Ingress, version: str) -> None:
    first, *_ = sse(chunk("One"))
    ingress.platform.engine.script.append(Answer([first, asyncio.Event()], content_type="text/event-stream"))
    async with ingress.streaming(f"--http{version}") as answer:
        await asyncio.wait_for(answer.readuntil(b"\n\n"), 5)
    await asyncio.wait_for(ingress.platform.engine.received[-1].abandoned.wait(), 2)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("framing", ["Content-Length", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize(
    ("size", "status", "who"),
    [
        (BODY_BYTES, 200, "engine"),
        (BODY_BYTES + 1, 413, "edge"),
        (BODY_BYTES + (64 << 10) + 1, 413, "nginx"),
    ],
    ids=["the largest", "too large for the edge", "too large for nginx"],
)
async def test_body_is_taken_to_the_last_byte_that_it_may_have(
    ingress: Ingress, version: str, framing: str, size: int, status: int, who: str
) -> None:
    path = ingress.folder / "body"
    path.write_bytes(json.dumps(QUESTION).encode().ljust(size))
    asked = len(ingress.platform.engine.received)
    headers = ("--header", framing) if ":" in framing else ()
    answered = await ingress.ask(f"--http{version}", *headers, *posted(f"@{path}"))
    assert answered.status == status
    assert len(ingress.platform.engine.received) == asked + (who == "engine")
    if who == "edge":
        assert json.loads(answered.body)["error"]["type"] == "invalid_request_error"
    elif who == "nginx" and not headers:
        # Of a body without a length the edge may have had enough before nginx has.
        assert b"nginx" in answered.body


async def test_plain_http_is_sent_to_https(ingress: Ingress) -> None:
    answered = await ingress.ask(port=HTTP, path="/v1/models?limit=1")
    assert answered.status == 308
    assert f"location: https://{HOST}/v1/models?limit=1" in answered.headers


@pytest.mark.parametrize(
    "lines",
    [
        "Content-Length: 2\r\nContent-Length: 2",
        "Content-Length: 2\r\nContent-Length: 3",
        "Content-Length: 2, 2",
        "Content-Length: +2",
        "Content-Length: 2\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    ],
)
async def test_body_whose_end_is_a_matter_of_opinion_is_refused(ingress: Ingress, lines: str) -> None:
    asked = len(ingress.platform.engine.received)
    context = ssl.create_default_context(cafile=ingress.folder / "ca.pem")
    reader, writer = await asyncio.open_connection(ingress.addresses["chart"], HTTPS, ssl=context, server_hostname=HOST)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {HOST}\r\nAuthorization: Bearer {ingress.platform.key}\r\n{lines}\r\n\r\n"
    writer.write(head.encode() + b"{}")
    assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
    writer.close()
    await writer.wait_closed()
    assert len(ingress.platform.engine.received) == asked


@pytest.mark.parametrize("path", ["/sign-in", "/recover", "/invites/accept", "/account/authenticator", "/docs"])
async def test_pages_are_reached(ingress: Ingress, path: str) -> None:
    answered = await ingress.ask(path=path)
    assert answered.status in (200, 303, 400)
    assert "x-request-id: " in answered.headers


@pytest.mark.parametrize("path", ["/", "/metrics", "/health", "/ready", "/v1beta", "/v1/../metrics", "/%6detrics"])
async def test_what_is_not_for_clients_is_not_reached(ingress: Ingress, path: str) -> None:
    answered = await ingress.ask("--path-as-is", path=path)
    assert answered.status == 404
    assert "x-request-id: " not in answered.headers


async def test_client_is_who_the_ingress_says_and_never_who_it_says_itself(ingress: Ingress) -> None:
    key = await ingress.key(allowed_networks=[f"{CLIENT}/32"])
    lie = ("--header", f"X-Forwarded-For: {CLIENT}", "--header", f"X-Real-IP: {CLIENT}")
    direct = f"{ingress.platform.base_url}/v1/models"

    async def status(address: str, *arguments: str, path: str = "/v1/models") -> int:
        return (await ingress.ask("--interface", address, *arguments, path=path, key=key)).status

    assert await status(CLIENT) == 200
    assert await status(STRANGER) == 403
    assert await status(STRANGER, *lie) == 403
    assert await status(STRANGER, *lie, path=direct) == 403
    question = posted(json.dumps(QUESTION))
    assert await status(CLIENT, *question, path=CHAT) == 200
    assert await status(STRANGER, *lie, *question, path=CHAT) == 403


async def test_grpc_answers_with_its_status_and_details(ingress: Ingress) -> None:
    async with ingress.channel() as channel:
        organizations = OrganizationServiceStub(channel)
        request = ListOrganizationsRequest(page_size=1)
        answer = await organizations.ListOrganizations(request, metadata=ingress.bearer, timeout=5)
        assert len(answer.organizations) == 1
        assert (
            await error_of(organizations.ListOrganizations(request, timeout=5))
        ).reason is Reason.MISSING_CREDENTIALS
        narrow = (("authorization", f"Bearer {await ingress.key()}"),)
        refused = await error_of(organizations.ListOrganizations(request, metadata=narrow, timeout=5))
        assert refused.reason is Reason.PERMISSION_DENIED


def inference(**rest: Any) -> InferRequest:
    body = json.dumps({**QUESTION, "stream": True}).encode()
    return InferRequest(endpoint=ENDPOINT_CHAT_COMPLETIONS, body=body, **rest)


async def test_grpc_streams_as_the_engine_does(ingress: Ingress) -> None:
    second = asyncio.Event()
    first, *rest = sse(chunk("One"), chunk("two"), chunk(finish_reason="stop"), usage_chunk(5, 2))
    ingress.platform.engine.script.append(Answer([first, second, *rest], content_type="text/event-stream"))
    async with ingress.channel() as channel:
        parts = []
        async for part in InferenceServiceStub(channel).Infer(inference(), metadata=ingress.bearer, timeout=10):
            parts.append(part)
            if b"One" in part.data:
                second.set()
    assert [part.WhichOneof("part") for part in parts][:2] == ["head", "data"]
    assert parts[-1].HasField("tail")
    assert b"two" in b"".join(part.data for part in parts)


@pytest.mark.parametrize("how", ["deadline", "cancel"])
async def test_grpc_call_that_ends_early_ends_everywhere(ingress: Ingress, how: str) -> None:
    first, *_ = sse(chunk("One"))
    ingress.platform.engine.script.append(Answer([first, asyncio.Event()], content_type="text/event-stream"))
    async with ingress.channel() as channel:
        timeout_s = 1.0 if how == "deadline" else 10.0
        call: Any = InferenceServiceStub(channel).Infer(inference(), metadata=ingress.bearer, timeout=timeout_s)
        while b"One" not in (await call.read()).data:
            pass
        if how == "cancel":
            call.cancel()
        code = grpc.StatusCode.DEADLINE_EXCEEDED if how == "deadline" else grpc.StatusCode.CANCELLED
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await call.read()
        assert await call.code() is code
    await asyncio.wait_for(ingress.platform.engine.received[-1].abandoned.wait(), 2)


async def test_grpc_takes_clients_to_nothing_internal(ingress: Ingress) -> None:
    internal = [method for method in METHODS if policy_of(method).internal]
    assert len(internal) > 20
    async with ingress.channel() as channel:
        for method in internal:
            assert method.containing_service is not None
            rpc = f"/{method.containing_service.full_name}/{method.name}"
            if method.client_streaming:
                call = channel.stream_stream(rpc)(iter([b""]), metadata=ingress.bearer, timeout=5)
            elif method.server_streaming:
                call = channel.unary_stream(rpc)(b"", metadata=ingress.bearer, timeout=5)
            else:
                call = channel.unary_unary(rpc)(b"", metadata=ingress.bearer, timeout=5)
            error = await error_of(call)
            assert (error.reason, error.message) == (Reason.PERMISSION_DENIED, "This call is not for clients."), rpc
        for rpc in ("/grpc.health.v1.Health/Check", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await channel.unary_unary(rpc)(b"", timeout=5)
            assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_grpc_client_is_who_the_ingress_says_as_well(ingress: Ingress) -> None:
    key = await ingress.key(allowed_networks=[f"{CLIENT}/32"])
    empty = ingress.folder / "empty"
    empty.write_bytes(bytes(5))
    grpc_headers = ("--header", "Content-Type: application/grpc", "--header", "TE: trailers")
    path = f"https://{GRPC_HOST}:{HTTPS}/aiaas.router.v1.InferenceService/ListServedModels"

    async def status(address: str, *arguments: str) -> str:
        asked = ("--http2", "--interface", address, *grpc_headers, *arguments, "--data-binary", f"@{empty}")
        headers = (await ingress.ask(*asked, path=path, key=key)).headers
        return headers.partition("grpc-status: ")[2].partition("\n")[0]

    lie = [word for name in ("X-Forwarded-For", "X-Client-Address") for word in ("--header", f"{name}: {CLIENT}")]
    assert await status(CLIENT) == "0"
    assert await status(STRANGER) == "7"
    assert await status(STRANGER, *lie) == "7"


async def test_annotation_that_nobody_translates_is_told(tmp_path: Path) -> None:
    name = "nginx.ingress.kubernetes.io/limit-rps"
    manifests = render({"ingress": {"annotations": {name: "5"}}}, tmp_path)
    pods = {"edge": "127.0.0.1"}
    with pytest.raises(UnknownAnnotationError, match=name):
        translated(manifests, Site("127.0.0.1", tmp_path, pods, {"aiaas-edge-public": tmp_path}))

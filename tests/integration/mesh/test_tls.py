"""Services that tell one another apart by certificates: who is refused, and what goes on while certificates change."""

import asyncio
import datetime
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from aiaas.router.v1.inference_service_pb2 import InferResponse
from aiaas.router.v1.model_service_pb2 import GetModelRequest, GetModelResponse
from aiaas.type.v1 import options_pb2
from deploy.local.certificates import Authority
from mesh import context as call
from mesh.auth import policy_of
from mesh.channel import connect
from mesh.errors import Reason, from_rpc_error
from mesh.interceptors.errors import ErrorsInterceptor
from mesh.server import GrpcServer
from mesh.tls import Tls
from tests.contract.test_contracts import METHODS
from tests.doubles.peer import PeerDouble
from tests.integration.mesh.certificates import Files, started, tls_of
from tests.integration.mesh.harness import EOF, INFERENCE, MODELS, Client, bearer, error_of, server, until

OVER = datetime.timedelta(days=-1)
SERVICES = ("identity", "router", "analytics", "edge", "tool")


@dataclass
class World:
    """A router that listens with a certificate, and what became of calls."""

    folder: Path
    authority: Authority = field(default_factory=Authority.make)
    serials: list[int] = field(default_factory=list)
    words: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.address = f"unix:{self.folder}/s"

    def tls(self, *names: str, **options: Any) -> Tls:
        """A process whose certificate names these services."""
        return tls_of(self.folder / "-".join(names), self.authority.issue(*names, **options), self.authority)

    async def get_model(self, _: Any, context: Any) -> Message:
        """Remembers the certificate that the caller showed."""
        (pem,) = context.auth_context()["x509_pem_cert"]
        self.serials.append(x509.load_pem_x509_certificate(pem).serial_number)
        return GetModelResponse()

    async def infer(self, *_: Any) -> AsyncIterator[Message]:
        """Sends on what it is told."""
        while word := await self.words.get():
            yield InferResponse(data=word)

    @asynccontextmanager
    async def serving(self, tls: Tls | None) -> AsyncIterator[None]:
        """The router listens, as which process it is told."""
        async with started(
            server(self.address, {"GetModel": self.get_model, "Infer": self.infer}, tls=tls, drain_s=0.1)
        ):
            yield

    @asynccontextmanager
    async def client(self, tls: Tls | None) -> AsyncIterator[Client]:
        """A caller of the router."""
        async with connect(self.address, MODELS, INFERENCE, tls=tls) as channel:
            yield Client(channel)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def serial_of(tls: Tls) -> int:
    return x509.load_pem_x509_certificate(tls._material.certificate).serial_number


def signed_by_itself(service: str) -> tuple[str, str]:
    """A certificate that names a service, which no authority signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, service)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now + OVER, now - OVER)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(f"{service}.aiaas.internal")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(pem).decode(), private.decode()


async def test_service_with_its_certificate_is_served(world: World) -> None:
    edge = world.tls("edge")
    async with world.serving(world.tls("router")), world.client(edge) as client:
        await client.get_model()
        assert world.serials == [serial_of(edge)]


async def test_process_of_two_services_is_both(world: World) -> None:
    async with world.serving(world.tls("edge", "router")), world.client(world.tls("edge", "router")) as client:
        await client.get_model()


@pytest.mark.parametrize("case", ["wrong authority", "signed by itself", "expired", "plain text"])
async def test_caller_without_a_good_certificate_is_not_served(world: World, case: str) -> None:
    stranger = Authority.make()
    caller = {
        "wrong authority": tls_of(world.folder / "1", stranger.issue("edge"), world.authority),
        "signed by itself": tls_of(world.folder / "2", signed_by_itself("edge"), world.authority),
        "expired": world.tls("edge", life=OVER),
        "plain text": None,
    }[case]
    async with world.serving(world.tls("router")), world.client(caller) as client:
        assert (await error_of(client.get_model(timeout=3))).reason is Reason.UNAVAILABLE
    assert world.serials == []


async def test_caller_who_shows_no_certificate_is_not_served(world: World) -> None:
    credentials = grpc.ssl_channel_credentials(world.authority.certificate.encode())
    options = [("grpc.ssl_target_name_override", "router.aiaas.internal")]
    async with (
        world.serving(world.tls("router")),
        grpc.aio.secure_channel(world.address, credentials, options=options) as channel,
    ):
        assert (await error_of(Client(channel).get_model(timeout=3))).reason is Reason.UNAVAILABLE
    assert world.serials == []


async def test_public_address_takes_clients_where_it_takes_tools_and_services_nowhere_else(world: World) -> None:
    public = f"unix:{world.folder}/p"
    everything = PeerDouble(f"unix:{world.folder}/unused")
    whole = GrpcServer(
        world.address,
        [(MODELS, lambda handler, into: into.add_generic_rpc_handlers([handler]), everything)],
        [ErrorsInterceptor()],
        drain_s=0.1,
        tls=world.tls("router"),
        public_address=public,
    )
    ca = world.authority.certificate.encode()
    options = [("grpc.ssl_target_name_override", "router.aiaas.internal")]
    router = world.authority.issue("router")
    stranger = grpc.ssl_channel_credentials(ca)
    # A certificate that nobody asks for changes nothing.
    service = grpc.ssl_channel_credentials(ca, router[1].encode(), router[0].encode())
    async with started(whole):
        for credentials in (stranger, service):
            async with grpc.aio.secure_channel(public, credentials, options=options) as channel:
                let_in = {method.full_name for method in METHODS if await is_let_in(channel, method)}
                assert let_in == {method.full_name for method in METHODS if "tool" in declared(method)}
                health = HealthStub(channel).Check(HealthCheckRequest(), timeout=5)
                assert (await error_of(health)).reason is Reason.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("name", "address"),
    [("a client", "192.0.2.1"), ("tool", "10.0.0.1"), ("edge", "198.51.100.7"), ("plain text", "198.51.100.7")],
)
async def test_client_address_is_the_callers_to_say_by_who_it_is(
    world: World, name: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.interceptors.origin._peer", lambda _: "10.0.0.1")
    public = f"unix:{world.folder}/p"
    seen: list[str] = []

    async def get_model(*_: Any) -> Message:
        seen.append(call.client_address.get())
        return GetModelResponse()

    routing = server(
        world.address,
        {"GetModel": get_model},
        tls=None if name == "plain text" else world.tls("router"),
        public_address=public,
        trusted_proxies=("10.0.0.0/8",),
        drain_s=0.1,
    )
    told = (("x-client-address", "198.51.100.7"), ("x-forwarded-for", "203.0.113.5"), ("x-forwarded-for", "192.0.2.1"))
    if name == "a client":
        credentials = grpc.ssl_channel_credentials(world.authority.certificate.encode())
        options = [("grpc.ssl_target_name_override", "router.aiaas.internal")]
        channel = grpc.aio.secure_channel(public, credentials, options=options)
    else:
        channel = connect(world.address, MODELS, INFERENCE, tls=None if name == "plain text" else world.tls(name))
    async with started(routing), channel:
        await Client(channel).models.GetModel(GetModelRequest(), metadata=(*bearer("developer"), *told), timeout=5)
    assert seen == [address]


@pytest.mark.parametrize("case", ["wrong authority", "signed by itself", "expired", "another service", "plain text"])
async def test_server_that_is_not_the_wanted_one_is_not_called(world: World, case: str) -> None:
    served = {
        "wrong authority": tls_of(world.folder / "1", Authority.make().issue("router"), world.authority),
        "signed by itself": tls_of(world.folder / "2", signed_by_itself("router"), world.authority),
        "expired": world.tls("router", life=OVER),
        "another service": world.tls("analytics"),
        "plain text": None,
    }[case]
    async with world.serving(served), world.client(world.tls("edge")) as client:
        assert (await error_of(client.get_model(timeout=3))).reason is Reason.UNAVAILABLE
    assert world.serials == []


@pytest.mark.parametrize("name", ["router", "stranger", "x.edge", "xedge", "edge.aiaas.internal.example"])
async def test_name_that_is_not_allowed_is_refused_whoever_uses_it(
    world: World, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with world.serving(world.tls("router")), world.client(world.tls(name)) as client:
        error = await error_of(client.get_model())
    assert (error.reason, error.message) == (
        Reason.PERMISSION_DENIED,
        "The certificate of this caller is not for this call.",
    )
    assert world.serials == []
    assert "is not for /aiaas.router.v1.ModelService/GetModel" in caplog.text


async def test_name_that_is_no_dns_name_counts_for_nothing(world: World) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "edge.aiaas.internal")])
    others = [
        x509.UniformResourceIdentifier("edge.aiaas.internal"),
        x509.RFC822Name("a@edge.aiaas.internal"),
        x509.DNSName("stranger.aiaas.internal"),
    ]
    certificate = (
        x509.CertificateBuilder(world.authority._certificate.subject, name, key.public_key(), 1, now + OVER, now - OVER)
        .add_extension(x509.SubjectAlternativeName(others), critical=False)
        .sign(world.authority._key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pair = certificate.public_bytes(pem).decode(), private.decode()
    caller = tls_of(world.folder / "odd", pair, world.authority)
    async with world.serving(world.tls("router")), world.client(caller) as client:
        assert (await error_of(client.get_model())).reason is Reason.PERMISSION_DENIED


@pytest.mark.parametrize("name", [*SERVICES, "stranger"])
async def test_every_rpc_takes_the_services_that_it_names_and_no_others(world: World, name: str) -> None:
    everything = PeerDouble(f"unix:{world.folder}/unused")
    whole = GrpcServer(
        world.address,
        [(MODELS, lambda handler, into: into.add_generic_rpc_handlers([handler]), everything)],
        [ErrorsInterceptor()],
        drain_s=0.1,
        tls=world.tls("router"),
    )
    async with started(whole), world.client(world.tls(name)) as client:
        let_in = {method.full_name for method in METHODS if await is_let_in(client.channel, method)}
    assert let_in == {method.full_name for method in METHODS if name in declared(method)}
    assert let_in or name in ("stranger", "identity")


def declared(method: MethodDescriptor) -> set[str]:
    """The callers of an RPC, as its comment in the contract reads."""
    policy = policy_of(method)
    named = {options_pb2.Service.Name(caller).lower().partition("_")[2] for caller in policy.callers}
    return named if policy.internal or named else {"edge", "tool"}


async def is_let_in(channel: Any, method: MethodDescriptor) -> bool:
    assert method.containing_service is not None
    rpc = f"/{method.containing_service.full_name}/{method.name}"
    try:
        if method.client_streaming:
            call = channel.stream_stream(rpc)(timeout=5)
            await call.done_writing()
            await call.read()
        elif method.server_streaming:
            call = channel.unary_stream(rpc)(b"", timeout=5)
            await call.read()
        else:
            await channel.unary_unary(rpc)(b"", timeout=5)
    except grpc.aio.AioRpcError as error:
        if from_rpc_error(error).reason is Reason.PERMISSION_DENIED:
            return False
        raise
    return True


async def test_internal_rpc_that_names_nobody_takes_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten = options_pb2.MethodPolicy(internal=True)
    monkeypatch.setattr("mesh.interceptors.peer.policy_of", lambda _: forgotten)
    monkeypatch.setattr("mesh.interceptors.peer.callers_of", uncached_callers())
    for name in SERVICES:
        async with world.serving(world.tls("router")), world.client(world.tls(name)) as client:
            assert (await error_of(client.get_model())).reason is Reason.PERMISSION_DENIED


def uncached_callers() -> Any:
    from mesh.interceptors.peer import callers_of

    return callers_of.__wrapped__


async def test_stream_goes_on_while_every_certificate_and_the_authority_change(world: World) -> None:
    files = {name: Files(world.folder / name) for name in ("router", "edge")}
    old, new = world.authority, Authority.make()
    router, edge = world.tls("router"), world.tls("edge")
    async with world.serving(router), world.client(edge) as client:
        stream = client.infer()
        world.words.put_nowait(b"before")
        assert (await stream.read()).data == b"before"
        await client.get_model()

        for step in ((old, (old, new)), (new, (old, new)), (new, (new,))):
            for name, tls in (("router", router), ("edge", edge)):
                files[name].put(step[0].issue(name), *step[1])
                assert tls.renew()
            await client.get_model()
            assert world.serials[-1] == serial_of(edge)
            world.words.put_nowait(b"during")
            assert (await stream.read()).data == b"during"
        assert len(set(world.serials)) == 4

        async with world.client(tls_of(world.folder / "late", old.issue("edge"), old, new)) as late:
            assert (await error_of(late.get_model(timeout=3))).reason is Reason.UNAVAILABLE
        world.words.put_nowait(b"")
        assert await stream.read() is EOF


async def test_renewed_channel_keeps_no_connection_that_nobody_uses(world: World) -> None:
    edge = world.tls("edge")
    async with world.serving(world.tls("router")), world.client(edge) as client:
        channel: Any = client.channel
        stream = client.infer()
        world.words.put_nowait(b"before")
        await stream.read()
        for _ in range(3):
            Files(world.folder / "edge").put(world.authority.issue("edge"), world.authority)
            assert edge.renew()
            await client.get_model()
        await until(lambda: open_channels(channel) == 2)
        world.words.put_nowait(b"")
        assert await stream.read() is EOF
        await until(lambda: open_channels(channel) == 1)


def open_channels(channel: Any) -> int:
    """How many channels are open behind one that renews them."""
    return sum(1 for known in {channel._newest, *channel._calls} if not known._channel.closed())


async def test_closing_a_renewed_channel_ends_what_runs_on_its_former_connections(world: World) -> None:
    edge = world.tls("edge")
    async with world.serving(world.tls("router")):
        async with world.client(edge) as client:
            stream = client.infer()
            world.words.put_nowait(b"before")
            await stream.read()
            Files(world.folder / "edge").put(world.authority.issue("edge"), world.authority)
            assert edge.renew()
            await client.get_model()
        assert stream.cancelled()


async def test_half_written_certificate_is_not_taken(world: World, caplog: pytest.LogCaptureFixture) -> None:
    edge = world.tls("edge")
    before = serial_of(edge)
    certificate, key = world.authority.issue("edge")
    files = Files(world.folder / "edge")

    files.certificate.write_text(certificate)
    assert not edge.renew()
    files.ca.unlink()
    assert not edge.renew()
    files.ca.write_text("-----BEGIN CERTIFICATE-----\n")
    assert not edge.renew()
    assert (serial_of(edge), edge.generation) == (before, 0)
    assert "is not that of the certificate" in caplog.text
    assert key not in caplog.text

    files.key.write_text(key)
    files.ca.write_text(world.authority.certificate)
    assert edge.renew()
    assert serial_of(edge) != before
    async with world.serving(world.tls("router")), world.client(edge) as client:
        await client.get_model()

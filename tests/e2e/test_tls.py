"""The gRPC ports of a running platform: no plain text, and to each certificate only what is for it."""

import os
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import ServiceDescriptor

from aiaas.analytics.v1 import usage_service_pb2
from aiaas.identity.v1 import auth_service_pb2
from aiaas.router.v1 import journal_service_pb2
from mesh.auth import policy_of
from mesh.channel import connect
from mesh.errors import Reason
from mesh.tls import TlsConfig, opened
from tests.integration.mesh.harness import error_of

from .conftest import FRONT, Platform

PORTS = {
    "identity": ("identity", auth_service_pb2.DESCRIPTOR.services_by_name["AuthService"]),
    "router": (FRONT[0], journal_service_pb2.DESCRIPTOR.services_by_name["JournalService"]),
    "analytics": ("analytics", usage_service_pb2.DESCRIPTOR.services_by_name["UsageService"]),
}


def address_of(platform: Platform, service: str) -> str:
    environment = Path(f"/proc/{platform.pid(PORTS[service][0])}/environ").read_bytes().split(b"\0")
    told = dict(os.fsdecode(variable).partition("=")[::2] for variable in environment)
    return str(told[f"AIAAS_{service.upper()}_GRPC_ADDRESS"])


def config(platform: Platform, name: str) -> TlsConfig:
    folder = platform.state / "tls"
    return TlsConfig(
        certificate_path=str(folder / f"{name}.pem"),
        key_path=str(folder / f"{name}-key.pem"),
        ca_path=str(folder / "ca.pem"),
    )


def call(channel: Any, service: ServiceDescriptor) -> Any:
    """The first RPC of a service, with an empty request."""
    return channel.unary_unary(f"/{service.full_name}/{service.methods[0].name}")(b"", timeout=5)


@pytest.mark.parametrize("service", PORTS)
async def test_plain_text_reaches_no_service(platform: Platform, service: str) -> None:
    async with connect(address_of(platform, service), PORTS[service][1]) as channel:
        assert (await error_of(call(channel, PORTS[service][1]))).reason is Reason.UNAVAILABLE


@pytest.mark.parametrize("service", PORTS)
async def test_tool_reaches_what_wants_a_credential_and_nothing_internal(platform: Platform, service: str) -> None:
    contract = PORTS[service][1]
    async with (
        opened(config(platform, "tool")) as tls,
        connect(address_of(platform, service), contract, tls=tls) as channel,
    ):
        error = await error_of(call(channel, contract))
    internal = policy_of(contract.methods[0]).internal
    assert error.reason is (Reason.PERMISSION_DENIED if internal else Reason.MISSING_CREDENTIALS)


async def test_journal_is_for_those_who_compare_books(platform: Platform) -> None:
    contract = PORTS["router"][1]
    async with (
        opened(config(platform, "analytics")) as tls,
        connect(address_of(platform, "router"), contract, tls=tls) as channel,
    ):
        assert journal_service_pb2.GetJournalStatusResponse.FromString(await call(channel, contract)).HasField("status")

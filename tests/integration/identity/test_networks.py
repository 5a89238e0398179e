"""Keys that may be used from some networks only, in administration as well."""

import grpc
import pytest

from aiaas.identity.v1 import organization_service_pb2
from mesh.errors import Reason, from_rpc_error
from tests.integration.identity.harness import Identity


@pytest.mark.parametrize(
    ("address", "accepted"),
    [
        ("192.0.2.9", True),
        ("::ffff:192.0.2.9", True),
        ("2001:db8::1", True),
        ("198.51.100.1", False),
        ("nonsense", False),
        ("", False),
    ],
)
async def test_key_is_accepted_from_its_networks_only(
    identity: Identity, organization_id: str, address: str, accepted: bool
) -> None:
    made = await identity.key(organization_id, "organizations.get", allowed_networks=["192.0.2.0/24", "2001:db8::/32"])
    metadata = (("authorization", f"Bearer {made.secret}"), ("x-client-address", address))
    request = organization_service_pb2.GetOrganizationRequest(organization_id=organization_id)
    if accepted:
        await identity.organizations.GetOrganization(request, metadata=metadata, timeout=10)
        return
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await identity.organizations.GetOrganization(request, metadata=metadata, timeout=10)
    error = from_rpc_error(raised.value)
    assert error.reason is Reason.PERMISSION_DENIED
    assert "network" in error.message

"""What organizations' own policies judge: the input that a decision is made on, and how a service has one made; it
never decides.

Policies narrow what roles allow. What manages policies is not judged by them, so that nobody is shut out by his own,
and the platform's principals are not, so that there is always somebody to help.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Protocol

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from aiaas.identity.v1 import policy_service_pb2
from mesh.auth import Principal
from mesh.errors import PlatformError, Reason, from_rpc_error

if TYPE_CHECKING:
    from aiaas.identity.v1.policy_service_pb2_grpc import PolicyServiceStub

_RESOURCE_BYTES = 64 << 10
_TIMEOUT_S = 2.0
_EXEMPT = ("policies.", "policy_decisions.")


class Decider(Protocol):
    """Decides by the policies of an organization."""

    async def decide(
        self, organization_id: str, asked: policy_service_pb2.PolicyInput
    ) -> policy_service_pb2.PolicyVerdict:
        """The verdict on an input. Raises PlatformError(AUTH_UNAVAILABLE) when nobody could judge it."""


class RemoteDecider:
    """Has identity decide."""

    def __init__(self, stub: PolicyServiceStub) -> None:
        self._stub = stub

    async def decide(
        self, organization_id: str, asked: policy_service_pb2.PolicyInput
    ) -> policy_service_pb2.PolicyVerdict:
        """See Decider."""
        request = policy_service_pb2.DecideRequest(organization_id=organization_id, input=asked)
        try:
            return (await self._stub.Decide(request, timeout=_TIMEOUT_S)).verdict
        except grpc.aio.AioRpcError as error:
            known = from_rpc_error(error)
            raise PlatformError(Reason.AUTH_UNAVAILABLE, retry_after_s=known.retry_after_s) from None


async def check(
    decider: Decider | None,
    principal: Principal,
    method: str,
    permission: str,
    resource_json: str | None,
    client_address: str,
) -> None:
    """Hold a call to the policies of its caller's organization, if it has any. What is too long to be judged has None
    for a resource.

    Raises PlatformError: PERMISSION_DENIED with the policy's reason, AUTH_UNAVAILABLE when nobody could judge it.
    """
    if not principal.policy_bound or principal.platform or not permission or permission.startswith(_EXEMPT):
        return
    if decider is None:
        raise PlatformError(Reason.AUTH_UNAVAILABLE)
    if resource_json is None:
        # Judged without its content it would pass whatever a policy forbids.
        raise PlatformError(
            Reason.PERMISSION_DENIED, description="The request is too long for the policies of your organization."
        )
    asked = policy_service_pb2.PolicyInput(
        principal=principal.to_proto(),
        method=method,
        permission=permission,
        resource_json=resource_json,
        client_address=client_address,
    )
    asked.request_time.GetCurrentTime()
    verdict = await decider.decide(principal.organization_id, asked)
    if not verdict.allowed:
        told = f" {verdict.reason}" if verdict.reason else ""
        raise PlatformError(
            Reason.PERMISSION_DENIED,
            description=f"A policy of your organization does not allow this.{told}",
            policy_id=verdict.denying_policy_id,
        )


def resource_of(request: Message) -> str | None:
    """A request as JSON, without secrets and bytes; None if that is more than 64 KiB."""
    told = type(request)()
    told.CopyFrom(request)
    _strip(told)
    text = json.dumps(MessageToDict(told, preserving_proto_field_name=True), ensure_ascii=False, separators=(",", ":"))
    return text if len(text.encode()) <= _RESOURCE_BYTES else None


def _strip(message: Message) -> None:
    for field, value in message.ListFields():
        if field.GetOptions().debug_redact or field.type == FieldDescriptor.TYPE_BYTES:
            message.ClearField(field.name)
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for each in value if field.is_repeated else (value,):
                _strip(each)

"""OrganizationService: requests to the domain, its answers back; it never decides anything."""

from aiaas.identity.v1 import organization_service_pb2 as pb
from aiaas.identity.v1 import organization_service_pb2_grpc
from identity.fields import check_id, invalid
from identity.organizations import CHANGEABLE, Organization, Organizations, OrganizationState
from identity.principals import caller
from mesh.auth import RateLimits
from mesh.conversions import to_timestamp
from mesh.pages import TimePlace, cut, read_page_size, read_token
from mesh.updates import etag_of, fields_to_change

_STATES = {
    pb.ORGANIZATION_STATE_ACTIVE: OrganizationState.ACTIVE,
    pb.ORGANIZATION_STATE_SUSPENDED: OrganizationState.SUSPENDED,
    pb.ORGANIZATION_STATE_DELETED: OrganizationState.DELETED,
}
_STATE_NUMBERS = {state: number for number, state in _STATES.items()}


class OrganizationService(organization_service_pb2_grpc.OrganizationServiceServicer):
    """The organizations of the platform."""

    def __init__(self, organizations: Organizations) -> None:
        self._organizations = organizations

    async def CreateOrganization(
        self, request: pb.CreateOrganizationRequest, context: object
    ) -> pb.CreateOrganizationResponse:
        """Make an organization."""
        wanted = _from_proto("", request.organization)
        made = await self._organizations.create(caller(), wanted, request.request_id)
        return pb.CreateOrganizationResponse(organization=_to_proto(made))

    async def GetOrganization(self, request: pb.GetOrganizationRequest, context: object) -> pb.GetOrganizationResponse:
        """Return one organization."""
        found = await self._organizations.get(check_id(request.organization_id, "organization_id"))
        return pb.GetOrganizationResponse(organization=_to_proto(found))

    async def ListOrganizations(
        self, request: pb.ListOrganizationsRequest, context: object
    ) -> pb.ListOrganizationsResponse:
        """List the organizations that the caller may see."""
        if request.state and request.state not in _STATES:
            raise invalid("state", "is unknown")
        size, after = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._organizations.list(caller(), after, size + 1, _STATES.get(request.state))
        organizations, token = cut(
            request, rows, size, _to_proto, lambda row: TimePlace(row.create_time, row.organization_id)
        )
        return pb.ListOrganizationsResponse(organizations=organizations, next_page_token=token)

    async def UpdateOrganization(
        self, request: pb.UpdateOrganizationRequest, context: object
    ) -> pb.UpdateOrganizationResponse:
        """Change an organization."""
        organization_id = check_id(request.organization_id, "organization_id")
        changed = fields_to_change(request.update_mask, request.organization, CHANGEABLE)
        wanted = _from_proto(organization_id, request.organization)
        updated = await self._organizations.update(
            caller(), organization_id, wanted, changed, request.organization.etag
        )
        return pb.UpdateOrganizationResponse(organization=_to_proto(updated))

    async def SuspendOrganization(
        self, request: pb.SuspendOrganizationRequest, context: object
    ) -> pb.SuspendOrganizationResponse:
        """Stop all use of an organization's credentials."""
        suspended = await self._organizations.suspend(
            check_id(request.organization_id, "organization_id"), request.reason
        )
        return pb.SuspendOrganizationResponse(organization=_to_proto(suspended))

    async def ReactivateOrganization(
        self, request: pb.ReactivateOrganizationRequest, context: object
    ) -> pb.ReactivateOrganizationResponse:
        """End a suspension, or take back a deletion."""
        active = await self._organizations.reactivate(
            check_id(request.organization_id, "organization_id"), request.reason
        )
        return pb.ReactivateOrganizationResponse(organization=_to_proto(active))

    async def DeleteOrganization(
        self, request: pb.DeleteOrganizationRequest, context: object
    ) -> pb.DeleteOrganizationResponse:
        """Mark an organization for deletion."""
        deleted = await self._organizations.delete(check_id(request.organization_id, "organization_id"), request.etag)
        return pb.DeleteOrganizationResponse(organization=_to_proto(deleted))


def _from_proto(organization_id: str, message: pb.Organization) -> Organization:
    return Organization(
        organization_id=organization_id,
        display_name=message.display_name,
        rate_limits=RateLimits.from_proto(message.rate_limits),
        allowed_models=tuple(message.allowed_models),
    )


def _to_proto(organization: Organization) -> pb.Organization:
    return pb.Organization(
        organization_id=organization.organization_id,
        display_name=organization.display_name,
        state=_STATE_NUMBERS[organization.state],
        rate_limits=organization.rate_limits.to_proto(),
        allowed_models=organization.allowed_models,
        create_time=to_timestamp(organization.create_time),
        update_time=to_timestamp(organization.update_time),
        purge_time=to_timestamp(organization.purge_time),
        etag=etag_of(organization.revision),
    )

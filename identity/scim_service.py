"""ScimService: requests to the domain, its answers back; it never decides anything.

A directory's calls name no organization: they are for that of its key.
"""

from __future__ import annotations

from aiaas.identity.v1 import federation_service_pb2, scim_service_pb2_grpc
from aiaas.identity.v1 import scim_service_pb2 as pb
from identity.fields import check_id, invalid
from identity.granted_roles import GroupRoles, RoleRules
from identity.principals import caller
from identity.scim import CHANGEABLE, Resource, Scim, ScimKind, ScimSettings
from mesh.conversions import to_timestamp
from mesh.updates import etag_of, fields_to_change

_KINDS = {pb.SCIM_RESOURCE_TYPE_USER: ScimKind.USER, pb.SCIM_RESOURCE_TYPE_GROUP: ScimKind.GROUP}


class ScimService(scim_service_pb2_grpc.ScimServiceServicer):
    """What directories keep."""

    def __init__(self, scim: Scim) -> None:
        self._scim = scim

    async def CreateScimResource(
        self, request: pb.CreateScimResourceRequest, context: object
    ) -> pb.CreateScimResourceResponse:
        """Make a user or a group."""
        made = await self._scim.create(_organization_id(request), _kind(request), request.resource_json)
        return pb.CreateScimResourceResponse(resource=_to_proto(made))

    async def GetScimResource(self, request: pb.GetScimResourceRequest, context: object) -> pb.GetScimResourceResponse:
        """Return a user or a group."""
        found = await self._scim.get(
            _organization_id(request),
            _kind(request),
            check_id(request.scim_resource_id, "scim_resource_id"),
            request.attributes,
            request.excluded_attributes,
        )
        return pb.GetScimResourceResponse(resource=_to_proto(found))

    async def ListScimResources(
        self, request: pb.ListScimResourcesRequest, context: object
    ) -> pb.ListScimResourcesResponse:
        """Find users or groups."""
        found, total = await self._scim.list(
            _organization_id(request),
            _kind(request),
            request.filter,
            request.start_index,
            request.count,
            request.attributes,
            request.excluded_attributes,
        )
        return pb.ListScimResourcesResponse(resources=[_to_proto(each) for each in found], total_results=total)

    async def ReplaceScimResource(
        self, request: pb.ReplaceScimResourceRequest, context: object
    ) -> pb.ReplaceScimResourceResponse:
        """Replace a user or a group as a whole."""
        replaced = await self._scim.replace(
            _organization_id(request),
            _kind(request),
            check_id(request.scim_resource_id, "scim_resource_id"),
            request.resource_json,
            request.version,
        )
        return pb.ReplaceScimResourceResponse(resource=_to_proto(replaced))

    async def PatchScimResource(
        self, request: pb.PatchScimResourceRequest, context: object
    ) -> pb.PatchScimResourceResponse:
        """Change a user or a group."""
        changed = await self._scim.patch(
            _organization_id(request),
            _kind(request),
            check_id(request.scim_resource_id, "scim_resource_id"),
            request.patch_json,
            request.version,
        )
        return pb.PatchScimResourceResponse(resource=_to_proto(changed))

    async def DeleteScimResource(
        self, request: pb.DeleteScimResourceRequest, context: object
    ) -> pb.DeleteScimResourceResponse:
        """Remove a group, or end a user's membership."""
        await self._scim.delete(
            _organization_id(request),
            _kind(request),
            check_id(request.scim_resource_id, "scim_resource_id"),
            request.version,
        )
        return pb.DeleteScimResourceResponse()

    async def GetScimSettings(self, request: pb.GetScimSettingsRequest, context: object) -> pb.GetScimSettingsResponse:
        """Return how an organization uses SCIM."""
        found = await self._scim.settings(check_id(request.organization_id, "organization_id"))
        return pb.GetScimSettingsResponse(scim_settings=_settings_to_proto(found))

    async def UpdateScimSettings(
        self, request: pb.UpdateScimSettingsRequest, context: object
    ) -> pb.UpdateScimSettingsResponse:
        """Change how an organization uses SCIM."""
        wanted = ScimSettings(
            organization_id=check_id(request.organization_id, "organization_id"),
            enabled=request.scim_settings.enabled,
            rules=rules_from_proto(request.scim_settings),
        )
        changed = fields_to_change(request.update_mask, request.scim_settings, CHANGEABLE)
        updated = await self._scim.update_settings(caller(), wanted, changed, request.scim_settings.etag)
        return pb.UpdateScimSettingsResponse(scim_settings=_settings_to_proto(updated))


def rules_from_proto(message: pb.ScimSettings | federation_service_pb2.Issuer) -> RoleRules:
    """The rules in a message that has group_roles and default_role_ids."""
    return RoleRules(
        group_roles=tuple(GroupRoles(rule.group, tuple(rule.role_ids)) for rule in message.group_roles),
        default_role_ids=tuple(message.default_role_ids),
    )


def group_roles_to_proto(rules: RoleRules) -> list[federation_service_pb2.GroupRoles]:
    """What groups give, as it travels."""
    return [federation_service_pb2.GroupRoles(group=rule.group, role_ids=rule.role_ids) for rule in rules.group_roles]


def _organization_id(
    request: pb.CreateScimResourceRequest
    | pb.GetScimResourceRequest
    | pb.ListScimResourcesRequest
    | pb.ReplaceScimResourceRequest
    | pb.PatchScimResourceRequest
    | pb.DeleteScimResourceRequest,
) -> str:
    return check_id(request.organization_id or caller().organization_id, "organization_id")


def _kind(
    request: pb.CreateScimResourceRequest
    | pb.GetScimResourceRequest
    | pb.ListScimResourcesRequest
    | pb.ReplaceScimResourceRequest
    | pb.PatchScimResourceRequest
    | pb.DeleteScimResourceRequest,
) -> ScimKind:
    kind = _KINDS.get(request.resource_type)
    if kind is None:
        raise invalid("resource_type", "is required")
    return kind


def _to_proto(resource: Resource) -> pb.ScimResource:
    return pb.ScimResource(
        scim_resource_id=resource.resource_id, resource_json=resource.document, version=resource.version
    )


def _settings_to_proto(settings: ScimSettings) -> pb.ScimSettings:
    return pb.ScimSettings(
        organization_id=settings.organization_id,
        enabled=settings.enabled,
        group_roles=group_roles_to_proto(settings.rules),
        default_role_ids=settings.rules.default_role_ids,
        last_use_time=to_timestamp(settings.last_use_time),
        update_time=to_timestamp(settings.update_time) if settings.revision else None,
        etag=etag_of(settings.revision),
    )

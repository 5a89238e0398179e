"""RoleService: requests to the domain, its answers back; it never decides anything."""

from aiaas.identity.v1 import role_service_pb2 as pb
from aiaas.identity.v1 import role_service_pb2_grpc
from identity.custom_roles import CHANGEABLE, Roles
from identity.fields import check_id, check_once
from identity.principals import caller
from identity.roles import Role
from mesh.conversions import to_timestamp
from mesh.pages import TimePlace, cut, read_page_size, read_token
from mesh.updates import etag_of, fields_to_change


class RoleService(role_service_pb2_grpc.RoleServiceServicer):
    """Roles, built-in and custom."""

    def __init__(self, roles: Roles) -> None:
        self._roles = roles

    async def CreateRole(self, request: pb.CreateRoleRequest, context: object) -> pb.CreateRoleResponse:
        """Make a custom role."""
        organization_id = check_id(request.organization_id, "organization_id")
        made = await self._roles.create(caller(), organization_id, _from_proto(request.role), request.request_id)
        return pb.CreateRoleResponse(role=_to_proto(made))

    async def GetRole(self, request: pb.GetRoleRequest, context: object) -> pb.GetRoleResponse:
        """Return one role."""
        found = await self._roles.get(
            check_id(request.organization_id, "organization_id"), check_id(request.role_id, "role_id")
        )
        return pb.GetRoleResponse(role=_to_proto(found))

    async def ListRoles(self, request: pb.ListRolesRequest, context: object) -> pb.ListRolesResponse:
        """List built-in roles, then custom ones."""
        organization_id = check_id(request.organization_id, "organization_id")
        size, after = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._roles.list(organization_id, after)
        roles, token = cut(request, rows, size, _to_proto, lambda row: TimePlace(row.create_time, row.role_id))
        return pb.ListRolesResponse(roles=roles, next_page_token=token)

    async def UpdateRole(self, request: pb.UpdateRoleRequest, context: object) -> pb.UpdateRoleResponse:
        """Change a custom role."""
        organization_id = check_id(request.organization_id, "organization_id")
        role_id = check_id(request.role_id, "role_id")
        changed = fields_to_change(request.update_mask, request.role, CHANGEABLE)
        wanted = _from_proto(request.role)
        updated = await self._roles.update(caller(), organization_id, role_id, wanted, changed, request.role.etag)
        return pb.UpdateRoleResponse(role=_to_proto(updated))

    async def DeleteRole(self, request: pb.DeleteRoleRequest, context: object) -> pb.DeleteRoleResponse:
        """Remove a custom role."""
        await self._roles.delete(
            check_id(request.organization_id, "organization_id"), check_id(request.role_id, "role_id")
        )
        return pb.DeleteRoleResponse()


def _from_proto(message: pb.Role) -> Role:
    check_once(message.permissions, "role.permissions")
    return Role(role_id="", display_name=message.display_name, permissions=frozenset(message.permissions))


def _to_proto(role: Role) -> pb.Role:
    return pb.Role(
        role_id=role.role_id,
        organization_id=role.organization_id,
        display_name=role.display_name,
        permissions=sorted(role.permissions),
        built_in=role.built_in,
        create_time=None if role.built_in else to_timestamp(role.create_time),
        update_time=None if role.built_in else to_timestamp(role.update_time),
        etag="" if role.built_in else etag_of(role.revision),
    )

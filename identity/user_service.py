"""UserService: requests to the domain, its answers back; it never decides anything."""

from aiaas.identity.v1 import user_service_pb2 as pb
from aiaas.identity.v1 import user_service_pb2_grpc
from identity.fields import check_email, check_filter, check_id
from identity.principals import caller
from identity.users import CHANGEABLE, User, Users, UserState
from mesh.conversions import to_timestamp
from mesh.pages import TimePlace, cut, read_page_size, read_token
from mesh.updates import etag_of, fields_to_change

_STATE_NUMBERS = {UserState.ACTIVE: pb.USER_STATE_ACTIVE, UserState.SUSPENDED: pb.USER_STATE_SUSPENDED}


class UserService(user_service_pb2_grpc.UserServiceServicer):
    """The members of organizations."""

    def __init__(self, users: Users) -> None:
        self._users = users

    async def CreateUser(self, request: pb.CreateUserRequest, context: object) -> pb.CreateUserResponse:
        """Make a user and a membership."""
        wanted = _from_proto(check_id(request.organization_id, "organization_id"), "", request.user)
        made = await self._users.create(caller(), wanted, request.request_id)
        return pb.CreateUserResponse(user=user_to_proto(made))

    async def GetUser(self, request: pb.GetUserRequest, context: object) -> pb.GetUserResponse:
        """Return one member."""
        found = await self._users.get(
            check_id(request.organization_id, "organization_id"), check_id(request.user_id, "user_id")
        )
        return pb.GetUserResponse(user=user_to_proto(found))

    async def ListUsers(self, request: pb.ListUsersRequest, context: object) -> pb.ListUsersResponse:
        """List an organization's members."""
        organization_id = check_id(request.organization_id, "organization_id")
        role_id = check_filter(request.role_id, "role_id")
        if request.email:
            check_email(request.email, "email")
        size, after = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._users.list(organization_id, after, size + 1, email=request.email, role_id=role_id)
        users, token = cut(request, rows, size, user_to_proto, lambda row: TimePlace(row.create_time, row.user_id))
        return pb.ListUsersResponse(users=users, next_page_token=token)

    async def UpdateUser(self, request: pb.UpdateUserRequest, context: object) -> pb.UpdateUserResponse:
        """Change a member."""
        changed = fields_to_change(request.update_mask, request.user, CHANGEABLE)
        wanted = _from_proto(
            check_id(request.organization_id, "organization_id"), check_id(request.user_id, "user_id"), request.user
        )
        updated = await self._users.update(caller(), wanted, changed, request.user.etag)
        return pb.UpdateUserResponse(user=user_to_proto(updated))

    async def RemoveUser(self, request: pb.RemoveUserRequest, context: object) -> pb.RemoveUserResponse:
        """End a user's membership."""
        await self._users.remove(
            caller(), check_id(request.organization_id, "organization_id"), check_id(request.user_id, "user_id")
        )
        return pb.RemoveUserResponse()


def _from_proto(organization_id: str, user_id: str, message: pb.User) -> User:
    return User(
        user_id=user_id,
        organization_id=organization_id,
        email=message.email,
        display_name=message.display_name,
        role_ids=tuple(message.role_ids),
    )


def user_to_proto(user: User) -> pb.User:
    """A member as it travels."""
    return pb.User(
        user_id=user.user_id,
        organization_id=user.organization_id,
        email=user.email,
        display_name=user.display_name,
        role_ids=user.role_ids,
        state=_STATE_NUMBERS[user.state],
        create_time=to_timestamp(user.create_time),
        update_time=to_timestamp(user.update_time),
        etag=etag_of(user.revision),
    )

"""InviteService: requests to the domain, its answers back; it never decides anything."""

from datetime import datetime

from aiaas.identity.v1 import invite_service_pb2 as pb
from aiaas.identity.v1 import invite_service_pb2_grpc
from identity.fields import check_id, invalid
from identity.invites import Invite, Invites, InviteState
from identity.principals import caller
from identity.user_service import user_to_proto
from mesh.clock import Clock
from mesh.conversions import to_timestamp
from mesh.pages import TimePlace, cut, read_page_size, read_token

_STATES = {
    pb.INVITE_STATE_PENDING: InviteState.PENDING,
    pb.INVITE_STATE_ACCEPTED: InviteState.ACCEPTED,
    pb.INVITE_STATE_REVOKED: InviteState.REVOKED,
    pb.INVITE_STATE_EXPIRED: InviteState.EXPIRED,
}
_STATE_NUMBERS = {state: number for number, state in _STATES.items()}


class InviteService(invite_service_pb2_grpc.InviteServiceServicer):
    """How people become members of organizations."""

    def __init__(self, invites: Invites, clock: Clock) -> None:
        self._invites = invites
        self._clock = clock

    async def CreateInvite(self, request: pb.CreateInviteRequest, context: object) -> pb.CreateInviteResponse:
        """Make an invite and send it."""
        wanted = Invite(
            invite_id="",
            organization_id=check_id(request.organization_id, "organization_id"),
            email=request.invite.email,
            role_ids=tuple(request.invite.role_ids),
        )
        sent = await self._invites.create(caller(), wanted, request.request_id)
        return pb.CreateInviteResponse(invite=self._to_proto(sent.invite), invite_token=sent.token)

    async def GetInvite(self, request: pb.GetInviteRequest, context: object) -> pb.GetInviteResponse:
        """Return one invite."""
        found = await self._invites.get(
            check_id(request.organization_id, "organization_id"), check_id(request.invite_id, "invite_id")
        )
        return pb.GetInviteResponse(invite=self._to_proto(found))

    async def ListInvites(self, request: pb.ListInvitesRequest, context: object) -> pb.ListInvitesResponse:
        """List invites."""
        organization_id = check_id(request.organization_id, "organization_id")
        if request.state and request.state not in _STATES:
            raise invalid("state", "is unknown")
        size, after = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._invites.list(organization_id, after, size + 1, _STATES.get(request.state))
        invites, token = cut(request, rows, size, self._to_proto, lambda row: TimePlace(row.create_time, row.invite_id))
        return pb.ListInvitesResponse(invites=invites, next_page_token=token)

    async def ResendInvite(self, request: pb.ResendInviteRequest, context: object) -> pb.ResendInviteResponse:
        """Send an invite again, with a new token."""
        sent = await self._invites.resend(
            caller(), check_id(request.organization_id, "organization_id"), check_id(request.invite_id, "invite_id")
        )
        return pb.ResendInviteResponse(invite=self._to_proto(sent.invite), invite_token=sent.token)

    async def RevokeInvite(self, request: pb.RevokeInviteRequest, context: object) -> pb.RevokeInviteResponse:
        """Take an invite back."""
        revoked = await self._invites.revoke(
            check_id(request.organization_id, "organization_id"), check_id(request.invite_id, "invite_id")
        )
        return pb.RevokeInviteResponse(invite=self._to_proto(revoked))

    async def PreviewInvite(self, request: pb.PreviewInviteRequest, context: object) -> pb.PreviewInviteResponse:
        """Tell the holder of a token what it invites to."""
        shown = await self._invites.preview(request.invite_token)
        return pb.PreviewInviteResponse(
            organization_display_name=shown.organization.display_name,
            email=shown.invite.email,
            expire_time=to_timestamp(shown.invite.expire_time),
            password_needed=shown.is_new,
        )

    async def AcceptInvite(self, request: pb.AcceptInviteRequest, context: object) -> pb.AcceptInviteResponse:
        """Make the holder of a token a member."""
        member = await self._invites.accept(request.invite_token, request.display_name, request.password)
        return pb.AcceptInviteResponse(user=user_to_proto(member))

    def _to_proto(self, invite: Invite) -> pb.Invite:
        return _to_proto(invite, self._clock.now())


def _to_proto(invite: Invite, now: datetime) -> pb.Invite:
    return pb.Invite(
        invite_id=invite.invite_id,
        organization_id=invite.organization_id,
        email=invite.email,
        role_ids=invite.role_ids,
        state=_STATE_NUMBERS[invite.state_at(now)],
        creator_id=invite.creator_id,
        user_id=invite.user_id,
        create_time=to_timestamp(invite.create_time),
        expire_time=to_timestamp(invite.expire_time),
        accept_time=to_timestamp(invite.accept_time),
    )

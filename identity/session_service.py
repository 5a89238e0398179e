"""SessionService: requests to the domain, its answers back; it never decides anything."""

from aiaas.identity.v1 import session_service_pb2 as pb
from aiaas.identity.v1 import session_service_pb2_grpc
from identity.fields import check_id
from identity.mfa import MfaMethod
from identity.mfa_setup import Answer
from identity.principals import signed_in
from identity.sessions import Session, Sessions, SignedIn, SignIn, current_id
from identity.sign_ins import SignIns
from mesh.conversions import to_timestamp
from mesh.pages import TimePlace, cut, read_page_size, read_token

_METHODS = {
    MfaMethod.TOTP: pb.MFA_METHOD_TOTP,
    MfaMethod.RECOVERY_CODE: pb.MFA_METHOD_RECOVERY_CODE,
}


class SessionService(session_service_pb2_grpc.SessionServiceServicer):
    """How people sign in, recover and sign out."""

    def __init__(self, sign_ins: SignIns, sessions: Sessions) -> None:
        self._sign_ins = sign_ins
        self._sessions = sessions

    async def CreateSession(self, request: pb.CreateSessionRequest, context: object) -> pb.CreateSessionResponse:
        """Sign in with a password."""
        organization_id = request.organization_id and check_id(request.organization_id, "organization_id")
        sign_in = await self._sign_ins.sign_in(request.email, request.password, organization_id)
        return pb.CreateSessionResponse(sign_in=sign_in_to_proto(sign_in))

    async def VerifyMfa(self, request: pb.VerifyMfaRequest, context: object) -> pb.VerifyMfaResponse:
        """Answer a challenge."""
        made = await self._sessions.answer(request.challenge_token, Answer(request.totp_code, request.recovery_code))
        return pb.VerifyMfaResponse(session=_signed_in_to_proto(made).session, session_token=made.token)

    async def ListSessions(self, request: pb.ListSessionsRequest, context: object) -> pb.ListSessionsResponse:
        """List the caller's own sessions."""
        current = current_id() if (user_id := signed_in().user_id) else ""
        size, before = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._sessions.list(user_id, before, size + 1)
        needing = {row.session_id for row in rows[:size] if await self._sessions.needs_enrollment(row)}
        sessions, token = cut(
            request,
            rows,
            size,
            lambda row: _to_proto(row, current=current, needs_enrollment=row.session_id in needing),
            lambda row: TimePlace(row.create_time, row.session_id),
        )
        return pb.ListSessionsResponse(sessions=sessions, next_page_token=token)

    async def SwitchOrganization(
        self, request: pb.SwitchOrganizationRequest, context: object
    ) -> pb.SwitchOrganizationResponse:
        """Act in another organization."""
        organization_id = check_id(request.organization_id, "organization_id")
        sign_in = await self._sessions.switch(signed_in().user_id, organization_id)
        return pb.SwitchOrganizationResponse(sign_in=sign_in_to_proto(sign_in))

    async def DeleteSession(self, request: pb.DeleteSessionRequest, context: object) -> pb.DeleteSessionResponse:
        """Sign out."""
        await self._sessions.end(signed_in().user_id, check_id(request.session_id, "session_id"))
        return pb.DeleteSessionResponse()

    async def EndUserSessions(self, request: pb.EndUserSessionsRequest, context: object) -> pb.EndUserSessionsResponse:
        """End a member's sessions."""
        ended = await self._sessions.end_of_member(
            check_id(request.organization_id, "organization_id"), check_id(request.user_id, "user_id")
        )
        return pb.EndUserSessionsResponse(ended_sessions=ended)

    async def ChangePassword(self, request: pb.ChangePasswordRequest, context: object) -> pb.ChangePasswordResponse:
        """Change the caller's own password."""
        await self._sign_ins.change_password(signed_in().user_id, request.password, request.new_password)
        return pb.ChangePasswordResponse()

    async def StartRecovery(self, request: pb.StartRecoveryRequest, context: object) -> pb.StartRecoveryResponse:
        """Mail a recovery token."""
        await self._sign_ins.start_recovery(request.email)
        return pb.StartRecoveryResponse()

    async def CompleteRecovery(
        self, request: pb.CompleteRecoveryRequest, context: object
    ) -> pb.CompleteRecoveryResponse:
        """Set a new password with a recovery token."""
        await self._sign_ins.complete_recovery(request.recovery_token, request.new_password)
        return pb.CompleteRecoveryResponse()


def sign_in_to_proto(sign_in: SignIn) -> pb.SignIn:
    """How a sign-in goes on."""
    if isinstance(sign_in, SignedIn):
        return pb.SignIn(signed_in=_signed_in_to_proto(sign_in))
    return pb.SignIn(
        mfa_challenge=pb.MfaChallenge(
            challenge_token=sign_in.token,
            methods=[_METHODS[method] for method in sign_in.methods],
            expire_time=to_timestamp(sign_in.expire_time),
        )
    )


def _signed_in_to_proto(made: SignedIn) -> pb.SignedIn:
    return pb.SignedIn(
        session=_to_proto(made.session, needs_enrollment=made.mfa_enrollment_needed), session_token=made.token
    )


def _to_proto(session: Session, *, needs_enrollment: bool, current: str = "") -> pb.Session:
    return pb.Session(
        session_id=session.session_id,
        user_id=session.user_id,
        organization_id=session.organization_id,
        multi_factor=session.multi_factor,
        mfa_enrollment_needed=needs_enrollment,
        issuer_id=session.issuer_id,
        client_address=session.client_address,
        user_agent=session.user_agent,
        current=session.session_id == current,
        create_time=to_timestamp(session.create_time),
        last_use_time=to_timestamp(session.last_use_time),
        expire_time=to_timestamp(session.expire_time),
    )

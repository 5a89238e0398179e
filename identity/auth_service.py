"""AuthService: credentials to principals, and what became of them; it never decides anything."""

from collections.abc import AsyncIterator

from aiaas.identity.v1 import auth_service_pb2 as pb
from aiaas.identity.v1 import auth_service_pb2_grpc
from identity.fields import invalid
from identity.organizations import Organizations
from identity.principals import caller, is_signed_in
from identity.revocation_feed import RevocationFeed
from identity.sessions import Sessions
from identity.users import Users
from mesh.auth import Authenticator


class AuthService(auth_service_pb2_grpc.AuthServiceServicer):
    """What the other services ask for each credential."""

    def __init__(
        self,
        authenticator: Authenticator,
        revocations: RevocationFeed,
        users: Users,
        organizations: Organizations,
        sessions: Sessions,
    ) -> None:
        self._authenticator = authenticator
        self._revocations = revocations
        self._users = users
        self._organizations = organizations
        self._sessions = sessions

    async def Authenticate(self, request: pb.AuthenticateRequest, context: object) -> pb.AuthenticateResponse:
        """Resolve a credential."""
        principal = await self._authenticator.authenticate(request.credential)
        return pb.AuthenticateResponse(principal=principal.to_proto())

    async def WatchRevocations(
        self, request: pb.WatchRevocationsRequest, context: object
    ) -> AsyncIterator[pb.WatchRevocationsResponse]:
        """Tell what becomes invalid, as it does."""
        if request.after_revision < 0:
            raise invalid("after_revision", "must not be negative")
        async for revision, revocation in self._revocations.watch(request.after_revision):
            yield pb.WatchRevocationsResponse(revision=revision) if revocation is None else revocation.to_proto()

    async def GetCurrentPrincipal(
        self, request: pb.GetCurrentPrincipalRequest, context: object
    ) -> pb.GetCurrentPrincipalResponse:
        """Return the caller's own principal, and to a person in person the names to it."""
        principal = caller()
        answer = pb.GetCurrentPrincipalResponse(principal=principal.to_proto())
        if is_signed_in(principal):
            user = await self._users.get(principal.organization_id, principal.user_id)
            organization = await self._organizations.get(principal.organization_id)
            answer.display_name, answer.email = user.display_name, user.email
            answer.organization_display_name = organization.display_name
            answer.mfa_enrollment_needed = await self._sessions.current_needs_enrollment()
        return answer

"""AuthService: credentials to principals, and what became of them; it never decides anything."""

from collections.abc import AsyncIterator

from aiaas.identity.v1 import auth_service_pb2 as pb
from aiaas.identity.v1 import auth_service_pb2_grpc
from identity.fields import invalid
from identity.principals import caller
from identity.revocation_feed import RevocationFeed
from mesh.auth import Authenticator


class AuthService(auth_service_pb2_grpc.AuthServiceServicer):
    """What the other services ask for each credential."""

    def __init__(self, authenticator: Authenticator, revocations: RevocationFeed) -> None:
        self._authenticator = authenticator
        self._revocations = revocations

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
        """Return the caller's own principal."""
        return pb.GetCurrentPrincipalResponse(principal=caller().to_proto())

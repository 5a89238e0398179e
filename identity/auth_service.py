"""AuthService: credentials to principals; it never decides anything."""

from aiaas.identity.v1 import auth_service_pb2 as pb
from aiaas.identity.v1 import auth_service_pb2_grpc
from identity.principals import caller
from mesh.auth import Authenticator


class AuthService(auth_service_pb2_grpc.AuthServiceServicer):
    """What the other services ask for each credential."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def Authenticate(self, request: pb.AuthenticateRequest, context: object) -> pb.AuthenticateResponse:
        """Resolve a credential."""
        principal = await self._authenticator.authenticate(request.credential)
        return pb.AuthenticateResponse(principal=principal.to_proto())

    async def GetCurrentPrincipal(
        self, request: pb.GetCurrentPrincipalRequest, context: object
    ) -> pb.GetCurrentPrincipalResponse:
        """Return the caller's own principal."""
        return pb.GetCurrentPrincipalResponse(principal=caller().to_proto())

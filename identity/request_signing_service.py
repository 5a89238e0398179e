"""RequestSigningService: requests to the domain, its answers back; it never decides anything."""

from aiaas.identity.v1 import request_signing_service_pb2 as pb
from aiaas.identity.v1 import request_signing_service_pb2_grpc
from aiaas.type.v1.request_signature_pb2 import RequestSignature
from identity.fields import check_id
from identity.principals import caller
from identity.request_signing import RequestSigning
from mesh.conversions import to_timestamp


class RequestSigningService(request_signing_service_pb2_grpc.RequestSigningServiceServicer):
    """Signing secrets of API keys, and signatures."""

    def __init__(self, signing: RequestSigning) -> None:
        self._signing = signing

    async def CreateSigningSecret(
        self, request: pb.CreateSigningSecretRequest, context: object
    ) -> pb.CreateSigningSecretResponse:
        """Make a key's signing secret, and answer its text."""
        text, create_time = await self._signing.create(
            caller(), check_id(request.organization_id, "organization_id"), check_id(request.api_key_id, "api_key_id")
        )
        return pb.CreateSigningSecretResponse(signing_secret=text, create_time=to_timestamp(create_time))

    async def DeleteSigningSecret(
        self, request: pb.DeleteSigningSecretRequest, context: object
    ) -> pb.DeleteSigningSecretResponse:
        """Remove a key's signing secret."""
        await self._signing.delete(
            caller(), check_id(request.organization_id, "organization_id"), check_id(request.api_key_id, "api_key_id")
        )
        return pb.DeleteSigningSecretResponse()

    async def VerifyRequestSignature(
        self, request: pb.VerifyRequestSignatureRequest, context: object
    ) -> pb.VerifyRequestSignatureResponse:
        """Judge the signature of one request."""
        signature = RequestSignature(
            method=request.method,
            raw_path=request.raw_path,
            body_sha256=request.body_sha256,
            timestamp_s=request.timestamp_s,
            nonce=request.nonce,
            signature=request.signature,
        )
        await self._signing.verify(check_id(request.api_key_id, "api_key_id"), signature)
        return pb.VerifyRequestSignatureResponse()

"""Makes an organization and a key over gRPC, streams a chat with it, and reads how an error is told.

AIAAS_API_KEY is a platform administrator's key, AIAAS_IDENTITY and AIAAS_ROUTER are host:port of the two services, and
AIAAS_TLS_CERTIFICATE_PATH, AIAAS_TLS_KEY_PATH and AIAAS_TLS_CA_PATH the files of a certificate for `tool`.
"""

import asyncio
import json
import os

import grpc

from aiaas.client import Certificate, connect
from aiaas.identity.v1 import api_key_service_pb2, organization_service_pb2
from aiaas.identity.v1.api_key_service_pb2_grpc import ApiKeyServiceStub
from aiaas.identity.v1.organization_service_pb2_grpc import OrganizationServiceStub
from aiaas.router.v1 import inference_service_pb2
from aiaas.router.v1.inference_service_pb2_grpc import InferenceServiceStub
from aiaas.type.v1 import usage_event_pb2

ORGANIZATIONS = organization_service_pb2.DESCRIPTOR.services_by_name["OrganizationService"]
API_KEYS = api_key_service_pb2.DESCRIPTOR.services_by_name["ApiKeyService"]
INFERENCE = inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"]


async def main() -> None:
    """Does all of it, and prints it."""
    certificate = Certificate.read(
        os.environ["AIAAS_TLS_CERTIFICATE_PATH"],
        os.environ["AIAAS_TLS_KEY_PATH"],
        ca=os.environ["AIAAS_TLS_CA_PATH"],
    )
    async with connect(
        os.environ["AIAAS_IDENTITY"],
        ORGANIZATIONS,
        API_KEYS,
        api_key=os.environ["AIAAS_API_KEY"],
        certificate=certificate,
    ) as identity:
        organization_id, secret = await make_key(identity)
    print(f"organization: {organization_id}")
    async with connect(os.environ["AIAAS_ROUTER"], INFERENCE, api_key=secret, certificate=certificate) as router:
        stub = InferenceServiceStub(router)
        served = await stub.ListServedModels(inference_service_pb2.ListServedModelsRequest())
        print(f"models: {', '.join(model.model for model in served.models)}")
        await chat(stub, "smollm2")
        try:
            await chat(stub, "no-such-model")
        except grpc.aio.AioRpcError as error:
            print(f"refused: {error.code().name}: {error.details()}")


async def make_key(identity: grpc.aio.Channel) -> tuple[str, str]:
    """The id of a new organization, and the secret of a key on it, which is told this once."""
    organizations = OrganizationServiceStub(identity)
    made = await organizations.CreateOrganization(
        organization_service_pb2.CreateOrganizationRequest(
            organization=organization_service_pb2.Organization(display_name="Example in Python")
        )
    )
    organization_id = made.organization.organization_id
    key = await ApiKeyServiceStub(identity).CreateApiKey(
        api_key_service_pb2.CreateApiKeyRequest(
            organization_id=organization_id, api_key=api_key_service_pb2.ApiKey(display_name="example")
        )
    )
    return organization_id, key.secret


async def chat(stub: InferenceServiceStub, model: str) -> None:
    """Streams one answer: a head, server-sent events as OpenAI writes them, and a tail with what was used."""
    body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8, "stream": True}
    request = inference_service_pb2.InferRequest(
        endpoint=usage_event_pb2.ENDPOINT_CHAT_COMPLETIONS, body=json.dumps(body).encode()
    )
    async for part in stub.Infer(request):
        for line in part.data.splitlines():
            if line.startswith(b"data: {"):
                for choice in json.loads(line.removeprefix(b"data: "))["choices"]:
                    print(choice["delta"].get("content") or "", end="", flush=True)
        if part.HasField("tail"):
            print(f"\ntokens: {part.tail.usage.completion_tokens}")


if __name__ == "__main__":
    asyncio.run(main())

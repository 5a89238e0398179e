"""ApiKeyService: requests to the domain, its answers back; it never decides anything."""

from datetime import datetime

from aiaas.identity.v1 import api_key_service_pb2 as pb
from aiaas.identity.v1 import api_key_service_pb2_grpc
from identity.api_keys import CHANGEABLE, ApiKey, ApiKeys, ApiKeyState
from identity.fields import check_filter, check_id, invalid
from identity.principals import caller
from mesh.auth import RateLimits
from mesh.clock import Clock
from mesh.conversions import from_duration, from_timestamp, to_timestamp
from mesh.pages import TimePlace, cut, read_page_size, read_token
from mesh.updates import etag_of, fields_to_change

_STATES = {
    pb.API_KEY_STATE_ACTIVE: ApiKeyState.ACTIVE,
    pb.API_KEY_STATE_REVOKED: ApiKeyState.REVOKED,
    pb.API_KEY_STATE_EXPIRED: ApiKeyState.EXPIRED,
}
_STATE_NUMBERS = {state: number for number, state in _STATES.items()}


class ApiKeyService(api_key_service_pb2_grpc.ApiKeyServiceServicer):
    """The API keys of organizations."""

    def __init__(self, api_keys: ApiKeys, clock: Clock) -> None:
        self._api_keys = api_keys
        self._clock = clock

    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, context: object) -> pb.CreateApiKeyResponse:
        """Make a key, and answer its text."""
        wanted = _from_proto(check_id(request.organization_id, "organization_id"), "", request.api_key)
        made, text = await self._api_keys.create(caller(), wanted, request.request_id)
        return pb.CreateApiKeyResponse(api_key=self._to_proto(made), secret=text)

    async def GetApiKey(self, request: pb.GetApiKeyRequest, context: object) -> pb.GetApiKeyResponse:
        """Return one key."""
        found = await self._api_keys.get(
            caller(), check_id(request.organization_id, "organization_id"), check_id(request.api_key_id, "api_key_id")
        )
        return pb.GetApiKeyResponse(api_key=self._to_proto(found))

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, context: object) -> pb.ListApiKeysResponse:
        """List keys."""
        organization_id = check_id(request.organization_id, "organization_id")
        service_account_id = check_filter(request.service_account_id, "service_account_id")
        user_id = check_filter(request.user_id, "user_id")
        if request.state and request.state not in _STATES:
            raise invalid("state", "is unknown")
        size, after = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._api_keys.list(
            caller(),
            organization_id,
            after,
            size + 1,
            state=_STATES.get(request.state),
            service_account_id=service_account_id,
            user_id=user_id,
        )
        keys, token = cut(request, rows, size, self._to_proto, lambda row: TimePlace(row.create_time, row.api_key_id))
        return pb.ListApiKeysResponse(api_keys=keys, next_page_token=token)

    async def UpdateApiKey(self, request: pb.UpdateApiKeyRequest, context: object) -> pb.UpdateApiKeyResponse:
        """Change a key."""
        changed = fields_to_change(request.update_mask, request.api_key, CHANGEABLE)
        wanted = _from_proto(
            check_id(request.organization_id, "organization_id"),
            check_id(request.api_key_id, "api_key_id"),
            request.api_key,
        )
        updated = await self._api_keys.update(caller(), wanted, changed, request.api_key.etag)
        return pb.UpdateApiKeyResponse(api_key=self._to_proto(updated))

    async def RotateApiKey(self, request: pb.RotateApiKeyRequest, context: object) -> pb.RotateApiKeyResponse:
        """Make a new text for a key, and answer it."""
        rotated, text = await self._api_keys.rotate(
            caller(),
            check_id(request.organization_id, "organization_id"),
            check_id(request.api_key_id, "api_key_id"),
            from_duration(request.overlap, "overlap"),
        )
        return pb.RotateApiKeyResponse(api_key=self._to_proto(rotated), secret=text)

    async def RevokeApiKey(self, request: pb.RevokeApiKeyRequest, context: object) -> pb.RevokeApiKeyResponse:
        """Revoke a key for good."""
        revoked = await self._api_keys.revoke(
            caller(), check_id(request.organization_id, "organization_id"), check_id(request.api_key_id, "api_key_id")
        )
        return pb.RevokeApiKeyResponse(api_key=self._to_proto(revoked))

    def _to_proto(self, key: ApiKey) -> pb.ApiKey:
        return _to_proto(key, self._clock.now())


def _from_proto(organization_id: str, api_key_id: str, message: pb.ApiKey) -> ApiKey:
    expires = message.HasField("expire_time")
    return ApiKey(
        api_key_id=api_key_id,
        organization_id=organization_id,
        display_name=message.display_name,
        service_account_id=check_filter(message.service_account_id, "api_key.service_account_id"),
        user_id=check_filter(message.user_id, "api_key.user_id"),
        scopes=tuple(message.scopes),
        allowed_models=tuple(message.allowed_models),
        allowed_networks=tuple(message.allowed_networks),
        rate_limits=RateLimits.from_proto(message.rate_limits),
        expire_time=from_timestamp(message.expire_time, "api_key.expire_time") if expires else None,
    )


def _to_proto(key: ApiKey, now: datetime) -> pb.ApiKey:
    return pb.ApiKey(
        api_key_id=key.api_key_id,
        organization_id=key.organization_id,
        display_name=key.display_name,
        service_account_id=key.service_account_id,
        user_id=key.user_id,
        scopes=key.scopes,
        allowed_models=key.allowed_models,
        allowed_networks=key.allowed_networks,
        rate_limits=key.rate_limits.to_proto(),
        expire_time=to_timestamp(key.expire_time),
        state=_STATE_NUMBERS[key.state_at(now)],
        create_time=to_timestamp(key.create_time),
        last_use_time=to_timestamp(key.last_use_time),
        revoke_time=to_timestamp(key.revoke_time),
        creator_id=key.creator_id,
        etag=etag_of(key.revision),
    )

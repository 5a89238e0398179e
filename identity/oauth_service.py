"""OauthService: requests to the domain, its answers back; it never decides anything."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import timedelta

from authlib.oauth2.rfc6749 import OAuth2Error

from aiaas.identity.v1 import oauth_service_pb2 as pb
from aiaas.identity.v1 import oauth_service_pb2_grpc
from identity.fields import check_id, invalid
from identity.oauth import ACCESS_LIFETIME, OPENID_SCOPES, Parameters
from identity.oauth_authorizations import OauthAuthorizations, Redirect, SignInNeeded
from identity.oauth_clients import CHANGEABLE, ClientKind, GrantType, OauthClient, OauthClients
from identity.oauth_grants import OauthGrant, OauthGrants
from identity.oauth_tokens import OauthTokens
from identity.principals import caller, signed_in
from identity.signing_keys import ALGORITHM, SigningKey, SigningKeys
from mesh.conversions import from_duration, to_timestamp
from mesh.pages import TimePlace, cut, read_page_size, read_token
from mesh.updates import etag_of, fields_to_change

_KINDS = {
    pb.OAUTH_CLIENT_KIND_CONFIDENTIAL: ClientKind.CONFIDENTIAL,
    pb.OAUTH_CLIENT_KIND_PUBLIC: ClientKind.PUBLIC,
}
_KIND_NUMBERS = {kind: number for number, kind in _KINDS.items()}
_GRANT_TYPES = {
    pb.OAUTH_GRANT_TYPE_AUTHORIZATION_CODE: GrantType.AUTHORIZATION_CODE,
    pb.OAUTH_GRANT_TYPE_REFRESH_TOKEN: GrantType.REFRESH_TOKEN,
    pb.OAUTH_GRANT_TYPE_CLIENT_CREDENTIALS: GrantType.CLIENT_CREDENTIALS,
}
_GRANT_TYPE_NUMBERS = {grant_type: number for number, grant_type in _GRANT_TYPES.items()}


class OauthService(oauth_service_pb2_grpc.OauthServiceServicer):
    """Clients, grants, keys and the decisions behind /oauth2. `issuer` is the provider's public address."""

    def __init__(
        self,
        clients: OauthClients,
        grants: OauthGrants,
        authorizations: OauthAuthorizations,
        tokens: OauthTokens,
        keys: SigningKeys,
        issuer: str,
    ) -> None:
        self._clients = clients
        self._grants = grants
        self._authorizations = authorizations
        self._tokens = tokens
        self._keys = keys
        self._issuer = issuer

    async def CreateOauthClient(
        self, request: pb.CreateOauthClientRequest, context: object
    ) -> pb.CreateOauthClientResponse:
        """Register a client."""
        organization_id = check_id(request.organization_id, "organization_id")
        if request.oauth_client.kind not in _KINDS:
            raise invalid("oauth_client.kind", "must be a known kind")
        wanted = _from_proto(organization_id, "", request.oauth_client)
        made, secret = await self._clients.create(caller(), wanted, request.request_id)
        return pb.CreateOauthClientResponse(oauth_client=_to_proto(made), client_secret=secret)

    async def GetOauthClient(self, request: pb.GetOauthClientRequest, context: object) -> pb.GetOauthClientResponse:
        """Return one client."""
        found = await self._clients.get(
            check_id(request.organization_id, "organization_id"), check_id(request.oauth_client_id, "oauth_client_id")
        )
        return pb.GetOauthClientResponse(oauth_client=_to_proto(found))

    async def ListOauthClients(
        self, request: pb.ListOauthClientsRequest, context: object
    ) -> pb.ListOauthClientsResponse:
        """List clients."""
        size, after = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._clients.list(check_id(request.organization_id, "organization_id"), after, size + 1)
        clients, token = cut(
            request, rows, size, _to_proto, lambda row: TimePlace(row.create_time, row.oauth_client_id)
        )
        return pb.ListOauthClientsResponse(oauth_clients=clients, next_page_token=token)

    async def UpdateOauthClient(
        self, request: pb.UpdateOauthClientRequest, context: object
    ) -> pb.UpdateOauthClientResponse:
        """Change a client."""
        changed = fields_to_change(request.update_mask, request.oauth_client, CHANGEABLE)
        wanted = _from_proto(
            check_id(request.organization_id, "organization_id"),
            check_id(request.oauth_client_id, "oauth_client_id"),
            request.oauth_client,
        )
        updated = await self._clients.update(caller(), wanted, changed, request.oauth_client.etag)
        return pb.UpdateOauthClientResponse(oauth_client=_to_proto(updated))

    async def DeleteOauthClient(
        self, request: pb.DeleteOauthClientRequest, context: object
    ) -> pb.DeleteOauthClientResponse:
        """Remove a client."""
        await self._clients.delete(
            check_id(request.organization_id, "organization_id"),
            check_id(request.oauth_client_id, "oauth_client_id"),
            request.etag,
        )
        return pb.DeleteOauthClientResponse()

    async def RotateOauthClientSecret(
        self, request: pb.RotateOauthClientSecretRequest, context: object
    ) -> pb.RotateOauthClientSecretResponse:
        """Give a client a new secret."""
        overlap = from_duration(request.overlap, "overlap") if request.HasField("overlap") else timedelta(0)
        rotated, secret = await self._clients.rotate(
            caller(),
            check_id(request.organization_id, "organization_id"),
            check_id(request.oauth_client_id, "oauth_client_id"),
            overlap,
        )
        return pb.RotateOauthClientSecretResponse(oauth_client=_to_proto(rotated), client_secret=secret)

    async def ListOauthGrants(self, request: pb.ListOauthGrantsRequest, context: object) -> pb.ListOauthGrantsResponse:
        """List what the caller allowed."""
        size, before = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._grants.list(signed_in(), before, size + 1)
        grants, token = cut(
            request, rows, size, _grant_to_proto, lambda row: TimePlace(row.create_time, row.oauth_grant_id)
        )
        return pb.ListOauthGrantsResponse(oauth_grants=grants, next_page_token=token)

    async def RevokeOauthGrant(
        self, request: pb.RevokeOauthGrantRequest, context: object
    ) -> pb.RevokeOauthGrantResponse:
        """Take a grant back."""
        revoked = await self._grants.revoke(signed_in(), check_id(request.oauth_grant_id, "oauth_grant_id"))
        return pb.RevokeOauthGrantResponse(oauth_grant=_grant_to_proto(revoked))

    async def RotateSigningKey(
        self, request: pb.RotateSigningKeyRequest, context: object
    ) -> pb.RotateSigningKeyResponse:
        """Begin to sign with a new key."""
        return pb.RotateSigningKeyResponse(signing_key=_key_to_proto(await self._keys.rotate(request.reason)))

    async def Authorize(self, request: pb.AuthorizeRequest, context: object) -> pb.AuthorizeResponse:
        """Decide what /oauth2/authorize answers."""
        try:
            outcome = await self._authorizations.authorize(
                _parameters(request.parameters), request.session_token, request.consent_token, request.consent_given
            )
        except OAuth2Error as refusal:
            return pb.AuthorizeResponse(error=_error_to_proto(refusal))
        if isinstance(outcome, Redirect):
            return pb.AuthorizeResponse(redirect_uri=outcome.uri)
        if isinstance(outcome, SignInNeeded):
            return pb.AuthorizeResponse(
                sign_in_needed=pb.OauthSignInNeeded(
                    client_display_name=outcome.client_display_name,
                    login_hint=outcome.login_hint,
                    reauthenticate=outcome.reauthenticate,
                    organization_id=outcome.organization_id,
                )
            )
        return pb.AuthorizeResponse(
            consent_needed=pb.OauthConsentNeeded(
                client_display_name=outcome.client_display_name,
                organization_display_name=outcome.organization_display_name,
                scopes=outcome.scopes,
                consent_token=outcome.consent_token,
            )
        )

    async def Token(self, request: pb.TokenRequest, context: object) -> pb.TokenResponse:
        """Decide what /oauth2/token answers."""
        try:
            issued = await self._tokens.token(_parameters(request.parameters), request.authorization)
        except OAuth2Error as refusal:
            return pb.TokenResponse(error=_error_to_proto(refusal))
        return pb.TokenResponse(
            tokens=pb.OauthTokens(
                access_token=issued.access_token,
                token_type="Bearer",  # noqa: S106 - a name
                expires_in=int(ACCESS_LIFETIME.total_seconds()),
                refresh_token=issued.refresh_token,
                id_token=issued.id_token,
                scope=" ".join(issued.scopes),
            )
        )

    async def Introspect(self, request: pb.IntrospectRequest, context: object) -> pb.IntrospectResponse:
        """Decide what /oauth2/introspect answers."""
        try:
            token = await self._tokens.introspect(_parameters(request.parameters), request.authorization)
        except OAuth2Error as refusal:
            return pb.IntrospectResponse(error=_error_to_proto(refusal))
        if token is None:
            return pb.IntrospectResponse(state=pb.OauthTokenState(active=False))
        return pb.IntrospectResponse(
            state=pb.OauthTokenState(
                active=True,
                scope=" ".join(token.scopes),
                client_id=token.oauth_client_id,
                token_type="refresh_token" if token.is_refresh else "access_token",
                sub=token.user_id or token.service_account_id,
                aud=self._issuer,
                iss=self._issuer,
                jti=token.oauth_token_id,
                exp=int(token.expire_time.timestamp()),
                iat=int(token.create_time.timestamp()),
                organization_id=token.organization_id,
            )
        )

    async def Revoke(self, request: pb.RevokeRequest, context: object) -> pb.RevokeResponse:
        """Decide what /oauth2/revoke answers."""
        try:
            await self._tokens.revoke(_parameters(request.parameters), request.authorization)
        except OAuth2Error as refusal:
            return pb.RevokeResponse(error=_error_to_proto(refusal))
        return pb.RevokeResponse()

    async def GetUserInfo(self, request: pb.GetUserInfoRequest, context: object) -> pb.GetUserInfoResponse:
        """Decide what /oauth2/userinfo answers."""
        try:
            info = await self._tokens.user_info(request.access_token)
        except OAuth2Error as refusal:
            return pb.GetUserInfoResponse(error=_error_to_proto(refusal))
        return pb.GetUserInfoResponse(
            user_info=pb.OauthUserInfo(
                sub=info.user_id, email=info.email, name=info.display_name, organization_id=info.organization_id
            )
        )

    async def GetProviderMetadata(
        self, request: pb.GetProviderMetadataRequest, context: object
    ) -> pb.GetProviderMetadataResponse:
        """Return what clients discover the provider by."""
        return pb.GetProviderMetadataResponse(metadata_json=json.dumps(_metadata(self._issuer)))

    async def ListSigningKeys(self, request: pb.ListSigningKeysRequest, context: object) -> pb.ListSigningKeysResponse:
        """Return the public keys."""
        return pb.ListSigningKeysResponse(signing_keys=map(_key_to_proto, await self._keys.list()))


def _metadata(issuer: str) -> dict[str, object]:
    """OpenID Connect Discovery 1.0, 3 and RFC 8414, 2: the same document for both."""
    methods = ["client_secret_basic", "client_secret_post"]
    return {
        "issuer": issuer,
        "authorization_endpoint": f"{issuer}/oauth2/authorize",
        "token_endpoint": f"{issuer}/oauth2/token",
        "introspection_endpoint": f"{issuer}/oauth2/introspect",
        "revocation_endpoint": f"{issuer}/oauth2/revoke",
        "userinfo_endpoint": f"{issuer}/oauth2/userinfo",
        "jwks_uri": f"{issuer}/oauth2/keys",
        "scopes_supported": list(OPENID_SCOPES),
        "response_types_supported": ["code"],
        "response_modes_supported": ["query"],
        "grant_types_supported": [grant_type.value for grant_type in GrantType],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": [ALGORITHM],
        "token_endpoint_auth_methods_supported": [*methods, "none"],
        "introspection_endpoint_auth_methods_supported": methods,
        "revocation_endpoint_auth_methods_supported": [*methods, "none"],
        "code_challenge_methods_supported": ["S256"],
        "claims_supported": [
            *("iss", "sub", "aud", "iat", "exp", "auth_time", "nonce", "at_hash", "email", "email_verified", "name")
        ],
        "prompt_values_supported": ["none", "login", "consent"],
        "authorization_response_iss_parameter_supported": True,
        "request_parameter_supported": False,
        "request_uri_parameter_supported": False,
    }


def _parameters(pairs: Iterable[pb.OauthParameter]) -> Parameters:
    return Parameters((pair.name, pair.value) for pair in pairs)


def _error_to_proto(refusal: OAuth2Error) -> pb.OauthError:
    return pb.OauthError(
        error=refusal.error,
        error_description=refusal.description,
        http_status=refusal.status_code,
        www_authenticate=dict(refusal.get_headers()).get("WWW-Authenticate", ""),
    )


def _from_proto(organization_id: str, oauth_client_id: str, message: pb.OauthClient) -> OauthClient:
    if not all(grant_type in _GRANT_TYPES for grant_type in message.grant_types):
        raise invalid("oauth_client.grant_types", "must hold known ways only")
    return OauthClient(
        oauth_client_id=oauth_client_id,
        organization_id=organization_id,
        display_name=message.display_name,
        kind=_KINDS.get(message.kind, ClientKind.CONFIDENTIAL),
        redirect_uris=tuple(message.redirect_uris),
        grant_types=tuple(_GRANT_TYPES[grant_type] for grant_type in message.grant_types),
        scopes=tuple(message.scopes),
        service_account_id=message.service_account_id,
        disabled=message.disabled,
    )


def _to_proto(client: OauthClient) -> pb.OauthClient:
    return pb.OauthClient(
        oauth_client_id=client.oauth_client_id,
        organization_id=client.organization_id,
        display_name=client.display_name,
        kind=_KIND_NUMBERS[client.kind],
        redirect_uris=client.redirect_uris,
        grant_types=[_GRANT_TYPE_NUMBERS[grant_type] for grant_type in client.grant_types],
        scopes=client.scopes,
        service_account_id=client.service_account_id,
        disabled=client.disabled,
        create_time=to_timestamp(client.create_time),
        update_time=to_timestamp(client.update_time),
        etag=etag_of(client.revision),
    )


def _grant_to_proto(grant: OauthGrant) -> pb.OauthGrant:
    return pb.OauthGrant(
        oauth_grant_id=grant.oauth_grant_id,
        organization_id=grant.organization_id,
        oauth_client_id=grant.oauth_client_id,
        client_display_name=grant.client_display_name,
        scopes=grant.scopes,
        create_time=to_timestamp(grant.create_time),
        last_use_time=to_timestamp(grant.last_use_time),
        revoke_time=to_timestamp(grant.revoke_time),
    )


def _key_to_proto(key: SigningKey) -> pb.SigningKey:
    return pb.SigningKey(
        key_id=key.key_id,
        jwk_json=key.public_jwk,
        current=key.retire_time is None,
        create_time=to_timestamp(key.create_time),
        retire_time=to_timestamp(key.retire_time),
    )

"""FederationService: requests to the domain, its answers back; it never decides anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from aiaas.identity.v1 import federation_service_pb2 as pb
from aiaas.identity.v1 import federation_service_pb2_grpc, session_service_pb2
from identity.federation import Federation
from identity.fields import check_id
from identity.issuers import CHANGEABLE, ClaimNames, Issuer, Issuers
from identity.principals import caller
from identity.scim_service import group_roles_to_proto, rules_from_proto
from mesh.conversions import to_timestamp
from mesh.pages import TimePlace, cut, read_page_size, read_token
from mesh.updates import etag_of, fields_to_change

S = TypeVar("S")


class FederationService(federation_service_pb2_grpc.FederationServiceServicer, Generic[S]):
    """Sign-on from outside. `sign_in_to_proto` is how the outcome of a sign-in travels."""

    def __init__(
        self, issuers: Issuers, federation: Federation[S], sign_in_to_proto: Callable[[S], session_service_pb2.SignIn]
    ) -> None:
        self._issuers = issuers
        self._federation = federation
        self._sign_in_to_proto = sign_in_to_proto

    async def CreateIssuer(self, request: pb.CreateIssuerRequest, context: object) -> pb.CreateIssuerResponse:
        """Add an issuer."""
        wanted = _from_proto(check_id(request.organization_id, "organization_id"), "", request.issuer)
        made = await self._issuers.create(caller(), wanted, request.issuer.client_secret, request.request_id)
        return pb.CreateIssuerResponse(issuer=_to_proto(made))

    async def GetIssuer(self, request: pb.GetIssuerRequest, context: object) -> pb.GetIssuerResponse:
        """Return one issuer."""
        found = await self._issuers.get(
            check_id(request.organization_id, "organization_id"), check_id(request.issuer_id, "issuer_id")
        )
        return pb.GetIssuerResponse(issuer=_to_proto(found))

    async def ListIssuers(self, request: pb.ListIssuersRequest, context: object) -> pb.ListIssuersResponse:
        """List an organization's issuers."""
        organization_id = check_id(request.organization_id, "organization_id")
        size, after = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._issuers.list(organization_id, after, size + 1)
        issuers, token = cut(request, rows, size, _to_proto, lambda row: TimePlace(row.create_time, row.issuer_id))
        return pb.ListIssuersResponse(issuers=issuers, next_page_token=token)

    async def UpdateIssuer(self, request: pb.UpdateIssuerRequest, context: object) -> pb.UpdateIssuerResponse:
        """Change an issuer."""
        changed = fields_to_change(request.update_mask, request.issuer, CHANGEABLE)
        wanted = _from_proto(
            check_id(request.organization_id, "organization_id"),
            check_id(request.issuer_id, "issuer_id"),
            request.issuer,
        )
        updated = await self._issuers.update(
            caller(), wanted, request.issuer.client_secret, changed, request.issuer.etag
        )
        return pb.UpdateIssuerResponse(issuer=_to_proto(updated))

    async def DeleteIssuer(self, request: pb.DeleteIssuerRequest, context: object) -> pb.DeleteIssuerResponse:
        """Remove an issuer."""
        await self._issuers.delete(
            check_id(request.organization_id, "organization_id"),
            check_id(request.issuer_id, "issuer_id"),
            request.etag,
        )
        return pb.DeleteIssuerResponse()

    async def CheckIssuer(self, request: pb.CheckIssuerRequest, context: object) -> pb.CheckIssuerResponse:
        """Say what is wrong with an issuer."""
        problems = await self._issuers.problems(
            check_id(request.organization_id, "organization_id"), check_id(request.issuer_id, "issuer_id")
        )
        return pb.CheckIssuerResponse(usable=not problems, problems=problems)

    async def FindIssuers(self, request: pb.FindIssuersRequest, context: object) -> pb.FindIssuersResponse:
        """Return the issuers to offer for an address."""
        offers = await self._federation.offers(request.email)
        return pb.FindIssuersResponse(
            offers=[pb.IssuerOffer(issuer_id=each.issuer_id, display_name=each.display_name) for each in offers]
        )

    async def BeginSignIn(self, request: pb.BeginSignInRequest, context: object) -> pb.BeginSignInResponse:
        """Start a sign-in at an issuer."""
        redirect_uri, browser_token = await self._federation.begin(
            check_id(request.issuer_id, "issuer_id"), request.return_path
        )
        return pb.BeginSignInResponse(redirect_uri=redirect_uri, browser_token=browser_token)

    async def FinishSignIn(self, request: pb.FinishSignInRequest, context: object) -> pb.FinishSignInResponse:
        """End a sign-in at an issuer."""
        parameters = [(parameter.name, parameter.value) for parameter in request.parameters]
        sign_in, return_path = await self._federation.finish(parameters, request.browser_token)
        return pb.FinishSignInResponse(sign_in=self._sign_in_to_proto(sign_in), return_path=return_path)


def _from_proto(organization_id: str, issuer_id: str, message: pb.Issuer) -> Issuer:
    names = message.claim_names
    return Issuer(
        issuer_id=issuer_id,
        organization_id=organization_id,
        display_name=message.display_name,
        issuer_url=message.issuer_url,
        client_id=message.client_id,
        scopes=tuple(message.scopes),
        email_domains=tuple(domain.lower() for domain in message.email_domains),
        claim_names=ClaimNames(names.email, names.display_name, names.groups),
        rules=rules_from_proto(message),
        create_users=message.create_users,
        trust_mfa=message.trust_mfa,
        disabled=message.disabled,
    )


def _to_proto(issuer: Issuer) -> pb.Issuer:
    names = issuer.claim_names
    return pb.Issuer(
        issuer_id=issuer.issuer_id,
        organization_id=issuer.organization_id,
        display_name=issuer.display_name,
        issuer_url=issuer.issuer_url,
        client_id=issuer.client_id,
        scopes=issuer.scopes,
        email_domains=issuer.email_domains,
        claim_names=pb.ClaimNames(email=names.email, display_name=names.display_name, groups=names.groups),
        group_roles=group_roles_to_proto(issuer.rules),
        default_role_ids=issuer.rules.default_role_ids,
        create_users=issuer.create_users,
        trust_mfa=issuer.trust_mfa,
        disabled=issuer.disabled,
        create_time=to_timestamp(issuer.create_time),
        update_time=to_timestamp(issuer.update_time),
        etag=etag_of(issuer.revision),
    )

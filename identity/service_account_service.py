"""ServiceAccountService: requests to the domain, its answers back; it never decides anything."""

from aiaas.identity.v1 import service_account_service_pb2 as pb
from aiaas.identity.v1 import service_account_service_pb2_grpc
from identity.fields import check_id
from identity.principals import caller
from identity.service_accounts import CHANGEABLE, ServiceAccount, ServiceAccounts
from mesh.conversions import to_timestamp
from mesh.pages import TimePlace, cut, read_page_size, read_token
from mesh.updates import etag_of, fields_to_change


class ServiceAccountService(service_account_service_pb2_grpc.ServiceAccountServiceServicer):
    """The actors of an organization that are not people."""

    def __init__(self, service_accounts: ServiceAccounts) -> None:
        self._service_accounts = service_accounts

    async def CreateServiceAccount(
        self, request: pb.CreateServiceAccountRequest, context: object
    ) -> pb.CreateServiceAccountResponse:
        """Make a service account."""
        wanted = _from_proto(check_id(request.organization_id, "organization_id"), "", request.service_account)
        made = await self._service_accounts.create(caller(), wanted, request.request_id)
        return pb.CreateServiceAccountResponse(service_account=_to_proto(made))

    async def GetServiceAccount(
        self, request: pb.GetServiceAccountRequest, context: object
    ) -> pb.GetServiceAccountResponse:
        """Return one service account."""
        found = await self._service_accounts.get(
            check_id(request.organization_id, "organization_id"),
            check_id(request.service_account_id, "service_account_id"),
        )
        return pb.GetServiceAccountResponse(service_account=_to_proto(found))

    async def ListServiceAccounts(
        self, request: pb.ListServiceAccountsRequest, context: object
    ) -> pb.ListServiceAccountsResponse:
        """List service accounts."""
        organization_id = check_id(request.organization_id, "organization_id")
        size, after = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._service_accounts.list(organization_id, after, size + 1)
        accounts, token = cut(
            request, rows, size, _to_proto, lambda row: TimePlace(row.create_time, row.service_account_id)
        )
        return pb.ListServiceAccountsResponse(service_accounts=accounts, next_page_token=token)

    async def UpdateServiceAccount(
        self, request: pb.UpdateServiceAccountRequest, context: object
    ) -> pb.UpdateServiceAccountResponse:
        """Change a service account."""
        changed = fields_to_change(request.update_mask, request.service_account, CHANGEABLE)
        wanted = _from_proto(
            check_id(request.organization_id, "organization_id"),
            check_id(request.service_account_id, "service_account_id"),
            request.service_account,
        )
        updated = await self._service_accounts.update(caller(), wanted, changed, request.service_account.etag)
        return pb.UpdateServiceAccountResponse(service_account=_to_proto(updated))

    async def DeleteServiceAccount(
        self, request: pb.DeleteServiceAccountRequest, context: object
    ) -> pb.DeleteServiceAccountResponse:
        """Remove a service account and revoke its keys."""
        await self._service_accounts.delete(
            caller(),
            check_id(request.organization_id, "organization_id"),
            check_id(request.service_account_id, "service_account_id"),
        )
        return pb.DeleteServiceAccountResponse()


def _from_proto(organization_id: str, service_account_id: str, message: pb.ServiceAccount) -> ServiceAccount:
    return ServiceAccount(
        service_account_id=service_account_id,
        organization_id=organization_id,
        display_name=message.display_name,
        role_ids=tuple(message.role_ids),
        disabled=message.disabled,
    )


def _to_proto(account: ServiceAccount) -> pb.ServiceAccount:
    return pb.ServiceAccount(
        service_account_id=account.service_account_id,
        organization_id=account.organization_id,
        display_name=account.display_name,
        role_ids=account.role_ids,
        disabled=account.disabled,
        create_time=to_timestamp(account.create_time),
        update_time=to_timestamp(account.update_time),
        etag=etag_of(account.revision),
    )

"""Calls identity's ledger of budgets; it never decides what to lease, and it never tries a call again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc

from aiaas.identity.v1 import budget_service_pb2 as pb
from mesh.errors import from_rpc_error

if TYPE_CHECKING:
    from aiaas.identity.v1.budget_service_pb2_grpc import BudgetServiceStub

T = TypeVar("T")

_TIMEOUT_S = 2.0
_PAGE = 500


class Ledger(Protocol):
    """The ledger, as BudgetService has it. Every method raises PlatformError, UNAVAILABLE where it cannot be asked."""

    async def resolve(self, organization_id: str) -> pb.ResolveBudgetsResponse:
        """The budgets that can bind an organization's requests."""

    def watch(self, after_revision: int) -> AsyncIterator[pb.WatchBudgetsResponse]:
        """Organizations whose budgets change, from then on."""

    async def lease(self, request: pb.LeaseRequest) -> pb.LeaseResponse:
        """Slices of budgets; the same request again gets the same ones."""

    async def renew(self, request: pb.RenewRequest) -> pb.RenewResponse:
        """Report and extend."""

    async def release(self, request: pb.ReleaseRequest) -> pb.ReleaseResponse:
        """Report and give back."""

    async def settle(self, request: pb.SettleRequest) -> pb.SettleResponse:
        """Close what has expired."""

    async def unsettled(self, router_id: str) -> list[pb.BudgetLease]:
        """All leases of a router that are not settled."""


class RemoteLedger:
    """The ledger behind gRPC."""

    def __init__(self, stub: BudgetServiceStub) -> None:
        self._stub = stub

    async def resolve(self, organization_id: str) -> pb.ResolveBudgetsResponse:
        """See `Ledger`."""
        return await _answer(self._stub.ResolveBudgets, pb.ResolveBudgetsRequest(organization_id=organization_id))

    async def watch(self, after_revision: int) -> AsyncIterator[pb.WatchBudgetsResponse]:
        """See `Ledger`."""
        try:
            async for change in self._stub.WatchBudgets(pb.WatchBudgetsRequest(after_revision=after_revision)):
                yield change
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def lease(self, request: pb.LeaseRequest) -> pb.LeaseResponse:
        """See `Ledger`."""
        return await _answer(self._stub.Lease, request)

    async def renew(self, request: pb.RenewRequest) -> pb.RenewResponse:
        """See `Ledger`."""
        return await _answer(self._stub.Renew, request)

    async def release(self, request: pb.ReleaseRequest) -> pb.ReleaseResponse:
        """See `Ledger`."""
        return await _answer(self._stub.Release, request)

    async def settle(self, request: pb.SettleRequest) -> pb.SettleResponse:
        """See `Ledger`."""
        return await _answer(self._stub.Settle, request)

    async def unsettled(self, router_id: str) -> list[pb.BudgetLease]:
        """See `Ledger`."""
        leases: list[pb.BudgetLease] = []
        token = ""
        while True:
            request = pb.ListRouterLeasesRequest(router_id=router_id, page_size=_PAGE, page_token=token)
            page = await _answer(self._stub.ListRouterLeases, request)
            leases += page.leases
            token = page.next_page_token
            if not token:
                return leases


async def _answer(method: Callable[..., Awaitable[T]], request: object) -> T:
    try:
        return await method(request, timeout=_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None

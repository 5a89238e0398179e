"""PriceService over gRPC: reads requests, asks the store, writes answers; what a price may be is in `prices`."""

from __future__ import annotations

import contextlib
import functools
from datetime import datetime
from typing import Any

import grpc
import msgspec
from google.protobuf.message import Message

from aiaas.router.v1 import price_service_pb2 as pb
from aiaas.router.v1 import price_service_pb2_grpc
from mesh.conversions import from_timestamp
from mesh.errors import PlatformError
from mesh.fields import check_all
from mesh.ids import new_id
from mesh.pages import Moment, cut, read_page_size, read_token
from router.backends import Registry
from router.changes import creation_of, require, require_same_id
from router.prices import Price, beginning, check_amount
from router.store import Store

_AMOUNTS = ("prompt_micros_per_million", "cached_prompt_micros_per_million", "completion_micros_per_million")
_Context = grpc.aio.ServicerContext[Any, Any]


class _Place(msgspec.Struct, frozen=True, array_like=True):
    """A place in the versions of one model, of which no two begin at the same moment."""

    valid_from: Moment


class PriceService(price_service_pb2_grpc.PriceServiceServicer):
    """The prices of models. A new one is in this router's memory before it is answered."""

    def __init__(self, store: Store, registry: Registry) -> None:
        self._store = store
        self._registry = registry

    async def CreatePrice(self, request: pb.CreatePriceRequest, context: _Context) -> pb.CreatePriceResponse:
        """Add a version of a model's price."""
        require(request, "price")
        require_same_id(request.model_id, request.price.model_id, "price.model_id")
        check_all(*(functools.partial(_amount, request.price, name) for name in _AMOUNTS))
        prompt, cached_prompt, completion = (_amount(request.price, name) for name in _AMOUNTS)
        given = None
        if request.price.HasField("valid_from"):
            given = from_timestamp(request.price.valid_from, "price.valid_from")
        asked = pb.Price()
        asked.CopyFrom(request.price)
        asked.model_id = request.model_id

        def make(now: datetime) -> Price:
            return Price(
                price_id=new_id("price"),
                model_id=request.model_id,
                prompt_micros_per_million=prompt,
                cached_prompt_micros_per_million=cached_prompt,
                completion_micros_per_million=completion,
                valid_from=beginning(given, now),
                create_time=now,
            )

        creation = creation_of("prices", request.request_id, asked)
        created = await self._store.create_price(request.model_id, make, creation)
        # The price is stored; if PostgreSQL went away since, polling will find it.
        with contextlib.suppress(PlatformError):
            await self._registry.refresh()
        return pb.CreatePriceResponse(price=_to_proto(created))

    async def ListPrices(self, request: pb.ListPricesRequest, context: _Context) -> pb.ListPricesResponse:
        """Return a page of a model's prices."""
        size, before = read_page_size(request.page_size), read_token(request, _Place)
        found = await self._store.list_prices(request.model_id, before.valid_from if before else None, size + 1)
        prices, token = cut(request, found, size, _to_proto, lambda price: _Place(price.valid_from))
        return pb.ListPricesResponse(prices=prices, next_page_token=token)


def _amount(message: Message, name: str) -> int:
    return check_amount(f"price.{name}", getattr(message, name) if message.HasField(name) else None)


def _to_proto(price: Price) -> pb.Price:
    message = pb.Price(
        price_id=price.price_id,
        model_id=price.model_id,
        prompt_micros_per_million=price.prompt_micros_per_million,
        cached_prompt_micros_per_million=price.cached_prompt_micros_per_million,
        completion_micros_per_million=price.completion_micros_per_million,
    )
    message.valid_from.FromDatetime(price.valid_from)
    message.create_time.FromDatetime(price.create_time)
    return message

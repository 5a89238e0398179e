"""WebhookService: requests to the domain, its answers back; it never decides anything."""

from __future__ import annotations

from datetime import timedelta

from aiaas.analytics.v1 import webhook_service_pb2 as pb
from aiaas.analytics.v1 import webhook_service_pb2_grpc
from aiaas.type.v1.platform_event_pb2 import EventType
from analytics.webhooks import CHANGEABLE, Delivery, DeliveryState, Webhook, Webhooks
from mesh.conversions import to_timestamp
from mesh.fields import check_id, invalid
from mesh.pages import TimePlace, cut, read_page_size, read_token
from mesh.updates import etag_of, fields_to_change

_PENDING, _FAILED = DeliveryState.PENDING, DeliveryState.FAILED


class WebhookService(webhook_service_pb2_grpc.WebhookServiceServicer):
    """aiaas.analytics.v1.WebhookService."""

    def __init__(self, webhooks: Webhooks) -> None:
        self._webhooks = webhooks

    async def CreateWebhook(self, request: pb.CreateWebhookRequest, context: object) -> pb.CreateWebhookResponse:
        """Make a webhook."""
        organization_id = check_id(request.organization_id, "organization_id")
        wanted = _from_proto(request.webhook, organization_id)
        made, secret = await self._webhooks.create(wanted, request.request_id)
        return pb.CreateWebhookResponse(webhook=_to_proto(made), secret=secret)

    async def GetWebhook(self, request: pb.GetWebhookRequest, context: object) -> pb.GetWebhookResponse:
        """Return one webhook."""
        return pb.GetWebhookResponse(webhook=_to_proto(await self._webhooks.get(*_ids(request))))

    async def ListWebhooks(self, request: pb.ListWebhooksRequest, context: object) -> pb.ListWebhooksResponse:
        """List webhooks, oldest first."""
        organization_id = check_id(request.organization_id, "organization_id")
        size, after = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._webhooks.list(organization_id, after, size + 1)
        webhooks, token = cut(request, rows, size, _to_proto, lambda row: TimePlace(row.create_time, row.webhook_id))
        return pb.ListWebhooksResponse(webhooks=webhooks, next_page_token=token)

    async def UpdateWebhook(self, request: pb.UpdateWebhookRequest, context: object) -> pb.UpdateWebhookResponse:
        """Change a webhook."""
        organization_id, webhook_id = _ids(request)
        changed = fields_to_change(request.update_mask, request.webhook, CHANGEABLE)
        wanted = _from_proto(request.webhook, organization_id, webhook_id)
        updated = await self._webhooks.update(wanted, changed, request.webhook.etag)
        return pb.UpdateWebhookResponse(webhook=_to_proto(updated))

    async def DeleteWebhook(self, request: pb.DeleteWebhookRequest, context: object) -> pb.DeleteWebhookResponse:
        """Remove a webhook."""
        await self._webhooks.delete(*_ids(request), request.etag)
        return pb.DeleteWebhookResponse()

    async def RotateWebhookSecret(
        self, request: pb.RotateWebhookSecretRequest, context: object
    ) -> pb.RotateWebhookSecretResponse:
        """Make a new secret."""
        rotated, secret = await self._webhooks.rotate(*_ids(request), _overlap(request))
        return pb.RotateWebhookSecretResponse(webhook=_to_proto(rotated), secret=secret)

    async def TestWebhook(self, request: pb.TestWebhookRequest, context: object) -> pb.TestWebhookResponse:
        """Send a test and tell what came back."""
        delivery = await self._webhooks.test(*_ids(request))
        return pb.TestWebhookResponse(webhook_delivery=_delivery_to_proto(delivery))

    async def ListWebhookDeliveries(
        self, request: pb.ListWebhookDeliveriesRequest, context: object
    ) -> pb.ListWebhookDeliveriesResponse:
        """List deliveries, newest first."""
        organization_id, webhook_id = _ids(request)
        size, before = read_page_size(request.page_size), read_token(request, TimePlace)
        if request.state and not _PENDING <= request.state <= _FAILED:
            raise invalid("state", "must be a known state")
        state = DeliveryState(request.state) if request.state else None
        rows = await self._webhooks.list_deliveries(organization_id, webhook_id, before, size + 1, state=state)
        deliveries, token = cut(
            request, rows, size, _delivery_to_proto, lambda row: TimePlace(row.create_time, row.webhook_delivery_id)
        )
        return pb.ListWebhookDeliveriesResponse(webhook_deliveries=deliveries, next_page_token=token)

    async def RetryWebhookDelivery(
        self, request: pb.RetryWebhookDeliveryRequest, context: object
    ) -> pb.RetryWebhookDeliveryResponse:
        """Send a failed delivery again."""
        delivery_id = check_id(request.webhook_delivery_id, "webhook_delivery_id")
        delivery = await self._webhooks.retry(*_ids(request), delivery_id)
        return pb.RetryWebhookDeliveryResponse(webhook_delivery=_delivery_to_proto(delivery))


def _ids(
    request: pb.GetWebhookRequest
    | pb.UpdateWebhookRequest
    | pb.DeleteWebhookRequest
    | pb.RotateWebhookSecretRequest
    | pb.TestWebhookRequest
    | pb.ListWebhookDeliveriesRequest
    | pb.RetryWebhookDeliveryRequest,
) -> tuple[str, str]:
    return check_id(request.organization_id, "organization_id"), check_id(request.webhook_id, "webhook_id")


def _overlap(request: pb.RotateWebhookSecretRequest) -> timedelta:
    try:
        return request.overlap.ToTimedelta()
    except (ValueError, OverflowError):
        raise invalid("overlap", "is not a duration") from None


def _from_proto(message: pb.Webhook, organization_id: str, webhook_id: str = "") -> Webhook:
    return Webhook(
        webhook_id=webhook_id,
        organization_id=organization_id,
        display_name=message.display_name,
        url=message.url,
        types=tuple(message.types),
        disabled=message.disabled,
    )


def _to_proto(webhook: Webhook) -> pb.Webhook:
    return pb.Webhook(
        webhook_id=webhook.webhook_id,
        organization_id=webhook.organization_id,
        display_name=webhook.display_name,
        url=webhook.url,
        types=[EventType.ValueType(number) for number in webhook.types],
        disabled=webhook.disabled,
        success_time=to_timestamp(webhook.success_time),
        failure_time=to_timestamp(webhook.failure_time),
        create_time=to_timestamp(webhook.create_time),
        update_time=to_timestamp(webhook.update_time),
        etag=etag_of(webhook.revision),
    )


def _delivery_to_proto(delivery: Delivery) -> pb.WebhookDelivery:
    return pb.WebhookDelivery(
        webhook_delivery_id=delivery.webhook_delivery_id,
        webhook_id=delivery.webhook_id,
        event_id=delivery.event_id,
        state=pb.WebhookDeliveryState.ValueType(delivery.state),
        attempts=delivery.attempts,
        http_status=delivery.http_status,
        failure_reason=delivery.failure_reason,
        create_time=to_timestamp(delivery.create_time),
        attempt_time=to_timestamp(delivery.attempt_time),
        next_attempt_time=to_timestamp(delivery.due_time) if delivery.state is _PENDING else None,
    )

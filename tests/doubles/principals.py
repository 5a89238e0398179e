"""Whoever makes a call, as identity would resolve it."""

from datetime import datetime

from mesh import tokens
from mesh.auth import (
    Principal,
)

KEY = tokens.API_KEY.generate()
"""The key that a principal has presented unless told."""


def principal(
    *permissions: str,
    organization_id: str = "org_a",
    platform: bool = False,
    expire_time: datetime | None = None,
    key_id: str = KEY.id,
    user_id: str = "",
    service_account_id: str = "",
    signature_required: bool = False,
) -> Principal:
    """A principal of an API key."""
    return Principal(
        kind="api_key",
        id=key_id,
        organization_id=organization_id,
        api_key_id=key_id,
        user_id=user_id,
        service_account_id=service_account_id,
        permissions=frozenset(permissions),
        platform=platform,
        expire_time=expire_time,
        signature_required=signature_required,
    )

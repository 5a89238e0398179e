"""Makes the first platform administrator, before anybody is there who could; it never makes a second one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from identity.api_keys import ApiKey
from identity.fields import check_display_name
from identity.organizations import Organization
from identity.roles import ALL_PERMISSIONS, PLATFORM_ADMIN, PLATFORM_ORGANIZATION_ID
from identity.service_accounts import ServiceAccount
from mesh import tokens
from mesh.clock import Clock
from mesh.ids import new_id

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

ACCOUNT_NAME = "platform-admin"
"""The display name of the service account, by which a later bootstrap finds it."""

_CREATOR = "bootstrap"
_EVERY_SCOPE = tuple(sorted({f"{name.partition('.')[0]}.*" for name in ALL_PERMISSIONS}))


@dataclass(frozen=True, slots=True)
class Bootstrapped:
    """What is there now. `secret` is the text of a key that was made just now, else None."""

    organization_id: str
    service_account_id: str
    api_key_id: str
    secret: str | None = field(repr=False)


async def bootstrap(store: Store, clock: Clock, display_name: str, *, rotate: bool = False) -> Bootstrapped:
    """Make the platform's organization, its service account and a key with every scope, as far as they are missing.

    With `rotate` a new key is made although there is one, and the older ones are revoked.
    Raises PlatformError: INVALID_ARGUMENT naming display_name, UNAVAILABLE.
    """
    check_display_name(display_name, "display_name")
    now = clock.now()
    async with store.transaction() as stored:
        await stored.lock_bootstrap()
        await stored.organizations.add(
            Organization(PLATFORM_ORGANIZATION_ID, display_name, create_time=now, update_time=now)
        )
        service_account_id = await _account(stored, clock)
        made = await stored.api_keys.list_by_creator(PLATFORM_ORGANIZATION_ID, _CREATOR)
        if made and not rotate:
            return Bootstrapped(PLATFORM_ORGANIZATION_ID, service_account_id, made[-1].api_key_id, None)
        for key in made:
            if key.revoke_time is None:
                await stored.api_keys.change(replace(key, revoke_time=now))
                await stored.revoke("api_key_id", key.api_key_id)
        secret = tokens.API_KEY.generate(clock=clock)
        await stored.api_keys.add(
            ApiKey(
                api_key_id=secret.id,
                organization_id=PLATFORM_ORGANIZATION_ID,
                display_name="Bootstrap",
                service_account_id=service_account_id,
                scopes=_EVERY_SCOPE,
                granted=ALL_PERMISSIONS,
                creator_id=_CREATOR,
                create_time=now,
            ),
            secret.digest,
        )
    return Bootstrapped(PLATFORM_ORGANIZATION_ID, service_account_id, secret.id, secret.text)


async def _account(stored: Transaction, clock: Clock) -> str:
    found = await stored.service_accounts.find_named(PLATFORM_ORGANIZATION_ID, ACCOUNT_NAME)
    if found is not None:
        return found.service_account_id
    now = clock.now()
    new = ServiceAccount(
        service_account_id=new_id("sa", clock=clock),
        organization_id=PLATFORM_ORGANIZATION_ID,
        display_name=ACCOUNT_NAME,
        role_ids=(PLATFORM_ADMIN,),
        create_time=now,
        update_time=now,
    )
    await stored.service_accounts.add(new)
    return new.service_account_id

"""What decides on a credential, over several tables in one query; it never decides itself."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from identity.organizations import OrganizationState
from identity.principals import Credential, Holder
from identity.stores.api_keys import key_of
from identity.stores.rows import Connection, Row, limits_from_json
from mesh.database import Database

# Who holds what: service accounts that are there, and members; with what their custom roles grant together.
HOLDERS = """
    SELECT service_account_id, NULL AS user_id, role_ids, NOT disabled AS acting
    FROM service_accounts WHERE organization_id = {organization} AND service_account_id = {service_account}
        AND delete_time IS NULL
    UNION ALL
    SELECT NULL, m.user_id, m.role_ids, u.state = 'active'
    FROM memberships m JOIN users u USING (user_id) WHERE m.organization_id = {organization} AND m.user_id = {user}
"""
CUSTOM = """
    SELECT array_agg(DISTINCT permission) AS custom_permissions FROM roles r, unnest(r.permissions) AS permission
    WHERE r.organization_id = {organization} AND r.role_id = ANY (h.role_ids)
"""
POLICY_BOUND = "EXISTS (SELECT FROM policies p WHERE p.organization_id = {organization} AND NOT p.disabled)"
_FIND_HOLDER = (
    f"SELECT h.role_ids, h.acting, c.custom_permissions FROM ({HOLDERS}) h CROSS JOIN LATERAL ({CUSTOM}) c"
).format(organization="$1", service_account="$2", user="$3")
_OF_KEY = {"organization": "k.organization_id", "service_account": "k.service_account_id", "user": "k.user_id"}
_FIND_CREDENTIAL = (
    "SELECT k.*, o.state, o.rate_limits AS organization_limits, o.allowed_models AS organization_models,"
    " h.role_ids, h.acting, c.custom_permissions, s.api_key_id IS NOT NULL AS signature_required,"
    f" {POLICY_BOUND} AS policy_bound"
    " FROM api_keys k JOIN organizations o USING (organization_id)"
    " LEFT JOIN signing_secrets s ON s.api_key_id = k.api_key_id"
    f" LEFT JOIN LATERAL ({HOLDERS}) h ON true LEFT JOIN LATERAL ({CUSTOM}) c ON true WHERE k.api_key_id = $1"
).format(**_OF_KEY)


class HolderRows:
    """Service accounts and members as holders of roles, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def find(self, organization_id: str, service_account_id: str, user_id: str) -> Holder | None:
        """The service account or the member, whichever id is not empty."""
        row = await self._connection.fetchrow(
            _FIND_HOLDER, organization_id, service_account_id or None, user_id or None
        )
        return None if row is None else holder_of(row)


async def find_credential(database: Database, api_key_id: str) -> Credential | None:
    """All that decides on a key, with its digest. It is what finds out the organization, so it cannot name one."""
    row = await database.fetchrow(_FIND_CREDENTIAL, api_key_id)
    if row is None:
        return None
    return Credential(
        key=key_of(row),
        digest=row["digest"],
        previous_digest=row["previous_digest"],
        previous_expire_time=row["previous_expire_time"],
        signature_required=row["signature_required"],
        policy_bound=row["policy_bound"],
        organization_state=OrganizationState(row["state"]),
        organization_limits=limits_from_json(row["organization_limits"]),
        organization_models=tuple(row["organization_models"]),
        holder=None if row["role_ids"] is None else holder_of(row),
    )


def holder_of(row: Row) -> Holder:
    """The holder in a row of these queries."""
    return Holder(
        role_ids=tuple(row["role_ids"]),
        custom_permissions=frozenset(row["custom_permissions"] or ()),
        acting=row["acting"],
    )

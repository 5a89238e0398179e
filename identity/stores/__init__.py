"""All of identity's SQL: one module a table, one transaction for all of them; it never decides what is allowed.

Every query that serves people names the organization, but for those that find out which one it is: a user by its
address, an API key by its id, OAuth2's clients, codes and tokens by theirs. Routers' leases are found by their router.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from identity import attempts
from identity.audit_chain import AuditEntry, AuditKeys
from identity.oauth_tokens import StoredToken
from identity.principals import Credential
from identity.revocations import Revocation, Subject
from identity.sessions import StoredSession
from identity.stores.api_keys import ApiKeyRows
from identity.stores.audit import AuditRows
from identity.stores.budget_alerts import BudgetAlertRows
from identity.stores.budget_leases import BudgetLeaseRows
from identity.stores.budget_overrides import BudgetOverrideRows
from identity.stores.budget_periods import BudgetPeriodRows
from identity.stores.budgets import BudgetRows
from identity.stores.configurations import ConfigurationRows
from identity.stores.creations import CreationRows
from identity.stores.credentials import HolderRows, find_credential
from identity.stores.invites import InviteRows
from identity.stores.issuers import IssuerRows, IssuerSignInRows, IssuerUserRows
from identity.stores.mfa import EnrollmentRows, MfaRequirementRows, RecoveryCodeRows, TotpRows
from identity.stores.oauth_clients import OauthClientRows
from identity.stores.oauth_grants import OauthAuthorizationRows, OauthGrantRows
from identity.stores.oauth_tokens import OauthTokenRows, find_token
from identity.stores.organizations import OrganizationRows
from identity.stores.passwords import PasswordRows, RecoveryRows
from identity.stores.policies import PolicyDecisionRows, PolicyRows, find_policy_versions
from identity.stores.revocations import RevocationRows
from identity.stores.roles import RoleRows
from identity.stores.rows import Connection
from identity.stores.scim import ScimGroupRows, ScimSettingsRows, ScimUserRows
from identity.stores.service_accounts import ServiceAccountRows
from identity.stores.sessions import ChallengeRows, SessionRows, find_session
from identity.stores.signing_keys import SigningKeyRows
from identity.stores.signing_secrets import SigningSecretRows
from identity.stores.throttles import ThrottleRows
from identity.stores.unpublished_events import UnpublishedEventRows
from identity.stores.users import UserRows
from mesh import context
from mesh.database import Database
from mesh.errors import PlatformError, Reason

# The name in 0004_row_level_security.sql.
_SETTING = "app.organization_id"
_EVERY_ORGANIZATION = "*"


def open_database(url: str) -> Database:
    """Identity's database, as the role that owns nothing. What no principal asks for sees every organization."""
    return Database(url, settings={"role": "aiaas_identity", _SETTING: _EVERY_ORGANIZATION})


class Transaction:
    """The tables as one transaction sees them. All of it happens, or none."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.organizations = OrganizationRows(connection)
        self.users = UserRows(connection)
        self.service_accounts = ServiceAccountRows(connection)
        self.api_keys = ApiKeyRows(connection)
        self.roles = RoleRows(connection)
        self.holders = HolderRows(connection)
        self.creations = CreationRows(connection)
        self.budgets = BudgetRows(connection)
        self.budget_periods = BudgetPeriodRows(connection)
        self.budget_leases = BudgetLeaseRows(connection)
        self.budget_overrides = BudgetOverrideRows(connection)
        self.budget_alerts = BudgetAlertRows(connection)
        self.unpublished_events = UnpublishedEventRows(connection)
        self.configurations = ConfigurationRows(connection)
        self.audit = AuditRows(connection)
        self.policies = PolicyRows(connection)
        self.policy_decisions = PolicyDecisionRows(connection)
        self.passwords = PasswordRows(connection)
        self.recoveries = RecoveryRows(connection)
        self.sessions = SessionRows(connection)
        self.challenges = ChallengeRows(connection)
        self.throttles = ThrottleRows(connection)
        self.totps = TotpRows(connection)
        self.totp_enrollments = EnrollmentRows(connection)
        self.recovery_codes = RecoveryCodeRows(connection)
        self.mfa_requirements = MfaRequirementRows(connection)
        self.signing_secrets = SigningSecretRows(connection)
        self.issuers = IssuerRows(connection)
        self.issuer_users = IssuerUserRows(connection)
        self.issuer_sign_ins = IssuerSignInRows(connection)
        self.scim_settings = ScimSettingsRows(connection)
        self.scim_users = ScimUserRows(connection)
        self.scim_groups = ScimGroupRows(connection)
        self.oauth_clients = OauthClientRows(connection)
        self.oauth_grants = OauthGrantRows(connection)
        self.oauth_authorizations = OauthAuthorizationRows(connection)
        self.oauth_tokens = OauthTokenRows(connection)
        self.signing_keys = SigningKeyRows(connection)
        self.invites = InviteRows(connection)
        self.revocations = RevocationRows(connection)

    async def revoke(self, subject: Subject, subject_id: str) -> None:
        """Have it announced, once this transaction is committed, that caches must forget the subject."""
        self.revocations.note(subject, subject_id)

    async def lock_bootstrap(self) -> None:
        """Wait for any other bootstrap to end; the lock goes with the transaction."""
        await self._connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('aiaas.identity.bootstrap', 0))")


class Store:
    """Identity's database. Every method raises PlatformError(UNAVAILABLE) while PostgreSQL is away.

    `audit_keys` sign the entries of calls that are recorded (identity.attempts); without them no such call is served.
    """

    def __init__(
        self,
        database: Database,
        announce: Callable[[Revocation], Awaitable[None]],
        audit_keys: AuditKeys | None = None,
    ) -> None:
        self._database = database
        self._announce = announce
        self._audit_keys = audit_keys

    @asynccontextmanager
    async def transaction(self, *, across: bool = False) -> AsyncIterator[Transaction]:
        """A transaction, committed at the end of the block; only then are its revocations announced.

        Within a call that is recorded it is committed, with its entry in the audit log, when the next one begins or
        the call ends: so nothing that takes long should come after it, or `settle` before that.

        It sees the organization of the principal that makes the call, whatever its statements say. It sees all of them
        for the platform, for what nobody calls, and `across` them, for what a person does beyond one.
        """
        await self.settle()
        principal = context.principal.get()
        async with AsyncExitStack() as opened:
            connection = await opened.enter_async_context(self._database.transaction())
            if principal is not None and not principal.platform and not across:
                await connection.execute("SELECT set_config($1, $2, true)", _SETTING, principal.organization_id)
            stored = Transaction(connection)
            yield stored
            held = _Held(opened.pop_all(), stored, self._announce, self._audit_keys)
        attempt = attempts.current.get()
        if attempt is None:
            await held.commit(None, even_unchanged=False)
        else:
            await attempt.hold(held)

    async def settle(self) -> None:
        """Commit now what the call that is served has changed so far, before it does something that takes long."""
        if attempt := attempts.current.get():
            await attempt.settle()

    async def record(self, stored: Transaction, entry: AuditEntry) -> None:
        """Write in a transaction what the platform does in it by itself; a store without keys has no audit log."""
        if self._audit_keys is not None:
            await stored.audit.append(entry, self._audit_keys)

    def joined(self, stored: Transaction) -> Store:
        """The same store, all of whose transactions are parts of one that has begun: nothing of them is committed
        before it is, and the failure of one is for it to answer."""
        return _JoinedStore(self._database, self._announce, stored)

    async def credential(self, api_key_id: str) -> Credential | None:
        """All that decides on an API key, in one query."""
        return await find_credential(self._database, api_key_id)

    async def session(self, session_id: str) -> StoredSession | None:
        """All that decides on a session, in one query."""
        return await find_session(self._database, session_id)

    async def oauth_token(self, oauth_token_id: str) -> StoredToken | None:
        """All that decides on an OAuth2 token, in one query."""
        return await find_token(self._database, oauth_token_id)

    async def policy_versions(self, organization_id: str) -> list[tuple[str, int]]:
        """The ids and versions of the policies that decide for an organization, in one query."""
        return await find_policy_versions(self._database, organization_id)


class _Held:
    """A transaction that its block has left without an error; see identity.attempts.Held."""

    def __init__(
        self,
        opened: AsyncExitStack,
        stored: Transaction,
        announce: Callable[[Revocation], Awaitable[None]],
        audit_keys: AuditKeys | None,
    ) -> None:
        self._opened = opened
        self._stored = stored
        self._announce = announce
        self._audit_keys = audit_keys

    async def commit(self, entry: AuditEntry | None, *, even_unchanged: bool) -> bool:
        """Commit it, with `entry` if it changed anything or `even_unchanged`; whether the entry is in it."""
        recorded = False
        async with self._opened:
            if entry is not None and (even_unchanged or await self._stored.audit.has_changed_anything()):
                if self._audit_keys is None:
                    raise PlatformError(Reason.INTERNAL)
                await self._stored.audit.append(entry, self._audit_keys)
                recorded = True
            revoked = await self._stored.revocations.write()
        for revocation in revoked:
            await self._announce(revocation)
        return recorded


class _JoinedStore(Store):
    def __init__(
        self, database: Database, announce: Callable[[Revocation], Awaitable[None]], stored: Transaction
    ) -> None:
        super().__init__(database, announce)
        self._stored = stored

    @asynccontextmanager
    async def transaction(self, *, across: bool = False) -> AsyncIterator[Transaction]:
        yield self._stored

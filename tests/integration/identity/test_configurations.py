"""Organizations as documents describe them, over gRPC and a real database."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import jsonschema
import pytest
import yaml

from aiaas.identity.v1 import budget_service_pb2, configuration_service_pb2_grpc, role_service_pb2, user_service_pb2
from aiaas.identity.v1 import configuration_service_pb2 as pb
from mesh.errors import Reason
from tests.integration.identity.harness import Identity, running_identity

DOCUMENT = """\
version: 1
roles:
  - name: Auditor
    permissions: [users.list, budgets.list]
members:
  - email: owner@example.com
    roles: [owner]
  - email: ada@example.com
    display_name: Ada
    roles: [developer, Auditor]
service_accounts:
  - name: Batch
    roles: [developer]
budgets:
  - name: Everything
    unit: cost
    interval: monthly
    limit: 5000000
  - name: Ada's tokens
    unit: tokens
    interval: daily
    limit: 1000
    enforcement: soft
    member: ada@example.com
    model: m
  - name: Batch's requests
    unit: requests
    interval: total
    limit: 10
    service_account: Batch
"""


class Configured:
    """An organization whose owner calls, unless told otherwise."""

    def __init__(self, identity: Identity, organization_id: str, secret: str) -> None:
        self.identity = identity
        self.organization_id = organization_id
        self.secret = secret
        self.stub = configuration_service_pb2_grpc.ConfigurationServiceStub(identity.channel)

    async def ask(self, rpc: str, secret: str | None = None, **fields: Any) -> Any:
        """The answer to an RPC of ConfigurationService about the organization."""
        request = getattr(pb, f"{rpc}Request")(organization_id=self.organization_id, **fields)
        return await self.identity.call(getattr(self.stub, rpc), request, secret or self.secret)

    async def apply(self, document: str, **fields: Any) -> pb.ApplyConfigurationResponse:
        """A document that could be applied."""
        response: pb.ApplyConfigurationResponse = await self.ask("ApplyConfiguration", document=document, **fields)
        assert not response.plan.problems
        return response

    async def refuse(self, rpc: str, **fields: Any) -> Any:
        """The error of an RPC that must fail."""
        request = getattr(pb, f"{rpc}Request")(organization_id=self.organization_id, **fields)
        return await self.identity.refused(getattr(self.stub, rpc), request, self.secret)

    async def export(self) -> dict[str, Any]:
        """The organization as it is."""
        found: dict[str, Any] = yaml.safe_load((await self.ask("ExportConfiguration")).document)
        return found

    async def state(self) -> Any:
        """How it and its document stand to each other."""
        return (await self.ask("GetConfiguration")).configuration


async def new_configured(identity: Identity) -> Configured:
    organization_id = await identity.organization()
    owner = await identity.member(organization_id, "owner", "owner@example.com")
    return Configured(identity, organization_id, owner.secret)


@pytest.fixture
async def configured(identity: Identity) -> Configured:
    """A new organization with an owner."""
    return await new_configured(identity)


def kinds(plan: pb.ConfigurationPlan) -> list[tuple[str, str, str]]:
    return [
        (
            pb.ConfigurationChangeKind.Name(change.kind).removeprefix("CONFIGURATION_CHANGE_KIND_"),
            change.resource_type,
            change.resource_name,
        )
        for change in plan.changes
    ]


async def test_plan_tells_what_would_change_and_changes_nothing(configured: Configured) -> None:
    before = await configured.export()
    plan = (await configured.ask("PlanConfiguration", document=DOCUMENT)).plan
    assert kinds(plan) == [
        ("CREATE", "role", "Auditor"),
        ("CREATE", "member", "ada@example.com"),
        ("CREATE", "service_account", "Batch"),
        ("CREATE", "budget", "Everything"),
        ("CREATE", "budget", "Ada's tokens"),
        ("CREATE", "budget", "Batch's requests"),
    ]
    assert '+ role Auditor\n    name: "Auditor"' in plan.text
    assert await configured.export() == before
    assert (await configured.state()).state == pb.CONFIGURATION_STATE_DISABLED


async def test_applied_document_is_what_the_organization_is(configured: Configured) -> None:
    applied = await configured.apply(DOCUMENT)
    assert applied.configuration.state == pb.CONFIGURATION_STATE_SYNCED
    exported, wanted = await configured.export(), yaml.safe_load(DOCUMENT)
    for section in ("roles", "members", "service_accounts", "budgets"):
        name = "email" if section == "members" else "name"
        found = {item[name]: item for item in exported[section]}
        for item in wanted[section]:
            lists = {key: sorted(value) if isinstance(value, list) else value for key, value in item.items()}
            assert {key: found[item[name]][key] for key in item} == lists
    assert not (await configured.ask("PlanConfiguration", document=DOCUMENT)).plan.changes
    revisions = (await configured.ask("ListConfigurationRevisions")).configuration_revisions
    assert [len(revision.changes) for revision in revisions] == [6]
    assert revisions[0].principal_id


async def test_exported_document_changes_nothing_and_holds_to_the_schema(configured: Configured) -> None:
    await configured.apply(DOCUMENT)
    document = (await configured.ask("ExportConfiguration")).document
    assert not (await configured.ask("PlanConfiguration", document=document, allow_deletions=True)).plan.changes
    request = pb.GetConfigurationSchemaRequest()
    answer = await configured.identity.call(configured.stub.GetConfigurationSchema, request, configured.secret)
    schema = json.loads(answer.schema_json)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(document), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"version": 1, "secrets": []}, schema)


async def test_nothing_is_removed_unless_it_is_asked_for(configured: Configured) -> None:
    await configured.apply(DOCUMENT)
    less = yaml.safe_dump({"version": 1, "budgets": [], "service_accounts": []})
    plan = (await configured.ask("PlanConfiguration", document=less)).plan
    assert {kind for kind, _, _ in kinds(plan)} == {"KEEP"}
    await configured.apply(less)
    assert len((await configured.export())["budgets"]) == 3
    await configured.apply(less, allow_deletions=True)
    exported = await configured.export()
    assert not exported.get("budgets")
    assert not exported.get("service_accounts")
    assert len(exported["members"]) == 2


async def test_a_change_is_shown_field_by_field(configured: Configured) -> None:
    await configured.apply(DOCUMENT)
    changed = DOCUMENT.replace("limit: 1000\n", "limit: 2000\n")
    plan = (await configured.apply(changed)).plan
    assert kinds(plan) == [("UPDATE", "budget", "Ada's tokens")]
    (field,) = plan.changes[0].fields
    assert (field.field, field.before_json, field.after_json) == ("limit", "1000", "2000")
    assert plan.text == "~ budget Ada's tokens\n    limit: 1000 -> 2000"


@pytest.mark.parametrize(
    ("document", "path", "line"),
    [
        ("version: 2\n", "version", 1),
        ("version: 1\nrolez: []\n", "", 1),
        (DOCUMENT.replace("limit: 1000\n", "limit: -1\n"), "budgets[1].limit", 22),
        (DOCUMENT.replace("name: Batch\n", "name: Batch\n    secret: x\n"), "service_accounts[0]", 12),
        (DOCUMENT + "  - name: Everything\n    unit: cost\n    interval: daily\n    limit: 1\n", "budgets[3].name", 31),
        ("version: 1\nroles: &a []\nmembers: *a\n", "", 3),
        ("version: [", "", 1),
    ],
    ids=["version", "section", "value", "field", "twice", "alias", "syntax"],
)
async def test_what_is_wrong_in_a_document_is_named_with_its_line(
    configured: Configured, document: str, path: str, line: int
) -> None:
    for rpc in ("PlanConfiguration", "ApplyConfiguration"):
        plan = (await configured.ask(rpc, document=document)).plan
        assert [(problem.path, problem.line) for problem in plan.problems] == [(path, line)]
        assert not plan.changes


@pytest.mark.parametrize(
    ("before", "after", "path"),
    [
        ("roles: [developer, Auditor]", "roles: [nobody]", "members[1]"),
        ("permissions: [users.list, budgets.list]", "permissions: [organizations.create]", "roles[0]"),
        ("member: ada@example.com", "member: eve@example.com", "budgets[1]"),
    ],
)
async def test_a_document_is_applied_whole_or_not_at_all(
    configured: Configured, before: str, after: str, path: str
) -> None:
    unchanged = await configured.export()
    response = await configured.ask("ApplyConfiguration", document=DOCUMENT.replace(before, after))
    assert [problem.path for problem in response.plan.problems] == [path]
    assert response.configuration.state == pb.CONFIGURATION_STATE_DISABLED
    assert await configured.export() == unchanged


async def test_what_a_budget_counts_cannot_be_changed(configured: Configured) -> None:
    await configured.apply(DOCUMENT)
    response = await configured.ask("ApplyConfiguration", document=DOCUMENT.replace("unit: tokens", "unit: requests"))
    assert [problem.path for problem in response.plan.problems] == ["budgets[1]"]


async def test_last_owner_stays(configured: Configured) -> None:
    response = await configured.ask("ApplyConfiguration", document="version: 1\nmembers: []\n", allow_deletions=True)
    assert "last owner" in response.plan.problems[0].message


async def test_nobody_applies_what_they_could_not_do_themselves(configured: Configured) -> None:
    role = role_service_pb2.Role(display_name="Applier", permissions=["configurations.apply", "roles.create"])
    request = role_service_pb2.CreateRoleRequest(organization_id=configured.organization_id, role=role)
    made = await configured.identity.call(configured.identity.roles.CreateRole, request, configured.secret)
    account = await configured.identity.service_account(configured.organization_id, role_ids=(made.role.role_id,))
    key = await configured.identity.key(
        configured.organization_id, *role.permissions, service_account_id=account.service_account_id
    )
    apply = pb.ApplyConfigurationRequest(organization_id=configured.organization_id, document=DOCUMENT)
    error = await configured.identity.refused(configured.stub.ApplyConfiguration, apply, key.secret)
    assert error.reason is Reason.PERMISSION_DENIED
    error = await configured.refuse("ApplyConfiguration", document="version: 1\norganization: {allowed_models: [m]}\n")
    assert error.reason is Reason.PERMISSION_DENIED


async def test_plan_that_is_out_of_date_is_not_applied(configured: Configured) -> None:
    plan = (await configured.ask("PlanConfiguration", document=DOCUMENT)).plan
    user = user_service_pb2.User(email="new@example.com", role_ids=["developer"])
    request = user_service_pb2.CreateUserRequest(organization_id=configured.organization_id, user=user)
    await configured.identity.call(configured.identity.users.CreateUser, request, configured.secret)
    error = await configured.refuse("ApplyConfiguration", document=DOCUMENT, fingerprint=plan.fingerprint)
    assert (error.reason, error.field) == (Reason.FAILED_PRECONDITION, "fingerprint")
    plan = (await configured.ask("PlanConfiguration", document=DOCUMENT)).plan
    await configured.apply(DOCUMENT, fingerprint=plan.fingerprint)


async def test_applying_again_with_the_same_request_id_changes_nothing(configured: Configured) -> None:
    await configured.apply(DOCUMENT, request_id="once")
    again = await configured.apply(DOCUMENT.replace("limit: 1000\n", "limit: 2000\n"), request_id="once")
    assert not again.plan.changes
    assert len((await configured.ask("ListConfigurationRevisions")).configuration_revisions) == 1


async def test_drift_is_told_and_what_brings_it_back(configured: Configured) -> None:
    await configured.apply(DOCUMENT)
    await drift(configured)
    assert (await configured.state()).state == pb.CONFIGURATION_STATE_DRIFTED
    assert (await configured.state()).drifted_resources == 1
    plan = (await configured.ask("GetConfigurationDrift")).plan
    assert kinds(plan) == [("UPDATE", "budget", "Everything")]
    await configured.apply(DOCUMENT)
    assert (await configured.state()).state == pb.CONFIGURATION_STATE_SYNCED


async def test_another_organizations_document_is_not_to_be_had(configured: Configured) -> None:
    other = await new_configured_beside(configured)
    for rpc in ("GetConfiguration", "ExportConfiguration", "GetConfigurationDrift", "SyncConfiguration"):
        request = getattr(pb, f"{rpc}Request")(organization_id=other)
        error = await configured.identity.refused(getattr(configured.stub, rpc), request, configured.secret)
        # As if it did not exist.
        assert error.reason is Reason.NOT_FOUND


async def new_configured_beside(configured: Configured) -> str:
    return await configured.identity.organization("Other")


async def drift(configured: Configured) -> None:
    """Somebody changes the first budget otherwise."""
    request = budget_service_pb2.ListBudgetsRequest(organization_id=configured.organization_id)
    budgets = await configured.identity.call(configured.identity.budgets.ListBudgets, request, configured.secret)
    (budget,) = [found for found in budgets.budgets if found.display_name == "Everything"]
    budget.limit = 7
    update = budget_service_pb2.UpdateBudgetRequest(
        organization_id=configured.organization_id, budget_id=budget.budget_id, budget=budget
    )
    update.update_mask.paths.append("limit")
    await configured.identity.call(configured.identity.budgets.UpdateBudget, update, configured.secret)


@pytest.fixture
async def watched(database_url: str, tmp_path: Path) -> AsyncIterator[tuple[Configured, Path]]:
    """An organization of an identity that watches a directory which git-sync keeps."""
    worktree = tmp_path / "worktrees" / ("0123456789" * 4)
    worktree.mkdir(parents=True)
    (tmp_path / "current").symlink_to(worktree)
    async with running_identity(database_url, tmp_path, configuration_path=str(tmp_path / "current")) as identity:
        configured = await new_configured(identity)
        yield configured, worktree / f"{configured.organization_id}.yaml"


async def test_document_of_the_watched_directory_is_applied_with_its_commit(
    watched: tuple[Configured, Path],
) -> None:
    configured, path = watched
    error = await configured.refuse("SyncConfiguration")
    assert error.reason is Reason.FAILED_PRECONDITION
    path.write_text(DOCUMENT)
    answer = await configured.ask("SyncConfiguration")
    assert len(answer.plan.changes) == 6
    assert answer.configuration.state == pb.CONFIGURATION_STATE_SYNCED
    assert (answer.configuration.source_path, answer.configuration.revision) == (path.name, "0123456789" * 4)
    assert answer.configuration.document_sha256


async def test_watched_directory_brings_back_what_drifted_unless_it_is_paused(
    watched: tuple[Configured, Path],
) -> None:
    configured, path = watched
    path.write_text(DOCUMENT)
    await configured.ask("SyncConfiguration")
    await configured.ask("PauseConfiguration", reason="an incident")
    await drift(configured)
    answer = await configured.ask("SyncConfiguration")
    assert answer.configuration.state == pb.CONFIGURATION_STATE_PAUSED
    assert answer.configuration.drifted_resources == 1
    await configured.ask("ResumeConfiguration")
    assert kinds((await configured.ask("SyncConfiguration")).plan) == [("UPDATE", "budget", "Everything")]
    assert (await configured.state()).state == pb.CONFIGURATION_STATE_SYNCED


async def test_document_that_cannot_be_applied_is_told_and_the_last_one_stays(
    watched: tuple[Configured, Path],
) -> None:
    configured, path = watched
    path.write_text(DOCUMENT)
    await configured.ask("SyncConfiguration")
    for broken in ("version: [", DOCUMENT.replace("roles: [developer]", "roles: [nobody]")):
        path.write_text(broken)
        answer = await configured.ask("SyncConfiguration")
        assert answer.configuration.state == pb.CONFIGURATION_STATE_FAILED
        assert (await configured.state()).problems[0].line
    path.write_text(DOCUMENT)
    assert (await configured.ask("SyncConfiguration")).configuration.state == pb.CONFIGURATION_STATE_SYNCED


async def test_watched_directory_removes_only_what_its_document_allows_it_to(
    watched: tuple[Configured, Path],
) -> None:
    configured, path = watched
    path.write_text(DOCUMENT)
    await configured.ask("SyncConfiguration")
    path.write_text("version: 1\nbudgets: []\n")
    assert {kind for kind, _, _ in kinds((await configured.ask("SyncConfiguration")).plan)} == {"KEEP"}
    path.write_text("version: 1\nallow_deletions: true\nbudgets: []\n")
    assert {kind for kind, _, _ in kinds((await configured.ask("SyncConfiguration")).plan)} == {"DELETE"}


async def test_watched_directory_is_looked_at_by_itself(database_url: str, tmp_path: Path) -> None:
    connection = await asyncpg.connect(database_url)
    await connection.execute(
        "INSERT INTO organizations (organization_id, display_name, create_time, update_time)"
        " VALUES ('org_watched', 'Watched', now(), now())"
    )
    await connection.close()
    (tmp_path / "org_watched.yaml").write_text(DOCUMENT)
    (tmp_path / "org_unknown.yaml").write_text(DOCUMENT)
    async with running_identity(database_url, tmp_path, configuration_path=str(tmp_path)) as identity:
        watched = Configured(identity, "org_watched", identity.admin)
        async with asyncio.timeout(10):
            while (await watched.state()).state != pb.CONFIGURATION_STATE_SYNCED:
                await asyncio.sleep(0.05)
        assert len((await watched.export())["members"]) == 2

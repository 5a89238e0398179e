"""ConfigurationService: requests to the domain, its answers back; it never decides anything."""

from aiaas.identity.v1 import audit_service_pb2, configuration_service_pb2_grpc
from aiaas.identity.v1 import configuration_service_pb2 as pb
from identity.configuration_directory import ConfigurationDirectory
from identity.configuration_documents import Change, Problem, schema
from identity.configurations import AppliedRevision, Configuration, Configurations, Plan
from identity.fields import check_id, check_reason
from identity.principals import caller
from mesh.conversions import to_timestamp
from mesh.pages import TimePlace, cut, read_page_size, read_token


class ConfigurationService(configuration_service_pb2_grpc.ConfigurationServiceServicer):
    """Declarative configuration."""

    def __init__(self, configurations: Configurations, directory: ConfigurationDirectory) -> None:
        self._configurations = configurations
        self._directory = directory

    async def GetConfiguration(
        self, request: pb.GetConfigurationRequest, context: object
    ) -> pb.GetConfigurationResponse:
        """How an organization and its document stand to each other."""
        found = await self._configurations.get(check_id(request.organization_id, "organization_id"))
        return pb.GetConfigurationResponse(configuration=_to_proto(found))

    async def ExportConfiguration(
        self, request: pb.ExportConfigurationRequest, context: object
    ) -> pb.ExportConfigurationResponse:
        """The organization as a document."""
        document = await self._configurations.export(check_id(request.organization_id, "organization_id"))
        return pb.ExportConfigurationResponse(document=document)

    async def GetConfigurationSchema(
        self, request: pb.GetConfigurationSchemaRequest, context: object
    ) -> pb.GetConfigurationSchemaResponse:
        """The schema of documents."""
        return pb.GetConfigurationSchemaResponse(schema_json=schema())

    async def PlanConfiguration(
        self, request: pb.PlanConfigurationRequest, context: object
    ) -> pb.PlanConfigurationResponse:
        """What a document would change."""
        organization_id = check_id(request.organization_id, "organization_id")
        plan = await self._configurations.plan(
            organization_id, request.document, allow_deletions=request.allow_deletions
        )
        return pb.PlanConfigurationResponse(plan=_plan_to_proto(plan))

    async def ApplyConfiguration(
        self, request: pb.ApplyConfigurationRequest, context: object
    ) -> pb.ApplyConfigurationResponse:
        """Apply a document."""
        plan, configuration = await self._configurations.apply(
            caller(),
            check_id(request.organization_id, "organization_id"),
            request.document,
            allow_deletions=request.allow_deletions,
            fingerprint=request.fingerprint,
            request_id=request.request_id,
        )
        return pb.ApplyConfigurationResponse(plan=_plan_to_proto(plan), configuration=_to_proto(configuration))

    async def GetConfigurationDrift(
        self, request: pb.GetConfigurationDriftRequest, context: object
    ) -> pb.GetConfigurationDriftResponse:
        """What would bring the organization back to its document."""
        plan = await self._configurations.drift(check_id(request.organization_id, "organization_id"))
        return pb.GetConfigurationDriftResponse(plan=_plan_to_proto(plan))

    async def SyncConfiguration(
        self, request: pb.SyncConfigurationRequest, context: object
    ) -> pb.SyncConfigurationResponse:
        """Read the watched directory now."""
        plan, configuration = await self._directory.sync(check_id(request.organization_id, "organization_id"))
        return pb.SyncConfigurationResponse(plan=_plan_to_proto(plan), configuration=_to_proto(configuration))

    async def PauseConfiguration(
        self, request: pb.PauseConfigurationRequest, context: object
    ) -> pb.PauseConfigurationResponse:
        """Stop applying the watched directory."""
        organization_id = check_id(request.organization_id, "organization_id")
        check_reason(request.reason, "reason", required=False)
        changed = await self._configurations.pause(organization_id, paused=True)
        return pb.PauseConfigurationResponse(configuration=_to_proto(changed))

    async def ResumeConfiguration(
        self, request: pb.ResumeConfigurationRequest, context: object
    ) -> pb.ResumeConfigurationResponse:
        """Apply the watched directory again."""
        organization_id = check_id(request.organization_id, "organization_id")
        check_reason(request.reason, "reason", required=False)
        changed = await self._configurations.pause(organization_id, paused=False)
        return pb.ResumeConfigurationResponse(configuration=_to_proto(changed))

    async def ListConfigurationRevisions(
        self, request: pb.ListConfigurationRevisionsRequest, context: object
    ) -> pb.ListConfigurationRevisionsResponse:
        """What was applied, newest first."""
        organization_id = check_id(request.organization_id, "organization_id")
        size, after = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._configurations.list_revisions(organization_id, after, size + 1)
        revisions, token = cut(
            request,
            rows,
            size,
            _revision_to_proto,
            lambda row: TimePlace(row.apply_time, row.configuration_revision_id),
        )
        return pb.ListConfigurationRevisionsResponse(configuration_revisions=revisions, next_page_token=token)


def _to_proto(configuration: Configuration) -> pb.Configuration:
    return pb.Configuration(
        organization_id=configuration.organization_id,
        state=pb.ConfigurationState.ValueType(configuration.state),
        source_path=configuration.source_path,
        revision=configuration.source_revision,
        document_sha256=configuration.document_sha256,
        sync_time=to_timestamp(configuration.sync_time) if configuration.sync_time else None,
        check_time=to_timestamp(configuration.check_time) if configuration.check_time else None,
        drifted_resources=configuration.drifted_resources,
        problems=map(_problem_to_proto, configuration.problems),
    )


def _plan_to_proto(plan: Plan) -> pb.ConfigurationPlan:
    return pb.ConfigurationPlan(
        changes=map(_change_to_proto, plan.changes),
        problems=map(_problem_to_proto, plan.problems),
        fingerprint=plan.fingerprint,
        text=plan.text,
    )


def _change_to_proto(change: Change) -> pb.ConfigurationChange:
    return pb.ConfigurationChange(
        kind=pb.ConfigurationChangeKind.ValueType(change.kind),
        resource_type=change.resource_type,
        resource_name=change.resource_name,
        fields=[
            audit_service_pb2.AuditChange(field=field.field, before_json=field.before_json, after_json=field.after_json)
            for field in change.fields
        ],
    )


def _problem_to_proto(problem: Problem) -> pb.ConfigurationProblem:
    return pb.ConfigurationProblem(path=problem.path, line=problem.line, message=problem.message)


def _revision_to_proto(applied: AppliedRevision) -> pb.ConfigurationRevision:
    return pb.ConfigurationRevision(
        configuration_revision_id=applied.configuration_revision_id,
        revision=applied.source_revision,
        document_sha256=applied.document_sha256,
        principal_id=applied.principal_id,
        apply_time=to_timestamp(applied.apply_time),
        changes=map(_change_to_proto, applied.changes),
    )

"""Every RPC of every contract says who may call it and how REST reaches it, and everything in a contract is explained.

The RPCs are read from the generated modules, so that a new one is held to all of this without being listed here.
"""

import importlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorSet, MethodOptions

from aiaas.type.v1 import options_pb2

STUBS = Path(options_pb2.__file__).parents[3]
DESCRIPTORS = STUBS.parent / "descriptors.binpb"

PERMISSION = re.compile(r"[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*")
PATH = re.compile(r"/(admin|analytics)/v1(/([a-z][a-z0-9]*(-[a-z0-9]+)*|\{[a-z][a-z0-9_]*\}))+(:[a-z][A-Za-z]*)?")
BRACED = re.compile(r"\{(\w+)\}")
VERBS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})
READ = re.compile(r"(Get|List|Query)[A-Z]")

# Whoever adds to these two opens a door: they are written out, so that it is seen.
PUBLIC = frozenset(
    {
        "aiaas.identity.v1.InviteService.AcceptInvite",
        "aiaas.identity.v1.InviteService.PreviewInvite",
        "aiaas.identity.v1.SessionService.CompleteRecovery",
        "aiaas.identity.v1.SessionService.CreateSession",
        "aiaas.identity.v1.SessionService.StartRecovery",
        "aiaas.identity.v1.SessionService.VerifyMfa",
    }
)
AUTHENTICATED = frozenset(
    {
        "aiaas.identity.v1.AuthService.GetCurrentPrincipal",
        "aiaas.identity.v1.ConfigurationService.GetConfigurationSchema",
        "aiaas.identity.v1.MfaService.ConfirmTotp",
        "aiaas.identity.v1.MfaService.DisableTotp",
        "aiaas.identity.v1.MfaService.EnrollTotp",
        "aiaas.identity.v1.MfaService.GetMfa",
        "aiaas.identity.v1.MfaService.RegenerateRecoveryCodes",
        "aiaas.identity.v1.OauthService.ListOauthGrants",
        "aiaas.identity.v1.OauthService.RevokeOauthGrant",
        "aiaas.identity.v1.SessionService.ChangePassword",
        "aiaas.identity.v1.SessionService.DeleteSession",
        "aiaas.identity.v1.SessionService.ListSessions",
        "aiaas.identity.v1.SessionService.SwitchOrganization",
    }
)

# Which services may call what is internal; whoever adds to this opens a door to the services alone.
CALLERS = {
    "aiaas.identity.v1.AuditService.RecordAuditEntries": {"router", "analytics", "edge"},
    "aiaas.identity.v1.AuthService": {"router", "analytics", "edge"},
    "aiaas.identity.v1.BudgetService": {"router"},
    "aiaas.identity.v1.BudgetService.QueryLedger": {"analytics"},
    "aiaas.identity.v1.FederationService": {"edge"},
    "aiaas.identity.v1.OauthService": {"edge"},
    "aiaas.identity.v1.PolicyService.Decide": {"router", "analytics"},
    "aiaas.identity.v1.RequestSigningService.VerifyRequestSignature": {"router", "analytics"},
    "aiaas.router.v1.InferenceService.Relay": {"edge"},
    "aiaas.router.v1.JournalService": {"router", "analytics"},
    "aiaas.router.v1.RouterService": {"analytics"},
}

# What needs a permission and names no organization: the platform's own resources, and inference, which acts in the
# organization of the credential. The object-level check has nothing to compare here, so this too is written out.
WITHOUT_ORGANIZATION = frozenset(
    {
        "aiaas.analytics.v1.IngestionService",
        "aiaas.analytics.v1.ReconciliationService",
        "aiaas.identity.v1.OauthService.RotateSigningKey",
        "aiaas.identity.v1.OrganizationService.CreateOrganization",
        "aiaas.identity.v1.OrganizationService.ListOrganizations",
        "aiaas.router.v1.BackendService",
        "aiaas.router.v1.InferenceService",
        "aiaas.router.v1.ModelService",
        "aiaas.router.v1.PriceService",
        "aiaas.router.v1.RouterService",
        "aiaas.router.v1.RoutingPolicyService",
    }
)


def _files() -> list[FileDescriptor]:
    names = sorted(str(path.relative_to(STUBS)) for path in (STUBS / "aiaas").rglob("*_pb2.py"))
    modules = [importlib.import_module(name.removesuffix(".py").replace("/", ".")) for name in names]
    return [module.DESCRIPTOR for module in modules]


def _methods() -> list[MethodDescriptor]:
    services = [service for file in FILES for service in file.services_by_name.values()]
    return [method for service in services for method in service.methods]


FILES = _files()
METHODS = _methods()


def _policy(method: MethodDescriptor) -> options_pb2.MethodPolicy:
    return method.GetOptions().Extensions[options_pb2.policy]


def _access(method: MethodDescriptor) -> str | None:
    return _policy(method).WhichOneof("access")


def _bound() -> Iterator[tuple[MethodDescriptor, options_pb2.RestBinding]]:
    for method in METHODS:
        if _policy(method).HasField("rest"):
            yield method, _policy(method).rest


def _reads(method: MethodDescriptor) -> bool:
    return method.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS


def _is_message(field: FieldDescriptor) -> bool:
    return field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated


def test_every_contract_file_is_looked_at() -> None:
    described = FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())
    assert sorted(file.name for file in FILES) == sorted(
        file.name for file in described.file if file.package.startswith("aiaas.")
    )
    assert len(METHODS) > 100


def test_every_rpc_declares_exactly_one_access() -> None:
    undeclared = [
        method.full_name
        for method in METHODS
        if (access := _access(method)) is None or not getattr(_policy(method), access)
    ]
    assert undeclared == []


def test_permissions_are_resource_and_verb_in_snake_case() -> None:
    odd = [
        (method.full_name, _policy(method).permission)
        for method in METHODS
        if _access(method) == "permission" and not PERMISSION.fullmatch(_policy(method).permission)
    ]
    assert odd == []


def test_only_the_listed_rpcs_are_public() -> None:
    assert {method.full_name for method in METHODS if _access(method) == "public"} == PUBLIC


def test_only_the_listed_rpcs_need_no_permission() -> None:
    assert {method.full_name for method in METHODS if _access(method) == "authenticated"} == AUTHENTICATED


def test_internal_rpcs_are_not_reachable_through_rest() -> None:
    assert [method.full_name for method, _ in _bound() if _access(method) == "internal"] == []


def _callers(method: MethodDescriptor) -> set[str]:
    return {options_pb2.Service.Name(caller).removeprefix("SERVICE_").lower() for caller in _policy(method).callers}


def test_internal_rpcs_name_the_listed_services_as_callers() -> None:
    internal = [method for method in METHODS if _access(method) == "internal"]
    listed = {
        method.full_name: CALLERS.get(method.full_name, CALLERS.get(method.full_name.rpartition(".")[0]))
        for method in internal
    }
    assert {method.full_name: _callers(method) for method in internal} == listed


def test_only_internal_rpcs_name_callers_and_tools_are_none_of_them() -> None:
    named = [method for method in METHODS if _callers(method)]
    assert [method.full_name for method in named if _access(method) != "internal"] == []
    assert [method.full_name for method in named if _callers(method) & {"tool", "unspecified"}] == []


def test_rest_verbs_are_allowed_and_carry_bodies_as_they_should() -> None:
    odd = [
        (method.full_name, rest.verb, rest.body)
        for method, rest in _bound()
        if rest.verb not in VERBS or bool(rest.body) != (rest.verb in {"POST", "PUT", "PATCH"})
    ]
    assert odd == []


def test_rest_paths_are_kebab_case_collections_with_verbs_after_a_colon() -> None:
    assert [(method.full_name, rest.path) for method, rest in _bound() if not PATH.fullmatch(rest.path)] == []


def test_path_fields_are_strings_of_the_request() -> None:
    wrong = [
        (method.full_name, name)
        for method, rest in _bound()
        for name in BRACED.findall(rest.path)
        if (field := method.input_type.fields_by_name.get(name)) is None
        or field.type != FieldDescriptor.TYPE_STRING
        or field.is_repeated
    ]
    assert wrong == []


def test_no_path_names_a_field_twice() -> None:
    repeated = [
        method.full_name
        for method, rest in _bound()
        if len(set(BRACED.findall(rest.path))) != len(BRACED.findall(rest.path))
    ]
    assert repeated == []


def test_bodies_are_the_request_or_a_message_of_it() -> None:
    wrong = [
        (method.full_name, rest.body)
        for method, rest in _bound()
        if rest.body not in {"", "*"}
        and ((field := method.input_type.fields_by_name.get(rest.body)) is None or not _is_message(field))
    ]
    assert wrong == []


def test_no_two_rpcs_share_verb_and_path() -> None:
    shapes = Counter((rest.verb, BRACED.sub("{}", rest.path)) for _, rest in _bound())
    assert [shape for shape, count in shapes.items() if count > 1] == []


def test_reads_are_marked_as_reads_and_bound_to_get() -> None:
    odd = [
        method.full_name
        for method in METHODS
        if READ.match(method.name)
        and (not _reads(method) or (_policy(method).HasField("rest") and _policy(method).rest.verb != "GET"))
    ]
    assert odd == []


def test_what_is_bound_to_get_is_marked_as_a_read_and_nothing_that_changes_is() -> None:
    odd = [
        (method.full_name, rest.verb)
        for method, rest in _bound()
        if (rest.verb == "GET" and not _reads(method)) or (rest.verb in {"PUT", "PATCH", "DELETE"} and _reads(method))
    ]
    assert odd == []


def test_standard_methods_have_their_verbs() -> None:
    verbs = {"Create": "POST", "Update": "PATCH", "Delete": "DELETE"}
    odd = [
        (method.full_name, rest.verb)
        for method, rest in _bound()
        for prefix, verb in verbs.items()
        if method.name.startswith(prefix) and rest.verb != verb
    ]
    assert odd == []


def test_updates_name_the_fields_that_change() -> None:
    masks = {
        method.full_name: method.input_type.fields_by_name.get("update_mask")
        for method in METHODS
        if method.name.startswith("Update")
    }
    assert [name for name, mask in masks.items() if mask is None] == []


def test_pages_have_a_size_and_a_next_token() -> None:
    odd = [
        method.full_name
        for method in METHODS
        if "page_token" in method.input_type.fields_by_name
        and not (
            "page_size" in method.input_type.fields_by_name and "next_page_token" in method.output_type.fields_by_name
        )
    ]
    assert odd == []


def test_what_needs_a_permission_names_the_organization_it_acts_on() -> None:
    without = {
        name
        for method in METHODS
        if _access(method) == "permission" and "organization_id" not in method.input_type.fields_by_name
        for name in [method.full_name]
        if name not in WITHOUT_ORGANIZATION and method.containing_service.full_name not in WITHOUT_ORGANIZATION
    }
    assert without == set()


def test_the_list_of_rpcs_without_organization_holds_nothing_else() -> None:
    needed = {
        name
        for method in METHODS
        if _access(method) == "permission" and "organization_id" not in method.input_type.fields_by_name
        for name in (method.full_name, method.containing_service.full_name)
    }
    assert WITHOUT_ORGANIZATION - needed == frozenset()


def test_a_request_that_names_an_organization_has_it_in_its_path() -> None:
    missing = [
        method.full_name
        for method, rest in _bound()
        if _access(method) == "permission"
        and "organization_id" in method.input_type.fields_by_name
        and "/organizations/{organization_id}" not in rest.path
    ]
    assert missing == []


def _reached(message: Descriptor, seen: set[str]) -> Iterator[FieldDescriptor]:
    if message.full_name in seen or not message.full_name.startswith("aiaas."):
        return
    seen.add(message.full_name)
    for field in message.fields:
        yield field
        if field.message_type is not None:
            yield from _reached(field.message_type, seen)


def test_no_number_with_a_fraction_is_money_or_an_amount() -> None:
    floating = {FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT}
    money = re.compile(r"cost|price|micros|amount|spent|leased|tokens?$|budget")
    seen: set[str] = set()
    fields = [
        field
        for method in METHODS
        for kind in (method.input_type, method.output_type)
        for field in _reached(kind, seen)
    ]
    assert [field.full_name for field in fields if field.type in floating and money.search(field.name)] == []


def _enum_paths(enum: EnumDescriptorProto, name: str, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    yield path, name
    for index, value in enumerate(enum.value):
        yield (*path, EnumDescriptorProto.VALUE_FIELD_NUMBER, index), f"{name}.{value.name}"


def _message_paths(message: DescriptorProto, name: str, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    if message.options.map_entry:
        return
    yield path, name
    for index, field in enumerate(message.field):
        yield (*path, DescriptorProto.FIELD_FIELD_NUMBER, index), f"{name}.{field.name}"
    # An optional field makes a oneof of its own, which nobody wrote and nobody can explain.
    written = {field.oneof_index for field in message.field if field.HasField("oneof_index")} - {
        field.oneof_index for field in message.field if field.proto3_optional
    }
    for index in sorted(written):
        yield (*path, DescriptorProto.ONEOF_DECL_FIELD_NUMBER, index), f"{name}.{message.oneof_decl[index].name}"
    for index, nested in enumerate(message.nested_type):
        here = (*path, DescriptorProto.NESTED_TYPE_FIELD_NUMBER, index)
        yield from _message_paths(nested, f"{name}.{nested.name}", here)
    for index, enum in enumerate(message.enum_type):
        yield from _enum_paths(enum, f"{name}.{enum.name}", (*path, DescriptorProto.ENUM_TYPE_FIELD_NUMBER, index))


def test_everything_in_a_contract_has_a_comment() -> None:
    described = FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())
    unexplained = []
    for file in described.file:
        if not file.package.startswith("aiaas."):
            continue
        paths: list[tuple[tuple[int, ...], str]] = []
        for index, message in enumerate(file.message_type):
            paths += _message_paths(message, message.name, (file.MESSAGE_TYPE_FIELD_NUMBER, index))
        for index, enum in enumerate(file.enum_type):
            paths += _enum_paths(enum, enum.name, (file.ENUM_TYPE_FIELD_NUMBER, index))
        for index, extension in enumerate(file.extension):
            paths.append(((file.EXTENSION_FIELD_NUMBER, index), extension.name))
        for index, service in enumerate(file.service):
            here = (file.SERVICE_FIELD_NUMBER, index)
            paths.append((here, service.name))
            paths += [
                ((*here, service.METHOD_FIELD_NUMBER, number), f"{service.name}.{method.name}")
                for number, method in enumerate(service.method)
            ]
        comments = {tuple(location.path): location.leading_comments for location in file.source_code_info.location}
        unexplained += [f"{file.name}: {name}" for path, name in paths if not comments.get(path, "").strip()]
    assert unexplained == []

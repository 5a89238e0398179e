"""OpenAI's administration API, read with OpenAI's own client, whose types judge every answer."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from openai import AsyncOpenAI, BadRequestError, NotFoundError, PermissionDeniedError

from aiaas.analytics.v1 import spend_service_pb2, usage_service_pb2
from aiaas.identity.v1 import (
    api_key_service_pb2,
    auth_service_pb2,
    organization_service_pb2,
    user_service_pb2,
)
from aiaas.type.v1 import principal_pb2, usage_event_pb2
from mesh.errors import PlatformError, Reason
from tests.doubles.peer import PeerDouble
from tests.integration.edge.harness import KEY, Edge

DAY_S = 86400
START_S = 1_767_225_600  # 2026-01-01T00:00:00Z
USAGE = usage_service_pb2
PRINCIPAL = auth_service_pb2.GetCurrentPrincipalResponse(principal=principal_pb2.Principal(organization_id="org_1"))


@pytest.fixture
async def client(edge: Edge) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        admin_api_key=KEY,
        api_key="unused",
        base_url=f"http://127.0.0.1:{edge.port}/v1",
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        yield client


def bucket(day: int, *group: tuple[USAGE.UsageDimension.ValueType, str], **totals: int) -> USAGE.UsageBucket:
    return USAGE.UsageBucket(
        start_time=Timestamp(seconds=START_S + day * DAY_S),
        end_time=Timestamp(seconds=START_S + (day + 1) * DAY_S),
        group=[USAGE.UsageGroupValue(dimension=dimension, value=value) for dimension, value in group],
        totals=USAGE.UsageTotals(**totals),
    )


def spent(day: int, *group: tuple[USAGE.UsageDimension.ValueType, str], **totals: int) -> spend_service_pb2.SpendBucket:
    return spend_service_pb2.SpendBucket(
        start_time=Timestamp(seconds=START_S + day * DAY_S),
        group=[USAGE.UsageGroupValue(dimension=dimension, value=value) for dimension, value in group],
        totals=spend_service_pb2.SpendTotals(**totals),
    )


async def test_usage_is_analytics_own_in_openais_words(
    client: AsyncOpenAI, identity: PeerDouble, analytics: PeerDouble
) -> None:
    identity.answers["GetCurrentPrincipal"] = PRINCIPAL
    model, key = USAGE.USAGE_DIMENSION_MODEL, USAGE.USAGE_DIMENSION_API_KEY
    sums = {"requests": 3, "prompt_tokens": 100, "cached_prompt_tokens": 40, "completion_tokens": 7}
    analytics.answers["QueryUsage"] = USAGE.QueryUsageResponse(buckets=[bucket(1, (model, "m"), (key, ""), **sums)])
    page = await client.admin.organization.usage.completions(
        start_time=START_S + 5,
        end_time=START_S + 3 * DAY_S,
        group_by=["model", "project_id", "api_key_id", "batch"],
        models=["m", "n/o"],
        user_ids=["u"],
    )
    assert [(part.start_time, part.end_time) for part in page.data] == [
        (START_S + day * DAY_S, START_S + (day + 1) * DAY_S) for day in range(3)
    ]
    assert [len(part.results) for part in page.data] == [0, 1, 0]
    assert (page.has_more, page.next_page) == (False, None)
    result: Any = page.data[1].results[0]
    assert result.to_dict() == {
        "object": "organization.usage.completions.result",
        "input_tokens": 100,
        "output_tokens": 7,
        "input_cached_tokens": 40,
        "input_uncached_tokens": 60,
        "num_model_requests": 3,
        "project_id": "org_1",
        "user_id": None,
        "api_key_id": None,
        "model": "m",
        "batch": False,
        "service_tier": None,
        "api_source": None,
    }
    (call,) = analytics.received
    assert call.metadata["authorization"] == f"Bearer {KEY}"
    request = call.request
    assert (request.organization_id, request.interval) == ("org_1", USAGE.USAGE_INTERVAL_DAY)
    assert (request.start_time.seconds, request.end_time.seconds) == (START_S, START_S + 3 * DAY_S)
    assert list(request.group_by) == [model, key]
    assert (list(request.filter.models), list(request.filter.user_ids)) == (["m", "n/o"], ["u"])
    assert usage_event_pb2.ENDPOINT_CHAT_COMPLETIONS in request.filter.endpoints
    assert usage_event_pb2.ENDPOINT_EMBEDDINGS not in request.filter.endpoints


async def test_pages_of_usage_are_ranges_of_time(
    client: AsyncOpenAI, identity: PeerDouble, analytics: PeerDouble
) -> None:
    identity.answers["GetCurrentPrincipal"] = PRINCIPAL
    starts: list[int] = []
    cursor: Any = {}
    for _ in range(3):
        page = await client.admin.organization.usage.embeddings(
            start_time=START_S, end_time=START_S + 5 * DAY_S - 60, limit=2, **cursor
        )
        starts += [part.start_time for part in page.data]
        cursor = {"page": page.next_page}
    assert cursor == {"page": None}
    assert starts == [START_S + day * DAY_S for day in range(5)]
    asked = [(call.request.start_time.seconds, call.request.end_time.seconds) for call in analytics.received]
    ends = [START_S + 2 * DAY_S, START_S + 4 * DAY_S, START_S + 5 * DAY_S - 60]
    assert asked == [(START_S, ends[0]), (ends[0], ends[1]), (ends[1], ends[2])]


class InTurn(dict[str, Any]):
    """Answers of which each is given once."""

    def get(self, name: str, default: Any = None) -> Any:
        return self[name].pop(0) if name in self else default


async def test_every_row_of_a_range_is_read(edge: Edge, identity: PeerDouble, analytics: PeerDouble) -> None:
    identity.answers["GetCurrentPrincipal"] = PRINCIPAL
    first = USAGE.QueryUsageResponse(buckets=[bucket(0, requests=1)], next_page_token="more")
    analytics.answers = InTurn(QueryUsage=[first, USAGE.QueryUsageResponse(buckets=[bucket(0, requests=2)])])
    response = await edge.client.get(f"/v1/organization/usage/completions?start_time={START_S}&end_time={START_S + 1}")
    results = response.json()["data"][0]["results"]
    assert [result["num_model_requests"] for result in results] == [1, 2]
    assert [call.request.page_token for call in analytics.received] == ["", "more"]


async def test_kinds_that_there_are_not_are_empty_buckets_for_those_who_may_see_them(
    client: AsyncOpenAI, identity: PeerDouble, analytics: PeerDouble
) -> None:
    identity.answers["GetCurrentPrincipal"] = PRINCIPAL
    usage = client.admin.organization.usage
    for kind in (
        usage.audio_speeches,
        usage.audio_transcriptions,
        usage.code_interpreter_sessions,
        usage.decisions,
        usage.file_search_calls,
        usage.images,
        usage.moderations,
        usage.vector_stores,
        usage.web_search_calls,
    ):
        page: Any = await kind(start_time=START_S, end_time=START_S + DAY_S)
        assert [part.results for part in page.data] == [[]]
        assert [call.rpc for call in analytics.received] == ["QueryUsage"]
        analytics.received.clear()


async def test_costs_are_dollars_for_each_line_item(
    client: AsyncOpenAI, identity: PeerDouble, analytics: PeerDouble
) -> None:
    identity.answers["GetCurrentPrincipal"] = PRINCIPAL
    costs = {"cost_micros": 1_500_001, "prompt_cost_micros": 1_000_001, "completion_cost_micros": 500_000}
    by_model = spent(0, (USAGE.USAGE_DIMENSION_MODEL, "m, x"), **costs)
    analytics.answers["QuerySpend"] = spend_service_pb2.QuerySpendResponse(buckets=[by_model])
    ask = client.admin.organization.usage.costs
    page = await ask(start_time=START_S, end_time=START_S + DAY_S, group_by=["line_item"])
    results: list[Any] = list(page.data[0].results)
    assert [(result.line_item, result.amount.value, result.amount.currency) for result in results] == [
        ("m, x, input", 1.000001, "usd"),
        ("m, x, output", 0.5, "usd"),
    ]
    page = await ask(start_time=START_S, end_time=START_S + DAY_S, group_by=["line_item"], line_items=["m, x, output"])
    assert [getattr(result, "line_item", "") for result in page.data[0].results] == ["m, x, output"]
    assert list(analytics.received[-1].request.filter.models) == ["m, x"]

    analytics.answers["QuerySpend"] = spend_service_pb2.QuerySpendResponse(buckets=[spent(0, cost_micros=7)])
    whole: Any = (await ask(start_time=START_S, end_time=START_S + DAY_S)).data[0].results[0]
    assert (whole.amount.value, whole.line_item, whole.project_id) == (0.000007, None, None)


async def test_another_project_is_for_analytics_to_refuse(
    client: AsyncOpenAI, identity: PeerDouble, analytics: PeerDouble
) -> None:
    analytics.answers["QueryUsage"] = PlatformError(Reason.ORGANIZATION_MISMATCH)
    with pytest.raises(NotFoundError):
        await client.admin.organization.usage.completions(start_time=START_S, project_ids=["org_2"])
    assert analytics.received[0].request.organization_id == "org_2"
    assert identity.received == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("", "start_time"),
        ("start_time=x", "start_time"),
        ("start_time=1&start_time=2", "start_time"),
        ("start_time=100&end_time=99", "end_time"),
        ("start_time=1&bucket_width=1m", "bucket_width"),
        ("start_time=1&limit=32", "limit"),
        ("start_time=1&limit=0", "limit"),
        ("start_time=1&group_by[]=size", "group_by"),
        ("start_time=86400&page=page_0", "page"),
        ("start_time=1&page=page_7", "page"),
        ("start_time=1&page=7", "page"),
        ("start_time=1&project_ids=a&project_ids=b", "project_ids"),
        ("start_time=1&batch=1", "batch"),
        ("start_time=1&no_such=1", "no_such"),
        (f"start_time={'9' * 5000}", "start_time"),
    ],
)
async def test_wrong_parameter_is_named(edge: Edge, analytics: PeerDouble, query: str, param: str) -> None:
    response = await edge.client.get(f"/v1/organization/usage/completions?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert analytics.received == []


async def test_credential_is_needed_and_only_reading_is_allowed(edge: Edge) -> None:
    for path in ("/v1/organization/costs", "/v1/organization/projects", "/v1/organization/projects/org_1/api_keys"):
        async with httpx.AsyncClient(base_url=edge.client.base_url, trust_env=False) as bare:
            assert (await bare.get(path)).status_code == 401
        assert (await edge.client.post(path, json={})).status_code == 405


def organization(number: int, **fields: Any) -> organization_service_pb2.Organization:
    return organization_service_pb2.Organization(
        organization_id=f"org_{number}", display_name=f"n{number}", create_time=Timestamp(seconds=number), **fields
    )


async def test_own_organization_is_the_only_project_of_a_tenant(client: AsyncOpenAI, identity: PeerDouble) -> None:
    identity.answers["GetCurrentPrincipal"] = PRINCIPAL
    identity.answers["GetOrganization"] = organization_service_pb2.GetOrganizationResponse(organization=organization(1))
    found = [project async for project in client.admin.organization.projects.list()]
    assert [(project.id, project.name, project.status) for project in found] == [("org_1", "n1", "active")]
    assert {call.rpc for call in identity.received} == {"GetCurrentPrincipal", "GetOrganization"}
    one = await client.admin.organization.projects.retrieve("org_1")
    assert (one.id, one.created_at, one.archived_at) == ("org_1", 1, None)


async def test_platform_administrators_page_through_all_projects(client: AsyncOpenAI, identity: PeerDouble) -> None:
    platform = principal_pb2.Principal(organization_id="platform", platform=True)
    identity.answers["GetCurrentPrincipal"] = auth_service_pb2.GetCurrentPrincipalResponse(principal=platform)
    deleted = organization(4, state=organization_service_pb2.ORGANIZATION_STATE_DELETED)
    identity.answers["ListOrganizations"] = organization_service_pb2.ListOrganizationsResponse(
        organizations=[*(organization(number) for number in range(4)), deleted, organization(5)]
    )
    projects = client.admin.organization.projects
    found = [project.id async for project in projects.list(limit=2)]
    assert found == ["org_0", "org_1", "org_2", "org_3", "org_5"]
    everything = [project async for project in projects.list(limit=100, include_archived=True)]
    assert [project.id for project in everything if project.status == "archived"] == ["org_4"]
    with pytest.raises(BadRequestError):
        await projects.list(after="org_9")


async def test_keys_are_listed_with_their_owners_and_without_their_texts(
    client: AsyncOpenAI, identity: PeerDouble
) -> None:
    def key(number: int, **fields: Any) -> api_key_service_pb2.ApiKey:
        return api_key_service_pb2.ApiKey(
            api_key_id=f"key_{number}",
            organization_id="org_1",
            display_name="k",
            create_time=Timestamp(seconds=5),
            **fields,
        )

    identity.answers["ListApiKeys"] = api_key_service_pb2.ListApiKeysResponse(
        api_keys=[
            key(1, user_id="usr_1", last_use_time=Timestamp(seconds=9)),
            key(2, user_id="usr_1"),
            key(3, service_account_id="sa_1", expire_time=Timestamp(seconds=11)),
            key(4),
        ]
    )
    user = user_service_pb2.User(user_id="usr_1", email="a@example.com", display_name="A")
    identity.answers["GetUser"] = user_service_pb2.GetUserResponse(user=user)
    identity.answers["GetServiceAccount"] = PlatformError(Reason.PERMISSION_DENIED)
    listed = [key async for key in client.admin.organization.projects.api_keys.list("org_1", limit=4)]
    first, _, third, fourth = listed
    assert (first.id, first.redacted_value, first.last_used_at) == ("key_1", "aias_key_1_***", 9)
    assert first.owner.user is not None
    assert (first.owner.type, first.owner.user.email) == ("user", "a@example.com")
    assert third.owner.service_account is not None
    assert (third.owner.service_account.id, third.owner.service_account.name, third.expires_at) == ("sa_1", "", 11)
    assert (fourth.owner.type, fourth.owner.user) == (None, None)
    assert [call.rpc for call in identity.received].count("GetUser") == 1
    asked = identity.received[0].request
    assert (asked.organization_id, asked.state) == ("org_1", api_key_service_pb2.API_KEY_STATE_ACTIVE)

    identity.answers["GetApiKey"] = api_key_service_pb2.GetApiKeyResponse(api_key=key(4))
    one = await client.admin.organization.projects.api_keys.retrieve("key_4", project_id="org_1")
    assert one.id == "key_4"


async def test_keys_of_another_organization_are_refused_by_identity(client: AsyncOpenAI, identity: PeerDouble) -> None:
    identity.answers["ListApiKeys"] = PlatformError(Reason.PERMISSION_DENIED)
    with pytest.raises(PermissionDeniedError):
        await client.admin.organization.projects.api_keys.list("org_2")

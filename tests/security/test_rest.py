"""Every REST route, whoever calls it: the verdict of the RPC behind it, or one of its own, as an HTTP status."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
from google.protobuf import json_format
from google.protobuf.message import Message

from deploy.local.stack import Stack
from edge.openapi.endpoint import FILES
from edge.peers import linked_services
from edge.scim.endpoints import KINDS
from edge.transcode.routes import WHOLE_REQUEST, Route, RouteTable
from tests.security.test_authorization import expected_of, places, request_of
from tests.security.verdicts import VERDICTS
from tests.security.world import CALLERS, STRANGERS, World

ROUTES = {f"{route.verb} {route.template}": route for route in RouteTable(linked_services()).routes}
OWN = [name for name in VERDICTS if " " in name]

_STATUS = {
    "missing_credentials": 401,
    "api_key_invalid": 401,
    "permission_denied": 403,
    "not_found": 404,
    "unimplemented": 501,
}
_VERBS = {"get", "post", "put", "patch", "delete"}


async def test_every_route_has_a_verdict(stack: Stack) -> None:
    async with aiohttp.ClientSession(stack.base_url) as session, session.get("/openapi.json") as answer:
        paths = (await answer.json())["paths"]
    served = {f"{verb.upper()} {path}" for path, operations in paths.items() for verb in operations if verb in _VERBS}
    undocumented = {f"GET {path}" for path in (*FILES, "/health", "/ready", "/metrics")}
    undocumented |= {f"GET /scim/v2/{kind}" for kind in KINDS} | {f"GET /scim/v2/{kind}/{{id}}" for kind in KINDS}
    undocumented |= {f"GET /scim/v2/{about}" for about in ("ServiceProviderConfig", "ResourceTypes")}
    assert served | undocumented == {*ROUTES, *OWN}


@pytest.mark.parametrize("part", range(8))
async def test_routes_answer_as_their_rpcs(world: World, part: int) -> None:
    wrong: list[str] = []
    async with _session(world) as session:

        async def judge(name: str, route: Route, who: str, where: str) -> None:
            request = request_of(route.method, world, where, who)
            path, query, body = _rest(route, request)
            expected = expected_of(route.method, who, where)
            status, told = await _answer(session, route.verb, path, world.credentials[who], query, body)
            # How one signs in has refusals of its own.
            refusals = (403, 500) if route.is_public else (401, 403, 500)
            if status in refusals if expected is None else status != _STATUS[expected]:
                wrong.append(f"{name}, {who}, {where} organization: {status} {told} instead of {expected}")

        for name, route in sorted(ROUTES.items())[part::8]:
            everybody = ((who, where) for who in (*CALLERS, *STRANGERS) for where in places(route.method))
            # An organization in the path cannot be left out.
            calls = [each for each in everybody if each[1] != "no" or "{organization_id}" not in route.template]
            await asyncio.gather(*(judge(name, route, *each) for each in calls))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", OWN)
async def test_routes_of_the_edge_itself_keep_their_verdicts(world: World, name: str) -> None:
    verb, template = name.split(" ")
    wrong: list[str] = []
    async with _session(world) as session:
        for who in (*CALLERS, *STRANGERS):
            is_report = "/organization/usage" in name or "/organization/costs" in name
            query = [("start_time", "1767225600")] if is_report else []
            status, told = await _answer(session, verb, template, world.credentials[who], query, {})
            if VERDICTS[name] == ["itself"]:
                is_right = status in (400, 401, 403)
            elif VERDICTS[name] == ["anybody"]:
                is_right = status == 200
            elif who in STRANGERS:
                is_right = status == 401
            elif who in VERDICTS[name]:
                is_right = status not in (401, 403, 500)
            else:
                is_right = status == 403
            if not is_right:
                wrong.append(f"{who}: {status} {told}")
    assert not wrong, "\n".join(wrong)


def _session(world: World) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(world.stack.base_url, timeout=aiohttp.ClientTimeout(total=20))


async def _answer(
    session: aiohttp.ClientSession,
    verb: str,
    path: str,
    credential: str,
    query: list[tuple[str, str]],
    body: Any,
) -> tuple[int, str]:
    is_form = verb == "POST" and path.startswith("/oauth2/")
    headers = {"Authorization": f"Bearer {credential}"} if credential else {}
    async with session.request(
        verb,
        path,
        headers=headers,
        params=query,
        json=body if verb not in ("GET", "DELETE") and not is_form else None,
        data={"grant_type": "none"} if is_form else None,
        allow_redirects=False,
    ) as answer:
        return answer.status, (await answer.text())[:200]


def _rest(route: Route, request: Message) -> tuple[str, list[tuple[str, str]], Any]:
    """A request as REST: its path, its query and its body."""
    fields = json_format.MessageToDict(request, preserving_proto_field_name=True)
    path = route.template
    for name in route.path_fields:
        path = path.replace(f"{{{name}}}", str(fields.pop(name, "none")))
    if route.body == WHOLE_REQUEST:
        return path, [], fields
    body = fields.pop(route.body, {}) if route.body else None
    return path, list(_flat(fields)), body


def _flat(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in fields.items():
        yield name, value if isinstance(value, str) else json.dumps(value)

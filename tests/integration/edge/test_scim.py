"""SCIM's own paths: documents pass through as they are, and errors have SCIM's shape and content type."""

import json

from aiaas.identity.v1 import scim_service_pb2 as pb
from mesh.errors import PlatformError, Reason
from tests.doubles.peer import PeerDouble
from tests.integration.edge.harness import KEY, Edge

USER = b'{"id":"user_1","userName":"ada@example.com"}'
RESOURCE = pb.ScimResource(scim_resource_id="user_1", resource_json=USER, version="v1")


async def test_documents_pass_through_both_ways(edge: Edge, peers: dict[str, PeerDouble]) -> None:
    identity = peers["identity"]
    identity.answers["CreateScimResource"] = pb.CreateScimResourceResponse(resource=RESOURCE)
    identity.answers["ReplaceScimResource"] = pb.ReplaceScimResourceResponse(resource=RESOURCE)
    made = await edge.client.post("/scim/v2/Users", content=USER, headers={"content-type": "application/scim+json"})
    assert (made.status_code, made.content) == (201, USER)
    assert made.headers["content-type"] == "application/scim+json"
    assert made.headers["etag"] == '"v1"'
    assert made.headers["location"] == "/scim/v2/Users/user_1"
    await edge.client.put("/scim/v2/Groups/group_1", content=USER, headers={"if-match": 'W/"v1"'})
    created, replaced = (received.request for received in identity.received)
    assert (created.resource_type, created.resource_json) == (pb.SCIM_RESOURCE_TYPE_USER, USER)
    assert (replaced.resource_type, replaced.scim_resource_id) == (pb.SCIM_RESOURCE_TYPE_GROUP, "group_1")
    assert replaced.version == "v1"
    assert identity.received[0].metadata["authorization"] == f"Bearer {KEY}"


async def test_list_is_asked_for_and_told_as_scim_has_it(edge: Edge, peers: dict[str, PeerDouble]) -> None:
    peers["identity"].answers["ListScimResources"] = pb.ListScimResourcesResponse(resources=[RESOURCE], total_results=7)
    query = {"filter": 'userName eq "a"', "startIndex": "3", "count": "2", "excludedAttributes": "groups, name"}
    listed = (await edge.client.get("/scim/v2/Users", params=query)).json()
    assert (listed["totalResults"], listed["startIndex"], listed["itemsPerPage"]) == (7, 3, 1)
    assert listed["Resources"] == [json.loads(USER)]
    asked = peers["identity"].received[0].request
    assert (asked.filter, asked.start_index, asked.count) == ('userName eq "a"', 3, 2)
    assert asked.excluded_attributes == ["groups", "name"]


async def test_deleted_is_no_content(edge: Edge) -> None:
    deleted = await edge.client.delete("/scim/v2/Users/user_1")
    assert (deleted.status_code, deleted.content) == (204, b"")


async def test_errors_have_scims_shape(edge: Edge, peers: dict[str, PeerDouble]) -> None:
    identity = peers["identity"]
    for error, status, scim_type in (
        (PlatformError(Reason.ALREADY_EXISTS, scim_type="uniqueness"), 409, "uniqueness"),
        (PlatformError(Reason.FAILED_PRECONDITION, field="version"), 412, None),
        (PlatformError(Reason.NOT_FOUND), 404, None),
    ):
        identity.answers["PatchScimResource"] = error
        answer = await edge.client.patch("/scim/v2/Users/user_1", content=b"{}")
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/scim+json"
        body = answer.json()
        assert body["schemas"] == ["urn:ietf:params:scim:api:messages:2.0:Error"]
        assert (body["status"], body.get("scimType")) == (str(status), scim_type)
    for path, status in (("/scim/v2/Nothing", 404), ("/scim/v2/Users?count=x", 400)):
        answer = await edge.client.get(path)
        assert (answer.status_code, answer.json()["status"]) == (status, str(status))
    answer = await edge.client.get("/scim/v2/Users", headers={"authorization": ""})
    assert (answer.status_code, answer.json()["status"]) == (401, "401")


async def test_directories_are_told_what_is_served(edge: Edge) -> None:
    about = (await edge.client.get("/scim/v2/ServiceProviderConfig")).json()
    assert (about["patch"]["supported"], about["bulk"]["supported"]) == (True, False)
    types = (await edge.client.get("/scim/v2/ResourceTypes")).json()
    assert [resource["endpoint"] for resource in types["Resources"]] == ["/Users", "/Groups"]

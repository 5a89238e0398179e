"""The OpenAPI document and its page: valid, complete, in step with the contracts, and readable without a network."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jsonschema
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from openapi_spec_validator import validate

from aiaas.type.v1 import options_pb2
from edge import oauth
from edge.openai.inference import ENDPOINTS
from edge.openai.organization import projects
from edge.openai.organization.usage import COSTS, USAGE
from edge.openapi.contracts import read_contracts
from edge.openapi.document import document
from edge.openapi.page import page
from edge.peers import linked_services
from edge.transcode.binding import RestRequest, bind
from edge.transcode.routes import RouteTable
from tests.doubles.throw_away_contract import with_throw_away

ROOT = Path(options_pb2.__file__).parents[5]
DOCUMENT: dict[str, Any] = json.loads((ROOT / "gen/openapi/openapi.json").read_text())
PAGE = (ROOT / "gen/openapi/index.html").read_text()
ROUTES = {route.method.name: route for route in RouteTable(linked_services()).routes}


def operations(described: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, verbs in described["paths"].items():
        for verb, operation in verbs.items():
            yield path, verb, operation


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with what it refers to, as a validator needs it."""
    return schema | {"components": DOCUMENT["components"]}


@pytest.fixture(scope="module")
def thrown_away(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document of a contract that nobody has written anything for."""
    return document(read_contracts(with_throw_away(tmp_path_factory.mktemp("proto"))))


def test_document_is_valid_openapi() -> None:
    validate(DOCUMENT)


def test_committed_files_are_what_the_contracts_make() -> None:
    made = document(read_contracts((ROOT / "gen/descriptors.binpb").read_bytes()))
    assert made == DOCUMENT, "run 'make generate' and commit the result"
    assert page(made) == PAGE, "run 'make generate' and commit the result"


def test_every_route_is_described_and_nothing_else() -> None:
    described = {(path, verb.upper()) for path, verb, _ in operations(DOCUMENT)}
    bound = {(route.template, route.verb) for route in ROUTES.values()}
    by_hand = {(path, "POST") for path in ENDPOINTS} | {(path, "GET") for path in (*USAGE, COSTS)}
    by_hand |= {(endpoint.route, "GET") for endpoint in projects.ENDPOINTS}
    by_hand |= {("/v1/models", "GET"), ("/v1/models/{model}", "GET")}
    by_hand |= {(path, verb) for path, served in oauth.endpoints(Mock()).items() for verb in served.verbs}
    assert described == bound | by_hand


def test_everything_that_is_described_says_what_it_is() -> None:
    silent = [name for name, schema in DOCUMENT["components"]["schemas"].items() if not schema.get("description")]
    silent += [path for path, _, operation in operations(DOCUMENT) if not operation["description"]]
    for path, _, operation in operations(DOCUMENT):
        if not path.startswith(("/v1/", "/oauth2/", "/.well-known/")):
            silent += [f"{path} {one['name']}" for one in operation.get("parameters", []) if not one.get("description")]
    assert silent == ["OpenAIModel"]


def test_operations_have_names_of_their_own() -> None:
    names = [operation["operationId"] for _, _, operation in operations(DOCUMENT)]
    assert len(names) == len(set(names))


def test_samples_are_what_their_schemas_say() -> None:
    checked = 0
    for _, _, operation in operations(DOCUMENT):
        for media in operation.get("requestBody", {}).get("content", {}).values():
            jsonschema.validate(media["example"], resolved(media["schema"]))
            checked += 1
    assert checked > 80


@pytest.mark.parametrize("name", sorted(name for name, route in ROUTES.items() if route.body))
def test_sample_of_a_body_can_be_bound(name: str) -> None:
    route = ROUTES[name]
    body = DOCUMENT["paths"][route.template][route.verb.lower()]["requestBody"]["content"]["application/json"]
    path_values = dict.fromkeys(route.path_fields, "x")
    request = bind(route, RestRequest(path_values, b"", json.dumps(body["example"]).encode()))
    assert json_format.MessageToDict(request)


@pytest.mark.parametrize("name", sorted(ROUTES))
def test_parameters_of_a_query_can_be_bound(name: str) -> None:
    route = ROUTES[name]
    words = {"int32": "1", "int64": "1", "uint64": "1", "date-time": "2026-01-31T12:00:00Z", "boolean": "true"}
    for parameter in DOCUMENT["paths"][route.template][route.verb.lower()].get("parameters", []):
        if parameter["in"] != "query":
            continue
        schema = parameter["schema"].get("items", parameter["schema"])
        if "$ref" in schema:
            schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        text = schema["enum"][-1] if "enum" in schema else words.get(schema.get("format") or schema["type"], "")
        path_values = dict.fromkeys(route.path_fields, "x")
        bind(route, RestRequest(path_values, f"{parameter['name']}={text}".encode()))


def test_new_contract_is_described_without_a_line_for_it(thrown_away: dict[str, Any]) -> None:
    validate(thrown_away)
    update = thrown_away["paths"]["/admin/v1/things/{thing_id}"]["patch"]
    assert update["summary"] == "Changes a thing"
    assert update["description"] == "Changes a thing. And more is said. Needs the permission `things.update`."
    assert (update["tags"], update["x-permission"]) == (["ThingService"], "things.update")
    assert [(one["in"], one["name"]) for one in update["parameters"]] == [
        ("path", "thing_id"),
        ("query", "update_mask"),
        ("header", "Idempotency-Key"),
        ("header", "If-Match"),
    ]
    body = update["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/Thing"}
    assert body["example"]["name"] == "spoon"
    assert "weight_grams" not in body["example"]
    assert "square" not in body["example"]
    assert "ETag" in update["responses"]["200"]["headers"]

    watch = thrown_away["paths"]["/admin/v1/things"]["get"]
    assert watch["security"] == []
    assert list(watch["responses"]["200"]["content"]) == ["application/x-ndjson"]
    assert {one["name"]: one["schema"] for one in watch["parameters"]} == {
        "filter.moods": {"type": "array", "items": {"$ref": "#/components/schemas/Mood"}},
        "filter.days": {"type": "integer", "format": "int64", "minimum": 0, "maximum": 4294967295},
    }

    thing = thrown_away["components"]["schemas"]["Thing"]
    assert thing["description"] == "A thing. At most one of `round`, `square` is set."
    properties = thing["properties"]
    assert properties["name"]["examples"] == ["spoon"]
    assert (properties["weight_grams"]["type"], properties["weight_grams"]["readOnly"]) == ("string", True)
    assert properties["counts"]["additionalProperties"] == {"type": "integer", "format": "int32"}
    assert properties["parts"]["items"] == {"$ref": "#/components/schemas/Thing"}
    assert properties["create_time"]["format"] == "date-time"
    assert properties["word"]["format"] == "password"
    assert thrown_away["components"]["schemas"]["Mood"]["enum"] == ["MOOD_UNSPECIFIED", "MOOD_WELL"]


def test_descriptors_without_comments_are_refused() -> None:
    bare = FileDescriptorSet.FromString((ROOT / "gen/descriptors.binpb").read_bytes())
    for file in bare.file:
        file.ClearField("source_code_info")
    with pytest.raises(ValueError, match="source_info"):
        read_contracts(bare.SerializeToString())


class Links(HTMLParser):
    """Collects what a page fetches, links to, and can be linked to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.targets: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            assert name not in ("src", "srcset", "style")
            assert not name.startswith("on")
            if name == "href":
                self.targets.append(value or "")
            if name == "id":
                self.ids.append(value or "")


def test_page_needs_no_network_and_its_links_lead_somewhere() -> None:
    links = Links()
    links.feed(PAGE)
    assert links.tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "form"})
    assert not re.search(r"url\(|@import", PAGE)
    assert len(links.ids) == len(set(links.ids))
    assert {target for target in links.targets if not target.startswith("#")} == {"/openapi.json"}
    assert {target.removeprefix("#") for target in links.targets if target.startswith("#")} <= set(links.ids)
    for _, _, operation in operations(DOCUMENT):
        assert operation["operationId"] in links.ids


def test_page_holds_no_markup_of_the_contracts() -> None:
    described = json.loads(json.dumps(DOCUMENT))
    described["paths"]["/v1/models"]["get"]["summary"] = "<script>alert(1)</script> `<b>`"
    shown = page(described)
    assert "<script" not in shown
    assert "<code>&lt;b&gt;</code>" in shown

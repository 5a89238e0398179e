"""What others have specified - OpenAI's /v1 and OAuth2's /oauth2 - for the OpenAPI document: which paths there are and
what they take, told briefly; the whole of it is told by those who made it."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from google.protobuf.descriptor import Descriptor, FieldDescriptor, ServiceDescriptor

from edge.openai.inference import ENDPOINTS
from edge.openai.organization import projects, shapes
from edge.openai.organization.usage import COST_PARAMETERS, COSTS, USAGE, USAGE_PARAMETERS
from edge.openapi.schemas import Schema, Schemas

_PREFIX = "OpenAI"
_TEXT: Schema = {"type": "string"}
_ANYTHING: Schema = {"type": "object", "additionalProperties": True}
_FORM = "application/x-www-form-urlencoded"

IDEMPOTENCY_KEY: Schema = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Makes a repeat safe: the same value for the same call.",
    "schema": {"type": "string", "pattern": "^[!-~]([ -~]{0,253}[!-~])?$"},
}
"""The header, wherever it is taken."""

_INFERENCE: Mapping[str, tuple[str, Schema, Any]] = {
    "/v1/chat/completions": (
        "messages",
        {"type": "array", "minItems": 1, "items": _ANYTHING},
        [{"role": "user", "content": "Hello!"}],
    ),
    "/v1/completions": ("prompt", {}, "Once upon a time"),
    "/v1/embeddings": ("input", {}, ["Hello!"]),
    "/v1/responses": ("input", {}, "Hello!"),
}
_ERROR: Schema = {
    "type": "object",
    "description": "An error as OpenAI has it.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MODEL: Schema = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": _TEXT,
    },
}
_ADMINISTRATION: Mapping[str, Schema] = {
    "start_time": {"type": "integer", "minimum": 0, "description": "Unix seconds, inclusive."},
    "end_time": {"type": "integer", "minimum": 0, "description": "Unix seconds, exclusive; without it, now."},
    "bucket_width": {"enum": ["1h", "1d"], "default": "1d"},
    "limit": {"type": "integer", "minimum": 1, "description": "At most so many on a page."},
    "page": {"type": "string", "description": "The next_page of the answer before."},
    "after": {"type": "string", "description": "The id of the last item that was seen."},
    "batch": {"type": "boolean"},
    "include_archived": {"type": "boolean"},
    "owner_project_access": {"enum": ["active", "inactive", "any"]},
}
_OAUTH_ERROR: Schema = {
    "type": "object",
    "description": "An error as RFC 6749, 5.2, has it.",
    "required": ["error"],
    "properties": {"error": {"type": "string", "examples": ["invalid_grant"]}, "error_description": _TEXT},
}
_CLIENT = ("client_id", "client_secret")
_AUTHORIZE = (
    "response_type",
    "client_id",
    "redirect_uri",
    "scope",
    "state",
    "nonce",
    "prompt",
    "code_challenge",
    "code_challenge_method",
)
_TOKEN = ("grant_type", "code", "redirect_uri", "code_verifier", "refresh_token", "scope", *_CLIENT)
_OAUTH_MESSAGES = ("OauthTokens", "OauthTokenState", "OauthUserInfo")


def add(
    paths: dict[str, dict[str, Any]],
    components: dict[str, Any],
    tags: list[Schema],
    schemas: Schemas,
    services: Iterable[ServiceDescriptor],
) -> None:
    """Add paths, tags and what they refer to. Raises ValueError where a name is taken already."""
    paths |= _inference() | _models() | _administration() | _oauth()
    added = {f"{_PREFIX}Error": _ERROR, f"{_PREFIX}Model": _MODEL, "OauthFailure": _OAUTH_ERROR}
    added |= _shapes() | _oauth_messages(schemas, services)
    if twice := added.keys() & components["schemas"].keys():
        raise ValueError(f"schemas with one name: {', '.join(sorted(twice))}")
    components["schemas"] = dict(sorted((components["schemas"] | added).items()))
    for name in (f"{_PREFIX}Error", "OauthFailure"):
        components["responses"][name] = _answer("What went wrong.", name)
    components["securitySchemes"]["client"] = {
        "type": "http",
        "scheme": "basic",
        "description": "An OAuth2 client's id and secret.",
    }
    tags[:0] = [
        {"name": "OpenAI", "description": "What OpenAI's clients call: https://platform.openai.com/docs/api-reference"},
        {
            "name": "OpenAI administration",
            "description": "What OpenAI's cost tools read. A project is an organization.",
        },
        {"name": "OAuth2", "description": "Tokens for applications: RFC 6749, 7636, 7662, 7009, OpenID Connect."},
    ]


def _inference() -> dict[str, dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {}
    for path in ENDPOINTS:
        name, schema, example = _INFERENCE.get(path, ("", {}, None))
        properties = {"model": _TEXT | {"examples": ["smollm2"]}, "stream": {"type": "boolean"}}
        taken: Schema = {"type": "object", "required": ["model"], "properties": properties}
        body: dict[str, Any] = {"model": "smollm2"}
        if name:
            taken["required"].append(name)
            properties[name] = schema
            body[name] = example
        operation = _operation(
            "OpenAI",
            f"infer{path.removeprefix('/v1').title().replace('/', '')}",
            f"Runs a model, as OpenAI's {path} does",
            {
                "description": "The model's answer; with `stream`, server-sent events that end with `[DONE]`.",
                "content": {"application/json": {"schema": _ANYTHING}, "text/event-stream": {"schema": _TEXT}},
            },
            f"{_PREFIX}Error",
            [IDEMPOTENCY_KEY],
        )
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": taken, "example": body}},
        }
        made[path] = {"post": operation}
    return made


def _models() -> dict[str, dict[str, Any]]:
    listed: Schema = {
        "type": "object",
        "required": ["object", "data"],
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": {"$ref": f"#/components/schemas/{_PREFIX}Model"}},
        },
    }
    many = {"description": "The models.", "content": {"application/json": {"schema": listed}}}
    one = _answer("The model.", f"{_PREFIX}Model")
    error = f"{_PREFIX}Error"
    id_ = _in_path("model", "The id; it may contain slashes.")
    return {
        "/v1/models": {"get": _operation("OpenAI", "listModels", "Lists the models that may be used", many, error)},
        "/v1/models/{model}": {"get": _operation("OpenAI", "getModel", "Returns one model", one, error, [id_])},
    }


def _administration() -> dict[str, dict[str, Any]]:
    page = _answer("Buckets in the order of time.", f"{_PREFIX}BucketPage")
    made = {}
    for path in USAGE:
        kind = path.rpartition("/")[2]
        made[path] = _reading(f"usage_{kind}", f"Sums usage: {kind.replace('_', ' ')}", page, USAGE_PARAMETERS)
    made[COSTS] = _reading("usage_costs", "Sums costs", page, COST_PARAMETERS)
    listed = _answer("Projects.", f"{_PREFIX}ProjectPage")
    keys = _answer("API keys.", f"{_PREFIX}ProjectApiKeyPage")
    described: Mapping[str, tuple[str, str, Schema, tuple[str, ...]]] = {
        projects.ProjectsEndpoint.route: ("listProjects", "Lists projects", listed, projects.PROJECT_PARAMETERS),
        projects.ProjectEndpoint.route: ("getProject", "Returns one project", _shape("Project"), ()),
        projects.ApiKeysEndpoint.route: ("listProjectApiKeys", "Lists API keys", keys, projects.KEY_PARAMETERS),
        projects.ApiKeyEndpoint.route: ("getProjectApiKey", "Returns one API key", _shape("ProjectApiKey"), ()),
    }
    for path, (name, summary, answer, parameters) in described.items():
        made[path] = _reading(name, summary, answer, parameters)
        in_path = [_in_path(part[1:-1], "The id.") for part in path.split("/") if part.startswith("{")]
        made[path]["get"]["parameters"] = in_path + made[path]["get"]["parameters"]
    return made


def _reading(name: str, summary: str, answer: Schema, parameters: Iterable[str]) -> dict[str, Any]:
    several: Schema = {"type": "array", "items": _TEXT}
    in_query = [
        {
            "name": parameter,
            "in": "query",
            "required": parameter == "start_time",
            "schema": _ADMINISTRATION.get(parameter, several),
        }
        for parameter in parameters
    ]
    return {"get": _operation("OpenAI administration", name, summary, answer, f"{_PREFIX}Error", in_query)}


def _oauth() -> dict[str, dict[str, Any]]:
    page = {"content": {"text/html": {"schema": _TEXT}}}
    needed = page | {"description": "A page that asks the user for consent, or goes on to the client."}
    wrong = page | {"description": "A page that says what is wrong, where the client may not hear of it."}
    sent = {"description": "To the client with a code or an error that it may see, or to sign-in."}
    begun = [{"name": name, "in": "query", "schema": _TEXT} for name in _AUTHORIZE]
    ask = _oauth_operation("authorize", "Asks for an authorization code, with PKCE", needed, begun)
    choose = _oauth_operation("consent", "Says what the user chose", needed)
    choose["requestBody"] = _form((*_AUTHORIZE, "consent_token", "consent"))
    for operation in (ask, choose):
        operation["responses"] |= {"303": sent, "default": wrong}
        operation["security"] = [{}, {"bearer": []}]
    token = _oauth_operation("token", "Makes tokens", _answer("The tokens.", "OauthTokens"))
    token["requestBody"] = _form(_TOKEN)
    introspect = _oauth_operation("introspect", "Tells what a token is (RFC 7662)", _answer("It.", "OauthTokenState"))
    introspect["requestBody"] = _form(("token", "token_type_hint", *_CLIENT))
    revoke = _oauth_operation("revoke", "Revokes a token (RFC 7009)", {"description": "It is revoked."})
    revoke["requestBody"] = _form(("token", "token_type_hint", *_CLIENT))
    for operation in (token, introspect, revoke):
        operation["security"] = [{"client": []}, {}]
    info = _answer("The user.", "OauthUserInfo")
    document = {"description": "A JSON document.", "content": {"application/json": {"schema": _ANYTHING}}}
    made: dict[str, dict[str, Any]] = {
        "/oauth2/authorize": {"get": ask, "post": choose},
        "/oauth2/token": {"post": token},
        "/oauth2/introspect": {"post": introspect},
        "/oauth2/revoke": {"post": revoke},
        "/oauth2/userinfo": {
            "get": _oauth_operation("getUserInfo", "Tells who an access token speaks for", info),
            "post": _oauth_operation("postUserInfo", "Tells who an access token speaks for", info),
        },
    }
    for path, name, summary in (
        ("/oauth2/keys", "listKeys", "Lists the public keys that tokens are verified with (RFC 7517)"),
        ("/.well-known/openid-configuration", "getOpenidConfiguration", "Describes the provider (OpenID Connect)"),
        ("/.well-known/oauth-authorization-server", "getAuthorizationServer", "Describes the provider (RFC 8414)"),
    ):
        made[path] = {"get": _oauth_operation(name, summary, document) | {"security": []}}
    return made


def _oauth_operation(name: str, summary: str, answer: Schema, parameters: Iterable[Schema] = ()) -> dict[str, Any]:
    return _operation("OAuth2", name, summary, answer, "OauthFailure", parameters)


def _form(fields: Iterable[str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": dict.fromkeys(fields, _TEXT)}
    return {"required": True, "content": {_FORM: {"schema": schema}}}


def _operation(
    tag: str, name: str, summary: str, answer: Schema, error: str, parameters: Iterable[Schema] = ()
) -> dict[str, Any]:
    return {
        "operationId": name,
        "tags": [tag],
        "summary": summary,
        "description": f"{summary}.",
        "parameters": list(parameters),
        "responses": {"200": answer, "default": {"$ref": f"#/components/responses/{error}"}},
    }


def _in_path(name: str, description: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "description": description, "schema": _TEXT}


def _answer(description: str, name: str) -> Schema:
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _shape(name: str) -> Schema:
    return _answer("As it is.", f"{_PREFIX}{name}")


def _shapes() -> dict[str, Schema]:
    """The answers of the administration API, from their types."""
    answers = (shapes.BucketPage, shapes.ProjectPage, shapes.ProjectApiKeyPage)
    template = f"#/components/schemas/{_PREFIX}{{name}}"
    _, made = msgspec.json.schema_components(answers, ref_template=template)
    return {f"{_PREFIX}{name}": schema for name, schema in made.items()}


def _oauth_messages(schemas: Schemas, services: Iterable[ServiceDescriptor]) -> dict[str, Schema]:
    """Messages that are answers of OAuth2: only fields that are set are there, and numbers are numbers."""
    files = {service.file.name: service.file for service in services}
    messages: dict[str, Descriptor] = {}
    for file in files.values():
        messages |= file.message_types_by_name
    made = {}
    for name in _OAUTH_MESSAGES:
        properties = {field.name: _plain(schemas.of(field), field) for field in messages[name].fields}
        said = schemas.comment(messages[name].full_name)
        made[name] = {"type": "object", "description": said, "properties": properties}
    return made


def _plain(schema: Schema, field: FieldDescriptor) -> Schema:
    if field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64):
        return {key: value for key, value in schema.items() if key not in ("format", "pattern")} | {"type": "integer"}
    return schema

"""Makes a request that a reader can begin with, from its schema alone; it never says what a server would accept."""

from collections.abc import Mapping
from typing import Any

from edge.openapi.schemas import CHOICES

_TEXTS = {"date-time": "2026-01-31T12:00:00Z", "int64": "1000000", "uint64": "1000000", "password": "********"}
_DEPTH = 4


def sample(schema: Mapping[str, Any], components: Mapping[str, Any], *, depth: int = 0) -> Any:
    """A value of the schema, with everything in it that a client may write; the contracts' own examples where there
    are some."""
    if "examples" in schema:
        return schema["examples"][0]
    if "$ref" in schema:
        return sample(components[schema["$ref"].rpartition("/")[2]], components, depth=depth)
    if "enum" in schema:
        # The first one says that nothing is said.
        return schema["enum"][min(1, len(schema["enum"]) - 1)]
    match schema.get("type"):
        case "object":
            return _object(schema, components, depth)
        case "array":
            return [sample(schema["items"], components, depth=depth + 1)] if depth < _DEPTH else []
        case "integer":
            return max(1, schema.get("minimum", 1))
        case "number":
            return 0.5
        case "boolean":
            return True
        case _:
            return "3600s" if schema.get("pattern", "").endswith("s$") else _TEXTS.get(schema.get("format", ""), "text")


def _object(schema: Mapping[str, Any], components: Mapping[str, Any], depth: int) -> dict[str, Any]:
    if depth >= _DEPTH:
        return {}
    written = {name: part for name, part in schema.get("properties", {}).items() if not part.get("readOnly")}
    excluded = {name for names in schema.get(CHOICES, ()) for name in names[1:]}
    return {name: sample(part, components, depth=depth + 1) for name, part in written.items() if name not in excluded}

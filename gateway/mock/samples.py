"""A value that satisfies a JSON schema, for structured output and for the arguments of tool calls.

The keywords are those that providers take for structured output
(https://platform.openai.com/docs/guides/structured-outputs#supported-schemas), and the usual bounds.
"""

import math
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 6  # levels of a schema that refers to itself; below it only what is required is filled in
_FORMATS = {
    "date-time": "2026-01-01T12:00:00Z",
    "date": "2026-01-01",
    "time": "12:00:00Z",
    "duration": "PT1H",
    "email": "mock@example.com",
    "hostname": "example.com",
    "uri": "https://example.com/",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uuid": "00000000-0000-4000-8000-000000000000",
}
_SCALARS: Mapping[str, Any] = {"boolean": True, "null": None}


def sample(schema: Any) -> Any:
    """The same value every time. A schema that says nothing gets a small object."""
    if not isinstance(schema, dict) or not schema:
        return {"answer": "mock"}
    return _sample(schema, schema, "answer", 0)


def _sample(schema: Any, root: Mapping[str, Any], name: str, depth: int) -> Any:
    if not isinstance(schema, dict):  # `true`: anything
        return "mock"
    schema = _resolve(schema, root)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for keyword in ("anyOf", "oneOf"):
        if schema.get(keyword):
            return _sample(_shallowest(schema[keyword], depth), root, name, depth + 1)
    match _type(schema):
        case "object":
            return _object(schema, root, depth)
        case "array":
            return _array(schema, root, name, depth)
        case "integer" | "number" as kind:
            return _number(schema, kind)
        case "string":
            return _string(schema, name)
        case kind:
            return _SCALARS.get(kind)


def _resolve(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with its reference followed and `allOf` taken together."""
    for _ in range(MAX_DEPTH):
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            break
        target: Any = root
        for step in reference.lstrip("#/").split("/") if reference != "#" else ():
            target = target.get(step, {}) if isinstance(target, dict) else {}
        schema = target if isinstance(target, dict) else {}
    merged = {key: value for key, value in schema.items() if key != "allOf"}
    for part in schema.get("allOf") or ():
        part = _resolve(part, root)
        merged = {
            **merged,
            **part,
            "properties": {**merged.get("properties", {}), **part.get("properties", {})},
            "required": [*merged.get("required", []), *part.get("required", [])],
        }
    return merged


def _shallowest(options: Any, depth: int) -> Any:
    """The first option; deep down the last, because `null` and leaves stand there."""
    return options[0] if depth < MAX_DEPTH else options[-1]


def _type(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((one for one in kind if one != "null"), "null")
    if isinstance(kind, str):
        return kind
    if "properties" in schema:
        return "object"
    return "array" if "items" in schema else "string"


def _object(schema: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> dict[str, Any]:
    properties = schema.get("properties") or {}
    required = schema.get("required") or ()
    return {
        name: _sample(properties.get(name), root, name, depth + 1)
        for name in {**properties, **dict.fromkeys(required)}
        if depth < MAX_DEPTH or (name in required and depth < 2 * MAX_DEPTH)
    }


def _array(schema: Mapping[str, Any], root: Mapping[str, Any], name: str, depth: int) -> list[Any]:
    least = schema.get("minItems", 0)
    count = min(max(least, 1 if depth < MAX_DEPTH else 0), schema.get("maxItems", 64), 64)
    return [_sample(schema.get("items"), root, name, depth + 1) for _ in range(count)]


def _number(schema: Mapping[str, Any], kind: str) -> int | float:
    """1 if the bounds allow it, else the allowed value next to it."""
    step = schema.get("multipleOf") or (1 if kind == "integer" else 0.5)
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    low = max(low, schema.get("exclusiveMinimum", -math.inf) + step)
    high = min(high, schema.get("exclusiveMaximum", math.inf) - step)
    value = min(max(1, low), high)
    if schema.get("multipleOf") or kind == "integer":
        value = math.ceil(value / step) * step
    return int(value) if kind == "integer" else value


def _string(schema: Mapping[str, Any], name: str) -> str:
    if schema.get("format") in _FORMATS:
        return _FORMATS[schema["format"]]
    text = f"mock {name}".replace("_", " ")
    return text.ljust(schema.get("minLength", 0), ".")[: schema.get("maxLength")]

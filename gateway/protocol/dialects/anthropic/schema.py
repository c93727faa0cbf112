"""Structured output, and the JSON schemas that it can be held to."""

from collections.abc import Mapping
from typing import Any

import orjson

from gateway.protocol.dialects.anthropic.errors import unsupported
from gateway.protocol.dialects.anthropic.models import Traits
from gateway.protocol.dialects.anthropic.objects import Json


def output_format(fields: Mapping[str, Any], traits: Traits) -> Json:
    wanted = fields.get("response_format") or {"type": "text"}
    if wanted["type"] == "json_schema" and wanted["json_schema"].get("schema"):
        if not traits.structured:
            raise unsupported("response_format", "this model cannot be held to a schema")
        schema = plain_schema(wanted["json_schema"]["schema"])
        description = wanted["json_schema"].get("description")
        if isinstance(description, str):
            schema.setdefault("description", description)
        return {"format": {"type": "json_schema", "schema": schema}}
    if wanted["type"] not in ("text", "json_object", "json_schema"):
        raise unsupported("response_format", f"no such type as {wanted['type']!r}")
    return {}


def wants_json_instruction(fields: Mapping[str, Any]) -> bool:
    """JSON without a schema can only be asked for in words. A prefilled `{` is refused from Claude 4.6 on."""
    wanted = fields.get("response_format") or {}
    return wanted.get("type") == "json_object" or (
        wanted.get("type") == "json_schema" and not wanted["json_schema"].get("schema")
    )


_SCHEMA_KEYS = frozenset({"type", "required", "title", "default", "enum", "const", "description"})
_SCHEMA_MAPS = frozenset({"properties", "$defs", "definitions"})
_SCHEMA_LISTS = {"anyOf": "anyOf", "oneOf": "anyOf", "allOf": "allOf"}
_SCHEMA_NOISE = frozenset({"$schema", "$id", "$comment", "additionalProperties", "examples", "deprecated"})
_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid"})


def plain_schema(schema: Mapping[str, Any]) -> Json:
    """A JSON schema with the keywords that constrained output has; the others become words of the description.

    https://platform.claude.com/docs/en/build-with-claude/structured-outputs#json-schema-limitations
    """
    if isinstance(schema.get("$ref"), str):
        return {"$ref": schema["$ref"]} | _definitions(schema)
    plain: Json = {}
    words: list[str] = []
    for key, value in schema.items():
        if key in _SCHEMA_KEYS or (key == "format" and isinstance(value, str) and value in _FORMATS):
            plain[key] = value
        elif key in _SCHEMA_MAPS and isinstance(value, dict):
            plain[key] = {name: _subschema(item) for name, item in value.items()}
        elif key in _SCHEMA_LISTS and isinstance(value, list):
            plain.setdefault(_SCHEMA_LISTS[key], []).extend(_subschema(item) for item in value)
        elif key == "items":
            plain[key] = _subschema(value)
        elif key not in _SCHEMA_NOISE or (key == "additionalProperties" and isinstance(value, dict)):
            words.append(f"{key}: {orjson.dumps(value).decode()}")
    kind = schema.get("type")
    if kind == "object" or (isinstance(kind, list) and "object" in kind) or "properties" in schema:
        plain["additionalProperties"] = False
    if words:
        description = schema.get("description")
        said = f"({', '.join(words)})"
        plain["description"] = f"{description} {said}" if isinstance(description, str) else said
    return plain


def _subschema(value: Any) -> Any:
    return plain_schema(value) if isinstance(value, dict) else value


def _definitions(schema: Mapping[str, Any]) -> Json:
    return {
        key: {name: _subschema(item) for name, item in schema[key].items()}
        for key in ("$defs", "definitions")
        if isinstance(schema.get(key), dict)
    }

"""JSON objects: read, written, and asked for their members."""

import json
from typing import Any

import orjson

from gateway.protocol.errors import UpstreamBadBody
from gateway.protocol.json_object import read_json

Json = dict[str, Any]


def json_object(data: bytes | str | None) -> Json | None:
    """The object in `data`; None when it holds none."""
    parsed = None if data is None else read_json(data)
    return parsed if isinstance(parsed, dict) else None


def dump(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # a lone surrogate: only the escaped form can be sent
        pass
    try:
        return json.dumps(value, separators=(",", ":")).encode()
    except RecursionError:
        raise UpstreamBadBody("the provider sent JSON that is nested too deep", kind="bad_event") from None


def object_of(source: Json, name: str) -> Json:
    value = source.get(name)
    return value if isinstance(value, dict) else {}


def text_of(source: Json, name: str) -> str:
    value = source.get(name)
    return value if isinstance(value, str) else ""


def index_of(event: Json) -> int:
    value = event.get("index")
    return value if isinstance(value, int) else -1

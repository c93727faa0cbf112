"""A JSON object read so that every parser reads the same in it, and changed so that all its other bytes stay."""

import json
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.protocol.errors import InvalidJSON

MAX_DEPTH = 64  # of nested JSON; deeper than any tool schema seen, far below what breaks a parser


MAX_CONTAINERS = 1_000_000  # arrays and objects, by their brackets; a body of nothing else costs 200 bytes for each


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`, in which every parser reads the same: no duplicate keys, NaN or lone surrogates."""
    if len(body) > MAX_CONTAINERS and body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
        raise InvalidJSON(f"the request body has more than {MAX_CONTAINERS} brackets")
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidJSON(f"the request body is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise InvalidJSON("the request body must be a JSON object")
    keys, colons = _measure(parsed)
    # Every key has one colon outside strings. When no colon hides behind an escape, a count that differs means that the
    # parser dropped a key it had seen before. The slow parser then names it.
    if body.count(b":") != keys + colons or b"\\u003a" in body or b"\\u003A" in body:
        _refuse_duplicates(body)
    return parsed


def _measure(root: Any) -> tuple[int, int]:
    """How many keys, and how many colons inside strings; refuses what is nested too deep."""
    keys = colons = 0
    level: list[Any] = [root]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                colons += value.count(":")
            elif isinstance(value, dict):
                keys += len(value)
                for key in value:
                    colons += key.count(":")
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
        if not below:
            return keys, colons
        level = below
    raise InvalidJSON(f"the request body is nested deeper than {MAX_DEPTH} levels")


def _refuse_duplicates(body: bytes) -> None:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise InvalidJSON(f"the request body has the key {key[:64]!r} twice in one object")
            seen[key] = value
        return seen

    try:
        json.loads(body, object_pairs_hook=unique, parse_int=float)
    except RecursionError:  # what the duplicate hid from `_measure`
        raise InvalidJSON(f"the request body is nested deeper than {MAX_DEPTH} levels") from None


_space = json.decoder.WHITESPACE.match  # type: ignore[attr-defined]


def edit_object(body: bytes, changes: Mapping[str, Any]) -> bytes:
    """`body`, a JSON object without duplicate keys, with top-level values replaced or added; other bytes stay."""
    text = body.decode("utf-8")
    spans = _value_spans(text)
    edits = sorted((spans[name], value) for name, value in changes.items() if name in spans)
    out, at = [], 0
    for (start, end), value in edits:
        out += [text[at:start], orjson.dumps(value).decode()]
        at = end
    edited = "".join([*out, text[at:]])
    added = {name: value for name, value in changes.items() if name not in spans}
    if added:
        head = edited.index("{") + 1
        comma = "," if spans else ""
        edited = edited[:head] + orjson.dumps(added)[1:-1].decode() + comma + edited[head:]
    return edited.encode()


def _value_spans(text: str) -> dict[str, tuple[int, int]]:
    """Where the value of each top-level key stands."""
    decoder = json.JSONDecoder()
    spans: dict[str, tuple[int, int]] = {}
    at = _space(text, text.index("{") + 1).end()
    while text[at] != "}":
        key, at = decoder.raw_decode(text, at)
        start = _space(text, _space(text, at).end() + 1).end()  # past the colon
        _, end = decoder.raw_decode(text, start)
        spans[key] = (start, end)
        at = _space(text, end).end()
        if text[at] == ",":
            at = _space(text, at + 1).end()
    return spans


def read_json(data: bytes | str) -> Any:
    """The parsed JSON, or None. Half an emoji in a delta (a lone surrogate) is refused by orjson, not by us."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            return json.loads(data if isinstance(data, str) else data.decode("utf-8"))
        except (ValueError, RecursionError):
            return None

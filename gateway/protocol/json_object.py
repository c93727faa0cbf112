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
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        _check_depth(parsed)
    # What we parsed, written again, has a colon less for each key that the parser dropped because it came twice, unless
    # a colon hides behind an escape. The slow parser then names the key.
    hidden = b"\\u003" in body and (b"\\u003a" in body or b"\\u003A" in body)
    if hidden or body.count(b":") != orjson.dumps(parsed).count(b":"):
        _refuse_duplicates(body)
    return parsed


def _check_depth(root: Any) -> None:
    level: list[Any] = [root]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
        if not below:
            return
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
    except RecursionError:  # what the duplicate hid from `_check_depth`
        raise InvalidJSON(f"the request body is nested deeper than {MAX_DEPTH} levels") from None


_space = json.decoder.WHITESPACE.match  # type: ignore[attr-defined]


def edit_object(body: bytes, changes: Mapping[str, Any], fields: Mapping[str, Any] | None = None) -> bytes:
    """`body`, a JSON object without duplicate keys, with top-level values replaced or added; other bytes stay.

    `fields` is the same object, parsed: with it nothing is looked for in the bytes that is not there.
    """
    if fields and changes.keys().isdisjoint(fields):
        return _add_members(body, changes, comma=b",")
    text = body.decode("utf-8")
    spans = _value_spans(text)
    edits = sorted((spans[name], value) for name, value in changes.items() if name in spans)
    out, at = [], 0
    for (start, end), value in edits:
        out += [text[at:start], orjson.dumps(value).decode()]
        at = end
    edited = "".join([*out, text[at:]]).encode()
    added = {name: value for name, value in changes.items() if name not in spans}
    return _add_members(edited, added, comma=b"," if spans else b"") if added else edited


def _add_members(body: bytes, added: Mapping[str, Any], comma: bytes) -> bytes:
    head = body.index(b"{") + 1
    return body[:head] + orjson.dumps(added)[1:-1] + comma + body[head:]


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

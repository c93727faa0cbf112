"""A request as a server of OpenAI's dialect takes it: the client's bytes, but where the provider differs.

What a vendor does differently is in its Provider, field by field; this is the only place that reads these fields.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from gateway.protocol.json_object import edit_object
from gateway.protocol.request import Call, UpstreamRequest
from gateway.protocol.routing import Provider

_ALPHANUMERIC = re.compile(r"[A-Za-z0-9]+")
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def request(call: Call, path: str) -> UpstreamRequest:
    asked, provider = call.asked, call.target.provider
    changes: dict[str, Any] = {}
    if call.target.model != asked.model:
        changes["model"] = call.target.model
    if asked.stream and provider.asks_usage and not asked.wants_usage:
        options = asked.fields.get("stream_options") or {}
        changes["stream_options"] = {**options, "include_usage": True}
    if asked.kind != "chat":  # what a vendor does differently is of chat
        return UpstreamRequest(path, edit_object(asked.body, changes, asked.fields) if changes else asked.body)
    if (provider.roles or provider.tool_id_length) and (messages := _messages(asked.messages, provider)) is not None:
        changes["messages"] = messages
    if (provider.renames or provider.drops) and (fields := _renamed(asked.fields, provider)) is not None:
        body = orjson.dumps({**fields, **changes})
    else:
        body = edit_object(asked.body, changes, asked.fields) if changes else asked.body
    return UpstreamRequest(path, body)


def _renamed(fields: Mapping[str, Any], provider: Provider) -> dict[str, Any] | None:
    """The parameters under the provider's names, without those that it refuses; None: they are that already.

    Of two that become one, the one that has the provider's name stays.
    """
    if fields.keys().isdisjoint(provider.renames) and fields.keys().isdisjoint(provider.drops):
        return None
    kept = {name: value for name, value in fields.items() if name not in provider.drops}
    for name, theirs in provider.renames.items():
        if name in kept:
            value = kept.pop(name)
            if kept.get(theirs) is None:
                kept[theirs] = value
    return kept


# --- messages -----------------------------------------------------------------------------------------------------


def _messages(messages: list[dict[str, Any]], provider: Provider) -> list[dict[str, Any]] | None:
    """With the provider's roles and ids of tool calls; None: they have them already."""
    changed = [{**message, **dict(_changes(message, provider))} for message in messages]
    return changed if changed != messages else None


def _changes(message: Mapping[str, Any], provider: Provider) -> Iterator[tuple[str, Any]]:
    role = message.get("role")
    if isinstance(role, str) and role in provider.roles:
        yield "role", provider.roles[role]
    if provider.tool_id_length:
        if isinstance(called := message.get("tool_call_id"), str):
            yield "tool_call_id", _short_id(called, provider.tool_id_length)
        if isinstance(calls := message.get("tool_calls"), list):
            yield "tool_calls", [_with_short_id(call, provider.tool_id_length) for call in calls]


def _with_short_id(call: Any, length: int) -> Any:
    if isinstance(call, dict) and isinstance(call.get("id"), str):
        return {**call, "id": _short_id(call["id"], length)}
    return call


def _short_id(given: str, length: int) -> str:
    """Letters and digits of that length, the same for the same id: a call and its result still belong together."""
    if len(given) == length and _ALPHANUMERIC.fullmatch(given):
        return given
    number = int.from_bytes(hashlib.blake2b(given.encode()).digest())
    digits = []
    for _ in range(length):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return "".join(digits)

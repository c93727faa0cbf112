"""Tools: those that a client offers, and which of them the model may or must call."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gateway.protocol.dialects.anthropic.errors import unsupported
from gateway.protocol.dialects.anthropic.models import Traits
from gateway.protocol.dialects.anthropic.names import legal_name
from gateway.protocol.dialects.anthropic.objects import Json
from gateway.protocol.dialects.anthropic.parts import cache_control
from gateway.protocol.dialects.anthropic.schema import plain_schema
from gateway.protocol.errors import InvalidRequest


class Tool(NamedTuple):
    """A tool as the client knows it."""

    name: str
    custom: bool = False  # its input is a text, not an object


def offered_tools(fields: Mapping[str, Any]) -> dict[str, Tool]:
    """The client's tools by the names under which Anthropic gets them. Never raises: what is wrong with a tool is for
    `messages_body` to say."""
    tools: dict[str, Tool] = {}
    for tool in fields.get("tools") or ():
        spec = tool.get(tool["type"])
        if isinstance(spec, dict) and isinstance(spec.get("name"), str):
            tools[legal_name(spec["name"])] = Tool(spec["name"], custom=tool["type"] == "custom")
    return tools


def tools_and_choice(fields: Mapping[str, Any], traits: Traits, turns: Sequence[Json]) -> Json:
    """`tools` and `tool_choice`."""
    choice = fields.get("tool_choice") or "auto"
    tools = [_tool(f"tools[{index}]", tool, traits) for index, tool in enumerate(fields.get("tools") or ())]
    if isinstance(choice, dict) and choice["type"] == "allowed_tools":
        choice, tools = _allow(choice.get("allowed_tools"), tools)
    if not tools:
        return _no_tools(choice, turns)
    wanted = _tool_choice(choice, tools)
    if fields.get("parallel_tool_calls") is False and wanted["type"] != "none":
        wanted["disable_parallel_tool_use"] = True
    return {"tools": tools} | ({} if wanted == {"type": "auto"} else {"tool_choice": wanted})


def _tool(where: str, tool: Json, traits: Traits) -> Json:
    if tool["type"] == "function":
        return _function(tool, traits)
    if tool["type"] == "custom":
        return _custom(where, tool)
    raise unsupported(f"{where}.type", "only function and custom tools")


def _function(tool: Json, traits: Traits) -> Json:
    function = tool["function"]
    schema = {"type": "object", "properties": {}} | (function.get("parameters") or {}) | {"type": "object"}
    strict = function.get("strict") is True and traits.structured
    sent: Json = {"name": legal_name(function["name"])}
    if function.get("description"):
        sent["description"] = function["description"]
    sent["input_schema"] = plain_schema(schema) if strict else schema
    if strict:
        sent["strict"] = True
    return sent | cache_control(tool, function)


def _custom(where: str, tool: Json) -> Json:
    """A tool that takes a text: Anthropic's tools take an object, so the text travels as its one member."""
    custom = tool.get("custom")
    if not isinstance(custom, dict) or not isinstance(custom.get("name"), str) or not custom["name"]:
        raise InvalidRequest(
            f"invalid {where}.custom.name: a non-empty string is required", param=f"{where}.custom.name"
        )
    if (custom.get("format") or {"type": "text"}) != {"type": "text"}:
        raise unsupported(f"{where}.custom.format", "a grammar cannot be enforced")
    schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
    sent: Json = {"name": legal_name(custom["name"]), "input_schema": schema}
    if isinstance(custom.get("description"), str):
        sent["description"] = custom["description"]
    return sent | cache_control(tool, custom)


def _no_tools(choice: Any, turns: Sequence[Json]) -> Json:
    """A conversation that used tools must define them, also when no more are offered
    (https://github.com/anthropics/anthropic-sdk-python/issues/494)."""
    if choice not in ("auto", "none"):
        raise InvalidRequest("invalid tool_choice: it needs tools", param="tool_choice")
    used = {block["name"]: None for turn in turns for block in turn["content"] if block["type"] == "tool_use"}
    if not used:
        return {}
    empty = {"type": "object", "properties": {}}
    return {
        "tools": [{"name": name, "input_schema": empty} for name in used],
        "tool_choice": {"type": "none"},
    }


_TOOL_CHOICES = {"auto": "auto", "none": "none", "required": "any"}


def _tool_choice(choice: Any, tools: Sequence[Json]) -> Json:
    if isinstance(choice, str) and choice in _TOOL_CHOICES:
        return {"type": _TOOL_CHOICES[choice]}
    name = _chosen_name(choice)
    if name is None or all(tool["name"] != name for tool in tools):
        raise InvalidRequest(
            "invalid tool_choice: auto, none, required or one of tools is required", param="tool_choice"
        )
    return {"type": "tool", "name": name}


def _chosen_name(choice: Any) -> str | None:
    """The sent name in `{"type":"function","function":{"name"}}` or the same of a custom tool."""
    if not isinstance(choice, dict) or choice.get("type") not in ("function", "custom"):
        return None
    spec = choice.get(choice["type"])
    name = spec.get("name") if isinstance(spec, dict) else None
    return legal_name(name) if isinstance(name, str) else None


def _allow(allowed: Any, tools: Sequence[Json]) -> tuple[str, list[Json]]:
    """`allowed_tools` has no counterpart; to offer no other tools means the same."""
    if not isinstance(allowed, dict) or not isinstance(allowed.get("tools"), list):
        raise InvalidRequest("invalid tool_choice.allowed_tools: an object is required", param="tool_choice")
    names = {_chosen_name(choice) for choice in allowed["tools"]}
    kept = [tool for tool in tools if tool["name"] in names]
    if not kept:
        raise InvalidRequest("invalid tool_choice.allowed_tools: none of them is in tools", param="tool_choice")
    return allowed.get("mode") or "auto", kept

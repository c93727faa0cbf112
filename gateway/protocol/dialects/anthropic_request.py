"""A chat request in the words of Anthropic's Messages API.

The API answers 400 to what it does not know (https://platform.claude.com/docs/en/api/messages), so the body is built
field by field and nothing passes by default. Three kinds of OpenAI parameter: what has a counterpart is mapped; a hint
without one (seed, penalties, logit_bias, verbosity, store, prediction …) is left out; what would change the answer the
client waits for is refused by name.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import orjson

from gateway.protocol.chat import ChatRequest
from gateway.protocol.errors import InvalidRequest, UnsupportedParameter

Json = dict[str, Any]

# --- what each model takes ----------------------------------------------------------------------------------------

# Never: it cannot. Budget: `enabled`, with a number of tokens. The others are adaptive: off until asked for, on until
# disabled, and on whatever the request says.
Thinking = Literal["never", "budget", "asked", "default", "always"]

_ALL_EFFORTS = frozenset({"low", "medium", "high", "xhigh", "max"})
_NO_XHIGH = _ALL_EFFORTS - {"xhigh"}


@dataclass(frozen=True, slots=True)
class Traits:
    """What a model takes; what it does not is a 400."""

    cap: int | None  # tokens of output; None: not known, the client's figure goes as it is
    default: int  # `max_tokens` when the client gives none: Anthropic requires one
    thinking: Thinking = "always"
    efforts: frozenset[str] = _ALL_EFFORTS
    forced_tool: bool = True  # tool_choice `any` and `tool`
    sampling: bool = False  # temperature, top_p, top_k
    both_samplers: bool = False  # temperature and top_p in one request
    structured: bool = True  # output_config.format, strict tools
    prefill: bool = False  # the conversation may end with an assistant message
    later_system: bool = False  # role `system` after the first message


def _new(thinking: Thinking, **more: Any) -> Traits:
    return Traits(128_000, 128_000, thinking, **more)


def _old(cap: int, thinking: Thinking, *, structured: bool = False) -> Traits:
    return Traits(cap, cap, thinking, frozenset(), sampling=True, structured=structured, prefill=True)


# Output caps: https://platform.claude.com/docs/en/about-claude/models/overview; thinking and effort:
# https://platform.claude.com/docs/en/build-with-claude/adaptive-thinking and …/effort; structured output:
# https://platform.claude.com/docs/en/build-with-claude/structured-outputs; later system messages:
# https://platform.claude.com/docs/en/build-with-claude/mid-conversation-system-messages
_MODELS: Mapping[str, Traits] = {
    r"claude-(opus|sonnet)-5-5|claude-(fable|mythos)-5(-1)?": _new("always", forced_tool=False, later_system=True),
    r"claude-(opus|sonnet)-5|claude-haiku-5-5": _new("default", later_system=True),
    r"claude-opus-4-8": _new("asked", later_system=True),
    r"claude-opus-4-7": _new("asked"),
    r"claude-(opus|sonnet)-4-6": _new("asked", efforts=_NO_XHIGH, sampling=True),
    r"claude-(opus|sonnet|haiku)-4-5": _old(64_000, "budget", structured=True),
    r"claude-opus-4-1": _old(32_000, "budget", structured=True),
    r"claude-opus-4(-0)?": _old(32_000, "budget"),
    r"claude-sonnet-4(-0)?|claude-3-7-sonnet": _old(64_000, "budget"),
    r"claude-3-5-(sonnet|haiku)": _old(8_192, "never"),
    r"claude-3-(opus|sonnet|haiku)|claude-2(\.\d)?|claude-instant(-1(\.\d)?)?": _old(4_096, "never"),
}

# A Claude that the table does not know is newer than the table. It gets what every recent one takes: no sampling
# parameters, no `disabled` thinking, no prefill, no later system message; 32,000 is the smallest cap since Claude 4.
_NEWER = Traits(cap=None, default=32_000)

# Another vendor's model behind this dialect takes what the dialect has. 8,192 tokens fit every such model we know of.
_STAND_IN = Traits(None, 8_192, "budget", frozenset(), sampling=True, both_samplers=True, prefill=True)

# A date, `@date` or `-latest` may follow a name; another minor version may not.
_VARIANT = r"(?:[-@](?!\d{1,2}(?:\D|$)).*)?"
_TABLE = [(re.compile(f"(?:{names}){_VARIANT}"), traits) for names, traits in _MODELS.items()]


def traits_of(model: str) -> Traits:
    if not model.startswith("claude"):
        return _STAND_IN
    return next((traits for names, traits in _TABLE if names.fullmatch(model)), _NEWER)


# --- the body -----------------------------------------------------------------------------------------------------

# Without a stream an answer of more tokens may take longer than ten minutes; Anthropic's SDKs refuse to ask for it
# (https://github.com/anthropics/anthropic-sdk-python, `_calculate_nonstreaming_timeout`: 3600 s for 128,000 tokens).
MAX_TOKENS_UNSTREAMED = 21_333

_JSON_INSTRUCTION = "Answer with one valid JSON object and nothing else: no prose before or after it, no code fence."


def messages_body(chat: ChatRequest, model: str) -> Json:
    """The body of `POST /v1/messages`. Raises InvalidRequest or UnsupportedParameter, naming the parameter."""
    fields, traits = chat.fields, traits_of(model)
    _refuse_what_has_no_counterpart(fields)
    system, turns = _conversation(chat.messages, traits)
    body: Json = {"model": model, "max_tokens": _max_tokens(chat, traits), "messages": turns}
    body |= _tools(fields, traits, turns)
    output = _output_format(fields, traits)
    if _wants_json_instruction(fields):
        system.append({"type": "text", "text": _JSON_INSTRUCTION})
    if system:
        body["system"] = system
    _set_thinking(body, output, fields, traits)
    if output:
        body["output_config"] = output
    if not _thinks(body):
        body |= _sampling(fields, traits)
    body |= _plain_parameters(fields)
    body["stream"] = chat.stream
    return body


def _refuse_what_has_no_counterpart(fields: Mapping[str, Any]) -> None:
    if (fields.get("n") or 1) > 1:
        raise _unsupported("n", "one answer a request")
    if fields.get("logprobs") or fields.get("top_logprobs"):
        name = "logprobs" if fields.get("logprobs") else "top_logprobs"
        raise _unsupported(name, "no log probabilities")
    if fields.get("audio") is not None:
        raise _unsupported("audio", "no audio")
    if fields.get("modalities") not in (None, [], ["text"]):
        raise _unsupported("modalities", "text only")
    if fields.get("functions"):
        raise _unsupported("functions", "say it with tools")
    if fields.get("web_search_options") is not None:
        raise _unsupported("web_search_options", "no sources in an answer")
    if fields.get("moderation") is not None:
        raise _unsupported("moderation", "no moderation result")


def _unsupported(param: str, reason: str) -> UnsupportedParameter:
    return UnsupportedParameter(f"{param} is not supported by this model's provider: {reason}", param=param)


def _max_tokens(chat: ChatRequest, traits: Traits) -> int:
    given = _given_max_tokens(chat.fields)
    if given is None:
        return traits.default if chat.stream else min(traits.default, MAX_TOKENS_UNSTREAMED)
    return min(given, traits.cap or given)


def _given_max_tokens(fields: Mapping[str, Any]) -> int | None:
    given: int | None = fields.get("max_completion_tokens") or fields.get("max_tokens")
    return given


def _sampling(fields: Mapping[str, Any], traits: Traits) -> Json:
    """Temperature ends at 1, as in Anthropic's own OpenAI layer (https://platform.claude.com/docs/en/api/openai-sdk)."""
    sampling: Json = {}
    if not traits.sampling:
        return sampling
    if fields.get("temperature") is not None:
        sampling["temperature"] = min(fields["temperature"], 1)
    if fields.get("top_p") is not None and (traits.both_samplers or not sampling):
        sampling["top_p"] = fields["top_p"]
    top_k = fields.get("top_k")
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise InvalidRequest("invalid top_k: an integer is required", param="top_k")
        sampling["top_k"] = top_k
    return sampling


_SERVICE_TIERS = {"auto": "auto", "default": "standard_only"}


def _plain_parameters(fields: Mapping[str, Any]) -> Json:
    plain: Json = {}
    stop = fields.get("stop") or []
    # White space alone is refused as a stop sequence.
    if sequences := [text for text in ([stop] if isinstance(stop, str) else stop) if text.strip()]:
        plain["stop_sequences"] = sequences
    if tier := _SERVICE_TIERS.get(fields.get("service_tier") or ""):
        plain["service_tier"] = tier
    user = fields.get("safety_identifier") or fields.get("user")
    if isinstance(user, str) and user:
        plain["metadata"] = {"user_id": _opaque(user)}
    if isinstance(fields.get("cache_control"), dict):
        plain["cache_control"] = fields["cache_control"]
    return plain


_NAMES_A_PERSON = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+|\+?[\d\s().-]{7,}")


def _opaque(user: str) -> str:
    """`metadata.user_id` must not identify a person and has 256 characters at most; a digest serves as well."""
    if len(user) > 256 or _NAMES_A_PERSON.fullmatch(user):
        return hashlib.sha256(user.encode()).hexdigest()
    return user


# --- thinking and effort ------------------------------------------------------------------------------------------

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

# Tokens; 1,024 is the least that is accepted. The figures are LiteLLM's: clients that come from it are at home.
_BUDGETS = {"minimal": 1_024, "low": 1_024, "medium": 2_048, "high": 4_096, "xhigh": 8_192, "max": 16_384}
_MIN_BUDGET = 1_024


def _set_thinking(body: Json, output: Json, fields: Mapping[str, Any], traits: Traits) -> None:
    """Set `thinking`, the effort, and the room that a budget needs. A forced tool excludes thinking and wins over it:
    a client that forces a tool cannot use any other answer, and an effort is a hint."""
    wanted = _reasoning_effort(fields)
    thinking = _given_thinking(fields)
    forced = body.get("tool_choice", {}).get("type") in ("any", "tool")
    if forced and (not traits.forced_tool or _is_on(thinking)):
        raise _unsupported("tool_choice", "a tool cannot be forced while the model thinks")
    if thinking is None:
        thinking = _thinking_for("none" if forced and traits.thinking == "default" else wanted, traits)
        if _is_on(thinking) and (forced or (traits.thinking == "budget" and not _may_think(body["messages"]))):
            thinking = None
        if thinking and thinking["type"] == "enabled":
            thinking = _fit_budget(body, thinking, fields, traits)
    if thinking is not None:
        body["thinking"] = thinking
    if effort := _effort(wanted, thinking, traits):
        output["effort"] = effort


def _reasoning_effort(fields: Mapping[str, Any]) -> str | None:
    effort: str | None = fields.get("reasoning_effort")
    if effort is not None and effort not in _EFFORTS:
        raise InvalidRequest(
            f"invalid reasoning_effort: one of {', '.join(_EFFORTS)} is required", param="reasoning_effort"
        )
    return effort


def _given_thinking(fields: Mapping[str, Any]) -> Json | None:
    """Anthropic's own `thinking`, which a client may send as it is."""
    thinking = fields.get("thinking")
    if thinking is not None and not (isinstance(thinking, dict) and isinstance(thinking.get("type"), str)):
        raise InvalidRequest("invalid thinking: an object with a type is required", param="thinking")
    return thinking


def _thinking_for(wanted: str | None, traits: Traits) -> Json | None:
    if wanted is None or traits.thinking == "never":
        return None
    if wanted == "none":
        return None if traits.thinking == "always" else {"type": "disabled"}
    if traits.thinking == "budget":
        return {"type": "enabled", "budget_tokens": _BUDGETS[wanted]}
    # Without `display` the newer models send thinking blocks with an empty text.
    return {"type": "adaptive", "display": "summarized"}


def _fit_budget(body: Json, thinking: Json, fields: Mapping[str, Any], traits: Traits) -> Json | None:
    """The budget is part of `max_tokens` and must be less: the client's figure is raised by it, up to the cap."""
    budget = thinking["budget_tokens"]
    if _given_max_tokens(fields) is not None:
        body["max_tokens"] = min(body["max_tokens"] + budget, traits.cap or body["max_tokens"] + budget)
    budget = min(budget, body["max_tokens"] - 1)
    return {"type": "enabled", "budget_tokens": budget} if budget >= _MIN_BUDGET else None


def _may_think(turns: Sequence[Json]) -> bool:
    """False while a tool loop goes on whose thinking blocks the client did not send back: with a budget that is a 400
    ("a final assistant message must start with a thinking block")."""
    last = next((turn for turn in reversed(turns) if turn["role"] == "assistant"), None)
    if last is None or not any(block["type"] == "tool_use" for block in last["content"]):
        return True
    return last["content"][0]["type"] in ("thinking", "redacted_thinking")


def _effort(wanted: str | None, thinking: Json | None, traits: Traits) -> str | None:
    if wanted is None or not traits.efforts:
        return None
    if wanted == "none":
        return "low" if traits.thinking == "always" else None
    effort = "low" if wanted == "minimal" else wanted
    # Opus 5 refuses more than `high` without thinking.
    too_high = effort in ("xhigh", "max") and thinking is not None and not _is_on(thinking)
    return "high" if too_high or effort not in traits.efforts else effort


def _is_on(thinking: Json | None) -> bool:
    return thinking is not None and thinking["type"] != "disabled"


def _thinks(body: Json) -> bool:
    return _is_on(body.get("thinking"))


# --- structured output --------------------------------------------------------------------------------------------


def _output_format(fields: Mapping[str, Any], traits: Traits) -> Json:
    wanted = fields.get("response_format") or {"type": "text"}
    if wanted["type"] == "json_schema" and wanted["json_schema"].get("schema"):
        if not traits.structured:
            raise _unsupported("response_format", "this model cannot be held to a schema")
        schema = plain_schema(wanted["json_schema"]["schema"])
        description = wanted["json_schema"].get("description")
        if isinstance(description, str):
            schema.setdefault("description", description)
        return {"format": {"type": "json_schema", "schema": schema}}
    if wanted["type"] not in ("text", "json_object", "json_schema"):
        raise _unsupported("response_format", f"no such type as {wanted['type']!r}")
    return {}


def _wants_json_instruction(fields: Mapping[str, Any]) -> bool:
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


# --- tools --------------------------------------------------------------------------------------------------------


class Tool(NamedTuple):
    """A tool as the client knows it."""

    name: str
    custom: bool = False  # its input is a text, not an object


_BAD_NAME = re.compile(r"[^a-zA-Z0-9_-]")
MAX_NAME = 128  # characters


def legal_name(name: str) -> str:
    """The name or id under which Anthropic gets a tool or a call: itself when it is legal, else one with a digest, so
    that no two names become one."""
    if len(name) <= MAX_NAME and not _BAD_NAME.search(name):
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{_BAD_NAME.sub('_', name)[: MAX_NAME - 9]}_{digest}"


def offered_tools(fields: Mapping[str, Any]) -> dict[str, Tool]:
    """The client's tools by the names under which Anthropic gets them. Never raises: what is wrong with a tool is for
    `messages_body` to say."""
    tools: dict[str, Tool] = {}
    for tool in fields.get("tools") or ():
        spec = tool.get(tool["type"])
        if isinstance(spec, dict) and isinstance(spec.get("name"), str):
            tools[legal_name(spec["name"])] = Tool(spec["name"], custom=tool["type"] == "custom")
    return tools


def _tools(fields: Mapping[str, Any], traits: Traits, turns: Sequence[Json]) -> Json:
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
    raise _unsupported(f"{where}.type", "only function and custom tools")


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
    return sent | _cache_control(tool, function)


def _custom(where: str, tool: Json) -> Json:
    """A tool that takes a text: Anthropic's tools take an object, so the text travels as its one member."""
    custom = tool.get("custom")
    if not isinstance(custom, dict) or not isinstance(custom.get("name"), str) or not custom["name"]:
        raise InvalidRequest(
            f"invalid {where}.custom.name: a non-empty string is required", param=f"{where}.custom.name"
        )
    if (custom.get("format") or {"type": "text"}) != {"type": "text"}:
        raise _unsupported(f"{where}.custom.format", "a grammar cannot be enforced")
    schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
    sent: Json = {"name": legal_name(custom["name"]), "input_schema": schema}
    if isinstance(custom.get("description"), str):
        sent["description"] = custom["description"]
    return sent | _cache_control(tool, custom)


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


# --- the conversation ---------------------------------------------------------------------------------------------

# An empty text block is refused, and so is a turn without a block.
_NOTHING = "(empty)"

_SYSTEM_PREFIX = "System message: "


def _conversation(messages: Sequence[Json], traits: Traits) -> tuple[list[Json], list[Json]]:
    """The leading system messages as blocks, and all others as turns."""
    system: list[Json] = []
    start = 0
    while start < len(messages) and messages[start]["role"] in ("system", "developer"):
        system += _message_blocks(f"messages[{start}]", messages[start], _TEXT_ONLY)
        start += 1
    conversation = Conversation(traits)
    for index in range(start, len(messages)):
        conversation.add(f"messages[{index}]", messages[index])
    return system, conversation.end()


class Conversation:
    """Builds strictly alternating turns. It is mutable: what a message becomes depends on its neighbours.

    Rule 1: everything between two assistant turns is one user turn, and tool results come first in it.
    Rule 2: each tool call has exactly one result, in the turn after it.
    Rule 3: nothing depends on what comes after the next assistant turn, so that a longer conversation begins with the
    same bytes: prompt caches and the signatures of thinking blocks rest on that.
    """

    def __init__(self, traits: Traits) -> None:
        self._traits = traits
        self._turns: list[Json] = []
        self._results: list[Json] = []
        self._said: list[tuple[str, list[Json]]] = []  # role and blocks, since the last assistant turn
        self._awaited: dict[str, str] = {}  # tool calls without a result yet: the client's id -> the id sent
        self._ids: set[str] = set()  # all tool ids sent

    def add(self, where: str, message: Json) -> None:
        role = message["role"]
        if role == "user":
            self._said.append(("user", _message_blocks(where, message, _USER_PARTS)))
        elif role in ("system", "developer"):
            self._said.append(("system", _message_blocks(where, message, _TEXT_ONLY)))
        elif role == "assistant":
            self._assistant(where, message)
        elif role == "tool":
            self._result(where, message)
        else:
            raise _unsupported(f"{where}.role", "function messages are said with the role tool")

    def end(self) -> list[Json]:
        """The turns, with the conversation checked to the end."""
        self._close_user_turn()
        if not self._turns:
            self._turns.append(_turn("user", []))
        if self._turns[-1]["role"] == "assistant":
            self._check_prefill()
        return self._turns

    def _assistant(self, where: str, message: Json) -> None:
        self._close_user_turn()
        blocks = _thinking_blocks(message) if self._traits.thinking != "never" else []
        blocks += _message_blocks(where, message, _ASSISTANT_PARTS)
        if isinstance(message.get("refusal"), str):
            blocks += _text_blocks(message["refusal"])
        if message.get("function_call") or message.get("audio"):
            name = "function_call" if message.get("function_call") else "audio"
            raise _unsupported(f"{where}.{name}", "no such thing in a conversation")
        for index, call in enumerate(message.get("tool_calls") or ()):
            blocks.append(self._tool_use(f"{where}.tool_calls[{index}]", call))
        if self._turns and self._turns[-1]["role"] == "assistant":
            self._turns[-1]["content"] += blocks
            return
        if not self._turns:
            self._turns.append(_turn("user", []))  # the first turn must be the user's
        self._turns.append(_turn("assistant", blocks))

    def _tool_use(self, where: str, call: Json) -> Json:
        if call["id"] in self._awaited:
            raise InvalidRequest(f"invalid {where}.id: it is used twice in one turn", param=f"{where}.id")
        sent = self._awaited[call["id"]] = self._fresh_id(call["id"])
        name, arguments = _called(where, call)
        return {"type": "tool_use", "id": sent, "name": legal_name(name), "input": arguments}

    def _fresh_id(self, given: str) -> str:
        """A legal id that was not sent before. Other vendors' ids have dots and colons, or begin anew in every turn."""
        base = sent = legal_name(given) if given else "call"
        while sent in self._ids:
            sent = f"{base[: MAX_NAME - 7]}_{len(self._ids)}"
        self._ids.add(sent)
        return sent

    def _result(self, where: str, message: Json) -> None:
        sent = self._awaited.pop(message["tool_call_id"], None)
        if sent is None:
            raise InvalidRequest(
                f"invalid {where}.tool_call_id: the turn before has no such tool call without a result",
                param=f"{where}.tool_call_id",
            )
        content = message["content"]
        result: Json = {"type": "tool_result", "tool_use_id": sent}
        if isinstance(content, str) and content.strip():
            result["content"] = content
        elif blocks := _content_blocks(where, content, _USER_PARTS):
            result["content"] = blocks
        self._results.append(result | _cache_control(message))

    def _close_user_turn(self) -> None:
        if self._awaited:
            missing = ", ".join(call_id[:64] for call_id in self._awaited)
            raise InvalidRequest(f"invalid messages: tool calls without a result: {missing}", param="messages")
        said, self._said = self._said, []
        results, self._results = self._results, []
        if not said and not results:
            return
        last: list[Json] = []
        if self._traits.later_system and (results or any(role == "user" for role, _ in said)):
            # A system message may stand after a user turn and before an assistant's; one only, so they are joined.
            while said and said[-1][0] == "system":
                last = said.pop()[1] + last
        content = results + [block for role, blocks in said for block in _as_user(role, blocks)]
        self._turns.append(_turn("user", content))
        if last:
            self._turns.append({"role": "system", "content": last})

    def _check_prefill(self) -> None:
        if not self._traits.prefill:
            raise UnsupportedParameter(
                "messages must not end with an assistant message: this model cannot continue one",
                param="messages",
            )
        block = self._turns[-1]["content"][-1]
        if block["type"] == "text":
            block["text"] = block["text"].rstrip()


def _turn(role: str, blocks: list[Json]) -> Json:
    return {"role": role, "content": blocks or [{"type": "text", "text": _NOTHING}]}


def _as_user(role: str, blocks: list[Json]) -> list[Json]:
    if role == "user":
        return blocks
    return [block | {"text": _SYSTEM_PREFIX + block["text"]} for block in blocks]


def _called(where: str, call: Json) -> tuple[str, Json]:
    """Name and input of one tool call."""
    if isinstance(call.get("function"), dict):
        return call["function"]["name"], _arguments(call["function"]["arguments"])
    custom = call.get("custom")
    if not isinstance(custom, dict) or not isinstance(custom.get("name"), str):
        raise InvalidRequest(f"invalid {where}: a function or a custom call is required", param=where)
    return custom["name"], {"input": custom.get("input") or ""}


def _arguments(text: str) -> Json:
    """The object in `arguments`. What is none goes as it is under `_raw`: a model wrote it, and it may be told so."""
    try:
        parsed = orjson.loads(text or "{}")
        orjson.dumps(parsed)  # less deep than what it reads
    except (orjson.JSONDecodeError, TypeError):
        return {"_raw": text}
    return parsed if isinstance(parsed, dict) else {"_raw": text}


# --- thinking blocks that come back -------------------------------------------------------------------------------


def _thinking_blocks(message: Json) -> list[Json]:
    """The thinking that an earlier answer carried, byte for byte: in our `reasoning_details`, which are OpenRouter's
    (https://openrouter.ai/docs/use-cases/reasoning-tokens), or in LiteLLM's `thinking_blocks`. Without a signature it
    is not Anthropic's, and would be refused; an empty text with one is kept."""
    details = message.get("reasoning_details") or message.get("thinking_blocks")
    if not isinstance(details, list):
        return []
    blocks: list[Json] = []
    for detail in details:
        if isinstance(detail, dict):
            _join(blocks, detail)
    for block in blocks:
        block.pop("index", None)
    return [block for block in blocks if block["type"] == "redacted_thinking" or block["signature"]]


def _join(blocks: list[Json], detail: Json) -> None:
    """Add one detail. A stream's pieces may come back unjoined: a block goes on until its signature."""
    foreign = not str(detail.get("format") or "anthropic").startswith("anthropic")
    if foreign:
        return
    if detail.get("type") in ("reasoning.encrypted", "redacted_thinking"):
        if isinstance(detail.get("data"), str) and detail["data"]:
            blocks.append({"type": "redacted_thinking", "data": detail["data"]})
    elif detail.get("type") in ("reasoning.text", "thinking"):
        text = detail.get("text", detail.get("thinking")) or ""
        last = blocks[-1] if blocks else {"type": ""}
        if last["type"] != "thinking" or last["signature"] or last["index"] != detail.get("index"):
            last = {"type": "thinking", "thinking": "", "signature": "", "index": detail.get("index")}
            blocks.append(last)
        last["thinking"] += text if isinstance(text, str) else ""
        signature = detail.get("signature")
        last["signature"] = signature if isinstance(signature, str) else ""


# --- parts --------------------------------------------------------------------------------------------------------


def _message_blocks(where: str, message: Json, parts: "Parts") -> list[Json]:
    blocks = _content_blocks(where, message.get("content"), parts)
    if blocks and isinstance(message.get("cache_control"), dict):
        blocks[-1] |= _cache_control(message)
    return blocks


def _content_blocks(where: str, content: Any, parts: "Parts") -> list[Json]:
    if not isinstance(content, list):
        return _text_blocks(content or "")
    blocks: list[Json] = []
    for index, part in enumerate(content):
        path = f"{where}.content[{index}]"
        convert = parts.get(part["type"])
        if convert is None:
            raise _unsupported(path, f"no {part['type']} here")
        blocks += [block | _cache_control(part) for block in convert(path, part)]
    return blocks


def _text_blocks(text: str) -> list[Json]:
    return [{"type": "text", "text": text}] if text.strip() else []


def _cache_control(*holders: Json) -> Json:
    """Anthropic's `cache_control` where the client put it, or what OpenAI calls a cache breakpoint."""
    for holder in holders:
        if isinstance(holder.get("cache_control"), dict):
            return {"cache_control": holder["cache_control"]}
        if isinstance(holder.get("prompt_cache_breakpoint"), dict):
            ttl = holder["prompt_cache_breakpoint"].get("ttl")
            return {"cache_control": {"type": "ephemeral"} | ({"ttl": ttl} if ttl in ("5m", "1h") else {})}
    return {}


def _text_part(where: str, part: Json) -> Iterable[Json]:
    return _text_blocks(part["text"])


def _refusal_part(where: str, part: Json) -> Iterable[Json]:
    refusal = part.get("refusal")
    return _text_blocks(refusal) if isinstance(refusal, str) else []


_IMAGE_TYPES = {f"image/{name}": f"image/{name}" for name in ("jpeg", "png", "gif", "webp")}
_IMAGE_TYPES["image/jpg"] = "image/jpeg"  # not registered, and common


def _image_part(where: str, part: Json) -> Iterator[Json]:
    url: str = part["image_url"]["url"]
    if url[:8].lower().startswith(("http://", "https://")):
        yield {"type": "image", "source": {"type": "url", "url": url}}
        return
    media_type, data = _data_url(f"{where}.image_url.url", url)
    if media_type not in _IMAGE_TYPES:
        raise InvalidRequest(
            f"invalid {where}.image_url.url: a JPEG, PNG, GIF or WebP image is required",
            param=f"{where}.image_url.url",
        )
    source = {"type": "base64", "media_type": _IMAGE_TYPES[media_type], "data": data}
    yield {"type": "image", "source": source}


def _data_url(param: str, url: str) -> tuple[str, str]:
    """Media type and base64 text of a `data:` URL (RFC 2397); parameters of the type are dropped."""
    head, comma, data = url.partition(",")
    if not comma or not head[:5].lower() == "data:" or not head.lower().endswith(";base64"):
        raise InvalidRequest(f"invalid {param}: an http or a base64 data URL is required", param=param)
    return head[5:].partition(";")[0].strip().lower(), data


def _file_part(where: str, part: Json) -> Iterator[Json]:
    file = part.get("file")
    if not isinstance(file, dict):
        raise InvalidRequest(f"invalid {where}.file: an object is required", param=f"{where}.file")
    if not isinstance(file.get("file_data"), str):
        raise _unsupported(f"{where}.file.file_id", "send the file itself in file_data")
    filename = file.get("filename")
    name = filename if isinstance(filename, str) else ""
    document = {
        "type": "document",
        "source": _document_source(f"{where}.file.file_data", file["file_data"], name),
    }
    yield document | ({"title": name} if name else {})


def _document_source(param: str, data: str, name: str) -> Json:
    media_type = "application/pdf" if name.lower().endswith(".pdf") else ""
    if data[:5].lower() == "data:":
        media_type, data = _data_url(param, data)
    if media_type == "application/pdf":
        return {"type": "base64", "media_type": media_type, "data": data}
    if not media_type.startswith("text/") and media_type != "application/json":
        raise InvalidRequest(f"invalid {param}: a PDF or a text file is required", param=param)
    try:
        text = base64.b64decode(data, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        raise InvalidRequest(f"invalid {param}: base64 of UTF-8 text is required", param=param) from None
    return {"type": "text", "media_type": "text/plain", "data": text}


Parts = Mapping[str, Callable[[str, Json], Iterable[Json]]]

_TEXT_ONLY: Parts = {"text": _text_part}
_ASSISTANT_PARTS: Parts = {"text": _text_part, "refusal": _refusal_part}
_USER_PARTS: Parts = {"text": _text_part, "image_url": _image_part, "file": _file_part}

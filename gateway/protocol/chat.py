"""A chat request as the client sent it, checked whole before anything is sent anywhere.

Source of the fields and their types: the OpenAI API's `CreateChatCompletionRequest`
(https://github.com/openai/openai-openapi). Fields that are not named here pass to OpenAI-shaped providers as they are.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import orjson

from gateway.protocol.errors import GatewayError, InvalidJSON, InvalidRequest
from gateway.protocol.routing import Target
from gateway.protocol.usage import Usage

MAX_DEPTH = 64  # of nested JSON; deeper than any tool schema seen, far below what breaks a parser
MAX_MODEL = 256  # characters
ROLES = frozenset({"developer", "system", "user", "assistant", "tool", "function"})


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """`fields` is the parsed `body`; both say the same, because duplicate keys were refused."""

    body: bytes
    fields: Mapping[str, Any]
    model: str
    stream: bool
    wants_usage: bool  # the client asked for the usage chunk of a stream

    @property
    def messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = self.fields["messages"]
        return messages


@dataclass(frozen=True, slots=True)
class Call:
    """One upstream attempt: all that a translator may know. No clock and no ids are made further down."""

    chat: ChatRequest
    target: Target
    completion_id: str  # `chatcmpl-…`, for dialects whose own ids are not OpenAI's
    created: int  # seconds since the epoch


class UpstreamRequest(NamedTuple):
    """What to send: `path` is joined to the provider's base URL; the credential is added by `upstream`."""

    path: str
    body: bytes
    headers: Mapping[str, str] = {}  # beside Content-Type and the provider's own


class Chunk(NamedTuple):
    """One step of a stream: bytes for the client, and what the meter reads from them."""

    data: bytes  # whole events, ready to send; b"" when the client must not see it
    text: str = ""  # all that the model generated in it: content, reasoning, refusal, tool names and arguments
    usage: Usage | None = None
    finish_reason: str | None = None


class Reply(NamedTuple):
    """A whole answer (`stream: false`)."""

    body: bytes
    text: str = ""
    usage: Usage | None = None
    finish_reason: str | None = None


class Translator(Protocol):
    """One upstream attempt in one dialect, sans I/O. It holds at most a megabyte and makes no usage up."""

    def request(self) -> UpstreamRequest:
        """What to send. Raises InvalidRequest naming the parameter that this dialect cannot express."""
        ...

    def feed(self, data: bytes) -> list[Chunk]:
        """The chunks that `data` completes: the same ones for every split of the same bytes. Never raises."""
        ...

    @property
    def done(self) -> bool:
        """The provider's last word, good or bad, is in: nothing more is read."""
        ...

    def flush(self) -> list[Chunk]:
        """The end of the stream: closing chunks. Raises UpstreamError when it broke or its last word is missing."""
        ...

    def reply(self, body: bytes) -> Reply:
        """A whole answer. Raises UpstreamBadBody when it is none."""
        ...

    def error(self, status: int, body: bytes, retry_after: float | None = None) -> GatewayError:
        """What an answer with another status than 200 means for the client."""
        ...


# --- reading a body -----------------------------------------------------------------------------------------------


def parse_chat(body: bytes) -> ChatRequest:
    """A checked request. Raises InvalidJSON or InvalidRequest, naming the parameter."""
    fields = parse_object(body)
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        _refuse("model", "a non-empty string is required")
    if len(model) > MAX_MODEL or not model.isprintable():
        _refuse("model", f"at most {MAX_MODEL} printable characters")
    for name, check in _FIELDS.items():
        value = fields.get(name)
        if value is not None:
            check(name, value)
    _check_messages(fields.get("messages"))
    stream = fields.get("stream") or False
    options = fields.get("stream_options")
    if options is not None and not stream:
        _refuse("stream_options", "only allowed when stream is true")
    return ChatRequest(
        body=body,
        fields=fields,
        model=model,
        stream=stream,
        wants_usage=bool(options and options.get("include_usage")),
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`, in which every parser reads the same: no duplicate keys, NaN or lone surrogates."""
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


def _refuse(param: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"invalid {param}: {problem}", param=param)


# --- fields -------------------------------------------------------------------------------------------------------

type_ = type


def _number(low: float, high: float) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            _refuse(name, f"a number from {low:g} to {high:g} is required")

    return check


def _integer(low: int, high: int = 2**53) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            upto = f" to {high}" if high < 2**53 else ""
            _refuse(name, f"an integer from {low}{upto} is required")

    return check


def _is(kind: type_ | tuple[type_, ...], words: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, kind):
            _refuse(name, f"{words} is required")

    return check


def _stop(name: str, value: Any) -> None:
    if isinstance(value, str):
        return
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        _refuse(name, "a string or an array of strings is required")


def _stream_options(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        _refuse(name, "an object is required")
    wanted = value.get("include_usage")
    if wanted is not None and not isinstance(wanted, bool):
        _refuse(f"{name}.include_usage", "a boolean is required")


def _tools(name: str, value: Any) -> None:
    if not isinstance(value, list):
        _refuse(name, "an array is required")
    for index, tool in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
            _refuse(where, "an object with a type is required")
        if tool["type"] != "function":
            continue
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            _refuse(f"{where}.function.name", "a non-empty string is required")
        for field, kind, words in (("parameters", dict, "an object"), ("description", str, "a string")):
            if function.get(field) is not None and not isinstance(function[field], kind):
                _refuse(f"{where}.function.{field}", f"{words} is required")


def _tool_choice(name: str, value: Any) -> None:
    if isinstance(value, dict):
        if not isinstance(value.get("type"), str):
            _refuse(f"{name}.type", "a string is required")
        if value["type"] == "function" and not (
            isinstance(value.get("function"), dict) and isinstance(value["function"].get("name"), str)
        ):
            _refuse(f"{name}.function.name", "a string is required")
    elif not isinstance(value, str):
        _refuse(name, "a string or an object is required")


def _response_format(name: str, value: Any) -> None:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        _refuse(name, "an object with a type is required")
    if value["type"] == "json_schema":
        schema = value.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema", {}), dict):
            _refuse(f"{name}.json_schema", "an object with a schema is required")


_FIELDS: Mapping[str, Callable[[str, Any], None]] = {
    "stream": _is(bool, "a boolean"),
    "stream_options": _stream_options,
    "max_tokens": _integer(1),
    "max_completion_tokens": _integer(1),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "n": _integer(1, 128),
    "seed": _integer(-(2**63), 2**63),
    "stop": _stop,
    "tools": _tools,
    "tool_choice": _tool_choice,
    "parallel_tool_calls": _is(bool, "a boolean"),
    "response_format": _response_format,
    "reasoning_effort": _is(str, "a string"),
    "logprobs": _is(bool, "a boolean"),
    "top_logprobs": _integer(0, 20),
    "logit_bias": _is(dict, "an object"),
    "user": _is(str, "a string"),
    "metadata": _is(dict, "an object"),
    "service_tier": _is(str, "a string"),
}

# --- messages -----------------------------------------------------------------------------------------------------


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        _refuse("messages", "a non-empty array is required")
    for index, message in enumerate(messages):
        _check_message(f"messages[{index}]", message)


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, dict):
        _refuse(where, "an object is required")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        _refuse(f"{where}.role", f"one of {', '.join(sorted(ROLES))} is required")
    content = message.get("content")
    if isinstance(content, list):
        for index, part in enumerate(content):
            _check_part(f"{where}.content[{index}]", part)
    elif content is None:
        if role not in ("assistant", "function"):
            _refuse(f"{where}.content", "a string or an array of parts is required")
    elif not isinstance(content, str):
        _refuse(f"{where}.content", "a string or an array of parts is required")
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        _refuse(f"{where}.tool_call_id", "a string is required")
    if message.get("tool_calls") is not None:
        _check_tool_calls(f"{where}.tool_calls", message["tool_calls"])


def _check_part(where: str, part: Any) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        _refuse(where, "an object with a type is required")
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        _refuse(f"{where}.text", "a string is required")
    if part["type"] == "image_url":
        image = part.get("image_url")
        if not isinstance(image, dict) or not isinstance(image.get("url"), str):
            _refuse(f"{where}.image_url.url", "a string is required")


def _check_tool_calls(where: str, calls: Any) -> None:
    if not isinstance(calls, list):
        _refuse(where, "an array is required")
    for index, call in enumerate(calls):
        if not isinstance(call, dict) or not isinstance(call.get("id"), str):
            _refuse(f"{where}[{index}].id", "a string is required")
        function = call.get("function")
        if function is None:
            continue
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            _refuse(f"{where}[{index}].function.name", "a string is required")
        if not isinstance(function.get("arguments"), str):
            _refuse(f"{where}[{index}].function.arguments", "a string is required")


def prompt_text(chat: ChatRequest) -> Iterator[str]:
    """All text of the prompt, tool definitions included: what is counted when the provider gives no usage."""
    for message in chat.messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            for part in content:
                if isinstance(part.get("text"), str):
                    yield part["text"]
        for call in message.get("tool_calls") or ():
            function = call.get("function") or {}
            yield function.get("name", "")
            yield function.get("arguments", "")
    if tools := chat.fields.get("tools"):
        yield orjson.dumps(tools).decode()


# --- changing a body ----------------------------------------------------------------------------------------------

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

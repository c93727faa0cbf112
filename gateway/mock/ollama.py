"""Ollama's native chat (https://github.com/ollama/ollama/blob/main/docs/api.md), lines of JSON instead of events."""

import binascii
from base64 import b64decode
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from gateway.mock.answers import Answer, Ask, Ending, Tool, ToolCall
from gateway.mock.formats import CREATED, FAKE_KEY, Wire, count_prompt, read_object
from gateway.mock.script import ProviderError, parse_model

NAME = "ollama"
STREAM_TYPE = "application/x-ndjson"
JSON_TYPE = "application/json; charset=utf-8"
BAD_EVENT = b'{"model":"mock-llama","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","cont\n'
ERROR_EVENT = b'{"error":"an error was encountered while running the model: unexpected EOF"}\n'
VERSION = "0.13.0"

ROLES = ("system", "user", "assistant", "tool")
_LEVELS = ("low", "medium", "high", "max")
_PIECE_NS = 20_000_000  # nanoseconds that a token is said to have taken
# Ollama says `stop` for calls too, and has no word for a refusal or a filter: those are text like any other.
_DONE_REASONS: Mapping[Ending, str] = {"length": "length"}


# --- reading ------------------------------------------------------------------------------------------------------


def read(body: bytes, headers: Mapping[str, str], models: frozenset[str]) -> Ask:
    fields = read_object(body, "invalid character at the beginning of value")
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise ProviderError("model is required")
    name, script = parse_model(model)
    if not name.startswith("mock-") and name.removesuffix(":latest") not in models:
        raise ProviderError(f"model '{model}' not found", status=404)
    if script.newline == "cr":
        raise ProviderError("mock: newline=cr: lines of JSON never end so")
    _check(fields)
    messages = fields.get("messages") or []
    prompt = count_prompt(messages, fields.get("tools"))
    options = fields.get("options") or {}
    limit = options.get("num_predict")
    return Ask(
        model=model,
        script=script,
        stream=fields.get("stream") is not False,
        question=next((_text(message) for message in reversed(messages) if message["role"] == "user"), ""),
        prompt_tokens=prompt if script.prompt_tokens is None else script.prompt_tokens,
        tools=_tools(fields.get("tools") or ()),
        results=_results(messages),
        images=sum(len(message.get("images") or ()) for message in messages),
        schema=_schema(fields.get("format")),
        thinking="shown" if fields.get("think") else "no",
        max_tokens=limit if isinstance(limit, int) and limit >= 0 else None,  # below 0: no limit
        stop=tuple(options.get("stop") or ()),
    )


def _check(fields: Mapping[str, Any]) -> None:
    for name, kind, words in _SHAPES:
        value = fields.get(name)
        if value is not None and not isinstance(value, kind):
            raise _mistyped(value, f"ChatRequest.{name}", words)
    think = fields.get("think")
    if isinstance(think, str) and think not in _LEVELS:
        raise ProviderError(f'invalid think value: "{think}" (must be "high", "medium", "low", "max", true, or false)')
    for message in fields.get("messages") or ():
        _check_message(message)


_SHAPES: tuple[tuple[str, type | tuple[type, ...], str], ...] = (
    ("messages", list, "[]api.Message"),
    ("tools", list, "api.Tools"),
    ("options", dict, "map[string]interface {}"),
    ("stream", bool, "bool"),
    ("think", (bool, str), "api.ThinkValue"),
)


def _check_message(message: Any) -> None:
    if not isinstance(message, dict):
        raise _mistyped(message, "ChatRequest.messages", "api.Message")
    role = message.get("role")
    if role not in ROLES:
        raise ProviderError(f"invalid role: {role}, role must be one of [{' '.join(ROLES)}]")
    if not isinstance(message.get("content", ""), str | None):
        raise _mistyped(message["content"], "ChatRequest.messages.content", "string")
    for call in message.get("tool_calls") or ():
        arguments = (call.get("function") or {}).get("arguments")
        if not isinstance(arguments, dict | None):
            raise _mistyped(arguments, "ChatRequest.messages.tool_calls.function.arguments", "map[string]interface {}")
    for image in message.get("images") or ():
        _check_image(image)


def _check_image(image: Any) -> None:
    if not isinstance(image, str):
        raise _mistyped(image, "ChatRequest.messages.images", "api.ImageData")
    try:
        b64decode(image, validate=True)
    except (binascii.Error, ValueError):
        raise ProviderError("illegal base64 data at input byte 4") from None


def _mistyped(value: Any, field: str, wanted: str) -> ProviderError:
    """The words of Go's JSON decoder."""
    found = {dict: "object", list: "array", str: "string", bool: "bool"}.get(type(value), "number")
    return ProviderError(f"json: cannot unmarshal {found} into Go struct field {field} of type {wanted}")


def _text(message: Mapping[str, Any]) -> str:
    return message.get("content") or ""


def _results(messages: list[dict[str, Any]]) -> tuple[str, ...]:
    """What tools said after the user's last message."""
    last = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
    return tuple(_text(message) for message in messages[last + 1 :] if message["role"] == "tool")


def _tools(tools: Any) -> tuple[Tool, ...]:
    functions = [tool.get("function") or {} for tool in tools if isinstance(tool, dict)]
    return tuple(
        Tool(str(function.get("name")), orjson.dumps(function.get("parameters") or {})) for function in functions
    )


def _schema(wanted: Any) -> bytes | None:
    if wanted is None or wanted == "":
        return None
    if wanted == "json":
        return b"{}"
    if not isinstance(wanted, dict):
        raise ProviderError(f'invalid format: "{wanted}"; expected "json" or a valid JSON Schema object')
    return orjson.dumps(wanted)


# --- answering ----------------------------------------------------------------------------------------------------


def stream(ask: Ask, said: Answer) -> Wire:
    messages = list(_messages(said))
    return Wire(
        head=b"",
        deltas=tuple(_line(ask, serial, message) for serial, message in enumerate(messages)),
        tail=b"",
        done=_line(ask, len(messages), {"role": "assistant", "content": ""}, _last(said)),
    )


def delta(ask: Ask, said: Answer, text: str) -> bytes:
    return _line(ask, 0, {"role": "assistant", "content": text})


def _messages(said: Answer) -> Iterator[dict[str, Any]]:
    yield from ({"role": "assistant", "content": "", "thinking": piece} for piece in said.thoughts)
    yield from ({"role": "assistant", "content": piece} for piece in said.text)
    for call in _calls(said):
        yield {"role": "assistant", "content": "", "tool_calls": [call]}


def _calls(said: Answer) -> list[dict[str, Any]]:
    """Whole calls only: one that the limit cut is never sent."""
    whole = [call for call in said.calls if _is_whole(call)]
    return [
        {
            "id": f"call_{call.id[:8]}",
            "function": {"index": index, "name": call.name, "arguments": orjson.loads(call.json)},
        }
        for index, call in enumerate(whole)
    ]


def _is_whole(call: ToolCall) -> bool:
    try:
        orjson.loads(call.json)
    except orjson.JSONDecodeError:
        return False
    return True


def _line(ask: Ask, serial: int, message: Mapping[str, Any], last: Mapping[str, Any] | None = None) -> bytes:
    at = datetime.fromtimestamp(CREATED, UTC) + timedelta(milliseconds=serial * _PIECE_NS / 1_000_000)
    line = {
        "model": ask.model,
        "created_at": at.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "message": message,
        **(last or {"done": False}),
    }
    return orjson.dumps(line) + b"\n"


def _last(said: Answer) -> dict[str, Any]:
    """What the last object adds. The prompt's count is missing when it came from the cache as a whole."""
    last: dict[str, Any] = {"done": True, "done_reason": _DONE_REASONS.get(said.ending, "stop")}
    counts = said.counts
    if counts is None:
        return last
    spent = counts.completion * _PIECE_NS
    last |= {"total_duration": spent + 61_000_000, "load_duration": 1_000_000}
    if counts.prompt > counts.cached:
        last["prompt_eval_count"] = counts.prompt
    return last | {"prompt_eval_duration": 60_000_000, "eval_count": counts.completion, "eval_duration": spent}


def reply(ask: Ask, said: Answer) -> bytes:
    message: dict[str, Any] = {"role": "assistant", "content": "".join(said.text)}
    if said.thoughts:
        message["thinking"] = "".join(said.thoughts)
    if calls := _calls(said):
        message["tool_calls"] = calls
    return _line(ask, 0, message, _last(said))


def models(names: tuple[str, ...]) -> bytes:
    return orjson.dumps({"models": [_model(name) for name in names]})


def _model(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "model": name,
        "modified_at": "2026-01-01T00:00:00Z",
        "size": 0,
        "digest": "0" * 64,
        "details": {
            "parent_model": "",
            "format": "gguf",
            "family": "mock",
            "families": ["mock"],
            "parameter_size": "0B",
            "quantization_level": "Q4_0",
        },
    }


# --- errors -------------------------------------------------------------------------------------------------------


def failure(status: int) -> ProviderError:
    if status == 401:
        return ProviderError(f"unauthorized: the key {FAKE_KEY} is not known", status=status)
    if status == 404:
        return ProviderError("model 'mock-llama' not found", status=status)
    if status == 503:
        return ProviderError("server busy, please try again.  maximum pending requests exceeded", status=status)
    if status < 500:
        return ProviderError(f"this request was refused with status {status}", status=status)
    return ProviderError("llama runner process has terminated: signal: killed", status=status)


def error(problem: ProviderError, request_id: str) -> bytes:
    return orjson.dumps({"error": problem.message})


def headers(request_id: str) -> dict[str, str]:
    return {}

"""Anthropic's Messages (https://docs.anthropic.com/en/api/messages): how answers are written.

What of a request is refused stands in `anthropic_rules`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import orjson

from gateway.mock.answers import Answer, Ask, Counts, Ending, Tool
from gateway.mock.anthropic_rules import blocks, check, signature
from gateway.mock.formats import FAKE_KEY, Wire, count_prompt, read_object
from gateway.mock.script import ProviderError, parse_model

NAME = "anthropic"
STREAM_TYPE = "text/event-stream; charset=utf-8"
JSON_TYPE = "application/json"
BAD_EVENT = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_d\n\n'
ERROR_EVENT = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n'

_STOP_REASONS: Mapping[Ending, str] = {
    "stop": "end_turn",
    "stop_sequence": "stop_sequence",
    "length": "max_tokens",
    "tools": "tool_use",
    "refused": "refusal",
    "filtered": "refusal",
}
_CATEGORY = "mock"
_EXPLANATION = "This mock was asked to refuse."
_PLACEHOLDER = 2  # what message_start says of output tokens, whatever follows


# --- reading ------------------------------------------------------------------------------------------------------


def read(body: bytes, headers: Mapping[str, str], models: frozenset[str]) -> Ask:
    fields = read_object(body, "The request body is not valid JSON")
    check(fields, headers)
    _, script = parse_model(fields["model"])
    messages = fields["messages"]
    prompt = count_prompt(messages, fields.get("system"), fields.get("tools"))
    choice = fields.get("tool_choice") or {}
    return Ask(
        model=fields["model"],
        script=script,
        stream=bool(fields.get("stream")),
        question=_question(messages),
        prompt_tokens=prompt if script.prompt_tokens is None else script.prompt_tokens,
        tools=_tools(fields.get("tools") or ()),
        choice=_CHOICES[choice.get("type", "auto")],
        named=str(choice.get("name", "")),
        parallel=not choice.get("disable_parallel_tool_use"),
        results=_results(messages[-1]),
        images=sum(block.get("type") == "image" for message in messages for block in blocks(message)),
        schema=_schema((fields.get("output_config") or {}).get("format")),
        thinking=_thinking(fields.get("thinking") or {}),
        max_tokens=fields["max_tokens"],
        stop=tuple(fields.get("stop_sequences") or ()),
    )


_CHOICES: Mapping[str, Literal["auto", "required", "none"]] = {
    "auto": "auto",
    "any": "required",
    "tool": "required",
    "none": "none",
}


def _thinking(wanted: Mapping[str, Any]) -> Literal["no", "hidden", "shown"]:
    """Models that decide for themselves how long to think show it only when asked to."""
    if wanted.get("type") == "adaptive":
        return "shown" if wanted.get("display") == "summarized" else "hidden"
    return "shown" if wanted.get("type") == "enabled" else "no"


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(block["text"] for block in content or () if block.get("type") == "text")


def _question(messages: list[dict[str, Any]]) -> str:
    asked = (_text(message["content"]) for message in reversed(messages) if message["role"] == "user")
    return next((text for text in asked if text), "")


def _results(last: Mapping[str, Any]) -> tuple[str, ...]:
    found = [block for block in blocks(last) if block["type"] == "tool_result"]
    return tuple(_text(block.get("content")) for block in found)


def _tools(tools: Iterable[Mapping[str, Any]]) -> tuple[Tool, ...]:
    """The client's own; those that Anthropic runs itself have no schema."""
    return tuple(Tool(tool["name"], orjson.dumps(tool["input_schema"])) for tool in tools if "input_schema" in tool)


def _schema(wanted: Mapping[str, Any] | None) -> bytes | None:
    return orjson.dumps(wanted.get("schema") or {}) if wanted else None


# --- answering ----------------------------------------------------------------------------------------------------


def stream(ask: Ask, said: Answer) -> Wire:
    return Wire(
        head=_event({"type": "message_start", "message": _message(ask, said)}),
        deltas=tuple(_deltas(said)),
        tail=_event(_message_delta(said)),
        done=_event({"type": "message_stop"}),
    )


def _deltas(said: Answer) -> list[bytes]:
    """Block after block. What opens and closes one goes with its first and last delta."""
    events: list[bytes] = []
    for index, (block, deltas) in enumerate(_blocks(said)):
        inner = [_event({"type": "content_block_delta", "index": index, "delta": delta}) for delta in deltas]
        opening = _event({"type": "content_block_start", "index": index, "content_block": block})
        inner[0] = opening + (b"" if index else b'event: ping\ndata: {"type": "ping"}\n\n') + inner[0]
        inner[-1] += _event({"type": "content_block_stop", "index": index})
        events += inner
    return events


def _blocks(said: Answer) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each block as it is opened, and its deltas: never none."""
    opened: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    if said.thoughts:
        shown = () if said.hidden_thoughts else said.thoughts
        deltas = [{"type": "thinking_delta", "thinking": piece} for piece in shown]
        signed = {"type": "signature_delta", "signature": signature("".join(shown))}
        opened.append(({"type": "thinking", "thinking": "", "signature": ""}, [*deltas, signed]))
    if said.text:
        opened.append(({"type": "text", "text": ""}, [{"type": "text_delta", "text": piece} for piece in said.text]))
    for call in said.calls:
        pieces = ("", *(call.arguments if call.json != "{}" else ()))
        opened.append(
            (_tool_use(call.id, call.name, {}), [{"type": "input_json_delta", "partial_json": p} for p in pieces])
        )
    return opened


def delta(ask: Ask, said: Answer, text: str) -> bytes:
    index = 1 if said.thoughts else 0
    return _event({"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": text}})


def _event(fields: Mapping[str, Any]) -> bytes:
    """Anthropic pads the JSON with a run of spaces before its last brace."""
    data = orjson.dumps(fields)
    return b"event: %s\ndata: %s%s}\n\n" % (fields["type"].encode(), data[:-1], b" " * (len(data) * 7 % 16))


def _message(ask: Ask, said: Answer) -> dict[str, Any]:
    """The message before anything of it is said."""
    return {
        "model": ask.model,
        "id": f"msg_{said.id}",
        "type": "message",
        "role": "assistant",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        **({"usage": _usage(said.counts, _PLACEHOLDER) | _TERMS} if said.counts else {}),
    }


_TERMS = {
    "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
    "service_tier": "standard",
    "inference_geo": "not_available",
}


def _usage(counts: Counts, output_tokens: int) -> dict[str, Any]:
    """What came from the cache stands beside the input, not in it."""
    return {
        "input_tokens": counts.prompt - counts.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cached,
        "output_tokens": output_tokens,
    }


def _final_usage(counts: Counts) -> dict[str, Any]:
    usage = _usage(counts, counts.completion)
    if counts.reasoning:
        usage["output_tokens_details"] = {"thinking_tokens": counts.reasoning}
    return usage


def _message_delta(said: Answer) -> dict[str, Any]:
    event: dict[str, Any] = {"type": "message_delta", "delta": _stopped(said)}
    if said.counts:
        event["usage"] = _final_usage(said.counts)
    return event


def _stopped(said: Answer) -> dict[str, Any]:
    reason = _STOP_REASONS[said.ending]
    details = {"type": "refusal", "category": _CATEGORY, "explanation": _EXPLANATION}
    return {
        "stop_reason": reason,
        "stop_sequence": said.stopped_by or None,
        "stop_details": details if reason == "refusal" else None,
    }


def reply(ask: Ask, said: Answer) -> bytes:
    content: list[dict[str, Any]] = []
    if said.thoughts:
        shown = "" if said.hidden_thoughts else "".join(said.thoughts)
        content.append({"type": "thinking", "thinking": shown, "signature": signature(shown)})
    if said.text:
        content.append({"type": "text", "text": "".join(said.text)})
    content += [_tool_use(call.id, call.name, _input(call.json)) for call in said.calls]
    whole = _message(ask, said) | _stopped(said) | {"content": content}
    if said.counts:
        whole["usage"] = _final_usage(said.counts) | _TERMS
    return orjson.dumps(whole)


def _tool_use(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    return {
        "type": "tool_use",
        "id": f"toolu_{call_id}",
        "name": name,
        "input": arguments,
        "caller": {"type": "direct"},
    }


def _input(arguments: str) -> Any:
    """The arguments as an object; an empty one when the token limit cut them."""
    try:
        return orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return {}


def models(names: tuple[str, ...]) -> bytes:
    data = [
        {"type": "model", "id": name, "display_name": f"Mock {name}", "created_at": "2026-01-01T00:00:00Z"}
        for name in names
    ]
    first, last = (names[0], names[-1]) if names else (None, None)
    return orjson.dumps({"data": data, "has_more": False, "first_id": first, "last_id": last})


# --- errors -------------------------------------------------------------------------------------------------------

# https://docs.anthropic.com/en/api/errors
_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_MESSAGES: Mapping[int, str] = {
    401: f"invalid x-api-key: {FAKE_KEY}",
    403: "Your API key does not have permission to use the specified resource.",
    404: "model: mock-claude",
    413: "Request exceeds the maximum size",
    429: "This request would exceed your organization's rate limit of 50 requests per minute.",
    504: "Request timed out",
    529: "Overloaded",
}


def failure(status: int) -> ProviderError:
    words = "Internal server error" if status >= 500 else f"This request was refused with status {status}."
    return ProviderError(_MESSAGES.get(status, words), status=status)


def error(problem: ProviderError, request_id: str) -> bytes:
    default = "api_error" if problem.status >= 500 else "invalid_request_error"
    kind = problem.kind or _TYPES.get(problem.status, default)
    fields = {"type": "error", "error": {"type": kind, "message": problem.message}, "request_id": request_id}
    return orjson.dumps(fields)


def headers(request_id: str) -> dict[str, str]:
    return {
        "request-id": request_id,
        "anthropic-organization-id": "00000000-0000-4000-8000-000000000000",
        "anthropic-ratelimit-requests-limit": "4000",
        "anthropic-ratelimit-requests-remaining": "3999",
        "anthropic-ratelimit-requests-reset": "2026-01-01T00:00:01Z",
        "anthropic-ratelimit-input-tokens-limit": "2000000",
        "anthropic-ratelimit-input-tokens-remaining": "1999000",
        "anthropic-ratelimit-input-tokens-reset": "2026-01-01T00:00:01Z",
    }

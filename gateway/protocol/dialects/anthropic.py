"""Anthropic's Messages API behind an OpenAI chat (https://platform.claude.com/docs/en/build-with-claude/streaming).

A stream is `message_start`, blocks one after another (start, deltas, stop), `message_delta`, `message_stop`; `ping`
and `error` may come anywhere. Block types and events that are not named here are new, or the provider's own business
(server tools), and do not reach the client.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from gateway.protocol.chat import Call, Chunk, Reply, UpstreamRequest
from gateway.protocol.dialects.anthropic_request import Tool, messages_body, offered_tools
from gateway.protocol.errors import (
    EventTooLarge,
    ProviderAuth,
    UpstreamBadBody,
    UpstreamError,
    UpstreamOverloaded,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTruncated,
)
from gateway.protocol.sse import DONE, MAX_EVENT, PING, Event, SSEDecoder, data_event, decode_event
from gateway.protocol.usage import Usage

Json = dict[str, Any]

MAX_BAD_EVENTS = 3  # one may be a middlebox; three are not this dialect
REASONING_FORMAT = "anthropic-claude-v1"  # OpenRouter's name for signatures and data that only Anthropic can read

# A piece of a read that can hold no more than the tail of one event and the head of the next one that is too large, so
# that the whole events before it are not lost with it.
_PIECE = 1 << 16  # bytes

# https://platform.claude.com/docs/en/build-with-claude/handling-stop-reasons. A turn that was paused or compacted is
# not complete, and `length` is the only word that says so.
_FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "pause_turn": "length",
    "compaction": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


class AnthropicTranslator:
    """One attempt at `POST /v1/messages`."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._tools = offered_tools(call.chat.fields)
        self._model = call.target.model  # what the provider calls it, once it has said so
        self._decoder = SSEDecoder()
        self._out: list[Chunk] = []  # chunks of this `feed`
        self._error: UpstreamError | None = None  # raised by `flush`
        self._done = False
        self._bad_events = 0
        self._message_id: str | None = None  # None: no message_start yet
        self._role_sent = False
        self._finish_reason: str | None = None
        self._calls: dict[int, _ToolCall] = {}  # open tool_use blocks by their index
        self._call_count = 0
        self._reasoning = -1  # number of the current thinking block
        self._counts = _Counts()

    def request(self) -> UpstreamRequest:
        return UpstreamRequest("/v1/messages", _dump(messages_body(self._call.chat, self._call.target.model)))

    @property
    def done(self) -> bool:
        return self._done

    def feed(self, data: bytes) -> list[Chunk]:
        self._out = []
        for at in range(0, len(data), _PIECE):
            if self._done:
                break
            try:
                events = self._decoder.feed(data[at : at + _PIECE])
            except EventTooLarge as error:
                self._fail(error)
                break
            for event in events:
                self._take(event)
        return self._out

    def flush(self) -> list[Chunk]:
        self._out = []
        if not self._done and (rest := self._decoder.rest()):
            # The last event may lack its blank line. When it is not whole it was cut, and is no bad event.
            event = decode_event(rest)
            self._dispatch(event, _json_object(event.data))
        if self._error is not None:
            raise self._error
        if not self._done:
            raise UpstreamTruncated("the provider's stream ended before its message_stop")
        return self._out

    # --- events ---------------------------------------------------------------------------------------------------

    def _take(self, event: Event) -> None:
        if self._done:
            return
        if event.stray is not None:  # llama.cpp says errors in a field of its own
            self._fail(self._reported(_json_object(event.stray) or {}))
        elif event.data is None:
            if event.raw.lstrip().startswith(b":"):
                self._out.append(Chunk(PING))
        elif (parsed := _json_object(event.data)) is not None:
            self._dispatch(event, parsed)
        else:
            self._bad_events += 1
            if self._bad_events >= MAX_BAD_EVENTS:
                self._fail(
                    UpstreamBadBody(f"the provider sent {MAX_BAD_EVENTS} events that are not JSON", kind="bad_event")
                )

    def _dispatch(self, event: Event, parsed: Json | None) -> None:
        if parsed is None:
            return
        kind = parsed.get("type")
        if not isinstance(kind, str):
            kind = "error" if parsed.get("error") else event.name
        if handler := _HANDLERS.get(kind):
            try:
                handler(self, parsed)
            except UpstreamBadBody as error:
                self._fail(error)

    def _message_start(self, event: Json) -> None:
        message = _object(event, "message")
        message_id = _text(message, "id")
        if self._role_sent:
            # A proxy that tries again may say it twice; what follows belongs to the message that the client has.
            if message_id != self._message_id:
                raise UpstreamBadBody("the provider began a second message", kind="bad_event")
            return
        self._message_id = message_id
        self._model = _text(message, "model") or self._model
        reason = message.get("stop_reason")
        self._counts.merge(message.get("usage"), final=isinstance(reason, str))
        self._send_role(self._counts.usage())
        self._whole_blocks(message.get("content"))
        if isinstance(reason, str):
            self._finish(reason)

    def _whole_blocks(self, content: Any) -> None:
        """A turn that code of the model's own goes on with has its tool calls, and its end, in the message_start
        (https://platform.claude.com/docs/en/agents-and-tools/tool-use/programmatic-tool-calling)."""
        for index, block in enumerate(content if isinstance(content, list) else ()):
            self._block_start({"index": index, "content_block": block})
            self._block_stop({"index": index})

    def _block_start(self, event: Json) -> None:
        block = _object(event, "content_block")
        kind = block.get("type")
        if kind == "text":
            self._send_content(_text(block, "text"))
        elif kind == "tool_use":
            self._open_call(_index(event), block)
        elif kind == "thinking":
            self._reasoning += 1
            self._send_reasoning(_text(block, "thinking"))
            self._send_signature(_text(block, "signature"))
        elif kind == "redacted_thinking":
            self._reasoning += 1
            self._send({"reasoning_details": [_encrypted(_text(block, "data"), self._reasoning)]})

    def _block_delta(self, event: Json) -> None:
        delta = _object(event, "delta")
        kind = delta.get("type")
        if kind == "text_delta":
            self._send_content(_text(delta, "text"))
        elif kind == "input_json_delta":
            self._send_arguments(_index(event), _text(delta, "partial_json"))
        elif kind == "thinking_delta":
            self._send_reasoning(_text(delta, "thinking"))
        elif kind == "signature_delta":
            self._send_signature(_text(delta, "signature"))

    def _block_stop(self, event: Json) -> None:
        if call := self._calls.pop(_index(event), None):
            self._close_call(call)

    def _message_delta(self, event: Json) -> None:
        self._counts.merge(event.get("usage"), final=True)
        delta = _object(event, "delta")
        reason = delta.get("stop_reason")
        if isinstance(reason, str) and self._finish_reason is None:
            if reason == "refusal":
                self._send_refusal(_text(_object(delta, "stop_details"), "explanation"))
            self._finish(reason)
        else:
            self._out.append(Chunk(b"", usage=self._counts.usage()))

    def _message_stop(self, event: Json) -> None:
        if self._finish_reason is None:
            self._finish(None)
        usage = self._counts.usage()
        if self._call.chat.wants_usage and _is_whole(usage):
            self._out.append(Chunk(self._event([], usage), usage=usage))
        self._out.append(Chunk(DONE))
        self._done = True

    def _ping(self, event: Json) -> None:
        self._out.append(Chunk(PING))

    def _error_event(self, event: Json) -> None:
        self._fail(self._reported(event))

    # --- chunks ---------------------------------------------------------------------------------------------------

    def _send_role(self, usage: Usage | None = None) -> None:
        self._role_sent = True
        self._out.append(Chunk(self._choice({"role": "assistant", "content": ""}), usage=usage))

    def _send(self, delta: Json, text: str = "") -> None:
        if not self._role_sent:
            self._send_role()
        self._out.append(Chunk(self._choice(delta), text))

    def _send_content(self, text: str) -> None:
        if text:
            self._send({"content": text}, text)

    def _send_refusal(self, text: str) -> None:
        if text:
            self._send({"refusal": text}, text)

    def _send_reasoning(self, text: str) -> None:
        if text:
            detail = {"type": "reasoning.text", "text": text, "index": max(self._reasoning, 0)}
            self._send({"reasoning_content": text, "reasoning_details": [detail]}, text)

    def _send_signature(self, signature: str) -> None:
        """The signature ends a thinking block; with it the client can send the block back, which tool loops need."""
        if signature:
            self._send({"reasoning_details": [_signed("", signature, max(self._reasoning, 0))]})

    def _open_call(self, index: int, block: Json) -> None:
        call = _ToolCall.opened(block, self._call_count, self._tools, self._call.completion_id)
        self._call_count += 1
        self._calls[index] = call
        self._send({"tool_calls": [{"index": call.number} | call.described("")]}, call.tool.name)

    def _send_arguments(self, index: int, piece: str) -> None:
        call = self._calls.get(index)
        if call is None or not piece:
            return
        call.begun = True
        if call.tool.custom:
            self._hold(call, piece)
        else:
            self._send({"tool_calls": [{"index": call.number, "function": {"arguments": piece}}]}, piece)

    def _hold(self, call: "_ToolCall", piece: str) -> None:
        call.pieces.append(piece)
        call.held += len(piece)
        if call.held > MAX_EVENT:
            self._fail(
                EventTooLarge(f"the provider sent an input of more than {MAX_EVENT} characters for a custom tool")
            )

    def _close_call(self, call: "_ToolCall") -> None:
        """Without a piece of input a call has the input of its start, or none, which is `{}`."""
        if call.tool.custom:
            text = call.custom_input()
            self._send({"tool_calls": [{"index": call.number, "custom": {"input": text}}]}, text)
        elif not call.begun:
            text = _dump(call.input).decode()
            self._send({"tool_calls": [{"index": call.number, "function": {"arguments": text}}]}, text)

    def _finish(self, reason: str | None) -> None:
        while self._calls:
            self._close_call(self._calls.pop(next(iter(self._calls))))
        if not self._role_sent:
            self._send_role()
        self._finish_reason = _finish_reason(reason, self._call_count)
        data = self._choice({}, self._finish_reason)
        self._out.append(Chunk(data, usage=self._counts.usage(), finish_reason=self._finish_reason))

    def _choice(self, delta: Json, finish_reason: str | None = None) -> bytes:
        return self._event([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])

    def _event(self, choices: list[Json], usage: Usage | None = None) -> bytes:
        chunk = self._envelope("chat.completion.chunk", choices)
        if self._call.chat.wants_usage:
            chunk["usage"] = usage.to_openai() if usage is not None else None
        return data_event(_dump(chunk))

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        call = self._call
        return {
            "id": call.completion_id,
            "object": kind,
            "created": call.created,
            "model": self._model,
            "choices": choices,
        }

    # --- a whole answer -------------------------------------------------------------------------------------------

    def reply(self, body: bytes) -> Reply:
        message = _json_object(body)
        if message is None:
            raise UpstreamBadBody("the provider's answer is not a JSON object")
        if message.get("type") == "error" or (message.get("error") and "content" not in message):
            raise self._reported(message)
        if not isinstance(message.get("content"), list):
            raise UpstreamBadBody("the provider's answer has no content")
        self._model = _text(message, "model") or self._model
        self._counts.merge(message.get("usage"), final=True)
        usage = self._counts.usage()
        answer = _Answer(self._tools, self._call.completion_id)
        for block in message["content"]:
            if isinstance(block, dict):
                answer.add(block)
        if message.get("stop_reason") == "refusal":
            answer.refusal = _text(_object(message, "stop_details"), "explanation")
        finish_reason = _finish_reason(message.get("stop_reason"), len(answer.calls))
        choice = {"index": 0, "message": answer.message(), "logprobs": None, "finish_reason": finish_reason}
        completion = self._envelope("chat.completion", [choice])
        completion["usage"] = usage.to_openai() if usage is not None and _is_whole(usage) else None
        return Reply(_dump(completion), answer.text(), usage, finish_reason)

    # --- errors ---------------------------------------------------------------------------------------------------

    def error(self, status: int, body: bytes, retry_after: float | None = None) -> UpstreamError:
        return self._failure(status, _json_object(body) or {}, retry_after)

    def _failure(self, status: int, body: Json, retry_after: float | None = None) -> UpstreamError:
        """What a status means. https://platform.claude.com/docs/en/api/errors"""
        message = _words(body) or f"the provider answered with status {status}"
        if status in (401, 403):
            return self._refused_credential(status)
        if status == 429:
            return UpstreamRateLimited(message, retry_after=max(retry_after or 0.0, 1.0))
        if status in (503, 529):
            return UpstreamOverloaded(message, retry_after=retry_after)
        if status >= 500:
            return UpstreamError(message, kind="http_5xx", retry_after=retry_after)
        if status >= 400:
            return _rejected(status, _object(body, "error"), message)
        if status >= 300:
            return UpstreamError("the provider redirected the request", kind="redirect")
        return UpstreamBadBody(f"the provider answered with status {status}")

    def _refused_credential(self, status: int) -> UpstreamError:
        """The provider's own words may quote the key, so nobody sees them."""
        if self._call.target.own_credential:
            words = "refused the credential" if status == 401 else "does not allow this with the credential"
            return UpstreamRejected(
                f"the provider {words} that came with the request",
                status=status,
                type="authentication_error" if status == 401 else "permission_error",
                code="invalid_api_key",
            )
        return ProviderAuth("the provider refused the gateway's credential")

    def _reported(self, body: Json) -> UpstreamError:
        """The error of an answer whose status was 200."""
        status = _STATUS.get(_text(_object(body, "error"), "type"), 500)
        error = self._failure(status, body if _words(body) else {"error": "the provider reported an error"})
        if not isinstance(error, ProviderAuth):
            error.kind = "error_event"
        return error

    def _fail(self, error: UpstreamError) -> None:
        self._error, self._done = error, True


_HANDLERS: Mapping[str, Callable[[AnthropicTranslator, Json], None]] = {
    "message_start": AnthropicTranslator._message_start,
    "content_block_start": AnthropicTranslator._block_start,
    "content_block_delta": AnthropicTranslator._block_delta,
    "content_block_stop": AnthropicTranslator._block_stop,
    "message_delta": AnthropicTranslator._message_delta,
    "message_stop": AnthropicTranslator._message_stop,
    "ping": AnthropicTranslator._ping,
    "error": AnthropicTranslator._error_event,
}


def model_names(parsed: Any) -> list[str]:
    """The names in an answer of `GET /v1/models`."""
    rows = parsed.get("data") if isinstance(parsed, dict) else None
    if not isinstance(rows, list):
        return []
    return [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]


# --- what a stream and a whole answer have in common --------------------------------------------------------------


def _finish_reason(reason: Any, calls: int) -> str:
    """OpenAI's word. An agent waits for calls after `tool_calls` and for none after `stop`, so the calls decide."""
    word = _FINISH_REASONS.get(reason, "stop") if isinstance(reason, str) else "stop"
    if word in ("stop", "tool_calls"):
        return "tool_calls" if calls else "stop"
    return word


@dataclass(slots=True)
class _ToolCall:
    """One tool_use block. Mutable while its input comes in."""

    number: int  # among the client's tool calls
    id: str
    tool: Tool
    input: Any  # as the block's start has it
    begun: bool = False  # a piece of the input came
    pieces: list[str] = field(default_factory=list)  # of a custom tool's input, which is no JSON for the client
    held: int = 0  # characters in `pieces`

    @classmethod
    def opened(cls, block: Json, number: int, tools: Mapping[str, Tool], completion_id: str) -> "_ToolCall":
        name = _text(block, "name")
        call_id = _text(block, "id") or f"call_{completion_id}_{number}"
        return cls(number, call_id, tools.get(name, Tool(name)), block.get("input") or {})

    def arguments(self) -> str:
        """The input of a whole block, as the client gets it."""
        return self.custom_input() if self.tool.custom else _dump(self.input).decode()

    def custom_input(self) -> str:
        """The text that `anthropic_request` asked for as the one member of an object; what else came, as it came."""
        joined = "".join(self.pieces)
        given = _json_object(joined) if joined else self.input
        text = given.get("input") if isinstance(given, dict) else None
        return text if isinstance(text, str) else joined

    def described(self, content: str) -> Json:
        """The OpenAI object, with its arguments or its custom input."""
        if self.tool.custom:
            return {"id": self.id, "type": "custom", "custom": {"name": self.tool.name, "input": content}}
        return {"id": self.id, "type": "function", "function": {"name": self.tool.name, "arguments": content}}


def _signed(text: str, signature: str, index: int) -> Json:
    detail: Json = {"type": "reasoning.text", "text": text, "index": index}
    return detail | ({"signature": signature, "format": REASONING_FORMAT} if signature else {})


def _encrypted(data: str, index: int) -> Json:
    return {"type": "reasoning.encrypted", "data": data, "index": index, "format": REASONING_FORMAT}


class _Answer:
    """Collects the blocks of a whole message."""

    def __init__(self, tools: Mapping[str, Tool], completion_id: str) -> None:
        self._tools, self._completion_id = tools, completion_id
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._details: list[Json] = []
        self._called: list[str] = []  # names and arguments, for the meter
        self.calls: list[Json] = []
        self.refusal = ""

    def add(self, block: Json) -> None:
        kind = block.get("type")
        if kind == "text":
            self._content.append(_text(block, "text"))
        elif kind == "thinking":
            self._reasoning.append(_text(block, "thinking"))
            self._details.append(_signed(self._reasoning[-1], _text(block, "signature"), len(self._details)))
        elif kind == "redacted_thinking":
            self._details.append(_encrypted(_text(block, "data"), len(self._details)))
        elif kind == "tool_use":
            call = _ToolCall.opened(block, len(self.calls), self._tools, self._completion_id)
            content = call.arguments()
            self.calls.append(call.described(content))
            self._called += [call.tool.name, content]

    def message(self) -> Json:
        content = "".join(self._content)
        message: Json = {
            "role": "assistant",
            "content": content if content or not (self.calls or self.refusal) else None,
            "refusal": self.refusal or None,
        }
        if reasoning := "".join(self._reasoning):
            message["reasoning_content"] = reasoning
        if self._details:
            message["reasoning_details"] = self._details
        if self.calls:
            message["tool_calls"] = self.calls
        return message

    def text(self) -> str:
        return "".join([*self._content, *self._reasoning, self.refusal, *self._called])


class _Counts:
    """The provider's own figures. Each report overwrites, field by field, what it names; nothing is ever added up: the
    last `input_tokens` of a stream with server tools is larger than the first."""

    def __init__(self) -> None:
        self._latest: dict[str, int] = {}

    def merge(self, usage: Any, *, final: bool = False) -> None:
        """Take in a `usage` object. `output_tokens` counts only in a final one: message_start holds a placeholder."""
        if not isinstance(usage, dict):
            return
        names: Sequence[str] = _INPUT_COUNTS
        if final:
            names = (*_INPUT_COUNTS, "output_tokens")
            _keep(self._latest, "thinking_tokens", _object(usage, "output_tokens_details"))
        for name in names:
            _keep(self._latest, name, usage)

    def usage(self) -> Usage | None:
        """By OpenAI's containment: Anthropic's `input_tokens` excludes what was read from and written to the cache."""
        if not self._latest:
            return None
        read = self._latest.get("cache_read_input_tokens", 0)
        written = self._latest.get("cache_creation_input_tokens", 0)
        fresh = self._latest.get("input_tokens")
        return Usage(
            prompt_tokens=None if fresh is None else fresh + read + written,
            completion_tokens=self._latest.get("output_tokens"),
            cached_tokens=read,
            cache_write_tokens=written,
            reasoning_tokens=self._latest.get("thinking_tokens", 0),
        )


def _is_whole(usage: Usage | None) -> bool:
    """Whether the client may see it: a count that the provider left out would read as 0."""
    return usage is not None and usage.prompt_tokens is not None and usage.completion_tokens is not None


MAX_COUNT = 1 << 53  # tokens; more, or infinity, is no count
_INPUT_COUNTS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


def _keep(counts: dict[str, int], name: str, usage: Json) -> None:
    value = usage.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MAX_COUNT:
        counts[name] = int(value)


# --- errors -------------------------------------------------------------------------------------------------------

MAX_MESSAGE = 2_000  # characters of the provider's words that are passed on

_STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}

_TOO_LONG = re.compile(r"prompt is too long|exceed[^.]{0,40} context (?:window|limit)", re.IGNORECASE)


def _words(body: Json) -> str:
    """What the provider, or a proxy before it, says of an error."""
    words = _text(_object(body, "error"), "message") or _text(body, "error") or _text(body, "message")
    return _encodable(words[:MAX_MESSAGE])


def _encodable(text: str) -> str:
    """Without lone surrogates, which an error object cannot hold."""
    return text.encode("utf-8", "replace").decode()


def _rejected(status: int, problem: Json, message: str) -> UpstreamRejected:
    """A 4xx that the request caused, in OpenAI's words."""
    kind = _encodable(_text(problem, "type")) or "invalid_request_error"
    code = _encodable(_text(_object(problem, "details"), "error_code")) or kind
    if status == 404:
        return UpstreamRejected(message, status=404, code="model_not_found", param="model")
    if _TOO_LONG.search(message):
        return UpstreamRejected(message, status=400, code="context_length_exceeded", param="messages")
    if status == 413:
        return UpstreamRejected(message, status=413, code="request_too_large")
    return UpstreamRejected(message, status=status, type=kind, code=code)


# --- JSON ---------------------------------------------------------------------------------------------------------


def _json_object(data: bytes | str | None) -> Json | None:
    """The object in `data`; None when it holds none. orjson refuses lone surrogates, which models do write."""
    if data is None:
        return None
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            parsed = json.loads(data)
        except (ValueError, RecursionError):
            return None
    return parsed if isinstance(parsed, dict) else None


def _dump(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # a lone surrogate: only the escaped form can be sent
        pass
    try:
        return json.dumps(value, separators=(",", ":")).encode()
    except RecursionError:
        raise UpstreamBadBody("the provider sent JSON that is nested too deep", kind="bad_event") from None


def _object(source: Json, name: str) -> Json:
    value = source.get(name)
    return value if isinstance(value, dict) else {}


def _text(source: Json, name: str) -> str:
    value = source.get(name)
    return value if isinstance(value, str) else ""


def _index(event: Json) -> int:
    value = event.get("index")
    return value if isinstance(value, int) else -1

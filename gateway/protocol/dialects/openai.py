"""OpenAI's chat completions, and every server that speaks them: the provider's bytes pass as they are.

We read beside them: what the model wrote, usage, finish reasons, errors. Only four things are not passed on: an event
that breaks a client's parser, an error (the relay sends one of ours), a usage chunk that the client did not ask for,
and what follows `[DONE]`. A stream is whole when `[DONE]` came or when every choice has its finish reason: Perplexity
never sends the one, Snowflake never the other.

Source: https://platform.openai.com/docs/api-reference/chat-streaming; where another server differs, the line says so.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gateway.protocol.chat import Call, Chunk, Reply, UpstreamRequest
from gateway.protocol.errors import (
    EventTooLarge,
    GatewayError,
    UpstreamBadBody,
    UpstreamError,
    UpstreamTruncated,
)
from gateway.protocol.json_object import edit_object, read_json
from gateway.protocol.refusals import refusal, reported
from gateway.protocol.sse import DONE, Event, SSEDecoder, data_event, decode_event
from gateway.protocol.usage import Usage

MAX_BAD_EVENTS = 3  # of broken JSON in one stream: one may be a server's slip, three are another protocol

_BOM = b"\xef\xbb\xbf"
_LAST_WORD = b"[DONE]"
# A chunk without choices that has one of these is more than the usage chunk we asked for: OpenAI's moderation, Azure's
# verdict on the prompt, the sources of a search.
_MORE_THAN_USAGE = ("moderation", "prompt_filter_results", "citations", "search_results")

_HEAD = ("id", "created", "model", "service_tier", "system_fingerprint")  # the same in all chunks of a stream


class OpenAITranslator:
    """One upstream attempt. `feed` never raises: what went wrong is kept, `done` turns true and `flush` raises it."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._decoder = SSEDecoder()
        self._choices: dict[int, bool] = {}  # every index seen: has it its finish reason?
        self._latest: dict[str, Any] = {}  # the last chunk that came
        self._usage_sent = False  # in a chunk of its own
        self._bad_events = 0
        self._error: UpstreamError | None = None
        self._done = False

    @property
    def done(self) -> bool:
        return self._done

    def request(self) -> UpstreamRequest:
        chat, target = self._call.chat, self._call.target
        changes: dict[str, Any] = {}
        if target.model != chat.model:
            changes["model"] = target.model
        if chat.stream and target.provider.asks_usage and not chat.wants_usage:
            options = chat.fields.get("stream_options") or {}
            changes["stream_options"] = {**options, "include_usage": True}
        return UpstreamRequest("/chat/completions", edit_object(chat.body, changes) if changes else chat.body)

    # --- a stream ---

    def feed(self, data: bytes) -> list[Chunk]:
        chunks: list[Chunk] = []
        if self._done:
            return chunks
        for event in self._events(data):
            chunk = self._take(event)
            if chunk is not None:
                chunks.append(chunk)
            if self._done:
                break
        return chunks

    def flush(self) -> list[Chunk]:
        chunks = [*self.feed(b""), *self._take_rest()]
        if self._error is not None:
            raise self._error
        if self._done:
            return chunks
        if not self._whole():
            raise UpstreamTruncated("the provider's stream ended before the answer did")
        self._done = True
        return [*chunks, Chunk(DONE)]

    def cut(self, usage: Usage) -> bytes:
        if self._done and self._error is None:
            return b""
        self._done = True
        events = []
        if not self._choices:
            self._choices[0] = False
            events.append(self._made(_choice(0, {"role": "assistant", "content": ""})))
        events += [self._made(_choice(index, {}, "length")) for index, ended in self._choices.items() if not ended]
        if self._call.chat.wants_usage and not self._usage_sent:
            events.append(self._made(usage=usage))
        return b"".join([*events, DONE])

    def _made(self, *choices: dict[str, Any], usage: Usage | None = None) -> bytes:
        """The event of a chunk of ours, with the head of the provider's."""
        chunk = {**_head(self._latest, self._call), "choices": choices}
        if self._call.chat.wants_usage:
            chunk["usage"] = usage.to_openai() if usage is not None else None
        return data_event(_dumps(chunk).encode("utf-8", "backslashreplace"))  # JSON's own escape for half an emoji

    def _events(self, data: bytes) -> list[Event]:
        try:
            return self._decoder.feed(data)
        except EventTooLarge as error:
            self._fail(error)
            return []

    def _take(self, event: Event) -> Chunk | None:
        if event.stray is not None or event.name == "error":
            return self._fail(self._reported(_loads_or_text(event.stray or event.data or b"")))
        if event.data is None:
            # A comment keeps the connection alive. A bare `event:` or `id:` makes the OpenAI SDK parse an empty string.
            return Chunk(event.raw) if event.plain and not event.name else None
        data = event.data.strip()
        if not data:
            return None  # the same empty string
        if data == _LAST_WORD:
            self._done = True
            return Chunk(_sendable(event))
        parsed = read_json(data)
        if (error := _error_in(parsed)) is not None:
            return self._fail(self._reported(error), parsed)
        if not isinstance(parsed, dict):
            self._drop()
            return None
        return self._chunk(event, parsed)

    def _chunk(self, event: Event, parsed: dict[str, Any]) -> Chunk:
        choices = _choices(parsed)
        usage = _usage(parsed)
        if not choices:
            if not self._call.chat.wants_usage and _is_usage_alone(parsed):
                return Chunk(b"", usage=usage)
            self._usage_sent = self._usage_sent or usage is not None
        self._latest = parsed
        finish_reason = None
        for position, choice in enumerate(choices):
            index = choice.get("index")
            index = index if isinstance(index, int) else position  # some servers leave it out, or null
            if reason := _finish_reason(choice):
                finish_reason = reason
            self._choices[index] = reason is not None or self._choices.get(index, False)
        return Chunk(_sendable(event), _text(choices, "delta"), usage, finish_reason)

    def _take_rest(self) -> list[Chunk]:
        """An event that the connection's end left open counts when it is whole; half of one is dropped.

        We close it, because the SDKs drop an event without its blank line, and would glue ours to it.
        """
        raw = self._decoder.rest() + b"\n\n"
        event = decode_event(raw)
        whole = event.stray or (event.data and (event.data.strip() == _LAST_WORD or read_json(event.data) is not None))
        chunk = self._take(event) if whole and not self._done else None
        return [chunk] if chunk is not None else []

    def _whole(self) -> bool:
        expected = self._call.chat.fields.get("n") or 1
        return len(self._choices) >= expected and all(self._choices.values())

    def _drop(self) -> None:
        self._bad_events += 1
        if self._bad_events == MAX_BAD_EVENTS:
            self._fail(UpstreamBadBody(f"the provider sent {MAX_BAD_EVENTS} events of broken JSON", kind="bad_event"))

    def _fail(self, error: UpstreamError, parsed: Any = None) -> Chunk | None:
        """Keep `error` for `flush`. OpenRouter's error chunk carries the usage that is billed for it."""
        self._error, self._done = error, True
        usage = _usage(parsed) if isinstance(parsed, dict) else None
        return Chunk(b"", usage=usage) if usage is not None else None

    def _reported(self, parsed: Any) -> UpstreamError:
        return reported(parsed, self._call.target)

    # --- a whole answer ---

    def reply(self, body: bytes) -> Reply:
        body = body.removeprefix(_BOM)
        parsed = read_json(body)
        if (error := _error_in(parsed)) is not None:
            raise self._reported(error)
        if not isinstance(parsed, dict) or not isinstance(parsed.get("choices"), list):
            raise UpstreamBadBody("the provider's answer is not a chat completion")
        choices = _choices(parsed)
        reasons = [reason for choice in choices if (reason := _finish_reason(choice))]
        return Reply(body, _text(choices, "message"), _usage(parsed), reasons[-1] if reasons else None)

    # --- errors ---

    def error(self, status: int, body: bytes, retry_after: float | None = None) -> GatewayError:
        return refusal(status, read_json(body), self._call.target, retry_after)


def model_names(parsed: Any) -> Sequence[str]:
    """From the answer of `GET /models`; Together answers with the bare list."""
    rows = parsed.get("data") if isinstance(parsed, dict) else parsed
    names = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [name for name in names if isinstance(name, str) and name]


# --- reading what the provider sent -------------------------------------------------------------------------------


def _loads_or_text(data: bytes) -> Any:
    parsed = read_json(data)
    return data.decode("utf-8", "replace") if parsed is None else parsed


def _error_in(parsed: Any) -> Any:
    """Where an event or an answer with status 200 says that it failed; None when it does not."""
    if isinstance(parsed, list) and parsed:
        parsed = parsed[0]
    if not isinstance(parsed, dict):
        return None
    if parsed.get("error") or parsed.get("object") == "error":
        return parsed
    groq = parsed.get("x_groq")
    if isinstance(groq, dict) and groq.get("error"):
        return groq
    failed = (choice for choice in _choices(parsed) if choice.get("error") or choice.get("finish_reason") == "error")
    return next(failed, None)


def _sendable(event: Event) -> bytes:
    """The event's own bytes; its data alone when it has an `id:`, after which the SDKs choke on every comment."""
    if event.plain or event.data is None:
        return event.raw
    return data_event(event.data.replace(b"\n", b" "))


def _head(latest: Mapping[str, Any], call: Call) -> dict[str, Any]:
    """What a chunk of ours begins with: as in the provider's `latest`, and the call's own where that says nothing."""
    own = {"id": call.completion_id, "object": "chat.completion.chunk", "created": call.created}
    said = {name: value for name in _HEAD if isinstance(value := latest.get(name), str | int | float) and value}
    return {**own, "model": call.target.model, **said}


def _choice(index: int, delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _choices(parsed: Mapping[str, Any]) -> list[dict[str, Any]]:
    choices = parsed.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def _finish_reason(choice: Mapping[str, Any]) -> str | None:
    reason = choice.get("finish_reason")
    return reason if isinstance(reason, str) and reason else None  # Snowflake's is always ""


def _usage(parsed: Mapping[str, Any]) -> Usage | None:
    usage = Usage.from_openai(parsed.get("usage"))
    groq = parsed.get("x_groq") if usage is None else None
    return Usage.from_openai(groq.get("usage")) if isinstance(groq, dict) else usage


def _is_usage_alone(parsed: Mapping[str, Any]) -> bool:
    return parsed.get("usage") is not None and not any(parsed.get(name) for name in _MORE_THAN_USAGE)


def _text(choices: Sequence[Mapping[str, Any]], part: str) -> str:
    """All that the model wrote in the choices' `delta` or `message`."""
    return "".join(text for choice in choices if isinstance(choice.get(part), dict) for text in _texts(choice[part]))


def _texts(message: Mapping[str, Any]) -> Iterator[str]:
    yield from _content_texts(message.get("content"))
    yield from _reasoning_texts(message)
    if isinstance(refusal := message.get("refusal"), str):
        yield refusal
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, dict):
            yield from _call_texts(call.get("function") or call.get("custom"))
    yield from _call_texts(message.get("function_call"))


def _content_texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            yield from _part_texts(part)


def _part_texts(part: Any) -> Iterator[str]:
    """Mistral streams a list: `{type: text, text}` and `{type: thinking, thinking: [{type: text, text}]}`."""
    thinking = part.get("thinking") if isinstance(part, dict) else None
    for piece in thinking if isinstance(thinking, list) else [part]:
        if isinstance(piece, dict):
            yield from (text for name in ("text", "thinking", "refusal") if isinstance(text := piece.get(name), str))


def _reasoning_texts(message: Mapping[str, Any]) -> Iterator[str]:
    """Reasoning once: OpenRouter and vLLM send the same text under two names."""
    for name in ("reasoning_content", "reasoning"):
        text = message.get(name)
        if isinstance(text, str) and text:
            yield text
            return
    details = message.get("reasoning_details")
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, dict):
            yield from (text for name in ("text", "summary") if isinstance(text := detail.get(name), str))


def _call_texts(function: Any) -> Iterator[str]:
    if not isinstance(function, dict):
        return
    for name in ("name", "arguments", "input"):
        value = function.get(name)
        if isinstance(value, str):
            yield value
        elif value is not None:  # a string by OpenAI's word, an object by some others'
            yield _dumps(value)


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        return ""

"""OpenAI's completions, of chats and of bare prompts, from every server that speaks them: its bytes pass as they are.

We read beside them: what the model wrote, usage, finish reasons, errors. Only four things are not passed on: an event
that breaks a client's parser, an error (the relay sends one of ours), a usage chunk that the client did not ask for,
and what follows `[DONE]`. A stream is whole when `[DONE]` came or when every choice has its finish reason: Perplexity
never sends the one, Snowflake never the other.

Source: https://platform.openai.com/docs/api-reference/chat-streaming; where another server differs, the line says so.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from gateway.protocol.dialects.openai.reading import (
    choices_of,
    dump,
    error_in,
    finish_reason_of,
    is_usage_alone,
    json_or_text,
    text_of,
    usage_of,
)
from gateway.protocol.dialects.openai.request import request
from gateway.protocol.errors import (
    EventTooLarge,
    GatewayError,
    UpstreamBadBody,
    UpstreamError,
    UpstreamTruncated,
)
from gateway.protocol.json_object import read_json
from gateway.protocol.refusals import refusal, reported
from gateway.protocol.request import Call, Chunk, Reply, UpstreamRequest
from gateway.protocol.sse import DONE, MAX_EVENT, Event, SSEDecoder, data_event, decode_event
from gateway.protocol.usage import Usage
from gateway.protocol.usual import PROBE, Path, Usual

MAX_BAD_EVENTS = 3  # of broken JSON in one stream: one may be a server's slip, three are another protocol

_BOM = b"\xef\xbb\xbf"
_LAST_WORD = b"[DONE]"
# Where the text of a usual event stands: nine of ten have all of it in one of these.
_DELTA: Path = ("choices", 0, "delta")
_CHAT_TEXTS: tuple[Path, ...] = (
    (*_DELTA, "content"),
    (*_DELTA, "reasoning_content"),
    (*_DELTA, "reasoning"),
    (*_DELTA, "refusal"),
    (*_DELTA, "tool_calls", 0, "function", "arguments"),
)
# What may differ beside it and is not read: OpenAI's and Mistral's padding, OpenRouter's second copy of the reasoning.
_BESIDE: tuple[Path, ...] = (("obfuscation",), ("p",), (*_DELTA, "reasoning_details", 0, "text"))

_HEAD = ("id", "created", "model", "service_tier", "system_fingerprint")  # the same in all chunks of a stream


class _Form(NamedTuple):
    """Where chat completions and completions differ."""

    path: str
    name: str  # of the whole answer, for people
    chunk: str  # a chunk's `object`
    delta: str  # what the model wrote, in a choice of a chunk
    message: str  # and in one of a whole answer
    nothing: Any  # the delta of a choice that says no more
    texts: tuple[Path, ...]


CHAT = _Form(
    "/chat/completions", "a chat completion", "chat.completion.chunk", "delta", "message", {}, _CHAT_TEXTS
)  # fmt: skip
# https://platform.openai.com/docs/api-reference/completions
COMPLETION = _Form(
    "/completions", "a completion", "text_completion", "text", "text", "", (("choices", 0, "text"),)
)  # fmt: skip


class OpenAITranslator:
    """One upstream attempt. `feed` never raises: what went wrong is kept, `done` turns true and `flush` raises it."""

    def __init__(self, call: Call, form: _Form = CHAT) -> None:
        self._call = call
        self._form = form
        self._decoder = SSEDecoder()
        self._choices: dict[int, bool] = {}  # every index seen: has it its finish reason?
        self._latest: dict[str, Any] = {}  # the last chunk that came, as far as its head is concerned
        self._usual = Usual()
        self._usual_head: dict[str, Any] = {}
        self._usage_sent = False  # in a chunk of its own
        self._bad_events = 0
        self._error: UpstreamError | None = None
        self.done = False

    def request(self) -> UpstreamRequest:
        return request(self._call, self._form.path)

    # --- a stream ---

    def feed(self, data: bytes) -> list[Chunk]:
        if self.done:
            return []
        closed = self._decoder.between and data.endswith(b"\n\n") and len(data) <= MAX_EVENT
        if closed and (text := self._usual.text_of(data)):
            self._latest = self._usual_head
            return [Chunk(data, text)]  # one event: no literal has a line end in it
        chunks: list[Chunk] = []
        for raw in self._events(data):
            if text := self._usual.text_of(raw):
                self._latest = self._usual_head
                chunks.append(Chunk(raw, text))
            elif (chunk := self._take(decode_event(raw))) is not None:
                chunks.append(chunk)
            if self.done:
                break
        return chunks

    def flush(self) -> list[Chunk]:
        chunks = [*self.feed(b""), *self._take_rest()]
        if self._error is not None:
            raise self._error
        if self.done:
            return chunks
        if not self._whole():
            raise UpstreamTruncated("the provider's stream ended before the answer did")
        self.done = True
        return [*chunks, Chunk(DONE)]

    def cut(self, usage: Usage) -> bytes:
        if self.done and self._error is None:
            return b""
        self.done = True
        events = []
        if not self._choices:
            self._choices[0] = False
            if self._form is CHAT:
                events.append(self._made(self._choice(0, {"role": "assistant", "content": ""})))
        open_ = [index for index, ended in self._choices.items() if not ended]
        events += [self._made(self._choice(index, self._form.nothing, "length")) for index in open_]
        if self._call.asked.wants_usage and not self._usage_sent:
            events.append(self._made(usage=usage))
        return b"".join([*events, DONE])

    def _choice(self, index: int, delta: Any, finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": index, self._form.delta: delta, "logprobs": None, "finish_reason": finish_reason}

    def _made(self, *choices: dict[str, Any], usage: Usage | None = None) -> bytes:
        """The event of a chunk of ours, with the head of the provider's."""
        chunk = {**_head(self._latest, self._call, self._form.chunk), "choices": choices}
        if self._call.asked.wants_usage:
            chunk["usage"] = usage.to_openai() if usage is not None else None
        return data_event(dump(chunk).encode("utf-8", "backslashreplace"))  # JSON's own escape for half an emoji

    def _events(self, data: bytes) -> list[bytes]:
        try:
            return self._decoder.split(data)
        except EventTooLarge as error:
            self._fail(error)
            return []

    def _take(self, event: Event) -> Chunk | None:
        if event.stray is not None or event.name == "error":
            return self._fail(self._reported(json_or_text(event.stray or event.data or b"")))
        if event.data is None:
            # A comment keeps the connection alive. A bare `event:` or `id:` makes the OpenAI SDK parse an empty string.
            return Chunk(event.raw) if event.plain and not event.name else None
        data = event.data.strip()
        if not data:
            return None  # the same empty string
        if data == _LAST_WORD:
            self.done = True
            return Chunk(_sendable(event))
        parsed = read_json(data)
        if (error := error_in(parsed)) is not None:
            return self._fail(self._reported(error), parsed)
        if not isinstance(parsed, dict):
            self._drop()
            return None
        return self._chunk(event, parsed)

    def _chunk(self, event: Event, parsed: dict[str, Any]) -> Chunk:
        choices = choices_of(parsed)
        usage = usage_of(parsed)
        if not choices:
            if not self._call.asked.wants_usage and is_usage_alone(parsed):
                return Chunk(b"", usage=usage)
            self._usage_sent = self._usage_sent or usage is not None
        self._latest = parsed
        finish_reason, text = None, text_of(choices, self._form.delta)
        for position, choice in enumerate(choices):
            index = choice.get("index")
            index = index if isinstance(index, int) else position  # some servers leave it out, or null
            if reason := finish_reason_of(choice):
                finish_reason = reason
            self._choices[index] = reason is not None or self._choices.get(index, False)
        if text and usage is None and finish_reason is None and event.plain and self._usual.patient:
            self._learn(event.raw, parsed, text)
        return Chunk(_sendable(event), text, usage, finish_reason)

    def _learn(self, raw: bytes, parsed: dict[str, Any], text: str) -> None:
        """A usual event is a chunk of text and no more, whose text is that of one string, whatever that is."""
        path = next((path for path in self._form.texts if _string(parsed, path) == text), None)
        if path is None:
            return
        other = next((path for path in _BESIDE if _string(parsed, path) is not None), None)
        meaning = self._usual.learn(raw, _read, path, other)
        if meaning is None:
            return
        self._usual_head = {name: meaning.get(name) for name in _HEAD}
        if text_of(choices_of(meaning), self._form.delta) != PROBE:
            self._usual.forget()

    def _take_rest(self) -> list[Chunk]:
        """An event that the connection's end left open counts when it is whole; half of one is dropped.

        We close it, because the SDKs drop an event without its blank line, and would glue ours to it.
        """
        raw = self._decoder.rest() + b"\n\n"
        event = decode_event(raw)
        whole = event.stray or (event.data and (event.data.strip() == _LAST_WORD or read_json(event.data) is not None))
        chunk = self._take(event) if whole and not self.done else None
        return [chunk] if chunk is not None else []

    def _whole(self) -> bool:
        expected = self._call.asked.fields.get("n") or 1
        return len(self._choices) >= expected and all(self._choices.values())

    def _drop(self) -> None:
        self._bad_events += 1
        if self._bad_events == MAX_BAD_EVENTS:
            self._fail(UpstreamBadBody(f"the provider sent {MAX_BAD_EVENTS} events of broken JSON", kind="bad_event"))

    def _fail(self, error: UpstreamError, parsed: Any = None) -> Chunk | None:
        """Keep `error` for `flush`. OpenRouter's error chunk carries the usage that is billed for it."""
        self._error, self.done = error, True
        usage = usage_of(parsed) if isinstance(parsed, dict) else None
        return Chunk(b"", usage=usage) if usage is not None else None

    def _reported(self, parsed: Any) -> UpstreamError:
        return reported(parsed, self._call.target)

    # --- a whole answer ---

    def reply(self, body: bytes) -> Reply:
        body = body.removeprefix(_BOM)
        parsed = read_json(body)
        if (error := error_in(parsed)) is not None:
            raise self._reported(error)
        if not isinstance(parsed, dict) or not isinstance(parsed.get("choices"), list):
            raise UpstreamBadBody(f"the provider's answer is not {self._form.name}")
        choices = choices_of(parsed)
        finish_reason = None
        for choice in choices:
            finish_reason = finish_reason_of(choice) or finish_reason
        return Reply(body, text_of(choices, self._form.message), usage_of(parsed), finish_reason)

    # --- errors ---

    def error(self, status: int, body: bytes, retry_after: float | None = None) -> GatewayError:
        return refusal(status, read_json(body), self._call.target, retry_after)


def _read(raw: bytes) -> Any:
    return orjson.loads(decode_event(raw).data or b"")


def _string(parsed: Any, path: Path) -> str | None:
    """What stands there, if it is a string."""
    try:
        for step in path:
            parsed = parsed[step]
    except (LookupError, TypeError):
        return None
    return parsed if isinstance(parsed, str) else None


def _sendable(event: Event) -> bytes:
    """The event's own bytes; its data alone when it has an `id:`, after which the SDKs choke on every comment."""
    if event.plain or event.data is None:
        return event.raw
    return data_event(event.data.replace(b"\n", b" "))


def _head(latest: Mapping[str, Any], call: Call, chunk: str) -> dict[str, Any]:
    """What a chunk of ours begins with: as in the provider's `latest`, and the call's own where that says nothing."""
    own = {"id": call.completion_id, "object": chunk, "created": call.created}
    said = {name: value for name in _HEAD if isinstance(value := latest.get(name), str | int | float) and value}
    return {**own, "model": call.target.model, **said}

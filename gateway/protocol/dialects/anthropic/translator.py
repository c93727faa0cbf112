"""Anthropic's Messages API behind an OpenAI chat (https://platform.claude.com/docs/en/build-with-claude/streaming).

A stream is `message_start`, blocks one after another (start, deltas, stop), `message_delta`, `message_stop`; `ping`
and `error` may come anywhere. Block types and events that are not named here are new, or the provider's own business
(server tools), and do not reach the client.
"""

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from gateway.protocol.dialects.anthropic.chunks import Chunks, Frame
from gateway.protocol.dialects.anthropic.counts import Counts
from gateway.protocol.dialects.anthropic.objects import Json, dump, index_of, json_object, object_of, text_of
from gateway.protocol.dialects.anthropic.reply import read_reply
from gateway.protocol.dialects.anthropic.request import messages_body
from gateway.protocol.dialects.anthropic.tools import offered_tools
from gateway.protocol.errors import EventTooLarge, UpstreamBadBody, UpstreamError, UpstreamTruncated
from gateway.protocol.refusals import refusal, reported
from gateway.protocol.request import Call, Chunk, Reply, UpstreamRequest
from gateway.protocol.sse import MAX_EVENT, PING, Event, SSEDecoder, decode_event
from gateway.protocol.usage import Usage
from gateway.protocol.usual import Usual

MAX_BAD_EVENTS = 3  # one may be a middlebox; three are not this dialect

_TEXTS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}


class AnthropicTranslator:
    """One attempt at `POST /v1/messages`."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._tools = offered_tools(call.asked.fields)
        self._decoder = SSEDecoder()
        self._chunks = Chunks(call, self._tools)
        self._usual = Usual()  # the last delta, if nothing but deltas like it came since
        self._frame: Frame = ()  # of what the client gets for it
        self._error: UpstreamError | None = None  # raised by `flush`
        self.done = False
        self._bad_events = 0
        self._message_id: str | None = None  # None: no message_start yet
        self._counts = Counts()

    def request(self) -> UpstreamRequest:
        return UpstreamRequest("/v1/messages", dump(messages_body(self._call.asked, self._call.target.model)))

    def feed(self, data: bytes) -> list[Chunk]:
        if self.done:
            return []
        if self._decoder.between and len(data) <= MAX_EVENT and (text := self._usual.text_of(_unpadded(data))):
            return [Chunk(orjson.dumps(text).join(self._frame), text)]  # one event: no literal has a line end in it
        self._chunks.out = chunks = []
        for raw in self._events(data):
            if text := self._usual.text_of(_unpadded(raw)):
                chunks.append(Chunk(orjson.dumps(text).join(self._frame), text))
            else:
                self._take(decode_event(raw))
            if self.done:
                return chunks
        if not self._decoder.between:
            self._events(b"")  # says whether what is held is too large, now that the good ones before it are out
        return chunks

    def flush(self) -> list[Chunk]:
        self._chunks.out = []
        if not self.done and (rest := self._decoder.rest()):
            # The last event may lack its blank line. When it is not whole it was cut, and is no bad event.
            event = decode_event(rest)
            self._dispatch(event, json_object(event.data))
        if self._error is not None:
            raise self._error
        if not self.done and self._chunks.finish_reason is not None:
            self._message_stop({})  # all was said but the goodbye
        if not self.done:
            raise UpstreamTruncated("the provider's stream ended before its message_stop")
        return self._chunks.out

    def cut(self, usage: Usage) -> bytes:
        if self.done and self._error is None:
            return b""
        self.done = True
        self._chunks.out = []
        self._chunks.cut(usage)
        return b"".join(chunk.data for chunk in self._chunks.out)

    def reply(self, body: bytes) -> Reply:
        return read_reply(self._call, self._tools, body)

    def error(self, status: int, body: bytes, retry_after: float | None = None) -> UpstreamError:
        return refusal(status, json_object(body), self._call.target, retry_after)

    # --- events ---------------------------------------------------------------------------------------------------

    def _events(self, data: bytes) -> list[bytes]:
        try:
            return self._decoder.split(data)
        except EventTooLarge as error:
            self._fail(error)
            return []

    def _learn(self, raw: bytes, parsed: Json) -> None:
        delta = object_of(parsed, "delta")
        kind = text_of(delta, "type")
        is_delta = parsed.get("type") == "content_block_delta"
        frame = self._chunks.frame(kind, index_of(parsed)) if is_delta else None
        if frame is None or not text_of(delta, _TEXTS[kind]):
            self._usual.forget()
        elif self._usual.learn(_unpadded(raw), _read, ("delta", _TEXTS[kind])):
            self._frame = frame

    def _take(self, event: Event) -> None:
        if event.stray is not None:  # llama.cpp says errors in a field of its own
            self._fail(reported(json_object(event.stray), self._call.target))
        elif event.data is None:
            if event.raw.lstrip().startswith(b":"):
                self._chunks.out.append(Chunk(PING))
        elif (parsed := json_object(event.data)) is not None:
            self._dispatch(event, parsed)
            self._learn(event.raw, parsed)
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
            except (UpstreamBadBody, EventTooLarge) as error:
                self._fail(error)

    def _message_start(self, event: Json) -> None:
        message = object_of(event, "message")
        message_id = text_of(message, "id")
        if self._chunks.role_sent:
            # A proxy that tries again may say it twice; what follows belongs to the message that the client has.
            if message_id != self._message_id:
                raise UpstreamBadBody("the provider began a second message", kind="bad_event")
            return
        self._message_id = message_id
        self._chunks.model = text_of(message, "model") or self._chunks.model
        reason = message.get("stop_reason")
        self._counts.merge(message.get("usage"), final=isinstance(reason, str))
        self._chunks.send_role(self._counts.usage())
        self._whole_blocks(message.get("content"))
        if isinstance(reason, str):
            self._chunks.finish(reason, self._counts.usage())

    def _whole_blocks(self, content: Any) -> None:
        """A turn that code of the model's own goes on with has its tool calls, and its end, in the message_start
        (https://platform.claude.com/docs/en/agents-and-tools/tool-use/programmatic-tool-calling)."""
        for index, block in enumerate(content if isinstance(content, list) else ()):
            self._block_start({"index": index, "content_block": block})
            self._block_stop({"index": index})

    def _block_start(self, event: Json) -> None:
        block = object_of(event, "content_block")
        kind = block.get("type")
        if kind == "text":
            self._chunks.send_content(text_of(block, "text"))
        elif kind == "tool_use":
            self._chunks.open_call(index_of(event), block)
        elif kind == "thinking":
            self._chunks.open_thinking()
            self._chunks.send_reasoning(text_of(block, "thinking"))
            self._chunks.send_signature(text_of(block, "signature"))
        elif kind == "redacted_thinking":
            self._chunks.open_thinking()
            self._chunks.send_encrypted(text_of(block, "data"))

    def _block_delta(self, event: Json) -> None:
        delta = object_of(event, "delta")
        kind = delta.get("type")
        if kind == "text_delta":
            self._chunks.send_content(text_of(delta, "text"))
        elif kind == "input_json_delta":
            self._chunks.send_arguments(index_of(event), text_of(delta, "partial_json"))
        elif kind == "thinking_delta":
            self._chunks.send_reasoning(text_of(delta, "thinking"))
        elif kind == "signature_delta":
            self._chunks.send_signature(text_of(delta, "signature"))

    def _block_stop(self, event: Json) -> None:
        self._chunks.close_call(index_of(event))

    def _message_delta(self, event: Json) -> None:
        self._counts.merge(event.get("usage"), final=True)
        delta = object_of(event, "delta")
        reason = delta.get("stop_reason")
        if isinstance(reason, str) and self._chunks.finish_reason is None:
            if reason == "refusal":
                self._chunks.send_refusal(text_of(object_of(delta, "stop_details"), "explanation"))
            self._chunks.finish(reason, self._counts.usage())
        else:
            self._chunks.out.append(Chunk(b"", usage=self._counts.usage()))

    def _message_stop(self, event: Json) -> None:
        usage = self._counts.usage()
        if self._chunks.finish_reason is None:
            self._chunks.finish(None, usage)
        self._chunks.end(usage)
        self.done = True

    def _ping(self, event: Json) -> None:
        self._chunks.out.append(Chunk(PING))

    def _error_event(self, event: Json) -> None:
        self._fail(reported(event, self._call.target))

    def _fail(self, error: UpstreamError) -> None:
        self._error, self.done = error, True


def _unpadded(raw: bytes) -> bytes:
    """Without what ends every event: Anthropic puts a random number of spaces before the last brace."""
    return raw[:-3].rstrip(b" ") if raw.endswith(b"}\n\n") else b""


def _read(unpadded: bytes) -> Any:
    return orjson.loads(decode_event(unpadded + b"}\n\n").data or b"")


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

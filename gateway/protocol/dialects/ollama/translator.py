"""Ollama's native chat API: one JSON object a line (https://github.com/ollama/ollama/blob/main/docs/api.md).

The native API and not Ollama's own /v1: there the context length cannot be set, and an error in mid-stream becomes an
empty chunk (https://github.com/ollama/ollama/blob/main/middleware/openai.go).

Rule 1: a line counts when its `\\n` is in, so the chunks do not depend on where the network cut; `\\r` is white space.
Rule 2: `"done": true` or `"error"` is the last word. A stream that ends without one was cut.
Rule 3: what Ollama did not count stays unknown (None). A client that asked for usage sees 0 there, as Ollama's own /v1
shows it; when Ollama counted nothing at all, the client gets no usage.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, ClassVar

import orjson

from gateway.protocol.dialects.ollama.lines import (
    UNREADABLE,
    NotOllamaError,
    Said,
    dumps,
    loads,
    logprobs_of,
    object_of,
    typed,
)
from gateway.protocol.dialects.ollama.request import build_body
from gateway.protocol.errors import (
    EventTooLarge,
    GatewayError,
    UpstreamBadBody,
    UpstreamRejected,
    UpstreamTruncated,
)
from gateway.protocol.refusals import refusal, reported
from gateway.protocol.request import Call, Chunk, Listed, Reply, UpstreamRequest
from gateway.protocol.sse import DONE, MAX_EVENT, data_event
from gateway.protocol.usage import Usage
from gateway.protocol.usual import Usual

MAX_BAD_LINES = 3  # one line of broken JSON may be a proxy's slip, three are another protocol

_NOTHING = Said("", "", "", (), None)


class OllamaTranslator:
    """One upstream attempt. `feed` never raises: what went wrong is kept, `done` turns true and `flush` raises it."""

    # Where a completion, which is read by a class of its own, differs in the client's chunks.
    chunk = "chat.completion.chunk"
    delta = b'"delta":'
    nothing: ClassVar[Any] = {}

    def __init__(self, call: Call) -> None:
        self._call = call
        self._buffer = bytearray()  # the line that is still coming
        self._scan = 0  # where the search for its end goes on
        self._bad_lines = 0
        self._tool_calls = 0  # seen so far: the index of the next one
        self._started = False  # the role was sent
        self.done = False
        self._error: GatewayError | None = None
        self._head = dumps(self._constant(self.chunk))[:-1] + b',"choices":['
        self._tail = b'],"usage":null}' if call.asked.wants_usage else b"]}"
        # Around the delta of nearly every event: rendered once.
        self._before = b"data: " + self._head + b'{"index":0,' + self.delta
        self._after = b',"logprobs":null,"finish_reason":null}' + self._tail + b"\n\n"
        self._usual = Usual()
        self._frame: tuple[bytes, bytes] = (b"", b"")  # the client's event around the text of a usual line

    def request(self) -> UpstreamRequest:
        return UpstreamRequest("/api/chat", build_body(self._call.asked, self._call.target.model))

    # --- a stream ---

    def feed(self, data: bytes) -> list[Chunk]:
        if self.done:
            return []
        if not self._buffer and len(data) <= MAX_EVENT and (text := self._usual.text_of(data)):
            return [Chunk(orjson.dumps(text).join(self._frame), text)]  # one line: no literal has a line end in it
        chunks: list[Chunk] = []
        self._buffer += data
        while not self.done and (end := self._buffer.find(b"\n", self._scan)) >= 0:
            line = bytes(self._buffer[: end + 1])
            del self._buffer[: end + 1]
            self._scan = 0
            if end <= MAX_EVENT and (text := self._usual.text_of(line)):
                chunks.append(Chunk(orjson.dumps(text).join(self._frame), text))
            else:
                chunks += self._take(line)
        self._scan = len(self._buffer)
        if not self.done and self._scan > MAX_EVENT:
            self._fail(_too_large())
        return chunks

    def flush(self) -> list[Chunk]:
        """As the protocol says. The text of a last line without `\\n` is given up when there is something to raise."""
        chunks = [] if self.done else self._take_rest()
        if self._error is not None:
            raise self._error
        if not self.done:
            raise UpstreamTruncated("the provider's stream ended before the answer did")
        return chunks

    def cut(self, usage: Usage) -> bytes:
        if self.done and self._error is None:
            return b""
        self.done = True
        return self._chunk(_NOTHING).data + self._end("length", usage)

    def _learn(self, raw: bytes, line: Mapping[str, Any], said: Said) -> None:
        """A usual line is text alone; the time in it differs, too."""
        name = "content" if said.text == said.content else "thinking"
        if line.get("logprobs") or said.text != getattr(said, name):
            return
        time = ("created_at",) if isinstance(line.get("created_at"), str) else None
        if self._usual.learn(raw, orjson.loads, ("message", name), time):
            ours = b'{"content":' if name == "content" else b'{"reasoning_content":'
            self._frame = (self._before + ours, b"}" + self._after)

    def _take(self, line: bytes) -> list[Chunk]:
        if len(line) - 1 > MAX_EVENT:
            self._fail(_too_large())
            return []
        if not line.strip():
            return []
        try:
            return self._read(line)
        except UNREADABLE:
            self._bad_lines += 1
            if self._bad_lines == MAX_BAD_LINES:
                words = f"the provider sent {MAX_BAD_LINES} lines that are not Ollama's JSON"
                self._fail(UpstreamBadBody(words, kind="bad_event"))
            return []

    def _take_rest(self) -> list[Chunk]:
        try:
            return self._read(bytes(self._buffer))
        except UNREADABLE:
            return []  # half a line: the stream was cut, which flush says

    def _read(self, raw: bytes) -> list[Chunk]:
        """The chunk of one line, if it says anything. Raises one of UNREADABLE."""
        line = loads(raw)
        if line.get("error") is not None:
            self._fail(reported(line, self._call.target))
            return []
        said = self._said(line)
        if line.get("done") is not True:
            if not said.text:
                return []
            self._learn(raw, line, said)
            return [self._chunk(said)]
        if not self._started and _only_loaded(line, said):
            self._fail(_nothing_to_answer())
            return []
        chunk = self._last_chunk(line, said)
        self.done = True
        return [chunk]

    def _chunk(self, said: Said) -> Chunk:
        events = [] if self._started else [self._delta({"role": "assistant", "content": ""})]
        self._started = True
        if said.thinking:
            events.append(self._delta({"reasoning_content": said.thinking}))
        if said.content and said.logprobs is None:
            events.append(self._delta({"content": said.content}))
        elif said.content:
            events.append(self._event({"content": said.content}, logprobs=said.logprobs))
        for index, call in enumerate(said.tool_calls, self._tool_calls - len(said.tool_calls)):
            events.append(self._delta({"tool_calls": [{"index": index, **call}]}))
        return Chunk(b"".join(events), said.text)

    def _last_chunk(self, line: Mapping[str, Any], said: Said) -> Chunk:
        finish_reason, usage = self._finish_reason(line), usage_of(line)
        data = self._chunk(said).data + self._end(finish_reason, usage)
        return Chunk(data, said.text, usage, finish_reason)

    def _end(self, finish_reason: str, usage: Usage | None) -> bytes:
        events = [self._event(self.nothing, finish_reason)]
        if usage is not None and self._call.asked.wants_usage:
            events.append(data_event(self._head + b'],"usage":' + dumps(usage.to_openai()) + b"}"))
        return b"".join([*events, DONE])

    def _delta(self, delta: Any) -> bytes:
        return self._before + dumps(delta) + self._after

    def _event(self, delta: Any, finish_reason: str | None = None, logprobs: Any = None) -> bytes:
        rest = dumps({"logprobs": logprobs, "finish_reason": finish_reason})
        return data_event(self._head + b'{"index":0,' + self.delta + dumps(delta) + b"," + rest[1:] + self._tail)

    def _fail(self, error: GatewayError) -> None:
        self._error, self.done = error, True
        self._buffer.clear()

    # --- a whole answer ---

    def reply(self, body: bytes) -> Reply:
        try:
            answer = loads(body)
            if answer.get("error") is not None:
                raise reported(answer, self._call.target)
            said = self._said(answer)
        except UNREADABLE:
            raise UpstreamBadBody("the provider's answer is not Ollama's JSON") from None
        if answer.get("done") is not True:
            raise UpstreamBadBody("the provider's answer is not finished")
        if _only_loaded(answer, said):
            raise _nothing_to_answer()
        return self._completion(answer, said)

    def _completion(self, answer: Mapping[str, Any], said: Said) -> Reply:
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
        if said.thinking:
            message["reasoning_content"] = said.thinking
        if said.tool_calls:
            message.update(content=said.content or None, tool_calls=said.tool_calls)
        finish_reason, usage = self._finish_reason(answer), usage_of(answer)
        choice = {"index": 0, "message": message, "logprobs": said.logprobs, "finish_reason": finish_reason}
        completion = {**self._constant("chat.completion"), "choices": [choice]}
        if usage is not None:
            completion["usage"] = usage.to_openai()
        return Reply(dumps(completion), said.text, usage, finish_reason)

    # --- both ---

    def _constant(self, kind: str) -> dict[str, Any]:
        call = self._call
        return {"id": call.completion_id, "object": kind, "created": call.created, "model": call.target.model}

    def _said(self, line: Mapping[str, Any]) -> Said:
        message = typed(line, "message", dict)
        thinking, content = typed(message, "thinking", str), typed(message, "content", str)
        text, logprobs = thinking + content, None
        tool_calls: list[dict[str, Any]] = []
        for call in typed(message, "tool_calls", list):
            tool_calls.append(self._tool_call(call, self._tool_calls + len(tool_calls)))
            text += tool_calls[-1]["function"]["name"] + tool_calls[-1]["function"]["arguments"]
        if tokens := typed(line, "logprobs", list):
            logprobs = logprobs_of(tokens, content, alone=text == content)
        self._tool_calls += len(tool_calls)  # last: a line that cannot be read has none
        return Said(text, thinking, content, tool_calls, logprobs)

    def _tool_call(self, call: Any, index: int) -> dict[str, Any]:
        """A call in OpenAI's form. Ollama's own `function.index` is not read: parallel calls came with equal ones
        (https://github.com/ollama/ollama/issues/15457)."""
        function = typed(object_of(call), "function", dict)
        name, arguments = typed(function, "name", str), function.get("arguments")
        if not name:
            raise NotOllamaError("a tool call without a name")
        if not isinstance(arguments, str):
            arguments = dumps({} if arguments is None else arguments).decode()
        given = typed(call, "id", str) or _call_id(self._call.completion_id, index)
        return {"id": given, "type": "function", "function": {"name": name, "arguments": arguments}}

    def _finish_reason(self, line: Mapping[str, Any]) -> str:
        return "tool_calls" if self._tool_calls else finish_reason_of(line)  # Ollama says `stop`

    # --- errors ---

    def error(self, status: int, body: bytes, retry_after: float | None = None) -> GatewayError:
        try:
            said = loads(body)
        except UNREADABLE:
            said = None
        return refusal(status, said, self._call.target, retry_after)


def models_listed(parsed: Any) -> Sequence[Listed]:
    """From the answer of `GET /api/tags`."""
    rows = parsed.get("models") if isinstance(parsed, dict) else None
    names = [row.get("name") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [Listed(name) for name in names if isinstance(name, str) and name]


def finish_reason_of(line: Mapping[str, Any]) -> str:
    return "length" if line.get("done_reason") == "length" else "stop"


def usage_of(line: Mapping[str, Any]) -> Usage | None:
    """The counts of the last line. Ollama leaves a 0 out, and older servers count a prompt that was cached as 0."""
    prompt = line.get("prompt_eval_count")
    cached = line.get("prompt_eval_cached_count") if prompt else None  # part of the prompt's count
    return Usage.from_openai(
        {
            "prompt_tokens": prompt,
            "completion_tokens": line.get("eval_count"),
            "prompt_tokens_details": {"cached_tokens": cached},
        }
    )


def _call_id(completion_id: str, index: int) -> str:
    """For servers that give none. OpenAI takes ids of up to 40 characters when the call is sent back to it."""
    return f"call_{sha256(f'{completion_id} {index}'.encode()).hexdigest()[:24]}"


def _only_loaded(line: Mapping[str, Any], said: Said) -> bool:
    return line.get("done_reason") in ("load", "unload") and not said.text


def _nothing_to_answer() -> GatewayError:
    """To messages without a turn to answer, such as a system message alone, Ollama loads the model and says no more.

    Passed on as an empty answer it would be tried again for ever (https://github.com/can1357/oh-my-pi/issues/7465).
    """
    words = "the provider loaded the model and generated nothing: the messages hold no turn to answer"
    return UpstreamRejected(words, status=400, param="messages", code="invalid_value")


def _too_large() -> GatewayError:
    return EventTooLarge(f"the provider sent a line longer than {MAX_EVENT} bytes")

"""Streams under tests/streams/, and a strict reader of what a client of ours receives.

`tests/streams/<dialect>/<case>.sse` or `.ndjson` is what a provider sends. `<case>.json` beside it says what that
means: `{"request": {…}, "expect": {"text", "reasoning", "refusal", "tool_calls": [{"id", "name", "arguments"}],
"finish_reason", "usage", "error"}}`. What is left out is empty; `usage` is OpenAI's object or null; `error` is a code
or null; a stream of several choices has `"choices": [{"text", …}, …]` in place of the fields of one.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from gateway.protocol.dialects import DIALECTS
from gateway.protocol.errors import UpstreamError
from gateway.protocol.request import Call, Chunk, parse_chat
from gateway.protocol.routing import Provider, Target

STREAMS = Path(__file__).parent.parent / "streams"
FINISH_REASONS = {"stop", "length", "tool_calls", "content_filter", "function_call"}


# --- what providers send ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    dialect: str
    name: str
    data: bytes  # with \n for line ends
    request: Mapping[str, Any]
    expect: Mapping[str, Any]

    @property
    def id(self) -> str:
        return f"{self.dialect}-{self.name}"

    @property
    def is_sse(self) -> bool:
        return DIALECTS[self.dialect].media_type == "text/event-stream"

    def call(self) -> Call:
        return make_call(self.dialect, self.request)

    def events(self) -> list[bytes]:
        """The provider's events, or lines, that joined are the stream."""
        end = rb"\n\n" if self.is_sse else rb"\n"
        return [event for event in re.split(rb"(?<=" + end + rb")", self.data) if event]


def load_cases() -> list[Case]:
    files = sorted(path for path in STREAMS.glob("*/*") if path.suffix in (".sse", ".ndjson"))
    return [_load(path) for path in files]


def _load(path: Path) -> Case:
    meaning = orjson.loads(path.with_suffix(".json").read_bytes())
    return Case(path.parent.name, path.stem, path.read_bytes(), meaning["request"], meaning["expect"])


def make_call(
    dialect: str,
    request: Mapping[str, Any] | None = None,
    *,
    body: bytes | None = None,
    target: Mapping[str, Any] | None = None,
    provider: Mapping[str, Any] | None = None,
) -> Call:
    """A call as the relay makes one; `request`, `target` and `provider` replace fields of a plain streamed one."""
    plain = {"model": "test-model", "messages": [{"role": "user", "content": "Say hello."}], "stream": True}
    chat = parse_chat(body if body is not None else orjson.dumps({**plain, **(request or {})}))
    address: dict[str, Any] = {"name": "example", "dialect": dialect, "base_url": "https://provider.example/v1"}
    where: dict[str, Any] = {"model": chat.model, "credential": "a-credential"}
    return Call(
        chat,
        Target(Provider(**{**address, **(provider or {})}), **{**where, **(target or {})}),
        completion_id="chatcmpl-test",
        created=1_700_000_000,
    )


# --- playing one --------------------------------------------------------------------------------------------------


class Played(NamedTuple):
    chunks: list[Chunk]
    error: UpstreamError | None

    @property
    def sent(self) -> bytes:
        """What the client receives before the error event that the relay adds."""
        return b"".join(chunk.data for chunk in self.chunks)

    @property
    def received(self) -> bytes:
        return self.sent + (self.error.event() if self.error else b"")

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def code(self) -> str | None:
        return self.error.error_code if self.error else None


def play(call: Call, pieces: Iterable[bytes]) -> Played:
    """Run a translator as the relay does: feed until it is done, then flush."""
    translator = DIALECTS[call.target.provider.dialect].translator(call)
    chunks: list[Chunk] = []
    for piece in pieces:
        chunks += translator.feed(piece)
        if translator.done:
            break
    try:
        chunks += translator.flush()
    except UpstreamError as error:
        return Played(chunks, error)
    return Played(chunks, None)


def in_pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


# --- reading what the client got ----------------------------------------------------------------------------------


@dataclass
class Choice:
    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    tool_calls: list[dict[str, str]] = field(default_factory=list)
    finish_reason: str | None = None
    started: bool = False  # its first delta was seen

    def generated(self) -> str:
        calls = "".join(call["name"] + call["arguments"] for call in self.tool_calls)
        return self.text + self.reasoning + self.refusal + calls


@dataclass
class Answer:
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    done: bool = False
    comments: int = 0

    @property
    def choice(self) -> Choice:
        return self.choices.get(0) or Choice()


class InvalidStream(AssertionError):
    """The bytes are not a stream that the official SDKs read as it was meant."""


def assemble(data: bytes, *, strict: bool = True, wants_usage: bool | None = None) -> Answer:
    """The answer in a client's bytes. Raises InvalidStream.

    `strict` is OpenAI's own wire: constant ids, every choice with a delta and an index, one finish reason, tool calls
    in order. Without it the habits of other servers pass, which reach the client verbatim.
    """
    answer = Answer()
    head: tuple[Any, ...] = ()
    for payload in client_events(data, answer):
        _demand(not answer.done, "an event follows [DONE]")
        _demand(answer.error is None, "an event follows the error")
        if payload == "[DONE]":
            answer.done = True
            continue
        chunk = _load_chunk(payload)
        if chunk.get("error"):
            answer.error = chunk["error"]
            _demand({"message", "type", "param", "code"} == set(chunk["error"]), "not an OpenAI error object")
            continue
        if strict:
            _check_chunk(chunk)
            _demand(not head or head == _head(chunk), "id, created or model changed")
            head = _head(chunk)
        _add(answer, chunk, strict)
        if chunk.get("usage"):
            answer.usage = chunk["usage"]
            _demand(wants_usage is not False or bool(chunk.get("choices")), "usage was not asked for")
    return answer


def client_events(data: bytes, answer: Answer | None = None) -> Iterator[str]:
    """The data of every event, by the rules of https://html.spec.whatwg.org/multipage/server-sent-events.html.

    Refused beside broken UTF-8 and an event that was not closed, because the SDKs fail on them: a byte order mark,
    `id:` and `retry:`, and an event without data.
    """
    text = data.decode("utf-8")
    _demand(not text.startswith("\ufeff"), "a byte order mark")
    lines = re.split(r"\r\n|\n|\r", text)
    payload: list[str] = []
    named = False
    for line in lines[:-1]:
        if not line:
            _demand(bool(payload) or not named, "an event without data")
            if payload:
                yield "\n".join(payload)
            payload, named = [], False
        elif line.startswith(":"):
            if answer is not None:
                answer.comments += 1
        else:
            name, _, value = line.partition(":")
            _demand(name in ("data", "event"), f"the field {name!r}")
            named = True
            if name == "data":
                payload.append(value.removeprefix(" "))
    _demand(not payload and not named and not lines[-1], "the last event is not closed")


def _load_chunk(payload: str) -> dict[str, Any]:
    try:
        chunk = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise InvalidStream(f"not JSON: {payload[:100]!r}") from error
    _demand(isinstance(chunk, dict), "not an object")
    parsed: dict[str, Any] = chunk
    return parsed


def _head(chunk: Mapping[str, Any]) -> tuple[Any, ...]:
    return (chunk["id"], chunk["created"], chunk["model"])


def _check_chunk(chunk: Mapping[str, Any]) -> None:
    _demand(isinstance(chunk.get("id"), str) and bool(chunk["id"]), "no id")
    _demand(chunk.get("object") == "chat.completion.chunk", f"object is {chunk.get('object')!r}")
    _demand(type(chunk.get("created")) is int, "created is no integer")
    _demand(isinstance(chunk.get("model"), str) and bool(chunk["model"]), "no model")
    _demand(isinstance(chunk.get("choices"), list), "choices is no list")
    for choice in chunk["choices"]:
        _demand(type(choice.get("index")) is int, "a choice without an index")
        _demand(isinstance(choice.get("delta"), dict), "a choice without a delta")
        reason = choice.get("finish_reason", "missing")
        _demand(reason is None or reason in FINISH_REASONS, f"finish_reason is {reason!r}")
    if not chunk["choices"]:
        _demand(bool(chunk.get("usage") or chunk.get("moderation")), "no choices, no usage, no moderation")


def _add(answer: Answer, chunk: Mapping[str, Any], strict: bool) -> None:
    for position, parsed in enumerate(chunk.get("choices") or []):
        index = parsed.get("index")
        choice = answer.choices.setdefault(index if isinstance(index, int) else position, Choice())
        _demand(not strict or choice.finish_reason is None, "a delta follows the finish reason")
        delta = parsed.get("delta") or {}
        if strict and not choice.started:
            _demand(delta.get("role") == "assistant", "the first delta has no role")
        choice.started = True
        _add_delta(choice, delta, strict)
        choice.finish_reason = parsed.get("finish_reason") or choice.finish_reason


def _add_delta(choice: Choice, delta: Mapping[str, Any], strict: bool) -> None:
    content = delta.get("content")
    if isinstance(content, list):
        _demand(not strict, "content is a list")
        for part in content:
            if part["type"] == "thinking":
                choice.reasoning += "".join(piece["text"] for piece in part["thinking"])
            else:
                choice.text += part.get("text", "")
    else:
        choice.text += content or ""
    details = "".join(part.get("text") or part.get("summary") or "" for part in delta.get("reasoning_details") or [])
    choice.reasoning += delta.get("reasoning_content") or delta.get("reasoning") or details
    choice.refusal += delta.get("refusal") or ""
    for position, call in enumerate(delta.get("tool_calls") or []):
        _add_call(choice.tool_calls, call, position, strict)


def _add_call(calls: list[dict[str, str]], call: Mapping[str, Any], position: int, strict: bool) -> None:
    function, index = call.get("function") or {}, call.get("index")
    if strict:
        _demand(type(index) is int, "a tool call without an index")
        _demand(isinstance(function.get("arguments"), str), "tool arguments are no string")
    index = index if isinstance(index, int) else position
    _demand(index <= len(calls), f"tool call {index} comes before {len(calls)}")
    if index == len(calls):
        if strict:
            _demand(bool(call.get("id")) and call.get("type") == "function", "a new tool call without id or type")
            _demand(bool(function.get("name")), "a new tool call without a name")
        calls.append({"id": call.get("id") or "", "name": function.get("name") or "", "arguments": ""})
    elif strict:
        _demand(index == len(calls) - 1, "an earlier tool call goes on")
        _demand(not {"id", "type"} & call.keys() and "name" not in function, "a continued tool call is named again")
    arguments = function.get("arguments") or ""
    calls[index]["arguments"] += arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise InvalidStream(otherwise)


# --- comparing with what was meant --------------------------------------------------------------------------------


def expected_choices(expect: Mapping[str, Any]) -> dict[int, Choice]:
    """The choices of a case's `expect`; a stream that broke before the first has none."""
    rows: Sequence[Mapping[str, Any]] = expect.get("choices") or [expect]
    choices = {}
    for index, row in enumerate(rows):
        choices[index] = Choice(
            text=row.get("text") or "",
            reasoning=row.get("reasoning") or "",
            refusal=row.get("refusal") or "",
            tool_calls=[dict(call) for call in row.get("tool_calls") or []],
            finish_reason=row.get("finish_reason"),
            started=True,
        )
    return choices


def counts(usage: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Prompt, completion, cached, cache-write and reasoning tokens of an OpenAI usage object."""
    prompt, completion = usage.get("prompt_tokens_details") or {}, usage.get("completion_tokens_details") or {}
    return (
        usage.get("prompt_tokens"),
        usage.get("completion_tokens"),
        prompt.get("cached_tokens") or 0,
        prompt.get("cache_write_tokens") or 0,
        completion.get("reasoning_tokens") or 0,
    )

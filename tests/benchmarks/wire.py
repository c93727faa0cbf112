"""The three wire formats as the benchmark plays them: a request, and the bytes of an answer.

A model named `gpt-bench-64-20` asks for 64 deltas, one every 20 ms. The name is all that passes every gateway, so it
says everything. Each delta carries `@` and the nanoseconds of the monotonic clock at which it was sent, eighteen
digits, in its text: that passes every translator, and tells its reader how long it was on its way.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

STAMP = re.compile(rb"@(\d{18})")
MODEL = re.compile(rb'"model":\s*"[^"]*bench-(\d+)-(\d+)"')
STREAM = re.compile(rb'"stream":\s*true')
EVENT = 300  # bytes of an event with a delta, in every dialect
REPLY = 1024  # bytes of a whole answer

_QUESTION = "Explain in two sentences why the sky is blue at noon and red in the evening, for a reader of twelve years."
_PROMPT, _COMPLETION = 31, 64  # tokens that every answer counts
_DIGITS = "#" * 18


@dataclass(frozen=True, slots=True)
class Dialect:
    path: str  # of its chat
    models_path: str
    models: bytes  # what is answered there
    family: str  # the gateway routes by it: what a model's name begins with
    headers: str  # that clients send beside the usual ones, a line each
    fields: Mapping[str, Any]  # of a request, beside model, messages and stream
    stream_fields: Mapping[str, Any]  # of a request for a stream
    stream_type: str
    head: bytes  # of a stream, before its first delta
    delta: tuple[bytes, bytes]  # before and after the eighteen digits
    tail: bytes  # why it ended, the counts, and the last word
    last_word: bytes
    reply: bytes  # a whole answer

    def request(self, events: int, pace: int) -> bytes:
        """Asks for `events` deltas, one every `pace` milliseconds; with 0 events for a whole answer."""
        fields = {
            "model": f"{self.family}-bench-{events}-{pace}",
            "messages": [{"role": "user", "content": _QUESTION}],
            **self.fields,
            "stream": events > 0,
            **(self.stream_fields if events else {}),
        }
        return _json(fields)


def _json(fields: Any) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


def _data(fields: Any) -> bytes:
    return b"data: " + _json(fields) + b"\n\n"


def _sized(make: Callable[[str], bytes], text: str, size: int) -> bytes:
    """What `make` makes of the text, which is filled with words until it has that size."""
    missing = size - len(make(text))
    words = " and so on" * (missing // 10 + 1)
    return make(text + words[: max(missing, 0)])


def _delta(make: Callable[[str], bytes]) -> tuple[bytes, bytes]:
    before, _, after = _sized(make, f"@{_DIGITS}", EVENT).partition(_DIGITS.encode())
    return before, after


# --- OpenAI: https://platform.openai.com/docs/api-reference/chat-streaming ----------------------------------------

_OPENAI_HEAD = {
    "id": "chatcmpl-CqZ0000000000000000000000000",
    "object": "chat.completion.chunk",
    "created": 1767225600,
    "model": "gpt-bench",
    "system_fingerprint": "fp_0123456789",
}
_OPENAI_USAGE = {"prompt_tokens": _PROMPT, "completion_tokens": _COMPLETION, "total_tokens": _PROMPT + _COMPLETION}


def _openai_chunk(delta: Mapping[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return _data({**_OPENAI_HEAD, "choices": [choice], "usage": None})


def _openai_reply(text: str) -> bytes:
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return _json({**_OPENAI_HEAD, "object": "chat.completion", "choices": [choice], "usage": _OPENAI_USAGE})


OPENAI = Dialect(
    path="/v1/chat/completions",
    models_path="/v1/models",
    models=_json({"object": "list", "data": [{"id": "gpt-bench", "object": "model", "owned_by": "bench"}]}),
    family="gpt",
    headers="",
    fields={"max_tokens": 4096},
    stream_fields={"stream_options": {"include_usage": True}},
    stream_type="text/event-stream; charset=utf-8",
    head=_openai_chunk({"role": "assistant", "content": ""}),
    delta=_delta(lambda text: _openai_chunk({"content": text})),
    tail=_openai_chunk({}, "stop")
    + _data({**_OPENAI_HEAD, "choices": [], "usage": _OPENAI_USAGE})
    + b"data: [DONE]\n\n",
    last_word=b"data: [DONE]",
    reply=_sized(_openai_reply, "The sky is blue", REPLY),
)


# --- Anthropic: https://docs.anthropic.com/en/docs/build-with-claude/streaming ------------------------------------


def _anthropic_event(fields: Mapping[str, Any]) -> bytes:
    return b"event: %b\n%b" % (fields["type"].encode(), _data(fields))


def _anthropic_delta(text: str) -> bytes:
    delta = {"type": "text_delta", "text": text}
    return _anthropic_event({"type": "content_block_delta", "index": 0, "delta": delta})


def _anthropic_message(content: list[Any], stop_reason: str | None, output_tokens: int) -> dict[str, Any]:
    return {
        "id": "msg_0000000000000000000000",
        "type": "message",
        "role": "assistant",
        "model": "claude-bench",
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": {"input_tokens": _PROMPT, "output_tokens": output_tokens},
    }


ANTHROPIC = Dialect(
    path="/v1/messages",
    models_path="/v1/models",
    models=_json({"data": [{"type": "model", "id": "claude-bench"}], "has_more": False}),
    family="claude",
    headers="anthropic-version: 2023-06-01\r\n",
    fields={"max_tokens": 4096},
    stream_fields={},
    stream_type="text/event-stream; charset=utf-8",
    head=_anthropic_event({"type": "message_start", "message": _anthropic_message([], None, 1)})
    + _anthropic_event(
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    )
    + _anthropic_event({"type": "ping"}),
    delta=_delta(_anthropic_delta),
    tail=_anthropic_event({"type": "content_block_stop", "index": 0})
    + _anthropic_event(
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": _COMPLETION},
        }
    )
    + _anthropic_event({"type": "message_stop"}),
    last_word=b'"message_stop"',
    reply=_sized(
        lambda text: _json(_anthropic_message([{"type": "text", "text": text}], "end_turn", _COMPLETION)),
        "The sky is blue",
        REPLY,
    ),
)


# --- Ollama: https://github.com/ollama/ollama/blob/main/docs/api.md -----------------------------------------------


def _ollama_line(text: str, **last: Any) -> bytes:
    line = {
        "model": "llama-bench",
        "created_at": "2026-01-01T00:00:00.000000000Z",
        "message": {"role": "assistant", "content": text},
        "done": bool(last),
        **last,
    }
    return _json(line) + b"\n"


_OLLAMA_LAST = {
    "done_reason": "stop",
    "total_duration": 1_500_000_000,
    "load_duration": 20_000_000,
    "prompt_eval_count": _PROMPT,
    "prompt_eval_duration": 80_000_000,
    "eval_count": _COMPLETION,
    "eval_duration": 1_400_000_000,
}

OLLAMA = Dialect(
    path="/api/chat",
    models_path="/api/tags",
    models=_json({"models": [{"name": "llama-bench", "model": "llama-bench"}]}),
    family="llama",
    headers="",
    fields={"options": {"num_predict": 4096}},
    stream_fields={},
    stream_type="application/x-ndjson",
    head=b"",
    delta=_delta(_ollama_line),
    tail=_ollama_line("", **_OLLAMA_LAST),
    last_word=b'"done":true',
    reply=_sized(lambda text: _ollama_line(text, **_OLLAMA_LAST), "The sky is blue", REPLY),
)

DIALECTS: Mapping[str, Dialect] = {"openai": OPENAI, "anthropic": ANTHROPIC, "ollama": OLLAMA}

"""A whole answer, made of the chunks of a stream.

Under a budget a provider is asked for a stream also by who wants a whole answer: only a stream can be ended in the
middle. The fields of a choice are joined as OpenAI's own SDK does it
(https://github.com/openai/openai-python/blob/main/src/openai/lib/streaming/_deltas.py).
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import orjson
from msgspec.structs import replace

from gateway.protocol.json_object import edit_object, read_json
from gateway.protocol.request import Kind, ModelRequest
from gateway.protocol.sse import SSEDecoder

_OF_CHUNK = frozenset({"choices", "object", "usage", "obfuscation"})  # of a chunk, and not of the answer's head
# What an answer is called, and what its choices have before anything came. (Nobody streams an embedding.)
_SHAPES: Mapping[Kind, tuple[str, Mapping[str, Any]]] = {
    "chat": ("chat.completion", {"message": {}}),
    "completion": ("text_completion", {"text": ""}),
}


def streamed(chat: ModelRequest, *, asks_usage: bool) -> ModelRequest:
    """The same request for a stream, with its usage if the provider knows `stream_options`."""
    changes: dict[str, Any] = {"stream": True}
    if asks_usage:
        changes["stream_options"] = {"include_usage": True}
    body = edit_object(chat.body, changes, chat.fields)
    return replace(chat, body=body, fields={**chat.fields, **changes}, stream=True, wants_usage=True)


class Whole:
    """Takes what a stream's client would be sent."""

    def __init__(self, kind: Kind = "chat") -> None:
        self._object, self._empty = _SHAPES[kind]
        self._decoder = SSEDecoder()
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._usage: Any = None
        self.size = 0  # bytes of the events that were taken

    def add(self, events: bytes) -> None:
        self.size += len(events)
        for event in self._decoder.feed(events):
            data = (event.data or b"").strip()
            if data and data != b"[DONE]":
                self._add_chunk(read_json(data))

    def _add_chunk(self, chunk: Any) -> None:
        if not isinstance(chunk, dict):
            return
        for name, value in chunk.items():
            if name not in _OF_CHUNK and value is not None:
                self._head.setdefault(name, value)
        self._usage = chunk.get("usage") or self._usage
        choices = chunk.get("choices")
        for position, part in enumerate(choices if isinstance(choices, list) else ()):
            if isinstance(part, dict):
                index = part.get("index")
                self._add_choice(index if isinstance(index, int) else position, part)

    def _add_choice(self, index: int, part: dict[str, Any]) -> None:
        choice = self._choices.setdefault(index, {"index": index, **deepcopy(self._empty), "logprobs": None})
        for name, value in part.items():
            if name == "delta" and isinstance(value, dict):
                _join(choice["message"], value)
            elif name == "text" and isinstance(value, str):
                choice["text"] = choice.get("text", "") + value
            elif name == "logprobs" and isinstance(value, dict):
                choice["logprobs"] = choice["logprobs"] or {}
                _join(choice["logprobs"], value)
            elif name not in ("index", "delta") and value is not None:
                choice[name] = value

    def body(self) -> bytes:
        """The answer, as JSON."""
        choices = [_finished(choice) for _, choice in sorted(self._choices.items())]
        answer = {**self._head, "object": self._object, "choices": choices, "usage": self._usage}
        try:
            return orjson.dumps(answer)
        except TypeError:  # half an emoji, which orjson refuses and JSON allows
            return json.dumps(answer, separators=(",", ":")).encode()


def _finished(choice: dict[str, Any]) -> dict[str, Any]:
    if "message" not in choice:
        return choice
    message = {"role": "assistant", "content": None, **choice["message"]}
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message["content"] = message["content"] or None
        message["tool_calls"] = [
            {name: value for name, value in call.items() if name != "index"} if isinstance(call, dict) else call
            for call in calls
        ]
    return {**choice, "message": message}


def _join(all_: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        known = all_.get(name)
        if value is None and known is not None:
            continue
        if isinstance(value, list):
            all_[name] = _join_list(known if isinstance(known, list) else [], value)
        elif isinstance(known, dict) and isinstance(value, dict):
            _join(known, value)
        elif isinstance(known, str) and isinstance(value, str) and name not in ("role", "id", "type"):
            all_[name] = known + value
        else:
            all_[name] = value


def _join_list(known: list[Any], added: list[Any]) -> list[Any]:
    """Entries with an `index`, such as tool calls, are parts of one another; others follow."""
    for entry in added:
        index = entry.get("index") if isinstance(entry, dict) else None
        same = [one for one in known if index is not None and isinstance(one, dict) and one.get("index") == index]
        if same:
            _join(same[0], entry)
        elif isinstance(entry, dict):
            known.append(dict(entry))
        else:
            known.append(entry)
    return known

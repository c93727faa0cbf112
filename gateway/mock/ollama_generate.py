"""Ollama's /api/generate: a chat of one prompt, in other words (https://github.com/ollama/ollama/blob/main/docs/api.md)."""

from collections.abc import Mapping
from typing import Any

import orjson

from gateway.mock import ollama
from gateway.mock.answers import Answer, Ask
from gateway.mock.formats import Wire, read_object
from gateway.mock.script import ProviderError

NAME = "ollama_generate"
STREAM_TYPE, JSON_TYPE, ERROR_EVENT = ollama.STREAM_TYPE, ollama.JSON_TYPE, ollama.ERROR_EVENT
error, failure, headers = ollama.error, ollama.failure, ollama.headers
BAD_EVENT = b'{"model":"mock-llama","created_at":"2026-01-01T00:00:00Z","resp\n'


def read(body: bytes, headers: Mapping[str, str], models: frozenset[str]) -> Ask:
    fields = read_object(body, "invalid character at the beginning of value")
    prompt = fields.pop("prompt", None) or ""
    if not isinstance(prompt, str):
        words = "json: cannot unmarshal array into Go struct field GenerateRequest.prompt of type string"
        raise ProviderError(words)
    chat = {**fields, "messages": [{"role": "user", "content": prompt}]}
    return ollama.read(orjson.dumps(chat), headers, models)


def stream(ask: Ask, said: Answer) -> Wire:
    wire = ollama.stream(ask, said)
    return Wire(wire.head, tuple(map(_generated, wire.deltas)), wire.tail, _generated(wire.done))


def delta(ask: Ask, said: Answer, text: str) -> bytes:
    return _generated(ollama.delta(ask, said, text))


def reply(ask: Ask, said: Answer) -> bytes:
    return _generated(ollama.reply(ask, said))


def _generated(line: bytes) -> bytes:
    """The line of a chat with the message's parts beside the rest."""
    fields: dict[str, Any] = orjson.loads(line)
    message = fields.pop("message")
    said = {"response": message["content"], **({"thinking": message["thinking"]} if "thinking" in message else {})}
    return orjson.dumps({**fields, **said}) + b"\n"

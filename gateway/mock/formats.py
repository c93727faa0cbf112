"""What a wire format gives the mock: a request read, and an answer written in the provider's own bytes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from gateway.mock.answers import Answer, Ask
from gateway.mock.script import ProviderError

IMAGE_TOKENS = 85  # what OpenAI counts for one at low detail (https://platform.openai.com/docs/guides/images-vision)
FAKE_KEY = "sk-mock-0123456789abcdefghijklmnopqrstuvwxyz"  # what a 401 quotes; a gateway must not show it
CREATED = 1_767_225_600  # seconds since the epoch, 2026-01-01; the same request gets the same bytes
_PICTURES = frozenset({"image_url", "images", "source", "input_audio", "file"})


@dataclass(frozen=True, slots=True)
class Wire:
    """One stream in pieces, so that a fault can take one away or put one between."""

    head: bytes  # what comes before the first token
    deltas: tuple[bytes, ...]
    tail: bytes  # why it ended, and the counts
    done: bytes  # the last word


class Format(Protocol):
    """A module of this package: openai, anthropic, ollama."""

    NAME: str
    STREAM_TYPE: str  # content type
    JSON_TYPE: str
    BAD_EVENT: bytes  # one whose JSON is broken
    ERROR_EVENT: bytes  # what the provider sends when it fails in the middle of a stream

    def read(self, body: bytes, headers: Mapping[str, str], models: frozenset[str]) -> Ask:
        """The request, checked as the provider checks it. Raises ProviderError."""
        ...

    def stream(self, ask: Ask, said: Answer) -> Wire: ...

    def delta(self, ask: Ask, said: Answer, text: str) -> bytes:
        """One event of that stream which carries `text`."""
        ...

    def reply(self, ask: Ask, said: Answer) -> bytes: ...

    def failure(self, status: int) -> ProviderError:
        """The error that this provider gives with a status."""
        ...

    def error(self, problem: ProviderError, request_id: str) -> bytes: ...

    def headers(self, request_id: str) -> dict[str, str]:
        """Those that come with every answer of this provider."""
        ...


def read_object(body: bytes, problem: str) -> dict[str, Any]:
    """The JSON object in a body. Raises ProviderError, saying `problem`."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        fields = None
    if not isinstance(fields, dict):
        raise ProviderError(problem)
    return fields


def count_prompt(*parts: Any) -> int:
    """Tokens of the text in these parts of a request, four bytes each; a picture has a price of its own."""
    size = pictures = 0
    for text in _texts(parts):
        if text is None:
            pictures += 1
        else:
            size += len(text.encode("utf-8", "surrogatepass"))
    return -(-size // 4) + pictures * IMAGE_TOKENS


def _texts(value: Any) -> Iterator[str | None]:
    """Every string below; None for a picture, whatever it holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, below in value.items():
            if name in _PICTURES:
                yield from [None] * (len(below) if isinstance(below, list) else 1)
            else:
                yield from _texts(below)
    elif isinstance(value, list | tuple):
        for below in value:
            yield from _texts(below)

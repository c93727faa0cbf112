"""What Ollama sends, read; and JSON, written."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import orjson

T = TypeVar("T")


class NotOllamaError(ValueError):
    """JSON that this dialect does not send."""


# What a line from elsewhere makes a parser raise: NotOllamaError, broken JSON or UTF-8, and nesting without an end.
UNREADABLE = (ValueError, RecursionError)


class Said(NamedTuple):
    """What the model generated in one line, or in a whole answer."""

    text: str  # all of it
    thinking: str
    content: str
    tool_calls: Sequence[Mapping[str, Any]]  # OpenAI's form, without an index
    logprobs: Mapping[str, Any] | None  # of the content


def loads(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. Raises one of UNREADABLE."""
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError:
        parsed = json.loads(data.decode("utf-8"))  # takes half an emoji (a lone surrogate), which orjson refuses
    return object_of(parsed)


def dumps(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # half an emoji
        return json.dumps(value, separators=(",", ":")).encode()


def object_of(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise NotOllamaError("not an object")
    return value


def typed(source: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """A field that is absent or of its type: text that we cannot read must not vanish in silence."""
    value = source.get(name)
    if isinstance(value, kind):
        return value
    if value is None:
        return kind()
    raise NotOllamaError(f"{name} is not of its type")


# --- logprobs -----------------------------------------------------------------------------------------------------


def logprobs_of(tokens: Sequence[Any], content: str, *, alone: bool) -> dict[str, Any] | None:
    """OpenAI's `logprobs`: of the tokens that spell the content.

    Ollama lists all that it generated, thinking and tool calls too; the content's tokens come last. Where they cannot
    be told apart there is nothing true to say, but for content that stands alone.
    """
    if not content:
        return None
    entries = [
        {**_token(token), "top_logprobs": list(map(_token, typed(token, "top_logprobs", list)))} for token in tokens
    ]
    wanted, spelled = content.encode("utf-8", "surrogatepass"), [_token_bytes(entry) for entry in entries]
    start, missing = len(entries), len(wanted)
    while start and missing > 0:
        start -= 1
        missing -= len(spelled[start])
    if b"".join(spelled[start:]) == wanted:
        return {"content": entries[start:], "refusal": None}
    return {"content": entries, "refusal": None} if alone else None


def _token(token: Any) -> dict[str, Any]:
    text, raw = typed(object_of(token), "token", str), typed(token, "bytes", list)
    if not all(isinstance(byte, int) and 0 <= byte <= 255 for byte in raw):
        raise NotOllamaError("bytes of a token that are none")
    return {"token": text, "logprob": token.get("logprob"), "bytes": raw or None}


def _token_bytes(token: Mapping[str, Any]) -> bytes:
    """A token may be half a character: then only `bytes` says which."""
    return bytes(token["bytes"]) if token["bytes"] else token["token"].encode("utf-8", "surrogatepass")

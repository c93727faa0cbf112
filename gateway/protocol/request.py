"""A request to a model as the client sent it, and what a dialect promises to make of it."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import orjson
from msgspec import Struct

from gateway.protocol.checks import check_chat
from gateway.protocol.errors import GatewayError
from gateway.protocol.inputs import check_completion, check_embedding, texts_and_tokens
from gateway.protocol.json_object import parse_object
from gateway.protocol.routing import Target
from gateway.protocol.usage import Usage

# Bytes of a body whose reading or translation takes about a millisecond: a larger one leaves the event loop for it.
PARSE_HERE = 1 << 17

# How a request limits its answer, the newer name first. OpenAI's reasoning models refuse the older one, and many other
# servers do not know the newer (https://platform.openai.com/docs/api-reference/chat/create).
_OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens")


Kind = Literal["chat", "completion", "embedding", "passthrough"]  # of requests to a model


class ModelRequest(Struct, frozen=True, gc=False):
    """`fields` is the parsed `body`; both say the same, because duplicate keys were refused."""

    body: bytes
    fields: Mapping[str, Any]
    model: str
    stream: bool
    wants_usage: bool  # the client asked for the usage chunk of a stream
    kind: Kind = "chat"

    @property
    def messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = self.fields["messages"]
        return messages


class Call(Struct, frozen=True, gc=False):
    """One upstream attempt: all that a translator may know. No clock and no ids are made further down."""

    asked: ModelRequest
    target: Target
    completion_id: str  # `chatcmpl-…` or `cmpl-…`, for dialects whose own ids are not OpenAI's
    created: int  # seconds since the epoch


class UpstreamRequest(Struct, frozen=True, gc=False):
    """What to send: `path` is joined to the provider's base URL; the credential is added by `upstream`."""

    path: str
    body: bytes
    headers: Mapping[str, str] = {}  # beside Content-Type and the provider's own


class Chunk(Struct, frozen=True, gc=False):
    """One step of a stream: bytes for the client, and what the meter reads from them."""

    data: bytes  # whole events, ready to send; b"" when the client must not see it
    text: str = ""  # all that the model generated in it: content, reasoning, refusal, tool names and arguments
    usage: Usage | None = None
    finish_reason: str | None = None


class Reply(Struct, frozen=True, gc=False):
    """A whole answer (`stream: false`)."""

    body: bytes
    text: str = ""
    usage: Usage | None = None
    finish_reason: str | None = None


class Listed(NamedTuple):
    """A model as its provider lists it."""

    name: str
    context_length: int | None = None  # tokens of prompt and answer; None: it does not say


class Translator(Protocol):
    """One upstream attempt in one dialect, sans I/O. It holds at most a megabyte and makes no usage up."""

    def request(self) -> UpstreamRequest:
        """What to send. Raises InvalidRequest naming the parameter that this dialect cannot express."""
        ...

    def feed(self, data: bytes) -> list[Chunk]:
        """The chunks that `data` completes: the same ones for every split of the same bytes. Never raises."""
        ...

    @property
    def done(self) -> bool:
        """The provider's last word, good or bad, is in: nothing more is read."""
        ...

    def flush(self) -> list[Chunk]:
        """The end of the stream: closing chunks. Raises UpstreamError when it broke or its last word is missing."""
        ...

    def cut(self, usage: Usage) -> bytes:
        """The client's last bytes when we end the stream in its middle; nothing is fed after it. Never raises.

        `length` for every choice that goes on, `usage` if the client asked for it and has none yet, and `[DONE]`: what
        a stream looks like that reached its `max_tokens`. b"" when the client has the `[DONE]` already.
        """
        ...

    def reply(self, body: bytes) -> Reply:
        """A whole answer. Raises UpstreamBadBody when it is none."""
        ...

    def error(self, status: int, body: bytes, retry_after: float | None = None) -> GatewayError:
        """What an answer with another status than 200 means for the client."""
        ...


# --- reading a body -----------------------------------------------------------------------------------------------


def parse_chat(body: bytes) -> ModelRequest:
    """A checked request. Raises InvalidJSON or InvalidRequest, naming the parameter."""
    fields = parse_object(body)
    check_chat(fields)
    return _checked(body, fields, "chat")


def parse_completion(body: bytes) -> ModelRequest:
    """As `parse_chat`."""
    fields = parse_object(body)
    check_completion(fields)
    return _checked(body, fields, "completion")


def parse_embedding(body: bytes) -> ModelRequest:
    """As `parse_chat`."""
    fields = parse_object(body)
    check_embedding(fields)
    return ModelRequest(body, fields, fields["model"], stream=False, wants_usage=False, kind="embedding")


def _checked(body: bytes, fields: Mapping[str, Any], kind: Kind) -> ModelRequest:
    options = fields.get("stream_options")
    wants_usage = bool(options and options.get("include_usage"))
    return ModelRequest(body, fields, fields["model"], fields.get("stream") or False, wants_usage, kind)


# --- how long the answer may be -----------------------------------------------------------------------------------


def max_output(asked: ModelRequest) -> int | None:
    """Tokens that all choices together may have at most; None when the request does not say."""
    if asked.kind == "embedding":
        return 0
    given = [limit for name in _OUTPUT_LIMITS if (limit := asked.fields.get(name)) is not None]
    return min(given) * _choices(asked) if given else None


def _choices(asked: ModelRequest) -> int:
    """How many are generated: of a completion's `best_of` all, and only the best are sent."""
    fields = asked.fields
    return max(fields.get("n") or 1, (asked.kind == "completion" and fields.get("best_of")) or 1)


# --- the prompt ---------------------------------------------------------------------------------------------------


class Prompt(Struct, frozen=True):
    """What is counted when the provider gives no usage."""

    texts: Iterator[str]
    tokens: int = 0  # of what came as tokens
    messages: bool = True  # each text is framed as a message, and the answer too


def prompt_of(asked: ModelRequest) -> Prompt:
    """All text of the prompt, tool definitions included."""
    if asked.kind == "chat":
        return Prompt(_chat_texts(asked))
    texts, tokens = texts_and_tokens(asked.fields["input" if asked.kind == "embedding" else "prompt"])
    return Prompt(texts, tokens, messages=False)


def _chat_texts(asked: ModelRequest) -> Iterator[str]:
    for message in asked.fields["messages"]:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            for part in content:
                if isinstance(part.get("text"), str):
                    yield part["text"]
        for call in message.get("tool_calls") or ():
            function = call.get("function") or {}
            yield function.get("name", "")
            yield function.get("arguments", "")
    if tools := asked.fields.get("tools"):
        yield orjson.dumps(tools).decode()

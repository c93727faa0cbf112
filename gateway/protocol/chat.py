"""A chat request as the client sent it, and what a dialect promises to make of it."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import orjson
from msgspec import Struct

from gateway.protocol.checks import check_chat
from gateway.protocol.errors import GatewayError
from gateway.protocol.json_object import parse_object
from gateway.protocol.routing import Target
from gateway.protocol.usage import Usage

# Bytes of a body whose reading or translation takes about a millisecond: a larger one leaves the event loop for it.
PARSE_HERE = 1 << 17

# How a request limits its answer, the newer name first. OpenAI's reasoning models refuse the older one, and many other
# servers do not know the newer (https://platform.openai.com/docs/api-reference/chat/create).
_OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens")


class ChatRequest(Struct, frozen=True, gc=False):
    """`fields` is the parsed `body`; both say the same, because duplicate keys were refused."""

    body: bytes
    fields: Mapping[str, Any]
    model: str
    stream: bool
    wants_usage: bool  # the client asked for the usage chunk of a stream

    @property
    def messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = self.fields["messages"]
        return messages


class Call(Struct, frozen=True, gc=False):
    """One upstream attempt: all that a translator may know. No clock and no ids are made further down."""

    chat: ChatRequest
    target: Target
    completion_id: str  # `chatcmpl-…`, for dialects whose own ids are not OpenAI's
    created: int  # seconds since the epoch


class UpstreamRequest(NamedTuple):
    """What to send: `path` is joined to the provider's base URL; the credential is added by `upstream`."""

    path: str
    body: bytes
    headers: Mapping[str, str] = {}  # beside Content-Type and the provider's own


class Chunk(NamedTuple):
    """One step of a stream: bytes for the client, and what the meter reads from them."""

    data: bytes  # whole events, ready to send; b"" when the client must not see it
    text: str = ""  # all that the model generated in it: content, reasoning, refusal, tool names and arguments
    usage: Usage | None = None
    finish_reason: str | None = None


# The chunk of an event that is text and no more, from all four fields; in half the time, and there is one for every
# token: a NamedTuple's own constructor is a function in Python.
text_chunk: Callable[[tuple[bytes, str, None, None]], Chunk] = partial(tuple.__new__, Chunk)


class Reply(NamedTuple):
    """A whole answer (`stream: false`)."""

    body: bytes
    text: str = ""
    usage: Usage | None = None
    finish_reason: str | None = None


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


def parse_chat(body: bytes) -> ChatRequest:
    """A checked request. Raises InvalidJSON or InvalidRequest, naming the parameter."""
    fields = parse_object(body)
    check_chat(fields)
    options = fields.get("stream_options")
    return ChatRequest(
        body=body,
        fields=fields,
        model=fields["model"],
        stream=fields.get("stream") or False,
        wants_usage=bool(options and options.get("include_usage")),
    )


# --- how long the answer may be -----------------------------------------------------------------------------------


def max_output(chat: ChatRequest) -> int | None:
    """Tokens that all choices together may have at most; None when the request does not say."""
    given = [limit for name in _OUTPUT_LIMITS if (limit := chat.fields.get(name)) is not None]
    return min(given) * _choices(chat) if given else None


def _choices(chat: ChatRequest) -> int:
    return chat.fields.get("n") or 1


# --- the prompt ---------------------------------------------------------------------------------------------------


def prompt_text(chat: ChatRequest) -> Iterator[str]:
    """All text of the prompt, tool definitions included: what is counted when the provider gives no usage."""
    for message in chat.messages:
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
    if tools := chat.fields.get("tools"):
        yield orjson.dumps(tools).decode()

"""What the mock says: decided from what was asked alone, before any wire format has a part in it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Literal

import orjson

from gateway.mock.samples import sample
from gateway.mock.script import Script

DEMO = (
    "Hello from the mock provider. I am not a model: this text was written in advance, and everybody gets the same. "
    "The road it took is real, though: AI Gateway checked your key, found the provider that answers for this model, "
    "and passed on each piece of my answer the moment it was out. "
    "Give it an OpenAI or Anthropic key, or start Ollama beside it, and a real model answers here "
    "with nothing changed in your client."
)
THOUGHTS = (
    "The question came through the gateway, and I am a mock: I have nothing to think about. "
    "I write down these two sentences so that thoughts can be seen to arrive before the answer."
)
REFUSAL = "I'm sorry, but I can't help with that: this mock was asked to refuse."
FILTERED = "This answer begins well, and then the provider's filter"
MULTIBYTE = (
    "Grüße, 你好, こんにちは, 안녕하세요, Здравствуйте, שלום, नमस्ते, 👩‍👩‍👧‍👦 and 🏳️‍🌈: every script in one stream. "
    "Line ends that only some parsers see: \u2028 \u2029 \u0085 \x0b \x0c. "
    'A quote ", a backslash \\, a tab \t, a line\nbreak, and data: that is no field.'
)
LONG = 2_000  # deltas
QUOTED = 400  # characters of a tool's result that the answer repeats

_PIECE = re.compile(r"[^\S\n]?[a-zA-Z]{1,12}|[^\S\n]?[^a-zA-Z\s]{1,2}|\s")  # a token's size, near enough

Ending = Literal["stop", "stop_sequence", "length", "tools", "refused", "filtered"]


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    schema: bytes = b"{}"  # JSON


@dataclass(frozen=True, slots=True)
class Ask:
    """What the answer depends on, read from a request. Equal ones get the same bytes."""

    model: str  # as it was sent, the query included
    script: Script
    stream: bool
    question: str  # the last text of the user
    prompt_tokens: int
    tools: tuple[Tool, ...] = ()
    choice: Literal["auto", "required", "none"] = "auto"
    named: str = ""  # the one tool that must be called
    parallel: bool = True
    results: tuple[str, ...] = ()  # what the tools said since then
    images: int = 0
    schema: bytes | None = None  # JSON; the text must be an object that satisfies it
    thinking: Literal["no", "hidden", "shown"] = "no"
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    copies: int = 1  # OpenAI's n
    wants_usage: bool = True
    padded: bool = True  # OpenAI's obfuscation
    echoed: str = ""  # a prompt that the answer begins with


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str  # 24 characters, without any format's prefix
    name: str
    arguments: tuple[str, ...]  # pieces of a JSON object

    @property
    def json(self) -> str:
        return "".join(self.arguments)


@dataclass(frozen=True, slots=True)
class Counts:
    prompt: int
    cached: int  # of the prompt
    completion: int
    reasoning: int  # of the completion


@dataclass(frozen=True, slots=True)
class Answer:
    """Pieces of a token each."""

    id: str
    ending: Ending = "stop"
    stopped_by: str = ""  # the stop sequence
    thoughts: tuple[str, ...] = ()
    hidden_thoughts: bool = False  # thought, and counted, but not shown
    text: tuple[str, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    counts: Counts | None = field(default=None)  # None: the provider does not say


def answer(ask: Ask) -> Answer:
    case = _case(ask)
    said = Answer(
        id=digest(repr(ask)),
        thoughts=_pieces(THOUGHTS) if _thinks(ask) else (),
        hidden_thoughts=_thinks(ask) and ask.thinking != "shown" and ask.script.case != "thinking",
    )
    if case in ("tools", "parallel_tools"):
        said = replace(said, calls=_calls(ask, case), ending="tools")
    else:
        said = replace(said, text=_text(ask, case), ending=_ENDINGS.get(case, "stop"))
        said = _stop(said, ask.stop)
    return _count(_limit(said, ask.max_tokens), ask)


def digest(text: str) -> str:
    """24 characters that stand for `text` in ids."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


# --- which case ---------------------------------------------------------------------------------------------------

_ENDINGS: dict[str, Ending] = {"refusal": "refused", "content_filter": "filtered", "length": "length"}


def _case(ask: Ask) -> str:
    if ask.script.case in ("tools", "parallel_tools"):
        return "results" if ask.results else ask.script.case
    if ask.script.case not in ("", "thinking"):
        return ask.script.case
    if ask.results:
        return "results"
    if _must_call(ask):
        return "parallel_tools" if "both" in ask.question.lower() and ask.parallel else "tools"
    return "json" if ask.schema is not None else "text"


def _must_call(ask: Ask) -> bool:
    if not ask.tools or ask.choice == "none":
        return False
    return ask.choice == "required" or bool(ask.named) or "tool" in ask.question.lower()


def _thinks(ask: Ask) -> bool:
    return ask.thinking != "no" or ask.script.case == "thinking"


# --- text ---------------------------------------------------------------------------------------------------------


def _text(ask: Ask, case: str) -> tuple[str, ...]:
    pieces = _pieces(_words(ask, case))
    if case == "length":
        pieces = pieces[: len(pieces) // 2]
    wanted = ask.script.tokens if ask.script.tokens is not None else LONG if case == "long" else len(pieces)
    if case in ("empty", "json") or not pieces:
        return pieces
    rounds = -(-wanted // len(pieces))
    return (pieces * rounds)[:wanted]


def _words(ask: Ask, case: str) -> str:
    match case:
        case "empty":
            return ""
        case "json":
            return orjson.dumps(sample(orjson.loads(ask.schema or b"{}"))).decode()
        case "multibyte":
            return MULTIBYTE
        case "refusal":
            return REFUSAL
        case "content_filter":
            return FILTERED
        case "results":
            quoted = ", ".join(f'"{result[:QUOTED]}"' for result in ask.results)
            return f"The tool said {quoted}. I am a mock, so I only repeat it."
    seen = f"I see {ask.images} image{'s' if ask.images > 1 else ''} in your message. " if ask.images else ""
    return seen + DEMO


def _pieces(text: str) -> tuple[str, ...]:
    return tuple(_PIECE.findall(text))


def _stop(said: Answer, sequences: Sequence[str]) -> Answer:
    text = "".join(said.text)
    found = [(text.index(sequence), sequence) for sequence in sequences if sequence and sequence in text]
    if not found:
        return said
    at, sequence = min(found)
    return replace(said, text=_pieces(text[:at]), ending="stop_sequence", stopped_by=sequence)


# --- tools --------------------------------------------------------------------------------------------------------

# Called when a case asks for tools and the request brings none.
_OWN_TOOLS = (
    Tool("get_weather", b'{"type":"object","properties":{"city":{"type":"string"}}}'),
    Tool("get_time", b'{"type":"object","properties":{"zone":{"type":"string"}}}'),
)


def _calls(ask: Ask, case: str) -> tuple[ToolCall, ...]:
    tools = ask.tools or _OWN_TOOLS
    if case == "parallel_tools":
        chosen = tools if len(tools) > 1 else tools * 2
    else:
        chosen = tuple(tool for tool in tools if tool.name == ask.named)[:1] or tools[:1]
    return tuple(_call(ask, index, tool) for index, tool in enumerate(chosen))


def _call(ask: Ask, index: int, tool: Tool) -> ToolCall:
    arguments: Any = sample(orjson.loads(tool.schema))
    return ToolCall(
        id=digest(f"{index} {ask!r}"),
        name=tool.name,
        arguments=_pieces(orjson.dumps(arguments if isinstance(arguments, dict) else {}).decode()),
    )


# --- tokens -------------------------------------------------------------------------------------------------------


def _limit(said: Answer, max_tokens: int | None) -> Answer:
    """Cut after that many pieces, in the order in which they are sent."""
    if max_tokens is None or _length(said) <= max_tokens:
        return said
    left = max_tokens
    thoughts = said.thoughts[:left]
    left -= len(thoughts)
    text = said.text[:left]
    left -= len(text)
    calls = []
    for call in said.calls:
        if left > 0:
            calls.append(replace(call, arguments=call.arguments[: left - 1]))
            left -= 1 + len(calls[-1].arguments)
    return replace(said, thoughts=thoughts, text=text, calls=tuple(calls), ending="length", stopped_by="")


def _length(said: Answer) -> int:
    return len(said.thoughts) + len(said.text) + sum(1 + len(call.arguments) for call in said.calls)


def _count(said: Answer, ask: Ask) -> Answer:
    if ask.script.fault == "no_usage":
        return said
    counts = Counts(
        prompt=ask.prompt_tokens,
        cached=min(ask.script.cached_tokens, ask.prompt_tokens),
        completion=_length(said) * ask.copies,
        reasoning=len(said.thoughts) * ask.copies,
    )
    return replace(said, counts=counts)

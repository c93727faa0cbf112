"""What a stream and a whole answer have in common."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.protocol.dialects.anthropic.objects import Json, dump, json_object, text_of
from gateway.protocol.dialects.anthropic.tools import Tool
from gateway.protocol.request import Call

REASONING_FORMAT = "anthropic-claude-v1"  # OpenRouter's name for signatures and data that only Anthropic can read

# https://platform.claude.com/docs/en/build-with-claude/handling-stop-reasons. A turn that was paused or compacted is
# not complete, and `length` is the only word that says so.
_FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "pause_turn": "length",
    "compaction": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


def envelope(call: Call, kind: str, model: str, choices: list[Json]) -> Json:
    """What all chunks and a whole completion begin with; `model` is what the provider calls it."""
    return {
        "id": call.completion_id,
        "object": kind,
        "created": call.created,
        "model": model,
        "choices": choices,
    }


def finish_reason(reason: Any, calls: int) -> str:
    """OpenAI's word. An agent waits for calls after `tool_calls` and for none after `stop`, so the calls decide."""
    word = _FINISH_REASONS.get(reason, "stop") if isinstance(reason, str) else "stop"
    if word in ("stop", "tool_calls"):
        return "tool_calls" if calls else "stop"
    return word


@dataclass(slots=True)
class ToolCall:
    """One tool_use block. Mutable while its input comes in."""

    number: int  # among the client's tool calls
    id: str
    tool: Tool
    input: Any  # as the block's start has it
    begun: bool = False  # a piece of the input came
    pieces: list[str] = field(default_factory=list)  # of a custom tool's input, which is no JSON for the client
    held: int = 0  # characters in `pieces`

    @classmethod
    def opened(cls, block: Json, number: int, tools: Mapping[str, Tool], completion_id: str) -> "ToolCall":
        name = text_of(block, "name")
        call_id = text_of(block, "id") or f"call_{completion_id}_{number}"
        return cls(number, call_id, tools.get(name, Tool(name)), block.get("input") or {})

    def arguments(self) -> str:
        """The input of a whole block, as the client gets it."""
        return self.custom_input() if self.tool.custom else dump(self.input).decode()

    def custom_input(self) -> str:
        """The text that `tools.py` asked for as the one member of an object; what else came, as it came."""
        joined = "".join(self.pieces)
        given = json_object(joined) if joined else self.input
        text = given.get("input") if isinstance(given, dict) else None
        return text if isinstance(text, str) else joined

    def described(self, content: str) -> Json:
        """The OpenAI object, with its arguments or its custom input."""
        if self.tool.custom:
            return {"id": self.id, "type": "custom", "custom": {"name": self.tool.name, "input": content}}
        return {"id": self.id, "type": "function", "function": {"name": self.tool.name, "arguments": content}}


def signed(text: str, signature: str, index: int) -> Json:
    detail: Json = {"type": "reasoning.text", "text": text, "index": index}
    return detail | ({"signature": signature, "format": REASONING_FORMAT} if signature else {})


def encrypted(data: str, index: int) -> Json:
    return {"type": "reasoning.encrypted", "data": data, "index": index, "format": REASONING_FORMAT}

"""What each model takes, and the provider's list of models."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gateway.protocol.request import Listed

# Never: it cannot. Budget: `enabled`, with a number of tokens. The others are adaptive: off until asked for, on until
# disabled, and on whatever the request says.
Thinking = Literal["never", "budget", "asked", "default", "always"]

_ALL_EFFORTS = frozenset({"low", "medium", "high", "xhigh", "max"})
_NO_XHIGH = _ALL_EFFORTS - {"xhigh"}


@dataclass(frozen=True, slots=True)
class Traits:
    """What a model takes; what it does not is a 400."""

    cap: int | None  # tokens of output; None: not known, the client's figure goes as it is
    default: int  # `max_tokens` when the client gives none: Anthropic requires one
    thinking: Thinking = "always"
    efforts: frozenset[str] = _ALL_EFFORTS
    forced_tool: bool = True  # tool_choice `any` and `tool`
    sampling: bool = False  # temperature, top_p, top_k
    both_samplers: bool = False  # temperature and top_p in one request
    structured: bool = True  # output_config.format, strict tools
    prefill: bool = False  # the conversation may end with an assistant message
    later_system: bool = False  # role `system` after the first message


def _new(thinking: Thinking, **more: Any) -> Traits:
    return Traits(128_000, 128_000, thinking, **more)


def _old(cap: int, thinking: Thinking, *, structured: bool = False) -> Traits:
    return Traits(cap, cap, thinking, frozenset(), sampling=True, structured=structured, prefill=True)


# Output caps: https://platform.claude.com/docs/en/about-claude/models/overview; thinking and effort:
# https://platform.claude.com/docs/en/build-with-claude/adaptive-thinking and …/effort; structured output:
# https://platform.claude.com/docs/en/build-with-claude/structured-outputs; later system messages:
# https://platform.claude.com/docs/en/build-with-claude/mid-conversation-system-messages
_MODELS: Mapping[str, Traits] = {
    r"claude-(opus|sonnet)-5-5|claude-(fable|mythos)-5(-1)?": _new("always", forced_tool=False, later_system=True),
    r"claude-(opus|sonnet)-5|claude-haiku-5-5": _new("default", later_system=True),
    r"claude-opus-4-8": _new("asked", later_system=True),
    r"claude-opus-4-7": _new("asked"),
    r"claude-(opus|sonnet)-4-6": _new("asked", efforts=_NO_XHIGH, sampling=True),
    r"claude-(opus|sonnet|haiku)-4-5": _old(64_000, "budget", structured=True),
    r"claude-opus-4-1": _old(32_000, "budget", structured=True),
    r"claude-opus-4(-0)?": _old(32_000, "budget"),
    r"claude-sonnet-4(-0)?|claude-3-7-sonnet": _old(64_000, "budget"),
    r"claude-3-5-(sonnet|haiku)": _old(8_192, "never"),
    r"claude-3-(opus|sonnet|haiku)|claude-2(\.\d)?|claude-instant(-1(\.\d)?)?": _old(4_096, "never"),
}

# A Claude that the table does not know is newer than the table. It gets what every recent one takes: no sampling
# parameters, no `disabled` thinking, no prefill, no later system message; 32,000 is the smallest cap since Claude 4.
_NEWER = Traits(cap=None, default=32_000)

# Another vendor's model behind this dialect takes what the dialect has. 8,192 tokens fit every such model we know of.
_STAND_IN = Traits(None, 8_192, "budget", frozenset(), sampling=True, both_samplers=True, prefill=True)

# A date, `@date` or `-latest` may follow a name; another minor version may not.
_VARIANT = r"(?:[-@](?!\d{1,2}(?:\D|$)).*)?"
_TABLE = [(re.compile(f"(?:{names}){_VARIANT}"), traits) for names, traits in _MODELS.items()]


def traits_of(model: str) -> Traits:
    if not model.startswith("claude"):
        return _STAND_IN
    return next((traits for names, traits in _TABLE if names.fullmatch(model)), _NEWER)


def models_listed(parsed: Any) -> list[Listed]:
    """The models in an answer of `GET /v1/models`."""
    rows = parsed.get("data") if isinstance(parsed, dict) else None
    if not isinstance(rows, list):
        return []
    return [Listed(row["id"]) for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]

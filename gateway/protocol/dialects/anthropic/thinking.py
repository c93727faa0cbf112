"""How long an answer may be, and how much of it may be thought."""

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.protocol.dialects.anthropic.errors import unsupported
from gateway.protocol.dialects.anthropic.models import Traits
from gateway.protocol.dialects.anthropic.objects import Json
from gateway.protocol.errors import InvalidRequest
from gateway.protocol.request import ModelRequest

# Without a stream an answer of more tokens may take longer than ten minutes; Anthropic's SDKs refuse to ask for it
# (https://github.com/anthropics/anthropic-sdk-python, `_calculate_nonstreaming_timeout`: 3600 s for 128,000 tokens).
MAX_TOKENS_UNSTREAMED = 21_333


def max_tokens(chat: ModelRequest, traits: Traits) -> int:
    given = given_max_tokens(chat.fields)
    if given is None:
        return traits.default if chat.stream else min(traits.default, MAX_TOKENS_UNSTREAMED)
    return min(given, traits.cap or given)


def given_max_tokens(fields: Mapping[str, Any]) -> int | None:
    given: int | None = fields.get("max_completion_tokens") or fields.get("max_tokens")
    return given


# --- thinking and effort ------------------------------------------------------------------------------------------

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

# Tokens; 1,024 is the least that is accepted. The figures are LiteLLM's: clients that come from it are at home.
_BUDGETS = {"minimal": 1_024, "low": 1_024, "medium": 2_048, "high": 4_096, "xhigh": 8_192, "max": 16_384}
_MIN_BUDGET = 1_024


def set_thinking(body: Json, output: Json, fields: Mapping[str, Any], traits: Traits) -> None:
    """Set `thinking`, the effort, and the room that a budget needs. A forced tool excludes thinking and wins over it:
    a client that forces a tool cannot use any other answer, and an effort is a hint."""
    wanted = _reasoning_effort(fields)
    thinking = _given_thinking(fields)
    forced = body.get("tool_choice", {}).get("type") in ("any", "tool")
    if forced and (not traits.forced_tool or _is_on(thinking)):
        raise unsupported("tool_choice", "a tool cannot be forced while the model thinks")
    if thinking is None:
        thinking = _thinking_for("none" if forced and traits.thinking == "default" else wanted, traits)
        if _is_on(thinking) and (forced or (traits.thinking == "budget" and not _may_think(body["messages"]))):
            thinking = None
        if thinking and thinking["type"] == "enabled":
            thinking = _fit_budget(body, thinking, fields, traits)
    if thinking is not None:
        body["thinking"] = thinking
    if effort := _effort(wanted, thinking, traits):
        output["effort"] = effort


def _reasoning_effort(fields: Mapping[str, Any]) -> str | None:
    effort: str | None = fields.get("reasoning_effort")
    if effort is not None and effort not in _EFFORTS:
        raise InvalidRequest(
            f"invalid reasoning_effort: one of {', '.join(_EFFORTS)} is required", param="reasoning_effort"
        )
    return effort


def _given_thinking(fields: Mapping[str, Any]) -> Json | None:
    """Anthropic's own `thinking`, which a client may send as it is."""
    thinking = fields.get("thinking")
    if thinking is not None and not (isinstance(thinking, dict) and isinstance(thinking.get("type"), str)):
        raise InvalidRequest("invalid thinking: an object with a type is required", param="thinking")
    return thinking


def _thinking_for(wanted: str | None, traits: Traits) -> Json | None:
    if wanted is None or traits.thinking == "never":
        return None
    if wanted == "none":
        return None if traits.thinking == "always" else {"type": "disabled"}
    if traits.thinking == "budget":
        return {"type": "enabled", "budget_tokens": _BUDGETS[wanted]}
    # Without `display` the newer models send thinking blocks with an empty text.
    return {"type": "adaptive", "display": "summarized"}


def _fit_budget(body: Json, thinking: Json, fields: Mapping[str, Any], traits: Traits) -> Json | None:
    """The budget is part of `max_tokens` and must be less: the client's figure is raised by it, up to the cap."""
    budget = thinking["budget_tokens"]
    if given_max_tokens(fields) is not None:
        body["max_tokens"] = min(body["max_tokens"] + budget, traits.cap or body["max_tokens"] + budget)
    budget = min(budget, body["max_tokens"] - 1)
    return {"type": "enabled", "budget_tokens": budget} if budget >= _MIN_BUDGET else None


def _may_think(turns: Sequence[Json]) -> bool:
    """False while a tool loop goes on whose thinking blocks the client did not send back: with a budget that is a 400
    ("a final assistant message must start with a thinking block")."""
    last = next((turn for turn in reversed(turns) if turn["role"] == "assistant"), None)
    if last is None or not any(block["type"] == "tool_use" for block in last["content"]):
        return True
    return last["content"][0]["type"] in ("thinking", "redacted_thinking")


def _effort(wanted: str | None, thinking: Json | None, traits: Traits) -> str | None:
    if wanted is None or not traits.efforts:
        return None
    if wanted == "none":
        return "low" if traits.thinking == "always" else None
    effort = "low" if wanted == "minimal" else wanted
    # Opus 5 refuses more than `high` without thinking.
    too_high = effort in ("xhigh", "max") and thinking is not None and not _is_on(thinking)
    return "high" if too_high or effort not in traits.efforts else effort


def _is_on(thinking: Json | None) -> bool:
    return thinking is not None and thinking["type"] != "disabled"


def thinks(body: Json) -> bool:
    return _is_on(body.get("thinking"))

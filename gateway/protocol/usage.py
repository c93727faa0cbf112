"""Token counts of one exchange, as OpenAI Chat reports them."""

from typing import Any

from msgspec import Struct

MAX_COUNT = 2**53  # tokens; more is a fault, and would poison the batch of rows it is stored with


class Usage(Struct, frozen=True, gc=False):
    """Counts by OpenAI's containment: the details are parts of their parent and never added to it.

    None means that the provider did not say (Ollama leaves out the prompt count of a fully cached prompt).
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0  # of the prompt, read from the provider's cache
    cache_write_tokens: int = 0  # of the prompt, written to it
    reasoning_tokens: int = 0  # of the completion

    @property
    def total_tokens(self) -> int:
        return (self.prompt_tokens or 0) + (self.completion_tokens or 0)

    @classmethod
    def from_openai(cls, usage: Any) -> "Usage | None":
        """From a `usage` object of the wire; None unless it is one that holds a count (Databricks sends nulls)."""
        if not isinstance(usage, dict):
            return None
        prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
        if prompt is None and completion is None:
            return None
        prompt_details = _object(usage, "prompt_tokens_details")
        completion_details = _object(usage, "completion_tokens_details")
        reasoning = _count(completion_details, "reasoning_tokens") or 0
        if prompt is not None and completion is not None and usage.get("total_tokens") != prompt + completion:
            # xAI counts reasoning beside the completion and Mistral audio beside the prompt; their total tells.
            outside = (_count(usage, "total_tokens") or 0) - prompt - completion
            if outside > 0 and outside == reasoning:
                completion += reasoning
            elif outside > 0 and outside == _count(prompt_details, "audio_tokens"):
                prompt += outside
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            cached_tokens=_cached(usage, prompt_details),
            cache_write_tokens=_count(prompt_details, "cache_write_tokens") or 0,
            reasoning_tokens=reasoning,
        )

    def to_openai(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens or 0,
            "completion_tokens": self.completion_tokens or 0,
            "total_tokens": self.total_tokens,
            "prompt_tokens_details": {
                "cached_tokens": self.cached_tokens,
                "cache_write_tokens": self.cache_write_tokens,
            },
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


def _cached(usage: dict[str, Any], details: dict[str, Any]) -> int:
    """DeepSeek and Together say it beside the details, DeepSeek in words of its own."""
    beside = _count(details, "cached_tokens") or _count(usage, "prompt_cache_hit_tokens")
    return beside or _count(usage, "cached_tokens") or 0


def _count(source: dict[str, Any], name: str) -> int | None:
    """A count that the provider gave; None for what cannot be one (null, NaN, -1, a number that no column holds)."""
    value = source.get(name)
    if value is None or (type(value) is int and 0 <= value <= MAX_COUNT):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_COUNT:
        return None
    return int(value)


def _object(source: dict[str, Any], name: str) -> dict[str, Any]:
    value = source.get(name)
    return value if isinstance(value, dict) else {}

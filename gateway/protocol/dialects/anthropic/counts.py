"""The usage that the provider reports."""

from collections.abc import Sequence
from typing import Any

from gateway.protocol.dialects.anthropic.objects import Json, object_of
from gateway.protocol.usage import Usage

MAX_COUNT = 1 << 53  # tokens; more, or infinity, is no count
_INPUT_COUNTS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


class Counts:
    """The provider's own figures. Each report overwrites, field by field, what it names; nothing is ever added up: the
    last `input_tokens` of a stream with server tools is larger than the first."""

    def __init__(self) -> None:
        self._latest: dict[str, int] = {}

    def merge(self, usage: Any, *, final: bool = False) -> None:
        """Take in a `usage` object. `output_tokens` counts only in a final one: message_start holds a placeholder."""
        if not isinstance(usage, dict):
            return
        names: Sequence[str] = _INPUT_COUNTS
        if final:
            names = (*_INPUT_COUNTS, "output_tokens")
            _keep(self._latest, "thinking_tokens", object_of(usage, "output_tokens_details"))
        for name in names:
            _keep(self._latest, name, usage)

    def usage(self) -> Usage | None:
        """By OpenAI's containment: Anthropic's `input_tokens` excludes what was read from and written to the cache."""
        if not self._latest:
            return None
        read = self._latest.get("cache_read_input_tokens", 0)
        written = self._latest.get("cache_creation_input_tokens", 0)
        fresh = self._latest.get("input_tokens")
        return Usage(
            prompt_tokens=None if fresh is None else fresh + read + written,
            completion_tokens=self._latest.get("output_tokens"),
            cached_tokens=read,
            cache_write_tokens=written,
            reasoning_tokens=self._latest.get("thinking_tokens", 0),
        )


def is_whole(usage: Usage | None) -> bool:
    """Whether the client may see it: a count that the provider left out would read as 0."""
    return usage is not None and usage.prompt_tokens is not None and usage.completion_tokens is not None


def _keep(counts: dict[str, int], name: str, usage: Json) -> None:
    value = usage.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MAX_COUNT:
        counts[name] = int(value)

"""Counts what passes while a stream runs, so that live figures move with the tokens.

The provider's own usage replaces the count as soon as it comes. Until then a token is taken as four bytes of text, the
usual figure for English in OpenAI's vocabularies (https://platform.openai.com/tokenizer); the row says `estimated`.
"""

from collections.abc import Iterable
from dataclasses import replace

from gateway.protocol.usage import Usage

BYTES_PER_TOKEN = 4


def estimate_tokens(byte_count: int) -> int:
    return -(-byte_count // BYTES_PER_TOKEN)


class Meter:
    """The count of one exchange. One writer: the relay."""

    __slots__ = ("_prompt", "_prompt_tokens", "bytes_out", "finish_reason", "usage")

    def __init__(self, prompt: Iterable[str]) -> None:
        self._prompt = prompt  # read once, and only when the provider gives no count
        self._prompt_tokens: int | None = None  # estimated
        self.bytes_out = 0  # UTF-8 bytes of text that the model generated
        self.usage: Usage | None = None  # the provider's, last one wins
        self.finish_reason: str | None = None

    def see(self, text: str, usage: Usage | None, finish_reason: str | None) -> int:
        """Take in one chunk or a whole reply; how many tokens (estimated) it added."""
        before = estimate_tokens(self.bytes_out)
        if text:
            self.bytes_out += len(text.encode("utf-8", "surrogatepass"))
        if usage is not None:
            self.usage = usage
        if finish_reason:
            self.finish_reason = finish_reason
        return estimate_tokens(self.bytes_out) - before

    @property
    def completion_tokens(self) -> int:
        """The best figure there is now."""
        if self.usage is not None and self.usage.completion_tokens is not None:
            return self.usage.completion_tokens
        return estimate_tokens(self.bytes_out)

    def result(self) -> tuple[Usage, str]:
        """The final usage, and its source: `provider`, or `estimated` when any of it is our own count."""
        usage = self.usage
        if usage is not None and usage.prompt_tokens is not None and usage.completion_tokens is not None:
            return usage, "provider"
        usage = usage or Usage()
        prompt = self._estimate_prompt() if usage.prompt_tokens is None else usage.prompt_tokens
        return replace(usage, prompt_tokens=prompt, completion_tokens=self.completion_tokens), "estimated"

    def _estimate_prompt(self) -> int:
        if self._prompt_tokens is None:
            size = sum(len(text.encode("utf-8", "surrogatepass")) for text in self._prompt)
            self._prompt_tokens = estimate_tokens(size)
        return self._prompt_tokens

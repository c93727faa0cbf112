"""Counts what passes while a stream runs, so that live figures move with the tokens.

The provider's own usage replaces the count as soon as it comes. Until then a token is taken as four bytes of text, the
usual figure for English in OpenAI's vocabularies (https://platform.openai.com/tokenizer); the row then says `estimated`.
"""

from collections.abc import Iterable

from gateway.protocol.usage import Usage

BYTES_PER_TOKEN = 4


def estimate_tokens(byte_count: int) -> int:
    return -(-byte_count // BYTES_PER_TOKEN)


class Meter:
    """The count of one exchange. One writer: the relay."""

    __slots__ = ("_prompt", "bytes_out", "finish_reason", "usage")

    def __init__(self, prompt: Iterable[str]) -> None:
        self._prompt = prompt  # read only when the provider gives no count
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
        prompt = usage.prompt_tokens if usage is not None else None
        if prompt is None:
            prompt = estimate_tokens(sum(len(text.encode("utf-8", "surrogatepass")) for text in self._prompt))
        usage = usage or Usage()
        return (
            Usage(
                prompt,
                self.completion_tokens,
                usage.cached_tokens,
                usage.cache_write_tokens,
                usage.reasoning_tokens,
            ),
            "estimated",
        )

"""Counts what passes while a stream runs, so that live figures and budgets move with the tokens.

The provider's own usage replaces the count as soon as it comes. Where it never does, the text can be counted in the
model's vocabulary (`to_count`, `take_counts`), and the row says `counted`; else it is estimated, and the row says so.

The estimate errs upwards, because budgets end streams by it: 3.5 ASCII characters are a token, and so is a character of
three bytes; a piece of a stream is never less than one. Of 47 answers of 25 models, which had 2.2 to 5.4 characters a
token, it was a fifth too high for the median, and more than a tenth too low for three (tests/protocol/test_meter.py).
"""

from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from gateway.protocol.usage import Usage

KEPT = 1 << 20  # bytes of generated text; what comes after them is taken to be like them

# What OpenAI adds to a prompt: three tokens and the role for each message, and three that begin the answer
# (https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken). Other makers add about as much.
MESSAGE_FRAME = 4
ANSWER_FRAME = 3


class Meter:
    """The count of one exchange. Its writers: the relay, and the recorder for what nobody else counted."""

    __slots__ = (
        "_asked",
        "_characters",
        "_completion_counted",
        "_cut",
        "_framed",
        "_generated",
        "_kept",
        "_pieces",
        "_prompt",
        "_prompt_counted",
        "_prompt_estimated",
        "_prompt_tokens",
        "_seen",
        "bytes_out",
        "finish_reason",
        "usage",
    )

    def __init__(self, prompt: Iterable[str], tokens: int = 0, *, framed: bool = True, kept: int = KEPT) -> None:
        """`tokens` of the prompt came as such, beside its texts. `framed`: these are messages.

        `kept`: bytes of generated text; 0 where nobody knows the model's vocabulary, and nobody calls `to_count`.
        """
        self._prompt = prompt  # read once, and only when it is needed
        self._prompt_tokens = tokens
        self._framed = framed
        self._prompt_estimated: int | None = None  # tokens
        self._prompt_counted: int | None = None  # tokens
        self._completion_counted: int | None = None  # tokens
        self._asked = False  # `to_count` has given what it has
        self._kept = kept
        self._generated = bytearray()  # the text that the model generated, at most `kept` of it, in UTF-8
        self._cut = False  # there was more
        self._characters = 0  # of all of it
        self._pieces = 0  # chunks with text in them
        self._seen = 0  # tokens, estimated
        self.bytes_out = 0  # UTF-8 bytes of text that the model generated
        self.usage: Usage | None = None  # the provider's, last one wins
        self.finish_reason: str | None = None

    def see(self, text: str, usage: Usage | None, finish_reason: str | None) -> None:
        """Take in one chunk or a whole reply."""
        if usage is not None:
            self.usage = usage
        elif text and self.usage is not None and self.usage.completion_tokens is not None:
            self.usage = replace(self.usage, completion_tokens=None)  # it was of what had passed by then
        if finish_reason:
            self.finish_reason = finish_reason
        if text:
            self._add(text, 1)

    def see_texts(self, texts: Sequence[str]) -> None:
        """As `see` of each of these chunks, which have text and nothing else."""
        if texts and self.usage is not None and self.usage.completion_tokens is not None:
            self.usage = replace(self.usage, completion_tokens=None)
        self._add("".join(texts), len(texts))

    def _add(self, text: str, pieces: int) -> None:
        data = text.encode() if text.isascii() else text.encode("utf-8", "surrogatepass")
        self.bytes_out = size = self.bytes_out + len(data)
        self._characters = characters = self._characters + len(text)
        self._pieces = pieces = self._pieces + pieces
        if size <= self._kept:
            self._generated += data
        elif not self._cut:
            self._cut = True
            self._generated += text[: (self._kept - len(self._generated)) // 4].encode("utf-8", "surrogatepass")
        self._seen = max(_estimate(size, characters), pieces)

    @property
    def completion_tokens(self) -> int:
        """The best figure there is now."""
        if self.usage is not None and self.usage.completion_tokens is not None:
            return self.usage.completion_tokens
        return self._seen if self._completion_counted is None else self._completion_counted

    def prompt_estimate(self) -> int:
        """Tokens of the prompt, as far as they can be told before the provider does: pictures are not in it."""
        if self._prompt_estimated is None:
            texts = self._prompt_texts()
            self._prompt_estimated = sum(map(_estimate_text, texts)) + self._beside(texts)
        return self._prompt_estimated

    def result(self) -> tuple[Usage, str]:
        """The final usage, and its source: `provider`, else `counted`, or `estimated` when any of it is."""
        usage = self.usage or Usage()
        if usage.prompt_tokens is not None and usage.completion_tokens is not None:
            return usage, "provider"
        prompt = self._prompt_counted if usage.prompt_tokens is None else usage.prompt_tokens
        exact = prompt is not None and (usage.completion_tokens is not None or self._completion_counted is not None)
        if prompt is None:
            prompt = self.prompt_estimate()
        usage = replace(usage, prompt_tokens=prompt, completion_tokens=self.completion_tokens)
        return usage, "counted" if exact else "estimated"

    # --- counting what the provider did not ---------------------------------------------------------------------------

    def to_count(self) -> list[str]:
        """The texts whose tokens the provider did not give; none when it did.

        And none when they were asked for before: a figure that somebody was told does not change any more.
        """
        if self._asked:
            return []
        self._asked = True
        usage = self.usage or Usage()
        texts = list(self._prompt_texts()) if usage.prompt_tokens is None else []
        if usage.completion_tokens is None:
            texts.append(self._generated.decode("utf-8", "surrogatepass"))
        return texts

    def take_counts(self, counts: Sequence[int]) -> None:
        """The tokens of each text that `to_count` gave."""
        usage, counts = self.usage or Usage(), list(counts)
        if usage.completion_tokens is None:
            kept = counts.pop()
            # More than is kept: as many tokens a byte as what is.
            self._completion_counted = -(-kept * self.bytes_out // (len(self._generated) or 1))
        if usage.prompt_tokens is None:
            self._prompt_counted = sum(counts) + self._beside(counts)

    def _beside(self, texts: Sequence[object]) -> int:
        """Tokens of the prompt that are in none of its texts."""
        return self._prompt_tokens + (_frame(texts) if self._framed else 0)

    def _prompt_texts(self) -> Sequence[str]:
        if not isinstance(self._prompt, tuple):
            self._prompt = tuple(self._prompt)
        return self._prompt


def _estimate(byte_count: int, characters: int) -> int:
    """Tokens of a text. A character of 1, 2, 3, 4 bytes is 4, 9, 14, 19 fourteenths of a token."""
    return -(-(5 * byte_count - characters) // 14)


def _estimate_text(text: str) -> int:
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    return _estimate(size, len(text))


def _frame(texts: Sequence[object]) -> int:
    return MESSAGE_FRAME * len(texts) + ANSWER_FRAME if texts else 0

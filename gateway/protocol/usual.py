"""The usual event of a stream: it differs from the one before in what the model wrote, and in nothing else.

Nine of ten events are such. From one that was read in full we keep the bytes on both sides of the text, and the
next ones that have them are read without their JSON. That is a shortcut and defines nothing: an event means what its
dialect reads in it, and the dialect is asked about every event that is not provably the same.

The proof: `learn` puts another string in the text's place and has the event read again. The bytes before the text lead
a parser to one place only. Had that been inside a string or in a comment, then the letters in quotes that we put there
would not have been read as the text, and nothing else have stayed as it was. So any single string literal in that place
is the text; and whether what stands there is one, with its escapes and its UTF-8, the JSON parser says.
"""

import re
from collections.abc import Callable
from typing import Any

import orjson

Path = tuple[str | int, ...]  # of a string, through objects and arrays

PROBE = "probe"

# How often in a row we may have learned what no event then was like. Some servers put a time into every event.
PATIENCE = 8

# A larger event is not a usual one; what is learned is kept for as long as its stream.
MAX_LEARNED = 1 << 13  # bytes


class Usual:
    """What is known of the usual event of one stream."""

    __slots__ = ("_end", "_fitted", "_head", "_middle", "_misfits", "_start", "_tail", "_text_is_second")

    def __init__(self) -> None:
        self._head: bytes | None = None  # up to the first string and its opening quote; None: nothing is known
        self._middle: bytes | None = None  # from quote to quote, when there are two strings
        self._tail = b""  # from the closing quote on
        self._start = self._end = 0  # of what is between, with the quotes
        self._text_is_second = False
        self._fitted = False  # an event was like it
        self._misfits = 0

    def text_of(self, event: bytes) -> str:
        """The text of a usual event; "" for any other, and for one without text."""
        head, middle, tail = self._head, self._middle, self._tail
        if head is None or not event.startswith(head) or not event.endswith(tail):
            return ""
        start, end = self._start, self._end
        try:
            if middle is None:
                text: str = orjson.loads(event[start:end])
            else:
                at = event.find(middle, start + 1)  # its quotes end a literal: where it stands first it is, or nowhere
                first, second = orjson.loads(event[start : at + 1]), orjson.loads(event[at + len(middle) - 1 : end])
                text = second if self._text_is_second else first
        except orjson.JSONDecodeError:
            return ""
        self._fitted = True
        return text

    def forget(self) -> None:
        self._head = None

    @property
    def patient(self) -> bool:
        """Whether `learn` still learns."""
        return self._fitted or self._misfits < PATIENCE

    def learn(self, event: bytes, read: Callable[[bytes], Any], text: Path, other: Path | None = None) -> Any:
        """Take `event` for the usual one, and give its JSON with PROBE for the strings that differ.

        None when it cannot be learned: then nothing is known. `read` gives the JSON of an event. In it `text` is the
        path of the string that is the event's text, and `other` that of a second one, which means nothing: padding, or
        a time.
        """
        self.forget()
        if not self.patient or len(event) > MAX_LEARNED:
            return None
        self._misfits = 0 if self._fitted else self._misfits + 1
        self._fitted = False
        try:
            return self._learn(event, read, [text] if other is None else [text, other])
        except (ValueError, RecursionError):  # no string with that name, none in that place, or it is deep beneath
            return None

    def _learn(self, event: bytes, read: Callable[[bytes], Any], paths: list[Path]) -> Any:
        expected = read(event)
        spans = [_span(event, path, _replaced(expected, path)) for path in paths]
        edges = [0, *(edge for start, end in sorted(spans) for edge in (start + 1, end - 1)), len(event)]
        pieces = [event[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
        meaning = read(PROBE.encode().join(pieces))
        if meaning != expected:
            return None
        self._head, self._tail = pieces[0], pieces[-1]
        self._start, self._end = len(pieces[0]) - 1, 1 - len(pieces[-1])
        self._middle = pieces[1] if len(pieces) > 2 else None
        self._text_is_second = spans[0] != min(spans)
        return meaning


def _replaced(meaning: Any, path: Path) -> str:
    """The string at `path`, in whose place PROBE is now."""
    *way, name = path
    for step in way:
        meaning = meaning[step]
    value: str = meaning[name]
    meaning[name] = PROBE
    return value


def _span(event: bytes, path: Path, value: str) -> tuple[int, int]:
    """Where the literal of the string at `path` stands: most likely where its name and value first do."""
    for match in re.finditer(rb'"%s": ?("[^"\\]*(?:\\.[^"\\]*)*")' % str(path[-1]).encode(), event):
        if orjson.loads(match[1]) == value != PROBE:  # else the proof would prove nothing
            return match.span(1)
    raise ValueError(path)

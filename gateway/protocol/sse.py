"""Server-sent events, framed on bytes (https://html.spec.whatwg.org/multipage/server-sent-events.html).

Rule 1: what comes out does not depend on where the network cut what went in.
Rule 2: the raw bytes of the events, joined, are the bytes that were fed, but for a leading byte order mark.
Rule 3: an event comes out as soon as its last byte is in; a `\\n` that follows a lone `\\r\\r` opens the next event.
"""

import re
from typing import NamedTuple

from gateway.protocol.errors import EventTooLarge

# One event held in memory. Real lines of chat streams reach 100 KB; node's and nginx's header buffers stop at 8-16 KB,
# the OpenAI SDKs have no bound. A megabyte passes every recorded stream and bounds what one provider can cost us.
MAX_EVENT = 1 << 20  # bytes

# "A line terminator immediately following a line terminator", for \n, \r\n and \r in any mixture; \r\n is one. A \r
# that ends what we have may be half of \r\n, so it must be seen followed by something else. The character class in
# front lets the engine skip from terminator to terminator: a quarter of the time that a bare alternation takes.
_BLANK_LINE = re.compile(rb"[\r\n](?:(?<=\r)\r|(?:(?<=\r)\n|(?<=\n))(?:\r\n|\n|\r(?=[^\n])))")
_BOM = b"\xef\xbb\xbf"
_CR, _LF = b"\r\n"  # as numbers: a byte is looked for in a fifth of the time that a bytes object is


class Event(NamedTuple):
    raw: bytes  # the event's own bytes, its blank line included
    data: bytes | None  # data lines joined by \n; None when it has none (comments, a bare `event:`)
    name: str = ""  # the `event:` field
    plain: bool = True  # comments, `data` and `event` in UTF-8, and no more: safe to pass on verbatim once its data is
    stray: bytes | None = None  # value of llama.cpp's non-standard `error:` field


class SSEDecoder:
    """Cuts a byte stream into events.

    It raises EventTooLarge once the good events before it are out; after that it is not used again.
    """

    __slots__ = ("_after_cr", "_buffer", "_error", "_fresh", "_max_event", "_scan", "between")

    def __init__(self, max_event: int = MAX_EVENT) -> None:
        self._buffer = bytearray()
        self._scan = 0  # where the search for a blank line goes on
        self._after_cr = False  # the last event ended in \r\r: a \n that opens the buffer closes that \r
        self._fresh = True  # nothing fed yet: a byte order mark may come
        self.between = False  # nothing is held: what comes next is an event's first byte
        self._max_event = max_event
        self._error: EventTooLarge | None = None  # to be raised by the next call

    def feed(self, data: bytes) -> list[Event]:
        return [decode_event(raw) for raw in self.split(data)]

    def split(self, data: bytes) -> list[bytes]:
        """The bytes of each event that `data` completes, for `decode_event` to read."""
        if self.between and len(data) <= self._max_event and _CR not in data:
            # What nearly every read is: whole events, and without \r a blank line is \n\n.
            *events, rest = data.split(b"\n\n")
            if not rest:
                return [event + b"\n\n" for event in events]
        return self._split(data)

    def _split(self, data: bytes) -> list[bytes]:
        if self._error is not None:
            raise self._error
        self._buffer += data
        if self._fresh and not self._strip_bom():
            return []
        events: list[bytes] = []
        while match := self._next_blank_line():
            end = match.end()
            if end > self._max_event:
                return self._give_up(events)
            raw = bytes(self._buffer[:end])
            del self._buffer[:end]
            events.append(raw)
            self._scan, self._after_cr = 0, raw.endswith(b"\r\r")
        if len(self._buffer) > self._max_event:
            return self._give_up(events)
        self._scan = max(self._scan, len(self._buffer) - 3)
        self.between = not self._buffer and not self._after_cr
        return events

    def _next_blank_line(self) -> re.Match[bytes] | None:
        if self._after_cr and self._buffer:
            self._after_cr = False
            if self._buffer[0] == _LF:  # a byte of this event, and no line of it
                self._scan = 1
        return _BLANK_LINE.search(self._buffer, self._scan)

    def rest(self) -> bytes:
        """What came after the last whole event: an event that the provider never closed."""
        return bytes(self._buffer)

    def _strip_bom(self) -> bool:
        """Drop a byte order mark; false while it cannot be told yet. The SDKs lose the first event to one."""
        head = bytes(self._buffer[:3])
        if len(head) < 3 and _BOM.startswith(head):
            return False
        if head == _BOM:
            del self._buffer[:3]
        self._fresh = False
        return True

    def _give_up(self, events: list[bytes]) -> list[bytes]:
        self._error = EventTooLarge(f"the provider sent an event longer than {self._max_event} bytes")
        self.between = False
        self._buffer.clear()
        if not events:
            raise self._error
        return events


def decode_event(raw: bytes) -> Event:
    """One event from its bytes (with or without its blank line)."""
    if raw.startswith(b"data: ") and raw.endswith(b"\n\n") and raw.find(b"\n") == len(raw) - 2 and _CR not in raw:
        return Event(raw, raw[6:-2])  # what the rest would say of it, too
    lines: list[bytes] = []
    name, plain, stray = "", True, None
    for line in raw.splitlines():  # of bytes, and so by \n, \r\n and \r alone
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            lines.append(value)
            continue
        if field == b"event":
            name = value.decode("utf-8", "replace")
        elif field:  # all else but a comment
            plain = False
            if field == b"error":
                stray = value
        plain = plain and _is_utf8(line)
    return Event(raw, b"\n".join(lines) if lines else None, name, plain, stray)


def _is_utf8(line: bytes) -> bool:
    """The SDKs decode comments and names as well, and stop at the first that is not UTF-8."""
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def data_event(data: bytes) -> bytes:
    """The bytes of an event that carries `data` (one line of JSON, or `[DONE]`)."""
    return b"data: " + data + b"\n\n"


DONE = data_event(b"[DONE]")
PING = b": ping\n\n"

"""One HTTP/1.1 connection to a provider: a request is written, its answer is read (RFC 9112).

Its states, and who owns it:

    idle   the pool. Whatever comes was not asked for: the connection is cut.
    head   the receiver that `send` was given. Interim answers (RFC 9110 15.2) are skipped.
    body   the same receiver, which has heard `opened`.
    lost   nobody; it is cut, or the provider went.

Rule 1: a receiver hears `opened` at most once, then `received`, then one of `ended` and `failed`, and nothing after it
or after `cut`. From then on the connection is not its any more.
Rule 2: a connection is used again only when the parser saw the answer's end and no byte after it, the request was sent
whole, and the provider speaks HTTP/1.1 and did not say close. Every other end cuts it, so that nothing of one answer is
ever read as the next one's. (An empty line after the end is skipped by the parser: nothing can be read from it.)
Rule 3: the parser's callbacks take notes and refuse; the receiver is called when the parser has returned.
Rule 4: a body that is sent in pieces goes on to its end, or to an answer to a part of it: then nobody reads the rest.
"""

import asyncio
import select
import ssl
from collections.abc import Callable
from typing import Literal, Protocol, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

MAX_HEAD = 1 << 16  # bytes; nginx takes 4 or 8 KiB from an upstream, node's client 16, curl 300
MAX_HEADERS = 200
JOINED = 1 << 16  # bytes of a request's body that are copied behind its head: cheaper than a second buffer

Fault = Literal[
    "unanswered",  # gone before a byte of an answer came
    "reset",  # gone by force, or before the head was whole
    "truncated",  # gone before the body was whole
    "protocol",  # what came is not HTTP/1.1
]


class Head:
    """An answer's, as the parser let it pass. Fields are looked for when they are asked for: most never are."""

    __slots__ = ("_bytes", "_lower", "status")

    def __init__(self, status: int, head: bytes) -> None:
        self.status = status
        self._bytes = head
        self._lower = head.lower()

    def count(self, field: bytes) -> int:
        """How often it is given. `field` is how its line begins, `\\r\\nname:` in lower case."""
        return self._lower.count(field)

    def get(self, field: bytes) -> str:
        """Its first value; "" when there is none."""
        start = self._lower.find(field)
        if start < 0:
            return ""
        start += len(field)
        end = self._bytes.find(b"\r\n", start)
        return self._bytes[start : end if end >= 0 else None].decode("latin-1").strip(" \t")


class Receiver(Protocol):
    """Who an answer is read for."""

    def opened(self, head: Head) -> None: ...

    def received(self, data: bytes) -> None:
        """All bytes of the body that were in one read of the socket; never b""."""
        ...

    def ended(self) -> None:
        """The body is whole."""
        ...

    def failed(self, fault: Fault) -> None:
        """There is no more of it; the connection is gone."""
        ...


class _Refused(Exception):
    """A callback's word to the parser, which stops with an HttpParserError."""


class Connection(asyncio.Protocol):
    """Made by the pool. `free` is called whenever it can be used again, `lost` once, when it is closed."""

    __slots__ = (
        "_beside", "_blocked", "_descriptor", "_free", "_heads", "_interim", "_is_1_1", "_keep_alive", "_lost",
        "_parser", "_parts", "_paused", "_receiver", "_sending", "_status", "_transport", "_until_close", "_waiter",
        "_whole", "on_body",
    )  # fmt: skip

    def __init__(self, free: Callable[["Connection"], None], lost: Callable[["Connection"], None]) -> None:
        self._free = free
        self._lost = lost
        self._transport: asyncio.Transport
        self._descriptor = -1
        self._receiver: Receiver | None = None
        self._paused = False
        self._blocked = False  # the kernel takes no more for now
        self._waiter: asyncio.Future[None] | None = None  # of `writable`
        self._parts: list[bytes] = []  # of the body, in this read
        self.on_body = self._parts.append  # the parser calls it without a frame of Python's
        self._begin()
        self._parser = HttpResponseParser(self)  # last, because it looks the callbacks up here

    def _begin(self) -> None:
        self._heads = b""  # read before the body: interim answers' and the answer's own
        self._interim = 0  # interim answers among them
        self._status = 0  # 0: the head is not in
        self._until_close = False  # the body ends with the connection
        self._beside = 0  # bytes read since the body's last: heads, chunk extensions, trailers
        self._whole = False
        self._is_1_1 = False  # the answer's version
        self._keep_alive = False  # what it says of the connection
        self._sending = False  # there is more of the request

    # --- its owner

    def send(self, head: bytes, body: bytes, receiver: Receiver) -> None:
        """Send a request; its answer goes to `receiver`. The connection is fresh, or came from the pool."""
        if self._transport.is_closing():
            receiver.failed("unanswered")
            return
        self._begin()
        self._parser.set_dangerous_leniencies(lenient_chunked_length=False)
        self._receiver = receiver
        if len(body) <= JOINED:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    def begin(self, head: bytes, receiver: Receiver) -> None:
        """As `send`; the body follows by `write`, with its framing, and ends with `sent`."""
        self.send(head, b"", receiver)
        self._sending = True

    def write(self, data: bytes) -> None:
        """Of a request that was begun. What was written before it should be gone: see `writable`."""
        if self.is_open:
            self._transport.write(data)

    def sent(self) -> None:
        """The request is whole."""
        self._sending = False

    async def writable(self) -> None:
        """Returns when the kernel takes more, or nothing any more."""
        while self._blocked and self.is_open:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    @property
    def unsent(self) -> int:
        """Bytes that the kernel has not taken."""
        return self._transport.get_write_buffer_size()

    def pause(self) -> None:
        """Read no more for now. Idempotent."""
        if not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on. Idempotent."""
        if self._paused and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    def cut(self) -> None:
        """Close at once, without a word to the receiver. Idempotent."""
        self._receiver = None
        self._transport.abort()

    @property
    def is_open(self) -> bool:
        return not self._transport.is_closing()

    @property
    def is_silent(self) -> bool:
        """Open, with nothing to read: what came unasked, or a goodbye, may still be with the kernel."""
        if not self.is_open:
            return False
        poll = select.poll()  # one that is kept is another third of a kilobyte of each connection
        poll.register(self._descriptor, select.POLLIN)
        return not poll.poll(0)

    # --- the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._descriptor = transport.get_extra_info("socket").fileno()

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def data_received(self, data: bytes) -> None:
        receiver = self._receiver
        if receiver is None:
            self.cut()
            return
        in_head = not self._status
        if in_head:
            self._heads += data
        refused = False
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            refused = True
        if in_head and self._status and not self._open(receiver):
            self._fail(receiver, "protocol")
            return
        parts = self._parts
        if parts:
            self._beside = 0
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            receiver.received(body)
        else:
            self._beside += len(data)
            refused = refused or self._beside > MAX_HEAD
        if (self._whole or refused) and self._receiver is receiver:
            if self._whole:
                self._end(receiver, reusable=self._is_1_1 and self._keep_alive and not refused)
            else:
                self._fail(receiver, "protocol")

    def _open(self, receiver: Receiver) -> bool:
        """Hand on the head, which is in. False: it is none that we can go by."""
        start = 0
        for _ in range(self._interim):
            start = self._heads.find(b"\r\n\r\n", start) + 4
        head = self._heads[start : self._heads.find(b"\r\n\r\n", start)]
        self._heads = b""
        # The parser lets other versions pass, and empty lines before the head.
        if not head.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")):
            return False
        if len(head) > MAX_HEAD or head.count(b"\r\n") > MAX_HEADERS:
            return False
        opened = Head(self._status, head)
        # RFC 9112 6.3. The parser has refused a length beside a coding.
        if not opened.count(b"\r\ncontent-length:"):
            coding = opened.get(b"\r\ntransfer-encoding:").lower()
            if coding not in ("", "chunked") or opened.count(b"\r\ntransfer-encoding:") > 1:
                return False
            self._until_close = not coding and self._status not in (204, 304)
        self._is_1_1 = head.startswith(b"HTTP/1.1")
        receiver.opened(opened)
        return True

    def eof_received(self) -> None:
        receiver = self._receiver
        if receiver is not None and self._until_close and _is_goodbye(self._transport):
            self._end(receiver, reusable=False)
        # In any other state `connection_lost` follows, and says what is missing.

    def connection_lost(self, error: Exception | None) -> None:
        self._lost(self)
        self._wake()
        receiver = self._receiver
        if receiver is None:
            return
        if not self._status:
            self._fail(receiver, "reset" if self._heads else "unanswered")
        else:
            self._fail(receiver, "reset" if isinstance(error, OSError) else "truncated")

    def _end(self, receiver: Receiver, *, reusable: bool) -> None:
        self._receiver = None
        # An answer to half a request: what is left of it would be read as the next one's beginning.
        half = self._sending or self._transport.get_write_buffer_size()
        if reusable and not half and not self._transport.is_closing():
            self.resume()
            self._free(self)
        else:
            self._transport.abort()
        receiver.ended()

    def _fail(self, receiver: Receiver, fault: Fault) -> None:
        self.cut()
        receiver.failed(fault)

    # --- the parser. By itself it refuses obs-fold, bare LF, control characters, two lengths or one that is no number,
    # a length beside chunks, a switch to another protocol (101), and a status line that is none.

    def on_message_begin(self) -> None:
        if self._whole:
            raise _Refused("bytes after the end")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 100:
            raise _Refused("no status of an answer")
        if status < 200:
            self._interim += 1
        else:
            self._status = status
            # From here on a length is a trailer's, and says nothing of the framing: RFC 9110 6.5.1.
            self._parser.set_dangerous_leniencies(lenient_chunked_length=True)

    def on_message_complete(self) -> None:
        if self._status:
            self._whole = True
            self._keep_alive = self._parser.should_keep_alive()


def _is_goodbye(transport: asyncio.Transport) -> bool:
    """Whether it was the provider that ended the connection: anybody on the way can end TCP, but not sign it for TLS.

    RFC 8446 6.1. asyncio's own loop calls `eof_received` for both; a read knows whether a close_notify came.
    """
    secured = transport.get_extra_info("ssl_object")
    if secured is None:
        return True
    try:
        return not secured.read(1)
    except ssl.SSLError:
        return False

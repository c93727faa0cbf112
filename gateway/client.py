"""The client's side of one exchange: what is sent to it, and what the pulse must know of it."""

import asyncio
import fcntl
import sys
import termios
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import monotonic
from typing import cast

from aiohttp import HttpVersion11, hdrs, web

from gateway.connection import ENDS, STAYS, Connection, head
from gateway.deadline import Deadline
from gateway.exchange import Exchange
from gateway.protocol.errors import GatewayError, UpstreamTimeout, UpstreamTooLong
from gateway.protocol.sse import PING
from gateway.settings import Settings
from gateway.upstream import Answer

PIECE = 1 << 18  # bytes of a whole answer written at a time: a client that reads makes progress from one to the next
# Bytes of a JSON answer. Every SDK says that it takes gzip, and a usual answer of 1 to 4 KB would then cost half as
# much CPU again, for a packet or two less.
COMPRESS_FROM = 1 << 13
COMPRESS_HERE = 1 << 16  # bytes that take the loop under a millisecond; more are compressed in a thread

_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # nginx would hold the stream back
}
_CHUNKED_STREAM = {**_STREAM, "Transfer-Encoding": "chunked"}
_JSON = {"Content-Type": "application/json; charset=utf-8", "Vary": "Accept-Encoding"}
_PACKED_JSON = {**_JSON, "Content-Encoding": "gzip"}


class Client:
    """Its headers are held back until there is a byte to send.

    Two may write on a stream: the relay, and the pulse for a heartbeat. Both write whole events at once, so their
    events never mix.
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "_draining",
        "_exchange",
        "_keep_alive",
        "_outlived",
        "_request",
        "_stream",
        "_unread",
        "_writing_since",
        "answer",
        "closed",
        "deadline",
        "interrupted",
        "left",
        "on_flow",
        "on_interrupt",
        "prepared",
        "reading_since",
        "sent",
        "stalled",
    )

    def __init__(
        self,
        request: web.Request,
        exchange: Exchange,
        *,
        draining: Callable[[], bool],
        outlived: bool = False,
        stream: bool | None = None,  # None: as it was asked for
    ) -> None:
        if stream is None:
            assert exchange.asked is not None
            stream = exchange.asked.stream
        self._request = request
        self._connection = cast(Connection, request.protocol)
        self._exchange = exchange
        self._stream = stream
        # A client of HTTP/1.0 knows no chunks: the end of its stream is that of the connection, RFC 9112 6.3.
        self._chunked = self._stream and request.version >= HttpVersion11
        self._draining = draining  # its connection is not to be used again
        self._outlived = outlived  # its provider is read on when it leaves
        self._keep_alive = False  # known once the status line is out
        self.answer: Answer | None = None  # relay: a stream's, while it is read
        self.deadline: Deadline | None = None  # relay: while it waits for anything else of the provider's
        self.interrupted: GatewayError | None = None  # pulse: why it has to end
        self.prepared = False  # the status line is out: what goes wrong from now on is an event
        self.closed = False  # nothing more is sent
        self.left = False  # it is gone, and its provider is read on; what is sent goes nowhere
        self.stalled = False  # pulse: dropped because it stopped reading
        self.on_flow: Callable[[], None] | None = None  # stream: called when `blocked` has changed
        self.on_interrupt: Callable[[], None] | None = None  # recording: called when it is, while none of these waits
        self.reading_since = 0.0  # stream: waiting for the provider's next bytes, seconds, monotonic; 0: not waiting
        self._writing_since = 0.0  # waiting for the client, or for its next step
        self._unread = 0  # bytes that the client had not taken at the last look
        self.sent = monotonic()  # stream: when something was last sent, seconds, monotonic

    def write(self, data: bytes) -> None:
        """Events of a stream, at once. Nothing happens when it is gone: its exchange is cancelled, or outlives it."""
        framed = b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data
        transport = self._connection.transport
        if not self.prepared:
            framed = b"" if self.left else self._stream_head() + framed
        if transport is not None and not self.left and not transport.is_closing():
            transport.write(framed)

    def write_pieces(self, pieces: Sequence[bytes]) -> None:
        """As `write` of each, in one."""
        framed = b"".join([b"%x\r\n%b\r\n" % (len(data), data) for data in pieces] if self._chunked else pieces)
        if not self.prepared:
            framed = self._stream_head() + framed
        self._write(framed)

    def _write(self, data: bytes | memoryview) -> None:
        """As it is, of what may be read on when the client has left."""
        transport = self._connection.transport
        if transport is not None and not self.left and not transport.is_closing():
            transport.write(data)

    def _stream_head(self) -> bytes:
        return self._head(_CHUNKED_STREAM if self._chunked else _STREAM)

    def _head(self, headers: Mapping[str, str]) -> bytes:
        known_length = self._chunked or not self._stream
        self._keep_alive = self._request.keep_alive and known_length and not self._draining()
        headers = {**headers, **self._exchange.response_headers()}
        made = head(self._request, headers, keep_alive=self._keep_alive)
        self.prepared = self._exchange.prepared = True
        self._request.writer.output_size = len(made)  # an answer has begun: `Connection.handle_error` asks for it
        return made

    async def drain(self) -> None:
        """Waits while it does not read. Raises ConnectionError when it is gone, unless it is outlived."""
        if self.left:
            return
        try:
            if self._connection.transport is None:
                raise ConnectionResetError("the client is gone")
            if self._connection.blocked:
                await self._request.writer.drain()
        except ConnectionError:
            if not self._outlived:
                raise
            self.leave()

    @property
    def blocked(self) -> bool:
        """Its buffer is full, because it does not read: nothing should be written now."""
        return self._connection.blocked and not self.left

    @property
    def behind(self) -> bool:
        """Who pays has left, or has not yet all that there is. recording: others go on without it."""
        return False

    def _flow(self) -> None:
        self._writing_since = monotonic() if self.blocked else 0.0
        if self.on_flow is not None:
            self.on_flow()

    @property
    def request_id(self) -> str:
        return self._exchange.id

    @property
    def key_id(self) -> str:
        return self._exchange.principal.key_id if self._exchange.principal is not None else ""

    def leave(self) -> None:
        """It is gone: the exchange goes on without it."""
        self.left = self.closed = True
        self._flow()

    def attach(self) -> None:
        """The connection is its own until `detach`; an earlier answer on it may not have been read yet."""
        self._connection.on_flow = self._flow
        self._flow()

    def detach(self) -> None:
        self.closed = True
        self._connection.on_flow = None

    async def send_whole(self, body: bytes, before_last: Callable[[], Awaitable[None]]) -> web.StreamResponse:
        """A JSON answer that is all there, and its end; `before_last` is awaited before its last piece."""
        if self.left:
            await before_last()
            return await self.end()
        body, headers = await encode_json(self._request, body)
        headers = {**headers, "Content-Length": str(len(body))}
        if len(body) <= PIECE:
            await before_last()
            self._write(self._head(headers) + body)
            return await self.end()
        self._write(self._head(headers))
        view = memoryview(body)
        for start in range(0, len(body), PIECE):
            if start + PIECE >= len(body):
                await before_last()
            self._write(view[start : start + PIECE])
            await self.drain()
        return await self.end()

    async def end(self) -> web.StreamResponse:
        if self.left:
            raise ConnectionResetError("the client is gone")
        if self._chunked:
            self._write(b"0\r\n\r\n")
        self.closed = True
        await self.drain()
        return STAYS if self._keep_alive else ENDS

    def check(self, now: float, settings: Settings) -> None:
        """Enforces the limits, and sends a heartbeat when it is due."""
        if self.answer is not None and now - self._exchange.started > settings.gateway_max_stream:
            words = f"the provider's answer did not end within {settings.gateway_max_stream:g} s"
            self.answer.interrupt(UpstreamTooLong(words))
        if self._writing_since:
            self._check_reader(now, settings.gateway_write_timeout)
            return
        if self.deadline is not None and now > self.deadline.at:
            self.deadline.expire()
        elif self.answer is not None and self.reading_since:
            self._check_provider(self.answer, now - self.reading_since, settings.gateway_idle_timeout)
        if self._stream and not self.closed and now - self.sent >= settings.gateway_heartbeat:
            self.write(PING)
            self.sent = now

    def _check_reader(self, now: float, limit: float) -> None:
        transport = self._request.transport
        if transport is None:
            return
        waiting = transport.get_write_buffer_size() + _unacknowledged(transport)
        if waiting < self._unread:
            self._writing_since = now  # it reads, however slowly
        self._unread = waiting
        if now - self._writing_since > limit:
            self.stalled = True
            transport.abort()

    def _check_provider(self, answer: Answer, silent: float, limit: float) -> None:
        if silent > limit:
            words = f"the provider was silent for {limit:g} s in the middle of its answer"
            answer.interrupt(UpstreamTimeout(words, kind="timeout_idle"))

    def interrupt(self, error: GatewayError) -> None:
        """Let the relay end with this error, whatever it is waiting for."""
        self.interrupted = error
        if self.answer is not None:
            self.answer.interrupt(error)
        elif self.deadline is not None:
            self.deadline.expire()
        elif self.on_interrupt is not None:
            self.on_interrupt()


def _unacknowledged(transport: asyncio.Transport) -> int:
    """Bytes in the kernel's queue, tcp(7) SIOCOUTQ. By ours alone a slow reader moves in steps of a megabyte."""
    connection = transport.get_extra_info("socket")
    try:
        return int.from_bytes(fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except (OSError, AttributeError):  # gone, or a system without it
        return 0


_NOTHING = ("q=0", "q=0.", "q=0.0", "q=0.00", "q=0.000")  # all that RFC 9110 12.4.2 lets say so


async def encode_json(request: web.BaseRequest, body: bytes) -> tuple[bytes, Mapping[str, str]]:
    """A JSON answer's bytes and headers: compressed when it is worth it and the client takes it."""
    if len(body) < COMPRESS_FROM or not _takes_gzip(request.headers.getall(hdrs.ACCEPT_ENCODING, ())):
        return body, _JSON
    packed = _gzip(body) if len(body) <= COMPRESS_HERE else await asyncio.to_thread(_gzip, body)
    return packed, _PACKED_JSON


def _gzip(body: bytes) -> bytes:
    packer = zlib.compressobj(level=1, wbits=16 + zlib.MAX_WBITS)
    return packer.compress(body) + packer.flush()


def _takes_gzip(values: "tuple[str, ...] | list[str]") -> bool:
    """RFC 9110 12.5.3: named, and not with a weight of nothing."""
    for item in ",".join(values).lower().split(","):
        name, _, weight = item.partition(";")
        if name.strip() == "gzip":
            return weight.replace(" ", "") not in _NOTHING
    return False

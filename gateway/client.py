"""The client's side of one exchange: what is sent to it, and what the pulse must know of it."""

import asyncio
import fcntl
import sys
import termios
import zlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from time import monotonic

from aiohttp import hdrs, web

from gateway.protocol.errors import GatewayError, UpstreamTimeout, UpstreamTruncated
from gateway.protocol.sse import PING
from gateway.settings import Settings
from gateway.upstream import Answer

PIECE = 1 << 18  # bytes of a whole answer written at a time: a client that reads makes progress from one to the next
COMPRESS_FROM = 1024  # bytes of a JSON answer; below it gzip saves nothing
COMPRESS_HERE = 1 << 16  # bytes that take the loop under a millisecond; more are compressed in a thread

_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # nginx would hold the stream back
}


class Client:
    """Its headers are held back until there is a byte to send.

    Two may send on a stream: the relay, and the pulse for a heartbeat. Both send whole events, and neither is
    interrupted between the first and the last byte of one, so their events never mix.
    """

    def __init__(self, request: web.Request, *, stream: bool, outlived: bool = False) -> None:
        self._request = request
        self._stream = stream
        self._outlived = outlived  # its provider is read on when it leaves
        self._response = web.StreamResponse(headers=_STREAM if stream else None)
        self.answer: Answer | None = None  # relay: a stream's, once the provider's headers are in
        self.deadline: asyncio.Timeout | None = None  # relay: while it waits for anything else of the provider's
        self.interrupted: GatewayError | None = None  # pulse: why it has to end
        self.closed = False  # relay: nothing more is sent
        self.left = False  # it is gone, and its provider is read on; what is sent goes nowhere
        self.stalled = False  # pulse: dropped because it stopped reading
        self.reading_since = 0.0  # relay: waiting for the stream's next bytes, seconds, monotonic; 0: not waiting
        self._writing_since = 0.0  # waiting for the client, or for its next step
        self._unread = 0  # bytes that the client had not taken at the last look
        self._sent = monotonic()

    @property
    def prepared(self) -> bool:
        """The status line is out (or about to be): what goes wrong from now on is an event."""
        return self._response.prepared

    async def send(self, data: bytes | memoryview) -> None:
        """Raises ConnectionError when the client is gone, unless it is outlived; waits while it does not read."""
        if self.left:
            return
        try:
            if not self._response.prepared:
                await self._response.prepare(self._request)
            self._sent = self._writing_since = monotonic()
            await self._response.write(data)
        except ConnectionError:
            if not self._outlived:
                raise
            self.leave()
        self._writing_since = 0.0

    def leave(self) -> None:
        """It is gone: the exchange goes on without it."""
        self.left = self.closed = True
        self._writing_since = 0.0

    async def send_whole(self, body: bytes, before_last: Callable[[], Awaitable[None]]) -> web.StreamResponse:
        """A JSON answer that is all there, and its end; `before_last` is awaited before its last piece."""
        body, headers = await encode_json(self._request, body)
        self._response.headers.update(headers)
        self._response.content_length = len(body)
        view = memoryview(body)
        for start in range(0, len(body), PIECE):
            if start + PIECE >= len(body):
                await before_last()
            await self.send(view[start : start + PIECE])
        return await self.end()

    async def end(self) -> web.StreamResponse:
        if self.left:
            raise ConnectionResetError("the client is gone")
        self.closed = True
        self._writing_since = monotonic()
        await self._response.write_eof()
        self._writing_since = 0.0
        return self._response

    async def ping(self) -> None:
        if self.closed or self._writing_since:
            return
        with suppress(ConnectionError):  # the relay is told by its own write, or by its cancellation
            await self.send(PING)

    def check(self, now: float, settings: Settings) -> bool:
        """Enforce the limits; true when a heartbeat is due."""
        if self._writing_since:
            self._check_reader(now, settings.gateway_write_timeout)
            return False
        if self.answer is not None and self.reading_since:
            self._check_provider(self.answer, now - self.reading_since, settings.gateway_idle_timeout)
        return self._stream and not self.closed and now - self._sent >= settings.gateway_heartbeat

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
        if answer.broken:
            answer.interrupt(UpstreamTruncated("the provider's answer broke off", kind="protocol"))
        elif silent > limit:
            words = f"the provider was silent for {limit:g} s in the middle of its answer"
            answer.interrupt(UpstreamTimeout(words, kind="timeout_idle"))

    def interrupt(self, error: GatewayError) -> None:
        """Let the relay end with this error, whatever it is waiting for."""
        self.interrupted = error
        if self.answer is not None:
            self.answer.interrupt(error)
        elif self.deadline is not None:
            self.deadline.reschedule(0)


def _unacknowledged(transport: asyncio.Transport) -> int:
    """Bytes in the kernel's queue, tcp(7) SIOCOUTQ. By ours alone a slow reader moves in steps of a megabyte."""
    connection = transport.get_extra_info("socket")
    try:
        return int.from_bytes(fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except (OSError, AttributeError):  # gone, or a system without it
        return 0


async def encode_json(request: web.BaseRequest, body: bytes) -> tuple[bytes, Mapping[str, str]]:
    """A JSON answer's bytes and headers: compressed when it is worth it and the client takes it."""
    headers = {"Content-Type": "application/json; charset=utf-8", "Vary": "Accept-Encoding"}
    if len(body) < COMPRESS_FROM or not _takes_gzip(request.headers.getall(hdrs.ACCEPT_ENCODING, ())):
        return body, headers
    packed = _gzip(body) if len(body) <= COMPRESS_HERE else await asyncio.to_thread(_gzip, body)
    return packed, {**headers, "Content-Encoding": "gzip"}


def _gzip(body: bytes) -> bytes:
    packer = zlib.compressobj(level=1, wbits=16 + zlib.MAX_WBITS)
    return packer.compress(body) + packer.flush()


def _takes_gzip(values: "tuple[str, ...] | list[str]") -> bool:
    """RFC 9110 12.5.3: named, and not with a weight of nothing."""
    for item in ",".join(values).lower().split(","):
        name, _, weight = item.partition(";")
        if name.strip() == "gzip":
            return weight.replace(" ", "").rstrip("0").rstrip(".") != "q="
    return False

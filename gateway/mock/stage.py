"""Playing an answer on a connection: when each piece is written, and how the connection ends."""

import asyncio
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from gateway.mock.log import Received
from gateway.mock.plays import Play

HIGH_WATER = 64 << 10  # bytes that wait for a slow reader before its stream pauses, as in asyncio's own transports
# What the other side has not read when a reset comes is lost to most clients, so it gets this long to read it.
READING = 0.02  # seconds
GARBAGE = b"\x16\x03\x01\x00\x02 this is not HTTP\r\n\r\n"
UNANSWERED = frozenset({"close_before_headers", "reset_before_headers", "garbage"})
_KEPT = frozenset({"keep", "reset_after_reply", "reset_on_reuse"})  # endings that come after a whole body


@dataclass(frozen=True, slots=True)
class Performance:
    """One answer to one request. Whatever it awaits ends at once when the client leaves: its task is cancelled."""

    request: web.Request
    received: Received
    play: Play
    pace: float  # seconds between frames
    pause: float  # seconds between the headers and the first frame
    split: int  # bytes a write; 0: each frame whole

    async def run(self, headers: dict[str, str]) -> web.StreamResponse:
        if self._at_once():
            return await self._write_whole(headers)
        response = web.StreamResponse(status=self.play.status, headers=self._headers(headers))
        if self.play.length is not None:
            response.content_length = self.play.length
        else:
            response.enable_chunked_encoding()
        self.received.phase = "first_token"
        await response.prepare(self.request)
        await asyncio.sleep(self.pause)
        self.received.phase = "stream"
        if self.play.ending in _KEPT:
            await self._write_frames(response, self.play.frames[:-1], self.play.chunks[:-1])
            # The last frame and the end of the body leave together, so that a client which goes then has had all.
            await self._write_last(response, self.play.frames[-1])
        else:
            await self._write_frames(response, self.play.frames, self.play.chunks)
        await self._end(response)
        return response

    def _headers(self, headers: dict[str, str]) -> dict[str, str]:
        own = {"Content-Type": self.play.content_type}
        if self.play.encoding:
            own["Content-Encoding"] = self.play.encoding
        if self.play.location:
            own["Location"] = self.play.location
        return headers | own

    def _at_once(self) -> bool:
        timed = self.pause or self.split or (self.pace and len(self.play.frames) > 1)
        return self.play.ending in _KEPT and not timed

    async def _write_whole(self, headers: dict[str, str]) -> web.StreamResponse:
        """Headers, body and end in one write."""
        body = b"".join(self.play.frames)
        response = web.Response(status=self.play.status, headers=self._headers(headers), body=body)
        if self.play.length is None:
            response.enable_chunked_encoding()
        self.received.phase = "stream"
        self.received.sent = len(body)
        await response.prepare(self.request)
        await response.write_eof()
        await self._end(response)
        return response

    async def _write_frames(
        self, response: web.StreamResponse, frames: Sequence[bytes], chunks: Sequence[bytes]
    ) -> None:
        """Returns at the beat after the last of them."""
        if self.split:
            await self._write_split(response, frames)
        elif not self.pace or not chunks:
            await self._write(response, b"".join(frames))
        else:
            await Playback(transport_of(self.request), chunks, self.pace, self.received).run()

    async def _write_split(self, response: web.StreamResponse, frames: Sequence[bytes]) -> None:
        clock = Clock(self.pace)
        for number, frame in enumerate(frames, 1):
            for at in range(0, len(frame), self.split):
                await self._write(response, frame[at : at + self.split])
                await asyncio.sleep(0)  # the piece leaves before the next one comes
            await clock.beat(number)

    async def _write_last(self, response: web.StreamResponse, frame: bytes) -> None:
        if self.split:
            await self._write_split(response, [frame])
            frame = b""
        self.received.sent += len(frame)
        await response.write_eof(frame)

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        if data:
            await response.write(data)
            self.received.sent += len(data)

    async def _end(self, response: web.StreamResponse) -> None:
        transport = transport_of(self.request)
        match self.play.ending:
            case "stall":
                self.received.phase = "stall"
                await asyncio.get_running_loop().create_future()
            case "endless":
                await self._write_for_ever(response)
            case "truncate":
                await flush(transport)
                transport.close()
            case "reset" | "reset_after_reply":
                await flush(transport)
                await asyncio.sleep(READING)
                reset(transport)
        self.received.phase, self.received.finished = "ended", True

    async def _write_for_ever(self, response: web.StreamResponse) -> None:
        clock, number = Clock(self.pace), 0
        while True:
            await self._write(response, self.play.repeated)
            number += 1
            await clock.beat(number)
            await asyncio.sleep(0)


class Clock:
    """Beats at an absolute schedule: a late one does not delay those after it."""

    def __init__(self, pace: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._start = self._loop.time()
        self._pace = pace  # seconds

    async def beat(self, number: int) -> None:
        wait = self._start + number * self._pace - self._loop.time()
        if wait > 0:
            await asyncio.sleep(wait)


class Playback:
    """Writes HTTP chunks to a connection, one a beat, without waking a task for any of them."""

    def __init__(
        self, transport: asyncio.WriteTransport, chunks: Sequence[bytes], pace: float, received: Received
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._chunks = chunks
        self._pace = pace  # seconds
        self._received = received
        self._start = self._loop.time()
        self._next = 0
        self._timer: asyncio.TimerHandle | None = None
        self._done: asyncio.Future[None] = self._loop.create_future()

    async def run(self) -> None:
        """Returns at the beat after the last chunk."""
        try:
            self._tick()
            await self._done
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _tick(self) -> None:
        if self._done.done() or self._transport.is_closing():
            return  # the client has left in this turn of the loop, and `run` is being cancelled
        if self._next == len(self._chunks):
            self._done.set_result(None)
        elif self._transport.get_write_buffer_size() > HIGH_WATER:
            self._timer = self._loop.call_at(self._loop.time() + self._pace, self._tick)
        else:
            self._write_due()
            self._timer = self._loop.call_at(self._start + self._next * self._pace, self._tick)

    def _write_due(self) -> None:
        """The next chunk, and with it those that a slow reader or a busy loop has held up."""
        due = int((self._loop.time() - self._start) / self._pace) + 1
        due = min(max(due, self._next + 1), len(self._chunks))
        data = b"".join(self._chunks[self._next : due])
        self._transport.write(data)
        self._received.sent += len(data)
        self._next = due


def transport_of(request: web.Request) -> asyncio.Transport:
    """The client's connection. Raises ConnectionResetError when there is none any more."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client has left")
    return transport


def break_off(request: web.Request, received: Received, fault: str) -> web.StreamResponse:
    """End the connection without an answer. The response that is returned is never sent."""
    transport = transport_of(request)
    if fault == "reset_before_headers":
        reset(transport)
    else:
        if fault == "garbage":
            transport.write(GARBAGE)
        transport.close()
    received.phase, received.finished = "ended", True
    return web.Response()


async def flush(transport: asyncio.WriteTransport) -> None:
    """Wait until the kernel has all that was written."""
    while transport.get_write_buffer_size():  # noqa: ASYNC110 (a transport tells its protocol, and nobody else)
        await asyncio.sleep(0.001)


def reset(transport: asyncio.WriteTransport) -> None:
    """End the connection with a RST instead of a FIN: what SO_LINGER with a time of zero is for (socket(7))."""
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()

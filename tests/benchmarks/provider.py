"""A provider that costs next to nothing: `python -m tests.benchmarks.provider`; it prints its port.

It answers OpenAI's, Anthropic's and Ollama's chat with bytes that were made before, knowing of a request only what its
model's name says (see wire.py). One timer serves all streams: a wheel of milliseconds. An event is stamped and handed
to the kernel at once, so that the time in it is the time at which it was sent.
"""

import asyncio
import gc
import os
import re
from time import monotonic_ns
from typing import cast

import uvloop

from tests.benchmarks.wire import DIALECTS, MODEL, STREAM, Dialect

TICK = 1_000_000  # nanoseconds; the resolution of libuv's timers
SLOTS = 1 << 12  # of the wheel, a tick each: the longest pace
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)


def chunked(data: bytes) -> bytes:
    """One chunk (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Script:
    """The prepared bytes of one dialect."""

    def __init__(self, dialect: Dialect) -> None:
        before, after = dialect.delta
        whole = chunked(before + b"#" * 18 + after)
        start = whole.index(b"#")
        self.before, self.after = whole[:start], whole[start + 18 :]
        self.head = _headers(dialect.stream_type, "Transfer-Encoding: chunked")
        if dialect.head:
            self.head += chunked(dialect.head)
        self.tail = chunked(dialect.tail) + b"0\r\n\r\n"
        self.reply = _whole(dialect.reply)


def _headers(content_type: str, length: str) -> bytes:
    names = f"HTTP/1.1 200 OK\r\nServer: provider\r\nContent-Type: {content_type}\r\nx-request-id: req_0123456789\r\n"
    return f"{names}{length}\r\n\r\n".encode()


def _whole(body: bytes) -> bytes:
    return _headers("application/json", f"Content-Length: {len(body)}") + body


class Wheel:
    """All open streams, each in the slot of the tick at which its next event is due."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._slots: list[list[Connection]] = [[] for _ in range(SLOTS)]
        self._tick = 0  # the last one that was served
        self._streams = 0

    def add(self, stream: "Connection") -> None:
        if not self._streams:
            self._tick = monotonic_ns() // TICK
            self._loop.call_later(0.001, self._turn)
        self._streams += 1
        now = monotonic_ns() // TICK
        self._slots[(now + stream.pace) % SLOTS].append(stream)

    def _turn(self) -> None:
        now = monotonic_ns() // TICK
        slots = self._slots
        while self._tick < now:
            self._tick += 1
            due = slots[self._tick % SLOTS]
            if due:
                slots[self._tick % SLOTS] = []
                for stream in due:
                    if stream.play():
                        slots[(self._tick + stream.pace) % SLOTS].append(stream)
                    else:
                        self._streams -= 1
        if self._streams:
            self._loop.call_later(0.001, self._turn)


class Connection(asyncio.Protocol):
    """One client: a request, its answer, and the next request."""

    def __init__(self, scripts: dict[bytes, Script], wheel: Wheel) -> None:
        self._scripts = scripts
        self._wheel = wheel
        self._received = b""
        self._gone = False
        self.pace = 0  # milliseconds between two deltas
        self._left = 0  # deltas still to be sent

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have all of asyncio.Transport's methods, but are no instances of it.
        self._transport = cast(asyncio.Transport, transport)
        self._fd: int = transport.get_extra_info("socket").fileno()

    def connection_lost(self, error: Exception | None) -> None:
        self._gone = True

    def eof_received(self) -> None:
        self._gone = True

    def data_received(self, data: bytes) -> None:
        self._received = received = self._received + data if self._received else data
        end = received.find(b"\r\n\r\n")
        if end < 0:
            return
        if length := _LENGTH.search(received, 0, end):
            if len(received) < end + 4 + int(length[1]):
                return
        elif _CHUNKED.search(received, 0, end) and not received.endswith(b"\r\n0\r\n\r\n"):
            return
        self._received = b""
        self._answer(received)

    def _answer(self, request: bytes) -> None:
        path = request[: request.index(b" HTTP/")].partition(b" ")[2]
        script = self._scripts.get(path)
        if script is None:
            self._send(DOCUMENTS.get(path, NOT_FOUND))
            return
        asked = MODEL.search(request)
        if asked is None or not STREAM.search(request):
            self._send(script.reply)
            return
        self._script = script
        self._left, self.pace = int(asked[1]), int(asked[2])
        self._send(script.head)
        if self.play():
            self._wheel.add(self)

    def play(self) -> bool:
        """Send what is due. False: there is nothing after it."""
        script = self._script
        if self._gone:
            return False
        if not self._left:
            self._send(script.tail)
            return False
        self._left -= 1
        self._send(b"%b%018d%b" % (script.before, monotonic_ns(), script.after))
        return True

    def _send(self, data: bytes) -> None:
        # Past the transport, which would hold it until the end of the loop's turn: the stamp would be older than the
        # sending. Only what the kernel does not take is left to the transport, and what comes while it has any.
        if not self._transport.get_write_buffer_size():
            try:
                sent = os.write(self._fd, data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._gone = True
                return
            if sent == len(data):
                return
            data = data[sent:]
        self._transport.write(data)


DOCUMENTS = {  # Anthropic's list has OpenAI's path, and OpenAI's is read as Anthropic's as well
    **{dialect.models_path.encode(): _whole(dialect.models) for dialect in reversed(list(DIALECTS.values()))},
    b"/health": _whole(b"{}"),  # of an engine, for routers that ask before they send it anything
}
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


async def serve() -> None:
    loop = asyncio.get_running_loop()
    scripts = {dialect.path.encode(): Script(dialect) for dialect in DIALECTS.values()}
    wheel = Wheel(loop)
    server = await loop.create_server(lambda: Connection(scripts, wheel), "127.0.0.1", 0, backlog=8192)
    print(server.sockets[0].getsockname()[1], flush=True)
    gc.freeze()
    gc.disable()  # nothing here is a cycle, and a pause of ours would be taken for one of the subject's
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())

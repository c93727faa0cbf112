"""A provider's answer: who reads its body, how fast, and what broke it.

Rule 1: what came is given in the order in which it came: the body, then its end or what broke it, once.
Rule 2: while nobody takes it, no more than MAX_HELD and a read of the socket is held; the provider waits.
Rule 3: a compressed body is inflated when it is taken, in steps: a bomb costs what its reader takes of it.
"""

import asyncio
import zlib
from time import time
from typing import Protocol

from gateway.http1 import Connection, Fault, Head
from gateway.inflate import Inflater
from gateway.protocol.errors import GatewayError, UpstreamBadBody, UpstreamError, UpstreamTruncated
from gateway.protocol.waits import exhausted_for, retry_after

MAX_HELD = 1 << 18  # bytes
DRAIN = 0.1  # seconds from a stream's last word to the end of its body; a provider that takes longer is cut off


class Sink(Protocol):
    """Who follows an answer's body."""

    def received(self, data: bytes) -> None:
        """Once for each read of the socket, with all that was in it; never b""."""
        ...

    def ended(self) -> None:
        """The body is whole."""
        ...

    def failed(self, error: GatewayError) -> None:
        """It broke, or was interrupted."""
        ...


class Broken(Exception):
    """The connection ended, or what came was not HTTP, before the answer's head was in."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.fault = fault


class Answer:
    """Read by one reader or followed by one sink; ended by whoever opened it: `finish` or `close`, the first counts."""

    __slots__ = (
        "_broken",
        "_connection",
        "_drain",
        "_error",
        "_flowing",
        "_head",
        "_held",
        "_held_size",
        "_inflater",
        "_over",
        "_paused",
        "_provider",
        "_sink",
        "_waiter",
        "_whole",
        "status",
    )

    def __init__(self, connection: Connection, provider: str) -> None:
        self.status = 0
        self._provider = provider
        self._head: Head | None = None
        self._connection: Connection | None = connection  # None: it is not ours any more
        self._waiter: asyncio.Future[None] | None = None  # `head` or `read` waits for something to happen
        self._sink: Sink | None = None
        self._paused = False  # by whoever reads or follows
        self._flowing = False  # the sink is being given something
        self._held: list[bytes] = []  # came, and was not taken
        self._held_size = 0  # bytes
        self._inflater: Inflater | None = None
        self._broken: Fault | None = None  # before the head was in
        self._error: GatewayError | None = None  # what comes after what is held
        self._whole = False  # or the end does
        self._over = False  # the end was given, or nobody wants it
        self._drain: asyncio.TimerHandle | None = None

    # --- its head

    async def head(self) -> None:
        """Wait for it. Raises Broken, and UpstreamBadBody for a coding that cannot be undone."""
        while self._head is None and self._broken is None:
            await self._stirred()
        if self._broken is not None:
            raise Broken(self._broken)
        coding = self._header(b"\r\ncontent-encoding:").lower()
        if not coding:
            return
        if coding in ("gzip", "x-gzip", "deflate"):
            self._inflater = Inflater(coding)
        elif coding != "identity":
            raise UpstreamBadBody(f"{self._provider} compressed its answer in a way that was not asked for")

    def _header(self, field: bytes) -> str:
        return "" if self._head is None else self._head.get(field)

    def field(self, name: str) -> str:
        """A header that may be passed on; "" when there is none, or it is not printable ASCII."""
        value = self._header(b"\r\n%b:" % name.lower().encode())
        return value if value.isascii() and value.isprintable() else ""

    @property
    def length(self) -> int | None:
        """Bytes of the body, as `read` gives them; None: the provider does not say."""
        declared = self._header(b"\r\ncontent-length:")
        return int(declared) if declared and self._inflater is None else None

    @property
    def content_type(self) -> str:
        """Without parameters, in lower case."""
        return self._header(b"\r\ncontent-type:").partition(";")[0].strip().lower() or "application/octet-stream"

    @property
    def retry_after(self) -> float | None:
        """Seconds, from `retry-after-ms` or `Retry-After` (seconds or a date, RFC 9110 10.2.3)."""
        return retry_after(self._header(b"\r\nretry-after-ms:"), self._header(b"\r\nretry-after:"), time())

    @property
    def exhausted_for(self) -> float:
        """Seconds until the provider takes more, when it says that nothing is left of one of its limits; else 0.

        It says so on answers that are good, too: the one that used up the rest.
        """
        if self._head is None or not self._head.count(b"ratelimit-"):
            return 0.0
        return exhausted_for(lambda name: self._header(b"\r\n%b:" % name.encode()), time())

    @property
    def request_id(self) -> str:
        """The provider's own id of the request, for its support; empty when it gave none."""
        found = self._header(b"\r\nx-request-id:") or self._header(b"\r\nrequest-id:")
        return found if found.isprintable() and found.isascii() and len(found) <= 128 else ""

    # --- who reads it

    async def read(self) -> bytes:
        """The next bytes as they come, at once; b"" at the end. Raises UpstreamError, or what interrupted it."""
        while not (data := self._next()) and not self._whole:
            await self._stirred()
        return data

    async def body(self, limit: int) -> bytes:
        """All of it. Raises as `read` does, and UpstreamBadBody when it is longer than `limit` bytes."""
        parts, size = [], 0
        while (data := self._next()) or not self._whole:
            if not data:
                await self._stirred()
                continue
            size += len(data)
            if size > limit:
                raise UpstreamBadBody(f"{self._provider} answered with more than {limit} bytes")
            parts.append(data)
        return b"".join(parts)

    def _next(self) -> bytes:
        """What there is; b"" when that is nothing. Raises what comes after it."""
        data = self._take()
        self._read_on()
        if not data and self._error is not None:
            raise self._error
        return data

    def follow(self, sink: Sink) -> None:
        """From now on all goes to `sink` as it comes, beginning here and now with what has come already."""
        if not self._over:
            if self._head is not None:
                self._head = Head(self.status, b"")  # nobody asks it any more, and some have two kilobytes
            self._sink = sink
            self._flow()
            self._read_on()

    def pause(self) -> None:
        """Give nothing and read nothing, until `resume`; an interruption is told all the same."""
        if self._over:
            return
        self._paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        """Give what was held back, and read on."""
        self._paused = False
        self._flow()
        self._read_on()

    def interrupt(self, error: GatewayError) -> None:
        """Let the read that waits, or the next one, raise `error`, or tell the sink; the connection is cut."""
        if self._over:
            return
        self._cut()
        self._drop_held()
        self._inflater = None
        self._error, self._paused = error, False
        self._stir()

    def finish(self) -> None:
        """The last word was read: keep the connection, when its body is at its end within DRAIN."""
        if self._over:
            return
        self._leave()
        if self._connection is not None:
            self._connection.resume()
            self._drain = asyncio.get_running_loop().call_later(DRAIN, self._connection.cut)

    def close(self) -> None:
        """Cut the connection: the provider stops generating."""
        if self._over:
            return
        self._leave()
        self._cut()
        self._error = _broken_off(self._provider, "reset")
        self._wake()

    def _leave(self) -> None:
        self._over, self._sink = True, None
        self._drop_held()

    def _cut(self) -> None:
        if self._connection is not None:
            self._connection.cut()
            self._connection = None

    def _read_on(self) -> None:
        if self._connection is not None and not self._paused:
            self._connection.resume()

    # --- the connection's

    def opened(self, head: Head) -> None:
        self.status, self._head = head.status, head
        self._wake()

    def received(self, data: bytes) -> None:
        if self._sink is not None and not (self._paused or self._inflater):
            self._sink.received(data)
            return
        if self._over:
            return
        self._held.append(data)
        self._held_size += len(data)
        if self._sink is None and self._held_size >= MAX_HELD and self._connection is not None:
            self._connection.pause()
        self._stir()

    def ended(self) -> None:
        self._whole = True
        self._let_go()

    def failed(self, fault: Fault) -> None:
        if self._head is None:
            self._broken = fault
        self._error = _broken_off(self._provider, fault)
        self._let_go()

    def _let_go(self) -> None:
        self._connection = None
        if self._drain is not None:
            self._drain.cancel()
        self._stir()

    # --- from the one to the other

    def _stir(self) -> None:
        """Something happened."""
        if self._sink is not None:
            self._flow()
        else:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _stirred(self) -> asyncio.Future[None]:
        """Something has happened."""
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    def _flow(self) -> None:
        """To the sink, until it pauses or nothing is left. The sink may call anything of ours meanwhile."""
        if self._flowing:
            return
        self._flowing = True
        try:
            while self._sink is not None and not self._paused and self._give(self._sink):
                pass
        finally:
            self._flowing = False

    def _give(self, sink: Sink) -> bool:
        if data := self._take():
            sink.received(data)
        elif self._error is not None:
            self._leave()
            sink.failed(self._error)
        elif self._whole:
            self._leave()
            sink.ended()
        else:
            return False
        return True

    def _take(self) -> bytes:
        """What is held, inflated up to a step; b"" when it is nothing."""
        if self._inflater is not None:
            return self._inflate(self._inflater)
        data = b"".join(self._held)
        self._drop_held()
        return data

    def _drop_held(self) -> None:
        self._held.clear()
        self._held_size = 0

    def _inflate(self, inflater: Inflater) -> bytes:
        try:
            data = inflater.inflate(b"".join(self._held))
            self._drop_held()
            if data or not self._whole:
                return data
            inflater.check_whole()
        except zlib.error:
            self._cut()
            self._drop_held()
            self._error = UpstreamBadBody(f"{self._provider} sent a compressed answer that is broken")
        return b""


def _broken_off(provider: str, fault: Fault) -> UpstreamError:
    """After the head was in."""
    if fault in ("reset", "unanswered"):
        return UpstreamTruncated(f"{provider} reset the connection", kind="reset")
    if fault == "protocol":
        return UpstreamTruncated(f"{provider} broke off its answer with what is not HTTP", kind="protocol")
    return UpstreamTruncated(f"{provider} ended its answer in the middle")

"""One answer for many: what an exchange's client is sent is kept, and goes to all who wait for it.

Rule 1: everybody gets the same bytes in the same pieces; who comes later gets first what was before.
Rule 2: who reads slowly holds up nobody until the provider is LAG bytes ahead of the slowest; who stops is dropped by
its own connection's time limit.
Rule 3: of an answer that is longer than KEPT the beginning is dropped when everybody has it: nobody can join any more.
Of one that can be resumed the end is kept, and all that anybody is sent is a part of it, heartbeats and errors too.
Rule 4: what ends any other is no piece of it: each who waits is told by itself, of itself.
Rule 5: the row of who pays is not written while its client is behind, or when it has left: sharing.py sees to it.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from time import monotonic

from aiohttp import web

from gateway.client import Client
from gateway.exchange import Exchange
from gateway.protocol.errors import GatewayError, KeyEnded, Unavailable

KEPT = 8 << 20  # bytes
LAG = 1 << 20  # bytes
SLACK = 8  # one part in so many may be kept beyond what has to be

# What a client is told of who answered; limits are its own.
_TOLD = ("X-Gateway-Provider", "X-Gateway-Model", "X-Gateway-Attempts", "X-Upstream-Request-Id")


class Recording(Client):
    """What the relay takes for the client of an exchange. It is on no connection.

    `keep`: it can be resumed, and so many bytes of its end are kept; else it has no heartbeats of its own.
    """

    __slots__ = (
        "_begun", "_bound", "_cut", "_dropped", "_held", "_keep", "_listeners", "_size", "error", "on_piece", "over",
        "payer", "pieces", "whole",
    )  # fmt: skip

    def __init__(self, request: web.Request, exchange: Exchange, *, outlived: bool = False, keep: int = 0) -> None:
        super().__init__(request, exchange, draining=lambda: False, outlived=outlived, stream=keep > 0)
        self._begun = monotonic()  # seconds
        self._listeners: set[Listener] = set()
        self._size = 0  # bytes of all pieces
        self._dropped = 0  # pieces that are not kept any more
        self._cut = 0  # bytes of those
        self._keep = keep
        self._bound = keep + keep // SLACK if keep else KEPT  # bytes of all pieces, from which on some are dropped
        self._held = False  # the provider is: `blocked` was true when it was last told
        self.pieces: list[tuple[int, bytes]] = []  # when each came, in milliseconds, and its events
        self.whole: bytes | None = None  # an answer that is not streamed
        self.error: GatewayError | None = None  # in the place of an answer
        self.over = False
        self.payer: Listener | None = None  # sharing: the client of who pays
        self.on_piece: Callable[[int, bytes], None] | None = None  # is told of each, too

    # --- the relay's

    def write(self, data: bytes) -> None:
        if not data:
            return
        self._exchange.prepared = True
        self.prepared = self._keep > 0  # else what goes wrong from now on is no event of ours
        at = round((monotonic() - self._begun) * 1000)
        self.pieces.append((at, data))
        self._size += len(data)
        if self.on_piece is not None:
            self.on_piece(at, data)
        self._tell()
        if self._size > self._bound:
            self._trim()

    async def send_whole(self, body: bytes, before_last: Callable[[], Awaitable[None]]) -> web.StreamResponse:
        self.whole = body
        await before_last()
        self._exchange.prepared = True
        return await self.end()

    async def end(self) -> web.StreamResponse:
        self.closed = True
        self.finish()
        return web.StreamResponse()  # nobody sends it

    async def drain(self) -> None:
        return

    @property
    def blocked(self) -> bool:
        return bool(self._listeners) and min(listener.sent for listener in self._listeners) + LAG < self._size

    def attach(self) -> None:
        pass

    def detach(self) -> None:
        self.closed = True

    # --- those who wait

    @property
    def headers(self) -> Mapping[str, str]:
        """What is known of who answers."""
        return {name: value for name, value in self._exchange.headers.items() if name in _TOLD}

    @property
    def complete(self) -> bool:
        """All is there from the beginning on: somebody may join."""
        return not self._dropped

    @property
    def alone(self) -> bool:
        return not self._listeners

    def join(self, listener: "Listener") -> None:
        self._listeners.add(listener)

    def part(self, listener: "Listener") -> None:
        """One less waits."""
        self._listeners.discard(listener)
        self.flow()

    @property
    def behind(self) -> bool:
        """Of one that can be resumed the row waits for nobody."""
        payer = self.payer
        if payer is None or self._keep:
            return False
        return payer not in self._listeners or self.whole is not None or self.piece(payer.next) is not None

    def read(self) -> None:
        """One has read. Only that one is held up may change: `blocked` looks at all, and each piece is read by all."""
        if self._held:
            self.flow()

    def flow(self) -> None:
        """Something was added, or read, or somebody has left: `blocked` may have changed."""
        if self._held != self.blocked:
            self._held = not self._held
            if self.on_flow is not None:
                self.on_flow()

    def finish(self, error: GatewayError | None = None) -> None:
        """There is no more of it; `error`: in the place of an answer."""
        if self.over:
            return
        if error is not None and self.prepared and self._keep:
            self.write(error.event())
            error = None
        self.over, self.error = True, error
        self._tell()

    def _tell(self) -> None:
        for listener in list(self._listeners):
            listener.push()
        self.flow()

    def _trim(self) -> None:
        all_ = self._dropped + len(self.pieces)
        had = min((listener.next for listener in self._listeners), default=all_) - self._dropped
        count, cut, most = 0, self._cut, self._size - self._keep
        while count < had and cut + len(self.pieces[count][1]) <= most:
            cut += len(self.pieces[count][1])
            count += 1
        del self.pieces[:count]
        self._dropped, self._cut = self._dropped + count, cut
        if self._keep:  # not with every piece
            self._bound = self._size + self._keep // SLACK

    @property
    def resumable(self) -> bool:
        return self._keep > 0

    @property
    def size(self) -> int:
        """Bytes, in all."""
        return self._size

    @property
    def first(self) -> int:
        """The oldest piece that is kept."""
        return self._dropped

    def locate(self, offset: int) -> tuple[int, int] | None:
        """The piece that a byte is in, and where in it; None: it is not kept any more, or beyond what there is."""
        if not self._cut <= offset <= self._size:
            return None
        left = offset - self._cut
        for index, (_, events) in enumerate(self.pieces):
            if left < len(events):
                return self._dropped + index, left
            left -= len(events)
        return self._dropped + len(self.pieces), 0

    def piece(self, number: int) -> bytes | None:
        """The events of one, counted from the beginning; None: it is yet to come."""
        index = number - self._dropped
        return self.pieces[index][1] if index < len(self.pieces) else None


class Listener:
    """One client of a recording, on its own connection, from a byte on that `Recording.locate` finds."""

    __slots__ = (
        "_client", "_done", "_exchange", "_into", "_recording", "before_last", "ended", "error", "next", "own", "sent",
    )  # fmt: skip

    def __init__(self, recording: Recording, client: Client, exchange: Exchange, after: int = 0) -> None:
        self._recording = recording
        self._client = client
        self._exchange = exchange
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.next, self._into = recording.locate(after) or (0, 0)  # the piece to send, and where in it to begin
        self.sent = after - self._into  # bytes
        self.before_last: Callable[[Listener, Client], Awaitable[None]] | None = None  # sharing
        self.ended = False  # it has all but its last byte: who leaves now has seen the end
        self.error: GatewayError | None = None  # in the place of an answer, or of the rest of one
        self.own = False  # it was ended alone, and the answer went on
        if recording.resumable:
            client.sent = math.inf  # its heartbeats are the recording's

    async def run(self) -> web.StreamResponse:
        """All of it. Raises GatewayError only while no byte was sent."""
        recording, client = self._recording, self._client
        recording.join(self)
        client.on_flow = self.push
        # Of one that can be resumed whatever ends it is a part: its recording is interrupted for the same reason.
        client.on_interrupt = None if recording.resumable else self._stop
        try:
            self.push()
            await self._done
        finally:
            client.on_flow = client.on_interrupt = None
            recording.part(self)
        self._exchange.headers.update(recording.headers)
        unsent = recording.piece(self.next) is not None  # it was interrupted before it had read all
        self.own = unsent or not recording.over
        self.error = client.interrupted if self.own else recording.error
        if isinstance(self.error, KeyEnded) and not self.own and client.key_id != recording.key_id:
            words = "whoever pays for this answer was cut off; please try again"
            self.error = Unavailable(words, retry_after=1)
        if self.error is not None and not client.prepared:
            raise self.error
        if self.error is None and recording.whole is not None:
            return await client.send_whole(recording.whole, self._end)
        await self._end()
        if self.error is not None:
            client.write(self.error.event())
        elif not client.prepared:  # it had all of it
            client.write_pieces(())
        return await client.end()

    async def _end(self) -> None:
        self.ended = True
        if self.before_last is not None:
            await self.before_last(self, self._client)

    def push(self) -> None:
        """Sends what is there, as far as the client reads."""
        recording, client = self._recording, self._client
        before = self.next
        while not client.blocked and (piece := recording.piece(self.next)) is not None:
            if not self._exchange.first_byte:
                self._exchange.headers.update(recording.headers)
                self._exchange.first_byte = monotonic()
            self.next += 1
            self.sent += len(piece)
            client.write(piece[self._into :] if self._into else piece)
            self._into = 0
            if not recording.resumable:
                client.sent = monotonic()
        if self.next != before:
            recording.read()
        if recording.over and recording.piece(self.next) is None:
            self._stop()

    def _stop(self) -> None:
        if not self._done.done():
            self._done.set_result(None)

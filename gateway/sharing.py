"""Generations that are no single request's: identical requests in flight share one, and it can outlive its client.

Rule 1: the exchange that began a generation pays for it, also when its client has left.
Rule 2: one that leaves stops nobody; the last one does, unless the generation is to go on for a while.
Rule 3: only requests of the same account are ever joined.
Rule 4: a row says how it ended for its own client: one that has left, or was cut off, while the answer went on.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from typing import Literal, NamedTuple

from aiohttp import web

from gateway.appkeys import LIMITER, METRICS, PULSE, RECORDER
from gateway.attempt import outcome_of
from gateway.client import Client
from gateway.exchange import Exchange, Outcome, Source
from gateway.protocol.errors import GatewayError, InternalError, ShuttingDown, StreamGone
from gateway.recording import Listener, Recording
from gateway.relay import relay
from gateway.report import report
from gateway.stores.answers import Kept

log = logging.getLogger("gateway.sharing")


class _Seen(NamedTuple):
    """How an answer ended for one client; the names are of Exchange."""

    outcome: Outcome | Literal[""]
    status: int
    error_code: str


class Generation:
    """One upstream call and its recording. `linger`: seconds that it goes on when nobody listens; `keep`: it can be
    resumed (recording.py)."""

    def __init__(self, request: web.Request, exchange: Exchange, *, linger: float, keep: int = 0) -> None:
        assert exchange.principal is not None
        # A record of its own: that of the request ends when its client leaves.
        self.exchange = replace(exchange, headers=dict(exchange.headers))
        self.recording = Recording(request, self.exchange, outlived=exchange.principal.drain_seconds > 0, keep=keep)
        # When somebody in another process was seen to listen, seconds, monotonic; 0: never. resume: set.
        self.wanted_at: Callable[[], float] = lambda: 0.0
        self._request = request
        self._linger = linger
        self._ending: asyncio.TimerHandle | None = None
        self._payer = exchange
        self._paid = self.exchange  # the record of who pays: this, or a copy as its client saw it
        self._seen: _Seen | None = None  # how it ended for who pays, where that is not how the answer ended
        self._listening = False  # who pays
        self._over = False
        self._closed = False
        self.task: asyncio.Task[None]

    @property
    def joinable(self) -> bool:
        given_up = self.task.cancelling() or self.task.done()
        return self.recording.complete and self.recording.error is None and not given_up

    @property
    def whole(self) -> bool:
        """It is over, and ended by itself, and all of its answer is there."""
        broken = self.task.cancelled() or self.task.exception() is not None or self.recording.error is not None
        return not broken and self.exchange.outcome == "ok" and self.recording.complete

    def kept(self, error: GatewayError | None = None) -> Kept:
        """What is given again of an answer that is whole, or of an error in its place."""
        exchange, recording = self.exchange, self.recording
        assert exchange.target is not None
        whole = recording.whole if error is None else error.body()
        return Kept(
            exchange.id,
            200 if error is None else error.http_status,
            exchange.target.provider.name,
            exchange.target.model,
            recording.pieces if whole is None else None,
            whole,
            exchange.meter.result()[0] if exchange.meter is not None else None,
        )

    async def run(self) -> None:
        """To its end, which everybody who listens is told of."""
        pulse, exchange, recording = self._request.app[PULSE], self.exchange, self.recording
        pulse.enter()
        try:
            recording.finish(await self._answer())
        except asyncio.CancelledError:
            words = "the answer was given up; please try again"
            recording.finish(StreamGone(words) if recording.resumable else ShuttingDown(words, retry_after=1))
            raise
        except Exception as error:
            self._request.app[METRICS].internal_errors.labels("stream").inc()
            log.exception("a shared answer failed", extra={"fields": {"request_id": exchange.id}})
            recording.finish(InternalError("the gateway failed; quote the request id to its operator"))
            exchange.status = 200 if self._payer.prepared else 500
            if isinstance(error, ConnectionError):
                raise
        finally:
            recording.finish()
            self.end()
            pulse.leave()

    async def _answer(self) -> GatewayError | None:
        """Gives what went wrong: who listens is told of it when the row is written."""
        exchange, recording = self.exchange, self.recording
        try:
            try:
                await relay(self._request, exchange, recording)
            finally:
                exchange.held = False
        except GatewayError as error:
            exchange.status = 200 if self._payer.prepared else error.http_status
            exchange.error_code = error.error_code or ""
            if self._payer.prepared and not recording.behind:
                await self._request.app[RECORDER].settle(exchange)
            return error
        return None

    def end(self) -> None:
        """There is no more of it."""
        self._over = True
        self._close()

    async def listen(
        self, request: web.Request, exchange: Exchange, source: Source | None, after: int = 0
    ) -> web.StreamResponse:
        """Send it to one more client. Raises GatewayError only while no byte was sent.

        `source`: None when it is the same client, which goes on `after` so many bytes.
        """
        pulse = request.app[PULSE]
        asked = self.exchange.asked
        client = Client(request, exchange, draining=lambda: pulse.closing, stream=asked is not None and asked.stream)
        listener = Listener(self.recording, client, exchange, after)
        if self._ending is not None:
            self._ending.cancel()
        if exchange is self._payer:
            listener.before_last = self._settle
            self.recording.payer = listener
            self._listening = True
        pulse.watch(client)
        try:
            return await listener.run()
        finally:
            pulse.forget(client)
            if exchange is self._payer:
                self._see(listener, client)
                self._listening = False
                self._close()
            elif source is not None:
                self._note(exchange, source, self._seen_by(listener, client))
            self._left()

    # --- rows

    def _seen_by(self, listener: Listener, client: Client) -> _Seen:
        error, status = listener.error, 200 if client.prepared else 0
        if error is not None:
            outcome = outcome_of(error) if listener.own else self.exchange.outcome
            return _Seen(outcome, status or error.http_status, error.error_code or "")
        if listener.ended:
            return _Seen(self.exchange.outcome, status, "")
        draining = self._request.app[PULSE].draining
        return _Seen("interrupted" if draining else "client_abort", status, "client_stalled" if client.stalled else "")

    def _note(self, exchange: Exchange, source: Source, seen: _Seen) -> None:
        """What its own record says of who did not pay."""
        mine = self.exchange
        exchange.source, exchange.source_id = source, mine.id
        exchange.outcome, exchange.status, exchange.error_code = seen
        if mine.connected:  # else no provider was asked, and no row is due
            exchange.target = mine.target
        if mine.meter is not None and self.recording.over and mine.outcome == "ok":  # what failed saves nothing
            exchange.saved, _ = mine.meter.result()

    async def _settle(self, listener: Listener, client: Client) -> None:
        """Before the last byte of who pays: its row, where that is not written yet."""
        self._see(listener, client)
        if not self._over and (self.recording.over or self.recording.interrupted is not None):
            await asyncio.wait({self.task})  # some steps: it ends
        record = self._record()
        if self._over and not record.recorded:
            await self._request.app[RECORDER].settle(record)

    def _see(self, listener: Listener, client: Client) -> None:
        """Notes how it ended for who pays. Of one that can be resumed it may not be the end."""
        if (listener.own or not (listener.ended or listener.error)) and not self.recording.resumable:
            self._seen = self._seen or self._seen_by(listener, client)

    def _record(self) -> Exchange:
        """That of who pays. `exchange` itself says how the answer ended."""
        if self._seen is not None and self._paid is self.exchange and self._over and not self.exchange.recorded:
            self._paid = replace(self.exchange, **self._seen._asdict())
        return self._paid

    def _close(self) -> None:
        """Row, log line and slot of who pays, when neither the answer nor its client goes on."""
        if self._closed or self._listening or not self._over:
            return
        self._closed = True
        app, record = self._request.app, self._record()
        assert record.principal is not None
        app[RECORDER].end(record)
        record.ended = record.ended or monotonic()
        report(self._request, record)
        app[LIMITER].release(record.principal, record.id)

    # --- nobody listens

    def _left(self) -> None:
        # Its last byte is out some steps before its task is done: what is over is not given up.
        if self.recording.alone and not self.recording.over:
            if self._linger:
                self._ending = asyncio.get_running_loop().call_later(self._linger, self._give_up)
            else:
                self._give_up()

    def _give_up(self) -> None:
        if not self.recording.alone or self.recording.over:
            return
        left = self.wanted_at() + self._linger - monotonic()
        if left > 0:
            self._ending = asyncio.get_running_loop().call_later(left, self._give_up)
        else:
            self.task.cancel()


class Sharing:
    """The generations of this process. Opened and closed by app.py."""

    def __init__(self) -> None:
        self._open: dict[bytes, Generation] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def find(self, key: bytes) -> Generation | None:
        """One that somebody may join."""
        generation = self._open.get(key)
        return generation if generation is not None and generation.joinable else None

    def running(self, key: bytes) -> Generation | None:
        """One that is not over, whatever of it is kept."""
        generation = self._open.get(key)
        return generation if generation is not None and not generation.recording.over else None

    def begin(
        self,
        key: bytes,
        request: web.Request,
        exchange: Exchange,
        *,
        linger: float = 0.0,
        keep: int = 0,
        done: Callable[[Generation], None] = lambda generation: None,
    ) -> Generation:
        """A new one, which `exchange` pays for; `done` hears of its end, whichever it is."""
        generation = Generation(request, exchange, linger=linger, keep=keep)
        exchange.delegated = True
        task = generation.task = asyncio.create_task(generation.run())
        self._open[key] = generation
        self._tasks.add(task)

        def end(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            generation.end()  # if it never ran
            if self._open.get(key) is generation:
                del self._open[key]
            if not task.cancelled():
                task.exception()  # it was told: nobody else asks
            done(generation)

        task.add_done_callback(end)
        return generation

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


SHARING = web.AppKey("SHARING", Sharing)  # here, and not with the others: those are below the relay

"""One stream from a provider to its client: one read, one feed, one write, and no task switch between them.

The provider's connection hands each read straight to `received`, and what comes of it is in the client's transport
before the next read. The coroutine sleeps until the stream stops: at its end, at a fault, or when its budget has to be
asked for more.

Rule 1: what the client gets is what it would get if the coroutine read, fed and wrote, and waited for each of them. A
test compares the two.
Rule 2: a client that does not read stops the reading of its provider, so no more than a read waits for it.
"""

import asyncio
from enum import Enum, auto
from time import monotonic

from gateway.client import Client
from gateway.exchange import Exchange
from gateway.protocol.errors import GatewayError, UpstreamBadBody
from gateway.protocol.meter import Meter
from gateway.protocol.request import Chunk, Translator
from gateway.protocol.usage import Usage
from gateway.protocol.whole import Whole
from gateway.series import Live
from gateway.stores.recorder import Recorder
from gateway.upstream import Answer

LIVE = 0.25  # seconds that the figures of a stream which runs may be old
SURE = 6  # bytes of text that are a token at least: of 47 answers of 25 models the longest had 5.4 a token


class Tally:
    """Counts what passes: in the exchange's meter and, for dashboards that move with the tokens, in the metrics.

    Chunks of text alone, as nearly all are, are counted many at a time: who looks at the meter calls `settle` first.
    """

    __slots__ = ("_exchange", "_live", "_meter", "_texts", "heard", "spoke")

    def __init__(self, exchange: Exchange, meter: Meter, live: Live) -> None:
        self._exchange = exchange
        self._meter = meter
        self._live = live
        self._texts: list[str] = []  # not counted yet
        self.spoke = False  # text was taken; stream: since its last read
        # stream: when reads with text came whose gaps are not counted yet, and the one before; seconds, monotonic.
        self.heard: list[float] = []

    def count(self, text: str, usage: Usage | None, finish_reason: str | None) -> None:
        self.settle()
        before = self._meter.bytes_out
        self._meter.see(text, usage, finish_reason)
        if text:
            self._add(before, 1)
            self.spoke = True
            self._begin()

    def take(self, chunks: list[Chunk]) -> bytes:
        """Their bytes, counted before they are sent: the provider bills what the client did not wait for."""
        texts = self._texts
        for chunk in chunks:
            if chunk.usage is not None or chunk.finish_reason is not None:
                self.count(chunk.text, chunk.usage, chunk.finish_reason)
            elif chunk.text:
                if not texts:
                    self._begin()
                texts.append(chunk.text)
                self.spoke = True
        return chunks[0].data if len(chunks) == 1 else b"".join([chunk.data for chunk in chunks])

    def settle(self) -> None:
        """All that was taken is counted."""
        if self._texts:
            before = self._meter.bytes_out
            self._meter.see_texts(self._texts)
            self._add(before, len(self._texts))
            self._texts.clear()

    def settle_gaps(self) -> None:
        """All gaps between reads with text are counted, but for the one that is not over."""
        if len(self.heard) > 1:
            self._live.gaps.observe_gaps(self.heard)
            del self.heard[:-1]

    def pause(self) -> None:
        """The provider is not read: how long that lasts is not its doing."""
        self.settle_gaps()
        self.heard.clear()

    def _begin(self) -> None:
        if not self._exchange.first_byte:
            self._exchange.first_byte = monotonic()

    def _add(self, before: int, pieces: int) -> None:
        """The meter errs upwards, a counter never goes down: what is too little here is added when the stream ends."""
        tokens = max(pieces, (self._meter.bytes_out - before) // SURE)
        self._live.tokens.inc(tokens)
        self._exchange.counted_live += tokens


class _Stop(Enum):
    END = auto()  # the dialect's last word, or the end of the body
    SPENT = auto()  # all that was granted is used


class Stream:
    """One attempt's. `gathered`: the client wants a whole answer, so its chunks are kept, up to `limit` bytes."""

    __slots__ = (
        "_answer",
        "_chunks",
        "_client",
        "_due",
        "_exchange",
        "_fault",
        "_flowing",
        "_gathered",
        "_last",
        "_limit",
        "_lines",
        "_meter",
        "_put",
        "_recorder",
        "_reservation",
        "_stop",
        "_stopped",
        "_tally",
        "_translator",
    )

    def __init__(
        self,
        exchange: Exchange,
        translator: Translator,
        tally: Tally,
        client: Client,
        recorder: Recorder,
        *,
        gathered: Whole | None = None,
        limit: int = 0,
    ) -> None:
        assert exchange.meter is not None
        self._exchange = exchange
        self._translator = translator
        self._tally = tally
        self._client = client
        self._recorder = recorder
        self._gathered = gathered
        self._limit = limit
        self._put = client.write if gathered is None else self._gather
        self._meter = exchange.meter
        self._reservation = exchange.reservation
        self._stop: _Stop | None = None
        self._lines: list[bytes] = []  # under a budget: not fed yet
        self._chunks: list[Chunk] = []  # under a budget: fed, and not passed on yet
        self._last: list[Chunk] = []  # with the last word in them
        self._answer: Answer | None = None  # the one that is followed
        self._fault: GatewayError | None = None  # came while the coroutine did something else
        self._stopped: asyncio.Future[None] | None = None  # the coroutine waits for the next stop
        self._flowing = False  # what comes is passed on at once
        self._due = 0.0  # when its figures are next brought up to date, seconds, monotonic

    async def run(self, answer: Answer) -> bytes | None:
        """Passes all on but the last chunk, which it gives; None when it is cut, because nothing is left to pay for it.

        Raises GatewayError for what the provider did, with all before it passed on. The caller ends `answer`.
        """
        while True:
            if self._stop is None:
                try:
                    await self._follow(answer)
                finally:
                    self._flowing = False
                    self._stopped = self._client.on_flow = None
                    self._client.reading_since = 0.0
            if self._stop is _Stop.END:
                return self._last_words()
            assert self._reservation is not None
            if not await self._reservation.more(self._meter.completion_tokens):
                return None
            self._stop = None
            self._send(self._pass_paid())

    def settle(self) -> None:
        """All that was read is counted, also what came in the turn in which the client left."""
        self._tally.take(self._last)
        self._last = []
        self._tally.settle()
        self._tally.settle_gaps()

    def _last_words(self) -> bytes:
        """Sends all but the last chunk, which it gives. Raises UpstreamError, with all before the fault sent."""
        chunks, self._last = self._last, []
        try:
            chunks = [*chunks, *self._translator.flush()]
        except GatewayError:
            self._send(self._tally.take(chunks))
            raise
        self._send(self._tally.take(chunks[:-1]))
        return self._tally.take(chunks[-1:])

    # --- what a read becomes

    def _pass(self, data: bytes) -> bytes:
        """The client's bytes of one read (b"": the body has ended); why no more may be read is `_stop`."""
        if self._reservation is not None:
            # A line at a time, so that the translator of a stream that is cut knows no more than was passed on.
            one_event = data.find(b"\n\n") == len(data) - 2 and b"\r" not in data
            self._lines.extend([data] if one_event else data.splitlines(keepends=True) or [b""])
            return self._pass_paid()
        chunks = self._translator.feed(data) if data else []
        if self._translator.done or not data:
            self._stop, self._last = _Stop.END, chunks
            return b""
        return self._tally.take(chunks)

    def _pass_paid(self) -> bytes:
        """As far as it is paid for. The last chunks of a stream that ended well are not asked for: they may bring a
        higher count."""
        assert self._reservation is not None
        passed: list[bytes] = []
        while self._stop is None and (self._chunks or self._lines):
            if self._chunks:
                chunk = self._chunks.pop(0)
                passed.append(self._tally.take([chunk]))
                self._tally.settle()
                if chunk.text and not self._reservation.used(self._meter.completion_tokens):
                    self._stop = _Stop.SPENT
                continue
            line = self._lines.pop(0)
            chunks = self._translator.feed(line) if line else []
            if self._translator.done or not line:
                self._stop, self._last = _Stop.END, chunks
            else:
                self._chunks.extend(chunks)
        return b"".join(passed)

    def _send(self, data: bytes) -> None:
        if data:
            self._put(data)

    def _gather(self, data: bytes) -> None:
        assert self._gathered is not None
        self._gathered.add(data)
        if self._gathered.size > self._limit:
            assert self._exchange.target is not None
            name = self._exchange.target.provider.name
            raise UpstreamBadBody(f"{name} answered with more than {self._limit} bytes")

    # --- until the next stop

    def _follow(self, answer: Answer) -> asyncio.Future[None]:
        """What comes is passed on until the future that it gives is done. Raises what came meanwhile."""
        if self._fault is not None:
            raise self._fault
        self._stopped = stopped = asyncio.get_running_loop().create_future()
        self._client.on_flow = self._go_on
        follows, self._answer = self._answer is not None, answer
        self._go_on()
        if not follows:
            answer.follow(self)
        return stopped

    def received(self, data: bytes) -> None:
        if not self._flowing:
            return  # it has stopped for good: while it only waits, the answer is paused
        client, tally = self._client, self._tally
        try:
            passed = self._pass(data)
            now = monotonic()
            if tally.spoke:  # before it is put: that may fill the client's buffer, and end the time that is measured
                tally.spoke = False
                tally.heard.append(now)
            if passed:
                self._put(passed)
                client.sent = now
        except Exception as error:  # of a gathered answer that is too long; else a bug of ours, which the relay reports
            self._end(error)
            return
        if self._flowing:  # what was put has not filled the client's buffer
            client.reading_since = now
        if now >= self._due:
            self._account(now)
        if self._stop is not None:
            self._pause()
            self._end(None)

    def _account(self, now: float) -> None:
        self._due = now + LIVE
        self._tally.settle()
        self._tally.settle_gaps()
        self._recorder.tick(self._exchange)

    def ended(self) -> None:
        self.received(b"")

    def failed(self, error: GatewayError) -> None:
        if self._stopped is None or self._stopped.done():
            self._fault = error  # an interruption, while the budget is asked for more
        else:
            self._end(error)  # also while the client does not read

    def _go_on(self) -> None:
        """Reads while the client does."""
        assert self._answer is not None
        if self._client.blocked:
            self._pause()
        elif self._stopped is not None and not self._stopped.done():
            self._flowing = True
            self._client.reading_since = monotonic()
            self._answer.resume()

    def _pause(self) -> None:
        assert self._answer is not None
        self._flowing = False
        self._client.reading_since = 0.0
        self._tally.pause()
        self._answer.pause()

    def _end(self, error: Exception | None) -> None:
        """Wakes the coroutine: the stream has stopped."""
        self._flowing = False
        assert self._stopped is not None
        if self._stopped.done():  # it was cancelled in this very turn
            return
        if error is None:
            self._stopped.set_result(None)
        else:
            self._stopped.set_exception(error)

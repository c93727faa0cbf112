"""One exchange in the journal: begun before its provider is called, ended before its client has the last byte.

What the provider did not count is counted here, of models whose vocabulary is known. An exchange that broke is ended
when its count is in: until then a tick holds the estimate, and nobody waits. One that ends well waits a moment.

An exchange that was answered without a provider has an end alone, which says what that saved, and nobody waits for it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from time import monotonic
from typing import Literal

from gateway.exchange import Exchange
from gateway.protocol.meter import Meter
from gateway.protocol.pricing import Price, cost_micros
from gateway.protocol.vocabulary import Vocabulary, vocabulary_of
from gateway.stores.copy import UsageCopy
from gateway.stores.journal import Journal, JournalFull
from gateway.stores.usage import MAX_TOKENS, NOTHING, UsageRow, remembered_row_of, row_of

TICK = 5.0  # seconds of a stream that a killed process may leave unaccounted
# Seconds that a client waits for the disk: two fdatasyncs and the way to the thread and back take 0.3 ms. One that is
# slower loses, in a power cut, what the last ends said: their rows are then made of their begins.
DISK = 0.0005
COUNTING = 5.0  # seconds that a count may take when nobody waits for it
# Seconds that a client waits for it, by outcome: what it is told then is what the row says.
WAITED_FOR = {"ok": 0.05, "budget_exhausted": 0.25}

OnFull = Literal["closed", "open"]
# Tokens of each text, within so many seconds; None when nobody can say (gateway/tokeniser.py).
Count = Callable[[Sequence[str], Vocabulary, float], Awaitable[Sequence[int] | None]]


class Recorder:
    """Writes what the relay reports. `price` gives a provider's model's price at a time, None when it is unknown."""

    def __init__(
        self,
        journal: Journal,
        price: Callable[[str, str, datetime], Price | None],
        *,
        count: Count | None = None,
        copy: UsageCopy | None = None,
        on_full: OnFull = "closed",
    ) -> None:
        self._journal = journal
        self._copy = copy
        self._price = price
        self._count = count
        self._on_full = on_full
        self._counting: dict[str, asyncio.Task[None]] = {}  # exchanges that end when their count is in; see `close`

    async def begin(self, exchange: Exchange) -> None:
        """Before anything is sent. Raises JournalFull, unless the operator would rather serve than account."""
        exchange.ticked = monotonic()
        row = row_of(exchange)
        try:
            self._journal.begin(row)
        except JournalFull:
            if self._on_full == "closed":
                raise
        if self._copy is not None:
            await self._copy.begun(row)

    def tick(self, exchange: Exchange) -> None:
        """While a stream runs, now and then; written every TICK seconds."""
        now = monotonic()
        if exchange.meter is None or now - exchange.ticked < TICK:
            return
        exchange.ticked = now
        self._tick(exchange, exchange.meter)

    async def settle(self, exchange: Exchange) -> None:
        """Ended, and on disk as far as the setting asks for it: now the client may have the last byte."""
        if exchange.outcome in WAITED_FOR and (texts := self._to_count(exchange)):
            await self._ask(exchange, texts, WAITED_FOR[exchange.outcome])
        copied = self.end(exchange)
        await self._journal.synced(DISK)
        if copied is not None:
            await copied

    async def counted(self, exchange: Exchange) -> None:
        """The meter's figures are now the ones that the row will have: the provider's, counted if time allows."""
        if texts := self._to_count(exchange):
            await self._ask(exchange, texts, WAITED_FOR.get(exchange.outcome, COUNTING))

    def end(self, exchange: Exchange) -> Awaitable[None] | None:
        """The row as it now is, once; none when nobody has answered. Never waits and never refuses.

        What it gives may be awaited: then the row's second copy is there, where there is one.
        """
        if exchange.recorded or exchange.id in self._counting:
            return None
        if exchange.meter is None or not exchange.connected:
            self._void(exchange)
            return self._write_remembered(exchange) if exchange.source != "provider" else None
        if exchange.held:  # the row waits for its client, and what is known is there for a process that is killed
            self._tick(exchange, exchange.meter)
            return None
        exchange.ended = exchange.ended or monotonic()
        texts = self._to_count(exchange)
        if not texts:
            return self._write(exchange)
        row = self._row(exchange)  # of the estimate: its cost is for the log, which does not wait either
        self._journal.tick(exchange.id, row.prompt_tokens, row.completion_tokens)
        self._counting[exchange.id] = asyncio.create_task(self._end_counted(exchange, texts))
        return None

    @property
    def refusing(self) -> bool:
        """Whether `begin` would raise."""
        return self._on_full == "closed" and self._journal.full

    @property
    def counting(self) -> int:
        """Exchanges that ended and whose rows are not written yet."""
        return len(self._counting)

    async def close(self, seconds: float = COUNTING) -> None:
        """All rows are written: with their counts as far as these are in by then."""
        if self._counting:
            await asyncio.wait(self._counting.values(), timeout=seconds)
        for task in self._counting.values():
            task.cancel()
        await asyncio.gather(*self._counting.values(), return_exceptions=True)

    def priced(self, row: UsageRow) -> UsageRow:
        """The row, with its cost on it where a price is known, and tokens that it is the price of."""
        if row.usage_source == "estimated" and not row.total_tokens:
            return row  # it was passed on, and nobody counted anything
        price = self._price(row.provider, row.upstream_model, row.started_at)
        if price is not None:
            row.cost_micros = cost_micros(price, row)
        return row

    # --- counting

    def _to_count(self, exchange: Exchange) -> list[str]:
        """Texts that the provider did not count and the tokeniser can; none when they were asked for before."""
        meter = exchange.meter
        if self._count is None or meter is None or not (texts := meter.to_count()):
            return []
        return texts if _vocabulary(exchange) is not None else []

    async def _ask(self, exchange: Exchange, texts: list[str], seconds: float) -> None:
        meter, vocabulary = exchange.meter, _vocabulary(exchange)
        assert self._count is not None and meter is not None and vocabulary is not None
        counts = await self._count(texts, vocabulary, seconds)
        if counts is not None:
            meter.take_counts(counts)

    async def _end_counted(self, exchange: Exchange, texts: list[str]) -> None:
        try:
            await self._ask(exchange, texts, COUNTING)
        finally:
            del self._counting[exchange.id]
            self._write(exchange)

    # --- writing

    def _tick(self, exchange: Exchange, meter: Meter) -> None:
        usage, _ = meter.result()
        self._journal.tick(exchange.id, usage.prompt_tokens or 0, usage.completion_tokens or 0)

    def _write(self, exchange: Exchange) -> Awaitable[None] | None:
        exchange.recorded = True
        row = self._row(exchange)
        self._journal.end(row)
        copied = self._copy.ended(row) if self._copy is not None else None
        if exchange.reservation is not None:
            exchange.reservation.settle(row.total_tokens, row.cost_micros or 0)
        return copied

    def _write_remembered(self, exchange: Exchange) -> Awaitable[None] | None:
        if exchange.target is None:
            return None
        exchange.recorded = True
        exchange.ended = exchange.ended or monotonic()
        row = remembered_row_of(exchange)
        price = self._price(row.provider, row.upstream_model, row.started_at)
        if price is not None and row.saved_tokens < MAX_TOKENS:  # a provider's nonsense saved nobody a fortune
            row.saved_micros = cost_micros(price, exchange.saved or NOTHING)
        exchange.cost_micros, exchange.saved_micros = row.cost_micros, row.saved_micros
        return self._copy.ended(row) if self._journal.add(row) and self._copy is not None else None

    def _row(self, exchange: Exchange) -> UsageRow:
        row = self.priced(row_of(exchange))
        exchange.cost_micros = row.cost_micros
        return row

    def _void(self, exchange: Exchange) -> None:
        """Nothing was used; an exchange without a meter did not even begin."""
        if exchange.meter is not None:
            exchange.recorded = True
            exchange.ended = exchange.ended or monotonic()
            self._journal.void(exchange.id)
            if self._copy is not None:
                self._copy.forget([exchange.id])
        if exchange.reservation is not None:
            exchange.reservation.settle(0, 0)


def _vocabulary(exchange: Exchange) -> Vocabulary | None:
    return vocabulary_of(exchange.target.model) if exchange.target is not None else None

"""One exchange in the journal: begun before its provider is called, ended before its client has the last byte."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from time import monotonic
from typing import Literal

from gateway.exchange import Exchange
from gateway.protocol.pricing import Price, cost_micros
from gateway.protocol.usage import Usage
from gateway.stores.journal import Journal, JournalFull
from gateway.stores.usage import UsageRow, row_of

TICK = 5.0  # seconds of a stream that a killed process may leave unaccounted

OnFull = Literal["closed", "open"]


class Recorder:
    """Writes what the relay reports. `price` gives a provider's model's price at a time, None when it is unknown."""

    def __init__(
        self, journal: Journal, price: Callable[[str, str, datetime], Price | None], *, on_full: OnFull = "closed"
    ) -> None:
        self._journal = journal
        self._price = price
        self._on_full = on_full

    def begin(self, exchange: Exchange) -> None:
        """Before anything is sent. Raises JournalFull, unless the operator would rather serve than account."""
        exchange.ticked = monotonic()
        try:
            self._journal.begin(row_of(exchange))
        except JournalFull:
            if self._on_full == "closed":
                raise

    def tick(self, exchange: Exchange) -> None:
        """While a stream runs, at every step of it; written every TICK seconds."""
        now = monotonic()
        if exchange.meter is None or now - exchange.ticked < TICK:
            return
        exchange.ticked = now
        usage, _ = exchange.meter.result()
        self._journal.tick(exchange.id, usage.prompt_tokens or 0, usage.completion_tokens or 0)

    async def settle(self, exchange: Exchange) -> None:
        """Ended, and on disk as far as the setting asks for it: now the client may have the last byte."""
        self.end(exchange)
        await self._journal.synced()

    def end(self, exchange: Exchange) -> None:
        """The row as it now is, once; none when the provider was never reached. Never waits and never refuses."""
        if exchange.recorded or exchange.meter is None:
            return
        exchange.recorded = True
        exchange.ended = exchange.ended or monotonic()
        if not exchange.connected:
            self._journal.void(exchange.id)
            return
        row = self.priced(row_of(exchange))
        exchange.cost_micros = row.cost_micros
        self._journal.end(row)

    def priced(self, row: UsageRow) -> UsageRow:
        price = self._price(row.provider, row.upstream_model, row.started_at)
        return row if price is None else replace(row, cost_micros=cost_micros(price, _usage(row)))


def _usage(row: UsageRow) -> Usage:
    return Usage(
        row.prompt_tokens, row.completion_tokens, row.cached_tokens, row.cache_write_tokens, row.reasoning_tokens
    )

"""A process that writes exchanges into a journal and ships them, to be killed: `python -m tests.support.journal_writer`.

It tells on standard output what it is about to do and what it has done, a line each, so that whoever killed it knows
what must be in the database:

    about ID                        begin is called next
    begun ID                        begin has returned: the provider may be called
    ending ID PROMPT COMPLETION     end is called next, with these tokens
    ended ID PROMPT COMPLETION      end and synced have returned: the client may have the last byte; the same of `add`
    voiding ID, voided ID           the same for void
"""

import asyncio
import os
import random
import signal
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg

from gateway.exchange import new_id
from gateway.stores import segments
from gateway.stores.journal import Journal
from gateway.stores.shipper import Shipper
from gateway.stores.usage import UsageRow

ALICE = "018f6b2e-0000-7000-8000-00000000a11c"
SEGMENT = 1 << 16  # bytes: many segments in a short life


def row(**changes: Any) -> UsageRow:
    plain = UsageRow(
        request_id=new_id(),
        started_at=datetime.now(UTC),
        key_id="Key012345678",
        account_id=ALICE,
        user_id="user",
        app_id="app",
        client_request_id="",
        provider="openai",
        model="gpt-4o",
        upstream_model="gpt-4o-2024-11-20",
        stream=True,
        status=200,
        outcome="ok",
        error_code="",
        finish_reason="stop",
        prompt_tokens=100,
        completion_tokens=50,
        cached_tokens=20,
        cache_write_tokens=10,
        reasoning_tokens=5,
        usage_source="provider",
        latency_ms=1500,
        ttft_ms=300,
        cost_micros=1234,
    )
    return replace(plain, **changes)


def begun(**changes: Any) -> UsageRow:
    """A row as it is before the provider is called."""
    unknown = {"status": 0, "outcome": "interrupted", "finish_reason": "", "completion_tokens": 0, "latency_ms": 0}
    unknown |= {"cached_tokens": 0, "cache_write_tokens": 0, "reasoning_tokens": 0, "usage_source": "estimated"}
    return row(**{**unknown, "ttft_ms": None, "cost_micros": None, **changes})


def remembered(paid: UsageRow | None = None, **changes: Any) -> UsageRow:
    """A row of an answer that `paid` is of, too."""
    paid = paid or row()
    nothing: dict[str, Any] = {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0, "cache_write_tokens": 0}
    nothing |= {"reasoning_tokens": 0, "usage_source": "none", "finish_reason": "", "cost_micros": 0}
    saved = {"source_id": paid.request_id, "saved_tokens": paid.total_tokens, "saved_micros": paid.cost_micros}
    return replace(paid, request_id=new_id(), source="shared", **{**nothing, **saved, **changes})


def _tell(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def _exchange(journal: Journal) -> None:
    first = begun(model=random.choice(["gpt-4o", "claude", "llama3"]), user_id=random.choice(["ann", "ben"]))
    _tell("about", first.request_id)
    journal.begin(first)
    _tell("begun", first.request_id)
    await asyncio.sleep(random.random() * 0.3)
    if random.random() < 0.02:
        _tell("voiding", first.request_id)
        journal.void(first.request_id)
        _tell("voided", first.request_id)
        return
    completion = random.randrange(1000)
    journal.tick(first.request_id, 100, completion // 2)
    await asyncio.sleep(random.random() * 0.3)
    figures = first.request_id, random.randrange(1000), completion
    last = replace(first, outcome="ok", prompt_tokens=figures[1], completion_tokens=completion, cost_micros=completion)
    _tell("ending", *figures)
    journal.end(last)
    await journal.synced()
    _tell("ended", *figures)
    for _ in range(random.randrange(3)):
        _remember(journal, last)


def _remember(journal: Journal, paid: UsageRow) -> None:
    """Somebody gets the same answer, for which nobody is paid."""
    hit = remembered(paid, started_at=datetime.now(UTC))
    _tell("ending", hit.request_id, 0, 0)
    assert journal.add(hit)
    _tell("ended", hit.request_id, 0, 0)


async def _work(root: Path, database_url: str, rate: float) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    journal = Journal(root, segment_bytes=SEGMENT)
    async with asyncpg.create_pool(database_url, min_size=0, max_size=2) as pool:
        shipper = Shipper(pool, journal)
        shipping = asyncio.create_task(shipper.run())
        exchanges: set[asyncio.Task[None]] = set()
        while not stop.is_set():
            exchange = asyncio.create_task(_exchange(journal))
            exchanges.add(exchange)
            exchange.add_done_callback(exchanges.discard)
            await asyncio.sleep(1 / rate)
        await asyncio.gather(*exchanges)
        await shipper.close(20)
        shipping.cancel()
        await asyncio.gather(shipping, return_exceptions=True)
    journal.close()


if __name__ == "__main__":
    if random.random() < 0.5:
        # As if it were always killed between a commit and the note of it: whoever adopts it ships all again.
        segments._write_shipped = lambda folder, position: None
    asyncio.run(_work(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])))

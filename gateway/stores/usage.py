"""The usage table: one row for every request that reached a provider.

Rule 1: `record` is called where nothing may wait or fail, so it only queues. A task (`run`) writes batches.
Rule 2: a row leaves the queue when it is in the database, or when the database refused that very row. Writing a row
twice does no harm: its request id is the key.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from itertools import islice
from operator import attrgetter
from time import monotonic

import asyncpg

from gateway.exchange import Exchange
from gateway.stores.postgres import Pool, connection

log = logging.getLogger("gateway.stores.usage")

BATCH = 500  # rows in one INSERT: beyond it the cost of a row no longer falls
LINGER = 0.2  # seconds that a row may wait for others to share its INSERT
PATIENCE = 5.0  # seconds for a connection, and for an INSERT; nobody waits for them
RETRY_FIRST, RETRY_LAST = 0.1, 5.0  # seconds between attempts while the database is gone
MAX_QUEUE = 100_000  # rows, about 100 MB
DROPS_LOGGED_EVERY = 60.0  # seconds

MAX_TEXT = 256  # characters of any text column; the gateway's own checks stop at this or earlier
# Far beyond any exchange, and nine million of them still add up within bigint: a provider's nonsense cannot make the
# sums of everybody else fail.
MAX_TOKENS = 10**12
MAX_MS = 2**31 - 1  # Postgres integer


# --- rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UsageRow:
    """The columns of table `usage`, in their order (sql/migrations/0001_accounts_keys_usage.sql)."""

    request_id: str
    started_at: datetime
    key_id: str
    account_id: str
    user_id: str
    app_id: str
    client_request_id: str
    provider: str
    model: str
    upstream_model: str
    stream: bool
    status: int
    outcome: str
    error_code: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    reasoning_tokens: int
    usage_source: str
    latency_ms: int
    ttft_ms: int | None

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


def row_of(exchange: Exchange) -> UsageRow:
    """The row of an exchange whose provider was called: nothing in it that Postgres would refuse."""
    principal, chat, target, meter = exchange.principal, exchange.chat, exchange.target, exchange.meter
    assert principal is not None and chat is not None and target is not None and meter is not None
    usage, source = meter.result()
    ended = exchange.ended or monotonic()
    return UsageRow(
        request_id=exchange.id,
        started_at=datetime.fromtimestamp(exchange.started_at, UTC),
        key_id=principal.key_id,
        account_id=principal.account_id,
        user_id=storable(exchange.user_id),
        app_id=storable(exchange.app_id),
        client_request_id=storable(exchange.client_request_id),
        provider=storable(target.provider.name),
        model=storable(exchange.model),
        upstream_model=storable(target.model),
        stream=chat.stream,
        status=_clamp(exchange.status, 999),
        outcome=exchange.outcome,
        error_code=storable(exchange.error_code),
        finish_reason=storable(meter.finish_reason or ""),
        prompt_tokens=_clamp(usage.prompt_tokens or 0, MAX_TOKENS),
        completion_tokens=_clamp(usage.completion_tokens or 0, MAX_TOKENS),
        cached_tokens=_clamp(usage.cached_tokens, MAX_TOKENS),
        cache_write_tokens=_clamp(usage.cache_write_tokens, MAX_TOKENS),
        reasoning_tokens=_clamp(usage.reasoning_tokens, MAX_TOKENS),
        usage_source=source,
        latency_ms=_milliseconds(ended - exchange.started),
        ttft_ms=_milliseconds(exchange.first_byte - exchange.started) if exchange.first_byte else None,
    )


def storable(text: str) -> str:
    """`text` as Postgres takes it: no NUL, no lone surrogate, at most MAX_TEXT characters.

    Postgres refuses both (https://www.postgresql.org/docs/current/datatype-character.html), and with them the whole
    INSERT they are in.
    """
    text = text[:MAX_TEXT]
    if "\0" in text or not text.isascii():
        text = text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
    return text


def _clamp(number: int, most: int) -> int:
    return min(max(0, number), most)


def _milliseconds(seconds: float) -> int:
    return _clamp(round(seconds * 1000), MAX_MS)


# --- the store ----------------------------------------------------------------------------------------------------


class RowError(Exception):
    """The database took the statement and refused what is in it."""


class UsageStore:
    """Queue and writer of table `usage`. `run` is a task of the application's; `close` comes before it ends.

    `on_rows(result, count)` hears of every recorded row once: written, failed (the database refused it) or dropped (no
    room). `on_error()` hears of every attempt that failed. Neither may raise.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        on_rows: Callable[[str, int], None] = lambda result, count: None,
        on_error: Callable[[], None] = lambda: None,
        max_queue: int = MAX_QUEUE,
    ) -> None:
        self._pool = pool
        self._on_rows = on_rows
        self._on_error = on_error
        self._max_queue = max_queue
        self._queue: deque[UsageRow] = deque()  # `record` adds to its end, whoever holds `_writing` takes from its head
        self._writing = asyncio.Lock()
        self._suspects = 0  # rows at the head among which one was refused
        self._some = asyncio.Event()  # the queue is not empty
        self._full = asyncio.Event()  # it holds a batch
        self._closing = asyncio.Event()
        self._gone = False  # the last attempt failed; said once, not at every attempt
        self._dropped = 0  # rows since the start
        self._quiet_until = 0.0  # seconds, monotonic: no word of dropped rows before

    @property
    def queued(self) -> int:
        """Rows that are not in the database yet."""
        return len(self._queue)

    def record(self, row: UsageRow) -> None:
        """Take a row in. Never waits, never raises; a row for which there is no room is counted as dropped."""
        if len(self._queue) >= self._max_queue or self._closing.is_set():
            self._drop()
            return
        self._queue.append(row)
        self._some.set()
        if len(self._queue) >= BATCH:
            self._full.set()

    def _drop(self) -> None:
        self._on_rows("dropped", 1)
        self._dropped += 1
        if monotonic() >= self._quiet_until:
            self._quiet_until = monotonic() + DROPS_LOGGED_EVERY
            log.error("usage rows are dropped: %d so far, %d are queued", self._dropped, len(self._queue))

    async def run(self) -> None:
        """Write what is recorded, until `close`."""
        pause = RETRY_FIRST
        while not self._closing.is_set():
            await self._batch_due()
            if await self._write_head():
                pause = RETRY_FIRST
            else:
                await _wait(self._closing, pause)
                pause = min(2 * pause, RETRY_LAST)

    async def close(self, timeout: float) -> int:
        """Take no more rows and write those that are queued; how many are left when `timeout` seconds are over."""
        for event in (self._closing, self._some, self._full):
            event.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._queue:
                    if not await self._write_head():
                        await asyncio.sleep(RETRY_FIRST)
        return len(self._queue)

    async def _batch_due(self) -> None:
        await self._some.wait()
        if not self._suspects:
            await _wait(self._full, LINGER)

    async def _write_head(self) -> bool:
        """One INSERT of rows at the head of the queue; false when the database could not be asked.

        After a refusal the rows before the bad one are found and written by halves, until it stands alone at the head.
        """
        async with self._writing:
            batch = list(islice(self._queue, max(1, self._suspects // 2) if self._suspects else BATCH))
            if not batch:
                return True
            try:
                await _insert(self._pool, batch)
            except RowError as refusal:
                self._refused(batch, refusal)
            except Exception as error:
                # Whatever it is, these rows are not written: they stay, and the only task that writes them goes on.
                self._failed(error)
                return False
            else:
                self._taken(len(batch))
                self._on_rows("written", len(batch))
            if self._gone:
                self._gone = False
                log.info("usage rows are written again, %d are queued", len(self._queue))
            return True

    def _refused(self, batch: list[UsageRow], refusal: RowError) -> None:
        self._suspects = len(batch)
        if len(batch) > 1:
            return
        # The database's own message quotes the row; the class of its error does not.
        log.error("the database refused the usage row %s: %s", batch[0].request_id, refusal)
        self._taken(1)
        self._on_rows("failed", 1)

    def _failed(self, error: Exception) -> None:
        self._on_error()
        if not self._gone:
            self._gone = True
            cause = error.__cause__ or error  # what asyncpg said of an outage
            # Only the first line: what follows may quote values.
            reason = str(cause).partition("\n")[0]
            log.error("usage rows cannot be written, %d queued: %s: %s", len(self._queue), type(cause).__name__, reason)

    def _taken(self, count: int) -> None:
        for _ in range(count):
            self._queue.popleft()
        self._suspects = max(0, self._suspects - count)
        if len(self._queue) < BATCH:
            self._full.clear()
        if not self._queue:
            self._some.clear()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


# --- SQL ----------------------------------------------------------------------------------------------------------

_INSERT = """
insert into usage (
    request_id, started_at, key_id, account_id, user_id, app_id, client_request_id, provider, model, upstream_model,
    stream, status, outcome, error_code, finish_reason,
    prompt_tokens, completion_tokens, cached_tokens, cache_write_tokens, reasoning_tokens, usage_source,
    latency_ms, ttft_ms
)
select * from unnest(
    $1::uuid[], $2::timestamptz[], $3::text[], $4::uuid[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[],
    $10::text[],
    $11::boolean[], $12::integer[], $13::text[], $14::text[], $15::text[],
    $16::bigint[], $17::bigint[], $18::bigint[], $19::bigint[], $20::bigint[], $21::text[],
    $22::integer[], $23::integer[]
)
on conflict (request_id) do nothing
"""

_VALUES = attrgetter(*(field.name for field in fields(UsageRow)))


async def _insert(pool: Pool, rows: list[UsageRow]) -> None:
    """Rows that are there already stay as they are. Raises RowError; after any other error nothing can be said."""
    columns = zip(*map(_VALUES, rows), strict=True)
    async with connection(pool, PATIENCE) as borrowed:
        with _refusals():
            await borrowed.execute(_INSERT, *map(list, columns), timeout=PATIENCE)


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (
        asyncpg.DataError,  # class 22: a NUL, a number out of range
        asyncpg.IntegrityConstraintViolationError,  # class 23: a check, a null
        ValueError,  # asyncpg could not encode an argument
    ) as error:
        raise RowError(type(error).__name__) from None

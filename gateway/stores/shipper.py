"""Brings usage to Postgres: from our own journal, from those that dead processes left on this machine, and from the
copies of those whose machine is gone.

Rule 1: what is read of a journal counts as shipped when its transaction is committed, not before. A shipper that is
killed in between ships it again, and the ledger counts it once.
Rule 2: rows that the database refuses go to the dead-letter file, found by halves; the others go on.
Rule 3: while the database is gone nothing is lost: the journals keep it.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from itertools import islice
from pathlib import Path
from time import monotonic

from gateway.protocol.errors import Unavailable
from gateway.stores.copy import Page, UsageCopy
from gateway.stores.dead_letters import DEAD_LETTERS, bury_lines, bury_rows
from gateway.stores.journal import Journal
from gateway.stores.ledger import Row, RowError, drop_months, make_partitions, unfolded, write_rows
from gateway.stores.postgres import Pool, kind_of
from gateway.stores.segments import Batch, Tail, abandoned, bytes_in
from gateway.stores.usage import UsageRow

log = logging.getLogger("gateway.stores.shipper")

RETRY_FIRST, RETRY_LAST = 0.1, 5.0  # seconds between attempts while the database is gone
ADOPT_EVERY = 5.0  # seconds
FLUSH_PATIENCE = 3.0  # seconds that `flushed` waits for a database that may be gone
PARTITIONS_EVERY = 3600.0  # seconds; they are made a month ahead


class Shipper:
    """`run` is a task of the application's; `close` comes before it ends, and before the journal's.

    `on_rows(result, count)` hears of every row once: written, or failed (the database refused it, or the disk had
    damaged it; it is in the dead-letter file). `on_error(kind)` hears of every attempt that failed. `on_adopted(row)`
    hears of every row of another, dead process, `interrupted` ones too, once it was written; of one that is in its
    journal and its copy it hears twice. `priced(row)` puts the cost on a row that nobody ended. None of them may raise.
    `keep_months`: whole months of rows beside this one; 0: all. `copy`: this process's, which is told what is shipped.
    `key`: of the audit chain.
    """

    def __init__(
        self,
        pool: Pool,
        journal: Journal,
        *,
        batch: int = 1000,
        linger: float = 0.2,
        keep_months: int = 0,
        on_rows: Callable[[str, int], None] = lambda result, count: None,
        on_error: Callable[[str], None] = lambda kind: None,
        on_adopted: Callable[[UsageRow], None] = lambda row: None,
        priced: Callable[[UsageRow], UsageRow] = lambda row: row,
        copy: UsageCopy | None = None,
        key: bytes | None = None,
    ) -> None:
        self._pool = pool
        self._journal = journal
        self._batch = batch
        self._linger = linger  # seconds that a row may wait for others to share its transaction
        self._keep_months = keep_months
        self._on_rows = on_rows
        self._on_error = on_error
        self._on_adopted = on_adopted
        self._priced = priced
        self._copy = copy
        self._key = key
        self._own = Tail(journal.folder)
        self._adopted: list[Tail] = []  # written by whoever holds `_working`
        self._working = asyncio.Lock()
        self._closing = asyncio.Event()
        self._hurry = asyncio.Event()  # somebody waits: rows do not linger
        self._shipped = 0  # of the rows that our own journal ended
        self._current_as_of = monotonic()  # seconds: what was ended before is in the database
        self._adopt_at = 0.0  # seconds, monotonic
        self._flushing: list[asyncio.Future[bool]] = []  # who waits in `flushed` for an attempt that begins later
        self._partitions_at = 0.0  # seconds, monotonic
        self._gone = False  # the last attempt failed; said once, not at every attempt

    @property
    def queued(self) -> int:
        """Rows of this process that are not in the database yet."""
        return self._journal.ended - self._shipped

    @property
    def lag_seconds(self) -> float:
        """At most so old is the oldest row that is not in the database yet."""
        return monotonic() - self._current_as_of if self.queued or self._adopted else 0.0

    async def run(self) -> None:
        """Ship what is written, until `close`."""
        pause = RETRY_FIRST
        while not self._closing.is_set():
            await self._due()
            if await self._ship_all():
                pause = RETRY_FIRST
            else:
                await _wait(self._closing, pause)
                pause = min(2 * pause, RETRY_LAST)

    async def flushed(self) -> None:
        """Returns when every row that our own journal has ended by now is in the database.

        Raises Unavailable when that fails, or takes longer than FLUSH_PATIENCE.
        """
        if not self.queued:
            return
        attempt: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._flushing.append(attempt)
        self._hurry.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_PATIENCE):
                if await attempt:
                    return
        raise Unavailable("the ledger is not up to date at the moment", retry_after=RETRY_LAST)

    async def close(self, timeout: float) -> int:
        """Ship what is there; how many rows of this process are left when `timeout` seconds are over.

        Those stay in the journal, and whoever starts next ships them.
        """
        self._closing.set()
        self._hurry.set()
        self._journal.fresh.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not await self._emptied():  # noqa: ASYNC110 - the database has no event for its return
                    await asyncio.sleep(RETRY_FIRST)
        if not self._working.locked():  # else they are free when the process ends
            for tail in self._adopted:
                tail.release()
            self._adopted.clear()
        return self.queued

    async def _emptied(self) -> bool:
        if not await self._ship_all() or self.queued:
            return False
        if self._own.idle:
            self._journal.retire()
            await self._ship_all()
        return True

    async def _due(self) -> None:
        """Returns when there are rows to ship, or folders to look for."""
        if not (self.queued or self._adopted or self._flushing):
            self._journal.fresh.clear()
            await _wait(self._journal.fresh, self._adopt_at - monotonic())
            self._current_as_of = monotonic()
        if self.queued < self._batch and not self._adopted:
            await _wait(self._hurry, self._linger)

    # --- shipping

    async def _ship_all(self) -> bool:
        """All of our own journal that is written by now, and a batch of each adopted one; false when that failed."""
        async with self._working:
            started = monotonic()
            await self._see_to_partitions()
            flushing, self._flushing = self._flushing, []
            self._hurry.clear()
            try:
                await self._ship_own()
                _answer(flushing, shipped=True)
                await self._adopt()
                for tail in list(self._adopted):
                    await self._ship_adopted(tail)
            except Exception as error:
                # Whatever it is, it is not shipped: it stays in the journals, and the only task that ships goes on.
                self._failed(error)
                _answer(flushing, shipped=False)
                return False
            if not self._adopted:
                self._current_as_of = started
            self._recovered()
            return True

    async def _ship_own(self) -> None:
        self._journal.write_unwritten()
        bound, ended = self._journal.reached, self._journal.ended - len(self._journal.unwritten)
        while self._own.position < bound and (batch := await asyncio.to_thread(self._own.read, self._batch, bound)):
            await self._ship(self._own, batch)
            self._shipped += len(batch.rows)
        self._own.move_to(bound)
        self._shipped = ended  # also when the disk damaged one
        await self._ship_unwritten()
        await self._journal.synced()  # a file that is still open keeps its room
        await self._remove_finished(self._own)

    async def _ship_unwritten(self) -> None:
        """From memory, because the disk is still full."""
        unwritten = self._journal.unwritten
        while rows := list(islice(unwritten, self._batch)):
            await self._write(rows)
            for row in rows:
                unwritten.popleft()
                self._own.forget(row.request_id)
            self._shipped += len(rows)
        while self._journal.unwritten_voids:
            self._own.forget(self._journal.unwritten_voids.pop())

    async def _ship_adopted(self, tail: Tail) -> None:
        """One batch. After the last, what its process began and never ended; then the folder is removed."""
        batch = await asyncio.to_thread(tail.read, self._batch)
        if batch is not None:
            await self._ship(tail, batch)
            self._tell_adopted(batch.rows)
            await self._remove_finished(tail)
            return
        left = tail.interrupted()
        left.rows = [self._priced(unfolded(row)) for row in left.rows]
        await self._ship(tail, left)
        self._tell_adopted(left.rows)
        self._adopted.remove(tail)
        self._journal.bytes -= bytes_in(tail.folder)
        tail.remove()
        log.info("the journal of a dead process is shipped, %d of its exchanges were interrupted", len(left.rows))

    async def _ship(self, tail: Tail, batch: Batch) -> None:
        for start in range(0, len(batch.rows), self._batch):
            await self._write(batch.rows[start : start + self._batch])
        await self._set_aside(batch.damaged, f"segment {batch.segment} of {tail.folder.name}")
        tail.advance(batch)

    async def _ship_orphans(self, copy: UsageCopy) -> None:
        """The copies of processes whose journals nobody may ever find; those that somebody does are counted once."""
        async with aclosing(copy.orphans()) as pages:
            async for page in pages:
                await self._ship_page(page)
                if page.last:
                    await copy.remove(page.process)
                    log.info("the copy of a dead process is shipped")

    async def _ship_page(self, page: Page) -> None:
        rows = [self._priced(row) if row.outcome == "interrupted" else row for row in page.rows]
        if rows:
            await self._write(rows)
        await self._set_aside(page.damaged, f"the copy of {page.process}")
        self._tell_adopted(rows)

    def _tell_adopted(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._on_adopted(unfolded(row))

    async def _remove_finished(self, tail: Tail) -> None:
        finished = tail.finished()
        if finished:
            removed = await asyncio.to_thread(_remove, finished)  # not in the line below: it reads `bytes` first
            self._journal.bytes -= removed

    # --- rows

    async def _write(self, rows: Sequence[Row]) -> None:
        refused = await self._write_halves(rows)
        if refused:
            await asyncio.to_thread(bury_rows, self._dead_letters, refused)
            self._on_rows("failed", len(refused))
            for row, error in refused:
                # The database's own message quotes the row; the class of its error does not.
                log.error(
                    "the database refused a usage row: %s", error, extra={"fields": {"request_id": row.request_id}}
                )
        if self._copy is not None:
            self._copy.forget([row.request_id for row in rows])

    async def _write_halves(self, rows: Sequence[Row]) -> list[tuple[UsageRow, RowError]]:
        """Writes all but those that the database refuses, which it returns."""
        try:
            self._on_rows("written", await write_rows(self._pool, rows, self._key))
        except RowError as error:
            if len(rows) == 1:
                return [(unfolded(rows[0]), error)]
            middle = len(rows) // 2
            return [*await self._write_halves(rows[:middle]), *await self._write_halves(rows[middle:])]
        return []

    async def _set_aside(self, damaged: Sequence[bytes], where: str) -> None:
        if damaged:
            await asyncio.to_thread(bury_lines, self._dead_letters, damaged)
            self._on_rows("failed", len(damaged))
            log.error("%d damaged records in %s", len(damaged), where)

    @property
    def _dead_letters(self) -> Path:
        return self._journal.root / DEAD_LETTERS

    # --- the rest

    async def _adopt(self) -> None:
        if monotonic() < self._adopt_at or self._closing.is_set():
            return
        self._adopt_at = monotonic() + ADOPT_EVERY
        for tail in await asyncio.to_thread(abandoned, self._journal.root):
            self._adopted.append(tail)
            self._journal.bytes += bytes_in(tail.folder)
        if self._copy is not None:
            await self._ship_orphans(self._copy)

    async def _see_to_partitions(self) -> None:
        """They are made ahead, and until then their rows lie in the default one: a failure is no hurry."""
        if monotonic() < self._partitions_at:
            return
        self._partitions_at = monotonic() + PARTITIONS_EVERY
        try:
            await make_partitions(self._pool)
            if self._keep_months:
                await drop_months(self._pool, self._keep_months, self._key)
        except Exception as error:
            # Not what we are here for: nothing of it may hold up the rows.
            self._on_error(kind_of(error))
            self._partitions_at = monotonic() + 60
            log.warning("the partitions of usage are not up to date: %s", _reason(error))

    def _failed(self, error: Exception) -> None:
        self._on_error(kind_of(error))
        if not self._gone:
            self._gone = True
            log.error("usage cannot be shipped, %d rows are queued: %s", self.queued, _reason(error))

    def _recovered(self) -> None:
        if self._gone:
            self._gone = False
            log.info("usage is shipped again, %d rows are queued", self.queued)


def _answer(flushing: Iterable[asyncio.Future[bool]], *, shipped: bool) -> None:
    for attempt in flushing:
        if not attempt.done():
            attempt.set_result(shipped)


def _reason(error: Exception) -> str:
    """Only the first line: what follows may quote values."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _remove(paths: Sequence[Path]) -> int:
    """How many bytes they had."""
    size = 0
    for path in paths:
        with suppress(FileNotFoundError):
            size += path.stat().st_size
            path.unlink()
    return size


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()

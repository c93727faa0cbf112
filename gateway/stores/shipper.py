"""Brings usage from the journals on this machine to Postgres: our own, and those that dead processes left.

Rule 1: what is read of a journal counts as shipped when its transaction is committed, not before. A shipper that is
killed in between ships it again, and the ledger counts it once.
Rule 2: rows that the database refuses go to the dead-letter file, found by halves; the others go on.
Rule 3: while the database is gone nothing is lost: the journals keep it.
"""

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from time import monotonic

import orjson

from gateway.stores.journal import Journal
from gateway.stores.ledger import RowError, drop_months, make_partitions, write_rows
from gateway.stores.postgres import Pool
from gateway.stores.segments import Batch, Tail, abandoned, bytes_in
from gateway.stores.usage import UsageRow

log = logging.getLogger("gateway.stores.shipper")

RETRY_FIRST, RETRY_LAST = 0.1, 5.0  # seconds between attempts while the database is gone
ADOPT_EVERY = 5.0  # seconds
PARTITIONS_EVERY = 3600.0  # seconds; they are made a month ahead
DEAD_LETTERS = "dead-letter.jsonl"  # in the journals' folder: a line for each row that the database refused


class Shipper:
    """`run` is a task of the application's; `close` comes before it ends, and before the journal's.

    `on_rows(result, count)` hears of every row once: written, or failed (the database refused it, or the disk had
    damaged it; it is in the dead-letter file). `on_error()` hears of every attempt that failed. `priced(row)` puts the
    cost on a row that nobody ended. None of them may raise. `keep_months`: whole months of rows beside
    this one; 0: all.
    """

    def __init__(
        self,
        pool: Pool,
        journal: Journal,
        *,
        batch: int = 500,
        linger: float = 0.2,
        keep_months: int = 0,
        on_rows: Callable[[str, int], None] = lambda result, count: None,
        on_error: Callable[[], None] = lambda: None,
        priced: Callable[[UsageRow], UsageRow] = lambda row: row,
    ) -> None:
        self._pool = pool
        self._journal = journal
        self._batch = batch
        self._linger = linger  # seconds that a row may wait for others to share its transaction
        self._keep_months = keep_months
        self._on_rows = on_rows
        self._on_error = on_error
        self._priced = priced
        self._own = Tail(journal.folder)
        self._adopted: list[Tail] = []  # written by whoever holds `_working`
        self._working = asyncio.Lock()
        self._closing = asyncio.Event()
        self._shipped = 0  # of the rows that our own journal ended
        self._current_as_of = monotonic()  # seconds: what was ended before is in the database
        self._adopt_at = 0.0  # seconds, monotonic
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

    async def close(self, timeout: float) -> int:
        """Ship what is there; how many rows of this process are left when `timeout` seconds are over.

        Those stay in the journal, and whoever starts next ships them.
        """
        self._closing.set()
        self._journal.fresh.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not await self._flushed():  # noqa: ASYNC110 - the database has no event for its return
                    await asyncio.sleep(RETRY_FIRST)
        if not self._working.locked():  # else they are free when the process ends
            for tail in self._adopted:
                tail.release()
            self._adopted.clear()
        return self.queued

    async def _flushed(self) -> bool:
        if not await self._ship_all() or self.queued:
            return False
        if self._own.idle:
            self._journal.retire()
            await self._ship_all()
        return True

    async def _due(self) -> None:
        """Returns when there are rows to ship, or folders to look for."""
        if not self.queued and not self._adopted:
            self._journal.fresh.clear()
            await _wait(self._journal.fresh, self._adopt_at - monotonic())
            self._current_as_of = monotonic()
        if self.queued < self._batch and not self._adopted:
            await _wait(self._closing, self._linger)

    # --- shipping

    async def _ship_all(self) -> bool:
        """All of our own journal that is written by now, and a batch of each adopted one; false when that failed."""
        async with self._working:
            started = monotonic()
            await self._see_to_partitions()
            try:
                await self._ship_own()
                await self._adopt()
                for tail in list(self._adopted):
                    await self._ship_adopted(tail)
            except Exception as error:
                # Whatever it is, it is not shipped: it stays in the journals, and the only task that ships goes on.
                self._failed(error)
                return False
            if not self._adopted:
                self._current_as_of = started
            self._recovered()
            return True

    async def _ship_own(self) -> None:
        self._journal.write_unwritten()
        bound, ended = self._journal.reached, self._journal.ended - len(self._journal.unwritten)
        while batch := await asyncio.to_thread(self._own.read, self._batch, bound):
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
            await self._remove_finished(tail)
            return
        left = tail.interrupted()
        left.rows = [self._priced(row) for row in left.rows]
        await self._ship(tail, left)
        self._adopted.remove(tail)
        self._journal.bytes -= bytes_in(tail.folder)
        tail.remove()
        log.info("the journal of a dead process is shipped, %d of its exchanges were interrupted", len(left.rows))

    async def _ship(self, tail: Tail, batch: Batch) -> None:
        for start in range(0, len(batch.rows), self._batch):
            await self._write(batch.rows[start : start + self._batch])
        if batch.damaged:
            await asyncio.to_thread(_bury_lines, self._dead_letters, batch.damaged)
            self._on_rows("failed", len(batch.damaged))
            log.error("%d damaged records in segment %d of %s", len(batch.damaged), batch.segment, tail.folder.name)
        tail.advance(batch)

    async def _remove_finished(self, tail: Tail) -> None:
        finished = tail.finished()
        if finished:
            removed = await asyncio.to_thread(_remove, finished)  # not in the line below: it reads `bytes` first
            self._journal.bytes -= removed

    # --- rows

    async def _write(self, rows: Sequence[UsageRow]) -> None:
        refused = await self._write_halves(rows)
        if refused:
            await asyncio.to_thread(_bury_rows, self._dead_letters, refused)
            self._on_rows("failed", len(refused))
            for row, error in refused:
                # The database's own message quotes the row; the class of its error does not.
                log.error("the database refused the usage row %s: %s", row.request_id, error)

    async def _write_halves(self, rows: Sequence[UsageRow]) -> list[tuple[UsageRow, RowError]]:
        """Writes all but those that the database refuses, which it returns."""
        try:
            self._on_rows("written", await write_rows(self._pool, rows))
        except RowError as error:
            if len(rows) == 1:
                return [(rows[0], error)]
            middle = len(rows) // 2
            return [*await self._write_halves(rows[:middle]), *await self._write_halves(rows[middle:])]
        return []

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

    async def _see_to_partitions(self) -> None:
        """They are made ahead, and until then their rows lie in the default one: a failure is no hurry."""
        if monotonic() < self._partitions_at:
            return
        self._partitions_at = monotonic() + PARTITIONS_EVERY
        try:
            await make_partitions(self._pool)
            if self._keep_months:
                await drop_months(self._pool, self._keep_months)
        except Exception as error:
            # Not what we are here for: nothing of it may hold up the rows.
            self._on_error()
            self._partitions_at = monotonic() + 60
            log.warning("the partitions of usage are not up to date: %s", _reason(error))

    def _failed(self, error: Exception) -> None:
        self._on_error()
        if not self._gone:
            self._gone = True
            log.error("usage cannot be shipped, %d rows are queued: %s", self.queued, _reason(error))

    def _recovered(self) -> None:
        if self._gone:
            self._gone = False
            log.info("usage is shipped again, %d rows are queued", self.queued)


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


# --- dead letters -------------------------------------------------------------------------------------------------


def _bury_rows(path: Path, refused: Sequence[tuple[UsageRow, RowError]]) -> None:
    _bury(path, [{"error": str(error), "row": asdict(row)} for row, error in refused])


def _bury_lines(path: Path, lines: Sequence[bytes]) -> None:
    _bury(path, [{"error": "damaged record", "record": line.decode("latin-1")} for line in lines])


def _bury(path: Path, letters: Sequence[dict[str, object]]) -> None:
    at = datetime.now(UTC)
    lines = b"".join(orjson.dumps({"at": at, **letter}) + b"\n" for letter in letters)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        if os.write(file, lines) < len(lines):
            raise OSError(errno.ENOSPC, "no space left on device")
        os.fsync(file)
    finally:
        os.close(file)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()

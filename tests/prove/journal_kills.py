"""Kills processes that do nothing but write journals, and stops their Postgres in the middle; then counts what is there.

What a gateway under load hardly shows in minutes: segments of a journal that fill and are removed (of 64 KiB here, of
16 MiB there), six hundred exchanges a second, and shippers that die between a commit and the note of it, every time.
"""

import asyncio
import os
import random
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

from gateway.stores.journal import Journal
from gateway.stores.migrations import migrate
from gateway.stores.shipper import Shipper
from tests.prove.ledger import LEDGER, unbalanced_rollups
from tests.prove.postgres import running_postgres
from tests.support.process import until

WRITERS = 2  # processes at a time
RATE = 300  # exchanges a second, each
BUSY = 200  # lines that a process has told before it is killed

# --- what must be there -------------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """What the processes told, and after `compare` what of it the database has."""

    about: set[str] = field(default_factory=set)
    begun: set[str] = field(default_factory=set)
    ending: dict[str, tuple[int, int]] = field(default_factory=dict)
    ended: dict[str, tuple[int, int]] = field(default_factory=dict)
    voiding: set[str] = field(default_factory=set)
    voided: set[str] = field(default_factory=set)
    kills: int = 0
    stops: int = 0

    rows: int = 0
    interrupted: int = 0
    ended_missing: int = 0
    begun_missing: int = 0
    wrong: int = 0  # not as it was ended, or never begun
    doubled: int = 0
    unbalanced: int = 0  # sums that are not those of the rows

    def hear(self, line: str) -> None:
        kind, request_id, *figures = line.split()
        if kind in ("ending", "ended"):
            prompt, completion = figures
            getattr(self, kind)[request_id] = int(prompt), int(completion)
        else:
            getattr(self, kind).add(request_id)

    async def compare(self, pool: asyncpg.Pool) -> None:
        query = "select request_id::text, outcome, prompt_tokens, completion_tokens from usage"
        rows = await pool.fetch(query)
        found = {row["request_id"]: row for row in rows}
        self.rows, self.doubled = len(rows), len(rows) - len(found)
        self.interrupted = sum(row["outcome"] == "interrupted" for row in rows)
        self.ended_missing = sum(found.get(one, {"outcome": ""})["outcome"] != "ok" for one in self.ended)
        self.begun_missing = len(self.begun - self.voiding - found.keys())
        self.wrong = sum(not self._is_right(row) for row in rows)
        self.unbalanced = len(await pool.fetch(LEDGER)) + await unbalanced_rollups(pool)

    def _is_right(self, row: asyncpg.Record) -> bool:
        request_id = row["request_id"]
        if row["outcome"] == "interrupted":
            return request_id in self.about and request_id not in self.ended and request_id not in self.voided
        return self.ending.get(request_id) == (row["prompt_tokens"], row["completion_tokens"])

    @property
    def holds(self) -> bool:
        return not (self.ended_missing or self.begun_missing or self.wrong or self.doubled or self.unbalanced)

    def __str__(self) -> str:
        return (
            f"journals through {self.kills} kill -9 of their writers and {self.stops} immediate stops of Postgres: "
            f"{len(self.begun)} begun, {len(self.ended)} ended, {self.rows} rows, {self.interrupted} interrupted; "
            f"{self.ended_missing} ended missing, {self.begun_missing} begun missing, {self.wrong} wrong, "
            f"{self.doubled} doubled, {self.unbalanced} sums out of balance"
        )


# --- what is killed -----------------------------------------------------------------------------------------------


class Writer:
    """One process of tests/support/journal_writer.py, and all it told."""

    def __init__(self, process: asyncio.subprocess.Process, ledger: Ledger) -> None:
        self._process = process
        self._listening = asyncio.create_task(self._listen(ledger))
        self._told = 0  # lines

    def is_busy(self) -> bool:
        return self._told > BUSY

    async def _listen(self, ledger: Ledger) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            if line.endswith(b"\n"):
                ledger.hear(line.decode())
                self._told += 1

    async def end(self, how: signal.Signals) -> int:
        with suppress(ProcessLookupError):
            self._process.send_signal(how)
        await self._listening
        return await self._process.wait()


async def start_writer(root: Path, database_url: str, ledger: Ledger) -> Writer:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.journal_writer", str(root), database_url, str(RATE),
        stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2], env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    return Writer(process, ledger)


# --- the loop -----------------------------------------------------------------------------------------------------


async def run(data: Path, *, kills: int, stops: int) -> Ledger:
    """Everything it needs is made in `data`."""
    ledger = Ledger()
    root = data / "journal"
    async with running_postgres(data / "servers") as postgres:
        await migrate(postgres.url)
        writers = [await start_writer(root, postgres.url, ledger) for _ in range(WRITERS)]
        stop_before = {(number + 1) * kills // (stops + 1) for number in range(stops)}
        for number in range(kills):
            victim = writers[number % WRITERS]
            await until(victim.is_busy)
            await asyncio.sleep(random.random())
            if number in stop_before:
                await postgres.stop_at_once()
                ledger.stops += 1
            assert await victim.end(signal.SIGKILL) == -signal.SIGKILL
            ledger.kills += 1
            writers[number % WRITERS] = await start_writer(root, postgres.url, ledger)
            if number in stop_before:
                await postgres.start()
        for writer in writers:
            await until(writer.is_busy)
            assert await writer.end(signal.SIGTERM) == 0
        async with asyncpg.create_pool(postgres.url, min_size=1, max_size=2) as pool:
            await _ship_the_rest(pool, root)
            await ledger.compare(pool)
    return ledger


async def _ship_the_rest(pool: asyncpg.Pool, root: Path) -> None:
    """What the next start does with the folders of the dead."""
    journal = Journal(root)
    shipper = Shipper(pool, journal)
    shipping = asyncio.create_task(shipper.run())
    await until(lambda: [path for path in root.iterdir() if path.is_dir()] == [journal.folder])
    assert await shipper.close(20) == 0
    shipping.cancel()
    await asyncio.gather(shipping, return_exceptions=True)
    journal.close()

import asyncio
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import asyncpg
import pytest

from gateway.protocol.errors import Unavailable
from gateway.stores import ledger as ledger_module
from gateway.stores import segments as segments_module
from gateway.stores import shipper as shipper_module
from gateway.stores.dead_letters import DEAD_LETTERS
from gateway.stores.journal import Journal, JournalFull
from gateway.stores.migrations import migrate
from gateway.stores.segments import abandoned, bytes_in, path_of, segments_of
from gateway.stores.shipper import Shipper
from gateway.stores.usage import UsageRow
from tests.prove.ledger import LEDGER
from tests.prove.postgres import Postgres
from tests.support.journal_writer import begun, row
from tests.support.proxy import proxied_postgres

pytestmark = pytest.mark.integration


class Heard:
    """What a shipper told its hooks."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.errors = 0
        self.adopted: list[UsageRow] = []

    def on_rows(self, result: str, count: int) -> None:
        self.rows[result] += count

    def on_error(self, kind: str) -> None:
        self.errors += 1


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


@pytest.fixture
async def shipper(pool: asyncpg.Pool, journal: Journal, heard: Heard) -> AsyncIterator[Shipper]:
    """One that runs."""
    async with running(pool, journal, heard) as shipper:
        yield shipper


@asynccontextmanager
async def running(pool: asyncpg.Pool, journal: Journal, heard: Heard, **settings: Any) -> AsyncIterator[Shipper]:
    hooks: dict[str, Any] = {
        "on_rows": heard.on_rows,
        "on_error": heard.on_error,
        "on_adopted": heard.adopted.append,
    }
    shipper = Shipper(pool, journal, **{**hooks, "linger": 0.02, **settings})
    task = asyncio.create_task(shipper.run())
    try:
        yield shipper
    finally:
        await shipper.close(1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        journal.close()


def die(journal: Journal) -> None:
    """What a kill -9 does to it: nothing is flushed, and its lock is free."""
    if journal._file >= 0:
        os.close(journal._file)
    os.close(journal._lock)
    journal._thread.shutdown()


async def until(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = monotonic() + seconds
    while not true():
        assert monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.01)


async def outcomes(pool: asyncpg.Pool) -> dict[str, str]:
    return {one[0]: one[1] for one in await pool.fetch("select request_id::text, outcome from usage")}


async def balanced(pool: asyncpg.Pool) -> bool:
    """The sums are those of the rows."""
    return await pool.fetch(LEDGER) == []


def exchanges(journal: Journal, count: int) -> list[UsageRow]:
    """Begun and ended."""
    rows = []
    for _ in range(count):
        first = begun()
        journal.begin(first)
        rows.append(replace(first, outcome="ok", completion_tokens=7))
        journal.end(rows[-1])
    return rows


# --- shipping -----------------------------------------------------------------------------------------------------


async def test_what_ends_is_soon_in_the_database_and_what_runs_is_not(
    shipper: Shipper, journal: Journal, pool: asyncpg.Pool, heard: Heard
) -> None:
    journal.begin(begun())
    rows = exchanges(journal, 1200)
    assert shipper.queued == 1200
    await until(lambda: shipper.queued == 0)
    assert await outcomes(pool) == {one.request_id: "ok" for one in rows}
    assert await balanced(pool)
    assert heard.rows == {"written": 1200}


async def test_lag_is_the_age_of_what_waits(shipper: Shipper, journal: Journal, pool: asyncpg.Pool) -> None:
    assert shipper.lag_seconds == 0
    await asyncio.sleep(0.5)
    async with pool.acquire() as holder, holder.transaction():
        await holder.execute("lock table usage in exclusive mode")
        written = monotonic()
        exchanges(journal, 1)
        await asyncio.sleep(0.3)
        assert -0.1 < shipper.lag_seconds - (monotonic() - written) < 0.1
    await until(lambda: shipper.queued == 0)
    assert shipper.lag_seconds == 0


async def test_segments_are_removed_when_they_are_shipped(pool: asyncpg.Pool, tmp_path: Path, heard: Heard) -> None:
    journal = Journal(tmp_path, segment_bytes=8192)
    async with running(pool, journal, heard) as shipper:
        long = begun()
        journal.begin(long)
        for _ in range(5):
            exchanges(journal, 100)
            await until(lambda: shipper.queued == 0)
        await until(lambda: len(segments_of(journal.folder)) <= 2)
        assert 1 in segments_of(journal.folder), "an exchange that began in it has not ended"
        await until(lambda: journal.bytes == bytes_in(journal.folder))
        journal.end(replace(long, outcome="ok"))
        await until(lambda: 1 not in segments_of(journal.folder))
    assert list(tmp_path.iterdir()) == [], "nothing was left to ship"
    assert await balanced(pool)


async def test_a_voided_exchange_has_no_row(
    shipper: Shipper, journal: Journal, pool: asyncpg.Pool, tmp_path: Path
) -> None:
    never_sent = begun()
    journal.begin(never_sent)
    journal.void(never_sent.request_id)
    rows = exchanges(journal, 1)
    await until(lambda: shipper.queued == 0)
    assert set(await outcomes(pool)) == {rows[0].request_id}


async def test_rows_of_a_clock_that_goes_back_an_hour_are_rows_like_others(
    shipper: Shipper, journal: Journal, pool: asyncpg.Pool
) -> None:
    now = datetime.now(UTC)
    for at in (now, now - timedelta(hours=1), now):
        first = begun(started_at=at)
        journal.begin(first)
        journal.tick(first.request_id, 1, 1)
        journal.end(replace(first, outcome="ok", latency_ms=0))
    await until(lambda: shipper.queued == 0)
    assert len(await outcomes(pool)) == 3
    assert await balanced(pool)


async def test_partitions_of_this_month_and_the_next_are_made(shipper: Shipper, pool: asyncpg.Pool) -> None:
    query = "select count(*) from pg_inherits where inhparent = 'usage'::regclass"
    async with asyncio.timeout(10):
        while await pool.fetchval(query) < 3:
            await asyncio.sleep(0.01)


async def test_many_rows_a_second_pass(
    shipper: Shipper, journal: Journal, pool: asyncpg.Pool, figure: Callable[[str], None]
) -> None:
    started = perf_counter()
    exchanges(journal, 10_000)
    written = perf_counter()
    await until(lambda: shipper.queued == 0, seconds=30)
    seconds = perf_counter() - written
    figure(f"shipper: {10_000 / seconds:.0f} rows a second, begun and ended in {(written - started) * 100:.0f} µs each")
    assert await pool.fetchval("select sum(requests) from usage_hourly") == 10_000


# --- for those who read the ledger ------------------------------------------------------------------------------


async def test_flushed_returns_when_all_that_had_ended_is_in_the_database(
    pool: asyncpg.Pool, journal: Journal, heard: Heard
) -> None:
    async with running(pool, journal, heard, linger=60.0) as shipper:
        await shipper.flushed()
        for number in range(1, 30):
            exchanges(journal, number)
            if number % 2:
                await asyncio.sleep(0)
            await asyncio.gather(shipper.flushed(), shipper.flushed())
            assert len(await outcomes(pool)) == number * (number + 1) // 2
        exchanges(journal, 1)
        await asyncio.sleep(0.2)
        assert shipper.queued == 1, "rows that nobody waits for linger as before"
    assert heard.adopted == [], "our own rows are not from the dead"


async def test_flushed_waits_for_the_attempt_that_began_after_it_was_called(
    pool: asyncpg.Pool, shipper: Shipper, journal: Journal
) -> None:
    query = "select count(*) from pg_locks where not granted and relation = 'usage'::regclass"
    async with pool.acquire() as holder:
        async with holder.transaction():
            await holder.execute("lock table usage in exclusive mode")
            exchanges(journal, 1)
            async with asyncio.timeout(10):
                while not await pool.fetchval(query):
                    await asyncio.sleep(0.01)
            exchanges(journal, 1)
            flushed = asyncio.create_task(shipper.flushed())
            await asyncio.sleep(0.05)
            assert not flushed.done()
        await flushed
    assert len(await outcomes(pool)) == 2


@pytest.mark.parametrize("how", ["stalls", "is gone"])
async def test_flushed_says_within_seconds_that_the_database_does_not_answer(
    database_url: str, journal: Journal, heard: Heard, how: str, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipper_module, "FLUSH_PATIENCE", 0.5)
    monkeypatch.setattr(shipper_module, "RETRY_LAST", 0.1)
    monkeypatch.setattr(ledger_module, "PATIENCE", 1.0)
    async with (
        proxied_postgres(database_url) as (proxy, url),
        asyncpg.create_pool(url, min_size=1) as distant,
        running(distant, journal, heard) as shipper,
    ):
        if how == "stalls":
            proxy.stall()
        else:
            await proxy.cut()
        exchanges(journal, 3)
        started = perf_counter()
        with pytest.raises(Unavailable):
            await shipper.flushed()
        assert perf_counter() - started < 2
        if how == "stalls":
            proxy.resume()
        else:
            await proxy.start()
        await until(lambda: not shipper.queued)
        await shipper.flushed()
    assert len(await outcomes(pool)) == 3


# --- after a death ------------------------------------------------------------------------------------------------


async def test_what_a_dead_process_began_and_ended_and_how_far_it_was_is_recorded(
    pool: asyncpg.Pool, tmp_path: Path, heard: Heard
) -> None:
    dead = Journal(tmp_path)
    ended = exchanges(dead, 700)
    running_one, silent = begun(), begun(prompt_tokens=33)
    for one in (running_one, silent):
        dead.begin(one)
    dead.tick(running_one.request_id, 40, 41)
    die(dead)
    priced = {running_one.request_id: 99, silent.request_id: 98}
    async with running(
        pool, Journal(tmp_path), heard, priced=lambda one: replace(one, cost_micros=priced[one.request_id])
    ):
        started = monotonic()
        await until(lambda: not dead.folder.exists())
        assert monotonic() - started < 2
    assert await outcomes(pool) == {
        **{one.request_id: "ok" for one in ended},
        running_one.request_id: "interrupted",
        silent.request_id: "interrupted",
    }
    query = "select prompt_tokens, completion_tokens, cost_micros from usage where request_id = $1"
    for one, figures in ((running_one, (40, 41, 99)), (silent, (33, 0, 98))):
        assert [tuple(found) for found in await pool.fetch(query, one.request_id)] == [figures]
    assert await balanced(pool)
    assert heard.rows == {"written": 702}
    assert {one.request_id: one.outcome for one in heard.adopted} == await outcomes(pool)
    assert len(heard.adopted) == 702
    assert [one.cost_micros for one in heard.adopted if one.outcome == "interrupted"] == [99, 98]
    assert list(tmp_path.iterdir()) == []


async def test_a_process_that_dies_while_others_run_is_adopted_by_one_of_them(
    pool: asyncpg.Pool, tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipper_module, "ADOPT_EVERY", 0.1)
    async with (
        running(pool, Journal(tmp_path), heard),
        running(pool, Journal(tmp_path), heard),
    ):
        for _ in range(5):
            dead = Journal(tmp_path)
            exchanges(dead, 50)
            dead.begin(begun())
            await asyncio.sleep(0.2)
            assert dead.folder.exists(), "a living process is left alone"
            die(dead)
            await until(lambda folder=dead.folder: not folder.exists())  # type: ignore[misc]
    assert Counter((await outcomes(pool)).values()) == {"ok": 250, "interrupted": 5}
    assert heard.rows == {"written": 255}
    assert await balanced(pool)


async def test_a_kill_between_the_commit_and_its_offset_counts_nothing_twice(
    pool: asyncpg.Pool, tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = Journal(tmp_path)
    rows = exchanges(dead, 1200)
    dead.begin(begun())
    with monkeypatch.context() as patch:
        patch.setattr(segments_module, "_write_shipped", lambda folder, position: None)
        shipper = Shipper(pool, dead, on_rows=heard.on_rows)
        assert await shipper._ship_all()
    assert len(await outcomes(pool)) == 1200
    die(dead)
    assert not (dead.folder / "shipped").exists()
    async with running(pool, Journal(tmp_path), heard):
        await until(lambda: not dead.folder.exists())
    assert len(await outcomes(pool)) == len(rows) + 1
    assert heard.rows == {"written": 1201}
    assert await balanced(pool)


async def test_two_that_read_the_same_folder_count_each_row_once(
    pool: asyncpg.Pool, tmp_path: Path, heard: Heard
) -> None:
    """Locks over a network are a hint: two hosts may adopt the same folder."""
    roots = [tmp_path / "one", tmp_path / "two"]
    dead = Journal(roots[0])
    exchanges(dead, 1500)
    for _ in range(20):
        dead.begin(begun())
    die(dead)
    shutil.copytree(dead.folder, roots[1] / dead.folder.name)
    async with running(pool, Journal(roots[0]), heard), running(pool, Journal(roots[1]), heard):
        await until(lambda: not any((root / dead.folder.name).exists() for root in roots))
    assert Counter((await outcomes(pool)).values()) == {"ok": 1500, "interrupted": 20}
    assert heard.rows == {"written": 1520}
    assert await balanced(pool)


async def test_an_end_that_comes_after_its_exchange_was_taken_for_dead_replaces_the_guess(
    pool: asyncpg.Pool, tmp_path: Path, heard: Heard
) -> None:
    journal = Journal(tmp_path / "alive")
    one = begun()
    journal.begin(one)
    shutil.copytree(journal.folder, tmp_path / "copy" / journal.folder.name)
    async with running(pool, Journal(tmp_path / "copy"), heard):
        await until(lambda: heard.rows["written"] == 1)
    assert await outcomes(pool) == {one.request_id: "interrupted"}
    async with running(pool, journal, heard) as shipper:
        journal.end(replace(one, outcome="ok", completion_tokens=12, cost_micros=34))
        await until(lambda: shipper.queued == 0)
    assert await outcomes(pool) == {one.request_id: "ok"}
    assert await balanced(pool)
    assert heard.rows == {"written": 1}


# --- poison -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [[0], [999], [499, 500], [3, 250, 251, 700, 999]])
async def test_rows_that_the_database_refuses_are_set_aside_and_the_others_go_on(
    shipper: Shipper,
    journal: Journal,
    pool: asyncpg.Pool,
    heard: Heard,
    positions: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    poisons: list[dict[str, Any]] = [
        {"user_id": "canary\0"},
        {"usage_source": "canary"},
        {"latency_ms": 2**40},
        {"account_id": "canary"},
        {"model": None},
    ]
    rows = [row() for _ in range(1000)]
    for position, poison in zip(positions, poisons, strict=False):
        rows[position] = replace(rows[position], **poison)
    with caplog.at_level(logging.ERROR):
        for one in rows:
            journal.end(one)
        await until(lambda: shipper.queued == 0)
    assert heard.rows == {"written": 1000 - len(positions), "failed": len(positions)}
    assert heard.errors == 0
    assert len(await outcomes(pool)) == 1000 - len(positions)
    assert await balanced(pool)
    letters = journal.root / DEAD_LETTERS
    assert letters.stat().st_mode & 0o777 == 0o600
    buried = [json.loads(line) for line in letters.read_text().splitlines()]
    assert [letter["row"]["request_id"] for letter in buried] == [rows[position].request_id for position in positions]
    assert "canary" not in caplog.text


async def test_damaged_records_are_set_aside_too(
    pool: asyncpg.Pool, tmp_path: Path, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    dead = Journal(tmp_path)
    rows = [row() for _ in range(3)]
    for one in rows:
        dead.end(one)
    die(dead)
    path = path_of(dead.folder, 1)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + lines[2].replace(b"openai", b"0penai") + lines[3])
    with caplog.at_level(logging.ERROR):
        async with running(pool, Journal(tmp_path), heard):
            await until(lambda: not dead.folder.exists())
    assert set(await outcomes(pool)) == {rows[0].request_id, rows[2].request_id}
    assert heard.rows == {"written": 2, "failed": 1}
    assert rows[1].request_id in (tmp_path / DEAD_LETTERS).read_text()
    assert "1 damaged records" in caplog.text


# --- when something is gone ---------------------------------------------------------------------------------------


async def test_rows_outlive_a_database_that_is_gone_and_one_that_stalls(
    database_url: str, journal: Journal, heard: Heard, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "PATIENCE", 0.2)
    monkeypatch.setattr(shipper_module, "RETRY_LAST", 0.3)
    async with (
        proxied_postgres(database_url) as (proxy, url),
        asyncpg.create_pool(url, min_size=1) as distant,
        running(distant, journal, heard) as shipper,
    ):
        for how in ("stall", "cut"):
            heard.errors = 0
            if how == "stall":
                proxy.stall()
            else:
                await proxy.cut()
            exchanges(journal, 700)
            await until(lambda: heard.errors >= 2)
            assert shipper.queued == 700
            if how == "stall":
                proxy.resume()
            else:
                await proxy.start()
            await until(lambda: shipper.queued == 0)
    assert len(await outcomes(pool)) == 1400
    assert await balanced(pool)


async def test_an_immediate_stop_of_postgres_loses_and_doubles_nothing(
    tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipper_module, "RETRY_LAST", 0.3)
    postgres = Postgres(tmp_path / "servers")
    await postgres.start()
    try:
        await migrate(postgres.url)
        journal = Journal(tmp_path / "journal")
        async with (
            asyncpg.create_pool(postgres.url, min_size=1, max_size=3) as pool,
            running(pool, journal, heard) as shipper,
        ):
            rows = exchanges(journal, 3000)
            await until(lambda: heard.rows["written"] > 0)
            await postgres.stop_at_once()
            rows += exchanges(journal, 1000)
            await until(lambda: heard.errors > 0)
            await postgres.start()
            await until(lambda: shipper.queued == 0)
            assert await outcomes(pool) == {one.request_id: "ok" for one in rows}
            assert await balanced(pool)
    finally:
        await postgres.stop()


async def test_an_error_that_is_no_fault_of_the_rows_costs_none_of_them(
    shipper: Shipper, journal: Journal, heard: Heard, pool: asyncpg.Pool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "gateway.stores.shipper"):
        await pool.execute("alter table usage rename to gone")
        exchanges(journal, 1)
        await until(lambda: heard.errors >= 2)
        assert shipper.queued == 1
        await pool.execute("alter table gone rename to usage")
        await until(lambda: "is shipped again" in caplog.text)
    assert heard.rows == {"written": 1}
    assert [record.levelname for record in caplog.records if "ship" in record.message] == ["ERROR", "INFO"]


async def test_a_journal_that_was_full_takes_requests_again_when_it_is_shipped(
    pool: asyncpg.Pool, tmp_path: Path, heard: Heard
) -> None:
    journal = Journal(tmp_path, max_bytes=1 << 16)
    rows: list[UsageRow] = []
    with pytest.raises(JournalFull):
        while True:
            rows += exchanges(journal, 1)
    async with running(pool, journal, heard) as shipper:
        await until(lambda: shipper.queued == 0 and journal.bytes < 1 << 12)
        rows += exchanges(journal, 20)
        await until(lambda: shipper.queued == 0)
    assert set(await outcomes(pool)) == {one.request_id for one in rows}


async def test_rows_that_only_memory_holds_are_shipped_from_there(
    pool: asyncpg.Pool, tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    one, never_sent = begun(), begun()
    journal.begin(one)
    journal.begin(never_sent)
    write = os.write

    def full(file: int, data: bytes) -> int:
        return 0 if file == journal._file or b"columns" in data else write(file, data)

    monkeypatch.setattr(os, "write", full)
    journal.end(replace(one, outcome="ok"))
    journal.void(never_sent.request_id)
    assert len(journal.unwritten) == 1
    async with running(pool, journal, heard) as shipper:
        await until(lambda: shipper.queued == 0)
        assert not journal.unwritten
        monkeypatch.undo()
    assert await outcomes(pool) == {one.request_id: "ok"}
    assert list(tmp_path.iterdir()) == [], "neither pins its segment"


# --- closing ------------------------------------------------------------------------------------------------------


async def test_closing_ships_what_is_there_and_leaves_no_folder(
    pool: asyncpg.Pool, journal: Journal, heard: Heard
) -> None:
    async with running(pool, journal, heard) as shipper:
        rows = exchanges(journal, 1200)
        assert await shipper.close(10) == 0
    assert len(await outcomes(pool)) == len(rows)
    assert list(journal.root.iterdir()) == []


async def test_closing_without_a_database_gives_up_in_time_and_the_next_start_ships(
    pool: asyncpg.Pool, database_url: str, tmp_path: Path, heard: Heard
) -> None:
    closed = await asyncpg.create_pool(database_url, min_size=0)
    await closed.close()
    journal = Journal(tmp_path)
    async with running(closed, journal, heard) as shipper:
        exchanges(journal, 7)
        started = perf_counter()
        assert await shipper.close(0.5) == 7
        assert perf_counter() - started < 2
    assert journal.folder.exists()
    async with running(pool, Journal(tmp_path), heard):
        await until(lambda: not journal.folder.exists())
    assert len(await outcomes(pool)) == 7


async def test_a_shipper_that_is_cancelled_in_the_middle_of_a_batch_loses_nothing_and_doubles_nothing(
    pool: asyncpg.Pool, journal: Journal, heard: Heard
) -> None:
    shipper = Shipper(pool, journal, on_rows=heard.on_rows)
    async with pool.acquire() as holder, holder.transaction():
        await holder.execute("lock table usage in exclusive mode")
        exchanges(journal, 700)
        task = asyncio.create_task(shipper.run())
        query = "select count(*) from pg_locks where not granted and relation = 'usage'::regclass"
        async with asyncio.timeout(10):
            while not await pool.fetchval(query):
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task], timeout=2)
        assert task.cancelled()
    assert shipper.queued == 700
    assert await shipper.close(10) == 0
    journal.close()
    assert len(await outcomes(pool)) == heard.rows["written"] == 700
    assert await balanced(pool)


async def test_folders_that_a_closing_process_had_adopted_are_free_again(
    database_url: str, tmp_path: Path, heard: Heard
) -> None:
    dead = Journal(tmp_path)
    exchanges(dead, 1)
    die(dead)
    closed = await asyncpg.create_pool(database_url, min_size=0)
    await closed.close()
    async with running(closed, Journal(tmp_path), heard):
        await until(lambda: heard.errors >= 2)
        assert abandoned(tmp_path) == []
    (tail,) = abandoned(tmp_path)
    assert tail.folder == dead.folder
    tail.release()

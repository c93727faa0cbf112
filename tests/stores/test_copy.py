import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter, process_time
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from gateway.stores import copy as copy_module
from gateway.stores import records
from gateway.stores import shipper as shipper_module
from gateway.stores.copy import Page, UsageCopy
from gateway.stores.dead_letters import DEAD_LETTERS
from gateway.stores.journal import Journal
from gateway.stores.ledger import COLUMNS, Given, values_of
from gateway.stores.script import connect_redis
from gateway.stores.shipper import Shipper
from gateway.stores.usage import UsageRow
from tests.prove.journal_kills import Ledger, Writer
from tests.prove.ledger import LEDGER
from tests.support.journal_writer import begun, row
from tests.support.proxy import proxied_redis

pytestmark = pytest.mark.integration

HASH = "aig:usage:test:one"


@asynccontextmanager
async def copying(
    url: str, process: str = "one", *, loses_redis: bool = False, **options: Any
) -> AsyncIterator[UsageCopy]:
    """A copy as the gateway runs it, but for a time-out that no busy machine exceeds."""
    failures: list[str] = []
    async with connect_redis(url) as client:
        copy = UsageCopy(client, process, deployment="test", on_error=failures.append, **{"timeout": 5.0, **options})
        task = asyncio.create_task(copy.run())
        try:
            yield copy
            assert not task.done(), task
            assert bool(failures) == loses_redis, failures
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await copy.close()


async def until(true: Callable[[], bool | Awaitable[bool]], seconds: float = 20) -> None:
    deadline = monotonic() + seconds
    while True:
        found = true()
        if found if isinstance(found, bool) else await found:
            return
        assert monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.01)


async def told(copy: UsageCopy) -> None:
    """Redis has the last word of all."""
    await until(lambda: not copy.behind and copy._sender is None)


async def kinds(redis: Redis, key: str = HASH) -> dict[str, str]:
    """What Redis has: "begin" or "end" by exchange id."""
    found: dict[Any, Any] = await redis.hgetall(key)
    heading = found.pop(b"columns", b"").rstrip()
    read = {field: records.read(line.rstrip(), records.columns_of(heading)) for field, line in found.items()}
    return {
        field.decode(): "end" if isinstance(one, Given) else type(one).__name__.lower() for field, one in read.items()
    }


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dead are known in half a second, and a Redis that is back in a tenth."""
    for name, seconds in {"ALIVE": 0.4, "RENEW_EVERY": 0.1, "GRACE": 0.2, "FIRST_PAUSE": 0.1}.items():
        monkeypatch.setattr(copy_module, name, seconds)
    monkeypatch.setattr(shipper_module, "ADOPT_EVERY", 0.1)


# --- one exchange -------------------------------------------------------------------------------------------------


async def test_redis_has_a_begin_when_begun_returns_then_its_end_and_nothing_when_it_is_shipped(
    redis_url: str, redis: Redis
) -> None:
    one, other, third = begun(), begun(), begun()
    async with copying(redis_url) as copy:
        await copy.begun(one)
        await copy.begun(other)
        assert await kinds(redis) == {one.request_id: "begin", other.request_id: "begin"}
        await copy.ended(replace(one, outcome="ok"))
        assert await kinds(redis) == {one.request_id: "end", other.request_id: "begin"}
        copy.ended(replace(third, outcome="client_abort"))
        copy.forget([one.request_id])
        await told(copy)
        assert await kinds(redis) == {other.request_id: "begin", third.request_id: "end"}
        copy.forget([other.request_id, third.request_id, "unknown"])
        await told(copy)
        assert await redis.hkeys(HASH) == [b"columns"]
        assert copy.rows == 0
    assert await redis.keys() == []


async def test_all_that_is_asked_in_one_turn_shares_a_round_trip(redis_url: str, redis: Redis) -> None:
    async with copying(redis_url) as copy:
        await copy.begun(begun())
        before = (await redis.info("commandstats"))["cmdstat_hlen"]["calls"]
        await asyncio.gather(*[copy.begun(begun()) for _ in range(200)])
        assert (await redis.info("commandstats"))["cmdstat_hlen"]["calls"] == before + 1
        assert len(await kinds(redis)) == 201
        copy.forget(list(copy._kept))


async def test_a_request_that_is_cancelled_while_it_waits_takes_nobody_along(redis_url: str, redis: Redis) -> None:
    async with proxied_redis(redis_url) as (proxy, url), copying(url) as copy:
        await copy.begun(begun())
        proxy.stall()
        left, stays = asyncio.ensure_future(copy.begun(begun())), asyncio.ensure_future(copy.begun(begun()))
        await asyncio.sleep(0.05)
        left.cancel()
        proxy.resume()
        await stays
        assert left.cancelled()
        assert len(await kinds(redis)) == 3
        copy.forget(list(copy._kept))


async def test_memory_is_bounded_here_and_in_redis(
    redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(copy_module, "MAX_ROWS", 3)
    rows = [begun() for _ in range(5)]
    async with copying(redis_url) as copy:
        for one in rows:
            await copy.begun(one)
        for one in rows:
            await copy.ended(one)
        assert await kinds(redis) == {one.request_id: "end" for one in rows[:3]}
        assert caplog.text.count("3 usage rows are not shipped yet") == 1
        copy.forget([one.request_id for one in rows])
        await copy.begun(rows[3])
        assert await kinds(redis) == {rows[3].request_id: "begin"}
        for one in rows:
            await copy.begun(one)
        assert caplog.text.count("3 usage rows are not shipped yet") == 2, "each time that it fills"
        copy.forget([one.request_id for one in rows])


async def test_closing_leaves_what_is_not_shipped_and_nobody_is_taken_for_alive(redis_url: str, redis: Redis) -> None:
    async with copying(redis_url) as copy:
        copy.ended(row())
    assert len(await kinds(redis)) == 1
    assert await redis.exists("aig:usage:test:alive:one") == 0
    assert await redis.smembers("aig:usage:test:processes") == {b"one"}


# --- a Redis that is gone -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
async def test_a_redis_that_stalls_costs_the_time_out_once_and_gets_what_it_missed(
    redis_url: str, redis: Redis, figure: Callable[[str], None]
) -> None:
    async with proxied_redis(redis_url) as (proxy, url), copying(url, timeout=0.1, loses_redis=True) as copy:
        shipped = begun()
        await copy.begun(shipped)
        proxy.stall()
        started = perf_counter()
        first = [begun() for _ in range(50)]
        await asyncio.gather(*[copy.begun(one) for one in first])
        waited = perf_counter() - started
        assert 0.05 < waited < 0.5
        await until(copy._lost.is_set)
        started = perf_counter()
        for _ in range(100):
            await copy.begun(begun())
        figure(
            f"copy: Redis stalls: first {waited * 1e3:.0f} ms, then {(perf_counter() - started) * 1e4:.0f} µs a request"
        )
        assert perf_counter() - started < 0.1
        copy.forget([shipped.request_id])
        assert not copy._due, "only what is not shipped takes room"
        for one in first[:10]:
            copy.ended(replace(one, outcome="ok"))
        proxy.resume()
        await until(lambda: not copy._lost.is_set())
        await told(copy)
        found = await kinds(redis)
        assert found == {
            name: "end" if name in {one.request_id for one in first[:10]} else "begin" for name in copy._kept
        }
        assert len(found) == 150
        copy.forget(list(copy._kept))


async def test_nobody_waits_for_a_redis_that_somebody_else_has_seen_go(redis_url: str) -> None:
    gone = False
    async with proxied_redis(redis_url) as (proxy, url), copying(url, gone=lambda: gone) as copy:
        await copy.begun(begun())
        proxy.stall()
        gone = True
        waiting = asyncio.ensure_future(copy.begun(begun()))
        await asyncio.sleep(0)
        assert waiting.done()
        proxy.resume()
        gone = False
        await told(copy)
        copy.forget(list(copy._kept))


async def test_nobody_waits_longer_than_the_time_out_behind_others_either(
    redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Redis that is slow, but never too slow: who just misses a round trip would wait for two."""
    execute = UsageCopy._execute

    async def slow(self: UsageCopy, seconds: float, *commands: Any) -> list[Any]:
        await asyncio.sleep(0.8)
        return await execute(self, seconds, *commands)

    async with copying(redis_url, timeout=1.0) as copy:
        await copy.begun(begun())
        monkeypatch.setattr(UsageCopy, "_execute", slow)
        first = asyncio.ensure_future(copy.begun(begun()))
        await asyncio.sleep(0.05)
        started = perf_counter()
        await copy.begun(begun())
        assert 0.9 < perf_counter() - started < 1.4
        assert first.done()
        await told(copy)
        assert len(await kinds(redis)) == 3
        monkeypatch.undo()
        copy.forget(list(copy._kept))


@pytest.mark.usefixtures("quick")
async def test_a_gateway_that_starts_without_redis_serves_and_tells_it_later(redis_url: str, redis: Redis) -> None:
    async with proxied_redis(redis_url) as (proxy, url):
        await proxy.cut()
        async with copying(url, loses_redis=True) as copy:
            await copy.begun(begun())
            await until(copy._lost.is_set)
            copy.ended(row())
            await proxy.start()
            await until(lambda: not copy._lost.is_set())
            await told(copy)
            assert sorted((await kinds(redis)).values()) == ["begin", "end"]
            copy.forget(list(copy._kept))


async def test_a_redis_that_lost_its_memory_has_all_again_with_the_next_record(redis_url: str, redis: Redis) -> None:
    async with copying(redis_url) as copy:
        rows = [begun() for _ in range(1200)]
        await asyncio.gather(*[copy.begun(one) for one in rows])
        await redis.flushdb()
        copy.forget([rows[0].request_id])
        await told(copy)
        assert await kinds(redis) == {one.request_id: "begin" for one in rows[1:]}
        assert await redis.smembers("aig:usage:test:processes") == {b"one"}
        assert await redis.exists("aig:usage:test:alive:one")
        copy.forget(list(copy._kept))


@pytest.mark.usefixtures("quick")
async def test_a_redis_that_lost_its_memory_has_all_again_when_nothing_happens_either(
    redis_url: str, redis: Redis
) -> None:
    async with copying(redis_url) as copy:
        one = begun()
        await copy.begun(one)
        await redis.flushdb()
        await until(lambda: _equal(kinds(redis), {one.request_id: "begin"}))
        copy.forget([one.request_id])


async def _equal(found: Awaitable[object], expected: object) -> bool:
    return await found == expected


@pytest.mark.usefixtures("quick")
async def test_a_redis_that_refuses_and_forgot_the_latest_has_the_latest_again(redis_url: str, redis: Redis) -> None:
    """A replica that took over: it answers with errors for a while, and lacks what its primary had taken last."""
    one, void = begun(), begun()
    async with copying(redis_url, loses_redis=True) as copy:
        await copy.begun(one)
        await copy.begun(void)
        older = await redis.dump(HASH)
        await copy.ended(replace(one, outcome="ok"))
        copy.forget([void.request_id])
        await told(copy)
        await redis.set(HASH, "not a hash")
        await copy.begun(begun())
        await until(copy._lost.is_set)
        await redis.restore(HASH, 0, older or b"", replace=True)
        await until(lambda: not copy._lost.is_set())
        await told(copy)
        found = await kinds(redis)
        assert found.pop(one.request_id) == "end"
        assert list(found.values()) == ["begin"] and void.request_id not in found
        copy.forget(list(copy._kept))


# --- what dead processes left -------------------------------------------------------------------------------------


async def pages(copy: UsageCopy) -> list[Page]:
    return [page async for page in copy.orphans()]


async def leave(redis: Redis, process: str, lines: dict[str, bytes]) -> None:
    await redis.sadd("aig:usage:test:processes", process)
    await redis.hset(f"aig:usage:test:{process}", mapping=lines)  # type: ignore[arg-type]


@pytest.mark.usefixtures("quick")
async def test_a_process_is_dead_when_it_stopped_renewing_and_was_watched(redis_url: str, redis: Redis) -> None:
    async with copying(redis_url, "alive") as sibling, copying(redis_url) as copy:
        sibling.ended(row())
        await leave(redis, "dead", {"columns": records.heading(), "1": records.end(row())})
        await redis.set("aig:usage:test:alive:dead", "1", px=500)
        seen: list[Page] = []
        started = monotonic()
        while not seen and monotonic() - started < 10:
            seen = await pages(copy)
            await asyncio.sleep(0.05)
        assert [page.process for page in seen] == ["dead"]
        assert 0.6 < monotonic() - started < 3
        await asyncio.sleep(1)
        assert {page.process for page in await pages(copy)} == {"dead"}, "who lives is left alone"
        assert await pages(sibling) == []
        await asyncio.sleep(0.3)
        assert await pages(sibling) == [], "it has watched it as well, but another has claimed it"
        await redis.delete("aig:usage:test:claim:dead")
        await until(lambda: _any(pages(sibling)))
        await sibling.remove("dead")
        assert await redis.exists("aig:usage:test:dead", "aig:usage:test:claim:dead") == 0
        sibling.forget(list(sibling._kept))


async def _any(found: Awaitable[list[Page]]) -> bool:
    return bool(await found)


@pytest.mark.usefixtures("quick")
async def test_many_rows_come_in_pages_and_what_cannot_be_read_is_told(redis_url: str, redis: Redis) -> None:
    ends, begins = [row() for _ in range(300)], [begun(latency_ms=5) for _ in range(300)]
    lines = {one.request_id: records.end(one) for one in ends} | {one.request_id: records.begin(one) for one in begins}
    damaged = records.end(row()).replace(b"openai", b"0penai")
    await leave(redis, "dead", {"columns": records.heading(), **lines, "x": damaged, "y": records.void("y")})
    async with copying(redis_url) as copy:
        await until(lambda: _any(pages(copy)))
        found = await pages(copy)
    assert len(found) > 3
    assert [page.last for page in found] == [False] * (len(found) - 1) + [True]
    rows = {one.request_id: one for page in found for one in page.rows}
    expected = [*ends, *[replace(one, outcome="interrupted", latency_ms=0) for one in begins]]
    assert rows == {one.request_id: one for one in expected}
    assert sorted(line for page in found for line in page.damaged) == sorted([damaged, records.void("y")])


@pytest.mark.usefixtures("quick")
async def test_rows_of_a_release_with_other_columns_are_read(redis_url: str, redis: Redis) -> None:
    one = row()
    heading = records._framed(["columns", "shoe_size", *COLUMNS])
    line = records._framed(("end", 42, *values_of(one)))
    await leave(redis, "dead", {"columns": heading, one.request_id: line})
    async with copying(redis_url) as copy:
        await until(lambda: _any(pages(copy)))
        assert [page.rows for page in await pages(copy)] == [[one]]


@pytest.mark.usefixtures("quick")
async def test_while_redis_is_gone_nobody_counts_as_dead(redis_url: str, redis: Redis) -> None:
    await leave(redis, "dead", {"columns": records.heading(), "1": records.end(row())})
    async with proxied_redis(redis_url) as (proxy, url), copying(url, loses_redis=True) as copy:
        assert await pages(copy) == []
        await asyncio.sleep(0.15)
        await proxy.cut()
        await until(copy._lost.is_set)
        await asyncio.sleep(0.15)
        await proxy.start()
        await until(lambda: not copy._lost.is_set())
        assert await pages(copy) == [], "it is watched from now on, not from before"
        await until(lambda: _any(pages(copy)))


# --- with the shipper ---------------------------------------------------------------------------------------------


class Host:
    """A gateway's usage on a host of its own."""

    def __init__(self, root: Path, pool: asyncpg.Pool, copy: UsageCopy, journal: Journal) -> None:
        self.copy = copy
        self.journal = journal
        self.adopted: list[UsageRow] = []
        self.shipper = Shipper(
            pool,
            journal,
            linger=0.02,
            copy=copy,
            on_adopted=self.adopted.append,
            priced=lambda one: replace(one, cost_micros=99),
        )

    async def exchange(self, *, ends: bool = True) -> UsageRow:
        first = begun()
        self.journal.begin(first)
        await self.copy.begun(first)
        if ends:
            last = replace(first, outcome="ok", completion_tokens=7, cost_micros=7)
            self.journal.end(last)
            await self.copy.ended(last)
        return first


@asynccontextmanager
async def host(root: Path, pool: asyncpg.Pool, redis_url: str, *, dies: bool = False) -> AsyncIterator[Host]:
    """`dies`: nothing is shipped and nothing is said; its journal stays, for whoever finds the disk."""
    journal = Journal(root)
    async with connect_redis(redis_url) as client:
        failures: list[str] = []
        copy = UsageCopy(client, journal.folder.name, deployment="test", on_error=failures.append, timeout=5.0)
        one = Host(root, pool, copy, journal)
        tasks = [asyncio.create_task(copy.run()), *([] if dies else [asyncio.create_task(one.shipper.run())])]
        try:
            yield one
            assert failures == []
        finally:
            if not dies:
                assert await one.shipper.close(10) == 0
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if dies:
                with suppress(OSError):
                    os.close(journal._file)
                os.close(journal._lock)
                journal._thread.shutdown()
            else:
                await copy.close()
                journal.close()


async def outcomes(pool: asyncpg.Pool) -> list[tuple[str, str]]:
    return sorted((one[0], one[1]) for one in await pool.fetch("select request_id::text, outcome from usage"))


async def only_living(redis: Redis, *processes: str) -> bool:
    return await redis.smembers("aig:usage:test:processes") == {name.encode() for name in processes}


@pytest.mark.usefixtures("quick")
async def test_what_is_shipped_is_forgotten_and_what_runs_is_not(
    pool: asyncpg.Pool, redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    async with host(tmp_path, pool, redis_url) as one:
        running = await one.exchange(ends=False)
        for _ in range(20):
            await one.exchange()
        await until(lambda: one.copy.rows == 1)
        await told(one.copy)
        assert list(await kinds(redis, f"aig:usage:test:{one.journal.folder.name}")) == [running.request_id]
        one.journal.end(replace(running, outcome="ok"))
        one.copy.ended(replace(running, outcome="ok"))
    assert len(await outcomes(pool)) == 21
    assert await redis.keys() == []


@pytest.mark.usefixtures("quick")
async def test_a_host_that_is_gone_with_its_disk_has_its_rows_from_redis(
    pool: asyncpg.Pool, redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    async with host(tmp_path / "dead", pool, redis_url, dies=True) as dead:
        ended, running = await dead.exchange(), await dead.exchange(ends=False)
        await redis.hset(f"aig:usage:test:{dead.journal.folder.name}", "damaged", "canary")
    shutil.rmtree(tmp_path / "dead")
    async with host(tmp_path / "next", pool, redis_url) as one:
        await until(lambda: only_living(redis, one.journal.folder.name))
        assert await outcomes(pool) == sorted([(ended.request_id, "ok"), (running.request_id, "interrupted")])
        assert sorted((row.request_id, row.outcome) for row in one.adopted) == await outcomes(pool)
        assert {row.outcome: row.cost_micros for row in one.adopted} == {"ok": 7, "interrupted": 99}
        assert "canary" in (one.journal.root / DEAD_LETTERS).read_text()
    assert await pool.fetch(LEDGER) == []


@pytest.mark.usefixtures("quick")
async def test_a_journal_that_is_found_after_its_copy_was_shipped_counts_nothing_twice(
    pool: asyncpg.Pool, redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    """Nor before it: a sibling on the same disk ships the journal first, and finds the copy later."""
    for order in ("copy first", "journal first"):
        async with host(tmp_path / order, pool, redis_url, dies=True) as dead:
            for _ in range(20):
                await dead.exchange()
            cut = await dead.exchange(ends=False)
            dead.journal.tick(cut.request_id, 100, 33)
        async with host(tmp_path / ("far" if order == "copy first" else order), pool, redis_url) as one:
            await until(lambda one=one: only_living(redis, one.journal.folder.name))  # type: ignore[misc]
            await until(lambda: _count(pool, 21))
        async with host(tmp_path / order, pool, redis_url):
            await until(lambda dead=dead: not dead.journal.folder.exists())  # type: ignore[misc]
        assert await _count(pool, 21)
        assert await pool.fetchval("select sum(requests) from usage_hourly") == 21
        assert await pool.fetch(LEDGER) == []
        await pool.execute("truncate usage, usage_hourly")


async def _count(pool: asyncpg.Pool, rows: int) -> bool:
    return bool(await pool.fetchval("select count(*) from usage") == rows)


@pytest.mark.usefixtures("quick")
async def test_the_end_of_an_exchange_whose_process_was_taken_for_dead_replaces_the_guess(
    pool: asyncpg.Pool, redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    async with host(tmp_path / "one", pool, redis_url) as one:
        running = await one.exchange(ends=False)
        async with connect_redis(redis_url) as client:
            hasty = UsageCopy(client, "hasty", deployment="test", on_error=lambda _: None)
            shipper = Shipper(pool, Journal(tmp_path / "two"), copy=hasty)
            hasty._dead_since[one.journal.folder.name] = 0.0
            key = f"aig:usage:test:alive:{one.journal.folder.name}"
            while not await outcomes(pool):
                await redis.delete(key)
                await shipper._ship_all()
        assert await outcomes(pool) == [(running.request_id, "interrupted")]
        await until(
            lambda: _equal(kinds(redis, f"aig:usage:test:{one.journal.folder.name}"), {running.request_id: "begin"})
        )
        one.journal.end(replace(running, outcome="ok", completion_tokens=12))
        await one.copy.ended(replace(running, outcome="ok", completion_tokens=12))
        await one.shipper.flushed()
        assert await outcomes(pool) == [(running.request_id, "ok")]
    assert await pool.fetch(LEDGER) == []
    assert await redis.keys() == []


@pytest.mark.usefixtures("quick")
async def test_two_siblings_that_take_the_same_copy_count_each_row_once(
    pool: asyncpg.Pool, redis_url: str, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def always(self: UsageCopy, process: str) -> bool:
        return True

    monkeypatch.setattr(UsageCopy, "_claim", always)
    async with host(tmp_path / "dead", pool, redis_url, dies=True) as dead:
        for number in range(400):
            await dead.exchange(ends=number % 4 > 0)
    shutil.rmtree(tmp_path / "dead")
    async with host(tmp_path / "a", pool, redis_url) as one, host(tmp_path / "b", pool, redis_url) as other:
        await until(lambda: only_living(redis, one.journal.folder.name, other.journal.folder.name))
    assert [outcome for _, outcome in await outcomes(pool)].count("ok") == 300
    assert await _count(pool, 400)
    assert await pool.fetch(LEDGER) == []


@pytest.mark.usefixtures("quick")
async def test_an_end_that_found_no_room_on_the_disk_of_a_process_that_died_is_in_the_copy(
    pool: asyncpg.Pool, redis_url: str, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host(tmp_path, pool, redis_url, dies=True) as dead:
        first = await dead.exchange(ends=False)
        with monkeypatch.context() as full:
            full.setattr(Journal, "_wrote", lambda self, record: False)
            dead.journal.end(replace(first, outcome="ok"))
            await dead.copy.ended(replace(first, outcome="ok"))
    async with host(tmp_path, pool, redis_url) as one:
        await until(lambda: only_living(redis, one.journal.folder.name))
        assert await outcomes(pool) == [(first.request_id, "ok")]
        assert [row.outcome for row in one.adopted] == ["interrupted", "ok"]
    assert await pool.fetch(LEDGER) == []


@pytest.mark.usefixtures("quick")
async def test_copies_of_another_deployment_on_the_same_redis_are_none_of_ours(
    pool: asyncpg.Pool, redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    async with host(tmp_path, pool, redis_url, dies=True):
        pass
    await redis.sadd("aig:usage:other:processes", "theirs")
    await redis.hset("aig:usage:other:theirs", mapping={"columns": records.heading(), "1": records.end(row())})
    async with host(tmp_path, pool, redis_url) as one:
        await until(lambda: only_living(redis, one.journal.folder.name))
    assert await outcomes(pool) == []
    assert await redis.exists("aig:usage:other:theirs")


@pytest.mark.usefixtures("quick")
async def test_hosts_that_are_killed_with_their_disks_lose_and_double_nothing(
    pool: asyncpg.Pool,
    database_url: str,
    redis_url: str,
    redis: Redis,
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    ledger = Ledger()
    for number in range(4):
        root = tmp_path / str(number)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.copy_writer", str(root), database_url, redis_url, "150",
            stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2], env={"PATH": os.environ["PATH"]},
        )  # fmt: skip
        writer = Writer(process, ledger)
        await until(lambda writer=writer: writer.is_busy() and writer._told > 600)  # type: ignore[misc]
        assert await writer.end(signal.SIGKILL) == -signal.SIGKILL
        ledger.kills += 1
        shutil.rmtree(root)
    shipped = await pool.fetchval("select count(*) from usage")
    async with host(tmp_path / "last", pool, redis_url) as one:
        await until(lambda: only_living(redis, one.journal.folder.name))
        await ledger.compare(pool)
        from_copies = ledger.rows - shipped
        figure(f"copy: through {ledger.kills} lost hosts: {ledger}; {from_copies} rows came from Redis alone")
        assert ledger.holds, str(ledger)
        assert ledger.interrupted > 0 and from_copies > ledger.interrupted


# --- what it costs ------------------------------------------------------------------------------------------------


async def test_what_it_costs(redis_url: str, redis: Redis, figure: Callable[[str], None]) -> None:
    async with copying(redis_url) as copy:
        waits, pings = [], []
        for _ in range(300):
            one, started = begun(), perf_counter()
            await copy.begun(one)
            waits.append(perf_counter() - started)
            copy.forget([one.request_id])
            await told(copy)
            started = perf_counter()
            await redis.ping()
            pings.append(perf_counter() - started)
        pairs = [(one, replace(one, outcome="ok")) for one in (begun() for _ in range(4000))]
        todo = iter(pairs)

        async def client() -> None:
            for first, last in todo:
                await copy.begun(first)
                await copy.ended(last)

        started = process_time()
        await asyncio.gather(*[client() for _ in range(200)])
        copy.forget([first.request_id for first, _ in pairs])
        await told(copy)
        spent = process_time() - started
        started = process_time()
        for first, last in pairs:
            records.begin(first)
            records.end(last)
        bare = process_time() - started
    figure(
        f"copy: a request waits {median(waits) * 1e6:.0f} µs for Redis (a PING: {median(pings) * 1e6:.0f} µs); "
        f"{spent / len(pairs) * 1e6:.0f} µs of CPU an exchange at 200 at once ({bare / len(pairs) * 1e6:.0f} µs: its records)"
    )
    assert median(waits) < 10 * median(pings)
    assert spent < 30 * bare
    assert copy.rows == 0
    assert await redis.keys() == []

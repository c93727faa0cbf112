import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import asyncpg
import pytest

from gateway.exchange import new_id
from gateway.stores import chain as chain_module
from gateway.stores import ledger as ledger_module
from gateway.stores.chain import LinkFault, Report, RowFault, link_drop, load_audit_key, read_head, transaction, verify
from gateway.stores.ledger import RowError, drop_months, given_of, make_partitions, write_rows
from gateway.stores.migrations import migrate
from gateway.stores.postgres import Connection
from gateway.stores.usage import UsageRow
from tests.support.journal_writer import begun, row
from tests.support.stores import SCHEMA

pytestmark = pytest.mark.integration

KEY = b"k" * 32
START = datetime(2026, 3, 5, 12, tzinfo=UTC)


def at(seconds: float, **changes: object) -> UsageRow:
    return row(started_at=START + timedelta(seconds=seconds), **changes)


async def three_links(pool: asyncpg.Pool, **changes: object) -> list[UsageRow]:
    """Four rows each, by the time of their arrival."""
    rows = [at(second, **changes) for second in range(12)]
    for some in (rows[:4], rows[4:8], rows[8:]):
        await write_rows(pool, some, KEY)
    return rows


async def fault_of(pool: asyncpg.Pool, **how: object) -> LinkFault | RowFault:
    report = await verify(pool, KEY, **how)  # type: ignore[arg-type]
    assert report.fault is not None, str(report)
    return report.fault


async def whole(pool: asyncpg.Pool) -> Report:
    report = await verify(pool, KEY)
    assert report.fault is None, str(report.fault)
    assert report.rows == await pool.fetchval("select count(*) from usage")
    assert report.links == await pool.fetchval("select count(*) from usage_chain where seq > 0")
    return report


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(chain_module, "LINKS_AT_ONCE", 2)


# --- what holds ---------------------------------------------------------------------------------------------------


async def test_a_chain_without_a_link_is_whole_and_has_no_head(pool: asyncpg.Pool) -> None:
    assert await verify(pool, KEY) == Report(0, 0, 0, b"", None, None)
    assert await read_head(pool) is None


async def test_every_transaction_that_writes_rows_is_a_link_and_one_that_writes_none_is_not(
    pool: asyncpg.Pool,
) -> None:
    rows = await three_links(pool)
    await write_rows(pool, rows, KEY)
    report = await whole(pool)
    assert (report.links, report.rows, report.covers_from) == (3, 12, None)
    assert report.anchor == await read_head(pool)
    assert report.anchor == f"3:{report.head.hex()}"


@pytest.mark.usefixtures("small_windows")
async def test_rows_of_any_time_in_any_order_verify(pool: asyncpg.Pool) -> None:
    chance = random.Random(7)
    await make_partitions(pool, date(2026, 3, 1))
    times = [0.0, 0.0, *(chance.uniform(-9e6, 9e6) for _ in range(100)), *(chance.uniform(-5, 5) for _ in range(100))]
    rows = [at(seconds) for seconds in times]
    rows += [row(started_at=datetime(year, 1, 1, tzinfo=UTC)) for year in (2, 1970, 9999)]
    chance.shuffle(rows)
    while rows:
        some = [rows.pop() for _ in range(min(len(rows), chance.randrange(1, 20)))]
        await write_rows(pool, some, KEY)
    await whole(pool)
    for _ in range(10):
        [victim] = await pool.fetch("select * from usage order by random() limit 1")
        await pool.execute("delete from usage where request_id = $1", victim[0])
        fault = await fault_of(pool)
        assert isinstance(fault, RowFault)
        assert (fault.what, fault.request_id) == ("was removed", str(victim[0]))
        await pool.execute(f"insert into usage values ({', '.join(f'${n + 1}' for n in range(len(victim)))})", *victim)
    await whole(pool)


async def test_a_row_that_was_taken_for_dead_is_judged_by_the_link_that_replaced_it(pool: asyncpg.Pool) -> None:
    guess = begun(started_at=START)
    end = replace(guess, outcome="ok", completion_tokens=9)
    await write_rows(pool, [guess, at(1)], KEY)
    assert await write_rows(pool, [end, at(2)], KEY) == 1
    report = await whole(pool)
    assert (report.links, report.rows) == (3, 3)
    await pool.execute("update usage set completion_tokens = 8 where request_id = $1", guess.request_id)
    assert await fault_of(pool) == RowFault("was altered", 3, guess.request_id, START)
    await pool.execute("update usage set outcome = 'interrupted', completion_tokens = 0 where started_at = $1", START)
    assert await fault_of(pool) == RowFault("was altered", 3, guess.request_id, START)


async def test_a_guess_and_its_end_in_one_batch_are_one_row(pool: asyncpg.Pool) -> None:
    guess = begun(started_at=START)
    end = replace(guess, outcome="ok")
    await write_rows(pool, [guess, end, guess], KEY)
    await write_rows(pool, [end, guess], KEY)
    assert (await whole(pool)).rows == 1
    assert await pool.fetchval("select outcome from usage") == "ok"


async def test_many_writers_of_the_same_rows_make_one_chain(pool: asyncpg.Pool) -> None:
    rows = [at(second) for second in range(300)]
    guesses = [replace(one, outcome="interrupted", completion_tokens=0) for one in rows]
    chance = random.Random(7)
    batches = [chance.sample(some, 100) for some in (rows, guesses) * 6]
    await asyncio.gather(*(write_rows(pool, batch, KEY) for batch in batches))
    await whole(pool)


async def test_it_verifies_while_rows_are_written_and_replaced_and_months_are_dropped(
    pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_module, "ROWS_AT_ONCE", 50)
    for month in (1, 3, 5):
        await make_partitions(pool, date(2026, month, 1))
    writing = True

    async def write(seed: int) -> None:
        chance = random.Random(seed)
        while writing:
            guesses = [begun(started_at=START + timedelta(days=chance.uniform(-60, 60))) for _ in range(20)]
            await write_rows(pool, guesses, KEY)
            await write_rows(pool, [replace(one, outcome="ok") for one in guesses[:10]], KEY)

    async def links() -> int:
        number: int = await pool.fetchval("select max(seq) from usage_chain")
        return number

    writers = [asyncio.create_task(write(seed)) for seed in (1, 2)]
    for keep in (6, 5, 4, 3, 2, 1):
        await drop_months(pool, keep, KEY, date(2026, 5, 5))
        enough = await links() + 10
        while await links() < enough:
            report = await verify(pool, KEY)
            assert report.fault is None, str(report.fault)
    writing = False
    await asyncio.gather(*writers)
    report = await verify(pool, KEY)
    assert report.fault is None, str(report.fault)
    assert report.covers_from == datetime(2026, 4, 1, tzinfo=UTC)
    assert report.rows == await pool.fetchval("select count(*) from usage where started_at >= '2026-04-01Z'") > 50


async def test_a_column_that_comes_later_is_covered_by_who_knows_it(pool: asyncpg.Pool) -> None:
    await write_rows(pool, [at(1)], KEY)
    await pool.execute("alter table usage add column region text not null default ''")
    await write_rows(pool, [at(2)], KEY)
    third = given_of(at(3))
    await write_rows(pool, [third._replace(values=third.values[:-1] + b',""]')], KEY)
    await whole(pool)
    await pool.execute("update usage set region = 'eu' where started_at < $1", START + timedelta(seconds=3))
    await whole(pool)
    await pool.execute("update usage set region = 'eu'")
    assert (await fault_of(pool)).link == 3


# --- rows that somebody touched -----------------------------------------------------------------------------------

OTHER = {
    "boolean": "not {}",
    "text": "{} || 'x'",
    "uuid": "gen_random_uuid()",
    "timestamp with time zone": "{} + interval '1 microsecond'",
}


async def test_a_row_of_which_any_column_was_altered_is_named(pool: asyncpg.Pool) -> None:
    saved = {"source": "cache", "source_id": new_id(), "saved_tokens": 5, "saved_micros": 7}
    rows = await three_links(pool, **saved)
    columns = await pool.fetch(
        "select column_name as name, data_type as type, is_nullable as null from information_schema.columns "
        "where table_name = 'usage' order by ordinal_position"
    )
    assert len(columns) == len(ledger_module.COLUMNS)
    for number, column in enumerate(columns):
        victim = rows[number % 12]
        others = [OTHER.get(column["type"], "{} + 1"), *(["null"] if column["null"] == "YES" else [])]
        if column["name"] == "usage_source":
            others = ["'counted'"]
        for other in others:
            async with altered(pool, f"{column['name']} = {other.format(column['name'])}", victim):
                fault = await fault_of(pool)
            key = column["name"] in ("request_id", "started_at")
            what = "was removed" if key else "was altered"
            assert fault == RowFault(what, 1 + number % 12 // 4, victim.request_id, victim.started_at), column["name"]
    await whole(pool)


@asynccontextmanager
async def altered(pool: asyncpg.Pool, change: str, victim: UsageRow) -> AsyncIterator[None]:
    before = await pool.fetchrow("select * from usage where request_id = $1", victim.request_id)
    assert before is not None
    changed = await pool.fetchval(
        f"update usage set {change} where request_id = $1 returning request_id", victim.request_id
    )
    yield
    await pool.execute("delete from usage where request_id = $1", changed)
    await pool.execute(f"insert into usage values ({', '.join(f'${n + 1}' for n in range(len(before)))})", *before)


async def test_the_first_of_several_rows_by_time_is_named(pool: asyncpg.Pool) -> None:
    rows = await three_links(pool)
    await pool.execute("update usage set cost_micros = 0 where request_id = any($1)", ids(rows[3:]))
    assert await fault_of(pool) == RowFault("was altered", 1, rows[3].request_id, rows[3].started_at)
    await pool.execute("delete from usage where request_id = $1", rows[2].request_id)
    assert await fault_of(pool) == RowFault("was removed", 1, rows[2].request_id, rows[2].started_at)
    added = at(1.5)
    await write_rows(pool, [added])
    fault = await fault_of(pool)
    assert fault == RowFault("was added: no link names it", None, added.request_id, added.started_at)
    assert str(fault) == f"row {added.request_id} of 2026-03-05T12:00:01.500000+00:00 was added: no link names it"


def ids(rows: Sequence[UsageRow]) -> list[str]:
    return [one.request_id for one in rows]


@pytest.mark.parametrize("seconds", [-1e9, -1, 0, 5, 5.5, 11, 12, 1e11])
async def test_a_row_that_no_link_names_is_found_at_any_time(pool: asyncpg.Pool, seconds: float) -> None:
    await three_links(pool)
    added = at(seconds)
    await write_rows(pool, [added])
    assert await fault_of(pool) == RowFault("was added: no link names it", None, added.request_id, added.started_at)


async def test_a_copy_of_a_row_under_another_id_is_added(pool: asyncpg.Pool) -> None:
    rows = await three_links(pool)
    copy = replace(rows[5], request_id=row().request_id)
    await write_rows(pool, [copy])
    assert await fault_of(pool) == RowFault("was added: no link names it", None, copy.request_id, copy.started_at)


async def test_a_removed_row_that_is_shipped_again_is_still_told_of(pool: asyncpg.Pool) -> None:
    rows = await three_links(pool)
    await pool.execute("delete from usage where request_id = $1", rows[6].request_id)
    assert await write_rows(pool, rows, KEY) == 1
    expected = RowFault("was removed, and written once more", 4, rows[6].request_id, rows[6].started_at)
    assert await fault_of(pool) == expected


# --- links that somebody touched ----------------------------------------------------------------------------------

TOUCHED = {
    "at": "at + interval '1 microsecond'",
    "width": "23",
    "request_ids": "request_ids[2:] || request_ids[1]",
    "started_ats": "started_ats[1:3] || started_ats[3]",
    "digests": "digests[2:] || digests[1]",
    "replaces": "not replaces",
    "covers_from": "now()",
    "head": "sha256(head)",
}


@pytest.mark.parametrize("column", TOUCHED)
async def test_a_link_of_which_any_column_was_altered_is_named(pool: asyncpg.Pool, column: str) -> None:
    await three_links(pool)
    await pool.execute(f"update usage_chain set {column} = {TOUCHED[column]} where seq = 2")
    assert await fault_of(pool) == LinkFault("was altered", 2)


@pytest.mark.parametrize("nothing", ["null", "'{}'", "array_fill(null::bytea, array[4])"])
async def test_a_link_without_its_digests_was_altered(pool: asyncpg.Pool, nothing: str) -> None:
    await three_links(pool)
    await pool.execute("alter table usage_chain alter digests drop not null")
    await pool.execute(f"update usage_chain set digests = {nothing} where seq = 2")
    assert await fault_of(pool) == LinkFault("was altered", 2)


@pytest.mark.parametrize("time", ["infinity", "-infinity", "20000-01-01Z", "0100-01-01Z BC"])
async def test_no_time_hides_a_row_or_a_link(pool: asyncpg.Pool, time: str) -> None:
    rows = await three_links(pool)
    await pool.execute(f"update usage set started_at = '{time}' where request_id = $1", rows[0].request_id)
    assert await fault_of(pool)
    await pool.execute("delete from usage where request_id = $1", rows[0].request_id)
    assert str(await fault_of(pool)).endswith("was removed (link 1)")
    await pool.execute(f"update usage_chain set started_ats[1] = '{time}' where seq = 2")
    assert isinstance(await fault_of(pool), LinkFault)


async def test_every_column_of_a_link_was_tried() -> None:
    assert {"seq", *TOUCHED} == {*chain_module.Link.__slots__, "head"}


@pytest.mark.parametrize("seq", [1, 2])
async def test_a_link_that_was_deleted_is_missed(pool: asyncpg.Pool, seq: int) -> None:
    await three_links(pool)
    await pool.execute("delete from usage_chain where seq = $1", seq)
    assert await fault_of(pool) == LinkFault("is missing", seq)


async def test_links_that_changed_places_are_found(pool: asyncpg.Pool) -> None:
    await three_links(pool)
    await pool.execute("update usage_chain set seq = -seq where seq > 1")
    await pool.execute("update usage_chain set seq = seq + 5 where seq < 0")
    assert await pool.fetchval("select max(seq) from usage_chain") == 3
    assert await fault_of(pool) == LinkFault("was altered", 2)


async def test_a_link_that_somebody_forged_is_found_also_far_ahead(pool: asyncpg.Pool) -> None:
    await three_links(pool)
    copy = "insert into usage_chain select {}, at, width, '{{}}', '{{}}', '{{}}', false, now(), head from usage_chain where seq = 3"
    await pool.execute(copy.format(900))
    assert await fault_of(pool) == LinkFault("is missing", 4)
    await pool.execute(copy.format(4))
    assert await fault_of(pool) == LinkFault("was altered", 4)


async def test_last_links_that_were_cut_off_leave_rows_that_no_link_names(pool: asyncpg.Pool) -> None:
    rows = await three_links(pool)
    await pool.execute("delete from usage_chain where seq = 3")
    assert await fault_of(pool) == RowFault("was added: no link names it", None, rows[8].request_id, rows[8].started_at)
    await pool.execute("truncate usage_chain")
    assert await fault_of(pool) == RowFault("was added: no link names it", None, rows[0].request_id, rows[0].started_at)
    assert await write_rows(pool, [at(20)], KEY) == 1, "usage goes on"
    assert str(await fault_of(pool)).startswith(f"row {rows[0].request_id} ")


async def test_an_anchor_shows_that_links_were_cut_off_with_their_rows(pool: asyncpg.Pool) -> None:
    rows = await three_links(pool)
    before = await whole(pool)
    anchors = {before.seq: before.head}
    await pool.execute("delete from usage_chain where seq > 1")
    await pool.execute("delete from usage where request_id = any($1)", ids(rows[4:]))
    assert (await whole(pool)).links == 1, "without an anchor nobody can know"
    assert await fault_of(pool, anchors=anchors) == LinkFault("is missing: an anchor names link 3", 2)
    for some in (rows[4:8], rows[8:11]):
        await write_rows(pool, some, KEY)
    assert await fault_of(pool, anchors=anchors) == LinkFault("is not the one that was anchored", 3)


async def test_an_anchor_that_holds_is_no_fault(pool: asyncpg.Pool) -> None:
    await three_links(pool)
    before = await whole(pool)
    await write_rows(pool, [at(50)], KEY)
    assert (await verify(pool, KEY, {before.seq: before.head})).fault is None


async def test_with_another_key_nothing_verifies_and_it_is_said_what_that_may_mean(pool: asyncpg.Pool) -> None:
    await three_links(pool)
    report = await verify(pool, b"other" * 6)
    assert (report.links, report.rows) == (0, 0)
    assert report.fault == LinkFault("was altered, or the key is not the one of this chain", 1)


# --- months -------------------------------------------------------------------------------------------------------


async def four_months(pool: asyncpg.Pool) -> list[UsageRow]:
    for month in (1, 3):
        await make_partitions(pool, date(2026, month, 1))
    rows = [row(started_at=datetime(2026, month, 5, tzinfo=UTC)) for month in (1, 2, 3, 4)]
    await write_rows(pool, rows, KEY)
    return rows


async def test_months_that_retention_dropped_are_no_fault_and_said_once(pool: asyncpg.Pool) -> None:
    await four_months(pool)
    for _ in range(2):
        assert await drop_months(pool, 1, KEY, date(2026, 4, 20)) in (2, 0)
    report = await whole(pool)
    assert (report.links, report.rows, report.covers_from) == (2, 2, datetime(2026, 3, 1, tzinfo=UTC))
    assert await drop_months(pool, 3, KEY, date(2026, 4, 20)) == 0
    assert (await whole(pool)).covers_from == datetime(2026, 3, 1, tzinfo=UTC), "what is gone does not come back"
    assert await drop_months(pool, 1, KEY, date(2026, 5, 20)) == 1
    await write_rows(pool, [row(started_at=datetime(2026, 5, 5, tzinfo=UTC))], KEY)
    report = await whole(pool)
    assert (report.links, report.rows, report.covers_from) == (4, 2, datetime(2026, 4, 1, tzinfo=UTC))


async def test_months_that_are_dropped_in_this_moment_are_no_fault(pool: asyncpg.Pool) -> None:
    """Its rows are gone for all others as soon as the drop commits, whatever moment they read from."""
    await four_months(pool)
    async with pool.acquire() as holder:
        async with holder.transaction():
            await holder.execute("select drop_usage_before('2026-03-01')")
            await link_drop(holder, KEY, datetime(2026, 3, 1, tzinfo=UTC), 5)
            verifying = asyncio.create_task(verify(pool, KEY))
            async with asyncio.timeout(10):
                while not await holder.fetchval("select count(*) from pg_locks where not granted"):
                    await asyncio.sleep(0.01)
    report = await verifying
    assert (report.fault, report.links, report.rows) == (None, 2, 2)


async def test_a_month_that_somebody_dropped_by_hand_is_missed(pool: asyncpg.Pool) -> None:
    rows = await four_months(pool)
    await pool.execute("drop table usage_2026_02")
    assert await fault_of(pool) == RowFault("was removed", 1, rows[1].request_id, rows[1].started_at)
    await pool.execute("select drop_usage_before('2026-02-01')")
    assert await fault_of(pool) == RowFault("was removed", 1, rows[0].request_id, rows[0].started_at)


async def test_rows_of_before_the_migration_are_not_covered_and_it_is_said(
    empty_database_url: str, tmp_path: Path
) -> None:
    for path in sorted((SCHEMA.parent / "migrations").glob("000[123]*")):
        (tmp_path / path.name).write_text(path.read_text())
    await migrate(empty_database_url, tmp_path)
    now = datetime.now(UTC)
    async with asyncpg.create_pool(empty_database_url, min_size=1) as pool:
        columns = ledger_module.COLUMNS[: ledger_module.COLUMNS.index("source")]
        await pool.copy_records_to_table("usage", records=[[getattr(row(), name) for name in columns]], columns=columns)
        await migrate(empty_database_url)
        report = await verify(pool, KEY)
        assert report.fault is None and report.covers_from is not None
        assert timedelta(hours=1) <= report.covers_from - now <= timedelta(hours=2, seconds=60)
        await write_rows(pool, [row(started_at=now)])
        await write_rows(pool, [row(started_at=now), row(started_at=now + timedelta(hours=3))], KEY)
        after = await verify(pool, KEY)
        assert (after.links, after.rows, after.covers_from, after.fault) == (1, 1, report.covers_from, None)
        await write_rows(pool, [row(started_at=now + timedelta(hours=3))])
        assert str(await fault_of(pool)).endswith("no link names it")


# --- writing ------------------------------------------------------------------------------------------------------


async def test_a_commit_of_which_nobody_heard_is_harmless(pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = await three_links(pool)
    more = [*rows, *(at(second) for second in range(20, 30))]

    @asynccontextmanager
    async def unheard(borrowed: Connection, begin: str, timeout: float) -> AsyncIterator[None]:
        async with transaction(borrowed, begin, timeout):
            yield
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "transaction", unheard)
        with pytest.raises(TimeoutError):
            await write_rows(pool, more, KEY)
    assert (await whole(pool)).links == 4
    assert await write_rows(pool, more, KEY) == 0
    report = await whole(pool)
    assert (report.links, report.rows) == (4, 22)


async def test_a_connection_that_dies_before_the_commit_leaves_neither_rows_nor_a_link(
    pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def killed(borrowed: Connection, begin: str, timeout: float) -> AsyncIterator[None]:
        async with transaction(borrowed, begin, timeout):
            yield
            pid = await borrowed.fetchval("select pg_backend_pid()")
            await pool.execute("select pg_terminate_backend($1, 5000)", pid)

    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "transaction", killed)
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await write_rows(pool, [at(1)], KEY)
    assert (await whole(pool)).links == 0
    assert await write_rows(pool, [at(1)], KEY) == 1
    await whole(pool)


async def test_a_row_that_the_database_refuses_leaves_no_link_and_the_connection_goes_on(
    database_url: str,
) -> None:
    async with asyncpg.create_pool(database_url, min_size=1, max_size=1) as pool:
        pid = await pool.fetchval("select pg_backend_pid()")
        for poison in ({"user_id": "a\0b"}, {"usage_source": "x"}, {"latency_ms": 2**40}, {"account_id": "x"}):
            with pytest.raises(RowError):
                await write_rows(pool, [at(1), at(2, **poison)], KEY)
            assert await write_rows(pool, [at(1)], KEY) == 1
        assert await pool.fetchval("select pg_backend_pid()") == pid
        assert (await whole(pool)).links == 4


async def test_a_broken_chain_is_no_fault_of_the_rows(pool: asyncpg.Pool) -> None:
    """Else they would all go to the dead-letter file."""
    await pool.execute(
        "insert into usage_chain select 9223372036854775807, at, width, '{}', '{}', '{}', false, null, '' from usage_chain"
    )
    with pytest.raises(Exception) as refusal:
        await write_rows(pool, [at(1)], KEY)
    assert not isinstance(refusal.value, RowError)
    assert await pool.fetchval("select count(*) from usage") == 0


async def test_who_holds_the_chain_makes_others_wait_no_longer_than_their_patience(
    pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "PATIENCE", 0.2)
    async with pool.acquire() as holder, holder.transaction():
        await holder.fetchrow("select * from last_usage_link()")
        started = perf_counter()
        with pytest.raises(TimeoutError):
            await write_rows(pool, [at(1)], KEY)
        assert perf_counter() - started < 2
    monkeypatch.undo()
    assert await write_rows(pool, [at(1)], KEY) == 1
    await whole(pool)


async def test_a_gateway_that_vanishes_in_the_middle_holds_up_the_others_for_ten_seconds_at_most(
    pool: asyncpg.Pool,
) -> None:
    async with pool.acquire() as borrowed:
        async with transaction(borrowed, ledger_module._BEGIN, 5):
            assert await borrowed.fetchval("show idle_in_transaction_session_timeout") == "10s"
        assert await borrowed.fetchval("show idle_in_transaction_session_timeout") == "0"


# --- the key ------------------------------------------------------------------------------------------------------


async def test_the_key_is_of_the_setting_or_kept_in_the_database_and_never_the_secret_itself(
    pool: asyncpg.Pool,
) -> None:
    kept = await asyncio.gather(*(load_audit_key(pool, "") for _ in range(4)))
    assert len(set(kept)) == 1
    given = await load_audit_key(pool, "a secret of the operator's")
    secret = await pool.fetchval("select value from secrets where name = 'audit_key'")
    assert len({secret, kept[0], given, b"a secret of the operator's"}) == 4
    assert len(kept[0]) == len(given) == 32


# --- what it costs ------------------------------------------------------------------------------------------------


async def test_what_the_chain_costs(pool: asyncpg.Pool, figure: Callable[[str], None]) -> None:
    """The median of batches of 500 rows, with the chain and without it in turn."""
    wall: dict[bool, list[float]] = {True: [], False: []}
    cpu: dict[bool, list[float]] = {True: [], False: []}
    now = datetime.now(UTC)
    for number in range(22):
        chained = number % 2 == 0
        rows = [row(started_at=now + timedelta(milliseconds=500 * number + one)) for one in range(500)]
        started, used = perf_counter(), process_time()
        await write_rows(pool, rows, KEY if chained else None)
        wall[chained].append(perf_counter() - started)
        cpu[chained].append(process_time() - used)
    speed = {chained: 500 / median(wall[chained]) for chained in wall}
    cost = {chained: median(cpu[chained]) / 500 * 1e6 for chained in cpu}
    figure(
        f"chain: {speed[True]:.0f} rows a second, {speed[False]:.0f} without it; "
        f"{cost[True]:.0f} µs of our CPU a row, {cost[False]:.0f} without it"
    )
    assert speed[True] > 2000
    await pool.execute("delete from usage where not request_id = any(select unnest(request_ids) from usage_chain)")
    started = perf_counter()
    report = await whole(pool)
    figure(f"chain: {report.rows / (perf_counter() - started):.0f} rows a second are verified")

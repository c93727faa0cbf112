import asyncio
import random
from dataclasses import fields, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from gateway.exchange import new_id
from gateway.stores.ledger import COLUMNS, RowError, drop_months, make_partitions, write_rows
from gateway.stores.migrations import migrate
from gateway.stores.usage import UsageRow
from tests.prove.kill_loop import LEDGER
from tests.support.journal_writer import begun, row
from tests.support.stores import SCHEMA

pytestmark = pytest.mark.integration

TODAY = datetime.now(UTC).date()


def some_rows(count: int = 200) -> list[UsageRow]:
    chance = random.Random(7)
    remembered = {"source": "shared", "source_id": new_id(), "usage_source": "none", "saved_tokens": 7}
    return [
        row(
            **chance.choice([{}, {}, remembered, {**remembered, "saved_micros": 3}]),
            started_at=datetime.now(UTC) - timedelta(hours=chance.randrange(5)),
            key_id=chance.choice(["KeyA", "KeyB"]),
            user_id=chance.choice(["", "ann"]),
            model=chance.choice(["gpt-4o", "claude"]),
            outcome=chance.choice(["ok", "client_abort", "upstream_error", "interrupted"]),
            prompt_tokens=chance.randrange(1000),
            latency_ms=chance.choice([0, 5, 500]),
            ttft_ms=chance.choice([None, 100]),
            cost_micros=chance.choice([None, 0, 7]),
        )
        for _ in range(count)
    ]


async def balanced(pool: asyncpg.Pool) -> bool:
    return await pool.fetch(LEDGER) == []


async def stored(pool: asyncpg.Pool) -> dict[str, UsageRow]:
    ids = ("request_id", "account_id", "source_id")
    names = ", ".join(f"{name}::text" if name in ids else name for name in COLUMNS)
    return {one[0]: UsageRow(*one) for one in await pool.fetch(f"select {names} from usage")}


async def partition_of(pool: asyncpg.Pool, written: UsageRow) -> str:
    query = "select tableoid::regclass::text from usage where request_id = $1"
    name: str = await pool.fetchval(query, written.request_id)
    return name


# --- rows and sums ------------------------------------------------------------------------------------------------


async def test_the_row_has_exactly_the_columns_of_the_table(pool: asyncpg.Pool) -> None:
    columns = await pool.fetch(
        "select column_name from information_schema.columns where table_name = 'usage' order by ordinal_position"
    )
    assert [column["column_name"] for column in columns] == [field.name for field in fields(UsageRow)]


async def test_rows_are_stored_as_they_are_and_the_sums_by_hour_are_theirs(pool: asyncpg.Pool) -> None:
    rows = some_rows()
    assert await write_rows(pool, rows[:50]) == 50
    assert await write_rows(pool, rows[50:]) == 150
    assert await stored(pool) == {one.request_id: one for one in rows}
    assert await balanced(pool)
    sums = await pool.fetchrow("select sum(requests) as requests, sum(unpriced) as unpriced from usage_hourly")
    assert sums is not None
    assert (sums["requests"], sums["unpriced"]) == (200, sum(one.cost_micros is None for one in rows))


async def test_rows_that_are_there_are_not_counted_again(pool: asyncpg.Pool) -> None:
    rows = some_rows()
    await write_rows(pool, rows[:120])
    assert await write_rows(pool, rows) == 80
    assert await write_rows(pool, [*rows, rows[0]]) == 0
    assert len(await stored(pool)) == 200
    assert await balanced(pool)


async def test_an_interrupted_row_is_replaced_by_how_it_really_ended_and_the_sums_follow(pool: asyncpg.Pool) -> None:
    guess = begun(completion_tokens=5, latency_ms=100)
    end = replace(
        guess, outcome="ok", status=200, completion_tokens=9, cost_micros=77, latency_ms=300, ttft_ms=20, model="other"
    )
    await write_rows(pool, [guess, row()])
    assert await write_rows(pool, [end, row()]) == 1
    assert (await stored(pool))[guess.request_id] == end
    assert await balanced(pool)
    await write_rows(pool, [guess])
    await write_rows(pool, [replace(end, completion_tokens=1000)])
    assert (await stored(pool))[guess.request_id] == end, "what ended stays as it ended"
    assert await balanced(pool)


async def test_of_two_that_are_one_row_the_first_stays_in_one_batch_and_in_two(pool: asyncpg.Pool) -> None:
    left, broken = row(outcome="client_abort"), row(outcome="interrupted")
    told = replace(broken, outcome="ok", prompt_tokens=3)
    assert await write_rows(pool, [left, broken, replace(left, outcome="ok"), told, broken]) == 2
    await write_rows(pool, [replace(left, outcome="ok"), broken])
    found = await pool.fetch("select request_id::text as id, outcome from usage")
    assert {one["id"]: one["outcome"] for one in found} == {left.request_id: "client_abort", told.request_id: "ok"}


async def test_many_writers_of_the_same_rows_count_each_once(pool: asyncpg.Pool) -> None:
    rows = some_rows(300)
    guesses = [replace(one, outcome="interrupted", completion_tokens=0) for one in rows]
    chance = random.Random(7)
    batches = [chance.sample(some, 100) for some in (rows, guesses) * 6]
    written = await asyncio.gather(*(write_rows(pool, batch) for batch in batches))
    touched = {one.request_id for batch in batches for one in batch}
    assert sum(written) == len(await stored(pool)) == len(touched)
    assert await balanced(pool)


@pytest.mark.parametrize(
    "poison",
    [
        {"user_id": "a\0b"},
        {"usage_source": "canary"},
        {"latency_ms": 2**40},
        {"account_id": "canary"},
        {
            "user_id": "".join(map(chr, random.Random(7).choices(range(0x4E00, 0x9FFF), k=3000)))
        },  # too long for an index
    ],
)
async def test_a_row_that_the_database_refuses_takes_its_batch_with_it_and_nothing_is_counted(
    pool: asyncpg.Pool, poison: dict[str, object]
) -> None:
    with pytest.raises(RowError) as refusal:
        await write_rows(pool, [row(), row(**poison)])
    assert "canary" not in str(refusal.value)
    assert await stored(pool) == {}
    assert await balanced(pool)


# --- partitions ---------------------------------------------------------------------------------------------------


async def test_this_month_and_the_next_get_a_partition_once(pool: asyncpg.Pool) -> None:
    assert sum(await asyncio.gather(*(make_partitions(pool, date(2026, 12, 31)) for _ in range(4)))) == 2
    names = await pool.fetch("select inhrelid::regclass::text from pg_inherits where inhparent = 'usage'::regclass")
    assert {name[0] for name in names} == {"usage_default", "usage_2026_12", "usage_2027_01"}


async def test_rows_lie_in_the_partition_of_their_month_in_utc(pool: asyncpg.Pool) -> None:
    await make_partitions(pool, date(2026, 1, 15))
    last = row(started_at=datetime(2026, 1, 31, 23, 59, 59, 999999, UTC))
    first = row(started_at=datetime(2026, 2, 1, tzinfo=UTC))
    await write_rows(pool, [last, first])
    assert await partition_of(pool, last) == "usage_2026_01"
    assert await partition_of(pool, first) == "usage_2026_02"


async def test_no_time_is_refused_and_a_month_that_was_not_made_ahead_is_made_later(pool: asyncpg.Pool) -> None:
    months = [datetime(year, month, 5, tzinfo=UTC) for year, month in ((1970, 1), (2026, 3), (2026, 4), (9999, 12))]
    rows = [row(started_at=month) for month in months]
    assert await write_rows(pool, rows) == 4
    assert {await partition_of(pool, one) for one in rows} == {"usage_default"}
    assert await make_partitions(pool, date(2026, 3, 1)) == 2
    names = [await partition_of(pool, one) for one in rows]
    assert names == ["usage_default", "usage_2026_03", "usage_2026_04", "usage_default"]
    assert await write_rows(pool, rows) == 0, "a row that moved is still known"
    assert await balanced(pool)


async def test_a_missing_partition_is_no_fault_of_the_rows(pool: asyncpg.Pool) -> None:
    await pool.execute("drop table usage_default")
    with pytest.raises(asyncpg.CheckViolationError):
        await write_rows(pool, [row(started_at=datetime(1999, 1, 1, tzinfo=UTC))])


async def test_months_that_are_no_longer_kept_are_dropped_and_their_sums_stay(pool: asyncpg.Pool) -> None:
    for month in (date(2026, 1, 1), date(2026, 3, 1)):
        await make_partitions(pool, month)
    old = row(started_at=datetime(1999, 1, 5, tzinfo=UTC))
    rows = [row(started_at=datetime(2026, month, 5, tzinfo=UTC)) for month in (1, 2, 3, 4)]
    await write_rows(pool, [old, *rows])
    assert await drop_months(pool, 1, today=date(2026, 4, 20)) == 2
    assert set(await stored(pool)) == {one.request_id for one in rows[2:]}
    assert await pool.fetchval("select sum(requests) from usage_hourly") == 5
    assert await drop_months(pool, 1, today=date(2026, 4, 20)) == 0


# --- the migration ------------------------------------------------------------------------------------------------


async def test_the_migration_moves_the_rows_that_are_there_and_sums_them_up(
    empty_database_url: str, tmp_path: Path
) -> None:
    for path in (SCHEMA.parent / "migrations").glob("0001*"):
        (tmp_path / path.name).write_text(path.read_text())
    await migrate(empty_database_url, tmp_path)
    rows = [replace(one, cost_micros=None) for one in some_rows() if one.source == "provider"]
    rows += [replace(rows[0], request_id=row().request_id, started_at=datetime(1970, 1, 1, tzinfo=UTC))]
    async with asyncpg.create_pool(empty_database_url, min_size=1) as pool:
        columns = COLUMNS[: COLUMNS.index("cost_micros")]
        before = [tuple(getattr(one, name) for name in columns) for one in rows]
        await pool.copy_records_to_table("usage", records=before, columns=columns)
        await migrate(empty_database_url)
        assert await stored(pool) == {one.request_id: one for one in rows}
        assert await balanced(pool)
        assert await partition_of(pool, rows[0]) == f"usage_{rows[0].started_at:%Y_%m}"
        assert await partition_of(pool, rows[-1]) == "usage_default"

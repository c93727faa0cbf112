"""Questions about many rows: as exact as if the rows were added up, and quick. `make prove-stats` does it with more."""

import asyncio
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.exchange import new_id
from gateway.stores.ledger import drop_months, write_rows
from gateway.stores.stats import _ROWS, GROUP_BY, Figures, Scope, read_stats
from gateway.stores.sums import SPANS, begin_of, pieces
from tests.prove.stats_at_scale import ACCOUNT, DAYS, FILTERS, MOST, Question, ask, fill, questions, yardstick
from tests.support.journal_writer import begun, row
from tests.support.stores import Databases

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

ROWS = 100_000
YARDSTICK = 8.0  # milliseconds that it takes on two cores of a server with nothing else to do
UNTIL = datetime.now(UTC)


@pytest.fixture(scope="module")
def filled_url(databases: Databases) -> Iterator[str]:
    """A database with ROWS rows up to UNTIL."""

    async def work(url: str) -> None:
        async with asyncpg.create_pool(url, min_size=1) as pool, pool.acquire() as connection:
            await fill(connection, ROWS, UNTIL)

    with databases.fresh() as url, ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work(url)).result()
        yield url


# --- what the rows themselves say ---------------------------------------------------------------------------------

_RAW = """
select
    coalesce(case $9::text
        when 'user' then user_id when 'app' then app_id when 'model' then model when 'provider' then provider
        when 'key' then key_id when 'day' then to_char(started_at at time zone 'UTC', 'YYYY-MM-DD"T00:00:00Z"')
        when 'hour' then to_char(started_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24":00:00Z"')
    end, '') as name,
    count(*) as requests,
    count(*) filter (where outcome not in ('ok', 'client_abort', 'budget_exhausted')),
    count(*) filter (where outcome = 'client_abort'),
    sum(prompt_tokens)::bigint, sum(completion_tokens)::bigint, sum(cached_tokens)::bigint,
    sum(cache_write_tokens)::bigint, sum(reasoning_tokens)::bigint, coalesce(sum(cost_micros), 0)::bigint,
    count(*) filter (where cost_micros is null),
    count(*) filter (where source <> 'provider' and outcome in ('ok', 'client_abort', 'budget_exhausted')),
    sum(saved_tokens)::bigint, coalesce(sum(saved_micros), 0)::bigint,
    avg(latency_ms) filter (where source = 'provider' and (outcome <> 'interrupted' or latency_ms > 0))::float8,
    avg(ttft_ms) filter (where source = 'provider')::float8
from usage
where ($1::uuid is null or account_id = $1) and ($2::text is null or user_id = $2)
  and ($3::text is null or app_id = $3) and ($4::text is null or model = $4) and ($5::text is null or provider = $5)
  and ($6::text is null or key_id = $6)
  and ($7::timestamptz is null or started_at >= $7) and ($8::timestamptz is null or started_at < $8)
group by name
order by case when $9 in ('day', 'hour') then min(started_at) end, requests desc, name
limit 1000
"""


async def raw(pool: asyncpg.Pool, scope: Scope, group_by: str | None = None) -> list[Figures]:
    found = await pool.fetch(_RAW, *scope.filters, scope.since, scope.until, group_by)
    return [Figures(*one) for one in found]


def same(told: list[Figures], expected: list[Figures]) -> bool:
    """Every number is exactly equal, the averages but for the last bits of a float."""
    return [astuple(one)[:-2] for one in told] == [astuple(one)[:-2] for one in expected] and all(
        ours == pytest.approx(theirs)
        for one, other in zip(told, expected, strict=True)
        for ours, theirs in zip(astuple(one)[-2:], astuple(other)[-2:], strict=True)
    )


def some_scope(chance: random.Random) -> Scope:
    """A range that begins and ends in the middle of an hour, or nowhere; an asker; none, one or two filters."""
    moments = sorted(UNTIL - timedelta(days=DAYS) * chance.random() for _ in range(2))
    filters: dict[str, str] = {}
    for columns in chance.sample(list(FILTERS.values()), chance.choice([0, 1, 1, 2])):
        filters |= columns
    return Scope(
        chance.choice([None, ACCOUNT, "00000000-0000-4000-8000-000000000077"]),
        chance.choice([moments[0], moments[0], None]),
        chance.choice([moments[1], None]),
        **filters,
    )


# --- exact --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_by", [None, *GROUP_BY])
async def test_figures_are_the_sums_of_the_rows(filled_url: str, group_by: str | None) -> None:
    chance = random.Random(group_by)
    asked = 0
    async with asyncpg.create_pool(filled_url, min_size=1, max_size=2) as pool:
        for _ in range(8):
            scope = some_scope(chance)
            if group_by == "hour":
                since = max(scope.since, UNTIL - timedelta(days=6)) if isinstance(scope.since, datetime) else None
                scope = replace(scope, since=since or UNTIL - timedelta(days=5.43), until=None)
            stats = await read_stats(pool, scope, group_by)
            totals = await raw(pool, scope)
            assert same([stats.totals], totals or [Figures()]), scope
            assert same(stats.top_models, (await raw(pool, scope, "model"))[:10]), scope
            if group_by:
                assert same(stats.groups, await raw(pool, scope, group_by)), scope
                asked += len(stats.groups)
    assert asked or group_by is None, "questions that find nothing prove nothing"


async def test_the_last_hour_is_that_of_the_rows(filled_url: str) -> None:
    async with asyncpg.create_pool(filled_url, min_size=1, max_size=2) as pool:
        stats = await read_stats(pool, Scope(None))
        assert same([stats.last_hour], await raw(pool, Scope(None, stats.as_of - timedelta(hours=1))) or [Figures()])


async def test_groups_of_thousands_are_the_busiest_and_the_rest_is_announced(filled_url: str) -> None:
    async with asyncpg.create_pool(filled_url, min_size=1, max_size=2) as pool:
        stats = await read_stats(pool, Scope(None), "user")
    assert (len(stats.groups), stats.more_groups) == (1000, True)


async def test_hours_go_back_a_week_and_what_is_older_is_announced(filled_url: str) -> None:
    until = begin_of(UNTIL, "hour") - timedelta(minutes=30)
    async with asyncpg.create_pool(filled_url, min_size=1, max_size=2) as pool:
        stats = await read_stats(pool, Scope(None, until=until), "hour")
    assert stats.groups[0].name == f"{until - timedelta(days=7):%Y-%m-%dT%H}:00:00Z"
    assert stats.groups[-1].name == f"{until:%Y-%m-%dT%H}:00:00Z"
    assert (len(stats.groups), stats.more_groups) == (7 * 24 + 1, True)


@given(
    st.timedeltas(timedelta(), timedelta(days=365)) | st.none(),
    st.timedeltas(timedelta(), timedelta(days=200)) | st.none(),
    st.integers(1, 4),
    st.data(),
)
def test_the_pieces_of_a_range_cover_it_once_and_nothing_else(
    age: timedelta | None, length: timedelta | None, spans: int, data: st.DataObject
) -> None:
    now = datetime(2026, 11, 21, 22, 17, 5, tzinfo=UTC)
    begin = now - age if age is not None else None
    end = (begin or now) + length if length is not None else None
    made = pieces(begin, end, now, SPANS[:spans])
    assert 1 <= len(made) <= 2 * spans - 1, "the middle, and two ends of each span but the longest"
    for piece in made:
        for border in (piece.begin, piece.end):
            assert piece.span == "row" or border is None or begin_of(border, piece.span) == border
    borders = [border for piece in made for border in (piece.begin, piece.end) if border]
    moment = data.draw(st.sampled_from([now, *borders])) + data.draw(
        st.timedeltas(timedelta(days=-40), timedelta(days=40)) | st.just(timedelta())
    )
    covered = sum(
        piece.sign
        for piece in made
        if (piece.begin is None or piece.begin <= moment) and (piece.end is None or moment < piece.end)
    )
    assert covered == ((begin is None or begin <= moment) and (end is None or moment < end))


@pytest.mark.parametrize("time_zone", ["UTC", "America/New_York"])
async def test_postgres_begins_a_span_where_we_do(pool: asyncpg.Pool, time_zone: str) -> None:
    """Also where an administrator's own time zone has an hour less this month."""
    first = datetime(2023, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
    moments = [first + step * timedelta(hours=1, microseconds=1) for step in range(430 * 24)]  # a leap year's February
    async with pool.acquire() as connection:
        await connection.execute(f"set time zone '{time_zone}'")
        for span in SPANS[1:]:
            told = await connection.fetch("select usage_span_begin($1, unnest($2::timestamptz[]))", span, moments)
            assert [begin for (begin,) in told] == [begin_of(moment, span) for moment in moments]
        await connection.execute("reset time zone")
    assert {begin_of(moment, "pentad").day for moment in moments} == {1, 6, 11, 16, 21, 26}


# --- written ------------------------------------------------------------------------------------------------------

_ROLLUPS = "select * from usage_rollups where requests <> 0"


async def test_rollups_move_with_the_rows_and_are_what_they_would_be_made_anew(pool: asyncpg.Pool) -> None:
    chance = random.Random(7)

    def one(**changes: Any) -> Any:
        at = UNTIL - timedelta(days=70) * chance.random()
        return row(started_at=at, user_id=chance.choice(["", "ann"]), model=chance.choice(["a", "b"]), **changes)

    guesses = [begun(started_at=one().started_at, user_id="guess", latency_ms=7) for _ in range(50)]
    ends = [replace(guess, outcome="ok", user_id="end", model="c", completion_tokens=9, ttft_ms=3) for guess in guesses]
    saved = {"source": "cache", "source_id": new_id(), "saved_tokens": 9, "saved_micros": 4}
    rows = [one(cost_micros=chance.choice([None, 5]), **chance.choice([{}, {}, saved])) for _ in range(200)]
    batches = [guesses, rows[:120], [*guesses, *rows], [*ends, *rows[50:90]], ends]
    for batch in batches:
        await write_rows(pool, batch)
    await asyncio.gather(*(write_rows(pool, chance.sample([*rows, *ends], 100)) for _ in range(6)))
    moved = {tuple(cell) for cell in await pool.fetch(_ROLLUPS)}
    await pool.execute("select fill_usage_rollups()")
    assert moved == {tuple(cell) for cell in await pool.fetch(_ROLLUPS)}
    assert {cell[0] for cell in moved} == {
        "hour_by_model", *(f"{span}_by_{kept}" for span in SPANS[2:] for kept in ("model", "key", "user", "all"))
    }  # fmt: skip
    stats = await read_stats(pool, Scope(None), "user")
    assert {(group.name, group.requests) for group in stats.groups} >= {("end", 50)}
    assert "guess" not in {group.name for group in stats.groups}


async def test_figures_of_months_whose_rows_were_dropped_are_kept(pool: asyncpg.Pool) -> None:
    old = [row(started_at=UNTIL - timedelta(days=100)) for _ in range(3)]
    await write_rows(pool, [*old, row(started_at=UNTIL)])
    await drop_months(pool, 1, today=UNTIL.date())
    for group_by in GROUP_BY:
        if group_by != "hour":  # they go back a week
            stats = await read_stats(pool, Scope(None), group_by)
            assert sum(group.requests for group in stats.groups) == stats.totals.requests == 4


# --- quick --------------------------------------------------------------------------------------------------------


async def test_every_kind_of_question_is_answered_in_a_fifth_of_a_second(
    filled_url: str, figure: Callable[[str], None]
) -> None:
    times: list[float] = []
    async with asyncpg.create_pool(filled_url, min_size=1, max_size=1) as pool:
        for question in questions(UNTIL):
            times.append(await best_time(pool, question))
            assert times[-1] < MOST * max(1.0, await yardstick(pool) / YARDSTICK), question
        measure = median([await yardstick(pool) for _ in range(9)])
    figure(
        f"stats: {len(times)} kinds of questions about {ROWS} rows, median {median(times):.0f} ms, slowest "
        f"{max(times):.0f} ms (a sum of 100,000 numbers: {measure:.0f} ms)"
    )


async def test_a_page_of_rows_is_read_by_an_index_and_nothing_is_sorted(filled_url: str) -> None:
    async with asyncpg.create_pool(filled_url, min_size=1, max_size=1) as pool:
        plan = await pool.fetch(f"explain {_ROWS}", *Scope(None).filters, None, None, None, 100)
    lines = [line[0] for line in plan]
    assert any("Index Scan Backward" in line for line in lines), lines
    assert not any("Sort  (cost" in line for line in lines), lines


async def best_time(pool: asyncpg.Pool, question: Question) -> float:
    """Milliseconds; of a few times, when something else seems to use the machine."""
    times = [await ask(pool, question)]
    while times[-1] > MOST / 2 and len(times) < 8:
        times.append(await ask(pool, question))
    return min(times)

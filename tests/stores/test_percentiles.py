"""Percentiles over time: as Python makes them of the same rows, of a sample where there are many, and quick."""

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from statistics import median, quantiles
from time import perf_counter
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from gateway.stores import percentiles
from gateway.stores.ledger import write_rows
from gateway.stores.percentiles import RANGES, Percentiles, read_latency
from gateway.stores.stats import Scope, read_stats
from gateway.stores.usage import UsageRow
from tests.prove.stats_at_scale import yardstick
from tests.support.journal_writer import row
from tests.support.stores import Databases

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

ACCOUNTS = [str(uuid4()) for _ in range(2)]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ROWS = 400_000
MOST = 300.0  # milliseconds that a question may take
YARDSTICK = 8.0  # milliseconds that it takes on two cores of a server with nothing else to do


# --- exact --------------------------------------------------------------------------------------------------------


def some_rows(chance: random.Random, count: int, age: timedelta) -> list[UsageRow]:
    now = datetime.now(UTC)
    return [
        row(
            started_at=now - age * chance.random(),
            account_id=chance.choice(ACCOUNTS),
            key_id=chance.choice(["Key000000001", "Key000000002"]),
            user_id=chance.choice(["u1", "u2"]),
            app_id=chance.choice(["a1", "a2"]),
            model=chance.choice(["m1", "m2"]),
            provider=chance.choice(["p1", "p2"]),
            outcome=chance.choice(["ok", "ok", "client_abort", "upstream_error", "interrupted"]),
            latency_ms=chance.choice([0, round(chance.lognormvariate(6, 2))]),
            ttft_ms=chance.choice([None, round(chance.lognormvariate(4, 1))]),
        )
        for _ in range(count)
    ]


def of_python(numbers: list[int]) -> Any:
    """The same by the standard library; it needs two numbers, of which one alone is both."""
    cuts = quantiles(numbers * 2 if len(numbers) == 1 else numbers, n=100, method="inclusive")
    return pytest.approx((cuts[49], cuts[94], cuts[98]))


def expected(rows: list[UsageRow], begin: datetime, end: datetime, step: timedelta) -> list[Any]:
    steps: dict[datetime, list[UsageRow]] = defaultdict(list)
    for one in rows:
        if begin <= one.started_at < end and (one.outcome != "interrupted" or one.latency_ms):
            steps[EPOCH + (one.started_at - EPOCH) // step * step].append(one)
    return [
        (
            start,
            len(group),
            of_python([one.latency_ms for one in group]),
            of_python(ttfts) if (ttfts := [one.ttft_ms for one in group if one.ttft_ms is not None]) else None,
        )
        for start, group in sorted(steps.items())
    ]


@pytest.mark.parametrize("name", RANGES)
async def test_percentiles_are_those_that_python_makes_of_the_same_rows(pool: asyncpg.Pool, name: str) -> None:
    chance = random.Random(name)
    length, _ = RANGES[name]
    rows = some_rows(chance, 1500, length * 1.1)
    await write_rows(pool, rows)
    filters: dict[str, Any] = {"user": "u1", "app": "a2", "model": "m1", "provider": "p2", "key": "Key000000002"}
    asked = 0
    for account_id in (None, ACCOUNTS[0]):
        for names in ([], ["model"], ["key"], ["user", "app"], ["provider", "model", "key"]):
            scope = Scope(account_id, **{one: filters[one] for one in names})
            found = await read_latency(pool, scope, name)
            left = [
                one
                for one in rows
                if account_id in (None, one.account_id)
                and all(getattr(one, COLUMNS[column]) == filters[column] for column in names)
            ]
            assert (found.end - found.begin, found.sampled) == (length, False)
            told = [(point.start, point.requests, point.latency_ms, point.ttft_ms) for point in found.points]
            assert told == expected(left, found.begin, found.end, found.step), scope
            asked += len(told)
    assert asked > 200, "questions that find nothing prove nothing"


COLUMNS = {"user": "user_id", "app": "app_id", "model": "model", "provider": "provider", "key": "key_id"}


async def test_requests_without_an_end_or_a_first_token_are_in_no_percentile(pool: asyncpg.Pool) -> None:
    at = datetime.now(UTC) - timedelta(minutes=30)
    plain = row(started_at=at, latency_ms=100, ttft_ms=None)
    unseen = [replace(row(), started_at=at, outcome="interrupted", latency_ms=0) for _ in range(5)]
    await write_rows(pool, [plain, *unseen])
    [point] = (await read_latency(pool, Scope(None), "1h")).points
    assert (point.requests, point.latency_ms, point.ttft_ms) == (1, Percentiles(100, 100, 100), None)


async def test_a_range_without_requests_has_no_points(pool: asyncpg.Pool) -> None:
    assert (await read_latency(pool, Scope(None), "30d")).points == []


# --- sampled ------------------------------------------------------------------------------------------------------

# Latencies in milliseconds are exponential, of a mean that doubles from the range's begin to its end. One of twenty is
# on the full minute and ten times as slow: a sample of the same place of every slice would see these always, or never.
_MANY = """
insert into usage
select
    gen_random_uuid(), started_at, case when number % 2 = 0 then 'Key000000001' else 'Key000000002' end,
    case when number % 10 = 0 then $4::uuid else $5::uuid end, '', '', '', 'openai',
    case when number % 4 = 0 then 'm1' else 'm2' end, 'm', true, 200, 'ok', '', 'stop', 100, 50, 0, 0, 0, 'provider',
    ceil(-ln(1 - random()) * 1000 * (1 + number::float8 / $3) * case when number % 20 = 0 then 10 else 1 end),
    50 + 50 * random(), 0
from generate_series(1, $3::bigint) as number
cross join lateral (select $1::timestamptz + ($2::timestamptz - $1::timestamptz) * (number - 0.5) / $3 as at) as even
cross join lateral (
    select case when number % 20 = 0 then date_trunc('minute', at) + interval '1 ms' * (number % 7) else at end
    as started_at
) as moment
"""

_SUMS = """
insert into usage_hourly
select
    account_id, date_trunc('hour', started_at, 'UTC'), key_id, user_id, app_id, provider, model,
    count(*), 0, 0, sum(prompt_tokens), sum(completion_tokens), 0, 0, 0, 0, 0,
    sum(latency_ms), count(*), sum(ttft_ms), count(ttft_ms)
from usage group by 1, 2, 3, 4, 5, 6, 7
"""


async def fill(pool: asyncpg.Pool, rows: int, age: timedelta) -> None:
    until = datetime.now(UTC)
    since = until - age
    for moment in (since, until):
        await pool.execute("select make_usage_partition($1)", moment.date().replace(day=1))
    async with pool.acquire() as connection:
        await connection.execute("select setseed(0.5)")
        await connection.execute(_MANY, since, until, rows, *ACCOUNTS, timeout=600)
    await pool.execute(_SUMS, timeout=600)
    await pool.execute("select fill_usage_rollups()", timeout=600)
    await pool.execute("analyze usage", timeout=600)


@pytest.fixture(scope="module")
def filled_url(databases: Databases) -> Iterator[str]:
    """A database with ROWS rows of the last thirty days."""

    async def work(url: str) -> None:
        async with asyncpg.create_pool(url, min_size=1) as pool:
            await fill(pool, ROWS, timedelta(days=30))

    with databases.fresh() as url, ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work(url)).result()
        yield url


@pytest.fixture
async def filled(filled_url: str) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(filled_url, min_size=1, max_size=1) as pool:
        yield pool


SCOPES = {
    "admin": Scope(None),
    "admin, of a model": Scope(None, model="m1"),
    "member": Scope(ACCOUNTS[1]),
    "member with few": Scope(ACCOUNTS[0]),
    "a key's": Scope(None, key="Key000000001"),
}


@pytest.mark.parametrize("asker", SCOPES)
async def test_many_rows_are_sampled_evenly_and_it_is_said(
    filled: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None], asker: str
) -> None:
    scope, found = SCOPES[asker], []
    rows = (await read_stats(filled, replace(scope, since=timedelta(days=30), model=None))).totals.requests
    for most in (rows * 2, rows // 5):
        monkeypatch.setattr(percentiles, "MAX_SAMPLE", most)
        found.append(await read_latency(filled, scope, "30d"))
    exact, sampled = found
    assert (exact.sampled, sampled.sampled) == (False, True)
    theirs = {point.start: point for point in sampled.points}
    inner = exact.points[1:-1]  # of the ends' steps there is but a part, in which no window may be
    assert {point.start for point in inner} <= theirs.keys() <= {point.start for point in exact.points}
    counts = [sum(point.requests for point in one.points) for one in found]
    assert counts[1] == pytest.approx(counts[0], rel=0.06)
    off = [theirs[ours.start].latency_ms.p95 / ours.latency_ms.p95 - 1 for ours in inner]
    assert abs(median(off)) < 0.15, "by chance as often too much as too little"
    figure(f"percentiles of a fifth of {rows} rows ({asker}): p95 is {100 * median(map(abs, off)):.1f} % off (median)")


async def test_whether_a_tenant_is_sampled_does_not_depend_on_others(
    pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(percentiles, "MAX_SAMPLE", 10)
    own = [row(account_id=ACCOUNTS[0], key_id="Key000000001") for _ in range(10)]
    others = [row(account_id=ACCOUNTS[1], key_id="Key000000002") for _ in range(50)]
    await write_rows(pool, [*own, *others])
    assert (await read_latency(pool, Scope(None), "1h")).sampled
    assert not (await read_latency(pool, Scope(ACCOUNTS[0]), "1h")).sampled
    foreign = await read_latency(pool, Scope(ACCOUNTS[0], key="Key000000002"), "1h")
    assert (foreign.sampled, foreign.points) == (False, [])


async def test_a_sample_is_the_same_rows_each_time(pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the lines of a chart would jump about at each look."""
    monkeypatch.setattr(percentiles, "MAX_SAMPLE", 300)
    await fill(pool, 3000, timedelta(days=1))
    first, second = [(await read_latency(pool, Scope(None), "24h")).points[1:-1] for _ in range(2)]
    assert first == second


def test_windows_are_all_places_of_their_slices_and_never_two_at_once() -> None:
    begin = datetime(2026, 3, 1, 13, 7, 5, 123456, tzinfo=UTC)
    each, share = timedelta(seconds=3), 0.1
    windows = list(percentiles._windows(begin, begin + timedelta(hours=1), each, share))
    assert len(windows) == 1201
    assert all(opens <= closes <= later for (opens, closes), (later, _) in pairwise(windows))
    assert (windows[0][0] >= begin, windows[-1][1] <= begin + timedelta(hours=1)) == (True, True)
    seconds = sum((closes - opens).total_seconds() for opens, closes in windows)
    assert seconds == pytest.approx(360, rel=0.01)
    places = {int((opens - EPOCH) % each / each * 10) for opens, _ in windows}
    assert places == set(range(9)), "the last tenth is covered by what begins before it"


# --- quick --------------------------------------------------------------------------------------------------------


async def test_every_question_takes_less_than_three_tenths_of_a_second(
    filled: asyncpg.Pool, figure: Callable[[str], None]
) -> None:
    times: dict[str, float] = {}
    for name in RANGES:
        for asker, scope in SCOPES.items():
            taken = times[f"{asker}, {name}"] = await best_time(filled, scope, name)
            assert taken < MOST * max(1.0, await yardstick(filled) / YARDSTICK), (asker, name)
    assert (await read_latency(filled, Scope(None), "30d")).sampled
    slowest = max(times, key=lambda question: times[question])
    figure(
        f"percentiles: {len(times)} kinds of questions about {ROWS} rows, median {median(times.values()):.0f} ms, "
        f"slowest {times[slowest]:.0f} ms ({slowest})"
    )


async def best_time(pool: asyncpg.Pool, scope: Scope, name: str) -> float:
    """Milliseconds; of a few times, because something else may use the machine."""
    times: list[float] = []
    while len(times) < 2 or (times[-1] > MOST / 2 and len(times) < 8):
        started = perf_counter()
        await read_latency(pool, scope, name)
        times.append(1000 * (perf_counter() - started))
    return min(times)

"""Fills a database with usage as a busy deployment has it, and times every kind of question of `/api/stats`.

`make prove-stats` does it with ten million rows of two months, in a folder of its own, and prints the times of each kind
beside those of a yardstick. It fails when one takes longer than MOST. Its Postgres is set up for
this machine, as one with so much data is: a quarter of the memory for its buffers
(https://www.postgresql.org/docs/current/runtime-config-resource.html), and for a question as many processes as there
are cores. The embedded one reads such tables anew each time, and takes up to half as long again.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

import asyncpg

from gateway.embedded import Embedded
from gateway.exchange import new_id
from gateway.stores.ledger import write_rows
from gateway.stores.migrations import migrate
from gateway.stores.postgres import Connection
from gateway.stores.stats import GROUP_BY, Scope, read_stats
from gateway.stores.usage import UsageRow
from tests.support.stores import switch_off_fsync

DAYS = 61  # that the rows are of
STEP = 500_000  # rows of one INSERT
MOST = 200.0  # milliseconds that a question may take
BATCH = 500  # rows that the shipper writes at once

# --- what there is ------------------------------------------------------------------------------------------------

_ROWS = """
insert into usage
select
    (lpad(to_hex((extract(epoch from started_at) * 1000)::bigint), 12, '0')
        || '7' || substr(noise, 1, 3) || '8' || substr(noise, 4, 15))::uuid,
    started_at,
    'Key' || lpad((account * 10 + key)::text, 9, '0'),
    ('00000000-0000-4000-8000-' || lpad(account::text, 12, '0'))::uuid,
    case when chance[1] < 0.1 then '' else 'user-' || person end,
    'app-' || case when chance[2] < 0.95 then key * 7 + account else key * 3 + 1 end % 50,
    '',
    case when chance[3] < 0.99 then 'provider-' || 1 + model * 5 / 31 else 'provider-5' end,
    'model-' || model, 'model-' || model,
    chance[4] < 0.8,
    case when chance[5] < 0.98 then 200 else 502 end,
    case when chance[5] < 0.94 then 'ok' when chance[5] < 0.97 then 'client_abort' when chance[5] < 0.98 then
        'budget_exhausted' when chance[5] < 0.999 then 'upstream_error' else 'interrupted' end,
    '', 'stop',
    prompt, (exp(chance[6] * 7))::bigint, prompt * (chance[7] * 3)::integer / 4, prompt / 50, (chance[8] * 20)::bigint,
    'provider',
    (exp(chance[6] * 7) * 12)::integer,
    case when chance[5] < 0.95 then 100 + (chance[9] * 900)::integer end,
    case when model <> 30 then (prompt * 3 + exp(chance[6] * 7) * 15)::bigint / 10 end,
    case when chance[4] < 0.95 then 'provider' else 'cache' end, null,
    case when chance[4] < 0.95 then 0 else prompt end, case when chance[4] > 0.95 and model <> 30 then prompt * 3 / 10 end
from generate_series($3::bigint, $4::bigint - 1) as number
cross join lateral (
    -- The day's traffic swings by the hour.
    select $1::timestamptz + ($2::timestamptz - $1::timestamptz)
        * ((number + 0.5) / $5 + sin(2 * pi() * number / $5 * $6) / (10 * $6)) as started_at,
        array(select random() from generate_series(1, 12 + number * 0)) as chance,
        md5(random()::text) as noise
) as moment
cross join lateral (
    -- Zipf: the first of 20,000 users has a tenth of the requests.
    select floor(exp(chance[10] * ln(20001)))::integer as person, (exp(chance[11] * 8))::bigint as prompt
) as asker
cross join lateral (
    select
        person % 200 as account,
        case when chance[12] < 0.95 then person * 31 % 10 else floor(chance[7] * 10)::integer end as key
) as payer
cross join lateral (
    -- A key is a service's: it knows five models of thirty, some of them everybody's, and each user has a favourite.
    select floor(exp(
        ((account * 10 + key) * 7919 + (person / 200 + floor(chance[9] ^ 3 * 4)::integer) % 5 * 389) % 1000
        / 1000.0 * ln(31)
    ))::integer as model
) as choice
"""

_HOURS = """
insert into usage_hourly
select
    account_id, date_trunc('hour', started_at, 'UTC'), key_id, user_id, app_id, provider, model,
    count(*),
    count(*) filter (where outcome not in ('ok', 'client_abort', 'budget_exhausted')),
    count(*) filter (where outcome = 'client_abort'),
    sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens), sum(cache_write_tokens), sum(reasoning_tokens),
    coalesce(sum(cost_micros), 0), count(*) filter (where cost_micros is null),
    coalesce(sum(latency_ms) filter (where source = 'provider'), 0),
    count(*) filter (where source = 'provider' and (outcome <> 'interrupted' or latency_ms > 0)),
    coalesce(sum(ttft_ms) filter (where source = 'provider'), 0), count(ttft_ms) filter (where source = 'provider'),
    count(*) filter (where source <> 'provider' and outcome in ('ok', 'client_abort', 'budget_exhausted')),
    sum(saved_tokens), coalesce(sum(saved_micros), 0)
from usage
group by 1, 2, 3, 4, 5, 6, 7
order by 2
"""


async def fill(connection: Connection, rows: int, until: datetime) -> None:
    """Rows of the DAYS before `until`, of 200 accounts, 2,000 keys, 20,000 users, 50 apps, 30 models, 5 providers; and
    their sums."""
    since = until - timedelta(days=DAYS)
    await connection.execute("set work_mem = '256MB'; set synchronous_commit = off; select setseed(0.5)")
    for month in {(since + timedelta(days=day)).date().replace(day=1) for day in range(DAYS + 1)}:
        await connection.execute("select make_usage_partition($1)", month)
    for first in range(0, rows, STEP):
        last = min(first + STEP, rows)
        await connection.execute(_ROWS, since, until, first, last, float(rows), float(DAYS), timeout=600)
    await connection.execute(_HOURS, timeout=3600)
    await connection.execute("select fill_usage_rollups()", timeout=3600)
    await connection.execute("vacuum analyze", timeout=3600)
    await connection.execute("reset work_mem")


# --- what is asked ------------------------------------------------------------------------------------------------


class Question(NamedTuple):
    asker: str  # admin, member
    range: str
    filter: str
    group_by: str | None
    scope: Scope

    def __str__(self) -> str:
        return f"{self.asker}, {self.range}, {self.filter}, by {self.group_by or 'nothing'}"


ACCOUNT = "00000000-0000-4000-8000-000000000001"  # the busiest, with a tenth of all requests
FILTERS: dict[str, dict[str, str]] = {
    "all": {},
    "its busiest user": {"user": "user-1"},
    "its busiest app": {"app": "app-8"},
    "the busiest model": {"model": "model-1"},
    "the busiest provider": {"provider": "provider-1"},
    "the busiest key": {"key": "Key000000011"},
    "user and model": {"user": "user-1", "model": "model-1"},
}


def questions(until: datetime) -> Iterator[Question]:
    """Every kind of question: who asks, range, filter, groups."""
    ranges: dict[str, tuple[Any, Any]] = {
        **{f"{days}d": (timedelta(days=days), None) for days in (7, 30)},
        **{f"{hours}h": (timedelta(hours=hours), None) for hours in (1, 24)},
        "everything": (None, None),
        # Both ends in the middle of an hour of a day of a month.
        "ragged": (until - timedelta(days=47, hours=13.3), until - timedelta(days=13, hours=3.7)),
    }
    for asker, account_id in (("admin", None), ("member", ACCOUNT)):
        for range_name, (begin, end) in ranges.items():
            for filter_name, columns in FILTERS.items():
                for group_by in (None, *GROUP_BY):
                    scope = Scope(account_id, begin, end, **columns)
                    yield Question(asker, range_name, filter_name, group_by, scope)


async def ask(pool: asyncpg.Pool, question: Question) -> float:
    """Milliseconds."""
    started = perf_counter()
    await read_stats(pool, question.scope, question.group_by)
    return 1000 * (perf_counter() - started)


async def yardstick(pool: asyncpg.Pool) -> float:
    """Milliseconds of a statement that reads no table: what the machine can do at the moment."""
    started = perf_counter()
    await pool.execute("select sum(number) from generate_series(1, 100000) as number")
    return 1000 * (perf_counter() - started)


# --- what is written ----------------------------------------------------------------------------------------------


async def write(pool: asyncpg.Pool, batches: int, writers: int = 2) -> float:
    """Rows a second of so many processes' shippers, with rows like those that are there."""
    known = await pool.fetch(
        "select * from usage where started_at > $1 limit $2", datetime.now(UTC) - timedelta(days=2), batches * BATCH
    )
    rows = [_again(record) for record in known]
    parts = [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]

    async def write_some(some: list[list[UsageRow]]) -> None:
        for part in some:
            await write_rows(pool, part)

    started = perf_counter()
    await asyncio.gather(*(write_some(parts[number::writers]) for number in range(writers)))
    return len(rows) / (perf_counter() - started)


def _again(record: asyncpg.Record) -> UsageRow:
    """The same request once more, now."""
    columns = dict(record.items())
    row = UsageRow(**{name: columns[name] for name in UsageRow.__dataclass_fields__})
    return replace(row, request_id=new_id(), started_at=datetime.now(UTC), account_id=str(row.account_id))


# --- the proof ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _database(folder: Path) -> AsyncIterator[asyncpg.Pool]:
    servers = Embedded(folder, postgres=True, redis=False)
    with patch.dict("gateway.embedded._POSTGRES_OPTIONS", _set_up()):
        await asyncio.to_thread(servers.start)
    try:
        await asyncio.to_thread(switch_off_fsync, servers.database_url)
        await migrate(servers.database_url)
        async with asyncpg.create_pool(servers.database_url, min_size=2, max_size=2) as pool:
            yield pool
    finally:
        await asyncio.to_thread(servers.stop)


def _set_up() -> dict[str, str]:
    quarter = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 22  # 2^20 bytes
    workers = max(1, (os.cpu_count() or 1) - 1)
    return {"shared_buffers": f"{quarter}MB", "max_parallel_workers_per_gather": f"{workers}"}


async def _prove(folder: Path, rows: int, times: int) -> bool:
    until = datetime.now(UTC)
    async with _database(folder) as pool:
        if not await pool.fetchval("select exists (select from usage)"):
            started = perf_counter()
            async with pool.acquire() as connection:
                await fill(connection, rows, until)
            _tell(f"{rows} rows made in {perf_counter() - started:.0f} s")
        for name, cells, size in await pool.fetch(_SIZES):
            _tell(f"  {name:22} {cells:>9} {size}")
    async with _database(folder) as pool:  # what Postgres kept in memory is gone
        slowest = await _time_all(pool, until, times)
        _tell(f"then written, sums and all: {await write(pool, 40):.0f} rows a second")
    return slowest <= MOST


_SIZES = """
select relname, reltuples::bigint, pg_size_pretty(pg_total_relation_size(oid)) from pg_class
where relname ~ '^usage_' and relkind = 'r' and reltuples > 0 order by 1
"""


async def _time_all(pool: asyncpg.Pool, until: datetime, times: int) -> float:
    """Prints a line for each kind; the p95 of the slowest."""
    slowest: list[tuple[float, Question]] = []
    _tell(f"{'cold':>8} {'p50':>8} {'p95':>8} {'yardstick':>10}  ms")
    for question in questions(until):
        cold = await ask(pool, question)
        warm = [await ask(pool, question) for _ in range(times)]
        p95 = quantiles(warm, n=20)[-1] if times > 1 else warm[0]
        _tell(f"{cold:8.1f} {median(warm):8.1f} {p95:8.1f} {await yardstick(pool):10.1f}  {question}")
        slowest.append((p95, question))
    slowest.sort(key=lambda one: one[0], reverse=True)
    _tell(f"{len(slowest)} kinds of questions, {sum(p95 > MOST for p95, _ in slowest)} above {MOST:.0f} ms; slowest:")
    for p95, question in slowest[:10]:
        _tell(f"  p95 {p95:.0f} ms: {question}")
    return slowest[0][0]


def _tell(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--times", type=int, default=20, help="how often each question is asked")
    parser.add_argument("--folder", type=Path, help="where the database is, and stays; it is filled once")
    arguments = parser.parse_args()
    if arguments.folder:
        return 0 if asyncio.run(_prove(arguments.folder, arguments.rows, arguments.times)) else 1
    with tempfile.TemporaryDirectory() as folder:
        return 0 if asyncio.run(_prove(Path(folder), arguments.rows, arguments.times)) else 1


if __name__ == "__main__":
    sys.exit(main())

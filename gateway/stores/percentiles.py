"""Percentiles of latency and of the time to the first token of providers, over the time of a range.

Sums cannot be made into percentiles, so rows are read: all of a range that has few, else those of short windows that
are spread evenly over it. A window has all its rows, so each row of the range is as likely to be read as any other,
and the index by which a tenant's rows are found in time finds them as well.

Rule: as in `stats`, every question names its tenant as a parameter of the SQL (`Scope.account_id`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from gateway.stores.postgres import Connection, Pool
from gateway.stores.stats import IN_SCOPE, QUERY_TIMEOUT, Scope, count_since, reading

MAX_SAMPLE = 50_000  # rows that are read for one question
SLICES = 20  # of a step; each has a window
RANGES = {  # how far back from now, and the step between two points
    "1h": (timedelta(hours=1), timedelta(minutes=1)),
    "24h": (timedelta(days=1), timedelta(minutes=30)),
    "7d": (timedelta(days=7), timedelta(hours=3)),
    "30d": (timedelta(days=30), timedelta(hours=12)),
}


class Percentiles(NamedTuple):
    """Milliseconds, interpolated between neighbours."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Point:
    start: datetime  # of a step, which begin with the day (UTC)
    requests: int  # whose end was seen; where a sample was read, how many there may be
    latency_ms: Percentiles
    ttft_ms: Percentiles | None  # None: none of them had a first token


@dataclass(frozen=True, slots=True)
class Latency:
    begin: datetime
    end: datetime  # the database's clock
    step: timedelta
    sampled: bool
    points: list[Point]  # in their order; steps without a request have none


async def read_latency(pool: Pool, scope: Scope, range_name: str) -> Latency:
    """Of the rows in `scope`, over one of RANGES instead of its own. Rows still queued are in no point.

    Raises Unavailable.
    """
    length, step = RANGES[range_name]
    async with reading(pool) as (reader, as_of):
        begin = as_of - length
        share = await _share(reader, scope, begin, as_of)
        question = (*scope.filters, begin, as_of, step)
        if share < 1:
            windows = zip(*_windows(begin, as_of, step / SLICES, share), strict=True)
            # How short a window is the planner cannot know: it must not read the table once for each.
            await reader.execute("set local enable_seqscan = off", timeout=QUERY_TIMEOUT)
            rows = await reader.fetch(_OF_WINDOWS[_index(scope)], *question, *windows, timeout=QUERY_TIMEOUT)
        else:
            rows = await reader.fetch(_OF_ALL, *question, timeout=QUERY_TIMEOUT)
    points = [
        Point(start, round(requests / share), Percentiles(*latency), Percentiles(*ttft) if ttft else None)
        for start, requests, latency, ttft in rows
    ]
    return Latency(begin, as_of, step, share < 1, points)


async def _share(reader: Connection, scope: Scope, begin: datetime, as_of: datetime) -> float:
    """Of the rows that an index finds, how many may be read; the other filters are looked at in each of them."""
    found = Scope(scope.account_id, key=scope.key)
    return min(1.0, MAX_SAMPLE / max(1, await count_since(reader, found, begin, as_of)))


def _index(scope: Scope) -> str:
    """By which the rows are found."""
    return "key" if scope.key else "account" if scope.account_id else ""


def _windows(begin: datetime, end: datetime, each: timedelta, share: float) -> Iterator[tuple[datetime, datetime]]:
    """In every slice of the range that is `each` long one window of `share` of its length.

    Where in the slice it is differs from slice to slice, by steps of the golden ratio, which come evenly to every
    place of it: else what is done every minute on the minute would be seen always, or never. By the clock alone, so
    the same question has the same answer.
    """
    number = (begin - _EPOCH) // each
    while (slice_begin := _EPOCH + number * each) < end:
        opens = slice_begin + each * (1 - share) * (number * _GOLDEN % 1)
        yield max(opens, begin), min(max(opens + each * share, begin), end)
        number += 1


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_GOLDEN = (5**0.5 - 1) / 2

# `interrupted` without a latency: nobody saw its end. What was answered without a provider says nothing of providers.
_ROWS = (
    """
    select started_at, latency_ms, ttft_ms from usage
    where started_at >= $7 and started_at < $8
      and """  # noqa: S608 - constants alone
    + IN_SCOPE
    + """
      and (outcome <> 'interrupted' or latency_ms > 0) and source = 'provider'
"""
)

_POINTS = """
select
    date_bin($9, started_at, '1970-01-01Z') as start,
    count(*) as requests,
    percentile_cont(array[0.5, 0.95, 0.99]) within group (order by latency_ms) as latency_ms,
    percentile_cont(array[0.5, 0.95, 0.99]) within group (order by ttft_ms) as ttft_ms
from read
group by start
order by start
"""

_OF_ALL = "with read as (" + _ROWS + ")" + _POINTS

# Without its `offset` the inner question might be asked the other way round: the windows of each row of the table.
_BEFORE = (
    """
with read as (
    select part.* from unnest($10::timestamptz[], $11::timestamptz[]) as windows (opens, closes)
    cross join lateral (
"""  # noqa: S608 - constants alone
    + _ROWS
    + "and started_at >= opens and started_at < closes"
)
_AFTER = " offset 0) as part)" + _POINTS

# What is compared in pairs says nothing new, but for the planner: one payer's rows are found by the index of these two
# columns. By that of the time alone everybody's would be looked at.
_OF_WINDOWS = {
    "": _BEFORE + _AFTER,
    "account": _BEFORE
    + " and (account_id, started_at) >= ($1::uuid, opens) and (account_id, started_at) < ($1::uuid, closes)"
    + _AFTER,
    "key": _BEFORE + " and (key_id, started_at) >= ($6, opens) and (key_id, started_at) < ($6, closes)" + _AFTER,
}

"""The sums of usage: the part of the ledger's statements that moves them, and which of them a range of time is made of.

`usage_hourly` tells everything apart; the cells of `usage_rollups` are fewer, because they are of a longer span or tell
less apart. A question reads the smallest that knows what it names, and of it few cells: a range is whole months, and at
its ragged ends pentads (five days), days, hours and single rows that are added or taken away.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

# --- written ------------------------------------------------------------------------------------------------------

_ADDED = """
        requests = sums.requests + excluded.requests,
        errors = sums.errors + excluded.errors,
        client_aborts = sums.client_aborts + excluded.client_aborts,
        prompt_tokens = sums.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = sums.completion_tokens + excluded.completion_tokens,
        cached_tokens = sums.cached_tokens + excluded.cached_tokens,
        cache_write_tokens = sums.cache_write_tokens + excluded.cache_write_tokens,
        reasoning_tokens = sums.reasoning_tokens + excluded.reasoning_tokens,
        cost_micros = sums.cost_micros + excluded.cost_micros,
        unpriced = sums.unpriced + excluded.unpriced,
        latency_ms = sums.latency_ms + excluded.latency_ms,
        latency_count = sums.latency_count + excluded.latency_count,
        ttft_ms = sums.ttft_ms + excluded.ttft_ms,
        ttft_count = sums.ttft_count + excluded.ttft_count,
        remembered = sums.remembered + excluded.remembered,
        saved_tokens = sums.saved_tokens + excluded.saved_tokens,
        saved_micros = sums.saved_micros + excluded.saved_micros
"""

# It reads `moved`: the rows that the statement wrote, each with a `sign` (-1: what it was before). Times are those of
# providers, and what failed was not answered, whoever should have: the view usage_cells says the same of single rows.
_HOURS = """
hours as (
    select
        account_id, date_trunc('hour', started_at, 'UTC') as hour, key_id, user_id, app_id, provider, model,
        sum(sign) as requests,
        coalesce(sum(sign) filter (where outcome not in ('ok', 'client_abort', 'budget_exhausted')), 0) as errors,
        coalesce(sum(sign) filter (where outcome = 'client_abort'), 0) as client_aborts,
        sum(sign * prompt_tokens) as prompt_tokens, sum(sign * completion_tokens) as completion_tokens,
        sum(sign * cached_tokens) as cached_tokens, sum(sign * cache_write_tokens) as cache_write_tokens,
        sum(sign * reasoning_tokens) as reasoning_tokens,
        coalesce(sum(sign * cost_micros), 0) as cost_micros,
        coalesce(sum(sign) filter (where cost_micros is null), 0) as unpriced,
        coalesce(sum(sign * latency_ms::bigint) filter (where source = 'provider'), 0) as latency_ms,
        coalesce(
            sum(sign) filter (where source = 'provider' and (outcome <> 'interrupted' or latency_ms > 0)), 0
        ) as latency_count,
        coalesce(sum(sign * ttft_ms::bigint) filter (where source = 'provider'), 0) as ttft_ms,
        coalesce(sum(sign) filter (where source = 'provider' and ttft_ms is not null), 0) as ttft_count,
        coalesce(
            sum(sign) filter (where source <> 'provider' and outcome in ('ok', 'client_abort', 'budget_exhausted')), 0
        ) as remembered,
        sum(sign * saved_tokens) as saved_tokens, coalesce(sum(sign * saved_micros), 0) as saved_micros
    from moved
    group by account_id, hour, key_id, user_id, app_id, provider, model
),
"""

# Ordered, so that two processes that write the same sums wait for each other and do not deadlock.
COUNTED = (
    _HOURS  # noqa: S608 - constants alone
    + """
counted as (
    insert into usage_hourly as sums
    select * from hours
    order by account_id, hour, key_id, user_id, app_id, provider, model
    on conflict (account_id, hour, key_id, user_id, app_id, provider, model) do update set
"""
    + _ADDED
    + """
),
rolled as (
    insert into usage_rollups as sums
    select
        span || case grouping(key_id, user_id)
            when 0 then '_by_all' when 1 then '_by_key' when 2 then '_by_user' else '_by_model'
        end as rollup,
        coalesce(account_id, '00000000-0000-0000-0000-000000000000') as payer, start, coalesce(key_id, '') as key,
        coalesce(user_id, '') as person, coalesce(app_id, '') as app, coalesce(provider, '') as source,
        coalesce(model, '') as name,
        sum(requests), sum(errors), sum(client_aborts),
        sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens), sum(cache_write_tokens), sum(reasoning_tokens),
        sum(cost_micros), sum(unpriced), sum(latency_ms), sum(latency_count), sum(ttft_ms), sum(ttft_count),
        sum(remembered), sum(saved_tokens), sum(saved_micros)
    from (
        select hours.*, span, usage_span_begin(span, hour) as start
        from hours cross join (values ('hour'), ('day'), ('pentad'), ('month')) as spans (span)
    ) as spanned
    group by grouping sets (
        (span, start, app_id, provider, model),
        (span, start, account_id, key_id, app_id, provider, model),
        (span, start, account_id, user_id),
        (span, start, account_id, key_id, user_id, app_id, provider, model)
    )
    having span <> 'hour' or grouping(key_id, user_id) = 3
    order by rollup, payer, start, key, person, app, source, name
    on conflict (rollup, account_id, start, key_id, user_id, app_id, provider, model) do update set
"""
    + _ADDED
    + """
)
"""
)


# --- read ---------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Of one end of a range: cells of one span, or rows, that begin in [begin, end)."""

    span: str  # of SPANS
    sign: int  # -1: they are taken away
    begin: datetime | None  # None: from the first
    end: datetime | None  # None: to the last


def pieces(begin: datetime | None, end: datetime | None, now: datetime, spans: Sequence[str] = ()) -> list[Piece]:
    """What a range is made of: its middle of the longest span that pays, its ends of shorter ones.

    An end is taken to the nearest border of the longer span: the 31st from the month, less what follows. What follows
    `now` is taken to be nothing. `spans` are those that may be used, from the shortest.
    """
    span, *longer = spans or SPANS
    if longer:
        first, last = begin and nearest(begin, longer[0]), end and nearest(end, longer[0])
        ragged = _between(begin, first) + _between(end, last)
        if begin is None or ragged < (end or now) - begin:
            return [*_end(span, first, begin, -1), *_end(span, last, end, 1), *pieces(first, last, now, longer)]
    return [Piece(span, 1, begin, end)]


SPANS = ("row", "hour", "day", "pentad", "month")


def nearest(moment: datetime, span: str) -> datetime:
    """The begin of an hour, day, pentad or month (UTC) that is nearest."""
    before = begin_of(moment, span)
    after = begin_of(before + _LONGEST[span], span)
    return before if moment - before <= after - moment else after


def begin_of(moment: datetime, span: str) -> datetime:
    """Of the hour, day, pentad or month (UTC) that it is in."""
    moment = moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    if span == "hour":
        return moment
    day = {"day": moment.day, "pentad": min(moment.day - 1, 25) // 5 * 5 + 1, "month": 1}[span]
    return moment.replace(hour=0, day=day)


# One of these after its begin the next one has begun, and not the one after that.
_LONGEST = {
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "pentad": timedelta(days=6),  # the last of a month, of three to six days
    "month": timedelta(days=31),
}


def _between(moment: datetime | None, border: datetime | None) -> timedelta:
    return abs(moment - border) if moment and border else timedelta()


def _end(span: str, border: datetime | None, moment: datetime | None, sign: int) -> list[Piece]:
    """From the border of a longer span to where the range ends (`sign` 1) or begins (-1)."""
    if border is None or moment is None or border == moment:
        return []
    if border < moment:
        return [Piece(span, sign, border, moment)]
    return [Piece(span, -sign, moment, border)]

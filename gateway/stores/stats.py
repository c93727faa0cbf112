"""Questions about the usage table: figures, and the rows that they are made of.

Rule: every question names its tenant as a parameter of the SQL (`Scope.account_id`).
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from weakref import WeakValueDictionary

from gateway.protocol.errors import Unavailable
from gateway.stores.postgres import Connection, Pool, connection
from gateway.stores.usage import UsageRow

QUERY_TIMEOUT = 5.0  # seconds for one statement of a question
MAX_QUESTIONS = 2  # at once: a small part of the pool, whose other connections look up keys and write usage
TURN_TIMEOUT = 1.0  # seconds to wait for one's turn
MAX_GROUPS = 1000
TOP_MODELS = 10

RANGES = {
    "1h": timedelta(hours=1),
    "24h": timedelta(hours=24),
    "7d": timedelta(days=7),
    "30d": timedelta(days=30),
    "all": timedelta(days=36_500),
}
GROUP_BY = ("user", "app", "model", "provider", "key")


@dataclass(frozen=True, slots=True)
class Scope:
    """Which rows a question is about. `account_id` is the asker's own, from the credential; None: all (an admin)."""

    account_id: str | None
    range: str = "all"  # one of RANGES, back from now
    user: str | None = None
    app: str | None = None
    model: str | None = None  # the name that clients asked for


@dataclass(frozen=True, slots=True)
class Figures:
    name: str = ""  # of the group
    requests: int = 0
    errors: int = 0  # ended neither well nor by the client's leaving
    client_aborts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cost_micros: int = 0  # of the rows whose price is known
    unpriced: int = 0  # rows whose price is not
    average_latency_ms: float | None = None
    average_ttft_ms: float | None = None

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0


@dataclass(frozen=True, slots=True)
class Stats:
    as_of: datetime  # the database's clock; all figures are of this one moment
    totals: Figures
    last_hour: Figures
    top_models: list[Figures]
    groups: list[Figures]  # at most MAX_GROUPS, busiest first
    more_groups: bool


# --- who may ask now ----------------------------------------------------------------------------------------------


class Turns:
    """Who may ask a question now: one of an account, and MAX_QUESTIONS in all.

    A question may read the whole table, for seconds: without turns, one member who asks forty at once takes all
    connections of the pool, and nobody's key can be looked up.
    """

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(MAX_QUESTIONS)
        # By account, so that one in a hurry does not fill the queue. Each lives while somebody holds or awaits it.
        self._own: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def take(self, account_id: str) -> AsyncIterator[None]:
        """The turn of an account, for the time of the block. Raises Unavailable when it does not come soon."""
        own = self._own.setdefault(account_id, asyncio.Lock())
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(TURN_TIMEOUT):
                    await held.enter_async_context(own)
                    await held.enter_async_context(self._all)
            except TimeoutError:
                raise Unavailable(
                    "too many questions about usage are being answered", code="stats_busy", retry_after=1
                ) from None
            yield


# --- figures ------------------------------------------------------------------------------------------------------


async def read_stats(pool: Pool, scope: Scope, group_by: str | None = None) -> Stats:
    """Figures of the rows in `scope`, grouped by one of GROUP_BY. Rows still queued are in none of them.

    Raises Unavailable.
    """
    hour = replace(scope, range="1h")
    async with connection(pool) as reader, reader.transaction(isolation="repeatable_read", readonly=True):
        as_of = await reader.fetchval("select now()", timeout=QUERY_TIMEOUT)
        totals = await _figures(reader, scope, "", 1)
        last_hour = await _figures(reader, hour, "", 1)
        top_models = await _figures(reader, scope, "model", TOP_MODELS)
        groups = await _figures(reader, scope, group_by, MAX_GROUPS + 1) if group_by else []
    return Stats(
        as_of=as_of,
        totals=totals[0] if totals else Figures(),
        last_hour=last_hour[0] if last_hour else Figures(),
        top_models=top_models,
        groups=groups[:MAX_GROUPS],
        more_groups=len(groups) > MAX_GROUPS,
    )


_FIGURES = """
select
    case $6::text
        when 'user' then user_id
        when 'app' then app_id
        when 'model' then model
        when 'provider' then provider
        when 'key' then key_id
        else ''
    end as name,
    count(*) as requests,
    count(*) filter (where outcome not in ('ok', 'client_abort')) as errors,
    count(*) filter (where outcome = 'client_abort') as client_aborts,
    sum(prompt_tokens)::bigint as prompt_tokens,
    sum(completion_tokens)::bigint as completion_tokens,
    sum(cached_tokens)::bigint as cached_tokens,
    coalesce(sum(cost_micros), 0)::bigint as cost_micros,
    count(*) filter (where cost_micros is null) as unpriced,
    avg(latency_ms)::float8 as average_latency_ms,
    avg(ttft_ms)::float8 as average_ttft_ms
from usage
where ($1::uuid is null or account_id = $1)
  and started_at >= now() - $2::interval
  and ($3::text is null or user_id = $3)
  and ($4::text is null or app_id = $4)
  and ($5::text is null or model = $5)
group by name
order by requests desc, name
limit $7
"""


async def _figures(reader: Connection, scope: Scope, group_by: str, limit: int) -> list[Figures]:
    """The groups of `scope`, busiest first; one of everything when `group_by` is empty."""
    rows = await reader.fetch(_FIGURES, *_parameters(scope), group_by, limit, timeout=QUERY_TIMEOUT)
    return [Figures(*row) for row in rows]


# --- rows ---------------------------------------------------------------------------------------------------------

# A request id begins with its time (UUIDv7), so its order is that of arrival and its index pages through it.
_ROWS = """
select
    request_id::text, started_at, key_id, account_id::text, user_id, app_id, client_request_id, provider, model,
    upstream_model, stream, status, outcome, error_code, finish_reason,
    prompt_tokens, completion_tokens, cached_tokens, cache_write_tokens, reasoning_tokens, usage_source,
    latency_ms, ttft_ms, cost_micros
from usage
where ($1::uuid is null or account_id = $1)
  and started_at >= now() - $2::interval
  and ($3::text is null or user_id = $3)
  and ($4::text is null or app_id = $4)
  and ($5::text is null or model = $5)
  and ($6::uuid is null or request_id < $6)
order by request_id desc
limit $7
"""


async def read_rows(pool: Pool, scope: Scope, cursor: str | None, limit: int) -> list[UsageRow]:
    """At most `limit` rows in `scope`, newest first; `cursor` is the request id that the page before ended with.

    Raises Unavailable.
    """
    async with connection(pool) as reader:
        rows = await reader.fetch(_ROWS, *_parameters(scope), cursor, limit, timeout=QUERY_TIMEOUT)
    return [UsageRow(*row) for row in rows]


def _parameters(scope: Scope) -> tuple[str | None, timedelta, str | None, str | None, str | None]:
    """$1 to $5 of both questions."""
    return scope.account_id, RANGES[scope.range], scope.user, scope.app, scope.model

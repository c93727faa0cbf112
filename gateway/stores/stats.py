"""Questions about the usage table: figures, and the rows that they are made of.

Rule: every question names its tenant as a parameter of the SQL (`Scope.account_id`).
"""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from uuid import UUID
from weakref import WeakValueDictionary

from gateway.protocol.errors import NotFound, Unavailable
from gateway.stores.postgres import Connection, Pool, connection
from gateway.stores.sums import SPANS, Piece, begin_of, pieces
from gateway.stores.usage import UsageRow

QUERY_TIMEOUT = 5.0  # seconds for one statement of a question
MAX_QUESTIONS = 2  # at once: a small part of the pool, whose other connections look up keys and write usage
TURN_TIMEOUT = 1.0  # seconds to wait for one's turn
MAX_GROUPS = 1000
TOP_MODELS = 10

HOUR = timedelta(hours=1)

GROUP_BY = ("user", "app", "model", "provider", "key", "day", "hour")
# How far back from the end of the range a series goes. OpenAI's has 168 hours or 31 days at most:
# https://platform.openai.com/docs/api-reference/usage
SERIES = {"day": timedelta(days=366), "hour": timedelta(days=7)}

# A moment, or how long before now it is.
Bound = datetime | timedelta


_DURATION = re.compile(r"(?P<count>[0-9]{1,5})(?P<unit>[mhdw])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
# RFC 3339, 5.6; a date alone is its midnight, and a time zone may be left out. A plus that a query did not escape is a
# space.
_TIME = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[+ -]\d\d:\d\d)?)?", re.IGNORECASE)


def bound_of(text: str) -> Bound:
    """What `36h`, `7d`, `2w` or an RFC 3339 time or date says; UTC if it does not say. Raises ValueError, in words."""
    words = "a duration such as 36h, 7d or 2w, or an RFC 3339 time or date is required"
    if found := _DURATION.fullmatch(text):
        return timedelta(**{_UNITS[found["unit"]]: int(found["count"])})
    if not text.isascii() or not _TIME.fullmatch(text):
        raise ValueError(words)
    day, clock = text[:10], text[11:].replace(" ", "+").upper()
    try:
        moment = datetime.fromisoformat(f"{day}T{clock}" if clock else day)
    except ValueError:
        raise ValueError(words) from None
    if not 1970 <= moment.year < 3000:
        raise ValueError("a year from 1970 to 2999 is required")
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Scope:
    """Which rows a question is about. `account_id` is the asker's own, from the credential; None: all (an admin)."""

    account_id: str | None
    since: Bound | None = None  # None: from the first row
    until: Bound | None = None  # this moment is not in it; None: to the last row
    user: str | None = None
    app: str | None = None
    model: str | None = None  # the name that clients asked for
    provider: str | None = None
    key: str | None = None  # its id

    @property
    def filters(self) -> tuple[str | None, ...]:
        """$1 to $6 of every question."""
        return self.account_id, self.user, self.app, self.model, self.provider, self.key

    def moments(self, now: datetime) -> tuple[datetime | None, datetime | None]:
        """Begin and end of the range."""
        begin, end = (now - one if isinstance(one, timedelta) else one for one in (self.since, self.until))
        return begin, end

    def needs(self, group_by: str) -> str:
        """What the cells that can answer have to tell apart: see usage_rollups."""
        keys = self.account_id is not None or self.key is not None or group_by == "key"
        models = {self.app, self.model, self.provider} != {None} or group_by in ("app", "model", "provider")
        if self.user is None and group_by != "user":
            return "key" if keys else "model"
        return "all" if models or self.key is not None or group_by == "key" else "user"


@dataclass(frozen=True, slots=True)
class Figures:
    name: str = ""  # of the group; of a day or hour its begin, UTC
    requests: int = 0
    errors: int = 0  # ended neither well, nor by the client's leaving, nor by a budget
    client_aborts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # part of prompt_tokens
    cache_write_tokens: int = 0  # part of prompt_tokens
    reasoning_tokens: int = 0  # part of completion_tokens
    cost_micros: int = 0  # of the rows whose price is known
    unpriced: int = 0  # rows whose price is not
    remembered: int = 0  # answered without a provider
    saved_tokens: int = 0  # prompt and completion, which those would have used
    saved_micros: int = 0  # of those whose price is known
    average_latency_ms: float | None = None  # of the rows of providers whose end was seen
    average_ttft_ms: float | None = None

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def error_rate(self) -> float:
        """Of what was not remembered: however many good answers are kept, a provider that fails is seen."""
        asked = self.requests - self.remembered
        return self.errors / asked if asked else 0.0

    @property
    def cache_hit_rate(self) -> float:
        """Of the provider's prompt cache, in tokens."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(frozen=True, slots=True)
class Stats:
    as_of: datetime  # the database's clock; all figures are of this one moment
    begin: datetime | None
    end: datetime | None
    totals: Figures
    last_hour: Figures
    top_models: list[Figures]
    groups: list[Figures]  # at most MAX_GROUPS, busiest first; days and hours the newest, in their order
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


# Every question is planned for its own range and filters. Many groups are sorted out in memory, for each of at most
# MAX_QUESTIONS. What a question costs is guessed too high for ranges, and compiling it would take longer than it does.
_SETTINGS = "set local plan_cache_mode = force_custom_plan; set local work_mem = '64MB'; set local jit = off"


@asynccontextmanager
async def reading(pool: Pool) -> AsyncIterator[tuple[Connection, datetime]]:
    """A connection on which all statements see the same moment, and that moment. Raises Unavailable."""
    async with connection(pool) as reader, reader.transaction(isolation="repeatable_read", readonly=True):
        await reader.execute(_SETTINGS, timeout=QUERY_TIMEOUT)
        yield reader, await reader.fetchval("select now()", timeout=QUERY_TIMEOUT)


# --- figures ------------------------------------------------------------------------------------------------------

# How many groups there are is guessed far too low: thousands of names would be sorted, which takes longer than to hash.
_HASHED = "set local enable_sort = off"


async def read_stats(pool: Pool, scope: Scope, group_by: str | None = None) -> Stats:
    """Figures of the rows in `scope`, grouped by one of GROUP_BY. Rows still queued are in none of them.

    Where the rows of a month have been dropped, a range begins and ends with the nearest hour. Raises Unavailable.
    """
    async with reading(pool) as (reader, as_of):
        await reader.execute(_HASHED, timeout=QUERY_TIMEOUT)
        begin, end = scope.moments(as_of)
        models = await _figures(reader, scope, "model", pieces(begin, end, as_of), TOP_MODELS)
        last_hour = await _figures(reader, scope, "", pieces(as_of - HOUR, None, as_of), 0)
        groups = await _groups(reader, scope, group_by, as_of) if group_by else []
    totals = models[0]
    return Stats(
        as_of=as_of,
        begin=begin,
        end=end,
        totals=totals,
        last_hour=last_hour[0],
        top_models=models[1:],
        groups=groups,
        more_groups=bool(group_by) and sum(group.requests for group in groups) < totals.requests,
    )


async def count_since(reader: Connection, scope: Scope, begin: datetime, as_of: datetime) -> int:
    """Requests in `scope`, whatever its range, from the hour on that `begin` is in: of the sums, no row is read."""
    [counted] = await _figures(reader, scope, "", pieces(begin_of(begin, "hour"), None, as_of, SPANS[1:]), 0)
    return counted.requests


async def _groups(reader: Connection, scope: Scope, group_by: str, as_of: datetime) -> list[Figures]:
    begin, end = scope.moments(as_of)
    spans: Sequence[str] = SPANS
    if group_by in SERIES:
        oldest = begin_of((end or as_of) - SERIES[group_by], group_by)
        begin = max(begin or oldest, oldest)
        spans = SPANS[: SPANS.index(group_by) + 1]
    return await _figures(reader, scope, group_by, pieces(begin, end, as_of, spans), MAX_GROUPS, whole=False)


# A tenant's rows alone, whatever is asked of them: the first six parameters of every question are `Scope.filters`.
IN_SCOPE = """
($1::uuid is null or account_id = $1)
and ($2::text is null or user_id = $2)
and ($3::text is null or app_id = $3)
and ($4::text is null or model = $4)
and ($5::text is null or provider = $5)
and ($6::text is null or key_id = $6)
"""

_NAMED = """
    case $7::text
        when 'user' then user_id when 'app' then app_id when 'model' then model
        when 'provider' then provider when 'key' then key_id else ''
    end as name,
    case when $7 in ('day', 'hour') then date_trunc($7, start, 'UTC') end as moment"""

_SUMS = (
    "requests", "errors", "client_aborts", "prompt_tokens", "completion_tokens", "cached_tokens", "cache_write_tokens",
    "reasoning_tokens", "cost_micros", "unpriced", "latency_ms", "latency_count", "ttft_ms", "ttft_count", "remembered",
    "saved_tokens", "saved_micros",
)  # fmt: skip

# Its source and its times are known when it is planned, so each piece is read by its own index, of one partition. As a
# join the pieces would be looked for in all there is.
_CELLS = (
    """
    from usage_cells
    where source = ($8::text[])[#]
      and start >= coalesce(($9::timestamptz[])[#], '-infinity')
      and start < coalesce(($10::timestamptz[])[#], 'infinity')
      and """
    + IN_SCOPE
)

# All pieces are added up at once, by several processes where that is quicker: they can do one `group by` alone.
_NAMES = """
), named as (
    select name, moment, %(added)s from cells group by name, moment
)
"""

_WHOLE = "select true as whole, '' as name, null::timestamptz as moment, %(added)s from named"

_GROUPS = """
    select false as whole, name, moment, %(figures)s from named where requests <> 0
    order by moment, requests desc, name
    limit $11
"""

_TOLD = """
select
    coalesce(to_char(moment at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), name, ''),
    coalesce(requests, 0), coalesce(errors, 0), coalesce(client_aborts, 0),
    coalesce(prompt_tokens, 0), coalesce(completion_tokens, 0), coalesce(cached_tokens, 0),
    coalesce(cache_write_tokens, 0), coalesce(reasoning_tokens, 0),
    coalesce(cost_micros, 0), coalesce(unpriced, 0), coalesce(remembered, 0),
    coalesce(saved_tokens, 0), coalesce(saved_micros, 0),
    (latency_ms::numeric / nullif(latency_count, 0))::float8,
    (ttft_ms::numeric / nullif(ttft_count, 0))::float8
from told
order by whole desc, moment, told.requests desc, told.name
"""


@lru_cache(maxsize=64)
def _statement(signs: Sequence[int], whole: bool) -> str:
    """For a range of so many pieces, of which some are taken away."""
    cells = [
        f"select {_NAMED}, {', '.join('-' * (sign < 0) + f'{one} as {one}' for one in _SUMS)}"
        + _CELLS.replace("#", str(number))
        for number, sign in enumerate(signs, 1)
    ]
    told = f"{_WHOLE} union all ({_GROUPS})" if whole else _GROUPS
    summed = {"added": ", ".join(f"sum64({one}) as {one}" for one in _SUMS), "figures": ", ".join(_SUMS)}
    return "with cells as (" + " union all ".join(cells) + f"{_NAMES}, told as ({told})" % summed + _TOLD


async def _figures(
    reader: Connection, scope: Scope, group_by: str, asked: Sequence[Piece], most: int, *, whole: bool = True
) -> list[Figures]:
    """Of all that is in `scope`, whose range `asked` is, unless `whole` is not wanted: thousands of groups take a tenth
    less without it. Then of its groups, at most so many, busiest first or in the order of time."""
    kept = scope.needs(group_by)
    _, signs, begins, ends = zip(*asked, strict=True)
    sources = [_source(piece.span, kept) for piece in asked]
    rows = await reader.fetch(
        _statement(signs, whole), *scope.filters, group_by, sources, begins, ends, most, timeout=QUERY_TIMEOUT
    )
    return [Figures(*row) for row in rows]


def _source(span: str, kept: str) -> str:
    """A partition of usage_rollups; `hour` is usage_hourly, `row` table usage."""
    return span if span == "row" or (span == "hour" and kept != "model") else f"{span}_by_{kept}"


# --- rows ---------------------------------------------------------------------------------------------------------

# A request id begins with its time (UUIDv7), so its order is that of arrival and its index pages through it: the index
# of the column, by its full name, for the bare one is its text here, and that of the whole table would be sorted.
_COLUMNS = """
select
    request_id::text, started_at, key_id, account_id::text, user_id, app_id, client_request_id, provider, model,
    upstream_model, stream, status, outcome, error_code, finish_reason,
    prompt_tokens, completion_tokens, cached_tokens, cache_write_tokens, reasoning_tokens, usage_source,
    latency_ms, ttft_ms, cost_micros, source, source_id::text, saved_tokens, saved_micros
from usage
"""

_ROWS = (
    _COLUMNS
    + "where "
    + IN_SCOPE
    + """
  and ($7::timestamptz is null or started_at >= $7)
  and ($8::timestamptz is null or started_at < $8)
  and ($9::uuid is null or request_id < $9)
order by usage.request_id desc
limit $10
"""
)


async def read_rows(pool: Pool, scope: Scope, cursor: str | None, limit: int) -> list[UsageRow]:
    """At most `limit` rows in `scope`, newest first; `cursor` is the request id that the page before ended with.

    Raises Unavailable.
    """
    async with reading(pool) as (reader, as_of):
        begin, end = scope.moments(as_of)
        rows = await reader.fetch(_ROWS, *scope.filters, begin, end, cursor, limit, timeout=QUERY_TIMEOUT)
    return [UsageRow(*row) for row in rows]


_ROW = _COLUMNS + "where request_id = $1::uuid and ($2::uuid is null or account_id = $2)"


async def read_row(pool: Pool, account_id: str | None, request_id: str) -> UsageRow:
    """The row of one request; `account_id`: the asker's own, None: anybody's.

    Raises NotFound, in the same words for what is another's, what is not there yet and what is no id; Unavailable.
    """
    missing = NotFound(f"there is no request {request_id[:64]!r} of yours with usage", code="request_not_found")
    try:
        known = str(UUID(request_id))
    except ValueError:
        raise missing from None
    async with connection(pool) as reader:
        row = await reader.fetchrow(_ROW, known, account_id, timeout=QUERY_TIMEOUT)
    if row is None:
        raise missing
    return UsageRow(*row)

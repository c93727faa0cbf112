"""What is written to Postgres of usage: the rows, their sums by hour, and the partitions both need.

Rule: the sums move by the rows that a statement says it wrote, in that statement. So a batch may be written any number
of times, by any number of processes, and is counted once.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import fields
from datetime import UTC, date, datetime
from operator import attrgetter
from typing import NamedTuple

import asyncpg
import orjson

from gateway.stores.chain import link_drop, link_rows, transaction
from gateway.stores.postgres import Connection, Pool
from gateway.stores.sums import COUNTED
from gateway.stores.usage import UsageRow

PATIENCE = 5.0  # seconds for a connection, and for each statement; nobody waits for them

COLUMNS = tuple(field.name for field in fields(UsageRow))
values_of = attrgetter(*COLUMNS)


class RowError(Exception):
    """The database took the statement and refused what is in it. Says the class of the error, which quotes nothing."""


# --- rows ---------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """A row as the journal has it, Postgres is given it, and the chain seals it: nobody takes it apart on the way."""

    request_id: str
    started_at: datetime
    values: bytes  # of COLUMNS, a JSON array: ids and times as Postgres gives them back

    @property
    def row(self) -> UsageRow:
        values = orjson.loads(self.values)
        values[1] = self.started_at
        return UsageRow(*values)


Row = UsageRow | Given


def unfolded(row: Row) -> UsageRow:
    return row.row if isinstance(row, Given) else row


def given_of(row: UsageRow) -> Given:
    """Raises TypeError for what is no text, or a number beyond 64 bit."""
    request_id, started_at, *others = values_of(row)
    started_at = started_at.astimezone(UTC)
    return Given(request_id, started_at, orjson.dumps((request_id, started_at, *others)))


# One argument for all: asyncpg checks each value of an array by itself, which made a row twice as dear for us.
_GIVEN = """
with given as (
    select
        (given ->> 0)::uuid as request_id, (given ->> 1)::timestamptz as started_at, given ->> 2 as key_id,
        (given ->> 3)::uuid as account_id, given ->> 4 as user_id, given ->> 5 as app_id,
        given ->> 6 as client_request_id, given ->> 7 as provider, given ->> 8 as model, given ->> 9 as upstream_model,
        (given ->> 10)::boolean as stream, (given ->> 11)::integer as status, given ->> 12 as outcome,
        given ->> 13 as error_code, given ->> 14 as finish_reason, (given ->> 15)::bigint as prompt_tokens,
        (given ->> 16)::bigint as completion_tokens, (given ->> 17)::bigint as cached_tokens,
        (given ->> 18)::bigint as cache_write_tokens, (given ->> 19)::bigint as reasoning_tokens,
        given ->> 20 as usage_source, (given ->> 21)::integer as latency_ms, (given ->> 22)::integer as ttft_ms,
        (given ->> 23)::bigint as cost_micros, given ->> 24 as source, (given ->> 25)::uuid as source_id,
        (given ->> 26)::bigint as saved_tokens, (given ->> 27)::bigint as saved_micros
    from jsonb_array_elements($1::jsonb) as given
),
"""

# Nearly always all: which they are is said when they are not.
_WRITTEN = """
select
    count(*),
    case when count(*) < jsonb_array_length($1::jsonb) then array_agg(request_id::text) end,
    case when count(*) < jsonb_array_length($1::jsonb) then array_agg(started_at) end
from written
"""

_INSERT = (
    _GIVEN  # noqa: S608 - constants alone
    + """
written as (
    insert into usage select * from given order by request_id
    on conflict (request_id, started_at) do nothing
    returning *
),
moved as (select 1 as sign, * from written),
"""
    + COUNTED
    + _WRITTEN
)

# A statement of its own: it must see rows that another process wrote while the INSERT above waited for it.
_UPGRADE = (
    _GIVEN  # noqa: S608 - constants alone
    + """
before as (
    select usage.* from usage join given using (request_id, started_at)
    where usage.outcome = 'interrupted' and given.outcome <> 'interrupted'
    order by request_id
    for update of usage
),
written as (
    update usage set
        key_id = given.key_id, account_id = given.account_id, user_id = given.user_id, app_id = given.app_id,
        client_request_id = given.client_request_id, provider = given.provider, model = given.model,
        upstream_model = given.upstream_model, stream = given.stream, status = given.status, outcome = given.outcome,
        error_code = given.error_code, finish_reason = given.finish_reason,
        prompt_tokens = given.prompt_tokens, completion_tokens = given.completion_tokens,
        cached_tokens = given.cached_tokens, cache_write_tokens = given.cache_write_tokens,
        reasoning_tokens = given.reasoning_tokens, usage_source = given.usage_source,
        latency_ms = given.latency_ms, ttft_ms = given.ttft_ms, cost_micros = given.cost_micros,
        source = given.source, source_id = given.source_id,
        saved_tokens = given.saved_tokens, saved_micros = given.saved_micros
    from before join given using (request_id, started_at)
    where usage.request_id = before.request_id and usage.started_at = before.started_at
    returning usage.*
),
moved as (select -1 as sign, * from before union all select 1, * from written),
"""
    + COUNTED
    + _WRITTEN
)


# A host that is gone closes no connection: without the time-out its transaction would keep the locks of the sums and of
# the chain for hours.
_BEGIN = "begin isolation level read committed; set local idle_in_transaction_session_timeout = '10s'"


async def write_rows(pool: Pool, rows: Sequence[Row], key: bytes | None = None) -> int:
    """Writes rows, counts them in the sums and names them in the chain of `key` (None: in no chain); how many are new.

    A row that is there already stays as it is, unless it was `interrupted` and the new one tells how it really ended.
    Raises RowError when one of them is refused; after any other error nothing can be said, and all may be tried again.
    """
    with _refusals():
        given = [row if isinstance(row, Given) else given_of(row) for row in rows]
    if len({row.request_id for row in given}) < len(given):
        given = _distinct(given)
    async with _borrowed(pool) as connection:
        fresh = await _write(connection, _INSERT, given, key)
        if len(fresh) < len(given):
            there = {row.request_id for row in fresh}
            known = [row for row in given if row.request_id not in there and row.row.outcome != "interrupted"]
            if known:
                await _write(connection, _UPGRADE, known, key)
    return len(fresh)


def _distinct(given: Sequence[Given]) -> list[Given]:
    """Of those that are one row the first, as if each came by itself; before it one that tells how it ended."""
    rows = dict[tuple[str, datetime], Given]()
    for row in sorted(given, key=lambda row: row.row.outcome == "interrupted"):
        rows.setdefault((row.request_id, row.started_at), row)
    return list(rows.values())


async def _write(connection: Connection, statement: str, given: Sequence[Given], key: bytes | None) -> Sequence[Given]:
    """The rows that one of the two statements wrote.

    Each is a transaction with a link of its own. Both in one would take the locks of the sums twice, so in no order,
    and two processes would deadlock.
    """
    async with transaction(connection, _BEGIN, PATIENCE):
        with _refusals():
            rows = b"[%b]" % b",".join([row.values for row in given])
            [(count, ids, times)] = await connection.fetch(statement, rows.decode(), timeout=PATIENCE)
        written = given
        if count < len(given):
            places = set(zip(ids or (), times or (), strict=True))
            written = [row for row in given if row[:2] in places]
        if written and key is not None:
            await link_rows(connection, key, written, replaces=statement is _UPGRADE, timeout=PATIENCE)
    return written


@asynccontextmanager
async def _borrowed(pool: Pool) -> AsyncIterator[Connection]:
    connection = await pool.acquire(timeout=PATIENCE)
    try:
        yield connection
    except BaseException as error:
        # Cancelled or out of time: the pool would ask a server that does not answer to cancel, and wait for it.
        if not isinstance(error, Exception) or isinstance(error, TimeoutError):
            connection.terminate()
        raise
    finally:
        await pool.release(connection, timeout=PATIENCE)


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except asyncpg.CheckViolationError as error:
        if not error.constraint_name:
            raise  # "no partition of relation": the table's fault, not the row's
        raise RowError(type(error).__name__) from None
    except (
        asyncpg.DataError,  # class 22: a NUL, a number out of range
        asyncpg.IntegrityConstraintViolationError,  # class 23: a check, a null
        asyncpg.ProgramLimitExceededError,  # class 54: texts that no index can hold
        TypeError,  # it is no JSON
    ) as error:
        raise RowError(type(error).__name__) from None


# --- partitions ---------------------------------------------------------------------------------------------------


async def make_partitions(pool: Pool, today: date | None = None) -> int:
    """Sees that this month and the next have a partition each; how many were made.

    A month without one is no loss: its rows lie in the default partition until it is made.
    """
    month = (today or datetime.now(UTC).date()).replace(day=1)
    made = 0
    async with _borrowed(pool) as connection:
        for wanted in (month, _months_later(month, 1)):
            made += await connection.fetchval("select make_usage_partition($1)", wanted, timeout=PATIENCE)
    return made


async def drop_months(pool: Pool, keep: int, key: bytes | None = None, today: date | None = None) -> int:
    """Drops all rows older than `keep` whole months before this one, by partition; how many partitions those were.

    The chain of `key` says so, in the same transaction.
    """
    month = _months_later((today or datetime.now(UTC).date()).replace(day=1), -keep)
    async with _borrowed(pool) as connection, transaction(connection, _BEGIN, PATIENCE):
        dropped: int = await connection.fetchval("select drop_usage_before($1)", month, timeout=PATIENCE)
        if key is not None:
            await link_drop(connection, key, datetime(month.year, month.month, 1, tzinfo=UTC), timeout=PATIENCE)
    return dropped


def _months_later(month: date, count: int) -> date:
    years, index = divmod(month.month - 1 + count, 12)
    return date(month.year + years, index + 1, 1)

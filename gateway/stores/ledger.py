"""What is written to Postgres of usage: the rows, their sums by hour, and the partitions both need.

Rule: the sums move by the rows that a statement says it wrote, in that statement. So a batch may be written any number
of times, by any number of processes, and is counted once.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import fields
from datetime import UTC, date, datetime
from operator import attrgetter

import asyncpg
import orjson

from gateway.stores.chain import link_drop, link_rows, transaction
from gateway.stores.postgres import Connection, Pool
from gateway.stores.sums import COUNTED
from gateway.stores.usage import UsageRow

PATIENCE = 5.0  # seconds for a connection, and for each statement; nobody waits for them

COLUMNS = tuple(field.name for field in fields(UsageRow))
values_of = attrgetter(*COLUMNS)
_ALL = ", ".join(COLUMNS)  # not `*`: a column that a later version adds would end the statements that are prepared


class RowError(Exception):
    """The database took the statement and refused what is in it. Says the class of the error, which quotes nothing."""


# --- rows ---------------------------------------------------------------------------------------------------------

# One argument for all: asyncpg checks each value of an array by itself, which made a row twice as dear for us.
_GIVEN = """
with given as (
    select * from json_to_recordset($1::json) as given (
        request_id uuid, started_at timestamptz, key_id text, account_id uuid, user_id text, app_id text,
        client_request_id text, provider text, model text, upstream_model text,
        stream boolean, status integer, outcome text, error_code text, finish_reason text,
        prompt_tokens bigint, completion_tokens bigint, cached_tokens bigint, cache_write_tokens bigint,
        reasoning_tokens bigint, usage_source text, latency_ms integer, ttft_ms integer, cost_micros bigint,
        source text, source_id uuid, saved_tokens bigint, saved_micros bigint
    )
),
"""

_INSERT = (
    _GIVEN  # noqa: S608 - constants alone
    + """
fresh as (
    insert into usage select * from given order by request_id
    on conflict (request_id, started_at) do nothing
    returning *
),
moved as (select 1 as sign, * from fresh),
"""
    + COUNTED
    + "select "
    + _ALL
    + " from fresh"
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
after as (
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
moved as (select -1 as sign, * from before union all select 1, * from after),
"""
    + COUNTED
    + "select "
    + _ALL
    + " from after"
)


# A host that is gone closes no connection: without the time-out its transaction would keep the locks of the sums and of
# the chain for hours.
_BEGIN = "begin isolation level read committed; set local idle_in_transaction_session_timeout = '10s'"


async def write_rows(pool: Pool, rows: Sequence[UsageRow], key: bytes | None = None) -> int:
    """Writes rows, counts them in the sums and names them in the chain of `key` (None: in no chain); how many are new.

    A row that is there already stays as it is, unless it was `interrupted` and the new one tells how it really ended.
    Raises RowError when one of them is refused; after any other error nothing can be said, and all may be tried again.
    """
    async with _borrowed(pool) as connection:
        fresh = await _write(connection, _INSERT, rows, key)
        if len(fresh) < len(rows):
            there = {str(row["request_id"]) for row in fresh}
            known = [row for row in rows if row.request_id not in there and row.outcome != "interrupted"]
            if known:
                await _write(connection, _UPGRADE, known, key)
    return len(fresh)


async def _write(
    connection: Connection, statement: str, rows: Sequence[UsageRow], key: bytes | None
) -> list[asyncpg.Record]:
    """The rows that one of the two statements wrote, as they are stored.

    Each is a transaction with a link of its own. Both in one would take the locks of the sums twice, so in no order,
    and two processes would deadlock.
    """
    async with transaction(connection, _BEGIN, PATIENCE):
        with _refusals():
            written = await connection.fetch(statement, _json(rows), timeout=PATIENCE)
        if written and key is not None:
            await link_rows(connection, key, written, replaces=statement is _UPGRADE, timeout=PATIENCE)
    return written


def _json(rows: Sequence[UsageRow]) -> str:
    """An array of objects. Raises TypeError for what is no text, or a number beyond 64 bit."""
    return orjson.dumps(rows).decode()


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

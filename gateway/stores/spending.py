"""What was spent, by the ledger: from it the counters of budgets are made that Redis does not have."""

from datetime import datetime
from typing import NamedTuple

from gateway.stores.payers import day_ends, month_ends
from gateway.stores.postgres import COMMAND_TIMEOUT, Pool, connection


class Spent(NamedTuple):
    """By one payer, in one day and its month (UTC)."""

    tokens_day: int = 0  # prompt and completion
    micros_day: int = 0  # micro-dollars
    micros_month: int = 0


_SPENT = """
select
    coalesce(sum(prompt_tokens + completion_tokens) filter (where start >= $1 and start < $2), 0)::bigint,
    coalesce(sum(cost_micros) filter (where start >= $1 and start < $2), 0)::bigint,
    coalesce(sum(cost_micros), 0)::bigint
"""
# A statement each: one for all of them would get one plan, which reads the tables whole.
_BY_ALL = _SPENT + "from usage_rollups where rollup = 'day_by_model' and start >= $3 and start < $4"
_BY_KEY = _SPENT + "from usage_rollups where rollup = 'day_by_key' and start >= $3 and start < $4 and key_id = $5"
_BY_ACCOUNT = (
    _SPENT + "from usage_rollups where rollup = 'day_by_key' and start >= $3 and start < $4 and account_id = $5"
)


async def read_spent(pool: Pool, subject: str, at: datetime) -> Spent:
    """Of `k:<key id>`, `a:<account id>` or `all`, on the day and in the month of `at` (an aware time in UTC).

    Raises Unavailable.
    """
    day = at.replace(hour=0, minute=0, second=0, microsecond=0)
    kind, _, name = subject.partition(":")
    statement = {"k": _BY_KEY, "a": _BY_ACCOUNT}.get(kind, _BY_ALL)
    payer = [name] if name else []
    async with connection(pool) as reader:
        row = await reader.fetchrow(
            statement, day, day_ends(at), day.replace(day=1), month_ends(at), *payer, timeout=COMMAND_TIMEOUT
        )
    assert row is not None  # an aggregate
    return Spent(*row)

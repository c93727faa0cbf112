from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from gateway.protocol.errors import Unavailable
from gateway.stores.payers import day_ends, day_of, month_ends
from gateway.stores.postgres import Pool
from gateway.stores.spending import Spent, read_spent

pytestmark = pytest.mark.integration

ACCOUNTS = ("00000000-0000-7000-8000-00000000000a", "00000000-0000-7000-8000-00000000000b")
KEYS = ("abcdefghijkl", "bcdefghijklm", "cdefghijklmn")  # the last one is the second account's


async def fill(pool: Pool, at: datetime) -> None:
    """Each key spends 1, 10, 100 … in hours around the edges of the day and the month of `at`."""
    day = at.replace(hour=0, minute=0)
    month = day.replace(day=1)
    hours = [month - timedelta(hours=1), month, day - timedelta(hours=1), day, day + timedelta(hours=23)]
    hours += [day_ends(day), month_ends(day) - timedelta(hours=1), month_ends(day)]
    for number, key in enumerate(KEYS, 1):
        account = ACCOUNTS[key == KEYS[-1]]
        for power, hour in enumerate(hours):
            await pool.execute(
                "insert into usage_hourly values ($1, $2, $3, '', '', 'p', 'm', 1, 0, 0, $4, $5, 0, 0, 0, $6, 0, 0, 1, 0, 0)",
                account,
                hour,
                key,
                number * 10**power,
                number * 10**power,
                number * 10**power,
            )
    await pool.execute("select fill_usage_rollups()")


async def test_what_was_spent_is_summed_by_day_and_month_for_each_kind_of_payer(pool: Pool) -> None:
    at = datetime(2025, 6, 15, 12, 30, tzinfo=UTC)
    await fill(pool, at)
    day, month = 11_000, 1_111_110
    for subject, share in ((f"k:{KEYS[1]}", 2), (f"a:{ACCOUNTS[0]}", 3), (f"a:{ACCOUNTS[1]}", 3), ("all", 6)):
        assert Spent(2 * day * share, day * share, month * share) == await read_spent(pool, subject, at)


async def test_a_payer_that_spent_nothing_spent_nothing(pool: Pool) -> None:
    at = datetime(2025, 6, 15, tzinfo=UTC)
    assert [await read_spent(pool, subject, at) for subject in ("k:abcdefghijkl", f"a:{ACCOUNTS[0]}", "all")] == [
        Spent(0, 0, 0)
    ] * 3


async def test_an_outage_of_the_database_is_said(pool: Pool, database_url: str) -> None:
    gone = await asyncpg.create_pool(database_url, min_size=0)
    await gone.close()
    with pytest.raises(Unavailable):
        await read_spent(gone, "all", datetime.now(UTC))


def test_days_and_months_end_where_the_calendar_says() -> None:
    last = datetime(2024, 12, 31, 23, 59, tzinfo=UTC)
    assert (day_of(last), day_ends(last), month_ends(last)) == (
        20241231,
        datetime(2025, 1, 1, tzinfo=UTC),
        datetime(2025, 1, 1, tzinfo=UTC),
    )
    assert month_ends(datetime(2024, 2, 1, tzinfo=UTC)) == datetime(2024, 3, 1, tzinfo=UTC)

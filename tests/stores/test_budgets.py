import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from gateway.exchange import NO_BUDGET, Budget, Principal, new_id
from gateway.protocol.errors import PermissionDenied, QuotaExhausted, RateLimited, Unavailable
from gateway.protocol.pricing import Price
from gateway.stores import payers as payers_module
from gateway.stores import script as script_module
from gateway.stores.budgets import SLICE, Budgets, Reservation
from gateway.stores.limits import Limiter
from gateway.stores.payers import day_of
from gateway.stores.postgres import Pool
from gateway.stores.reservations import Owe
from gateway.stores.script import RedisScript, connect_redis
from gateway.stores.spending import Spent
from tests.support.valkey import Valkey, valkey

pytestmark = pytest.mark.integration

NOW = datetime(2025, 6, 15, 12, tzinfo=UTC)
ACCOUNT = "00000000-0000-7000-8000-00000000000a"
KEY = "k:abcdefghijkl"
PRICE = Price(input=3_000_000, output=15_000_000, cached_input=300_000, cache_write=3_000_000, reasoning=15_000_000)
FREE = Price(0, 0, 0, 0, 0)


def principal(budget: Budget = NO_BUDGET, account: Budget = NO_BUDGET, key: str = KEY) -> Principal:
    return Principal(key[2:], "aig_key", "name", ACCOUNT, "member", budget=budget, account_budget=account)


def a_day(tokens: int) -> Principal:
    return principal(Budget(tokens_per_day=tokens))


async def flushed() -> None:
    """As of a process that has ended nothing yet."""


@asynccontextmanager
async def budgets(url: str, pool: Pool, *, loses_redis: bool = False, **options: Any) -> AsyncIterator[Budgets]:
    """As the gateway runs them. Budgets that went on without Redis unnoticed would prove nothing."""
    failures: list[str] = []
    async with connect_redis(url) as client:
        script = RedisScript(client, lease=options.pop("lease", 30.0), on_error=failures.append)
        budgets = Budgets(script, pool, **{"flushed": flushed, "clock": NOW.timestamp, **options})
        task = asyncio.create_task(script.run())
        try:
            yield budgets
            assert not task.done(), task
            assert loses_redis or not failures, failures
        finally:
            await budgets.close()
            await script.close()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def reserve(
    budgets: Budgets,
    who: Principal,
    output: int = SLICE,
    prompt: int = 0,
    price: Price | None = PRICE,
    exchange_id: str = "",
    at: datetime = NOW,
) -> Reservation:
    return await budgets.reserve(
        who, exchange_id or new_id(), at.timestamp(), prompt_tokens=prompt, output_tokens=output, price=price
    )


async def tokens_spent(budgets: Budgets, subject: str = KEY) -> int:
    return (await budgets.spent(subject)).tokens_day


async def until(claim: Callable[[], Awaitable[bool] | bool], seconds: float = 10.0) -> None:
    started = time.monotonic()
    while True:
        answer = claim()
        if answer is True or (not isinstance(answer, bool) and await answer):
            return
        assert time.monotonic() - started < seconds, f"not true after {seconds} s"
        await asyncio.sleep(0.005)


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def ledger(pool: Pool, at: datetime, tokens: int, micros: int, key: str = KEY, user: str = "") -> None:
    """An hour's sums of one key, half of its tokens in the prompt."""
    await pool.execute(
        "insert into usage_hourly values"
        " ($1, date_trunc('hour', $2::timestamptz, 'UTC'), $3, $6, '', 'p', 'm', 1, 0, 0, $4::bigint / 2,"
        " $4::bigint - $4::bigint / 2, 0, 0, 0, $5, 0, 0, 1, 0, 0)",
        ACCOUNT,
        at,
        key[2:],
        tokens,
        micros,
        user,
    )
    await pool.execute("select fill_usage_rollups()")


@pytest.fixture
def server() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script_module, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(script_module, "LONGEST_PAUSE", 0.05)


# --- reserving and settling ---------------------------------------------------------------------------------------


async def test_a_reservation_charges_at_once_and_its_settlement_gives_back(redis_url: str, pool: Pool) -> None:
    who = principal(Budget(tokens_per_day=1000, cost_per_day=1_000_000, cost_per_month=2_000_000))
    async with budgets(redis_url, pool) as one, budgets(redis_url, pool) as other:
        reservation = await reserve(one, who, output=256, prompt=100)
        assert reservation.granted == 256
        assert await other.spent(KEY) == Spent(356, 100 * 3 + 256 * 15, 100 * 3 + 256 * 15)
        reservation.settle(150, 1050)
        assert await one.spent(KEY) == Spent(150, 1050, 1050)
        reservation.settle(150, 1050)
        assert await one.spent(KEY) == await other.spent(KEY) == Spent(150, 1050, 1050)


async def test_a_settlement_above_what_was_reserved_is_charged_too(redis_url: str, pool: Pool) -> None:
    async with budgets(redis_url, pool) as one:
        reservation = await reserve(one, a_day(1000), output=100)
        reservation.settle(130, 7)
        assert await one.spent(KEY) == Spent(130, 7, 7)


async def test_a_large_maximum_is_never_refused_while_a_token_is_left(redis_url: str, pool: Pool) -> None:
    async with budgets(redis_url, pool) as one:
        first = await reserve(one, a_day(1000), output=1_000_000, prompt=100)
        assert first.granted == 900
        with pytest.raises(QuotaExhausted):
            await reserve(one, a_day(1000), output=1)
        first.settle(999, 0)
        last = await reserve(one, a_day(1000), output=1_000_000)
        assert last.granted == 1


async def test_nonsense_of_a_client_or_a_provider_breaks_no_sum(redis_url: str, pool: Pool) -> None:
    who = principal(Budget(tokens_per_day=2**63 - 1, tokens_per_minute=2**63 - 1))
    dear = Price(10**12, 10**12, 10**12, 10**12, 10**12)
    async with budgets(redis_url, pool) as one:
        reservation = await reserve(one, who, output=2**70, prompt=2**70, price=dear)
        assert reservation.granted == 10**9
        assert not await reservation.more(2**70)
        reservation.settle(2**70, 2**70)
        other = await reserve(one, who, output=0, price=dear)
        assert other.granted == 1
        assert await one.spent(KEY) == Spent(10**9 + 1, 10**12 + 10**6, 10**12 + 10**6)


async def test_money_is_granted_to_the_last_token_that_it_pays_for(redis_url: str, pool: Pool) -> None:
    who = principal(Budget(cost_per_day=1000))
    async with budgets(redis_url, pool) as one:
        reservation = await reserve(one, who, output=10**9, prompt=100)
        assert reservation.granted == 46  # 300 for the prompt, 690 of 700 for output
        assert await one.spent(KEY) == Spent(146, 990, 990)
        with pytest.raises(QuotaExhausted):
            await reserve(one, who)
        reservation.settle(200, 1200)
        assert (await reserve(one, who, output=500, price=FREE)).granted == 500


@pytest.mark.parametrize("rate", [1, 333_333, 1_000_001, 15_000_000, 10**12])
async def test_prices_of_any_size_are_granted_to_the_last_token(redis_url: str, pool: Pool, rate: int) -> None:
    price = Price(rate, rate, rate, rate, rate)
    for budget in (7, 1000, 123_457, 10**9 + 1):
        who = principal(Budget(cost_per_month=budget), key=f"k:{budget}")
        async with budgets(redis_url, pool) as one:
            output = min(10 * budget * 10**6 // rate, 10**9)
            try:
                granted = (await reserve(one, who, output=output, price=price)).granted
            except QuotaExhausted:
                granted = 0
            most = min(budget * 10**6 // rate, output)
            assert most - 1 <= granted <= most
            assert (await one.spent(f"k:{budget}")).micros_month <= budget


async def test_a_prompt_that_cannot_be_paid_is_refused_and_charges_nothing(redis_url: str, pool: Pool) -> None:
    async with budgets(redis_url, pool) as one:
        for who, prompt in ((a_day(100), 100), (principal(Budget(cost_per_month=300)), 100)):
            with pytest.raises(QuotaExhausted):
                await reserve(one, who, prompt=prompt)
        assert await one.spent(KEY) == Spent(0, 0, 0)
        assert (await reserve(one, a_day(100), prompt=99)).granted == 1


BUDGETS = [
    (Budget(tokens_per_day=100), 100, 43_200, "100 tokens a day", "2025-06-16T00:00Z"),
    (Budget(cost_per_day=1_500), 100, 43_200, "$0.0015 a day", "2025-06-16T00:00Z"),
    (Budget(cost_per_month=1_500), 100, 15.5 * 86_400, "$0.0015 a month", "2025-07-01T00:00Z"),
]


@pytest.mark.parametrize("whose", ["this key", "this account", "this gateway"])
@pytest.mark.parametrize(("budget", "output", "renewed_in", "amount", "renewed_at"), BUDGETS)
async def test_every_budget_of_every_payer_holds_and_is_named(
    redis_url: str, pool: Pool, whose: str, budget: Budget, output: int, renewed_in: int, amount: str, renewed_at: str
) -> None:
    wide = Budget(tokens_per_day=10**9, cost_per_day=10**12, cost_per_month=2**60)
    key, account, deployment = (
        budget if whose == name else wide for name in ("this key", "this account", "this gateway")
    )
    who = principal(key, account)
    async with budgets(redis_url, pool, deployment=deployment) as one:
        reservation = await reserve(one, who, output=5000)
        assert reservation.granted == output
        with pytest.raises(QuotaExhausted) as refusal:
            await reserve(one, who)
        assert refusal.value.message == f"the budget of {whose} is used up: {amount}; it is renewed at {renewed_at}"
        assert (refusal.value.retry_after, refusal.value.error_code) == (renewed_in, "insufficient_quota")
        assert {(100, 1500)} == {(await one.spent(name))[:2] for name in (KEY, f"a:{ACCOUNT}", "all")}


async def test_keys_of_an_account_share_its_budget(redis_url: str, pool: Pool) -> None:
    account = Budget(tokens_per_day=100)
    async with budgets(redis_url, pool) as one:
        assert (await reserve(one, principal(account=account), output=60)).granted == 60
        assert (await reserve(one, principal(account=account, key="k:other-key-00"), output=60)).granted == 40
        with pytest.raises(QuotaExhausted):
            await reserve(one, principal(account=account))
        assert await tokens_spent(one, f"a:{ACCOUNT}") == 100


async def test_a_model_without_a_price_cannot_be_held_to_a_budget_of_dollars(redis_url: str, pool: Pool) -> None:
    async with budgets(redis_url, pool) as one:
        assert (await reserve(one, a_day(10**6), price=None)).granted == SLICE
        for who in (principal(Budget(cost_per_day=1)), principal(account=Budget(cost_per_month=1))):
            with pytest.raises(PermissionDenied) as refusal:
                await reserve(one, who, price=None)
            assert refusal.value.error_code == "price_unknown" and "[prices]" in refusal.value.message


async def test_a_budget_covers_a_key_by_itself_its_account_or_the_deployment(redis_url: str, pool: Pool) -> None:
    async with budgets(redis_url, pool) as one, budgets(redis_url, pool, deployment=Budget(cost_per_day=1)) as all_:
        claims = [one.covers(who) for who in (principal(), a_day(1), principal(account=Budget(tokens_per_minute=1)))]
        assert [*claims, all_.covers(principal())] == [False, True, True, True]


async def test_the_day_and_the_month_are_those_in_which_an_exchange_began(redis_url: str, pool: Pool) -> None:
    who = principal(Budget(tokens_per_day=300, cost_per_month=5000))
    async with budgets(redis_url, pool) as one:
        late = await reserve(one, who, output=200, at=NOW)
        tomorrow = await reserve(one, who, output=500, at=NOW + timedelta(days=1))
        assert tomorrow.granted == 133  # a new day, but the month has 2000 left
        next_month = await reserve(one, who, output=500, at=NOW + timedelta(days=20))
        assert next_month.granted == 300
        late.settle(10, 150)
        assert await one.spent(KEY) == Spent(10, 150, 150 + 133 * 15)


# --- streams ------------------------------------------------------------------------------------------------------


async def stream(reservation: Reservation, length: int, prompt: int) -> int:
    """A token at a time, as the relay asks; how many were written."""
    written = 0
    while written < length and (reservation.used(written) or await reservation.more(written)):
        written += 1
        if written % 16 == 0:
            await asyncio.sleep(0)
    reservation.settle(prompt + written, prompt * 3 + written * 15)
    return written


@pytest.mark.parametrize(
    ("budget", "most", "crumbs"),
    [
        (Budget(tokens_per_day=20_000), 20_000, 0),
        (Budget(cost_per_day=300_000), 300_000, 15),
        (Budget(tokens_per_day=20_000, cost_per_month=290_000, tokens_per_minute=10**6), 290_000, 15),
    ],
)
async def test_streams_that_race_for_a_budget_use_all_of_it_and_no_more(
    redis_url: str, pool: Pool, budget: Budget, most: int, crumbs: int
) -> None:
    """Over two gateways, four times more than there is."""
    who = principal(budget, account=budget)

    async def one_stream(budgets: Budgets) -> int:
        try:
            return await stream(await reserve(budgets, who, prompt=10), 2500, 10)
        except QuotaExhausted:
            return -1

    async with budgets(redis_url, pool) as one, budgets(redis_url, pool) as other:
        written = await asyncio.gather(*(one_stream(budgets) for _ in range(16) for budgets in (one, other)))
        spent = await one.spent(KEY)
        served = [count for count in written if count >= 0]
        assert spent.tokens_day == sum(served) + 10 * len(served)
        used = spent.tokens_day if most == 20_000 else spent.micros_day
        assert most - crumbs <= used <= most
        assert await other.spent(f"a:{ACCOUNT}") == spent


async def test_a_stream_asks_for_its_next_slice_before_it_needs_it(redis_url: str, pool: Pool) -> None:
    async with budgets(redis_url, pool) as one:
        reservation = await reserve(one, a_day(600))
        assert reservation.granted == SLICE
        assert all(reservation.used(count) for count in range(SLICE // 2))
        await turns(20)
        assert await tokens_spent(one) == SLICE
        assert reservation.used(SLICE // 2)
        await until(lambda: reservation.granted == 2 * SLICE)
        assert all(reservation.used(count) for count in range(2 * SLICE))
        await until(lambda: reservation.granted == 600)
        assert not reservation.used(600)
        assert not await reservation.more(600)
        assert await tokens_spent(one) == 600


async def test_a_chunk_larger_than_what_was_asked_for_meanwhile_cuts_no_stream(redis_url: str, pool: Pool) -> None:
    async with budgets(redis_url, pool) as one:
        reservation = await reserve(one, a_day(1_000_000))
        assert reservation.used(150)  # asks for the second slice, in the background
        assert not reservation.used(600)
        assert await reservation.more(600)
        assert reservation.granted >= 600


async def test_a_small_answer_reserves_no_more_than_it_can_be(redis_url: str, pool: Pool) -> None:
    async with budgets(redis_url, pool) as one:
        reservation = await reserve(one, a_day(1_000_000), output=10)
        assert reservation.used(0) and reservation.used(4)
        await turns(20)
        assert await tokens_spent(one) == 10


async def test_a_stream_at_its_end_goes_on_when_another_gave_back(redis_url: str, pool: Pool) -> None:
    async with budgets(redis_url, pool) as one:
        first, second = await reserve(one, a_day(300), output=200), await reserve(one, a_day(300), output=200)
        assert second.granted == 100
        assert second.used(99) and second._asked is None  # it got less than it wanted: there is no more to ask for
        assert (second.used(100), await second.more(100)) == (False, False)
        first.settle(20, 0)
        assert await second.more(100)
        assert second.granted == 280


async def test_one_chunk_of_many_slices_is_charged_whole(redis_url: str, pool: Pool) -> None:
    async with budgets(redis_url, pool) as one:
        reservation = await reserve(one, a_day(10_000))
        assert not reservation.used(3000)
        assert await reservation.more(3000)
        assert reservation.granted == 3000 + SLICE


# --- tokens a minute ----------------------------------------------------------------------------------------------


async def test_tokens_a_minute_refuse_the_next_request_and_never_cut_a_stream(redis_url: str, pool: Pool) -> None:
    who = principal(Budget(tokens_per_minute=1000))
    async with budgets(redis_url, pool) as one, budgets(redis_url, pool) as other:
        reservation = await reserve(one, who, output=500, prompt=300)
        assert reservation.headers["x-ratelimit-limit-tokens"] == "1000"
        assert 200 <= int(reservation.headers["x-ratelimit-remaining-tokens"]) < 250
        assert 45 < float(reservation.headers["x-ratelimit-reset-tokens"].removesuffix("s")) <= 48
        with pytest.raises(RateLimited) as refusal:
            await reserve(other, who, prompt=500)
        assert refusal.value.retry_after and 15 <= refusal.value.retry_after <= 19  # 301 tokens are missing
        assert refusal.value.message.startswith("this key may use 1000 tokens a minute; try again in ")
        assert await reservation.more(500)  # into debt
        with pytest.raises(RateLimited):
            await reserve(other, who)
        reservation.settle(310, 0)
        assert (await reserve(one, who, prompt=600)).granted == SLICE


async def test_a_prompt_larger_than_the_bucket_passes_when_it_is_full(redis_url: str, pool: Pool) -> None:
    who = principal(Budget(tokens_per_minute=100))
    async with budgets(redis_url, pool) as one:
        reservation = await reserve(one, who, prompt=500)
        with pytest.raises(RateLimited) as refusal:
            await reserve(one, who, prompt=500)
        assert refusal.value.retry_after == pytest.approx((500 + SLICE) * 60 / 100, abs=2)
        reservation.settle(0, 0)
        assert (await reserve(one, who, prompt=500)).granted == SLICE


async def test_a_clock_that_was_set_back_does_not_lock_a_payer_out_for_long(
    redis_url: str, redis: Redis, pool: Pool
) -> None:
    await redis.set(f"aig:pace:{KEY}", str(int((time.time() + 10**6) * 1e6)))
    async with budgets(redis_url, pool) as one:
        with pytest.raises(RateLimited) as refusal:
            await reserve(one, principal(Budget(tokens_per_minute=10)))
        assert refusal.value.retry_after == pytest.approx(3600, abs=60)


async def test_the_headers_are_those_of_the_payer_nearest_to_its_limit(redis_url: str, pool: Pool) -> None:
    who = principal(Budget(tokens_per_minute=1000), Budget(tokens_per_minute=400))
    async with budgets(redis_url, pool, deployment=Budget(tokens_per_minute=10**6)) as one:
        assert (await reserve(one, who, output=100)).headers["x-ratelimit-limit-tokens"] == "400"
        with pytest.raises(RateLimited) as refusal:
            await reserve(one, who, prompt=399)
        assert "this account may use 400 tokens a minute" in refusal.value.message
        assert (await reserve(one, a_day(10**6), output=100)).headers["x-ratelimit-limit-tokens"] == "1000000"


# --- from the ledger ----------------------------------------------------------------------------------------------


async def test_counters_that_are_missing_are_made_from_the_ledger(redis_url: str, pool: Pool) -> None:
    await ledger(pool, NOW, 100, 1000)
    await ledger(pool, NOW.replace(hour=0), 10, 100)
    await ledger(pool, NOW - timedelta(days=1), 5, 50)
    await ledger(pool, NOW.replace(day=1, hour=0), 3, 7)
    await ledger(pool, NOW.replace(day=1, hour=0) - timedelta(hours=1), 2000, 20_000)  # last month
    await ledger(pool, NOW, 40, 400, key="k:other-key-00")
    who, asked = a_day(150), 0

    async def flushed() -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            await ledger(pool, NOW, 20, 200, user="a row that this process had not shipped")

    async with budgets(redis_url, pool, flushed=flushed) as one:
        assert await one.spent(KEY) == Spent(110, 1100, 1157)  # nobody asked for its counters yet
        reservations = await asyncio.gather(*(reserve(one, who, output=1) for _ in range(10)))
        assert [reservation.granted for reservation in reservations] == [1] * 10
        assert asked == 1  # however many wait for it
        assert await one.spent(KEY) == Spent(130 + 10, 1300 + 150, 1357 + 150)
        assert (await reserve(one, who, output=100)).granted == 10
        await reserve(one, principal(account=Budget(tokens_per_day=10**6)), output=1)
        assert (await one.spent(f"a:{ACCOUNT}")).tokens_day == 130 + 40 + 1
        assert (await one.spent("all")).tokens_day == 170  # has no budget, so it is read from the ledger


async def test_a_redis_that_lost_its_memory_is_told_what_was_spent_and_what_runs(
    redis_url: str, redis: Redis, pool: Pool
) -> None:
    who = principal(Budget(tokens_per_day=2000))
    async with budgets(redis_url, pool) as one, budgets(redis_url, pool, lease=0.3) as other:
        ended = await reserve(one, who, output=300)
        ended.settle(100, 1500)
        running, elsewhere = await reserve(one, who, output=400), await reserve(other, who, output=500)
        await ledger(pool, NOW, 100, 1500)
        await redis.flushdb()
        third = await reserve(one, who, output=1)

        async def all_is_told() -> bool:
            return await tokens_spent(one) == 100 + 400 + 500 + 1

        await until(all_is_told)
        for reservation, tokens in ((running, 350), (elsewhere, 600), (third, 1)):
            reservation.settle(tokens, 0)
        await other._script.heard()
        assert await tokens_spent(one) == 100 + 350 + 600 + 1


async def test_a_server_that_was_restarted_with_an_old_memory_is_not_believed(
    redis_url: str, redis: Redis, pool: Pool
) -> None:
    """Its snapshot may be an hour old; that it does not know the script says that it is another one."""
    async with budgets(redis_url, pool) as one:
        reservation = await reserve(one, a_day(1000), output=300)
        reservation.settle(200, 0)
        assert await tokens_spent(one) == 200
        await ledger(pool, NOW, 700, 0)
        await redis.set("aig:server", "the run that wrote this memory")
        await redis.script_flush()
        assert (await reserve(one, a_day(1000), output=1000)).granted == 300


async def test_a_stream_that_nobody_can_pay_any_more_keeps_what_it_has(
    redis_url: str, redis: Redis, pool: Pool
) -> None:
    async with budgets(redis_url, pool) as one, budgets(redis_url, pool) as other:
        reservation = await reserve(one, a_day(1000), prompt=100)
        await ledger(pool, NOW, 1000, 0)
        await redis.flushdb()
        with pytest.raises(QuotaExhausted):
            await reserve(other, a_day(1000))
        assert not await reservation.more(SLICE)
        assert reservation.granted == SLICE
        reservation.settle(100 + SLICE, 0)
        assert await tokens_spent(one) == 1000 + 100 + SLICE


async def test_what_ends_just_when_redis_lost_its_memory_is_charged(redis_url: str, redis: Redis, pool: Pool) -> None:
    async with budgets(redis_url, pool) as one, budgets(redis_url, pool) as other:
        reservation = await reserve(one, a_day(1000), output=300)
        await redis.flushdb()
        await reserve(other, a_day(1000), output=1)  # makes the counters
        reservation.settle(250, 0)  # nobody has told this process yet
        await one._script.heard()
        assert await tokens_spent(one) == 251
        reservation.settle(250, 0)
        one.settle(reservation.exchange_id, 250, 0)
        assert await tokens_spent(one) == 251


async def test_without_the_ledger_only_what_redis_knows_can_be_reserved(
    redis_url: str, redis: Redis, empty_database_url: str, pool: Pool
) -> None:
    async with budgets(redis_url, pool) as first:
        await reserve(first, a_day(1000), output=10)
    gone = await asyncpg.create_pool(empty_database_url, min_size=0)
    await gone.close()
    async with budgets(redis_url, gone) as one:
        known = await reserve(one, a_day(1000), output=20)
        with pytest.raises(Unavailable) as refusal:
            await reserve(one, principal(account=Budget(cost_per_day=10**6)))
        assert refusal.value.error_code == "budget_unavailable"
        await redis.flushdb()
        assert await known.more(20)  # what runs goes on with what was left when we heard last
        with pytest.raises(Unavailable):
            await reserve(one, a_day(1000))


async def test_rows_that_cannot_be_written_refuse_too(redis_url: str, pool: Pool) -> None:
    async def flushed() -> None:
        raise Unavailable("the ledger is not up to date")

    async with budgets(redis_url, pool, flushed=flushed) as one:
        with pytest.raises(Unavailable) as refusal:
            await reserve(one, a_day(1000))
        assert refusal.value.error_code == "budget_unavailable"


# --- processes that die -------------------------------------------------------------------------------------------


async def test_who_finds_the_journal_of_a_killed_process_settles_exactly(redis_url: str, pool: Pool) -> None:
    async with budgets(redis_url, pool) as survivor:
        async with budgets(redis_url, pool) as killed:  # closing settles nothing, as a kill does
            reservations = [await reserve(killed, a_day(10_000), output=100, prompt=10) for _ in range(3)]
            reservations[0].settle(60, 900)  # and its end was in the journal only
            await killed._script.heard()
            assert await tokens_spent(survivor) == 60 + 110 + 110
            for reservation, tokens in zip(reservations, (60, 70, 80), strict=True):
                survivor.settle(reservation.exchange_id, tokens, tokens * 15)
            async with asyncio.timeout(5):  # they wait for what somebody waits for
                while await survivor.spent(KEY) != Spent(210, 900 + 1050 + 1200, 900 + 1050 + 1200):
                    await asyncio.sleep(0.01)
            reservations[2].settle(99, 0)  # it was not dead, only slow
        survivor.settle(reservations[1].exchange_id, 70, 0)
        survivor.settle(new_id(), 1000, 1000)
        await turns(20)
        assert await tokens_spent(survivor) == 210


async def lives(redis: Any) -> dict[str, int]:
    """Seconds that what Redis keeps has left, by its kind."""
    return {str(name, "ascii").split(":")[1]: await redis.ttl(name) for name in await redis.keys("aig:*")}


async def test_what_redis_keeps_ends_by_itself(redis_url: str, redis: Redis, pool: Pool) -> None:
    async with budgets(redis_url, pool) as one:
        await reserve(one, principal(Budget(tokens_per_day=1000, tokens_per_minute=60)), output=30)
        ends = await lives(redis)
        assert 3590 < ends["hold"] <= ends["spent"] <= 3600
        assert 25 < ends["pace"] <= 30


async def test_what_runs_is_renewed(redis_url: str, redis: Redis, pool: Pool) -> None:
    async with budgets(redis_url, pool, lease=0.3) as one:
        await reserve(one, a_day(1000))
        for name in await redis.keys("aig:*"):
            await redis.expire(name, 10)

        async def both_live_on() -> bool:
            ends = await lives(redis)
            return ends["hold"] > 10 and ends["spent"] > 10

        await until(both_live_on)


# --- clients that leave -------------------------------------------------------------------------------------------


async def cancelled(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


async def test_a_client_that_leaves_before_redis_is_asked_is_not_charged(redis_url: str, pool: Pool) -> None:
    async with budgets(redis_url, pool) as one:
        await reserve(one, a_day(1000), output=1)
        leaver = asyncio.create_task(reserve(one, a_day(1000)))
        asyncio.get_running_loop().call_soon(leaver.cancel)
        await asyncio.gather(leaver, return_exceptions=True)
        assert leaver.cancelled()
        assert await tokens_spent(one) == 1


async def test_a_client_that_leaves_while_redis_is_asked_is_not_charged(server: Valkey, pool: Pool) -> None:
    async with budgets(server.url, pool) as one:
        await reserve(one, a_day(1000), output=1)
        server.signal(signal.SIGSTOP)
        leaver = asyncio.create_task(reserve(one, a_day(1000)))
        await turns(10)  # now it was sent
        await cancelled(leaver)
        server.signal(signal.SIGCONT)
        await one._script.heard()
        assert await tokens_spent(one) == 1


async def test_a_client_that_leaves_between_the_answer_and_its_reader_is_not_charged(
    redis_url: str, pool: Pool
) -> None:
    async with budgets(redis_url, pool) as one:
        await reserve(one, a_day(1000), output=1)

        async def first() -> None:
            await reserve(one, a_day(1000), output=2)
            leaver.cancel()  # both answers came together; the other one is not read yet

        task = asyncio.create_task(first())
        leaver = asyncio.create_task(reserve(one, a_day(1000), output=4))
        await asyncio.gather(task, leaver, return_exceptions=True)
        assert leaver.cancelled()
        assert await tokens_spent(one) == 3


async def test_a_client_that_leaves_while_the_ledger_is_read_is_not_charged(redis_url: str, pool: Pool) -> None:
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def flushed() -> None:
        reading.set()
        await go_on.wait()

    async with budgets(redis_url, pool, flushed=flushed) as one:
        leaver = asyncio.create_task(reserve(one, a_day(1000)))
        stayer = asyncio.create_task(reserve(one, a_day(1000), output=5))
        await reading.wait()
        await cancelled(leaver)
        go_on.set()
        assert (await stayer).granted == 5
        assert await tokens_spent(one) == 5


async def test_a_client_that_leaves_while_its_stream_waits_for_more_is_charged_what_it_got(
    server: Valkey, pool: Pool
) -> None:
    async with budgets(server.url, pool) as one:
        reservation = await reserve(one, a_day(1000))
        assert not reservation.used(SLICE)
        server.signal(signal.SIGSTOP)
        leaver = asyncio.create_task(reservation.more(SLICE))
        await turns(10)  # now it was sent
        await cancelled(leaver)
        reservation.settle(SLICE, 0)
        server.signal(signal.SIGCONT)
        await one._script.heard()
        assert await tokens_spent(one) == SLICE
        assert reservation.granted == SLICE


async def test_a_stream_that_ends_while_its_next_slice_is_asked_for_is_charged_what_it_got(
    redis_url: str, pool: Pool
) -> None:
    async with budgets(redis_url, pool) as one:
        for count in range(20):
            reservation = await reserve(one, a_day(10**6))
            reservation.used(SLICE - 1)
            await turns(count)
            reservation.settle(100, 0)
        assert await tokens_spent(one) == 20 * 100
        assert not one._running


# --- without Redis ------------------------------------------------------------------------------------------------


async def test_without_redis_each_node_grants_its_share_of_what_was_left(
    server: Valkey, pool: Pool, quick_probes: None
) -> None:
    who = principal(Budget(tokens_per_day=1000, cost_per_day=10**9))
    async with budgets(server.url, pool, nodes=2, loses_redis=True) as one:
        await reserve(one, who, output=200)
        server.signal(signal.SIGSTOP)
        first = await reserve(one, who, output=300, prompt=10)  # 800 are left, 400 are ours
        second = await reserve(one, who, output=300)
        assert (first.granted, second.granted) == (300, 90)
        with pytest.raises(Unavailable) as refusal:
            await reserve(one, who)
        assert refusal.value.error_code == "budget_unavailable"
        first.settle(110, 0)
        assert await second.more(90)
        assert second.granted == 90 + 200
        server.signal(signal.SIGCONT)
        await until(lambda: not one._script.gone)
        second.settle(150, 0)
        assert await tokens_spent(one) == 200 + 110 + 150  # what was used meanwhile, and what goes on


async def test_what_is_granted_without_redis_is_divided_by_its_money_too(server: Valkey, pool: Pool) -> None:
    who = principal(Budget(cost_per_month=1000))
    async with budgets(server.url, pool, loses_redis=True) as one:
        (await reserve(one, who, output=10)).settle(10, 150)
        await reserve(one, who, output=10)
        server.kill()
        assert (await reserve(one, who, output=500, prompt=100)).granted == 26  # 700 less 300 for the prompt
        server.start()


async def test_a_payer_of_whom_nothing_is_known_gets_nothing_without_redis(server: Valkey, pool: Pool) -> None:
    async with budgets(server.url, pool, loses_redis=True) as one:
        await reserve(one, a_day(1000), output=10)
        server.kill()
        for who, at in (
            (principal(account=Budget(tokens_per_day=1000)), NOW),
            (a_day(1000), NOW + timedelta(days=1)),
        ):
            with pytest.raises(Unavailable):
                await reserve(one, who, at=at)
        assert (await reserve(one, a_day(1000), output=10)).granted == 10
        server.start()


@pytest.mark.parametrize(("policy", "passes"), [("open", True), ("closed", False)])
async def test_without_redis_a_setting_lets_all_pass_or_none(
    server: Valkey, pool: Pool, policy: Any, passes: bool
) -> None:
    heard: list[str] = []
    async with budgets(server.url, pool, loses_redis=True, on_redis_down=policy, on_local=heard.append) as one:
        running = await reserve(one, a_day(1000), output=100)
        server.kill()
        if passes:
            assert (await reserve(one, a_day(1000), output=5000)).granted == 5000
        else:
            with pytest.raises(Unavailable) as refusal:
                await reserve(one, a_day(1000), output=1)
            assert refusal.value.error_code == "budget_unavailable"
        assert heard == [policy]
        assert await running.more(100)  # what runs may use what was left in both
        assert heard == [policy], "one decision a request"
        server.start()


async def test_without_redis_tokens_a_minute_are_divided_too(server: Valkey, pool: Pool) -> None:
    who = principal(Budget(tokens_per_minute=1000))
    async with budgets(server.url, pool, nodes=2, loses_redis=True) as one:
        await reserve(one, who, output=10)
        server.kill()
        reservation = await reserve(one, who, output=400, prompt=50)
        with pytest.raises(RateLimited) as refusal:
            await reserve(one, who, prompt=100)
        assert refusal.value.retry_after == 7  # 51 tokens, of 500 a minute
        reservation.settle(100, 0)
        assert (await reserve(one, who, prompt=100)).granted == SLICE
        server.start()


async def test_a_redis_that_is_back_with_its_memory_hears_all_once(
    server: Valkey, pool: Pool, quick_probes: None
) -> None:
    async with budgets(server.url, pool, loses_redis=True) as one, budgets(server.url, pool, loses_redis=True) as other:
        held = [await reserve(one, a_day(10_000), output=100) for _ in range(3)]
        server.signal(signal.SIGSTOP)
        lost = await reserve(one, a_day(10_000), output=100)  # Redis will find it when it goes on
        local = await reserve(one, a_day(10_000), output=100)
        held[0].settle(30, 0)
        lost.settle(40, 0)
        local.settle(50, 0)
        stays = await reserve(one, a_day(10_000), output=100)
        assert await held[1].more(100)
        server.signal(signal.SIGCONT)
        await until(lambda: not one._script.gone and not other._script.gone)

        async def all_is_told() -> bool:
            return await tokens_spent(other) == (30 + 40 + 50) + (100 + SLICE) + 100 + 100

        await until(all_is_told)
        held[1].settle(300, 0)
        held[2].settle(7, 0)
        stays.settle(8, 0)
        await one._script.heard()
        assert await tokens_spent(other) == (30 + 40 + 50) + 300 + 7 + 8


async def test_a_sum_that_may_have_arrived_is_charged_once(redis_url: str, pool: Pool) -> None:
    async with budgets(redis_url, pool) as one:
        await reserve(one, a_day(1000), output=1)
        owed = Owe(one._script, one._script.epoch, KEY, day_of(NOW), 10, 0)
        one._script.send(owed)
        await one._script.heard()
        owed.lost()
        one._script.send(Owe(one._script, one._script.epoch - 1, KEY, day_of(NOW), 100, 0))  # the ledger has that
        await one._script.heard()
        assert await tokens_spent(one) == 11


async def test_a_redis_that_is_back_without_its_memory_hears_what_the_ledger_does_not_have(
    server: Valkey, pool: Pool, quick_probes: None
) -> None:
    async with budgets(server.url, pool, loses_redis=True) as one:
        held = [await reserve(one, a_day(10_000), output=100) for _ in range(2)]
        server.kill()
        local = [await reserve(one, a_day(10_000), output=100) for _ in range(2)]
        held[0].settle(30, 0)
        local[0].settle(50, 0)
        await ledger(pool, NOW, 80, 0)
        server.start()
        await until(lambda: not one._script.gone)
        await reserve(one, a_day(10_000), output=1)

        async def all_is_told() -> bool:
            return await tokens_spent(one) == 80 + 200 + 1

        await until(all_is_told)
        held[1].settle(5, 0)
        local[1].settle(6, 0)
        assert await tokens_spent(one) == 80 + 5 + 6 + 1


async def test_what_ended_while_redis_was_gone_is_not_charged_to_counters_that_have_it(
    server: Valkey, pool: Pool
) -> None:
    """Another gateway has found Redis back, without its memory, and made them from the ledger."""
    async with budgets(server.url, pool, loses_redis=True) as one:
        asked, ended = await reserve(one, a_day(10_000), output=100), await reserve(one, a_day(10_000), output=100)
        server.signal(signal.SIGSTOP)
        waiting = asyncio.create_task(reserve(one, a_day(10_000), output=100))
        await turns(10)  # now it was sent
        asked.settle(30, 0)
        await waiting
        ended.settle(40, 0)
        server.kill()
        server.start()
        await ledger(pool, NOW, 70, 0)
        async with budgets(server.url, pool) as other:
            (await reserve(other, a_day(10_000), output=1)).settle(1, 0)
            await until(lambda: not one._script.gone)
            (await waiting).settle(5, 0)
            await one._script.heard()
            assert await tokens_spent(other) == 70 + 1 + 5


async def test_the_remainders_of_only_so_many_payers_are_remembered(
    server: Valkey, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payers_module, "MAX_SHARES", 1)
    other = principal(Budget(tokens_per_day=1000), key="k:other-key-00")
    async with budgets(server.url, pool, loses_redis=True) as one:
        for who in (a_day(1000), other):
            await reserve(one, who, output=1)
        server.kill()
        assert (await reserve(one, other, output=1)).granted == 1
        with pytest.raises(Unavailable):
            await reserve(one, a_day(1000))
        server.start()


# --- what it costs ------------------------------------------------------------------------------------------------


async def test_a_reservation_costs_little_more_than_an_admission(
    redis_url: str, pool: Pool, figure: Callable[[str], None]
) -> None:
    who = principal(Budget(tokens_per_day=10**12, cost_per_month=10**14), Budget(cost_per_month=10**14))
    limited = Principal("key", "", "", ACCOUNT, "member", requests_per_minute=10**6, concurrent_requests=10**6)
    async with budgets(redis_url, pool) as one:
        limiter = Limiter(one._script)

        async def admit() -> None:
            name = new_id()
            await limiter.admit(limited, name)
            limiter.release(limited, name)

        async def pay() -> None:
            reservation = await reserve(one, who, prompt=100)
            reservation.settle(200, 1000)

        async def microseconds(work: Callable[[], Awaitable[None]]) -> float:
            started = time.process_time()
            await asyncio.gather(*(work() for _ in range(100)))
            await one._script.heard()
            return (time.process_time() - started) * 1e6 / 100

        await admit()
        await pay()
        costs = [(await microseconds(admit), await microseconds(pay)) for _ in range(20)]
        admitting, paying = (min(column) for column in zip(*costs, strict=True))
        figure(f"budgets: {paying:.0f} µs of CPU to reserve and settle, beside {admitting:.0f} to admit and release")
        assert paying < 4 * admitting
        assert await tokens_spent(one) == 200 * (20 * 100 + 1)


async def test_a_chunk_costs_a_comparison(redis_url: str, pool: Pool, figure: Callable[[str], None]) -> None:
    async with budgets(redis_url, pool) as one:
        reservation = await reserve(one, a_day(10**6), output=10**5)

        def cost_of(call: Callable[[int], object]) -> float:
            started = time.process_time()
            for count in range(10_000):
                call(count)
            return (time.process_time() - started) / 10_000

        cost = min(cost_of(reservation.used) for _ in range(5))
        yardstick = min(cost_of(lambda count: bool(NO_BUDGET)) for _ in range(5))
        figure(f"budgets: {cost * 1e9:.0f} ns of CPU a chunk")
        assert cost < 5 * yardstick  # four fields are looked at in it; what measures coverage slows both

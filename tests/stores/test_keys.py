import asyncio
import hashlib
import hmac
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import asyncpg
import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from gateway.exchange import NO_BUDGET, Budget, Principal, new_id
from gateway.protocol.errors import GatewayError, NotFound, Unauthenticated, Unavailable
from gateway.stores import key_rows
from gateway.stores import keys as keys_module
from gateway.stores.key_limits import NO_LIMITS, KeyLimits
from gateway.stores.key_rows import KeyChanges, Proofs
from gateway.stores.keys import KeyStore, NewKey
from gateway.stores.passwords import HashingPool, matches
from gateway.stores.postgres import HOT_ACQUIRE_TIMEOUT, HOT_COMMAND_TIMEOUT
from gateway.stores.secrets import load_pepper
from gateway.stores.tokens import join_token, make_token, parse_token
from tests.support.clock import Clock, on_a_core

pytestmark = pytest.mark.integration

LIMITS: KeyLimits = {
    "requests_per_minute": 5,
    "requests_per_second": 0.5,
    "burst": 7,
    "concurrent_requests": 3,
    "allowed_models": ("gpt-*", "claude-*"),
    "tokens_per_minute": 1_000,
    "tokens_per_day": 10**12,
    "cost_per_day": 5_000_001,
    "cost_per_month": 10**15,
    "drain_seconds": 30,
    "cache_ttl": 3600,
}
OTHER_LIMITS: KeyLimits = {
    "requests_per_minute": 6,
    "requests_per_second": 0.25,
    "burst": 8,
    "concurrent_requests": 4,
    "allowed_models": ("llama*",),
    "tokens_per_minute": 2_000,
    "tokens_per_day": 3_000,
    "cost_per_day": 1,
    "cost_per_month": 2,
    "drain_seconds": 600,
    "cache_ttl": 2_592_000,
}

HASHING = HashingPool()  # of all tests in this file; closed by the fixture below


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def account(pool: asyncpg.Pool) -> str:
    return await add_account(pool, "owner@example.com")


@pytest.fixture(scope="module", autouse=True)
def hashing() -> Iterator[None]:
    yield
    HASHING.close()


@pytest.fixture
def store(pool: asyncpg.Pool, clock: Clock) -> KeyStore:
    return make_store(pool, clock)


@pytest.fixture
def argon2(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The tokens that Argon2id was asked about."""
    asked: list[str] = []

    def counting(hasher: Any, phc: str, token: str) -> bool:
        asked.append(token)
        return matches(hasher, phc, token)

    monkeypatch.setattr("gateway.stores.keys.matches", counting)
    yield asked


def make_store(pool: asyncpg.Pool, clock: Callable[[], float], redis: Redis | None = None, **options: Any) -> KeyStore:
    known = {"pepper": b"pepper", "cache_seconds": 60, "stale_seconds": 900, "hashing": HASHING, "clock": clock}
    return KeyStore(pool, redis, **{**known, **options})


async def add_account(pool: asyncpg.Pool, email: str, role: str = "member") -> str:
    account_id = new_id()
    sql = "insert into accounts (id, email, password_hash, role) values ($1, $2, '-', $3)"
    await pool.execute(sql, account_id, email, role)
    return account_id


async def add_key(store: KeyStore, account_id: str, name: str = "laptop") -> NewKey:
    return await store.create(account_id, name, requests_per_minute=60, concurrent_requests=20)


def other_secret(token: str) -> str:
    """A key with the same id and a secret of its own."""
    mine, other = parse_token(token), parse_token(make_token())
    assert mine is not None
    assert other is not None
    return join_token(mine.id, other.secret)


async def refusal(answer: Awaitable[object]) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        await answer
    return caught.value


# --- a good key ---------------------------------------------------------------------------------------------------


async def test_a_key_names_its_owner_and_its_limits(store: KeyStore, account: str) -> None:
    key = await store.create(account, "laptop", **LIMITS)
    assert await store.verify(key.token) == Principal(
        key_id=key.id,
        key_prefix=f"aig_{key.id}",
        key_name="laptop",
        account_id=account,
        role="member",
        requests_per_minute=5,
        requests_per_second=0.5,
        burst=7,
        concurrent_requests=3,
        allowed_models=("gpt-*", "claude-*"),
        budget=Budget(1_000, 10**12, 5_000_001, 10**15),
        cache_ttl=3600,
        drain_seconds=30,
    )
    assert (await store.get(key.id, account)).limits == LIMITS


async def test_a_key_that_nothing_is_said_of_has_no_limits(store: KeyStore, account: str) -> None:
    key = await store.create(account, "laptop")
    principal = await store.verify(key.token)
    assert principal == Principal(key.id, f"aig_{key.id}", "laptop", account, "member")
    assert not principal.budget
    assert not principal.account_budget
    assert (await store.get(key.id, account)).limits == NO_LIMITS


async def test_a_rate_without_a_burst_holds_what_flows_in_a_second(store: KeyStore, account: str) -> None:
    key = await store.create(account, "laptop", requests_per_second=2.5)
    assert (await store.verify(key.token)).burst == 3
    changed = await store.change(key.id, account, KeyChanges(requests_per_second=0.1))
    assert changed.limits["burst"] == 1
    changed = await store.change(key.id, account, KeyChanges(burst=20))
    assert (changed.limits["requests_per_second"], changed.limits["burst"]) == (0.1, 20)


async def test_what_all_keys_of_an_account_may_use_is_known_with_each(
    store: KeyStore, account: str, pool: asyncpg.Pool
) -> None:
    key = await store.create(account, "laptop", tokens_per_day=5)
    await pool.execute(
        "update accounts set tokens_per_minute = 1, tokens_per_day = 2, cost_micros_per_day = 3, cost_micros_per_month = 4"
    )
    principal = await store.verify(key.token)
    assert (principal.budget, principal.account_budget) == (Budget(tokens_per_day=5), Budget(1, 2, 3, 4))
    assert (await store.get(key.id, account)).account_budget == Budget(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("column", "value"),
    [("requests_per_second", "'nan'"), ("requests_per_second", "'infinity'"), ("drain_seconds", "601")]
    + [("cache_ttl", "2592001"), ("cache_ttl", "-1")]
    + [(column, "-1") for column in ("requests_per_second", "burst", "tokens_per_minute", "tokens_per_day")]
    + [(column, "-1") for column in ("cost_micros_per_day", "cost_micros_per_month", "drain_seconds")],
)
async def test_the_database_keeps_no_limit_that_means_nothing(
    store: KeyStore, account: str, pool: asyncpg.Pool, column: str, value: str
) -> None:
    await add_key(store, account)
    with pytest.raises(asyncpg.CheckViolationError):
        await pool.execute(f"update keys set {column} = {value}")


async def test_the_role_is_the_accounts(store: KeyStore, pool: asyncpg.Pool) -> None:
    key = await add_key(store, await add_account(pool, "boss@example.com", "admin"))
    assert (await store.verify(key.token)).role == "admin"


async def test_a_key_that_was_verified_needs_neither_postgres_nor_argon2(
    store: KeyStore, account: str, pool: asyncpg.Pool, argon2: list[str]
) -> None:
    key = await add_key(store, account)
    first = await store.verify(key.token)
    await pool.close()
    assert await store.verify(key.token) is first
    assert argon2 == [key.token]


async def test_argon2_runs_once_however_many_come_with_a_new_key(
    store: KeyStore, account: str, argon2: list[str]
) -> None:
    key = await add_key(store, account)
    found = await asyncio.gather(*(store.verify(key.token) for _ in range(50)))
    assert {principal.key_id for principal in found} == {key.id}
    assert len(argon2) == 1


async def test_the_first_to_come_may_leave_without_taking_the_others_along(
    store: KeyStore, account: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    argon2: list[str] = []

    def slow(hasher: Any, phc: str, token: str) -> bool:
        argon2.append(token)
        time.sleep(HOT_ACQUIRE_TIMEOUT + HOT_COMMAND_TIMEOUT + 0.1)  # the second has its row by then
        return matches(hasher, phc, token)

    monkeypatch.setattr("gateway.stores.keys.matches", slow)
    key = await add_key(store, account)
    first = asyncio.create_task(store.verify(key.token))
    async with asyncio.timeout(5):
        while not argon2:
            await asyncio.sleep(0.001)
    second = asyncio.create_task(store.verify(key.token))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).key_id == key.id
    assert len(argon2) == 1


async def test_after_its_minute_a_key_is_read_again_without_argon2(
    store: KeyStore, account: str, pool: asyncpg.Pool, clock: Clock, argon2: list[str]
) -> None:
    key = await add_key(store, account)
    await store.verify(key.token)
    await pool.execute("update keys set requests_per_minute = 7")
    clock.now += 59.9
    assert (await store.verify(key.token)).requests_per_minute == 60
    clock.now += 0.1
    assert (await store.verify(key.token)).requests_per_minute == 7
    assert len(argon2) == 1


async def test_while_one_request_reads_a_key_in_use_again_the_others_do_not_wait(
    store: KeyStore, account: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await add_key(store, account)
    await store.verify(key.token)
    silent = asyncio.Event()
    read = key_rows.read_proofs

    async def slow(pool: asyncpg.Pool, key_ids: Sequence[str]) -> dict[str, Proofs]:
        await silent.wait()
        return await read(pool, key_ids)

    monkeypatch.setattr(key_rows, "read_proofs", slow)
    clock.now += 60.5
    asking = asyncio.create_task(store.verify(key.token))
    await asyncio.sleep(0)
    async with asyncio.timeout(1):
        for _ in range(20):
            await store.verify(key.token)
    assert not asking.done()
    silent.set()
    assert (await asking).key_id == key.id


async def test_a_key_that_rested_is_served_to_nobody_before_its_row_was_read(
    store: KeyStore, account: str, pool: asyncpg.Pool, clock: Clock
) -> None:
    key = await add_key(store, account)
    await store.verify(key.token)
    await pool.execute("update keys set revoked_at = now()")
    clock.now += 300
    answers = await asyncio.gather(*(store.verify(key.token) for _ in range(5)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unauthenticated] * 5


async def test_the_cache_is_bounded_and_keeps_what_is_used(
    store: KeyStore, account: str, monkeypatch: pytest.MonkeyPatch, argon2: list[str]
) -> None:
    monkeypatch.setattr(keys_module, "MAX_VERIFIED", 2)
    used, rested, new = [await add_key(store, account) for _ in range(3)]
    for key in (used, rested, used, new, used):
        await store.verify(key.token)
    assert len(argon2) == 3
    await store.verify(rested.token)
    assert argon2.count(rested.token) == 2
    assert len(store._verified) == len(store._places) == 2


async def test_a_key_is_digested_once_a_request(store: KeyStore, account: str, monkeypatch: pytest.MonkeyPatch) -> None:
    digested: list[bytes] = []

    def counting(data: bytes) -> Any:
        digested.append(data)
        return hashlib.sha256(data)

    key = await add_key(store, account)
    monkeypatch.setattr(keys_module, "sha256", counting)
    await store.verify(key.token)
    await store.verify(key.token)
    await refusal(store.verify(make_token()))
    assert len(digested) == 3


async def test_a_key_is_trusted_no_longer_than_it_lives(
    store: KeyStore, account: str, clock: Clock, pool: asyncpg.Pool
) -> None:
    """By the database's clock, from the moment it was asked: no process has to have the right time."""
    key = await store.create(account, "laptop", datetime.now(UTC) + timedelta(seconds=30))
    principal = await store.verify(key.token)
    assert principal.expires_at == (await store.get(key.id, account)).expires_at
    clock.now += 15
    assert await store.verify(key.token) is principal
    clock.now += 15
    await pool.close()
    assert isinstance(await refusal(store.verify(key.token)), Unavailable)  # nor is it trusted because Postgres is gone


async def test_an_expired_key_is_refused_without_argon2_and_alive_when_it_is_given_more_time(
    store: KeyStore, account: str, pool: asyncpg.Pool, argon2: list[str]
) -> None:
    key, known = await store.create(account, "laptop"), await store.create(account, "server")
    await store.verify(known.token)
    argon2.clear()
    await pool.execute("update keys set expires_at = now() - interval '1 second'")
    store._distrust_all()
    wrong = await refusal(store.verify(make_token()))
    for token in (key.token, known.token, key.token):
        assert (await refusal(store.verify(token))).object() == wrong.object()
    assert argon2 == []
    assert sorted(await store.ended([key.id, known.id, "unknown-key1"])) == sorted([key.id, known.id])
    for one in (key, known):
        await store.change(one.id, account, KeyChanges(expires_at=None))
        assert (await store.verify(one.token)).expires_at is None
    assert await store.ended([key.id, known.id]) == []


async def test_of_some_keys_those_are_ended_that_are_revoked(store: KeyStore, account: str) -> None:
    kept, revoked = await add_key(store, account), await add_key(store, account)
    await store.revoke(revoked.id, account)
    assert await store.ended([kept.id, revoked.id]) == [revoked.id]
    assert await store.ended([]) == []


async def test_who_waits_for_a_change_hears_of_the_next_one_or_has_waited(store: KeyStore, account: str) -> None:
    key = await add_key(store, account)
    waiting = asyncio.create_task(store.wait_for_change(60))
    await asyncio.sleep(0)
    await store.revoke(key.id, account)
    await asyncio.wait_for(waiting, 10)
    started = time.monotonic()
    await store.wait_for_change(0.05)
    assert time.monotonic() - started > 0.04


async def test_a_cached_key_costs_a_few_microseconds(store: KeyStore, account: str) -> None:
    key = await add_key(store, account)
    await store.verify(key.token)
    started = time.process_time()
    for _ in range(2000):
        await store.verify(key.token)
    assert (time.process_time() - started) / 2000 < 50e-6


# --- a wrong key --------------------------------------------------------------------------------------------------


async def test_every_wrong_key_gets_the_same_answer_and_no_argon2(
    store: KeyStore, account: str, argon2: list[str]
) -> None:
    key, revoked = await add_key(store, account), await add_key(store, account)
    await store.revoke(revoked.id, account)
    wrong = [
        "",
        "aig_",
        "sk-something",
        "é" * len(key.token),
        "\udcff" * len(key.token),
        key.token[:-1] + ("a" if key.token[-1] != "a" else "b"),
        other_secret(key.token),
        make_token(),
        revoked.token,
    ]
    answers = {(error.http_status, error.message) for error in [await refusal(store.verify(token)) for token in wrong]}
    assert len(answers) == 1
    assert answers.pop()[0] == 401
    assert argon2 == []


async def test_an_unknown_id_is_compared_like_a_known_one(
    store: KeyStore, account: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await add_key(store, account)
    compared: list[tuple[int, int]] = []
    compare: Callable[[bytes, bytes], bool] = hmac.compare_digest

    def watching(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", watching)
    await refusal(store.verify(other_secret(key.token)))
    await refusal(store.verify(make_token()))
    assert compared == [(32, 32), (32, 32)]


async def test_a_key_with_a_typing_error_needs_no_look_up(store: KeyStore, pool: asyncpg.Pool) -> None:
    await pool.close()
    token = make_token()
    assert isinstance(await refusal(store.verify(token.swapcase())), Unauthenticated)
    assert isinstance(await refusal(store.verify(token)), Unavailable)


async def test_a_wrong_key_is_looked_up_once_in_half_a_minute(
    store: KeyStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, token = count_reads(monkeypatch), make_token()
    for _ in range(3):
        await refusal(store.verify(token))
    clock.now += 29.9
    await refusal(store.verify(token))
    assert len(reads) == 1
    clock.now += 0.1
    await refusal(store.verify(token))
    assert len(reads) == 2


async def test_what_is_remembered_of_wrong_keys_is_bounded(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "MAX_REFUSED", 5)
    for _ in range(20):
        await refusal(store.verify(make_token()))
    assert len(store._refused) == 5


async def test_a_key_whose_argon2_hash_is_another_is_refused(store: KeyStore, account: str, pool: asyncpg.Pool) -> None:
    """The digest alone does not open the door: whoever can write rows needs more than the pepper."""
    mine, other = await add_key(store, account), await add_key(store, account)
    await pool.execute("update keys set hash = (select hash from keys where id = $2) where id = $1", mine.id, other.id)
    assert isinstance(await refusal(store.verify(mine.token)), Unauthenticated)


async def test_a_key_under_another_pepper_is_refused(pool: asyncpg.Pool, store: KeyStore, account: str) -> None:
    key = await add_key(store, account)
    other = make_store(pool, time.monotonic, pepper=b"other")
    assert isinstance(await refusal(other.verify(key.token)), Unauthenticated)


async def test_bad_keys_in_a_crowd_do_not_slow_a_good_one(pool: asyncpg.Pool, account: str, argon2: list[str]) -> None:
    store = make_store(pool, time.monotonic)
    good = await add_key(store, account)
    await store.verify(good.token)
    argon2.clear()
    crowd = asyncio.gather(*(try_wrong_keys(store, good.token) for _ in range(120)))
    waits = []
    while not crowd.done():
        started = on_a_core()
        await store.verify(good.token)
        await asyncio.sleep(0.001)
        waits.append(on_a_core() - started)
    assert await crowd == [10] * 120
    assert argon2 == []
    assert statistics.quantiles(waits, n=20)[-1] < 0.25


async def test_bad_keys_in_a_crowd_do_not_lock_a_new_good_one_out(pool: asyncpg.Pool, account: str) -> None:
    store = make_store(pool, time.monotonic)
    good = await add_key(store, account)
    crowd = asyncio.gather(*(try_wrong_keys(store, good.token) for _ in range(120)))
    await asyncio.sleep(0)
    started = time.monotonic()
    assert (await store.verify(good.token)).key_id == good.id
    assert time.monotonic() - started < 1
    await crowd


async def test_keys_that_are_asked_for_together_are_read_together(
    store: KeyStore, account: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = await add_key(store, account)
    batches: list[int] = []
    read = key_rows.read_proofs

    async def watching(pool: asyncpg.Pool, key_ids: Sequence[str]) -> dict[str, Proofs]:
        batches.append(len(key_ids))
        return await read(pool, key_ids)

    monkeypatch.setattr(key_rows, "read_proofs", watching)
    first = asyncio.create_task(store.verify(good.token))
    wrong = [asyncio.create_task(store.verify(make_token())) for _ in range(50)]
    await asyncio.sleep(0)
    wrong[0].cancel()
    answers = await asyncio.gather(first, *wrong, return_exceptions=True)
    assert [type(answer) for answer in answers] == [Principal, asyncio.CancelledError] + [Unauthenticated] * 49
    assert len(batches) <= 2


async def try_wrong_keys(store: KeyStore, token: str) -> int:
    """Ten wrong keys one after the other, half of them with an id that exists."""
    for number in range(10):
        wrong = other_secret(token) if number % 2 else make_token()
        assert isinstance(await refusal(store.verify(wrong)), Unauthenticated)
    return 10


# --- Postgres is gone ---------------------------------------------------------------------------------------------


async def test_a_known_key_is_served_for_a_quarter_of_an_hour_without_postgres(
    store: KeyStore, account: str, pool: asyncpg.Pool, clock: Clock
) -> None:
    key = await add_key(store, account)
    await store.verify(key.token)
    await pool.close()
    clock.now += 899.9
    assert (await store.verify(key.token)).key_id == key.id
    clock.now += 0.1
    error = await refusal(store.verify(key.token))
    assert (error.http_status, error.error_code, error.retry_after) == (503, "auth_unavailable", 1)


async def test_an_unknown_key_is_503_without_postgres_and_never_401(store: KeyStore, pool: asyncpg.Pool) -> None:
    await pool.close()
    error = await refusal(store.verify(make_token()))
    assert (error.http_status, error.error_code, error.retry_after) == (503, "auth_unavailable", 1)


async def test_a_look_up_that_failed_is_told_once_however_many_wait_for_it(
    pool: asyncpg.Pool, account: str, clock: Clock
) -> None:
    errors: list[str] = []
    store = make_store(pool, clock, on_error=lambda: errors.append("postgres"))
    key = await add_key(store, account)
    await store.verify(key.token)
    await refusal(store.verify(make_token()))
    assert errors == []
    await pool.close()
    answers = await asyncio.gather(*(store.verify(make_token()) for _ in range(20)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {Unavailable}
    assert len(errors) == 1
    clock.now += 60
    await store.verify(key.token)  # of a known key, and nobody is refused
    assert len(errors) == 2


async def test_it_is_not_remembered_as_wrong_what_could_not_be_checked(
    pool: asyncpg.Pool, account: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(pool, clock)
    key = await add_key(store, account)
    with monkeypatch.context() as outage:
        break_reads(outage)
        await refusal(store.verify(key.token))
    assert (await store.verify(key.token)).key_id == key.id


@pytest.mark.parametrize("rested", [60, 600])
async def test_a_silent_postgres_is_asked_once_a_second_for_a_key(
    store: KeyStore, account: str, clock: Clock, monkeypatch: pytest.MonkeyPatch, rested: float
) -> None:
    key = await add_key(store, account)
    await store.verify(key.token)
    reads = break_reads(monkeypatch)
    clock.now += rested
    for _ in range(30):
        await store.verify(key.token)
        clock.now += 0.1
    assert len(reads) == 3


async def test_of_many_keys_one_a_second_waits_for_a_silent_postgres(
    store: KeyStore, account: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [await add_key(store, account) for _ in range(5)]
    for key in keys:
        await store.verify(key.token)
    reads = break_reads(monkeypatch)
    clock.now += 60
    for _ in range(3):
        for key in keys:
            await store.verify(key.token)
        clock.now += 1
    assert len(reads) == 3


async def test_a_key_is_trusted_anew_when_postgres_is_back(
    store: KeyStore, account: str, pool: asyncpg.Pool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await add_key(store, account)
    await store.verify(key.token)
    clock.now += 60
    with monkeypatch.context() as outage:
        break_reads(outage)
        await store.verify(key.token)
    await pool.execute("update keys set requests_per_minute = 7")
    clock.now += 1
    assert (await store.verify(key.token)).requests_per_minute == 7


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the rows that are read from now on."""
    reads: list[str] = []
    read = key_rows.read_proofs

    async def counting(pool: asyncpg.Pool, key_ids: Sequence[str]) -> dict[str, Proofs]:
        reads.extend(key_ids)
        return await read(pool, key_ids)

    monkeypatch.setattr(key_rows, "read_proofs", counting)
    return reads


def break_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Postgres is gone from now on; the ids of the rows that it was asked for."""
    reads: list[str] = []

    async def failing(pool: asyncpg.Pool, key_ids: Sequence[str]) -> dict[str, Proofs]:
        reads.extend(key_ids)
        raise Unavailable("the database cannot be reached")

    monkeypatch.setattr(key_rows, "read_proofs", failing)
    return reads


# --- revoked and changed ------------------------------------------------------------------------------------------


async def test_a_revoked_key_is_dead_at_once_in_its_own_process(store: KeyStore, account: str) -> None:
    key = await add_key(store, account)
    await store.verify(key.token)
    await store.revoke(key.id, account)
    assert isinstance(await refusal(store.verify(key.token)), Unauthenticated)


async def test_revoking_once_more_is_no_error_and_keeps_the_first_date(store: KeyStore, account: str) -> None:
    key = await add_key(store, account)
    await store.revoke(key.id, account)
    first = (await store.get(key.id, account)).revoked_at
    await store.revoke(key.id, None)
    assert first is not None
    assert (await store.get(key.id, account)).revoked_at == first


async def test_a_revoked_key_is_dead_within_a_second_in_every_process(
    pool: asyncpg.Pool, redis: Redis, account: str
) -> None:
    one, other = make_store(pool, time.monotonic, redis), make_store(pool, time.monotonic, redis)
    key = await add_key(one, account)
    async with listening(other):
        await other.verify(key.token)
        await one.revoke(key.id, account)
        assert await until_refused(other, key.token) < 1


async def test_new_limits_reach_every_process_without_argon2(
    pool: asyncpg.Pool, redis: Redis, account: str, argon2: list[str]
) -> None:
    one, other = make_store(pool, time.monotonic, redis), make_store(pool, time.monotonic, redis)
    key = await add_key(one, account)
    async with listening(other):
        await other.verify(key.token)
        await one.change(key.id, account, KeyChanges(requests_per_minute=7, allowed_models=["gpt-*"]))
        async with asyncio.timeout(1):
            while (await other.verify(key.token)).requests_per_minute != 7:
                await asyncio.sleep(0.005)
    assert (await other.verify(key.token)).allowed_models == ("gpt-*",)
    assert argon2 == [key.token]


async def test_a_change_of_an_account_reaches_all_its_keys_in_every_process_and_no_others(
    pool: asyncpg.Pool, redis: Redis, account: str
) -> None:
    one, other = make_store(pool, time.monotonic, redis), make_store(pool, time.monotonic, redis)
    mine = [await add_key(one, account) for _ in range(3)]
    foreign = await add_key(one, await add_account(pool, "other@example.com"))
    for key in (*mine, foreign):
        await one.verify(key.token)
        await other.verify(key.token)
    async with listening(other):
        known = await other.verify(foreign.token)
        await pool.execute("update accounts set cost_micros_per_day = 7")
        await one.announce_account(account)
        async with asyncio.timeout(1):
            while {(await other.verify(key.token)).account_budget.cost_per_day for key in mine} != {7}:
                await asyncio.sleep(0.005)
        assert [(await one.verify(key.token)).account_budget.cost_per_day for key in mine] == [7, 7, 7]
        assert await other.verify(foreign.token) is known
        assert (await one.verify(foreign.token)).account_budget == NO_BUDGET


async def test_an_account_without_a_key_has_nothing_to_announce(pool: asyncpg.Pool, redis: Redis, account: str) -> None:
    async with redis.pubsub() as channel:
        await channel.subscribe(keys_module.CHANNEL)
        assert (await channel.get_message(timeout=5))["type"] == "subscribe"
        await make_store(pool, time.monotonic, redis).announce_account(account)
        assert await channel.get_message(timeout=0.2) is None


async def test_a_change_that_was_missed_is_seen_when_the_channel_is_back(
    pool: asyncpg.Pool, redis: Redis, account: str
) -> None:
    store = make_store(pool, time.monotonic, redis)
    key = await add_key(store, account)
    async with listening(store):
        await store.verify(key.token)
        await pool.execute("update keys set revoked_at = now()")  # by a process that could not say so
        await redis.client_kill_filter(_type="pubsub")
        assert await until_refused(store, key.token) < 1


async def test_the_channel_survives_silence(
    pool: asyncpg.Pool, redis: Redis, account: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "PING_SECONDS", 0.02)
    store = make_store(pool, time.monotonic, redis)
    key = await add_key(store, account)
    async with listening(store):
        opened = await channel_id(redis)
        async with asyncio.timeout(5):
            while await pings(redis) < 3:
                await asyncio.sleep(0.01)
        assert await channel_id(redis) == opened
        await store.verify(key.token)
        await redis.publish(keys_module.CHANNEL, key.id)
        async with asyncio.timeout(1):
            while store._verified[place_of(key)].stale_until:
                await asyncio.sleep(0.005)


async def test_a_redis_that_does_not_answer_is_left_and_found_again(
    pool: asyncpg.Pool, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "PING_SECONDS", 0.05)
    store = make_store(pool, time.monotonic, redis)
    async with listening(store):
        opened = await channel_id(redis)
        await redis.client_pause(300)
        async with asyncio.timeout(5):
            while await channel_id(redis) in ("", opened):
                await asyncio.sleep(0.01)


async def test_a_change_is_made_also_when_redis_is_gone(pool: asyncpg.Pool, account: str) -> None:
    redis = Redis(port=1, retry=Retry(NoBackoff(), 0))
    store = make_store(pool, time.monotonic, redis)
    key = await add_key(store, account)
    await store.verify(key.token)
    await store.revoke(key.id, account)
    assert isinstance(await refusal(store.verify(key.token)), Unauthenticated)
    await redis.aclose()


async def test_without_redis_there_is_nothing_to_listen_to(store: KeyStore) -> None:
    async with asyncio.timeout(1):
        await store.listen()


async def test_a_row_read_before_a_change_was_heard_of_is_not_trusted_after_it(
    store: KeyStore, account: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was revoked between the read of its row and the end of Argon2."""
    key = await add_key(store, account)
    prove = store._prove

    async def revoked_meanwhile(place: bytes, phc: str, token: str) -> bool:
        await store.revoke(key.id, account)
        return await prove(place, phc, token)

    with monkeypatch.context() as slow:
        slow.setattr(store, "_prove", revoked_meanwhile)
        await store.verify(key.token)
    assert isinstance(await refusal(store.verify(key.token)), Unauthenticated)


async def test_a_key_that_may_have_been_revoked_is_not_served_without_postgres(
    store: KeyStore, account: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await add_key(store, account)
    await store.verify(key.token)
    store._forget(key.id)
    break_reads(monkeypatch)
    assert isinstance(await refusal(store.verify(key.token)), Unavailable)


async def test_what_a_client_asked_for_before_it_left_holds(
    store: KeyStore, account: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request is cancelled just after the commit."""

    def leave_after(name: str) -> None:
        work = getattr(key_rows, name)

        async def left(*arguments: Any) -> None:
            await work(*arguments)
            raise asyncio.CancelledError

        monkeypatch.setattr(key_rows, name, left)

    leave_after("update_key")
    leave_after("revoke_key")
    key = await add_key(store, account)
    await store.verify(key.token)
    with pytest.raises(asyncio.CancelledError):
        await store.change(key.id, account, KeyChanges(requests_per_minute=7))
    assert (await store.verify(key.token)).requests_per_minute == 7
    with pytest.raises(asyncio.CancelledError):
        await store.revoke(key.id, account)
    assert isinstance(await refusal(store.verify(key.token)), Unauthenticated)


@asynccontextmanager
async def listening(store: KeyStore) -> AsyncIterator[None]:
    heard = store._changes
    task = asyncio.create_task(store.listen())
    async with asyncio.timeout(5):
        while store._changes == heard:
            await asyncio.sleep(0.005)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_refused(store: KeyStore, token: str) -> float:
    """Seconds until the key was refused."""
    started = time.monotonic()
    while time.monotonic() - started < 5:
        try:
            await store.verify(token)
        except Unauthenticated:
            return time.monotonic() - started
        await asyncio.sleep(0.002)
    raise AssertionError("still served after five seconds")


async def channel_id(redis: Redis) -> str:
    """Redis's number of the connection that listens; empty when there is none."""
    return "".join(client["id"] for client in await redis.client_list(_type="pubsub"))


async def pings(redis: Redis) -> int:
    return int((await redis.info("commandstats")).get("cmdstat_ping", {}).get("calls", 0))


def place_of(key: NewKey) -> bytes:
    return hashlib.sha256(key.token.encode()).digest()


# --- rows ---------------------------------------------------------------------------------------------------------


async def test_nothing_of_a_key_but_its_id_is_in_the_database(
    store: KeyStore, account: str, pool: asyncpg.Pool
) -> None:
    key = await add_key(store, account)
    parsed = parse_token(key.token)
    assert parsed is not None
    [row] = await pool.fetch("select * from keys")
    stored = b" ".join(value if isinstance(value, bytes) else str(value).encode() for value in row.values())
    plain_digests = [hashlib.sha256(part.encode()).digest() for part in (key.token, parsed.secret)]
    for secret in (parsed.secret.encode(), *plain_digests, *(digest.hex().encode() for digest in plain_digests)):
        assert secret not in stored
    assert row["hash"].startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert parsed.secret not in repr(key)


async def test_keys_are_listed_for_their_owner_and_all_for_an_admin(
    store: KeyStore, account: str, pool: asyncpg.Pool
) -> None:
    mine = [(await add_key(store, account, name)).id for name in ("old", "new")]
    other = (await add_key(store, await add_account(pool, "other@example.com"))).id
    assert [key.id for key in await store.list(account)] == mine[::-1]
    assert {key.id for key in await store.list(None)} == {*mine, other}


async def test_a_listed_key_says_all_but_its_secret(store: KeyStore, account: str) -> None:
    new = await add_key(store, account)
    [key] = await store.list(account)
    assert (key.id, key.prefix, key.name, key.email) == (new.id, f"aig_{new.id}", "laptop", "owner@example.com")
    assert key.limits == {**NO_LIMITS, "requests_per_minute": 60, "concurrent_requests": 20}
    assert key.revoked_at is None


async def test_only_what_is_given_is_changed(store: KeyStore, account: str) -> None:
    key = await store.create(account, "old", **LIMITS)
    changed = await store.change(key.id, account, KeyChanges(name="new"))
    assert (changed.name, changed.limits) == ("new", LIMITS)
    for name, value in OTHER_LIMITS.items():
        before = (await store.get(key.id, account)).limits
        changed = await store.change(key.id, account, cast(KeyChanges, {name: value}))
        assert changed.limits == {**before, name: value}
    assert (changed.name, changed.limits) == ("new", OTHER_LIMITS)
    lifted = await store.change(key.id, account, cast(KeyChanges, NO_LIMITS))
    assert lifted.limits == NO_LIMITS


async def test_a_foreign_key_does_not_exist(store: KeyStore, account: str, pool: asyncpg.Pool) -> None:
    key, stranger = await add_key(store, account), await add_account(pool, "stranger@example.com")
    for answer in (
        store.get(key.id, stranger),
        store.change(key.id, stranger, KeyChanges(name="mine now")),
        store.revoke(key.id, stranger),
        store.get("000000000000", None),
        store.change("000000000000", None, KeyChanges(name="x")),
        store.revoke("000000000000", None),
    ):
        error = await refusal(answer)
        assert (error.http_status, error.error_code) == (404, "key_not_found")
    assert (await store.verify(key.token)).key_name == "laptop"


async def test_an_account_that_does_not_exist_gets_no_key(store: KeyStore) -> None:
    assert isinstance(await refusal(add_key(store, new_id())), NotFound)


async def test_changes_are_503_without_postgres(store: KeyStore, account: str, pool: asyncpg.Pool) -> None:
    await pool.close()
    for answer in (store.list(account), store.revoke("000000000000", None), add_key(store, account)):
        assert (await refusal(answer)).error_code == "database_unavailable"


# --- the pepper ---------------------------------------------------------------------------------------------------


async def test_a_given_pepper_is_used_and_not_stored(pool: asyncpg.Pool) -> None:
    assert await load_pepper(pool, "from a vault") == b"from a vault"
    assert await pool.fetchval("select count(*) from secrets") == 0


async def test_processes_that_start_together_agree_on_one_pepper(pool: asyncpg.Pool) -> None:
    peppers = await asyncio.gather(*(load_pepper(pool, "") for _ in range(8)))
    assert len(set(peppers)) == 1
    assert len(peppers[0]) == 32
    assert await load_pepper(pool, "") == peppers[0]

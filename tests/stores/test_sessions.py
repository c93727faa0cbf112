import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from hashlib import sha256
from typing import cast

import asyncpg
import pytest

from gateway.exchange import new_id
from gateway.protocol.errors import GatewayError, NotFound, Unauthenticated, Unavailable
from gateway.stores import sessions
from gateway.stores.postgres import Pool
from gateway.stores.sessions import MAX_LOOKUPS, MAX_SESSIONS, MAX_SWEPT, SessionStore

pytestmark = pytest.mark.integration

AddAccount = Callable[..., Awaitable[str]]


@pytest.fixture
def store(pool: asyncpg.Pool) -> SessionStore:
    return SessionStore(pool)


@pytest.fixture
async def add_account(pool: asyncpg.Pool) -> AddAccount:
    async def add(name: str, role: str = "member") -> str:
        account_id = new_id()
        insert = "insert into accounts (id, email, password_hash, role) values ($1, $2, 'x', $3)"
        await pool.execute(insert, account_id, f"{name}@example.com", role)
        return account_id

    return add


@pytest.fixture
async def ada(add_account: AddAccount) -> str:
    return await add_account("ada")


async def refusal(answer: Awaitable[object]) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        await answer
    return caught.value


async def alive(store: SessionStore, tokens: list[str]) -> list[str]:
    found = await asyncio.gather(*(store.find(token) for token in tokens), return_exceptions=True)
    return [token for token, session in zip(tokens, found, strict=True) if not isinstance(session, Unauthenticated)]


# --- opened and found ---------------------------------------------------------------------------------------------


async def test_a_token_finds_its_account_for_twelve_hours(store: SessionStore, pool: asyncpg.Pool, ada: str) -> None:
    opened = await store.open(ada)
    now: datetime = await pool.fetchval("select now()")
    assert await store.find(opened.token) == opened.session
    assert (opened.session.account_id, opened.session.email, opened.session.role) == (ada, "ada@example.com", "member")
    assert abs(opened.session.expires_at - now - timedelta(hours=12)) < timedelta(seconds=60)


async def test_the_database_knows_the_digest_of_a_token_and_no_more(
    store: SessionStore, pool: asyncpg.Pool, ada: str
) -> None:
    opened = await store.open(ada)
    row = await pool.fetchrow("select * from sessions")
    assert row is not None
    assert row["digest"] == sha256(opened.token.encode()).digest()
    assert opened.token not in str(row)


async def test_every_token_is_another(store: SessionStore, ada: str) -> None:
    assert len({(await store.open(ada)).token for _ in range(5)}) == 5


async def test_every_wrong_token_is_refused_in_the_same_words(
    store: SessionStore, pool: asyncpg.Pool, ada: str
) -> None:
    good, ended, expired = [(await store.open(ada)).token for _ in range(3)]
    await store.end(ended)
    await pool.execute("update sessions set expires_at = now() where digest = $1", sha256(expired.encode()).digest())
    wrong = ["A" * 43, ended, expired, good[:-1], good + "A", f" {good}", good.swapcase(), "", "\x00" * 43, "é" * 43]
    refusals = [await refusal(store.find(token)) for token in wrong]
    assert {(type(error), error.error_code) for error in refusals} == {(Unauthenticated, "invalid_session")}
    assert len({error.message for error in refusals}) == 1
    assert await alive(store, [good]) == [good]


async def test_what_cannot_be_a_token_is_not_looked_up() -> None:
    nowhere = SessionStore(cast(Pool, None))
    for token in ("", "x" * 42, "x" * 44, "x" * 42 + "=", "x" * 42 + "\n", "x" * 100_000):
        assert isinstance(await refusal(nowhere.find(token)), Unauthenticated)
        await nowhere.end(token)


async def test_a_role_that_changes_is_felt_at_once(store: SessionStore, pool: asyncpg.Pool, ada: str) -> None:
    opened = await store.open(ada)
    await pool.execute("update accounts set role = 'admin'")
    assert (await store.find(opened.token)).role == "admin"


async def test_nobody_signs_in_to_an_account_that_is_gone(store: SessionStore, pool: asyncpg.Pool, ada: str) -> None:
    opened = await store.open(ada)
    await pool.execute("delete from accounts")
    assert isinstance(await refusal(store.find(opened.token)), Unauthenticated)
    assert isinstance(await refusal(store.open(ada)), NotFound)


# --- ended --------------------------------------------------------------------------------------------------------


async def test_a_session_that_is_ended_is_gone_and_no_other_is(store: SessionStore, ada: str) -> None:
    one, other = [(await store.open(ada)).token for _ in range(2)]
    await store.end(one)
    await store.end(one)
    await store.end("A" * 43)
    assert await alive(store, [one, other]) == [other]


async def test_with_one_too_many_an_accounts_oldest_session_ends_and_nobody_elses(
    store: SessionStore, add_account: AddAccount, ada: str
) -> None:
    bens = (await store.open(await add_account("ben"))).token
    tokens = [(await store.open(ada)).token for _ in range(MAX_SESSIONS + 2)]
    assert await alive(store, [bens, *tokens]) == [bens, *tokens[2:]]


async def test_of_many_that_sign_in_at_once_twenty_are_left(store: SessionStore, ada: str) -> None:
    opened = await asyncio.gather(*(store.open(ada) for _ in range(MAX_SESSIONS + 10)))
    assert len(await alive(store, [new.token for new in opened])) == MAX_SESSIONS


async def test_accounts_that_sign_in_at_once_and_sweep_each_others_sessions_never_wait_for_each_other(
    store: SessionStore, pool: asyncpg.Pool, add_account: AddAccount
) -> None:
    accounts = [await add_account(f"user{number}") for number in range(4)]
    for _ in range(5):
        await asyncio.gather(*(store.open(account) for account in accounts for _ in range(5)))
        await pool.execute("update sessions set expires_at = now() where random() < 0.5")
    opened = await asyncio.gather(*(store.open(account) for account in accounts for _ in range(5)))
    assert len(await alive(store, [new.token for new in opened])) == 20


async def test_a_sign_in_sweeps_what_has_expired_a_bounded_number_at_a_time(
    store: SessionStore, pool: asyncpg.Pool, add_account: AddAccount, ada: str
) -> None:
    ben = await add_account("ben")
    insert = """
        insert into sessions
        select sha256(n::text::bytea), $1, now() - interval '13 h', now() - interval '1 h' from generate_series(1, $2) n
    """
    await pool.execute(insert, ben, MAX_SWEPT + 50)
    left = []
    for _ in range(2):
        await store.open(ada)
        left.append(await pool.fetchval("select count(*) from sessions where account_id = $1", ben))
    assert left == [50, 0]


# --- in bad times -------------------------------------------------------------------------------------------------


async def test_without_postgres_nobody_is_told_that_a_token_is_wrong(database_url: str) -> None:
    pool = await asyncpg.create_pool(database_url, min_size=1, max_size=1)
    await pool.close()
    store = SessionStore(pool)
    for asked in (store.find("A" * 43), store.open(new_id()), store.end("A" * 43)):
        assert isinstance(await refusal(asked), Unavailable)


async def test_a_crowd_of_made_up_tokens_leaves_the_pool_to_others(
    store: SessionStore, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "LOOKUP_TIMEOUT", 0.2)
    async with pool.acquire() as other, other.transaction():
        await other.execute("lock table sessions")
        crowd = [asyncio.create_task(store.find(f"{number:A>43}")) for number in range(100)]
        turned_away = crowd[MAX_LOOKUPS:]
        assert await asyncio.wait_for(pool.fetchval("select 1"), 5) == 1
        done, _ = await asyncio.wait(turned_away, timeout=5)
        assert {type(task.exception()) for task in done} == {Unavailable}
        assert len(done) == len(turned_away)

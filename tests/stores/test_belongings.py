"""Whose the files and batches at a provider are."""

from collections.abc import Awaitable, Callable

import asyncpg
import pytest

from gateway.exchange import new_id
from gateway.protocol.errors import Unavailable
from gateway.stores.belongings import Belongings

pytestmark = pytest.mark.integration

AddAccount = Callable[[str], Awaitable[str]]


@pytest.fixture
def store(pool: asyncpg.Pool) -> Belongings:
    return Belongings(pool)


@pytest.fixture
async def add_account(pool: asyncpg.Pool) -> AddAccount:
    async def add(name: str) -> str:
        account_id = new_id()
        insert = "insert into accounts (id, email, password_hash, role) values ($1, $2, 'x', 'member')"
        await pool.execute(insert, account_id, f"{name}@example.com")
        return account_id

    return add


async def test_an_object_is_its_makers_for_good(store: Belongings, add_account: AddAccount) -> None:
    ada, bob = await add_account("ada"), await add_account("bob")
    await store.add("openai", "file", ["file-1", "file-2"], ada)
    await store.add("openai", "file", ["file-2", "file-3"], bob)
    asked = ["file-1", "file-2", "file-3", "file-4"]
    assert await store.owned("openai", "file", asked, ada) == {"file-1", "file-2"}
    assert await store.owned("openai", "file", asked, bob) == {"file-3"}


async def test_the_same_id_is_another_object_at_another_provider_or_of_another_kind(
    store: Belongings, add_account: AddAccount
) -> None:
    ada, bob = await add_account("ada"), await add_account("bob")
    await store.add("openai", "file", ["1"], ada)
    await store.add("openai", "batch", ["1"], bob)
    await store.add("groq", "file", ["1"], bob)
    assert await store.owned("openai", "file", ["1"], bob) == set()
    assert await store.owned("openai", "batch", ["1"], bob) == {"1"}
    assert await store.owned("groq", "file", ["1"], bob) == {"1"}


async def test_what_is_found_is_all_there_is_or_there_are_others(store: Belongings, add_account: AddAccount) -> None:
    ada, bob = await add_account("ada"), await add_account("bob")
    assert not await store.has_others("openai", "file", [], ada)
    await store.add("openai", "file", ["1", "2"], ada)
    await store.add("openai", "file", ["3"], bob)
    for provider, kind, number in (("openai", "batch", "4"), ("groq", "file", "5")):
        await store.add(provider, kind, [number], ada)  # type: ignore[arg-type]
    assert await store.has_others("openai", "file", ["2", "3"], ada)
    assert not await store.has_others("openai", "file", ["2", "1", "9"], ada)
    assert await store.has_others("openai", "file", [], bob)


async def test_what_the_provider_has_no_more_is_forgotten(store: Belongings, add_account: AddAccount) -> None:
    ada = await add_account("ada")
    await store.add("openai", "file", ["file-1", "file-2"], ada)
    await store.forget("openai", "file", "file-1")
    await store.forget("openai", "file", "file-9")
    assert await store.owned("openai", "file", ["file-1", "file-2"], ada) == {"file-2"}


async def test_without_postgres_every_question_is_refused(store: Belongings, pool: asyncpg.Pool) -> None:
    await store.check()
    await pool.close()
    for asked in (
        store.check(),
        store.add("openai", "file", ["1"], new_id()),
        store.owned("openai", "file", ["1"], new_id()),
        store.has_others("openai", "file", ["1"], new_id()),
        store.forget("openai", "file", "1"),
    ):
        with pytest.raises(Unavailable):
            await asked
    assert await store.owned("openai", "file", [], new_id()) == set()


async def test_ten_thousand_of_an_account_are_looked_through_at_once_whatever_the_plan(
    pool: asyncpg.Pool, database_url: str, add_account: AddAccount
) -> None:
    """One for any array takes it for ten ids."""
    ada = await add_account("ada")
    ids = [f"file-{number:05d}" for number in range(10_000)]
    async with asyncpg.create_pool(
        database_url, min_size=1, server_settings={"plan_cache_mode": "force_generic_plan"}
    ) as generic:
        store = Belongings(generic)
        await store.add("openai", "file", ids, ada)
        await pool.execute("analyze belongings")
        assert not await store.has_others("openai", "file", ids, ada)
        assert await store.has_others("openai", "file", ids[1:], ada)

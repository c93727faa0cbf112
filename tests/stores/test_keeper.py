"""Claims of Idempotency-Keys, and look-ups, when Postgres is slow or somebody else was faster."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from time import monotonic
from typing import Any

import aiohttp
import asyncpg
import pytest

from gateway import appkeys
from gateway.protocol.errors import Unavailable
from gateway.stores import answers as store
from gateway.stores import keeper as keeper_module
from gateway.stores.answers import Ended, Kept
from tests.support import asking
from tests.support.asking import MODEL
from tests.support.gateway import Gateway, running_gateway

pytestmark = pytest.mark.integration

FIRST, SECOND = (f"00000000-0000-7000-a000-00000000000{number}" for number in (1, 2))
SLOW_LOOK = (
    "select pg_sleep(0.12), $1::bytea, $2::interval, exchange_id, status, provider, model, marks, body, usage, "
    "0::float8 as age from answers right join (select 1) one on false"
)


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def test_who_lost_a_claim_ends_only_its_own(gateway: Gateway) -> None:
    """Postgres was gone for longer than the lease, and another request has the key now."""
    keeper, digest = gateway.app[appkeys.KEEPER], b"d" * 32
    assert await keeper.answers.claim(digest, gateway.account_id, b"x", FIRST) is None
    keeper.hold(digest, FIRST)
    await gateway.app[appkeys.POOL].execute("update answers set expires_at = now()")
    assert await keeper.answers.claim(digest, gateway.account_id, b"x", SECOND) is None
    keeper.hold(digest, SECOND)
    kept = Kept(FIRST, 200, "p", "m", None, b"{}", None)
    keeper.keep(Ended("idempotency", digest, gateway.account_id, kept, 60, 0, monotonic(), b"x"), "chat")
    await keeper.close(5)
    assert keeper._claims == {digest: SECOND}


async def test_a_claim_whose_answer_came_too_late_does_not_block_its_key(
    gateway: Gateway, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = gateway.app[appkeys.KEEPER].answers
    claim, late = answers.claim, [True]

    async def claimed(*arguments: Any) -> Any:
        given = await claim(*arguments)
        if late and late.pop():
            raise Unavailable("late")
        return given

    monkeypatch.setattr(answers, "claim", claimed)
    headers = {"Idempotency-Key": "a"}
    assert (await asking.begin(gateway, http, MODEL, headers=headers)).status == 503
    began = monotonic()
    assert (await asking.begin(gateway, http, MODEL, headers=headers)).status == 200
    assert monotonic() - began < 10, "the lease is twice as long"


async def test_a_long_sweep_does_not_keep_claims_from_being_renewed(
    gateway: Gateway, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "RENEW", 0.5)
    monkeypatch.setattr(store, "_LEASE", timedelta(seconds=3))
    keeper = gateway.app[appkeys.KEEPER]

    async def sweep() -> bool:
        await asyncio.sleep(5)
        return True

    monkeypatch.setattr(keeper.answers, "sweep", sweep)
    await asyncio.sleep(5.2)  # until the renewals have seen their new interval
    model = "openai/mock-gpt?tokens=60&pace_ms=100"
    response = await asking.begin(gateway, http, model, headers={"Idempotency-Key": "a"})
    keeper._written = 1 << 40  # a sweep is due
    left = "select extract(epoch from expires_at - now())::float8 from answers where status is null"
    least = 99.0
    for _ in range(40):
        least = min(least, await gateway.app[appkeys.POOL].fetchval(left))
        await asyncio.sleep(0.1)
    response.close()
    assert least > 0


async def test_a_sweep_that_is_cancelled_anywhere_leaves_no_lock(gateway: Gateway, pool: asyncpg.Pool) -> None:
    """No connection is told to give up its locks on its way back into the gateway's pool."""
    held = "select count(*) from pg_locks where locktype = 'advisory' and granted"
    held += " and database = (select oid from pg_database where datname = current_database())"
    answers = gateway.app[appkeys.KEEPER].answers
    for turns in range(60):
        sweeping = asyncio.create_task(answers.sweep())
        for _ in range(turns):
            await asyncio.sleep(0)
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)
        async with asyncio.timeout(5):  # the server hears of it by the end of the connection
            while await pool.fetchval(held):
                await asyncio.sleep(0.005)
    assert await answers.sweep()


@pytest.mark.haste
async def test_many_look_ups_in_a_slow_postgres_wait_no_longer_than_one(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = gateway.app[appkeys.KEEPER].answers
    monkeypatch.setattr(store, "_FIND", SLOW_LOOK)

    async def nothing(_: Any) -> None:
        return None

    monkeypatch.setattr(store, "_kept", nothing)

    async def seconds(number: int) -> float:
        began = monotonic()
        with suppress(Unavailable):
            await answers.find(number.to_bytes(4, "big"), 60)
        return monotonic() - began

    assert max(await asyncio.gather(*map(seconds, range(100)))) < 2.0


async def test_another_credential_of_the_callers_own_is_another_request(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    replayed = []
    for credential in ("sk-one", "sk-two", "sk-two"):
        own = {"X-API-Key": gateway.api_key, "Authorization": f"Bearer {credential}", "Idempotency-Key": "a"}
        replayed.append((await asking.ask(gateway, http, headers=own)).replayed)
    assert replayed == [False, False, True]

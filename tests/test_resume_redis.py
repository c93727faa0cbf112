"""Resumable streams and a Redis that is gone, stalls, is full or lost its memory."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from time import monotonic
from typing import Any

import aiohttp
import pytest
from redis.asyncio import Redis

from gateway import resume
from gateway.stores import streams
from tests.support.gateway import Gateway
from tests.support.proxy import Proxy, proxied_redis
from tests.support.resuming import (
    SHORT,
    begin,
    client,
    cut,
    eventually,
    go_on,
    name,
    read,
    refusal,
    rest,
    runs,
    two_nodes,
    until,
)
from tests.support.valkey import Valkey, valkey

pytestmark = pytest.mark.integration

STEADY = "openai/mock-gpt?tokens=200&pace_ms=20"


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with client() as session:
        yield session


@pytest.fixture
def redis_server() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


@pytest.fixture
async def parted(database_url: str, redis_url: str) -> AsyncIterator[tuple[Gateway, Gateway, Proxy]]:
    """Two nodes, the first of which gets to Redis through the proxy."""
    async with proxied_redis(redis_url) as (proxy, url), two_nodes(database_url, url, redis_url) as (one, other):
        yield one, other, proxy


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LEASE", 1000)
    monkeypatch.setattr(streams, "BEAT", 0.2)


async def held(redis: Redis, stream: str) -> int:
    """Bytes of it that there are in Redis."""
    entries: Any = await redis.xrevrange(stream, count=1)
    return int(entries[0][0].partition(b"-")[0])


async def lease_ended(redis: Redis, stream: str) -> None:
    async def ended() -> bool:
        return not await redis.exists(f"{stream}:lease")

    await eventually(ended)


# --- whose maker does not get to Redis ----------------------------------------------------------------------------


@pytest.mark.parametrize("more", [False, True], ids=["had less than Redis", "had more than Redis"])
async def test_a_stream_whose_maker_was_cut_off_from_redis_goes_on_when_it_is_back(
    more: bool, parted: tuple[Gateway, Gateway, Proxy], short_leases: None, redis: Redis, http: aiohttp.ClientSession
) -> None:
    """Its lease has ended by then, and whoever follows it elsewhere has seen that."""
    one, other, proxy = parted
    response = await begin(one, http, STEADY)
    stream, had = response.headers["X-Request-Id"], await read(response, 2000)
    await proxy.cut()
    size = await held(redis, name(one, stream))
    had = had + await read(response, 4000) if more else had[:200]
    assert more == (len(had) > size)
    response.close()
    missed = asyncio.create_task(rest(other, http, stream, len(had)))
    await lease_ended(redis, name(one, stream))
    await asyncio.sleep(0.5)
    await proxy.mend()
    assert had + await missed == await rest(other, http, stream)
    assert (await missed).endswith(b"[DONE]\n\n")


async def test_who_has_more_than_redis_hears_that_the_maker_is_gone_as_soon_as_that_is_sure(
    parted: tuple[Gateway, Gateway, Proxy],
    short_leases: None,
    http: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And not that there never was so much of it."""
    monkeypatch.setattr(resume, "GRACE", 0.5)
    one, other, proxy = parted
    response = await begin(one, http, STEADY)
    had = await read(response, 2000)
    await proxy.cut()
    had += await read(response, 4000)
    assert await refusal(other, http, response.headers["X-Request-Id"], len(had)) == (410, "stream_interrupted")
    response.close()


def test_nobody_is_taken_for_dead_before_it_could_say_that_it_lives() -> None:
    """A maker that cannot get to Redis says so again after a failed round trip, a pause and at the most one beat."""
    assert resume.GRACE >= streams.TIMEOUT + streams.PAUSE + streams.BEAT
    assert resume.CATCH_UP >= streams.LEASE / 1000 + resume.GRACE + streams.TIMEOUT


# --- a Redis that stalls, is full, or has forgotten ---------------------------------------------------------------
async def test_a_redis_that_stalls_in_the_middle_holds_up_nothing_and_gets_it_all_later(
    database_url: str, redis_server: Valkey, http: aiohttp.ClientSession
) -> None:
    async with two_nodes(database_url, redis_server.url) as (one, other):
        model = "openai/mock-gpt?tokens=100&pace_ms=20"
        response = await begin(one, http, model)
        stream, had = response.headers["X-Request-Id"], await read(response, 1000)
        redis_server.signal(signal.SIGSTOP)
        try:
            started = monotonic()
            while more := await response.content.readany():
                assert monotonic() - started < 1.5
                started, had = monotonic(), had + more
            assert had.endswith(b"[DONE]\n\n")
            async with go_on(other, http, stream) as refused:
                assert refused.status == 503
            assert (await begin(one, http, SHORT)).headers["X-Gateway-Resumable"] == "false"
        finally:
            redis_server.signal(signal.SIGCONT)

        async def whole() -> bool:
            async with go_on(other, http, stream, 10) as answer:
                return bool(await answer.read() == had[10:])

        await eventually(whole)


async def test_a_redis_that_is_full_is_read_and_gets_the_rest_when_it_has_room(
    database_url: str, redis_server: Valkey, short_leases: None, http: aiohttp.ClientSession
) -> None:
    """Also when a stream ended meanwhile."""
    async with two_nodes(database_url, redis_server.url) as (one, other), Redis.from_url(redis_server.url) as redis:
        over, _ = await cut(one, http, 100, SHORT)
        whole = await rest(other, http, over)
        stream, had = await cut(one, http, 500, "openai/mock-gpt?tokens=100&pace_ms=20")
        while await held(redis, name(one, stream)) < len(had):
            await asyncio.sleep(0.01)
        await redis.config_set("maxmemory-policy", "noeviction")
        await redis.config_set("maxmemory", 1)
        assert await rest(other, http, over) == whole
        assert (await begin(one, http, SHORT)).headers["X-Gateway-Resumable"] == "false"
        await lease_ended(redis, name(one, stream))
        async with go_on(other, http, stream) as response:
            assert response.status == 200
            seen = await read(response, len(had))
            await until(lambda: not runs(one, stream))
            await redis.config_set("maxmemory", 0)
            seen += await response.read()
        assert seen.startswith(had) and seen.endswith(b"[DONE]\n\n")
        assert seen == await rest(one, http, stream)


async def test_a_redis_that_lost_its_memory_gets_it_anew(
    database_url: str, redis_server: Valkey, http: aiohttp.ClientSession
) -> None:
    async with two_nodes(database_url, redis_server.url) as (one, other):
        stream, had = await cut(one, http, 3000, "openai/mock-gpt?tokens=200&pace_ms=20")
        redis_server.kill()
        redis_server.start()
        joined = asyncio.create_task(rest(one, http, stream, len(had)))

        async def there() -> bool:
            async with go_on(other, http, stream, len(had)) as answer:
                return answer.status == 200 and bool(await answer.read() == await joined)

        await eventually(there)

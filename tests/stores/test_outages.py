"""What processes tell each other of providers, over a real Redis."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from gateway.stores.outages import CHANNEL, MAX_WAITING, Outage, Outages, mark_of
from tests.support.proxy import proxied_redis

pytestmark = pytest.mark.integration

LIMITED = Outage(mark_of("openai", "https://api.openai.com/v1", "sk-secret"), "gpt-4o", "limited", 9.0)


@asynccontextmanager
async def listening(redis: Redis) -> AsyncIterator[tuple[Outages, list[Outage]]]:
    outages, heard = Outages(redis), list[Outage]()
    listens = await subscribed(redis)
    tasks = [asyncio.create_task(outages.send()), asyncio.create_task(outages.listen(heard.append))]
    try:
        await until(lambda: subscribed(redis), listens + 1)
        yield outages, heard
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def subscribed(redis: Redis) -> int:
    return int((await redis.pubsub_numsub(CHANNEL))[0][1])


async def until(look: Callable[[], Any], wanted: object) -> None:
    async with asyncio.timeout(15):
        while await look() != wanted:
            await asyncio.sleep(0.01)


async def count(heard: list[Outage], number: int) -> None:
    async with asyncio.timeout(15):
        while len(heard) < number:
            await asyncio.sleep(0.01)


async def test_what_one_tells_the_others_hear_and_it_does_not(redis: Redis) -> None:
    async with listening(redis) as (one, by_one), listening(redis) as (other, by_other):
        one.tell(LIMITED)
        await count(by_other, 1)
        other.tell(LIMITED)
        await count(by_one, 1)
    assert [(len(heard), heard[0].model, heard[0].seconds) for heard in (by_one, by_other)] == [(1, "gpt-4o", 9.0)] * 2


async def test_what_is_no_message_of_ours_is_not_heard(redis: Redis) -> None:
    wrong = [
        b"", b"[]", b"{}", b"\xff", b"x" * 10_000, b'{"mark":"m","model":"x","cause":"other","seconds":1}',
        b'{"mark":"m","model":"x","cause":"busy","seconds":-1}', b'{"mark":"m","model":"x","cause":"busy","seconds":"1"}',
        b'{"mark":"m","model":"x","cause":"busy","seconds":1,"more":1}',
    ]  # fmt: skip
    async with listening(redis) as (_, heard):
        for message in wrong:
            await redis.publish(CHANNEL, message)
        await redis.publish(CHANNEL, b'{"mark":"m","model":"x","cause":"busy","seconds":1}')
        await count(heard, 1)
    assert heard == [Outage("m", "x", "busy", 1.0)]


async def test_nobody_waits_and_nothing_piles_up_while_redis_is_gone(redis_url: str) -> None:
    async with proxied_redis(redis_url) as (proxy, url), Redis.from_url(url) as broken, Redis.from_url(url) as good:
        async with listening(broken) as (outages, heard):
            await proxy.cut()
            for _ in range(2 * MAX_WAITING):
                outages.tell(LIMITED)
            await proxy.start()
            await until(lambda: subscribed(good), 1)
            async with asyncio.timeout(15):
                while not heard:
                    await good.publish(CHANNEL, b'{"mark":"m","model":"x","cause":"busy","seconds":1}')
                    await asyncio.sleep(0.05)
    assert heard[0].mark == "m"


def test_a_mark_tells_providers_and_credentials_apart_and_shows_neither() -> None:
    given = [("a", "http://x", "sk-1"), ("a", "http://x", "sk-2"), ("a", "http://y", "sk-1"), ("b", "http://x", "sk-1")]
    marks = [mark_of(*one) for one in given]
    assert len(set(marks)) == len(marks)
    assert not any("sk-" in mark for mark in marks)

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

import pytest
from redis.asyncio import Redis

from gateway.stores import script as script_module
from gateway.stores.script import MEETING, TIMEOUT, Operation, RedisScript, connect_redis
from tests.support.proxy import proxied_redis

pytestmark = pytest.mark.integration


class Told(Operation):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.answer: str | None = None

    def line(self) -> str:
        return "probe -"

    def answered(self, answer: str) -> None:
        self.answer = answer


@asynccontextmanager
async def script(url: str) -> AsyncIterator[RedisScript]:
    failures: list[str] = []
    async with connect_redis(url) as client:
        script = RedisScript(client, on_error=failures.append)
        try:
            yield script
            assert not failures, failures
        finally:
            await script.close()


async def asked(script: RedisScript, *operations: Told) -> list[str | None]:
    for operation in operations:
        script.send(operation)
    await script.heard()
    return [operation.answer for operation in operations]


async def test_an_epoch_lasts_as_long_as_the_memory(redis_url: str, redis: Redis) -> None:
    async with script(redis_url) as one, script(redis_url) as other:
        beats: list[int] = []
        one.beats.append(lambda: beats.append(one.epoch))
        await asked(one, Told())
        await asked(other, Told())
        first = one.epoch
        assert first > 0 and first == other.epoch and not beats
        await redis.flushdb()
        await asked(other, Told())
        assert other.epoch > first
        await asked(one, Told())
        assert [other.epoch] == [one.epoch] == beats  # it is time to say what runs


async def test_another_run_of_the_server_begins_a_new_epoch_and_a_new_script_does_not(
    redis_url: str, redis: Redis
) -> None:
    async with script(redis_url) as one:
        await redis.script_flush()
        await asked(one, Told())
        first = one.epoch
        await redis.script_flush()  # as after a release with another script
        await asked(one, Told())
        assert one.epoch == first
        await redis.set("aig:server", "the run that wrote this memory")  # as after a fail-over or a restart
        await redis.script_flush()
        await asked(one, Told())
        assert one.epoch > first
        second = one.epoch
        await asked(one, Told())
        assert one.epoch == second


async def test_what_nobody_wants_any_more_is_not_sent(redis_url: str) -> None:
    class Unwanted(Told):
        def wanted(self) -> bool:
            return False

    async with script(redis_url) as one:
        assert await asked(one, Unwanted(), Told()) == [None, ""]


async def test_a_bug_in_one_operation_does_not_end_the_others(redis_url: str) -> None:
    class Broken(Told):
        def answered(self, answer: str) -> None:
            raise ZeroDivisionError

    async with script(redis_url) as one:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        assert await asked(one, Told(), Broken()) == ["", None]
        assert await asked(one, Told()) == [""]


async def test_renewals_do_not_hold_up_what_is_asked_meanwhile(redis_url: str) -> None:
    async with script(redis_url) as one:
        await asked(one, Told())
        renewals = [Told() for _ in range(5 * script_module.MAX_RENEWALS)]
        for renewal in renewals:
            one.send_later(renewal)
        question = Told()
        one.send(question)
        while question.answer is None:
            await asyncio.sleep(0)
        assert sum(renewal.answer is not None for renewal in renewals) == script_module.MAX_RENEWALS
        await one.heard()
        assert all(renewal.answer is not None for renewal in renewals)


@pytest.mark.haste
async def test_a_start_waits_longer_for_redis_than_a_request_does(redis_url: str) -> None:
    async with proxied_redis(redis_url) as (proxy, url), connect_redis(url) as client:
        script = RedisScript(client)
        proxy.delay = 0.6 * TIMEOUT  # each way
        await script.meet()
        assert not script.gone and script.epoch
        told = Told()
        assert await asked(script, told) == [None]
        assert script.gone
        await script.close()


async def test_a_start_does_not_wait_for_a_redis_that_says_nothing_or_is_not_there(redis_url: str) -> None:
    async with proxied_redis(redis_url) as (proxy, url), connect_redis(url) as client:
        proxy.stall()
        for most in (MEETING + 0.5, 0.5):
            script, began = RedisScript(client), monotonic()
            await script.meet()
            assert script.gone
            assert monotonic() - began < most
            await script.close()
            await proxy.cut()


async def test_connections_with_tls_share_one_context_and_check_certificates() -> None:
    """Made anew for each, it costs the event loop 40 ms."""
    async with connect_redis("rediss://:token@redis.example:6379/0") as client:
        [context] = {context_of(client) for _ in range(3)}
        assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
    async with connect_redis("rediss://redis.example:6379/0?ssl_cert_reqs=none") as client:
        assert context_of(client).verify_mode == ssl.CERT_NONE


def context_of(client: Redis) -> ssl.SSLContext:
    """Of a new connection."""
    context: ssl.SSLContext = client.connection_pool.make_connection().ssl_context.get()  # type: ignore[no-untyped-call]
    return context

"""What Redis, Postgres and the disk can do to a gateway, and what its clients notice of it."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any, NamedTuple

import aiohttp
import asyncpg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from gateway import appkeys
from gateway.labels import DEPENDENCY_ERROR_KINDS
from gateway.stores import journal, postgres, script_connection
from tests.prove.ledger import LEDGER
from tests.prove.postgres import running_postgres
from tests.support.gateway import MODELS, Gateway, chat_body, running_gateway
from tests.support.proxy import Proxy, proxied_postgres, proxied_redis
from tests.support.valkey import Valkey, valkey

pytestmark = [pytest.mark.integration, pytest.mark.haste]

BREAKER = 5.0  # seconds after which a Redis that is back is used again (P12)
SLACK = 2.0  # seconds more, on a machine that has much else to do
LONG_STREAM = chat_body("openai/mock-gpt?pace_ms=40&tokens=120", stream=True)


class Answer(NamedTuple):
    status: int
    seconds: float
    code: str  # of its error
    retry_after: str


class Faulty(NamedTuple):
    gateway: Gateway
    postgres: Proxy
    redis: Proxy
    client: aiohttp.ClientSession

    async def ask(self, key: str = "", model: str = MODELS["openai"], **more: Any) -> Answer:
        headers = {"Authorization": f"Bearer {key or self.gateway.api_key}"}
        started = monotonic()
        url = f"{self.gateway.base_url}/chat/completions"
        async with self.client.post(url, json=chat_body(model, **more), headers=headers) as response:
            body = await response.json()
            code = body.get("error", {}).get("code", "")
            return Answer(response.status, monotonic() - started, code, response.headers.get("Retry-After", ""))

    def counted(self, name: str, **labels: str) -> float:
        page = self.gateway.app[appkeys.METRICS].render().decode()
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    async def redis_is_used(self) -> float:
        """Seconds until it is again."""
        return await until(lambda: self.gateway.app[appkeys.LIMITER].state == "redis", BREAKER + SLACK)


async def until(claim: Callable[[], object], seconds: float) -> float:
    """How long it took to become true."""
    started = monotonic()
    while not claim():
        assert monotonic() - started < seconds, f"not within {seconds} s"
        await asyncio.sleep(0.005)
    return monotonic() - started


async def command(redis: Any, words: str) -> Any:
    """For what redis-py types loosely, or not at all."""
    return await redis.execute_command(*words.split())


@asynccontextmanager
async def behind_proxies(database_url: str, redis_url: str, **environ: str) -> AsyncIterator[Faulty]:
    async with (
        proxied_postgres(database_url) as (postgres, postgres_url),
        proxied_redis(redis_url) as (redis, proxied_redis_url),
        running_gateway(postgres_url, proxied_redis_url, environ) as gateway,
        aiohttp.ClientSession() as client,
    ):
        yield Faulty(gateway, postgres, redis, client)
        await postgres.mend()  # what the gateway still has to write needs its stores
        await redis.mend()


@pytest.fixture
async def faulty(database_url: str, redis_url: str) -> AsyncIterator[Faulty]:
    async with behind_proxies(database_url, redis_url, GATEWAY_KEY_CACHE="0.2") as faulty:
        yield faulty


@pytest.fixture
def server() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


# --- Redis --------------------------------------------------------------------------------------------------------

REFUSALS = {
    "readonly": b"-READONLY You can't write against a read only replica.\r\n",
    "oom": b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
    "loading": b"-LOADING Redis is loading the dataset in memory\r\n",
    "misconf": b"-MISCONF Redis is configured to save RDB snapshots, but it is unable to persist to disk.\r\n",
    "moved": b"-MOVED 3999 127.0.0.1:6381\r\n",
    "error": b"-ERR unknown command\r\n",
}


@pytest.mark.parametrize("kind", REFUSALS)
async def test_a_redis_that_refuses_is_a_redis_that_is_gone_until_it_does_not(
    faulty: Faulty, figure: Callable[[str], None], kind: str
) -> None:
    key = await faulty.gateway.new_key(requests_per_minute=5, concurrent_requests=5)
    assert (await faulty.ask(key)).status == 200
    faulty.redis.answer, faulty.redis.answered = REFUSALS[kind], b"EVAL"
    answers = [await faulty.ask(key) for _ in range(6)]
    assert [answer.status for answer in answers] == [200] * 4 + [429] * 2
    assert faulty.counted("gateway_dependency_errors_total", dependency="redis", kind=kind) >= 1
    assert faulty.counted("gateway_fail_mode_total", what="limits", mode="local") >= 4
    await faulty.redis.mend()
    figure(f"P12 Redis that answered {kind.upper()}: used again after {await faulty.redis_is_used():.1f} s")
    assert (await faulty.ask(key)).status == 429, "what passed meanwhile counts"


@pytest.mark.parametrize("how", ["cut", "half_close", "garbage"])
async def test_a_connection_that_redis_ends_costs_no_request(faulty: Faulty, how: str) -> None:
    key = await faulty.gateway.new_key(requests_per_minute=100)
    assert (await faulty.ask(key)).status == 200
    if how == "cut":
        await faulty.redis.cut()
        await faulty.redis.start()
    elif how == "half_close":
        faulty.redis.half_close()
    else:
        faulty.redis.answer, faulty.redis.answered = b"HTTP/1.1 400 Bad Request\r\n\r\n", b"EVAL"
    answers = [await faulty.ask(key) for _ in range(5)]
    assert [answer.status for answer in answers] == [200] * 5
    await faulty.redis.mend()
    await faulty.redis_is_used()


async def test_a_slow_redis_is_waited_for_and_one_that_is_too_slow_is_not(faulty: Faulty) -> None:
    key = await faulty.gateway.new_key(requests_per_minute=100)
    assert (await faulty.ask(key)).status == 200
    faulty.redis.delay = 0.02  # each way
    slow = await faulty.ask(key)
    assert slow.status == 200 and slow.seconds >= 0.04
    assert faulty.gateway.app[appkeys.LIMITER].state == "redis"
    faulty.redis.delay = 0.5
    assert (await faulty.ask(key)).status == 200
    assert faulty.gateway.app[appkeys.LIMITER].state == "local"
    assert faulty.counted("gateway_dependency_errors_total", dependency="redis", kind="timeout") >= 1
    await faulty.redis.mend()
    await faulty.redis_is_used()


@pytest.mark.parametrize("copy", ["none", "redis"])
async def test_a_stalled_redis_is_felt_once_and_for_a_tenth_of_a_second(
    database_url: str, redis_url: str, figure: Callable[[str], None], copy: str
) -> None:
    """Also where a request asks it for its limits, its budget, and a second copy of its usage."""
    async with behind_proxies(database_url, redis_url, GATEWAY_USAGE_COPY=copy) as faulty:
        key = await faulty.gateway.new_key(requests_per_minute=1000, concurrent_requests=9, tokens_per_day=10**6)
        usual = sorted([(await faulty.ask(key)).seconds for _ in range(20)])
        faulty.redis.stall()
        first, *later = [await faulty.ask(key) for _ in range(20)]
        assert {answer.status for answer in (first, *later)} == {200}
        added = first.seconds - usual[10], max(answer.seconds for answer in later) - usual[-1]
        figure(
            f"P11 Redis stalled, second copy {copy}: {added[0] * 1000:.0f} ms more for the first request, "
            f"{max(added[1], 0) * 1000:.0f} ms for the slowest of 19 others (usual: {usual[10] * 1000:.1f} ms)"
        )
        assert added[0] < 0.15 + 5 * usual[-1]
        assert added[1] < 0.05 + 5 * usual[-1]
        faulty.redis.resume()
        figure(f"P12 Redis that had stalled: used again after {await faulty.redis_is_used():.1f} s")


async def test_scripts_that_redis_forgot_and_memory_that_it_lost_lose_no_limit(faulty: Faulty, redis: Redis) -> None:
    key = await faulty.gateway.new_key(requests_per_minute=6, tokens_per_day=10**6)
    for number in range(6):
        await (redis.script_flush() if number % 2 else redis.flushall())
        assert (await faulty.ask(key)).status == 200
    assert (await faulty.ask(key)).status == 429
    assert faulty.counted("gateway_dependency_errors_total") == 0
    rows = await faulty.gateway.rows()
    spent = await faulty.gateway.app[appkeys.BUDGETS].spent(f"k:{key.split('_')[1]}")
    assert spent.tokens_day == sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)


async def test_without_redis_a_budget_is_what_was_left_and_one_that_nobody_knows_is_refused(faulty: Faulty) -> None:
    known, unknown = [await faulty.gateway.new_key(tokens_per_day=500) for _ in range(2)]
    assert (await faulty.ask(known)).status == 200
    await faulty.redis.cut()
    assert (await faulty.ask(known)).status == 200
    refused = await faulty.ask(unknown)
    assert (refused.status, refused.code, refused.retry_after != "") == (503, "budget_unavailable", True)
    assert faulty.counted("gateway_fail_mode_total", what="budget", mode="local") == 1
    assert faulty.counted("gateway_fail_mode_total", what="budget", mode="closed") == 1
    ends = [(await faulty.ask(known, "openai/mock-gpt?tokens=100")).status for _ in range(8)]
    assert 503 in ends, "what was left when Redis was heard last is all there is"
    await faulty.redis.mend()
    await faulty.redis_is_used()
    assert (await faulty.ask(unknown)).status == 200
    rows = await faulty.gateway.rows()
    of_known = [row for row in rows if row["key_id"] == known.split("_")[1]]
    used = sum(row["prompt_tokens"] + row["completion_tokens"] for row in of_known)
    assert used <= 500 + 3
    await faulty.gateway.app[appkeys.SCRIPT].heard()
    assert (await faulty.gateway.app[appkeys.BUDGETS].spent(f"k:{known.split('_')[1]}")).tokens_day == used


# --- Postgres -----------------------------------------------------------------------------------------------------


async def test_a_stalled_postgres_is_not_felt_with_a_known_key_and_for_half_a_second_with_an_unknown_one(
    faulty: Faulty, figure: Callable[[str], None]
) -> None:
    unknown = [await faulty.gateway.new_key() for _ in range(3)]
    usual = sorted([(await faulty.ask()).seconds for _ in range(20)])
    faulty.postgres.stall()
    missed = [await faulty.ask(unknown[0])]
    await asyncio.sleep(0.3)  # what was trusted without a look is not any more
    known = [await faulty.ask() for _ in range(20)]
    assert {answer.status for answer in known} == {200}
    missed += [await faulty.ask(key) for key in unknown[1:]]
    assert {(answer.status, answer.code, answer.retry_after) for answer in missed} == {(503, "auth_unavailable", "1")}
    later, slowest = sorted(answer.seconds for answer in known)[-2], max(answer.seconds for answer in missed)
    figure(
        f"P11 Postgres stalled: {max(later - usual[-2], 0) * 1000:.0f} ms more with a known key "
        f"(the first: {known[0].seconds * 1000:.0f} ms), 503 after {slowest * 1000:.0f} ms with an unknown one"
    )
    assert later < 0.05 + 5 * usual[-1]
    assert slowest < 0.5 + 5 * usual[-1]
    assert faulty.counted("gateway_dependency_errors_total", dependency="postgres") >= 1
    faulty.postgres.resume()
    mended = monotonic()
    while (await faulty.ask(unknown[0])).status != 200:
        assert monotonic() - mended < BREAKER + SLACK
        await asyncio.sleep(0.02)
    figure(f"P12 Postgres that had stalled: an unknown key is served after {monotonic() - mended:.1f} s")


async def test_transactions_that_are_cut_in_the_middle_count_nothing_twice_and_lose_nothing(
    faulty: Faulty, database_url: str, figure: Callable[[str], None]
) -> None:
    assert (await faulty.ask()).status == 200  # a key that nobody knows yet is a 503 meanwhile
    asked, cuts = 1, 0

    async def cut() -> None:
        nonlocal cuts
        while True:
            await asyncio.sleep(0.02)
            await faulty.postgres.cut()
            cuts += 1
            await faulty.postgres.start()

    cutting = asyncio.create_task(cut())
    started = monotonic()
    while monotonic() - started < 2 or cuts < 20:
        assert [answer.status for answer in await asyncio.gather(*(faulty.ask() for _ in range(8)))] == [200] * 8
        asked += 8
    cutting.cancel()
    await asyncio.gather(cutting, return_exceptions=True)
    await faulty.postgres.mend()
    await until(lambda: not faulty.gateway.app[appkeys.SHIPPER].queued, 30)
    connection = await asyncpg.connect(database_url)
    try:
        assert await connection.fetchval("select count(*) from usage") == asked
        assert await connection.fetch(LEDGER) == []
    finally:
        await connection.close()
    figure(f"P6 Postgres cut {cuts} times under load: {asked} requests, {asked} rows, 0 sums out of balance")


# --- both, under a stream -----------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
async def test_an_open_stream_outlives_a_fail_over_of_redis_and_one_of_postgres(
    tmp_path: Path, server: Valkey, figure: Callable[[str], None]
) -> None:
    """Redis: the old server answers READONLY, then the address leads to a new one, which knows nothing. Postgres: it
    is stopped in the middle of everything, and comes back at its address."""
    async with AsyncExitStack() as opened:
        database = await opened.enter_async_context(running_postgres(tmp_path / "postgres"))
        redis, redis_url = await opened.enter_async_context(proxied_redis(server.url))
        new = opened.enter_context(valkey())
        gateway = await opened.enter_async_context(running_gateway(database.url, redis_url))
        client = await opened.enter_async_context(aiohttp.ClientSession())
        faulty = Faulty(gateway, redis, redis, client)
        key = await gateway.new_key(concurrent_requests=2, requests_per_minute=1000, tokens_per_day=10**6)
        headers, url = {"Authorization": f"Bearer {key}"}, f"{gateway.base_url}/chat/completions"
        async with client.post(url, json=LONG_STREAM, headers=headers) as response:
            await response.content.readany()
            old = await opened.enter_async_context(Redis.from_url(server.url))
            await command(old, "REPLICAOF 127.0.0.1 1")
            await database.stop_at_once()
            during = [await faulty.ask(key) for _ in range(5)]
            assert [answer.status for answer in during] == [200] * 5
            await redis.lead_to(new.url.removeprefix("unix://"))
            used_again = await faulty.redis_is_used()
            await database.start()
            rest = (await response.read()).decode()
        assert rest.endswith("data: [DONE]\n\n")
        rows = await gateway.rows()
        assert len(rows) == 6 and {row["outcome"] for row in rows} == {"ok"}
        assert await gateway.app[appkeys.POOL].fetch(LEDGER) == []
        figure(f"P12 Redis failed over under a stream: the new server is used after {used_again:.1f} s")
        fresh = await opened.enter_async_context(Redis.from_url(new.url))
        assert not [name async for name in fresh.scan_iter("aig:limits:leases:*")], "the stream's slot is free"
        spent = await gateway.app[appkeys.BUDGETS].spent(f"k:{key.split('_')[1]}")
        assert spent.tokens_day == sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)
        figure("P6 fail-over of Redis and of Postgres under a stream: 6 requests, 6 rows, the budget is their sum")


# --- the disk -----------------------------------------------------------------------------------------------------


async def test_a_full_disk_refuses_what_is_new_ends_what_runs_and_is_over_when_there_is_room(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None]
) -> None:
    full = False

    def write(file: int, data: bytes) -> int:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(file, data)

    def allocate(file: int, offset: int, length: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(file, offset, length)

    disk = {**vars(os), "write": write, "posix_fallocate": allocate}
    monkeypatch.setattr(journal, "os", SimpleNamespace(**disk))
    async with behind_proxies(database_url, redis_url) as faulty:
        headers, url = faulty.gateway.headers, f"{faulty.gateway.base_url}/chat/completions"
        async with faulty.client.post(url, json=LONG_STREAM, headers=headers) as response:
            await response.content.readany()
            full = True
            refused = [await faulty.ask() for _ in range(3)]
            assert {(one.status, one.code) for one in refused} == {(503, "usage_log_full")}
            assert len(faulty.gateway.calls) == 1, "nothing is sent that cannot be accounted"
            async with faulty.client.get(f"{faulty.gateway.root_url}/health/ready") as ready:
                assert ready.status == 503
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        full = False
        mended = monotonic()
        while (await faulty.ask()).status != 200:
            assert monotonic() - mended < BREAKER + SLACK
            await asyncio.sleep(0.02)
        figure(f"P12 a disk that had been full: served again after {monotonic() - mended:.2f} s")
        assert len(await faulty.gateway.rows()) == 2
        figure("P6 a full disk: 3 refused and nothing sent, the open stream and the next request have their rows")


# --- two nodes ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def two_nodes(database_url: str, redis_url: str) -> AsyncIterator[tuple[Gateway, Gateway]]:
    async with (
        running_gateway(database_url, redis_url) as one,
        running_gateway(database_url, redis_url, account=one.account_id) as other,
    ):
        yield one, other


async def status_of(client: aiohttp.ClientSession, gateway: Gateway, key: str, model: str) -> int:
    url, headers = f"{gateway.base_url}/chat/completions", {"Authorization": f"Bearer {key}"}
    async with client.post(url, json=chat_body(model, stream=True), headers=headers) as response:
        await response.read()
        return response.status


async def test_of_four_times_a_limit_at_once_on_two_nodes_the_limit_passes_and_no_slot_is_lost(
    database_url: str, redis_url: str, redis: Redis, figure: Callable[[str], None]
) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with two_nodes(database_url, redis_url) as nodes, aiohttp.ClientSession(connector=connector) as client:
        by_rate = await nodes[0].new_key(requests_per_minute=40)
        asked = [status_of(client, nodes[number % 2], by_rate, "openai/mock-gpt?tokens=1") for number in range(160)]
        passed = sorted(await asyncio.gather(*asked)).count(200)
        by_slots = await nodes[0].new_key(concurrent_requests=10)
        held = "openai/mock-gpt?tokens=1&ttft_ms=1500"
        asked = [status_of(client, nodes[number % 2], by_slots, held) for number in range(40)]
        streams = sorted(await asyncio.gather(*asked)).count(200)
        figure(f"P7 four times the limit at once on two nodes: {passed} of 40 a minute, {streams} of 10 streams passed")
        assert (passed, streams) == (40, 10)
        for node in nodes:
            await node.app[appkeys.SCRIPT].heard()
        left = [name async for name in redis.scan_iter("aig:limits:leases:*")]
        assert left == []
        figure("P7 slots held after they ended: 0")


# --- what is counted ----------------------------------------------------------------------------------------------


def test_every_kind_of_error_that_a_store_can_name_is_a_series() -> None:
    assert set(script_connection.KINDS) == set(DEPENDENCY_ERROR_KINDS["redis"])
    assert {*postgres.KINDS, "unavailable"} == set(DEPENDENCY_ERROR_KINDS["postgres"])
    assert {kind for _, kind in script_connection._KINDS} <= set(script_connection.KINDS)
    assert {kind for _, kind in postgres._KINDS} <= set(postgres.KINDS)

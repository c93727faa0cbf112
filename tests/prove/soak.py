"""Clients of every kind at two gateways, while their provider, their Redis and their Postgres fail at random.

Nobody is killed here (kill_loop does that), so every answer must be the one that its client asked for or a 503, and
every row must be that of its answer.
"""

import asyncio
import random
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import aiohttp
import asyncpg
from redis.asyncio import Redis

from tests.prove.kill_loop import Stage, environment, running_valkey, verify
from tests.prove.ledger import Ledger
from tests.prove.postgres import running_postgres
from tests.support.load import Door, Load
from tests.support.process import Served, new_key, serving
from tests.support.provider import noting_provider
from tests.support.proxy import Proxy, proxied_redis

CLIENTS = 20
# The key has every kind of limit, and none that is reached: each request asks Redis for its slot and its budget.
LIMITS = {"requests_per_minute": 1_000_000, "concurrent_requests": 1000, "tokens_per_day": 10**12}
REFUSALS = (
    b"-READONLY You can't write against a read only replica.\r\n",
    b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
    b"-LOADING Redis is loading the dataset in memory\r\n",
    b"-NOSCRIPT No matching script. Please use EVAL.\r\n",
)


@dataclass
class Soak:
    ledger: Ledger = field(default_factory=Ledger)
    faults: int = 0  # of Redis and Postgres
    calls: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # 503, by code
    slots: int = 0  # held when nothing ran any more
    spent: int = 0  # tokens of the budget, when all was settled
    used: int = 0  # tokens of all rows
    grown: float = 0.0  # MiB that the larger gateway had more at the end than after a tenth of the time
    recovery: float = 0.0  # seconds after the last fault until both gateways used Redis and Postgres again


async def run(data: Path, seconds: float) -> Soak:
    soak, calls = Soak(), data / "calls"
    async with AsyncExitStack() as opened:
        postgres = await opened.enter_async_context(running_postgres(data / "postgres"))
        redis_url = await opened.enter_async_context(running_valkey(data / "valkey"))
        redis, proxied_url = await opened.enter_async_context(proxied_redis(redis_url))
        provider = await opened.enter_async_context(noting_provider(calls))
        environ = environment(data, postgres.url, proxied_url, provider)
        gateways = [
            await opened.enter_async_context(serving(environ, coverage=False, log=data / "gateway.log"))
            for _ in range(2)
        ]
        key = await new_key(gateways[0], **LIMITS)
        load = Load([Door(gateway.base_url) for gateway in gateways], key, CLIENTS)
        soak.faults = await _torment(gateways, redis, postgres.proxy, seconds, soak)
        healed = monotonic()
        await healthy(gateways)
        soak.recovery = monotonic() - healed
        await load.stop()
        await healthy(gateways, settled=True)
        soak.calls, soak.refused = len(load.calls), Counter(call.error for call in load.calls if call.status == 503)
        pool = await opened.enter_async_context(asyncpg.create_pool(postgres.url, min_size=1, max_size=2))
        await soak.ledger.compare(pool, load.calls, set(calls.read_text().split()))
        soak.ledger.chain = await verify(Stage(environ, data / "gateway.log", soak.ledger))
        await look_at_limits(gateways[0], redis_url, pool, key, soak)
    return soak


async def _torment(gateways: list[Served], redis: Proxy, postgres: Proxy, seconds: float, soak: Soak) -> int:
    """How many faults there were."""
    end, count = monotonic() + seconds, 0
    warm: list[float] = []
    while monotonic() < end:
        await asyncio.sleep(random.uniform(0.2, 2))
        await _hurt(*random.choice([(redis, "cut stall delay half refuse"), (postgres, "cut stall delay half")]))
        count += 1
        await asyncio.sleep(random.uniform(0.05, 3))
        await redis.mend()
        await postgres.mend()
        if not warm and monotonic() > end - 0.9 * seconds:
            warm = [gateway.rss_mb() for gateway in gateways]
    soak.grown = max(now.rss_mb() - before for now, before in zip(gateways, warm or [1e9, 1e9], strict=True))
    return count


async def _hurt(proxy: Proxy, ways: str) -> None:
    how = random.choice(ways.split())
    if how == "cut":
        await proxy.cut()
    elif how == "stall":
        proxy.stall()
    elif how == "delay":
        proxy.delay = random.choice([0.01, 0.05, 0.3])
    elif how == "half":
        proxy.half_close()
    else:
        proxy.answer, proxy.answered = random.choice(REFUSALS), b"EVAL"


async def healthy(gateways: list[Served], *, settled: bool = False) -> None:
    """Returns when all use Redis and Postgres again, and have written all their rows if they are to be `settled`."""
    async with aiohttp.ClientSession() as client:
        for gateway in gateways:
            deadline = monotonic() + 60
            while True:
                async with client.get(f"{gateway.root_url}/health") as response:
                    health = await response.json()
                up = set(health["dependencies"].values()) == {"up"}
                if up and not (settled and health["usage_rows_waiting"]):
                    break
                assert monotonic() < deadline, health
                await asyncio.sleep(0.05)


async def look_at_limits(gateway: Served, redis_url: str, pool: asyncpg.Pool, key: str, soak: Soak) -> None:
    total = "select sum(prompt_tokens + completion_tokens)::bigint from usage where key_id = $1"
    soak.used = await pool.fetchval(total, key.split("_")[1])
    async with Redis.from_url(redis_url) as client:
        deadline = monotonic() + 45  # a lease that nobody gives back ends by itself, after 30 s
        while monotonic() < deadline:
            soak.slots = len([name async for name in client.scan_iter("aig:limits:leases:*")])
            soak.spent = await _spent(gateway, key)
            if not soak.slots and soak.spent == soak.used:
                return
            await asyncio.sleep(0.2)


async def _spent(gateway: Served, key: str) -> int:
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers) as client:
        async with client.get(f"{gateway.root_url}/auth/keys/{key.split('_')[1]}") as response:
            budgets = (await response.json())["budgets"]
    return int(next(one["spent"] for one in budgets if one["what"] == "tokens_per_day"))

"""SIGTERM with 200 streams open: `drain_200(100.0)` is the length that a load balancer's 120 s leave, for `make prove`."""

import asyncio
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import aiohttp
import asyncpg

from gateway.embedded import Embedded
from tests.support.gateway import chat_body
from tests.support.process import Served, new_key, serving

STREAMS = 200
PACE = 0.1  # seconds between two events of a stream


@dataclass
class Figures:
    whole: int = 0  # streams that ended as their provider ended them
    cut: int = 0  # all others
    unready: float = 0.0  # seconds from SIGTERM until /health/ready says 503
    glance: float = 0.0  # seconds that the same request took just before: the machine's part of it
    gone: float = 0.0  # seconds from SIGTERM until the process ended
    status: int | None = None  # its exit status
    rows: Mapping[str, int] | None = None  # by outcome

    def __str__(self) -> str:
        return (
            f"P10 drain: {self.whole} of {self.whole + self.cut} streams whole, not ready after {self.unready * 1000:.0f} ms "
            f"(a glance took {self.glance * 1000:.0f}), gone after {self.gone:.1f} s with {self.status}, rows {self.rows}"
        )


async def drain_200(seconds: float) -> Figures:
    """The last of the streams end `seconds` after SIGTERM, which is within the drain."""
    with tempfile.TemporaryDirectory() as folder:
        stores = Embedded(Path(folder), postgres=True, redis=True)
        await asyncio.to_thread(stores.start)
        try:
            return await drain(stores.database_url, stores.redis_url, seconds)
        finally:
            await asyncio.to_thread(stores.stop)


async def drain(database_url: str, redis_url: str, seconds: float) -> Figures:
    environ = {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "LOG_LEVEL": "error",
        "GATEWAY_DRAIN_TIMEOUT": str(seconds + 20),
        "GATEWAY_DRAIN_DELAY": "1",  # as behind a load balancer, but shorter
    }
    found = Figures()
    async with serving(environ, coverage=False) as served:
        headers = {"Authorization": f"Bearer {await new_key(served)}"}
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(headers=headers, connector=connector) as client:
            body = chat_body(f"mock-gpt?tokens={int(seconds / PACE)}&pace_ms={PACE * 1000:.0f}", stream=True)
            url = f"{served.base_url}/chat/completions"
            opened = await asyncio.gather(*(client.post(url, json=body) for _ in range(STREAMS)))
            reading = [asyncio.create_task(_ends_well(response)) for response in opened]
            found.glance = await _seconds_until(served, 200)
            told = monotonic()
            leaving = asyncio.create_task(served.terminate(seconds + 60))
            found.unready = await _seconds_until(served, 503)
            found.whole = sum(await asyncio.gather(*reading))
        found.cut = STREAMS - found.whole
        found.status = await leaving
        found.gone = monotonic() - told
    found.rows = await _rows(database_url)
    return found


async def _ends_well(response: aiohttp.ClientResponse) -> bool:
    try:
        return response.status == 200 and (await response.read()).endswith(b"data: [DONE]\n\n")
    except aiohttp.ClientError:
        return False


async def _seconds_until(served: Served, status: int) -> float:
    """Until /health/ready answers with it."""
    began = monotonic()
    async with aiohttp.ClientSession() as client, asyncio.timeout(60):
        while True:
            async with client.get(f"{served.root_url}/health/ready") as response:
                if response.status == status:
                    return monotonic() - began


async def _rows(database_url: str) -> dict[str, int]:
    connection = await asyncpg.connect(database_url)
    try:
        found = await connection.fetch("select outcome, count(*) from usage group by outcome")
    finally:
        await connection.close()
    return {row["outcome"]: row["count"] for row in found}

"""SIGTERM while requests wait: everybody is told, nobody is cut."""

import asyncio
import signal
from collections.abc import Callable
from time import monotonic
from typing import Any

import aiohttp
import asyncpg
import pytest

from tests.prove.drain import STREAMS, drain
from tests.support.gateway import chat_body
from tests.support.process import Served, new_key, serving

pytestmark = pytest.mark.integration

SILENT = {
    "stream": chat_body("mock-gpt?headers_ms=60000", stream=True),
    "whole": chat_body("mock-claude?headers_ms=60000"),
    "silent stream": chat_body("mock-llama?ttft_ms=60000", stream=True),
}


async def answer(client: aiohttp.ClientSession, served: Served, body: dict[str, Any]) -> tuple[int, str]:
    async with client.post(f"{served.base_url}/chat/completions", json=body) as response:
        return response.status, await response.text()


async def outcomes(database_url: str) -> set[str]:
    connection = await asyncpg.connect(database_url)
    try:
        return {row["outcome"] for row in await connection.fetch("select outcome from usage")}
    finally:
        await connection.close()


async def test_who_still_waits_at_the_end_of_the_drain_is_told(database_url: str, redis_url: str) -> None:
    environ = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "GATEWAY_DRAIN_TIMEOUT": "0.5"}
    async with serving(environ) as served:
        headers = {"Authorization": f"Bearer {await new_key(served)}"}
        async with aiohttp.ClientSession(headers=headers) as client:
            waiting = [asyncio.create_task(answer(client, served, body)) for body in SILENT.values()]
            await asyncio.sleep(0.5)
            assert await served.terminate() == 0
            for status, text in await asyncio.gather(*waiting):
                assert status == 503
                assert "server_shutting_down" in text
    assert await outcomes(database_url) == {"interrupted"}


async def test_a_stream_of_heartbeats_ends_with_an_error_event(database_url: str, redis_url: str) -> None:
    times = {"GATEWAY_DRAIN_TIMEOUT": "0.5", "GATEWAY_HEARTBEAT": "0.2"}
    async with serving({"DATABASE_URL": database_url, "REDIS_URL": redis_url, **times}) as served:
        headers = {"Authorization": f"Bearer {await new_key(served)}"}
        async with aiohttp.ClientSession(headers=headers) as client:
            for kind in ("stream", "silent stream"):
                async with client.post(f"{served.base_url}/chat/completions", json=SILENT[kind]) as response:
                    assert response.status == 200
                    assert await response.content.readuntil(b"\n\n") == b": ping\n\n"
                    if kind == "silent stream":
                        stopping = asyncio.create_task(served.terminate())
                        text = (await response.read()).decode()
                        assert "server_shutting_down" in text
                        assert "[DONE]" not in text
            assert await stopping == 0


async def test_a_second_signal_ends_everything_at_once_but_not_in_silence(database_url: str, redis_url: str) -> None:
    async with serving({"DATABASE_URL": database_url, "REDIS_URL": redis_url}) as served:
        headers = {"Authorization": f"Bearer {await new_key(served)}"}
        async with aiohttp.ClientSession(headers=headers) as client:
            body = chat_body("mock-gpt?case=long&pace_ms=50", stream=True)
            async with client.post(f"{served.base_url}/chat/completions", json=body) as response:
                await response.content.readany()
                served.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.3)
                started = monotonic()
                stopping = asyncio.create_task(served.terminate())
                text = (await response.read()).decode()
                assert "server_shutting_down" in text
                assert await stopping == 0
                assert monotonic() - started < 3
    assert await outcomes(database_url) == {"interrupted"}


async def test_two_hundred_streams_that_end_within_the_drain_are_not_cut(
    database_url: str, redis_url: str, figure: Callable[[str], None]
) -> None:
    found = await drain(database_url, redis_url, 3.0)
    figure(str(found))
    assert (found.whole, found.cut, found.rows) == (STREAMS, 0, {"ok": STREAMS})
    assert found.status == 0
    assert found.unready < 1 + 10 * found.glance
    assert found.gone < 23  # the drain's time-out

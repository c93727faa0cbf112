"""Redis gone, Postgres gone, and secrets that must not come out anywhere."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from time import monotonic
from typing import Any

import aiohttp
import asyncpg
import pytest

from gateway import appkeys
from gateway.logs import setup
from tests.support.gateway import MODELS, Gateway, chat_body, running_gateway
from tests.support.proxy import Proxy, proxied_postgres, proxied_redis

pytestmark = [pytest.mark.integration, pytest.mark.haste]


@pytest.fixture
async def behind_proxies(database_url: str, redis_url: str) -> AsyncIterator[tuple[Gateway, Proxy, Proxy]]:
    async with (
        proxied_postgres(database_url) as (postgres, postgres_url),
        proxied_redis(redis_url) as (redis, proxied_redis_url),
        running_gateway(postgres_url, proxied_redis_url, {"GATEWAY_KEY_CACHE": "0.2"}) as gateway,
    ):
        yield gateway, postgres, redis
        # What the gateway still has to write needs its stores.
        if postgres._server is None:
            await postgres.start()
        postgres.resume()
        redis.resume()


async def status_of(gateway: Gateway, key: str, model: str = MODELS["openai"]) -> tuple[int, float, Any]:
    started = monotonic()
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client,
        client.post(f"{gateway.base_url}/chat/completions", json=chat_body(model)) as response,
    ):
        return response.status, monotonic() - started, await response.json()


@pytest.mark.parametrize("how", ["cut", "stall"])
async def test_without_redis_the_local_limiter_takes_over_and_nothing_hangs(
    behind_proxies: tuple[Gateway, Proxy, Proxy], figure: Callable[[str], None], how: str
) -> None:
    gateway, _, redis = behind_proxies
    key = await gateway.new_key(requests_per_minute=5)
    assert (await status_of(gateway, key))[0] == 200
    if how == "cut":
        await redis.cut()
    else:
        redis.stall()
    answers = [await status_of(gateway, key) for _ in range(8)]
    # The one that Redis had granted counts here too: the process knows what it let through.
    assert [status for status, _, _ in answers] == [200] * 4 + [429] * 4
    slowest = max(seconds for _, seconds, _ in answers)
    figure(f"P11 Redis {how}: the slowest of 8 requests took {slowest * 1000:.0f} ms")
    assert slowest < 1.0
    async with aiohttp.ClientSession() as client:
        async with client.get(f"{gateway.root_url}/health") as response:
            health = await response.json()
        assert (health["status"], health["dependencies"]["redis"]) == ("degraded", "down")
        async with client.get(f"{gateway.root_url}/health/ready") as response:
            assert response.status == 200
    if how == "cut":
        await redis.start()
    else:
        redis.resume()
    async with asyncio.timeout(8):
        while gateway.app[appkeys.LIMITER].state != "redis":
            await status_of(gateway, key)
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("how", ["cut", "stall"])
async def test_without_postgres_known_keys_work_and_unknown_keys_get_503_not_401(
    behind_proxies: tuple[Gateway, Proxy, Proxy], how: str
) -> None:
    gateway, postgres, _ = behind_proxies
    unknown = await gateway.new_key()  # no process has seen it yet
    assert (await status_of(gateway, gateway.api_key))[0] == 200
    if how == "cut":
        await postgres.cut()
    else:
        postgres.stall()
    await asyncio.sleep(0.3)  # the cached key is no longer fresh
    status, seconds, _ = await status_of(gateway, gateway.api_key)
    assert (status, seconds < 1.5) == (200, True)
    status, seconds, body = await status_of(gateway, unknown)
    assert (status, body["error"]["code"], seconds < 1.5) == (503, "auth_unavailable", True)
    async with aiohttp.ClientSession() as client:
        for path in ("live", "ready"):
            async with client.get(f"{gateway.root_url}/health/{path}") as response:
                assert response.status == 200
        async with client.get(f"{gateway.root_url}/health") as response:
            assert (await response.json())["dependencies"]["postgres"] == "down"
    if how == "cut":
        await postgres.start()
    else:
        postgres.resume()
    async with asyncio.timeout(10):
        while (await status_of(gateway, unknown))[0] != 200:
            await asyncio.sleep(0.1)
        while gateway.app[appkeys.SHIPPER].queued:
            await asyncio.sleep(0.05)


async def test_rows_of_an_outage_are_written_when_postgres_is_back(
    behind_proxies: tuple[Gateway, Proxy, Proxy], database_url: str
) -> None:
    gateway, postgres, _ = behind_proxies
    assert (await status_of(gateway, gateway.api_key))[0] == 200
    await postgres.cut()
    for _ in range(10):
        assert (await status_of(gateway, gateway.api_key))[0] == 200
    await postgres.start()
    connection = await asyncpg.connect(database_url)
    try:
        async with asyncio.timeout(15):
            while await connection.fetchval("select count(*) from usage") < 11:
                await asyncio.sleep(0.1)
    finally:
        await connection.close()


async def test_an_open_stream_goes_on_while_redis_and_postgres_are_gone(
    behind_proxies: tuple[Gateway, Proxy, Proxy],
) -> None:
    gateway, postgres, redis = behind_proxies
    body = chat_body("openai/mock-gpt?pace_ms=30&tokens=40", stream=True)
    async with (
        aiohttp.ClientSession(headers=gateway.headers) as client,
        client.post(f"{gateway.base_url}/chat/completions", json=body) as response,
    ):
        await response.content.readany()
        await postgres.cut()
        await redis.cut()
        rest = (await response.read()).decode()
    assert rest.endswith("data: [DONE]\n\n")


# --- secrets ------------------------------------------------------------------------------------------------------

PROMPT, SAID = "CANARY-PROMPT-7Qx", "CANARY-TOOL-9Zk"
CREDENTIALS = {
    "OPENAI_API_KEY": "sk-CANARY-openai",
    "ANTHROPIC_API_KEY": "sk-ant-CANARY-anthropic",
    "GATEWAY_KEY_PEPPER": "CANARY-pepper",
}


async def test_no_secret_and_no_prompt_in_any_log_metric_or_error(
    database_url: str, redis_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    setup("debug", "production")
    shown: list[str] = []
    try:
        async with running_gateway(database_url, redis_url, CREDENTIALS) as gateway:
            own = "sk-CANARY-callers-own"
            for headers in (gateway.headers, {"X-API-Key": gateway.api_key, "Authorization": f"Bearer {own}"}):
                await _use_in_every_way(gateway, headers, shown)
            async with aiohttp.ClientSession() as client:
                for path in ("/metrics", "/health"):
                    async with client.get(gateway.root_url + path) as response:
                        shown.append(await response.text())
            secret = gateway.api_key.split("_")[2]
            rows = str([dict(row) for row in await gateway.rows()])
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    logged = "".join(capfd.readouterr())
    assert logged.count('"request_id"') >= 10, "the log must have been captured"
    everything = "\n".join([logged, rows, *shown])
    for canary in (PROMPT, SAID, secret, "CANARY-password", *CREDENTIALS.values(), own):
        assert canary not in everything


async def _use_in_every_way(gateway: Gateway, headers: dict[str, str], shown: list[str]) -> None:
    """Succeed and fail at every stage, and keep what of it is an error."""
    url = f"{gateway.base_url}/chat/completions"
    async with aiohttp.ClientSession(headers=headers) as client:
        for model in MODELS.values():
            for query in (
                "",
                "status=401",
                "status=400",
                "status=500",
                "fault=cut",
                "fault=broken_json",
                "fault=garbage",
            ):
                for stream in (False, True):
                    gateway.forget_faults()
                    body = chat_body(f"{model}?{query}" if query else model, PROMPT, stream=stream)
                    async with client.post(url, json=body) as response:
                        text = await response.text()
                        if response.status != 200:
                            shown.append(text)
                        elif stream:
                            shown.append(text.rsplit("data: ", 1)[1])
        gateway.forget_faults()
        tool = {"role": "tool", "content": SAID, "tool_call_id": "x"}
        for bad in (
            json.dumps(chat_body(MODELS["openai"], PROMPT, temperature=9)),
            json.dumps({**chat_body(MODELS["openai"], PROMPT), PROMPT: 1, "n": 0}),
            json.dumps({"model": MODELS["anthropic"], "messages": [{"role": "user", "content": PROMPT}, tool]}),
            f'{{"model":"m","messages":[{{"role":"user","content":"{PROMPT}"}}',
        ):
            async with client.post(url, data=bad, headers={"Content-Type": "application/json"}) as response:
                assert response.status in (400, 200)
                if response.status == 400:
                    shown.append(await response.text())
        login = {"email": "who@example.com", "password": "CANARY-password"}
        for path in ("/auth/register", "/auth/keys"):
            async with client.post(gateway.root_url + path, json=login) as response:
                shown.append(await response.text())
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {gateway.api_key}x"}) as client:
        async with client.post(url, json=chat_body(MODELS["openai"], PROMPT)) as response:
            assert response.status == 401
            shown.append(await response.text())

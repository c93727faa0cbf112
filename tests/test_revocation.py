"""A key that was revoked or has expired: how soon it is dead, on every gateway, and what becomes of its streams."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

import aiohttp
import asyncpg
import pytest

from gateway import appkeys, revocation
from gateway.stores.tokens import parse_token
from tests.support.gateway import Gateway, chat_body, read_events, running_gateway
from tests.support.proxy import proxied_redis

pytestmark = pytest.mark.integration

Figure = Callable[[str], None]
ENDLESS = "openai/mock-gpt?tokens=2000&pace_ms=20"
CACHE = 1.0  # seconds that a key is trusted without a look-up where Redis is gone


@asynccontextmanager
async def two_gateways(
    database_url: str, redis_url: str, **environ: str
) -> AsyncIterator[tuple[Gateway, Gateway, aiohttp.ClientSession]]:
    async with running_gateway(database_url, redis_url, environ) as one:
        async with running_gateway(database_url, redis_url, environ, account=one.account_id) as two:
            async with aiohttp.ClientSession() as client:
                yield one, two, client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def id_of(token: str) -> str:
    parsed = parse_token(token)
    assert parsed is not None
    return parsed.id


async def status_of(client: aiohttp.ClientSession, gateway: Gateway, token: str) -> int:
    async with client.get(f"{gateway.base_url}/models", headers=bearer(token)) as response:
        return response.status


async def revoke(client: aiohttp.ClientSession, gateway: Gateway, token: str) -> None:
    url = f"{gateway.root_url}/auth/keys/{id_of(token)}"
    async with client.delete(url, headers=gateway.headers) as response:
        assert response.status == 200


async def seconds_to_death(client: aiohttp.ClientSession, gateways: tuple[Gateway, ...], token: str) -> float:
    """Until all of them refuse it, and go on to."""
    started, alive = monotonic(), list(gateways)
    async with asyncio.timeout(60):
        while alive:
            alive = [gateway for gateway in alive if await status_of(client, gateway, token) == 200]
            await asyncio.sleep(0.01)
    seconds = monotonic() - started
    assert {await status_of(client, gateway, token) for gateway in gateways} == {401}
    return seconds


# --- new requests -------------------------------------------------------------------------------------------------


async def test_a_revoked_key_is_dead_on_every_gateway_within_seconds(
    database_url: str, redis_url: str, figure: Figure
) -> None:
    async with two_gateways(database_url, redis_url) as (one, two, client):
        token = await one.new_key()
        assert [await status_of(client, gateway, token) for gateway in (one, two)] == [200, 200]
        await revoke(client, one, token)
        seconds = await seconds_to_death(client, (one, two), token)
        assert await status_of(client, two, one.api_key) == 200
    figure(f"P9 a revoked key was dead on two gateways {seconds * 1e3:.0f} ms after it was revoked on one")
    assert seconds < 5


async def test_without_redis_a_revoked_key_is_dead_when_the_trust_in_it_ends(
    database_url: str, redis_url: str, figure: Figure
) -> None:
    async with proxied_redis(redis_url) as (proxy, url):
        async with two_gateways(database_url, url, GATEWAY_KEY_CACHE=str(CACHE)) as (one, two, client):
            token = await one.new_key()
            assert [await status_of(client, gateway, token) for gateway in (one, two)] == [200, 200]
            await proxy.cut()
            await revoke(client, one, token)
            assert await status_of(client, one, token) == 401
            seconds = await seconds_to_death(client, (one, two), token)
            assert await status_of(client, two, one.api_key) == 200
    figure(f"P9 without Redis it was dead after {seconds:.1f} s, of a trust of {CACHE:g} s (60 s by default)")
    assert seconds < CACHE + 5  # a second of it while another request reads the row; the rest for a busy machine


# --- open streams -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def open_stream(
    client: aiohttp.ClientSession, gateway: Gateway, token: str
) -> AsyncIterator[aiohttp.ClientResponse]:
    """A stream that runs for most of a minute, once it runs."""
    body = chat_body(ENDLESS, stream=True)
    async with client.post(f"{gateway.base_url}/chat/completions", json=body, headers=bearer(token)) as response:
        assert response.status == 200
        await response.content.readany()
        yield response


async def rows_of(gateway: Gateway, token: str) -> list[Any]:
    return [row for row in await gateway.rows() if row["key_id"] == id_of(token)]


@pytest.mark.parametrize("redis_is", ["there", "gone"])
async def test_the_open_streams_of_a_revoked_key_are_cut_on_every_gateway_and_counted(
    database_url: str, redis_url: str, figure: Figure, redis_is: str
) -> None:
    async with proxied_redis(redis_url) as (proxy, url):
        async with two_gateways(database_url, url) as (one, two, client):
            token, other = await one.new_key(), await one.new_key()
            async with (
                open_stream(client, one, token) as here,
                open_stream(client, two, token) as there,
                open_stream(client, two, other) as others,
            ):
                if redis_is == "gone":
                    await proxy.cut()
                started = monotonic()
                await revoke(client, one, token)
                events = [await asyncio.wait_for(read_events(stream), 30) for stream in (here, there)]
                seconds = monotonic() - started
                others.content.read_nowait()
                assert await asyncio.wait_for(others.content.readany(), 30)
            for seen in events:
                error = json.loads(seen[-1])["error"]
                assert (error["type"], error["code"]) == ("authentication_error", "key_ended")
                assert "[DONE]" not in seen
            await one.rows()  # both have written theirs
            rows = await rows_of(two, token)
            assert [(row["status"], row["outcome"], row["error_code"]) for row in rows] == [
                (200, "interrupted", "key_ended")
            ] * 2
            assert all(row["completion_tokens"] > 0 for row in rows)
    figure(f"P9 open streams of a revoked key were cut after {seconds:.1f} s, with Redis {redis_is}")
    assert seconds < 30


async def test_a_whole_answer_that_a_revoked_key_waits_for_is_a_401(database_url: str, redis_url: str) -> None:
    async with running_gateway(database_url, redis_url) as gateway, aiohttp.ClientSession() as client:
        token = await gateway.new_key()
        body = chat_body("openai/mock-gpt?tokens=1&headers_ms=50000")
        url = f"{gateway.base_url}/chat/completions"

        async def ask() -> tuple[int, str]:
            async with client.post(url, json=body, headers=bearer(token)) as response:
                return response.status, (await response.json())["error"]["code"]

        asking = asyncio.create_task(ask())
        async with asyncio.timeout(30):
            while not gateway.calls:
                await asyncio.sleep(0.01)
        await revoke(client, gateway, token)
        assert await asyncio.wait_for(asking, 30) == (401, "key_ended")


async def test_where_they_may_finish_the_streams_of_a_revoked_key_do(database_url: str, redis_url: str) -> None:
    settings = {"GATEWAY_REVOKED_STREAMS": "finish"}
    async with running_gateway(database_url, redis_url, settings) as gateway, aiohttp.ClientSession() as client:
        token = await gateway.new_key()
        body = chat_body("openai/mock-gpt?tokens=100&pace_ms=20", stream=True)
        url = f"{gateway.base_url}/chat/completions"
        async with client.post(url, json=body, headers=bearer(token)) as response:
            await response.content.readany()
            await revoke(client, gateway, token)
            assert await status_of(client, gateway, token) == 401
            assert (await read_events(response))[-1] == "[DONE]"


async def test_a_change_that_is_no_revocation_cuts_no_stream(database_url: str, redis_url: str) -> None:
    async with running_gateway(database_url, redis_url) as gateway, aiohttp.ClientSession() as client:
        body = chat_body("openai/mock-gpt?tokens=100&pace_ms=20", stream=True)
        url = f"{gateway.base_url}/chat/completions"
        async with client.post(url, json=body, headers=gateway.headers) as response:
            await response.content.readany()
            change = f"{gateway.root_url}/auth/keys/{id_of(gateway.api_key)}"
            async with client.patch(change, json={"key_name": "other"}, headers=gateway.headers) as changed:
                assert changed.status == 200
            assert (await read_events(response))[-1] == "[DONE]"


async def test_a_look_that_fails_in_an_odd_way_is_not_the_last(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[set[str]] = []

    async def restored(key_ids: set[str]) -> None:
        looks.append(key_ids)
        raise asyncpg.UndefinedTableError('relation "keys" does not exist')

    monkeypatch.setattr(revocation, "LOOK", 0.01)
    monkeypatch.setattr(revocation, "REST", 0.01)
    async with running_gateway(database_url, redis_url) as gateway, aiohttp.ClientSession() as client:
        token = await gateway.new_key()
        async with open_stream(client, gateway, token) as stream:
            with monkeypatch.context() as outage:
                outage.setattr(gateway.app[appkeys.KEYS], "ended", restored)
                async with asyncio.timeout(30):
                    while len(looks) < 2:
                        await asyncio.sleep(0.01)
            await revoke(client, gateway, token)
            events = await asyncio.wait_for(read_events(stream), 30)
    assert json.loads(events[-1])["error"]["code"] == "key_ended"


# --- expiry -------------------------------------------------------------------------------------------------------


async def test_a_key_expires_at_its_moment_and_its_stream_with_it(database_url: str, redis_url: str) -> None:
    """Nobody announces an expiry, and a key may be trusted for a minute: it is dead at its moment all the same."""
    async with running_gateway(database_url, redis_url) as gateway, aiohttp.ClientSession() as client:
        expires_at = datetime.now(UTC) + timedelta(seconds=2)
        token = await gateway.new_key(expires_at=expires_at)
        assert await status_of(client, gateway, token) == 200
        async with open_stream(client, gateway, token) as stream:
            await seconds_to_death(client, (gateway,), token)
            assert datetime.now(UTC) >= expires_at
            events = await asyncio.wait_for(read_events(stream), 30)
            assert json.loads(events[-1])["error"]["code"] == "key_ended"
        longer = {"expires_at": (datetime.now(UTC) + timedelta(days=1)).isoformat()}
        url = f"{gateway.root_url}/auth/keys/{id_of(token)}"
        async with client.patch(url, json=longer, headers=gateway.headers) as response:
            assert response.status == 200
        assert await status_of(client, gateway, token) == 200
        assert gateway.app[appkeys.PULSE].open_exchanges == 0

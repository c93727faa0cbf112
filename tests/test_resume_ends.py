"""How long a resumable stream lasts, how much of it is kept, and what becomes of it when something goes away."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import asyncpg
import pytest
from redis.asyncio import Redis

from gateway import appkeys
from gateway.sharing import SHARING
from gateway.stores.tokens import parse_token
from tests.support.gateway import Gateway, chat_body, running_gateway
from tests.support.process import new_key, serving
from tests.support.resuming import (
    LONG,
    SHORT,
    WISH,
    begin,
    client,
    cut,
    go_on,
    name,
    read,
    refusal,
    rest,
    runs,
    two_nodes,
    until,
)

pytestmark = pytest.mark.integration


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


@pytest.fixture
async def nodes(database_url: str, redis_url: str) -> AsyncIterator[tuple[Gateway, Gateway]]:
    async with two_nodes(database_url, redis_url) as both:
        yield both


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with client() as session:
        yield session


# --- how long -----------------------------------------------------------------------------------------------------


async def test_a_stream_goes_on_for_a_while_without_its_client_and_then_ends_as_it_would_have(
    database_url: str, redis_url: str, http: aiohttp.ClientSession
) -> None:
    async with running_gateway(database_url, redis_url, {"GATEWAY_RESUME_LINGER": "1"}) as gateway:
        stream, had = await cut(gateway, http, 500, LONG)
        await asyncio.sleep(0.5)
        assert gateway.calls[0].client_gone_at is None
        await until(lambda: gateway.calls[0].client_gone_at is not None)
        [row] = await gateway.rows()
        assert (str(row["request_id"]), row["outcome"]) == (stream, "client_abort")
        assert row["completion_tokens"] > 10
        missed = await rest(gateway, http, stream, len(had))
        assert b"stream_interrupted" in missed.split(b"\n\n")[-2] and b"[DONE]" not in missed
        assert (await gateway.rows()) == [row], "who continues a stream has no row"


async def test_who_follows_it_on_another_node_keeps_it_going(
    database_url: str, redis_url: str, http: aiohttp.ClientSession
) -> None:
    linger = {"GATEWAY_RESUME_LINGER": "1"}
    async with running_gateway(database_url, redis_url, linger) as one:
        async with running_gateway(database_url, redis_url, linger, account=one.account_id) as other:
            other.api_key = one.api_key
            stream, had = await cut(one, http, 500, "openai/mock-gpt?tokens=40&pace_ms=100")
            missed = await rest(other, http, stream, len(had))
            assert missed.endswith(b"[DONE]\n\n")
            assert [row["outcome"] for row in await one.rows()] == ["ok"]


async def test_its_slot_is_taken_until_it_ends_and_continuing_it_takes_none(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    gateway.api_key = await gateway.new_key(concurrent_requests=1, requests_per_minute=2)
    stream, had = await cut(gateway, http, 500, "openai/mock-gpt?tokens=40&pace_ms=50")
    await asyncio.sleep(0.2)
    url, body = f"{gateway.base_url}/chat/completions", chat_body("openai/mock-gpt?tokens=3")
    async with http.post(url, json=body, headers=gateway.headers) as response:
        assert response.status == 429
    assert (await rest(gateway, http, stream, len(had))).endswith(b"[DONE]\n\n")
    await until(lambda: not runs(gateway, stream))
    async with http.post(url, json=body, headers=gateway.headers) as response:
        assert response.status == 200


async def test_a_client_that_left_before_the_first_byte_leaves_nothing(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    asking = asyncio.create_task(begin(gateway, http, "openai/mock-gpt?headers_ms=5000"))
    await until(lambda: len(gateway.calls) == 1)
    asking.cancel()
    await until(lambda: gateway.calls[0].client_gone_at is not None, 4)


async def test_a_stream_expires(database_url: str, redis_url: str, http: aiohttp.ClientSession) -> None:
    async with running_gateway(database_url, redis_url, {"GATEWAY_RESUME_TTL": "1.5"}) as gateway:
        stream, had = await cut(gateway, http, 500, "openai/mock-gpt?tokens=40&pace_ms=60")
        await until(lambda: not runs(gateway, stream))  # which is longer than that
        assert (await rest(gateway, http, stream, len(had))).endswith(b"[DONE]\n\n")
        await asyncio.sleep(1.8)
        assert await refusal(gateway, http, stream) == (404, "stream_not_found")


async def test_a_key_has_so_many_and_those_that_ended_make_room(
    database_url: str, redis_url: str, http: aiohttp.ClientSession
) -> None:
    async with running_gateway(database_url, redis_url, {"GATEWAY_RESUME_MAX_STREAMS": "2"}) as gateway:
        ended = [(await begin(gateway, http, SHORT)) for _ in range(2)]
        for response in ended:
            await response.read()
        first, second = (response.headers["X-Request-Id"] for response in ended)
        await until(lambda: not runs(gateway, first) and not runs(gateway, second))
        assert await rest(gateway, http, first) and await rest(gateway, http, second)
        running = [await begin(gateway, http, LONG) for _ in range(3)]
        assert [response.headers["X-Gateway-Resumable"] for response in running] == ["true", "true", "false"]
        assert await refusal(gateway, http, first) == (404, "stream_not_found")
        gateway.api_key = await gateway.new_key()
        assert (await begin(gateway, http, SHORT)).headers["X-Gateway-Resumable"] == "true"
        for response in running:
            response.close()


async def test_of_a_long_stream_the_end_is_kept_here_and_in_redis(
    database_url: str, redis_url: str, redis: Redis, http: aiohttp.ClientSession
) -> None:
    bound = 1 << 16
    async with running_gateway(database_url, redis_url, {"GATEWAY_RESUME_MAX_BYTES": str(bound)}) as gateway:
        response = await begin(gateway, http, "openai/mock-gpt?tokens=3000&pace_ms=1")
        stream, seen, most = response.headers["X-Request-Id"], b"", 0
        while more := await response.content.readany():
            seen += more
            generation = gateway.app[SHARING].running(name(gateway, stream).encode())
            if generation is not None:
                most = max(most, sum(len(events) for _, events in generation.recording.pieces))
        assert len(seen) > 4 * bound and bound < most < 2 * bound
        await until(lambda: not runs(gateway, stream))
        tail = await rest(gateway, http, stream, len(seen) - bound)
        assert tail == seen[-bound:]
        assert await refusal(gateway, http, stream) == (410, "stream_trimmed")
        entries: Any = await redis.xrange(name(gateway, stream))
        assert bound <= sum(len(fields.get(b"bytes", b"")) for _, fields in entries) < 3 * bound


async def test_a_reader_that_stops_is_dropped_and_the_stream_goes_on(
    database_url: str, redis_url: str, http: aiohttp.ClientSession
) -> None:
    environ = {"GATEWAY_WRITE_TIMEOUT": "0.5", "GATEWAY_RESUME_MAX_BYTES": str(16 << 20)}
    async with running_gateway(database_url, redis_url, environ) as gateway:
        response = await begin(gateway, http, "openai/mock-gpt?tokens=40000")
        stream = response.headers["X-Request-Id"]
        had = await read(response, 1000)
        await until(lambda: not runs(gateway, stream), 60)
        response.close()
        missed = await rest(gateway, http, stream, len(had))
        assert len(missed) > 4 << 20 and missed.endswith(b"[DONE]\n\n")
        [row] = await gateway.rows()
        assert row["outcome"] == "ok"


# --- what goes away -----------------------------------------------------------------------------------------------


async def test_a_shutdown_ends_it_for_everybody_alike(
    nodes: tuple[Gateway, Gateway], http: aiohttp.ClientSession
) -> None:
    response = await begin(nodes[0], http, LONG)
    stream, had = response.headers["X-Request-Id"], await read(response, 500)
    following = asyncio.create_task(rest(nodes[1], http, stream))
    await nodes[0].app[appkeys.PULSE].drain(0.3)
    seen = had + await response.read()
    assert b"server_shutting_down" in seen.split(b"\n\n")[-2]
    assert await following == seen
    assert await rest(nodes[1], http, stream, 100) == seen[100:]


async def test_who_follows_it_on_a_node_that_shuts_down_is_cut_and_goes_on_elsewhere(
    nodes: tuple[Gateway, Gateway], http: aiohttp.ClientSession
) -> None:
    stream, had = await cut(nodes[0], http, 500, "openai/mock-gpt?tokens=200&pace_ms=20")
    async with go_on(nodes[1], http, stream, len(had)) as response:
        had += await read(response, 500)
        nodes[1].app[appkeys.PULSE].interrupt_all()
        with pytest.raises(aiohttp.ClientPayloadError):
            while more := await response.content.readany():
                had += more
    had += await rest(nodes[0], http, stream, len(had))
    assert had == await rest(nodes[0], http, stream) and b'"error"' not in had


async def test_a_revoked_key_ends_it_here_and_elsewhere(
    nodes: tuple[Gateway, Gateway], http: aiohttp.ClientSession
) -> None:
    nodes[0].api_key = nodes[1].api_key = await nodes[0].new_key()
    stream, _ = await cut(nodes[0], http, 500, "openai/mock-gpt?tokens=5000&pace_ms=20")
    reading = [asyncio.create_task(rest(node, http, stream)) for node in nodes]
    await asyncio.sleep(0.5)
    token = parse_token(nodes[0].api_key)
    assert token is not None
    await nodes[0].app[appkeys.KEYS].revoke(token.id, None)
    for seen in await asyncio.gather(*reading):
        assert b"key_ended" in seen.split(b"\n\n")[-2] and b"[DONE]" not in seen
    assert (await refusal(nodes[1], http, stream))[0] == 401
    await until(lambda: not runs(nodes[0], stream))


async def test_what_redis_held_of_a_killed_process_is_sent_and_that_it_is_not_whole(
    database_url: str, redis_url: str, tmp_path: Path, http: aiohttp.ClientSession, figure: Callable[[str], None]
) -> None:
    shared = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "GATEWAY_DATA_DIR": str(tmp_path)}
    async with serving(shared) as one, serving(shared) as other:
        headers = {"Authorization": f"Bearer {await new_key(one)}"}
        body = chat_body("mock-gpt?case=long&pace_ms=20", stream=True)
        url = f"{one.base_url}/chat/completions"
        response = await http.post(url, json=body, headers={**headers, **WISH})
        stream, had = response.headers["X-Request-Id"], await read(response, 3000)
        await asyncio.sleep(0.5)
        one.process.kill()
        killed = monotonic()
        with suppress(aiohttp.ClientError):
            while more := await response.content.readany():
                had += more
        async with http.get(f"{other.base_url}/streams/{stream}", headers=headers) as answer:
            assert answer.status == 200
            seen = await answer.read()
        figure(f"a resumed stream of a killed process: {len(seen)} of {len(had)} bytes, {monotonic() - killed:.1f} s")
        events, error = seen[: seen.rindex(b"data: ")], seen[seen.rindex(b"data: ") :]
        assert b"stream_interrupted" in error and b"[DONE]" not in seen
        assert had.startswith(events[: len(had)]) and len(events) > 3000
        url = f"{other.base_url}/streams/{stream}?after={len(had) + 1}"
        async with http.get(url, headers=headers) as answer:
            assert answer.status == 410
        connection = await asyncpg.connect(database_url)
        try:
            async with asyncio.timeout(30):
                while not (rows := await connection.fetch("select request_id, outcome from usage")):
                    await asyncio.sleep(0.1)
        finally:
            await connection.close()
        assert [(str(row["request_id"]), row["outcome"]) for row in rows] == [(stream, "interrupted")]

"""`X-Gateway-Resumable`: a stream goes on where its connection broke, on any node, byte for byte."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from redis.asyncio import Redis

from gateway import appkeys
from gateway.exchange import new_id
from tests.support.gateway import Gateway, chat_body, running_gateway
from tests.support.resuming import (
    SHORT,
    SLOW,
    WISH,
    begin,
    client,
    cut,
    go_on,
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


# --- byte for byte ------------------------------------------------------------------------------------------------


async def test_a_stream_that_is_cut_anywhere_goes_on_where_it_was_cut(
    nodes: tuple[Gateway, Gateway], http: aiohttp.ClientSession, figure: Callable[[str], None]
) -> None:
    """At each chunk's end, and in the middle of each; where it runs, on another node, and there when it is over."""
    whole = await (await begin(nodes[0], http, SHORT)).read()
    ends = [at + 2 for at in range(len(whole)) if whole[at : at + 2] == b"\n\n"]
    assert len(ends) > 20 and ends[-1] == len(whole)
    sizes = sorted({0, *ends, *((one + other) // 2 for one, other in zip([0, *ends], ends, strict=False))})
    few = asyncio.Semaphore(6)

    async def one(size: int, node: int, *, over: bool) -> bool:
        async with few:
            stream, had = await cut(nodes[0], http, size, SHORT)
            if over:
                await until(lambda: not runs(nodes[0], stream))
            missed = await rest(nodes[node], http, stream, len(had))
            full = await rest(nodes[1 - node], http, stream)
        assert (len(had), len(full)) == (size, len(whole))
        assert full.endswith(b"data: [DONE]\n\n")
        return had + missed == full

    ways = [(0, False), (1, False), (1, True)]
    same = await asyncio.gather(*(one(size, node, over=over) for size in sizes for node, over in ways))
    figure(f"streams cut at each chunk's end and in its middle, and continued: {sum(same)} of {len(same)} whole")
    assert all(same)


async def test_what_is_missed_comes_at_once_and_then_it_is_live(
    nodes: tuple[Gateway, Gateway], http: aiohttp.ClientSession
) -> None:
    stream, had = await cut(nodes[0], http, 3000)
    await asyncio.sleep(0.5)
    for node in nodes:
        async with go_on(node, http, stream, len(had)) as response:
            assert response.headers["X-Gateway-Stream"] == stream
            assert response.headers["X-Request-Id"] != stream
            assert response.content_type == "text/event-stream"
            await response.content.readany()
            assert runs(nodes[0], stream)
    assert len(nodes[0].calls) == 1


async def test_heartbeats_are_part_of_the_stream(
    database_url: str, redis_url: str, http: aiohttp.ClientSession
) -> None:
    often = {"GATEWAY_HEARTBEAT": "0.3"}
    async with running_gateway(database_url, redis_url, often) as one:
        async with running_gateway(database_url, redis_url, often, account=one.account_id) as other:
            other.api_key = one.api_key
            stream, had = await cut(one, http, 12, "openai/mock-gpt?ttft_ms=3000&tokens=3")
            assert had == b": ping\n\n: pi"
            followed = asyncio.create_task(rest(other, http, stream, len(had)))
            missed = await rest(one, http, stream, len(had))
            assert missed.startswith(b"ng\n\n: ping\n\n")
            assert missed.endswith(b"[DONE]\n\n")
            assert missed == await followed
            assert had + missed == await rest(other, http, stream)


async def test_completions_too(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    body = {"model": SLOW, "prompt": "Say hello.", "stream": True}
    async with http.post(f"{gateway.base_url}/completions", json=body, headers={**gateway.headers, **WISH}) as response:
        had = await read(response, 1000)
        stream = response.headers["X-Request-Id"]
    missed = await rest(gateway, http, stream, len(had))
    assert b"text_completion" in missed and missed.endswith(b"[DONE]\n\n")


async def test_a_stream_that_breaks_is_the_same_for_whoever_comes_later(
    nodes: tuple[Gateway, Gateway], http: aiohttp.ClientSession
) -> None:
    response = await begin(nodes[0], http, f"{SLOW}&fault=reset&after=10")
    seen = await response.read()
    assert b'"error"' in seen.split(b"\n\n")[-2] and b"[DONE]" not in seen
    for after in (0, len(seen) - 5, len(seen)):
        assert await rest(nodes[1], http, response.headers["X-Request-Id"], after) == seen[after:]


# --- whose it is --------------------------------------------------------------------------------------------------


async def test_nobody_else_gets_a_stream_nor_hears_that_there_is_one(
    nodes: tuple[Gateway, Gateway], http: aiohttp.ClientSession
) -> None:
    stream, _ = await cut(nodes[0], http, 500, "openai/mock-gpt?tokens=5000&pace_ms=20")
    mine = nodes[0].api_key
    strangers = [await nodes[0].new_key()]  # of the same account
    other = await nodes[0].app[appkeys.ACCOUNTS].register("other@example.com", "correct horse", registration="open")
    made = await nodes[0].app[appkeys.KEYS].create(other.id, "theirs", requests_per_minute=0, concurrent_requests=0)
    for key in (*strangers, made.token):
        for node in nodes:
            node.api_key = key
            assert await refusal(node, http, stream) == (404, "stream_not_found")
            assert await refusal(node, http, "no-such\n-stream") == (404, "stream_not_found")
    nodes[0].api_key = nodes[1].api_key = mine
    assert runs(nodes[0], stream)
    for node in nodes:
        async with go_on(node, http, stream) as response:
            assert len(await read(response, 500)) >= 500
    assert await refusal(nodes[0], http, new_id()) == (404, "stream_not_found")


async def test_what_is_wrong_with_after_is_said(nodes: tuple[Gateway, Gateway], http: aiohttp.ClientSession) -> None:
    stream, _ = await cut(nodes[0], http, 500, SHORT)
    size = len(await rest(nodes[0], http, stream))
    for wrong in ("-1", "x", "1.5", "", "1" * 16, "²"):
        assert await refusal(nodes[0], http, stream, wrong) == (400, "invalid_value")
    for node in nodes:
        async with go_on(node, http, stream, size + 1) as response:
            assert response.status == 400
            assert f"this stream has {size} bytes" in await response.text()
        assert await rest(node, http, stream, size) == b""


async def test_it_is_said_what_is_not_resumable(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    async def told(headers: dict[str, str], path: str = "chat/completions", **body: Any) -> tuple[int, str | None]:
        sent = {**chat_body("openai/mock-gpt?tokens=3"), **body}
        async with http.post(f"{gateway.base_url}/{path}", json=sent, headers={**gateway.headers, **headers}) as answer:
            await answer.read()
            return answer.status, answer.headers.get("X-Gateway-Resumable")

    assert await told({}, stream=True) == (200, None)
    assert await told(WISH, stream=False) == (200, "false")
    assert await told({"X-Gateway-Resumable": "false"}, stream=True) == (200, "false")
    assert await told({**WISH, "Idempotency-Key": "a"}, stream=True) == (200, "false")
    assert await told({**WISH, "X-Gateway-Cache": "ttl=60"}, stream=True) == (200, "true")
    assert (await told({"X-Gateway-Resumable": "yes"}, stream=True))[0] == 400


async def test_an_error_in_the_place_of_an_answer_is_no_stream(
    gateway: Gateway, http: aiohttp.ClientSession, redis: Redis
) -> None:
    body = chat_body("openai/mock-gpt?status=400", stream=True)
    async with http.post(
        f"{gateway.base_url}/chat/completions", json=body, headers={**gateway.headers, **WISH}
    ) as response:
        assert response.status == 400
    assert await refusal(gateway, http, response.headers["X-Request-Id"]) == (404, "stream_not_found")
    assert await redis.keys("aig:stream:*") == []

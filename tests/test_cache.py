"""The response cache: what is kept, what is replayed, and what never is."""

import asyncio
import statistics
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import openai
import pytest
from multidict import CIMultiDict

from gateway import appkeys
from gateway.mock import Mock
from tests.benchmarks.processes import cpu_us
from tests.support import asking
from tests.support.asking import MODEL, Got, settled
from tests.support.gateway import Gateway, chat_body, running_gateway
from tests.support.process import Served, new_key, serving

pytestmark = pytest.mark.integration

TTL = {"X-Gateway-Cache": "ttl=60"}


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


async def ask(gateway: Gateway, http: aiohttp.ClientSession, *arguments: Any, **more: Any) -> Got:
    """As all do here that say nothing else: with a ttl."""
    return await asking.ask(gateway, http, *arguments, **{**more, "headers": {**TTL, **more.pop("headers", {})}})


# --- hits ---------------------------------------------------------------------------------------------------------


async def test_a_stream_is_replayed_byte_for_byte_with_its_chunks_and_no_provider(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    miss = await ask(gateway, http, f"{MODEL}&pace_ms=5")
    hit = await ask(gateway, http, f"{MODEL}&pace_ms=5")
    assert (miss.cache, hit.cache) == ("miss", "hit")
    assert hit.body == miss.body
    assert hit.body.endswith(b"data: [DONE]\n\n")
    assert [data for _, data in hit.pieces] == [data for _, data in miss.pieces]
    assert len(hit.pieces) > 15
    assert len(gateway.calls) == 1


async def test_headers_of_a_hit_are_its_own_but_for_who_answered(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    miss = await ask(gateway, http)
    await asyncio.sleep(1.05)
    hit = await ask(gateway, http)
    assert "Age" not in miss.headers
    assert 1 <= int(hit.headers["Age"]) < 30
    assert hit.headers["X-Request-Id"] != miss.headers["X-Request-Id"]
    for name in ("X-Gateway-Provider", "X-Gateway-Model", "Content-Type"):
        assert hit.headers[name] == miss.headers[name]


async def test_whole_answers_completions_and_embeddings_are_kept_too(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    requests: list[dict[str, Any]] = [
        {"stream": False},
        {"path": "/completions", "body": {"model": MODEL, "prompt": "Say hello.", "max_tokens": 100}},
        {"path": "/completions", "body": {"model": MODEL, "prompt": "Hello.", "max_tokens": 100, "stream": True}},
        {"path": "/embeddings", "body": {"model": "openai/mock-embed", "input": ["a", "b"]}},
    ]
    for request in requests:
        before = len(gateway.calls)
        miss, hit = await ask(gateway, http, **request), await ask(gateway, http, **request)
        assert (miss.status, miss.cache, hit.cache) == (200, "miss", "hit")
        assert hit.body == miss.body
        assert len(gateway.calls) == before + 1


@pytest.mark.parametrize("model", ["anthropic/mock-claude?tokens=5", "ollama/mock-llama?tokens=5"])
async def test_answers_of_every_dialect_are_kept(gateway: Gateway, http: aiohttp.ClientSession, model: str) -> None:
    miss, hit = await ask(gateway, http, model), await ask(gateway, http, model)
    assert (hit.cache, hit.body) == ("hit", miss.body)


async def test_at_its_recorded_pace_a_stream_comes_as_it_came(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    model = "openai/mock-gpt?tokens=10&pace_ms=60"
    await ask(gateway, http, model)
    at_once = await ask(gateway, http, model)
    paced = await ask(gateway, http, model, headers={"X-Gateway-Cache": "ttl=60, pace=recorded"})
    assert paced.body == at_once.body
    assert paced.cache == "hit"
    assert paced.pieces[-1][0] > 0.4
    assert at_once.pieces[-1][0] < paced.pieces[-1][0] / 2


async def test_a_client_of_http_1_0_gets_it_too(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    miss = await ask(gateway, http)
    async with aiohttp.ClientSession(version=aiohttp.HttpVersion10) as old:
        hit = await ask(gateway, old)
    assert (hit.cache, hit.body) == ("hit", miss.body)


async def test_an_answer_of_a_megabyte_is_replayed_to_a_slow_reader(database_url: str, redis_url: str) -> None:
    environ = {"GATEWAY_CACHE_MAX_ANSWER": str(4 << 20)}
    async with running_gateway(database_url, redis_url, environ) as gateway:
        async with aiohttp.ClientSession(read_bufsize=1 << 12) as http:
            miss = await ask(gateway, http, "openai/mock-gpt?tokens=8000")
            assert len(miss.body) > 1 << 20
            headers = {**gateway.headers, **TTL}
            body = chat_body("openai/mock-gpt?tokens=8000", stream=True)
            async with http.post(f"{gateway.base_url}/chat/completions", json=body, headers=headers) as response:
                assert response.headers["X-Gateway-Cache"] == "hit"
                await asyncio.sleep(0.5)
                assert await response.read() == miss.body


async def test_who_does_not_read_a_hit_is_dropped(database_url: str, redis_url: str) -> None:
    environ = {"GATEWAY_CACHE_MAX_ANSWER": str(8 << 20), "GATEWAY_WRITE_TIMEOUT": "0.5"}
    async with running_gateway(database_url, redis_url, environ) as gateway, aiohttp.ClientSession() as http:
        model = "openai/mock-gpt?tokens=20000"
        miss = await ask(gateway, http, model)
        assert len(miss.body) > 5 << 20
        async with aiohttp.ClientSession(read_bufsize=1 << 10) as slow:
            headers = {**gateway.headers, **TTL}
            body = chat_body(model, stream=True)
            response = await slow.post(f"{gateway.base_url}/chat/completions", json=body, headers=headers)
            assert response.headers["X-Gateway-Cache"] == "hit"
            async with asyncio.timeout(20):
                while gateway.app[appkeys.PULSE].open_exchanges:
                    await asyncio.sleep(0.05)
            response.close()
        assert len(gateway.calls) == 1


async def test_a_shutdown_lets_a_replay_finish_and_ends_one_that_would_not(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    model = "openai/mock-gpt?tokens=20&pace_ms=50"
    whole = await ask(gateway, http, model)
    paced = {**gateway.headers, "X-Gateway-Cache": "ttl=60, pace=recorded"}

    async def begin() -> aiohttp.ClientResponse:
        body = chat_body(model, stream=True)
        response = await http.post(f"{gateway.base_url}/chat/completions", json=body, headers=paced)
        await response.content.readany()
        return response

    response = await begin()
    draining = asyncio.create_task(gateway.app[appkeys.PULSE].drain(10))
    rest = await response.read()
    assert whole.body.endswith(rest)
    await draining
    response = await begin()
    await gateway.app[appkeys.PULSE].drain(0.1)
    rest = await response.read()
    assert b"server_shutting_down" in rest
    assert b"[DONE]" not in rest


async def test_the_sdk_gets_the_same_objects(gateway: Gateway) -> None:
    async with openai.AsyncOpenAI(base_url=gateway.base_url, api_key=gateway.api_key) as client:
        said = []
        for _ in range(2):
            stream = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Hi."}], stream=True, extra_headers=TTL
            )
            said.append([chunk.to_dict() async for chunk in stream])
            await settled(gateway)
    assert said[0] == said[1]
    assert len(gateway.calls) == 1


# --- it survives, and is shared by nodes ---------------------------------------------------------------------------


async def test_it_survives_a_restart_and_serves_every_node(database_url: str, redis_url: str) -> None:
    provider = Mock()
    environ = {"OPENAI_BASE_URL": f"{await provider.start()}/v1"}
    try:
        async with aiohttp.ClientSession() as http:
            async with running_gateway(database_url, redis_url, environ) as first:
                miss = await ask(first, http)
            async with (
                running_gateway(database_url, redis_url, environ, account=first.account_id) as second,
                running_gateway(database_url, redis_url, environ, account=first.account_id) as third,
            ):
                for node in (second, third):
                    hit = await ask(node, http)
                    assert (hit.cache, hit.body) == ("hit", miss.body)
        assert len([call for call in provider.received if call.method == "POST"]) == 1
    finally:
        await provider.stop()


# --- rows ---------------------------------------------------------------------------------------------------------


async def test_a_hit_costs_nothing_and_its_row_says_what_it_saved(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    miss, hit = await ask(gateway, http), await ask(gateway, http)
    paid, free = await gateway.rows()
    assert str(paid["request_id"]) == miss.headers["X-Request-Id"] == str(free["source_id"])
    assert str(free["request_id"]) == hit.headers["X-Request-Id"]
    assert (paid["source"], free["source"]) == ("provider", "cache")
    assert (free["prompt_tokens"], free["completion_tokens"], free["outcome"]) == (0, 0, "ok")
    assert free["saved_tokens"] == paid["prompt_tokens"] + paid["completion_tokens"] > 0


async def test_several_lines_of_one_header_are_one_list(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    headers = CIMultiDict({**gateway.headers, **TTL})
    headers.extend([("Cache-Control", "max-age=60"), ("Cache-Control", "no-store")])
    async with http.post(f"{gateway.base_url}/chat/completions", json=chat_body(MODEL), headers=headers) as response:
        assert response.headers["X-Gateway-Cache"] == "bypass"


# --- what it costs ------------------------------------------------------------------------------------------------


class Measured:
    """Streams of 64 chunks through a gateway that is a process of its own, and its CPU."""

    def __init__(self, served: Served, http: aiohttp.ClientSession, key: str) -> None:
        self._served, self._http, self._key = served, http, key

    async def some(self, model: str, words: str, cache: str | None, count: int) -> float:
        """Microseconds a request, of which each must have this X-Gateway-Cache."""
        before = cpu_us([self._served.process.pid])[self._served.process.pid]
        for start in range(0, count, 5):
            await asyncio.gather(*(self._one(model, f"{words} {n}", cache) for n in range(start, start + 5)))
        await asyncio.sleep(1)  # what is left is written, and belongs to it
        return (cpu_us([self._served.process.pid])[self._served.process.pid] - before) / count

    async def round(self, provider: Mock, model: str, number: int, count: int) -> tuple[float, float, float]:
        """Without a cache, a miss, a hit."""
        found = []
        for cache in (None, "miss", "hit"):
            before = len(provider.received)
            found.append(await self.some(model, f"round {number}", cache, count))
            asked = [call for call in provider.received[before:] if call.method == "POST"]
            assert len(asked) == (0 if cache == "hit" else count)
        none, miss, hit = found
        return none, miss, hit

    async def _one(self, model: str, words: str, cache: str | None) -> None:
        headers = {"Authorization": f"Bearer {self._key}", **(TTL if cache else {})}
        url, body = f"{self._served.base_url}/chat/completions", chat_body(model, words, stream=True)
        async with self._http.post(url, json=body, headers=headers) as response:
            assert response.headers.get("X-Gateway-Cache") == cache
            assert (await response.read()).endswith(b"[DONE]\n\n")


async def test_a_hit_takes_under_a_third_of_the_cpu_of_a_miss_and_touches_no_provider(
    database_url: str, redis_url: str, figure: Callable[[str], None]
) -> None:
    """Of chunks that come one by one, as a provider sends them, 4 ms apart, and of those that come all at once."""
    provider = Mock()
    environ = {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "GATEWAY_MOCK": "off",
        "OPENAI_API_KEY": "sk-test",
        "OPENAI_BASE_URL": f"{await provider.start()}/v1",
        "LOG_LEVEL": "warning",
    }
    model = "openai/mock-gpt?tokens=64"
    try:
        async with serving(environ, coverage=False) as served, aiohttp.ClientSession() as http:
            measured = Measured(served, http, await new_key(served))
            for cache in ("miss", "hit"):
                await measured.some(model, "warm", cache, 10)
            rounds = [
                (pace, [await measured.round(provider, f"{model}&pace_ms={pace}", n, count) for n in range(3)])
                for pace, count in (("4", 50), ("0", 150))
            ]
    finally:
        await provider.stop()
    ratios = []
    for pace, found in rounds:
        none, miss, hit = (statistics.median(each) for each in zip(*found, strict=True))
        ratios.append(statistics.median(hit / miss for _, miss, hit in found))  # of neighbours in time
        figure(
            f"cache, 64 chunks that come {'one by one' if pace == '4' else 'all at once'}: a hit {hit:,.0f} µs of CPU,"
            f" a miss {miss:,.0f} ({ratios[-1]:.2f}), without a cache {none:,.0f}"
        )
    assert max(ratios) < 1 / 3

"""What the page of a whole gateway shows while it works."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway import appkeys
from gateway.labels import POOL_STATES
from tests.support.gateway import Gateway, chat_body, running_gateway

pytestmark = pytest.mark.integration


class Page:
    """A scrape. What is not on it is no number: asking for it fails."""

    def __init__(self, text: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of all series of this name that have these labels."""
        found = [s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items()]
        assert found, f"{name}{labels} is not on the page"
        return sum(found)


@asynccontextmanager
async def scraped(database_url: str, redis_url: str) -> AsyncIterator[tuple[Gateway, aiohttp.ClientSession]]:
    async with running_gateway(database_url, redis_url) as gateway, aiohttp.ClientSession() as client:
        yield gateway, client


async def scrape(gateway: Gateway, client: aiohttp.ClientSession) -> Page:
    async with client.get(f"{gateway.root_url}/metrics") as response:
        return Page(await response.text())


async def scrape_until(gateway: Gateway, client: aiohttp.ClientSession, true: Callable[[Page], bool]) -> Page:
    async with asyncio.timeout(15):
        while not true(page := await scrape(gateway, client)):
            await asyncio.sleep(0.05)
    return page


async def test_tokens_and_gaps_move_while_a_stream_runs(database_url: str, redis_url: str) -> None:
    async with scraped(database_url, redis_url) as (gateway, client):
        body = chat_body("openai/mock-gpt?tokens=100000&pace_ms=20", stream=True)
        async with client.post(f"{gateway.base_url}/chat/completions", json=body, headers=gateway.headers) as response:
            await response.content.readany()

            def tokens(page: Page) -> float:
                return page("gateway_tokens_total", provider="openai", kind="completion")

            def gaps(page: Page) -> float:
                return page("gateway_inter_token_seconds_count", provider="openai")

            early = await scrape_until(gateway, client, lambda page: tokens(page) > 0 and gaps(page) > 0)
            later = await scrape_until(
                gateway, client, lambda page: tokens(page) > tokens(early) + 10 and gaps(page) > gaps(early) + 10
            )
            assert later("gateway_streams_open") == 1
            of_one = later("gateway_inter_token_seconds_sum", provider="openai") / gaps(later)
            assert of_one > 0.015
        over = await scrape_until(gateway, client, lambda page: page("gateway_streams_open") == 0)
        assert tokens(over) >= tokens(later)


async def test_a_request_that_is_not_streamed_has_no_gaps(database_url: str, redis_url: str) -> None:
    async with scraped(database_url, redis_url) as (gateway, client):
        async with client.post(
            f"{gateway.base_url}/chat/completions", json=chat_body("openai/mock-gpt"), headers=gateway.headers
        ) as response:
            assert response.status == 200
        page = await scrape(gateway, client)
        assert page("gateway_request_duration_ms_count", provider="openai") == 1
        assert page("gateway_inter_token_seconds_count", provider="openai") == 0


async def test_the_pool_shows_which_connections_are_used(database_url: str, redis_url: str) -> None:
    async with scraped(database_url, redis_url) as (gateway, client):

        def states(page: Page) -> dict[str, float]:
            return {state: page("gateway_pg_pool_connections", state=state) for state in POOL_STATES}

        page = await scrape_until(gateway, client, lambda page: states(page)["used"] == 0)
        assert states(page)["idle"] >= 2
        assert page("gateway_pg_pool_size_max") == 10
        pool = gateway.app[appkeys.POOL]
        async with pool.acquire(), pool.acquire(), pool.acquire():
            page = await scrape_until(gateway, client, lambda page: states(page)["used"] >= 3)
            assert sum(states(page).values()) <= 10


async def test_a_key_is_looked_up_once_however_often_it_is_used(database_url: str, redis_url: str) -> None:
    async with scraped(database_url, redis_url) as (gateway, client):
        for _ in range(3):
            async with client.get(f"{gateway.base_url}/models", headers=gateway.headers) as response:
                assert response.status == 200
        assert (await scrape(gateway, client))("gateway_key_lookups_total") == 1


async def test_what_is_counted_live_is_what_is_billed_in_the_end(database_url: str, redis_url: str) -> None:
    """A counter never goes down: what is counted while a stream runs may not be more than its provider says then."""
    async with scraped(database_url, redis_url) as (gateway, client):
        for model in ("openai/mock-gpt", "anthropic/mock-claude", "ollama/mock-llama"):
            body = chat_body(f"{model}?tokens=300", stream=True)
            async with client.post(
                f"{gateway.base_url}/chat/completions", json=body, headers=gateway.headers
            ) as response:
                assert (await response.read()).endswith(b"[DONE]\n\n")
        billed = sum(row["completion_tokens"] for row in await gateway.rows())
        assert billed == 900
        page = await scrape(gateway, client)
        assert page("gateway_tokens_total", kind="completion") == billed

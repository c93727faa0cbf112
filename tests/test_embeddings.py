"""Embeddings by the names that everybody uses, and what a budget holds for them before anybody is asked."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.support.gateway import Gateway, running_gateway

pytestmark = pytest.mark.integration


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


async def embed(gateway: Gateway, key: str, value: Any, model: str = "text-embedding-3-small") -> tuple[int, Any]:
    """The status, and the error's code."""
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client:
        body = {"model": model, "input": value}
        async with client.post(f"{gateway.base_url}/embeddings", json=body) as response:
            return response.status, (await response.json()).get("error", {}).get("code")


async def test_openais_embeddings_are_priced_and_others_go_to_ollama(gateway: Gateway) -> None:
    assert await embed(gateway, gateway.api_key, [[7] * 500] * 2) == (200, None)
    await embed(gateway, gateway.api_key, "hello", "nomic-embed-text")  # which the mock does not have
    assert [call.path for call in gateway.calls] == ["/v1/embeddings", "/api/embed"]
    first = (await gateway.rows())[0]
    assert (first["provider"], first["prompt_tokens"], first["cost_micros"]) == ("openai", 1000, 20)


@pytest.mark.parametrize("value", [[7] * 1001, [[7] * 500, [7] * 501], ["abcdefg" * 250] * 2 + ["a"]])
async def test_an_input_that_a_budget_has_no_room_for_reaches_nobody(gateway: Gateway, value: Any) -> None:
    key = await gateway.new_key(tokens_per_day=1000)
    assert await embed(gateway, key, value) == (429, "insufficient_quota")
    assert gateway.calls == []
    assert await embed(gateway, key, value[:1]) == (200, None)


async def test_tokens_without_end_are_refused_before_a_provider_is_asked(gateway: Gateway) -> None:
    assert await embed(gateway, gateway.api_key, [1] * 5_000_000) == (400, "invalid_value")
    assert gateway.calls == []

"""The official Python SDK's completions and embeddings, against every provider that has them."""

import struct
from base64 import b64decode
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI

from gateway.mock.embeddings import vector
from tests.support.gateway import MODELS, Gateway, running_gateway

pytestmark = pytest.mark.integration

ABLE = ["openai", "ollama"]


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=gateway.base_url, api_key=gateway.api_key, max_retries=0) as client:
        yield client


# --- completions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ABLE)
async def test_a_streamed_completion_and_a_whole_one_say_the_same(
    gateway: Gateway, client: AsyncOpenAI, dialect: str
) -> None:
    asked: Any = {"model": MODELS[dialect], "prompt": "Say hello.", "max_tokens": 40}
    stream = await client.completions.create(stream=True, stream_options={"include_usage": True}, **asked)
    chunks = [chunk async for chunk in stream]
    whole = await client.completions.create(**asked)
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert len(texts) > 5
    assert "".join(texts) == whole.choices[0].text
    assert (whole.object, whole.choices[0].finish_reason) == ("text_completion", "length")
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["length"]
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 40
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert all(chunk.id.startswith("cmpl-") for chunk in chunks)


@pytest.mark.parametrize("dialect", ABLE)
async def test_completions_leave_rows_with_the_providers_counts(
    gateway: Gateway, client: AsyncOpenAI, dialect: str
) -> None:
    asked: Any = {"model": MODELS[dialect], "prompt": "Say hello.", "max_tokens": 12}
    _ = [chunk async for chunk in await client.completions.create(stream=True, **asked)]
    await client.completions.create(**asked)
    rows = await gateway.rows()
    assert [row["completion_tokens"] for row in rows] == [12, 12]
    assert {(row["outcome"], row["usage_source"], row["finish_reason"]) for row in rows} == {
        ("ok", "provider", "length")
    }


async def test_the_bytes_of_an_openai_completion_pass_untouched(gateway: Gateway) -> None:
    body = b'{ "model":"openai/mock-gpt",\n "prompt":["a","b"], "n":1 }'
    async with aiohttp.ClientSession(headers=gateway.headers) as session:
        headers = {"Content-Type": "application/json"}
        async with session.post(f"{gateway.base_url}/completions", data=body, headers=headers) as response:
            assert response.status == 200
            assert len((await response.json())["choices"]) == 2
    assert gateway.calls[-1].body == body.replace(b"openai/mock-gpt", b"mock-gpt")


async def test_a_completion_under_a_budget_is_cut_where_the_budget_ends(gateway: Gateway) -> None:
    key = await gateway.new_key(tokens_per_day=60)
    async with AsyncOpenAI(base_url=gateway.base_url, api_key=key, max_retries=0) as client:
        asked: Any = {"model": MODELS["openai"], "prompt": "Say hello.", "max_tokens": 400}
        stream = await client.completions.create(stream=True, stream_options={"include_usage": True}, **asked)
        chunks = [chunk async for chunk in stream]
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["length"]
    assert chunks[-1].usage is not None
    [row] = await gateway.rows()
    assert row["outcome"] == "budget_exhausted"
    assert 50 <= row["prompt_tokens"] + row["completion_tokens"] <= 60 + 1


async def test_a_whole_completion_under_a_budget_is_put_together_from_a_stream(gateway: Gateway) -> None:
    key = await gateway.new_key(tokens_per_day=100_000)
    async with AsyncOpenAI(base_url=gateway.base_url, api_key=key, max_retries=0) as client:
        asked: Any = {"model": MODELS["openai"], "prompt": ["Say hello.", "And again."], "max_tokens": 20}
        budgeted = await client.completions.create(**asked)
    async with AsyncOpenAI(base_url=gateway.base_url, api_key=gateway.api_key, max_retries=0) as client:
        plain = await client.completions.create(**asked)
    assert budgeted.choices == plain.choices
    assert budgeted.usage == plain.usage
    assert budgeted.object == "text_completion"


async def test_best_of_cannot_be_held_to_a_budget(gateway: Gateway) -> None:
    """It cannot be streamed, so it cannot be ended in the middle."""
    key = await gateway.new_key(tokens_per_day=1000)
    async with AsyncOpenAI(base_url=gateway.base_url, api_key=key, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="best_of"):
            await client.completions.create(model=MODELS["openai"], prompt="a", best_of=20, max_tokens=4000)
    assert gateway.calls == []


# --- embeddings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ABLE)
@pytest.mark.parametrize("asked", [{}, {"encoding_format": "float"}, {"dimensions": 64}], ids=["base64", "float", "64"])
async def test_embeddings_are_the_providers(
    gateway: Gateway, client: AsyncOpenAI, dialect: str, asked: dict[str, Any]
) -> None:
    """The SDK asks for base64 where nothing is said, and unpacks it."""
    texts = ["the quick brown fox", "jumps"]
    made = await client.embeddings.create(model=MODELS[dialect], input=texts, **asked)
    size = asked.get("dimensions", 256)
    assert [list(row.embedding) for row in made.data] == [vector(text, size) for text in texts]
    assert [row.index for row in made.data] == [0, 1]
    assert made.usage.prompt_tokens == made.usage.total_tokens > 0
    [row] = await gateway.rows()
    counted = (row["prompt_tokens"], row["completion_tokens"], row["usage_source"], row["stream"])
    assert counted == (made.usage.prompt_tokens, 0, "provider", False)


async def test_base64_is_what_the_client_gets_when_it_asks_for_it(gateway: Gateway) -> None:
    for dialect in ABLE:
        body = {"model": MODELS[dialect], "input": "fox", "encoding_format": "base64"}
        async with aiohttp.ClientSession(headers=gateway.headers) as session:
            async with session.post(f"{gateway.base_url}/embeddings", json=body) as response:
                packed = b64decode((await response.json())["data"][0]["embedding"])
        assert list(struct.unpack("<256f", packed)) == vector("fox", 256)


async def test_tokens_can_be_embedded_where_the_provider_takes_them(gateway: Gateway, client: AsyncOpenAI) -> None:
    one = await client.embeddings.create(model=MODELS["openai"], input=[1, 2, 3])
    several = await client.embeddings.create(model=MODELS["openai"], input=[[1, 2, 3], [4]])
    assert (len(one.data), one.usage.prompt_tokens) == (1, 3)
    assert (len(several.data), several.usage.prompt_tokens) == (2, 4)
    with pytest.raises(openai.BadRequestError, match="no tokens"):
        await client.embeddings.create(model=MODELS["ollama"], input=[1, 2, 3])


async def test_a_budget_pays_for_embeddings_what_they_used(gateway: Gateway) -> None:
    key = await gateway.new_key(tokens_per_day=20)
    async with AsyncOpenAI(base_url=gateway.base_url, api_key=key, max_retries=0) as client:
        used = 0
        with pytest.raises(openai.RateLimitError) as refused:
            for _ in range(20):
                made = await client.embeddings.create(model=MODELS["openai"], input="the quick brown fox")
                used += made.usage.total_tokens
    assert refused.value.code == "insufficient_quota"
    assert 10 <= used <= 20
    assert sum(row["prompt_tokens"] for row in await gateway.rows()) == used


# --- who has none -------------------------------------------------------------------------------------------------


async def test_a_provider_without_the_endpoint_is_a_clear_400(gateway: Gateway, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.completions.create(model=MODELS["anthropic"], prompt="Hello")
    assert refused.value.code == "unsupported_endpoint"
    assert "anthropic has no completions" in str(refused.value)
    with pytest.raises(openai.BadRequestError, match="anthropic has no embeddings"):
        await client.embeddings.create(model=MODELS["anthropic"], input="Hello")
    assert gateway.calls == []
    assert await gateway.rows() == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": {}}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": ["a", 1]}, "prompt"),
        ("completions", {"prompt": [True]}, "prompt"),
        ("completions", {"prompt": "a", "logprobs": True}, "logprobs"),
        ("completions", {"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ("completions", {"prompt": "a", "stream_options": {}}, "stream_options"),
        ("embeddings", {}, "input"),
        ("embeddings", {"input": ""}, "input"),
        ("embeddings", {"input": ["a", ""]}, "input"),
        ("embeddings", {"input": [[]]}, "input"),
        ("embeddings", {"input": [-1]}, "input"),
        ("embeddings", {"input": ["a"] * 2049}, "input"),
        ("embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("embeddings", {"input": "a", "dimensions": 0}, "dimensions"),
    ],
)
async def test_what_is_wrong_is_named_before_anything_is_sent(
    gateway: Gateway, path: str, body: dict[str, Any], param: str
) -> None:
    async with aiohttp.ClientSession(headers=gateway.headers) as session:
        async with session.post(f"{gateway.base_url}/{path}", json={"model": "openai/mock-gpt", **body}) as response:
            error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, param)
    assert gateway.calls == []

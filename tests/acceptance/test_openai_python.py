"""The official Python SDK against every dialect: what its user sees must not depend on who answers."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from time import monotonic
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.support.gateway import MODELS, Gateway, running_gateway

pytestmark = pytest.mark.integration

DIALECTS = list(MODELS)
HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME: Any = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
# A red pixel.
PNG = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


def sync_client(gateway: Gateway, **more: Any) -> OpenAI:
    return OpenAI(**{"base_url": gateway.base_url, "api_key": gateway.api_key, "max_retries": 0, **more})


def async_client(gateway: Gateway, **more: Any) -> AsyncOpenAI:
    return AsyncOpenAI(**{"base_url": gateway.base_url, "api_key": gateway.api_key, "max_retries": 0, **more})


async def collect(gateway: Gateway, *, sync: bool, **request: Any) -> list[Any]:
    """All chunks of a stream, by the sync or the async client."""
    if sync:

        def run() -> list[Any]:
            with sync_client(gateway) as client:
                return list(client.chat.completions.create(stream=True, **request))

        return await asyncio.to_thread(run)
    async with async_client(gateway) as client:
        return [chunk async for chunk in await client.chat.completions.create(stream=True, **request)]


def text_of(chunks: list[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def tool_calls_of(chunks: list[Any]) -> list[tuple[str, str, str]]:
    """(id, name, arguments) by index, assembled as the API's reference says."""
    calls: dict[int, list[str]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            for delta in choice.delta.tool_calls or []:
                call = calls.setdefault(delta.index, ["", "", ""])
                call[0] += delta.id or ""
                call[1] += delta.function.name or ""
                call[2] += delta.function.arguments or ""
    return [(call[0], call[1], call[2]) for _, call in sorted(calls.items())]


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "async"])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_stream_and_a_whole_answer_say_the_same(gateway: Gateway, dialect: str, sync: bool) -> None:
    chunks = await collect(
        gateway, sync=sync, model=MODELS[dialect], messages=HELLO, stream_options={"include_usage": True}
    )
    async with async_client(gateway) as client:
        whole = await client.chat.completions.create(model=MODELS[dialect], messages=HELLO)
    assert len(chunks) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert text_of(chunks) == whole.choices[0].message.content
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["stop"]
    assert whole.choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "async"])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_tool_is_called_and_its_result_is_used(gateway: Gateway, dialect: str, sync: bool) -> None:
    messages: Any = [{"role": "user", "content": "Use the tool for Paris."}]
    chunks = await collect(gateway, sync=sync, model=MODELS[dialect], messages=messages, tools=[WEATHER])
    [(call_id, name, arguments)] = tool_calls_of(chunks)
    assert call_id
    assert name == "get_weather"
    assert isinstance(json.loads(arguments)["city"], str)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"

    messages += [
        {
            "role": "assistant",
            "tool_calls": [{"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}],
        },
        {"role": "tool", "tool_call_id": call_id, "content": "18 degrees and rain"},
    ]
    async with async_client(gateway) as client:
        whole = await client.chat.completions.create(model=MODELS[dialect], messages=messages, tools=[WEATHER])
    assert "18 degrees and rain" in (whole.choices[0].message.content or "")


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_parallel_tools_are_told_apart(gateway: Gateway, dialect: str) -> None:
    request: Any = {
        "model": f"{MODELS[dialect]}?case=parallel_tools",
        "messages": [{"role": "user", "content": "Use both."}],
        "tools": [WEATHER, TIME],
    }
    chunks = await collect(gateway, sync=False, **request)
    async with async_client(gateway) as client:
        whole = await client.chat.completions.create(**request)
    for calls in (
        tool_calls_of(chunks),
        [(call.id, call.function.name, call.function.arguments) for call in whole.choices[0].message.tool_calls or []],
    ):
        assert [name for _, name, _ in calls] == ["get_weather", "get_time"]
        assert len({call_id for call_id, _, _ in calls}) == 2
        assert all(isinstance(json.loads(arguments), dict) for _, _, arguments in calls)
    assert whole.choices[0].finish_reason == "tool_calls"


class Answer(BaseModel):
    name: str
    count: int


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_structured_output_is_parsed_by_the_sdk(gateway: Gateway, dialect: str) -> None:
    async with async_client(gateway) as client:
        parsed = await client.chat.completions.parse(model=MODELS[dialect], messages=HELLO, response_format=Answer)
        assert isinstance(parsed.choices[0].message.parsed, Answer)
        async with client.chat.completions.stream(
            model=MODELS[dialect], messages=HELLO, response_format=Answer
        ) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.parsed == parsed.choices[0].message.parsed


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_an_image_reaches_the_provider(gateway: Gateway, dialect: str) -> None:
    content: Any = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": PNG}}]
    async with async_client(gateway) as client:
        answer = await client.chat.completions.create(
            model=MODELS[dialect], messages=[{"role": "user", "content": content}]
        )
    assert "1 image" in (answer.choices[0].message.content or "")
    assert PNG.split(",")[1] in gateway.calls[-1].body.decode()


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_thinking_is_reasoning_content(gateway: Gateway, dialect: str) -> None:
    chunks = await collect(gateway, sync=False, model=f"{MODELS[dialect]}?case=thinking", messages=HELLO)
    reasoning = "".join(
        getattr(choice.delta, "reasoning_content", None) or "" for chunk in chunks for choice in chunk.choices
    )
    assert reasoning
    assert text_of(chunks)
    assert reasoning not in text_of(chunks)


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
async def test_a_refusal_is_one(gateway: Gateway, dialect: str) -> None:
    async with async_client(gateway) as client:
        answer = await client.chat.completions.create(model=f"{MODELS[dialect]}?case=refusal", messages=HELLO)
    assert answer.choices[0].message.refusal
    if dialect == "anthropic":
        assert answer.choices[0].finish_reason == "content_filter"


async def test_several_choices_come_from_the_provider_that_has_them_and_are_refused_elsewhere(gateway: Gateway) -> None:
    chunks = await collect(gateway, sync=False, model=MODELS["openai"], messages=HELLO, n=3)
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1, 2}
    async with async_client(gateway) as client:
        for dialect in ("anthropic", "ollama"):
            with pytest.raises(openai.BadRequestError) as refused:
                await client.chat.completions.create(model=MODELS[dialect], messages=HELLO, n=3)
            assert refused.value.param == "n"


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])  # Ollama has no such count
async def test_cached_tokens_are_a_part_of_the_prompt(gateway: Gateway, dialect: str) -> None:
    async with async_client(gateway) as client:
        answer = await client.chat.completions.create(
            model=f"{MODELS[dialect]}?prompt_tokens=100&cached_tokens=60", messages=HELLO
        )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 100
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 60


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "async"])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_breaking_off_early_closes_the_provider(gateway: Gateway, dialect: str, sync: bool) -> None:
    request: Any = {"model": f"{MODELS[dialect]}?case=long&pace_ms=10", "messages": HELLO, "stream": True}

    def run_sync() -> None:
        with sync_client(gateway) as client, client.chat.completions.create(**request) as stream:
            for number, _ in enumerate(stream):
                if number == 5:
                    return

    if sync:
        await asyncio.to_thread(run_sync)
    else:
        async with async_client(gateway) as client:
            async with await client.chat.completions.create(**request) as stream:
                async for _ in stream:
                    break
    deadline = monotonic() + 1
    while gateway.calls[-1].client_gone_at is None:
        assert monotonic() < deadline, "the provider's connection was not closed within 1 s"
        await asyncio.sleep(0.01)
    [row] = await gateway.rows()
    assert row["outcome"] == "client_abort"


EXCEPTIONS: list[tuple[str, type[openai.APIStatusError], int]] = [
    ("status=400", openai.BadRequestError, 400),
    ("status=404", openai.NotFoundError, 404),
    ("status=422", openai.UnprocessableEntityError, 422),
    ("status=429&retry_after=3", openai.RateLimitError, 429),
    ("status=500", openai.InternalServerError, 502),
    ("status=503", openai.InternalServerError, 503),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_errors_raise_the_exception_class_that_a_user_expects(
    gateway: Gateway, dialect: str, stream: bool
) -> None:
    async with async_client(gateway) as client:
        create: Callable[..., Any] = client.chat.completions.create
        for query, kind, status in EXCEPTIONS:
            with pytest.raises(kind) as raised:
                await create(model=f"{MODELS[dialect]}?{query}", messages=HELLO, stream=stream)
            assert raised.value.status_code == status
            assert raised.value.request_id
            assert isinstance(raised.value.body, dict)
            assert raised.value.body["message"]
    async with async_client(gateway, api_key="aig_wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(model=MODELS[dialect], messages=HELLO)
    with sync_client(gateway, api_key="sk-wrong") as client_sync, pytest.raises(openai.AuthenticationError):
        await asyncio.to_thread(client_sync.chat.completions.create, model=MODELS[dialect], messages=HELLO)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_stream_that_breaks_raises(gateway: Gateway, dialect: str) -> None:
    with pytest.raises(openai.APIError) as raised:
        await collect(gateway, sync=False, model=f"{MODELS[dialect]}?fault=cut&after=3", messages=HELLO)
    assert raised.value.code == "upstream_truncated"


async def test_the_sdks_own_retry_gets_through_a_provider_that_failed_once(gateway: Gateway) -> None:
    async with async_client(gateway, max_retries=2) as client:
        answer = await client.chat.completions.create(
            model="openai/mock-gpt?status=503&retry_after=1&times=1", messages=HELLO
        )
    assert answer.choices[0].message.content


async def test_models_are_listed_and_retrieved(gateway: Gateway) -> None:
    from gateway import appkeys

    await gateway.app[appkeys.CATALOGUE].refresh()
    async with async_client(gateway) as client:
        listed = [model.id async for model in client.models.list()]
        assert "openai/mock-gpt" in listed
        assert (await client.models.retrieve("openai/mock-gpt")).id == "openai/mock-gpt"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("nothing")

"""Budgets under more streams than they allow, over two gateways: never overspent, never refused too early."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from redis.asyncio import Redis

from tests.support.deployment import MANY, PRICE, Deployment, Streamed, deployed
from tests.support.gateway import MODELS, chat_body
from tests.support.process import until

pytestmark = pytest.mark.integration

SLICE = 256  # output tokens of a stream that are reserved at a time
CHUNK = 3  # tokens of the mock's longest
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("look", "find")
]


@pytest.fixture
async def deployment(database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(database_url, redis_url, tmp_path) as deployment:
        yield deployment


# --- the race -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["cost_per_day", "tokens_per_day"])
async def test_four_times_more_streams_than_a_budget_allows_overspend_it_by_at_most_a_chunk_each(
    deployment: Deployment, figure: Callable[[str], None], what: str
) -> None:
    allowed, streams = 4_600, 40  # tokens; of the streams ten would fit
    unit = 1 if what == "tokens_per_day" else PRICE / 1e6  # of a token
    limits: dict[str, Any] = {what: round(allowed * unit, 6)}
    key = await deployment.new_key(**limits)
    raced = await deployment.race([key], "openai/mock-gpt?tokens=400&pace_ms=5", streams, max_tokens=MANY)
    await deployment.assert_it_shows_what_rows_sum_up_to(key, what)
    after_race = (await deployment.used())[0]
    raced += await deployment.use_up(key, "openai/mock-gpt?tokens=400")
    await deployment.assert_it_shows_what_rows_sum_up_to(key, what)
    tokens, micros = await deployment.used()
    ends = [one.finish_reason or one.error for one in raced]
    figure(
        f"budget race by {what}: {tokens} of {allowed} tokens used ({after_race} by {streams} streams at once); "
        + ", ".join(f"{ends.count(end)} {end}" for end in sorted(set(ends)))
    )
    assert set(ends) <= {"stop", "length", "insufficient_quota"}
    assert micros == tokens * PRICE
    assert tokens <= allowed + CHUNK * ends.count("length")
    assert tokens >= allowed - SLICE
    assert (await deployment.budget(key, what))["left"] == pytest.approx(max(0, allowed - tokens) * unit)
    rows = {str(row["request_id"]): row for row in await deployment.rows()}
    for one in raced:
        if one.status == 429:
            assert one.id not in rows
        else:
            assert rows[one.id]["outcome"] == ("ok" if one.finish_reason == "stop" else "budget_exhausted")
            assert (rows[one.id]["prompt_tokens"], rows[one.id]["completion_tokens"]) == one.usage
    await assert_providers_were_closed_at_once(deployment, [one for one in raced if one.finish_reason == "length"])


@pytest.mark.parametrize("dialect", MODELS)
async def test_answers_that_come_in_one_burst_are_held_to_their_budget_too(
    deployment: Deployment, dialect: str
) -> None:
    key = await deployment.new_key(tokens_per_day=2000)
    raced = await deployment.race([key], f"{MODELS[dialect]}?tokens=1000", 12, max_tokens=MANY)
    ends = [one.finish_reason or one.error for one in raced]
    assert set(ends) <= {"stop", "length", "insufficient_quota"}
    await deployment.assert_it_shows_what_rows_sum_up_to(key, "tokens_per_day")
    tokens, _ = await deployment.used()
    assert 2000 - SLICE <= tokens <= 2000 + CHUNK * ends.count("length")


async def assert_providers_were_closed_at_once(deployment: Deployment, cut: Sequence[Streamed]) -> None:
    assert cut, "some must have been cut"
    calls = {call.headers.get("x-request-id"): call for call in deployment.mock.received}
    for one in cut:
        await until(lambda call=calls[one.id]: call.client_gone_at, seconds=2)  # type: ignore[misc]
        assert (calls[one.id].client_gone_at or 0) - one.done_at < 1.0


async def test_two_streams_that_race_for_the_last_slice_share_it(deployment: Deployment) -> None:
    allowed = SLICE + 40  # and both want two slices
    key = await deployment.new_key(tokens_per_day=allowed)
    raced = await deployment.race([key], "openai/mock-gpt?tokens=600&pace_ms=2", 2, max_tokens=MANY)
    await deployment.assert_it_shows_what_rows_sum_up_to(key, "tokens_per_day")
    tokens, _ = await deployment.used()
    assert "length" in [one.finish_reason for one in raced]
    assert allowed - 2 * CHUNK <= tokens + sum(one.status == 429 for one in raced) * CHUNK
    assert tokens <= allowed + 2 * CHUNK


async def test_an_exhausted_budget_is_told_before_anything_is_sent_and_is_not_retried(deployment: Deployment) -> None:
    key = await deployment.new_key(tokens_per_day=50)
    *_, refused = await deployment.use_up(key, "openai/mock-gpt?tokens=400")
    assert (refused.status, refused.error) == (429, "insufficient_quota")
    assert refused.headers["x-should-retry"] == "false"
    assert 0 < int(refused.headers["Retry-After"]) <= 86_400
    asked = len(deployment.mock.received)
    async with openai.AsyncOpenAI(base_url=deployment.gateways[1].base_url, api_key=key.token) as sdk:
        with pytest.raises(openai.RateLimitError) as error:
            await sdk.chat.completions.create(model="openai/mock-gpt", messages=[{"role": "user", "content": "Hello."}])
    assert (error.value.code, error.value.type) == ("insufficient_quota", "insufficient_quota")
    assert len(deployment.mock.received) == asked


# --- what a client sees of it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", MODELS)
@pytest.mark.parametrize("asks", [True, False], ids=["asks for usage", "does not"])
async def test_a_stream_that_is_cut_by_its_budget_ends_as_the_official_sdk_expects(
    deployment: Deployment, dialect: str, asks: bool
) -> None:
    key = await deployment.new_key(tokens_per_day=400)
    request: Any = {"stream_options": {"include_usage": True}} if asks else {}
    async with openai.AsyncOpenAI(base_url=deployment.gateways[0].base_url, api_key=key.token) as sdk:
        stream = await sdk.chat.completions.create(
            model=f"{MODELS[dialect]}?case=long&pace_ms=2",
            messages=[{"role": "user", "content": "Say much."}],
            stream=True,
            **request,
        )
        chunks = [chunk async for chunk in stream]
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["length"]
    usages = [chunk.usage for chunk in chunks if chunk.usage]
    assert len(usages) == asks
    await until_rows(deployment, 1)
    [row] = await deployment.rows()
    assert (row["outcome"], row["finish_reason"], row["status"]) == ("budget_exhausted", "length", 200)
    assert row["usage_source"] in ("counted", "estimated")
    if asks:
        assert chunks[-1].usage is not None
        assert (usages[0].prompt_tokens, usages[0].completion_tokens) == (
            row["prompt_tokens"],
            row["completion_tokens"],
        )
    estimated = 10  # tokens of the prompt, before the provider gives its own figure
    assert 400 - CHUNK - estimated <= row["prompt_tokens"] + row["completion_tokens"] <= 400 + CHUNK
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert len(text) > 1000


@pytest.mark.parametrize("dialect", MODELS)
async def test_a_whole_answer_is_asked_for_no_longer_than_it_can_be_paid(deployment: Deployment, dialect: str) -> None:
    key = await deployment.new_key(tokens_per_day=100)
    url, headers = f"{deployment.gateways[0].base_url}/chat/completions", {"Authorization": f"Bearer {key.token}"}
    body = chat_body(f"{MODELS[dialect]}?tokens=400")
    async with deployment.client.post(url, json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        answer = await response.json()
    assert answer["choices"][0]["finish_reason"] == "length"
    await until_rows(deployment, 1)
    tokens, _ = await deployment.used()
    assert 80 <= tokens <= 100
    refused = await deployment.use_up(key, body["model"])
    assert refused[-1].error == "insufficient_quota"


@pytest.mark.parametrize("dialect", MODELS)
@pytest.mark.parametrize("case", ["tokens=50", "case=parallel_tools"])
async def test_a_whole_answer_under_a_budget_is_the_answer_without_one(
    deployment: Deployment, dialect: str, case: str
) -> None:
    answers = []
    for limit in (0, 1_000_000):
        key = await deployment.new_key(tokens_per_day=limit)
        url, headers = f"{deployment.gateways[0].base_url}/chat/completions", {"Authorization": f"Bearer {key.token}"}
        tools: dict[str, Any] = {"tools": TOOLS} if "tools" in case else {}
        body = chat_body(f"{MODELS[dialect]}?{case}", **tools)
        async with deployment.client.post(url, json=body, headers=headers) as response:
            assert response.status == 200, await response.text()
            answers.append(await response.json())
    without, under = answers
    for choice in (*without["choices"], *under["choices"]):
        for call in choice["message"].get("tool_calls") or ():
            call.pop("id")  # made anew for each answer
    assert [choice["message"]["content"] for choice in under["choices"]] == [
        choice["message"]["content"] for choice in without["choices"]
    ]
    assert under["choices"][0]["message"].get("tool_calls") == without["choices"][0]["message"].get("tool_calls")
    assert under["choices"][0]["finish_reason"] == without["choices"][0]["finish_reason"]
    assert under["object"] == without["object"] == "chat.completion"
    assert under["usage"]["total_tokens"] == without["usage"]["total_tokens"]


async def test_a_whole_answer_under_a_budget_has_a_largest_size_too(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    async with deployed(database_url, redis_url, tmp_path, GATEWAY_MAX_REPLY="4096") as deployment:
        key = await deployment.new_key(tokens_per_day=1_000_000)
        url, headers = f"{deployment.gateways[0].base_url}/chat/completions", {"Authorization": f"Bearer {key.token}"}
        async with deployment.client.post(
            url, json=chat_body("openai/mock-gpt?tokens=400"), headers=headers
        ) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (502, "upstream_error")


async def test_whole_answers_with_a_large_maximum_lock_nobody_out(deployment: Deployment) -> None:
    key = await deployment.new_key(tokens_per_day=20_000)
    url, headers = f"{deployment.gateways[0].base_url}/chat/completions", {"Authorization": f"Bearer {key.token}"}

    async def ask() -> int:
        body = chat_body("openai/mock-gpt?tokens=30&pace_ms=5", max_tokens=MANY)
        async with deployment.client.post(url, json=body, headers=headers) as response:
            return response.status

    assert await asyncio.gather(*(ask() for _ in range(20))) == [200] * 20


async def test_a_route_has_a_bucket_of_its_own(database_url: str, redis_url: str, tmp_path: Path) -> None:
    limit = '[limits."/v1/chat/completions"]\nrequests_per_second = 0.01\nburst = 3\n'
    async with deployed(database_url, redis_url, tmp_path, config=limit) as deployment:
        key = await deployment.new_key()
        raced = await deployment.race([key], "openai/mock-gpt?tokens=3", 8)
        assert sorted(one.status for one in raced) == [200] * 3 + [429] * 5
        assert {one.error for one in raced} == {"", "rate_limit_exceeded"}


async def until_rows(deployment: Deployment, count: int) -> None:
    async with asyncio.timeout(15):
        while len(await deployment.rows()) < count:
            await asyncio.sleep(0.05)


async def test_tokens_per_minute_refuse_for_a_while_and_cut_no_stream(deployment: Deployment) -> None:
    key = await deployment.new_key(tokens_per_minute=600)
    first = await deployment.stream(key, "openai/mock-gpt?tokens=900", max_tokens=MANY)
    assert (first.finish_reason, first.headers["x-ratelimit-limit-tokens"]) == ("stop", "600")
    refused = await deployment.stream(key, "openai/mock-gpt?tokens=10", number=1)
    assert (refused.status, refused.error) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert "x-should-retry" not in refused.headers


# --- whose budget -------------------------------------------------------------------------------------------------


async def test_a_budget_of_an_account_covers_all_its_keys(deployment: Deployment) -> None:
    keys = [await deployment.new_key(), await deployment.new_key()]
    owner = await deployment.pool.fetchval("select id from accounts")
    url, headers = f"{deployment.gateways[0].root_url}/auth/users/{owner}", {"Authorization": f"Bearer {keys[0].token}"}
    async with deployment.client.patch(url, json={"cost_per_day": 1000 * PRICE / 1e6}, headers=headers) as response:
        assert response.status == 200, await response.text()
    await asyncio.sleep(0.5)  # the other gateway hears of it
    await deployment.race(keys, "openai/mock-gpt?tokens=400&pace_ms=2", 12)
    [*_, refused] = await deployment.use_up(keys[1], "openai/mock-gpt?tokens=400")
    assert refused.error == "insufficient_quota"
    await deployment.assert_it_shows_what_rows_sum_up_to(keys[0], "cost_per_day", "account")
    assert 1000 - SLICE <= (await deployment.used())[0] <= 1000 + 13 * CHUNK


async def test_a_budget_of_the_deployment_covers_all_accounts(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    spend = {"GATEWAY_GLOBAL_COST_PER_DAY": str(1000 * PRICE / 1e6)}
    async with deployed(database_url, redis_url, tmp_path, **spend) as deployment:
        other = {"email": "other@example.com", "password": "correct horse battery"}
        async with deployment.client.post(f"{deployment.gateways[1].root_url}/auth/register", json=other) as response:
            assert response.status == 201
        keys = [
            await deployment.new_key(),
            await deployment.new_key(login=other, requests_per_minute=60, concurrent_requests=20),
        ]
        await deployment.race(keys, "openai/mock-gpt?tokens=400&pace_ms=2", 12)
        for key in keys:
            [*_, refused] = await deployment.use_up(key, "openai/mock-gpt?tokens=400")
            assert refused.error == "insufficient_quota"
        async with asyncio.timeout(15):
            while (await deployment.used())[0] < 1000 - SLICE:
                await asyncio.sleep(0.05)
        assert (await deployment.used())[0] <= 1000 + 14 * CHUNK


# --- what is lost and comes back ----------------------------------------------------------------------------------


async def test_a_valkey_that_lost_its_memory_learns_from_the_ledger_what_was_spent(
    deployment: Deployment, redis: Redis
) -> None:
    key = await deployment.new_key(cost_per_day=2000 * PRICE / 1e6)
    before = await deployment.race([key], "openai/mock-gpt?tokens=200", 4)
    assert [one.finish_reason for one in before] == ["stop"] * 4
    await until_rows(deployment, 4)  # what the other gateway has not shipped yet would not be counted
    asked = len(deployment.mock.received)
    running = asyncio.create_task(deployment.stream(key, "openai/mock-gpt?tokens=300&pace_ms=10", number=1))
    await until(lambda: len(deployment.mock.received) > asked, seconds=5)
    await redis.flushdb()
    await deployment.use_up(key, "openai/mock-gpt?tokens=400")
    assert (await running).finish_reason in ("stop", "length")
    await deployment.use_up(key, "openai/mock-gpt?tokens=400")
    await deployment.assert_it_shows_what_rows_sum_up_to(key, "cost_per_day")
    tokens, _ = await deployment.used()
    # What the open stream held is in no ledger: it comes back with the next renewal, or when the stream ends.
    assert 2000 - SLICE <= tokens <= 2000 + 400


async def test_what_a_killed_gateway_had_used_is_charged_once_its_journal_is_adopted(deployment: Deployment) -> None:
    key = await deployment.new_key(tokens_per_day=100_000)
    await deployment.race([key], "openai/mock-gpt?tokens=100", 4)
    model = "openai/mock-gpt?tokens=2000&pace_ms=10"
    running = [asyncio.create_task(deployment.stream(key, model, number=one % 2)) for one in range(4)]
    await asyncio.sleep(6)  # long enough for what they used by then to be in the journal
    killed = deployment.gateways[1]
    killed.process.send_signal(signal.SIGKILL)
    await killed.process.wait()
    ended = await asyncio.gather(*running, return_exceptions=True)
    assert sum(isinstance(one, aiohttp.ClientError) for one in ended) == 2
    await until_rows(deployment, 8)
    rows = await deployment.rows()
    interrupted = [row["completion_tokens"] for row in rows if row["outcome"] == "interrupted"]
    assert len(interrupted) == 2
    assert min(interrupted) > 100
    await deployment.assert_it_shows_what_rows_sum_up_to(key, "tokens_per_day")

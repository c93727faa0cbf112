"""`Idempotency-Key`: the same key and body are answered as they were the first time, and paid for once."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

import aiohttp
import asyncpg
import openai
import pytest

from gateway import appkeys, idempotency
from gateway.mock import Mock
from gateway.stores import answers as store
from gateway.stores.answers import LEASE
from tests.support import asking
from tests.support.asking import MODEL, Got, other_account, settled
from tests.support.gateway import Gateway, chat_body, running_gateway
from tests.support.process import new_key, serving
from tests.support.proxy import proxied_postgres

pytestmark = pytest.mark.integration

KEY = {"Idempotency-Key": "order-1"}
SLOW = "openai/mock-gpt?tokens=40&pace_ms=25"


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


async def begin(gateway: Gateway, http: aiohttp.ClientSession, *arguments: Any, **more: Any) -> aiohttp.ClientResponse:
    """As all do here that say nothing else: with a key."""
    return await asking.begin(gateway, http, *arguments, **{**more, "headers": {**KEY, **more.pop("headers", {})}})


async def ask(gateway: Gateway, http: aiohttp.ClientSession, *arguments: Any, **more: Any) -> Got:
    return await asking.ask(gateway, http, *arguments, **{**more, "headers": {**KEY, **more.pop("headers", {})}})


# --- again --------------------------------------------------------------------------------------------------------


async def test_the_same_key_and_body_get_the_same_answer_and_one_is_paid(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    first, second = await ask(gateway, http), await ask(gateway, http)
    assert (first.status, first.replayed) == (200, False)
    assert (second.status, second.replayed) == (200, True)
    assert second.body == first.body
    assert second.body.endswith(b"data: [DONE]\n\n")
    assert second.headers["X-Request-Id"] != first.headers["X-Request-Id"]
    assert second.headers["X-Gateway-Provider"] == "openai"
    assert len(gateway.calls) == 1
    paid, free = await gateway.rows()
    assert (paid["source"], free["source"], free["source_id"]) == ("provider", "replay", paid["request_id"])
    assert (free["prompt_tokens"], free["completion_tokens"]) == (0, 0)


async def test_whole_answers_completions_and_embeddings_are_replayed_too(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    requests: list[dict[str, Any]] = [
        {"stream": False, "headers": {"Idempotency-Key": "whole"}},
        {"path": "/completions", "body": {"model": MODEL, "prompt": "Say hello."}},
        {"path": "/embeddings", "body": {"model": "openai/mock-embed", "input": ["a", "b"]}},
    ]
    for number, request in enumerate(requests):
        first, second = await ask(gateway, http, **dict(request)), await ask(gateway, http, **dict(request))
        assert (first.status, first.replayed, second.replayed) == (200, False, True)
        assert second.body == first.body
        assert len(gateway.calls) == number + 1, "the same key on another path is another key"


async def test_another_body_is_refused_and_not_retried(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    await ask(gateway, http)
    other = await ask(gateway, http, temperature=0.5)
    assert other.status == 409
    assert b"idempotency_mismatch" in other.body
    assert other.headers["x-should-retry"] == "false"
    slow = {"Idempotency-Key": "slow"}
    asking = asyncio.create_task(ask(gateway, http, SLOW, headers=slow))
    await asyncio.sleep(0.2)
    assert (await ask(gateway, http, SLOW, headers=slow, temperature=0.5)).status == 409, "also while it is in flight"
    assert (await asking).status == 200


async def test_the_same_body_written_otherwise_is_the_same(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    body = chat_body(MODEL, stream=True, user="a")
    await ask(gateway, http, body=body)
    assert (await ask(gateway, http, body=dict(reversed(body.items())))).replayed
    assert (await ask(gateway, http, body={**body, "user": "b"})).status == 409, "whoever asks is a part of it"


async def test_a_key_is_its_accounts_alone(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    await ask(gateway, http)
    theirs = await other_account(gateway)
    assert not (await ask(gateway, http, headers=theirs)).replayed
    assert (await ask(gateway, http, headers=theirs)).replayed
    second_key = {"Authorization": f"Bearer {await gateway.new_key()}"}
    assert (await ask(gateway, http, headers=second_key)).replayed, "another key of the account"
    narrow = {"Authorization": f"Bearer {await gateway.new_key(allowed_models=('gpt-*',))}"}
    assert (await ask(gateway, http, headers=narrow)).status in (403, 404), "that may not ask the model"


@pytest.mark.parametrize("key", ["", "x" * 256, "é", "a\tb"])
async def test_a_key_that_is_none_is_refused(gateway: Gateway, http: aiohttp.ClientSession, key: str) -> None:
    refused = await ask(gateway, http, headers={"Idempotency-Key": key})
    assert refused.status == 400
    assert b"Idempotency-Key" in refused.body
    assert gateway.calls == []


async def test_the_longest_key_is_good(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    for _ in range(2):
        assert (await ask(gateway, http, headers={"Idempotency-Key": "x y" + "~" * 252})).status == 200
    assert len(gateway.calls) == 1


async def test_after_24_hours_the_key_is_free(
    gateway: Gateway, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert idempotency.TTL == 24 * 3600
    await ask(gateway, http)
    left = await gateway.app[appkeys.POOL].fetchval(
        "select extract(epoch from expires_at - now())::float8 from answers"
    )
    assert left == pytest.approx(idempotency.TTL, abs=60)
    await gateway.app[appkeys.POOL].execute("update answers set expires_at = now()")
    assert not (await ask(gateway, http, temperature=0.5)).replayed
    assert len(gateway.calls) == 2


async def test_the_cache_is_neither_read_nor_written(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    both = {"X-Gateway-Cache": "ttl=60"}
    await ask(gateway, http, headers=both)
    await ask(gateway, http, headers={"Idempotency-Key": "order-2", **both})
    assert len(gateway.calls) == 2


async def test_the_sdk_may_send_it(gateway: Gateway) -> None:
    async with openai.AsyncOpenAI(base_url=gateway.base_url, api_key=gateway.api_key) as client:
        said = []
        for _ in range(2):
            said.append(
                await client.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": "Hi."}], extra_headers=KEY
                )
            )
            await settled(gateway)
        assert said[0] == said[1]
        with pytest.raises(openai.ConflictError):
            await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Another."}], extra_headers=KEY
            )
    assert len(gateway.calls) == 1


# --- what is kept of what failed ----------------------------------------------------------------------------------


async def test_a_providers_refusal_is_replayed_with_its_status(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    model = "openai/mock-gpt?status=422"
    first, second = await ask(gateway, http, model), await ask(gateway, http, model)
    assert (first.status, second.status, second.replayed) == (422, 422, True)
    paid, free = await gateway.rows()
    assert [(row["outcome"], row["status"], row["error_code"]) for row in (paid, free)] == [
        ("rejected", 422, paid["error_code"])
    ] * 2
    assert second.body == first.body
    assert len(gateway.calls) == 1


@pytest.mark.parametrize(
    "case", ["status=500", "status=503", "status=429", "status=401", "fault=reset&after=5", "fault=truncate"]
)
async def test_what_another_try_may_mend_leaves_the_key_free(
    gateway: Gateway, http: aiohttp.ClientSession, case: str
) -> None:
    model = f"openai/mock-gpt?{case}"
    await ask(gateway, http, model)
    gateway.forget_faults()
    before = len(gateway.calls)
    again = await ask(gateway, http, model)
    assert not again.replayed
    assert len(gateway.calls) > before
    assert await gateway.app[appkeys.POOL].fetchval("select count(*) from answers") == 0


async def test_a_credential_that_was_refused_may_be_mended(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    own = {"X-API-Key": gateway.api_key, "Authorization": "Bearer sk-of-the-callers-own"}
    for number in (1, 2):
        refused = await ask(gateway, http, "openai/mock-gpt?status=401", headers=own)
        assert (refused.status, refused.replayed, len(gateway.calls)) == (401, False, number)


async def test_what_was_refused_before_a_provider_was_asked_leaves_the_key_free(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    refused = await ask(gateway, http, "anthropic/mock-claude", logprobs=True)
    assert refused.status == 400
    assert (await ask(gateway, http, "anthropic/mock-claude")).status == 200


async def test_an_answer_cut_by_its_maximum_is_an_answer(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    for replayed in (False, True):
        assert (await ask(gateway, http, "openai/mock-gpt?case=length")).replayed is replayed


# --- in flight ----------------------------------------------------------------------------------------------------


async def test_a_request_in_flight_is_joined(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    first = await begin(gateway, http, SLOW)
    head = await first.content.readany()
    second = await ask(gateway, http, SLOW)
    assert second.replayed
    assert second.body == head + await first.read()
    assert len(gateway.calls) == 1


async def test_many_at_once_are_one(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    answers = await asyncio.gather(*(ask(gateway, http, SLOW) for _ in range(20)))
    assert len(gateway.calls) == 1
    assert {answer.body for answer in answers} == {answers[0].body}
    assert sorted(answer.replayed for answer in answers) == [False] + [True] * 19


async def test_it_goes_on_when_its_client_leaves_because_that_one_will_come_again(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    response = await begin(gateway, http, SLOW)
    head = await response.content.readany()
    response.close()
    await asyncio.sleep(0.2)
    again = await ask(gateway, http, SLOW)
    assert again.replayed
    assert again.body.startswith(head)
    assert again.body.endswith(b"data: [DONE]\n\n")
    assert len(gateway.calls) == 1
    assert gateway.calls[0].client_gone_at is None


async def test_who_never_comes_back_stops_it_after_a_while(database_url: str, redis_url: str) -> None:
    environ = {"GATEWAY_TOTAL_TIMEOUT": "0.5"}
    async with running_gateway(database_url, redis_url, environ) as gateway, aiohttp.ClientSession() as http:
        response = await begin(gateway, http, "openai/mock-gpt?case=long&pace_ms=20")
        await response.content.readany()
        response.close()
        async with asyncio.timeout(10):
            while gateway.calls[0].client_gone_at is None:
                await asyncio.sleep(0.02)
        await settled(gateway)
        assert await gateway.app[appkeys.POOL].fetchval("select count(*) from answers") == 0


# --- two nodes ----------------------------------------------------------------------------------------------------


async def test_another_node_waits_for_the_answer_and_replays_it(
    gateway: Gateway, database_url: str, redis_url: str, http: aiohttp.ClientSession
) -> None:
    async with running_gateway(database_url, redis_url, account=gateway.account_id) as second:
        asking = asyncio.create_task(ask(gateway, http, SLOW))
        await asyncio.sleep(0.3)
        there = await ask(second, http, SLOW)
        assert (there.status, there.replayed) == (200, True)
        assert there.body == (await asking).body
        assert (len(gateway.calls), len(second.calls)) == (1, 0)
        assert (await ask(second, http, SLOW, temperature=1)).status == 409


async def test_another_node_does_not_wait_for_ever(
    gateway: Gateway, database_url: str, redis_url: str, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "WAIT", 0.3)
    async with running_gateway(database_url, redis_url, account=gateway.account_id) as second:
        response = await begin(gateway, http, "openai/mock-gpt?tokens=80&pace_ms=25")
        there = await ask(second, http, "openai/mock-gpt?tokens=80&pace_ms=25")
        assert there.status == 409
        assert b"idempotency_in_progress" in there.body
        assert int(there.headers["Retry-After"]) >= 1
        assert "x-should-retry" not in there.headers, "the SDKs try again"
        await response.read()


async def test_a_node_that_is_killed_frees_the_key_within_30_seconds(database_url: str, redis_url: str) -> None:
    assert LEASE < 30
    provider = Mock()
    address = await provider.start()
    environ = {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "GATEWAY_MOCK": "off",
        "OPENAI_API_KEY": "sk-test",
        "OPENAI_BASE_URL": f"{address}/v1",
    }
    body = chat_body("openai/mock-gpt?tokens=50&pace_ms=40", stream=True)
    try:
        async with serving(environ) as doomed, serving(environ) as other, aiohttp.ClientSession() as http:
            headers = {"Authorization": f"Bearer {await new_key(doomed)}", **KEY}
            response = await http.post(f"{doomed.base_url}/chat/completions", json=body, headers=headers)
            await response.content.readany()
            os.kill(doomed.process.pid, signal.SIGKILL)
            killed = monotonic()
            response.close()
            async with openai.AsyncOpenAI(base_url=other.base_url, api_key=headers["Authorization"][7:]) as client:
                stream = await client.chat.completions.create(**body, extra_headers=KEY)  # it tries again by itself
                chunks = [chunk async for chunk in stream]
            assert chunks[-1].choices[0].finish_reason == "stop"
            assert monotonic() - killed < 30 + 10
            assert len([call for call in provider.received if call.method == "POST"]) == 2
    finally:
        await provider.stop()


async def test_a_claim_is_renewed_while_its_answer_is_being_made(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.stores.keeper.RENEW", 0.1)
    async with running_gateway(database_url, redis_url) as gateway, aiohttp.ClientSession() as http:
        response = await begin(gateway, http, SLOW)
        pool = gateway.app[appkeys.POOL]
        await pool.execute("update answers set expires_at = now() + interval '0.5 s'")
        await asyncio.sleep(0.7)
        assert await pool.fetchval("select expires_at > now() + interval '10 s' from answers")
        await response.read()
        await settled(gateway)
        assert not gateway.app[appkeys.KEEPER]._claims


# --- without Postgres ---------------------------------------------------------------------------------------------


@pytest.mark.haste
async def test_without_postgres_no_promise_is_made(
    database_url: str, redis_url: str, http: aiohttp.ClientSession
) -> None:
    async with proxied_postgres(database_url) as (proxy, url), running_gateway(url, redis_url) as gateway:
        await ask(gateway, http)
        proxy.stall()
        began = monotonic()
        refused = await begin(gateway, http)
        assert refused.status == 503
        assert b"idempotency_unavailable" in await refused.read()
        assert monotonic() - began < 5
        assert len(gateway.calls) == 1
        proxy.resume()
        await asyncio.sleep(0.2)
        assert (await ask(gateway, http)).replayed


async def test_an_answer_is_kept_when_postgres_comes_back_in_time(
    database_url: str, redis_url: str, http: aiohttp.ClientSession
) -> None:
    async with proxied_postgres(database_url) as (proxy, url), running_gateway(url, redis_url) as gateway:
        response = await begin(gateway, http, SLOW)
        await proxy.cut()
        body = await response.read()
        assert body.endswith(b"data: [DONE]\n\n")
        await asyncio.sleep(1.5)
        await proxy.mend()
        async with asyncio.timeout(20):
            connection = await asyncpg.connect(database_url)
            while not await connection.fetchval("select count(*) from answers where status = 200"):
                await asyncio.sleep(0.05)
            await connection.close()
        again = await ask(gateway, http, SLOW)
        assert (again.replayed, again.body) == (True, body)


async def test_a_shutdown_keeps_what_ended_and_frees_what_did_not(database_url: str, redis_url: str) -> None:
    async with aiohttp.ClientSession() as http:
        async with running_gateway(database_url, redis_url) as gateway:
            response = await begin(gateway, http)
            await response.read()
            cut = await begin(gateway, http, SLOW, headers={"Idempotency-Key": "cut"})
            await cut.content.readany()
            cut.close()
    connection = await asyncpg.connect(database_url)
    rows = await connection.fetch("select status from answers")
    await connection.close()
    assert [row["status"] for row in rows] == [200]


def test_the_lease_is_renewed_well_before_it_is_over() -> None:
    from gateway.stores import keeper

    assert keeper.RENEW * 3 < store.LEASE

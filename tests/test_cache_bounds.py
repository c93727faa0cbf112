"""The response cache: what is not kept, what is asked anew, and how it is emptied."""

import asyncio
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

import aiohttp
import pytest

from gateway import appkeys
from gateway.stores import answers as store
from tests.support import asking
from tests.support.asking import MODEL, Got, other_account, settled
from tests.support.gateway import Gateway, chat_body, running_gateway
from tests.support.proxy import proxied_postgres

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


# --- what is not kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        "case=length", "case=content_filter", "fault=reset&after=5", "fault=truncate", "fault=error_event", "status=400",
        "status=500",
    ],
)  # fmt: skip
async def test_what_failed_was_cut_or_ended_early_is_asked_anew(
    gateway: Gateway, http: aiohttp.ClientSession, case: str
) -> None:
    first = await ask(gateway, http, f"openai/mock-gpt?{case}")
    gateway.forget_faults()
    before = len(gateway.calls)
    second = await ask(gateway, http, f"openai/mock-gpt?{case}")
    assert (first.cache, second.cache) == ("miss", "miss")
    assert len(gateway.calls) > before


async def test_a_refused_embedding_is_asked_anew(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    for number in (1, 2):
        body = {"model": "openai/mock-embed?status=400", "input": "a"}
        refused = await ask(gateway, http, path="/embeddings", body=body)
        assert (refused.status, refused.cache, len(gateway.calls)) == (400, "miss", number)


async def test_a_stream_whose_client_left_is_not_kept(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    model = "openai/mock-gpt?tokens=50&pace_ms=10"
    body = chat_body(model, stream=True)
    response = await http.post(f"{gateway.base_url}/chat/completions", json=body, headers={**gateway.headers, **TTL})
    await response.content.readany()
    response.close()
    await settled(gateway)
    assert (await ask(gateway, http, model)).cache == "miss"


async def test_two_tenants_with_the_same_prompt_never_share(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    theirs = await other_account(gateway)
    assert (await ask(gateway, http)).cache == "miss"
    assert (await ask(gateway, http, headers=theirs)).cache == "miss"
    assert (await ask(gateway, http, headers=theirs)).cache == "hit"
    key = await gateway.new_key()
    assert (await ask(gateway, http, headers={"Authorization": f"Bearer {key}"})).cache == "hit", "of the same account"
    assert len(gateway.calls) == 2


async def test_a_callers_own_credential_and_bypass_neither_read_nor_keep(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    await ask(gateway, http)
    own = {"X-API-Key": gateway.api_key, "Authorization": "Bearer sk-of-the-callers-own"}
    for headers in (own, {"X-Gateway-Cache": "bypass"}, {"Cache-Control": "no-store"}):
        assert (await ask(gateway, http, headers=headers)).cache == "bypass"
    assert len(gateway.calls) == 4
    assert (await ask(gateway, http, headers={"X-Gateway-Cache": ""})).cache is None, "nobody asked for a cache"


async def test_no_cache_asks_anew_and_keeps_and_only_if_cached_asks_nobody(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    nobody = await ask(gateway, http, headers={"Cache-Control": "only-if-cached"})
    assert (nobody.status, len(gateway.calls)) == (504, 0)
    await ask(gateway, http)
    assert (await ask(gateway, http, headers={"Cache-Control": "no-cache"})).cache == "miss"
    assert len(gateway.calls) == 2
    hit = await ask(gateway, http, headers={"Cache-Control": "only-if-cached"})
    assert (hit.status, hit.cache) == (200, "hit")


async def test_an_answer_ends_with_its_ttl(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    short = {"X-Gateway-Cache": "ttl=1"}
    await ask(gateway, http, headers=short)
    await asyncio.sleep(1.1)
    assert (await ask(gateway, http, headers=short)).cache == "miss"


async def test_what_a_fallback_said_is_not_kept_for_the_model(
    database_url: str, redis_url: str, tmp_path: Any, http: aiohttp.ClientSession
) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('[models."mock-gpt*"]\ntargets = [{to = "openai/*"}]\nfallbacks = ["anthropic/mock-claude"]\n')
    async with running_gateway(database_url, redis_url, {"GATEWAY_CONFIG": str(file)}) as gateway:
        first = await ask(gateway, http, "mock-gpt?status=500")
        assert (first.status, first.headers["X-Gateway-Provider"]) == (200, "anthropic")
        gateway.forget_faults()
        assert (await ask(gateway, http, "mock-gpt?status=500")).cache == "miss"


async def test_larger_answers_than_the_bound_are_not_kept(database_url: str, redis_url: str) -> None:
    environ = {"GATEWAY_CACHE_MAX_ANSWER": "2000"}
    async with running_gateway(database_url, redis_url, environ) as gateway, aiohttp.ClientSession() as http:
        for _ in range(2):
            assert (await ask(gateway, http)).cache == "miss"
        assert "too_large" in gateway.app[appkeys.METRICS].render().decode().split("gateway_cache_answers_total", 1)[1]


@pytest.mark.haste
async def test_a_gone_postgres_is_a_miss_and_is_counted(
    database_url: str, redis_url: str, http: aiohttp.ClientSession
) -> None:
    async with proxied_postgres(database_url) as (proxy, url), running_gateway(url, redis_url) as gateway:
        await ask(gateway, http)
        errors = gateway.app[appkeys.METRICS].dependency_errors
        proxy.stall()
        began = monotonic()
        body, headers = chat_body(MODEL, stream=True), {**gateway.headers, **TTL}
        async with http.post(f"{gateway.base_url}/chat/completions", json=body, headers=headers) as response:
            assert (response.status, response.headers["X-Gateway-Cache"]) == (200, "miss")
            assert (await response.read()).endswith(b"[DONE]\n\n")
        assert monotonic() - began < 5
        assert errors.labels("postgres", "timeout").value >= 1
        proxy.resume()
        await asyncio.sleep(store.REST)
        assert (await ask(gateway, http)).cache == "hit"


# --- emptied ------------------------------------------------------------------------------------------------------


async def empty(gateway: Gateway, http: aiohttp.ClientSession, query: str = "", **headers: str) -> tuple[int, Any]:
    sent = headers or gateway.headers
    async with http.delete(f"{gateway.root_url}/api/cache{query}", headers=sent) as response:
        return response.status, await response.json()


async def test_the_owner_empties_its_cache_and_an_admin_anybodys(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    theirs = await other_account(gateway)
    for headers in ({}, theirs):
        for text in ("a", "b"):
            await ask(gateway, http, headers=headers, body=chat_body(MODEL, text))
    assert await empty(gateway, http, **theirs) == (200, {"deleted": 2})
    assert (await ask(gateway, http, body=chat_body(MODEL, "a"))).cache == "hit"
    assert (await ask(gateway, http, headers=theirs, body=chat_body(MODEL, "a"))).cache == "miss"
    assert (await empty(gateway, http, f"?account={gateway.account_id}", **theirs))[0] == 403
    assert (await empty(gateway, http, "?account=all", **theirs))[0] == 403
    assert (await empty(gateway, http, "?account=me"))[0] == 400
    assert (await empty(gateway, http, "?acount=all"))[0] == 400
    assert (await empty(gateway, http, Authorization="Bearer nobody"))[0] == 401
    assert await empty(gateway, http, "?account=all") == (200, {"deleted": 3})
    assert await empty(gateway, http) == (200, {"deleted": 0})


async def test_what_is_being_made_when_it_is_emptied_is_not_kept_after_it(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    model = "openai/mock-gpt?tokens=20&pace_ms=20"
    asking = asyncio.create_task(ask(gateway, http, model))
    await asyncio.sleep(0.2)
    assert await empty(gateway, http) == (200, {"deleted": 0})
    assert (await asking).body.endswith(b"[DONE]\n\n")
    assert (await ask(gateway, http, model)).cache == "miss"
    assert (await ask(gateway, http, model)).cache == "hit"

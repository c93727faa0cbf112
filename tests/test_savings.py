"""What identical requests save, from the client to the ledger: rows, sums, budgets, metrics, and the key's setting."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway import appkeys
from gateway.stores.chain import load_audit_key, verify
from gateway.stores.spending import read_spent
from tests.prove.ledger import LEDGER
from tests.support.gateway import Gateway, chat_body, read_events, running_gateway

pytestmark = pytest.mark.integration

PRICES = '[prices.openai]\n"mock-*" = { input = 1, output = 2 }\n'  # micro-dollars a token
SLOW = "openai/mock-gpt?pace_ms=20"
CACHED = {"X-Gateway-Cache": "ttl=60"}
SHARERS = 5


@pytest.fixture
async def gateway(database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    config = tmp_path / "gateway.toml"
    config.write_text(PRICES)
    async with running_gateway(database_url, redis_url, {"GATEWAY_CONFIG": str(config)}) as gateway:
        yield gateway


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


async def ask(
    gateway: Gateway, http: aiohttp.ClientSession, headers: dict[str, str], model: str = SLOW
) -> aiohttp.ClientResponse:
    body = chat_body(model, stream=True)
    sent = {**gateway.headers, **headers}
    return await http.post(f"{gateway.base_url}/chat/completions", json=body, headers=sent)


async def ask_at_once(gateway: Gateway, http: aiohttp.ClientSession, headers: dict[str, str] = CACHED) -> None:
    async def one() -> None:
        assert (await read_events(await ask(gateway, http, headers)))[-1] == "[DONE]"

    await asyncio.gather(*(one() for _ in range(1 + SHARERS)))


async def metrics_of(gateway: Gateway, http: aiohttp.ClientSession) -> dict[tuple[str, ...], float]:
    async with http.get(f"{gateway.root_url}/metrics") as response:
        page = await response.text()
    families = text_string_to_metric_families(page)
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


async def test_of_identical_requests_one_pays_and_each_row_says_what_the_others_saved(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    await ask_at_once(gateway, http)
    rows = await gateway.rows()
    [paid] = [row for row in rows if row["source"] == "provider"]
    shared = [row for row in rows if row["source"] == "shared"]
    used, cost = paid["prompt_tokens"] + paid["completion_tokens"], paid["cost_micros"]
    assert used and cost == paid["prompt_tokens"] + 2 * paid["completion_tokens"]
    assert len(shared) == SHARERS
    for row in shared:
        assert (row["prompt_tokens"], row["completion_tokens"], row["cost_micros"]) == (0, 0, 0)
        assert (row["source_id"], row["saved_tokens"], row["saved_micros"]) == (paid["request_id"], used, cost)
        assert (row["outcome"], row["status"], row["usage_source"]) == ("ok", 200, "none")
    pool = gateway.app[appkeys.POOL]
    assert await pool.fetch(LEDGER) == []
    assert (await verify(pool, await load_audit_key(pool, ""))).fault is None
    spent = await read_spent(pool, f"a:{gateway.account_id}", paid["started_at"])
    assert (spent.tokens_day, spent.micros_day) == (used, cost)


async def test_stats_and_metrics_tell_the_savings_of_shared_answers(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    await ask_at_once(gateway, http)
    await read_events(await ask(gateway, http, {"X-Gateway-Cache": "bypass"}))
    await read_events(await ask(gateway, http, {}))
    rows = await gateway.rows()
    used, cost = (sum(row[name] or 0 for row in rows) for name in ("saved_tokens", "saved_micros"))
    async with http.get(f"{gateway.root_url}/api/stats", headers=gateway.headers) as response:
        totals = (await response.json())["totals"]
    assert (totals["requests"], totals["remembered"]) == (SHARERS + 3, SHARERS)
    assert (totals["saved_tokens"], totals["saved_micros"]) == (used, cost)
    counted = await metrics_of(gateway, http)
    results = {key[1]: count for key, count in counted.items() if key[0] == "gateway_cache_requests_total"}
    assert results == {"hit": 0, "miss": 1, "bypass": 1, "shared": SHARERS, "replay": 0}
    assert counted["gateway_saved_tokens_total", "other", "openai"] == used > 0
    assert counted["gateway_saved_cost_micros_total", "other", "openai"] == cost > 0
    assert counted["gateway_requests_total", "other", "openai", "200"] == 3
    assert counted["gateway_requests_total", "other", "none", "200"] == SHARERS
    assert counted["gateway_request_duration_ms_count", "openai"] == 3


async def test_who_leaves_a_shared_answer_has_a_row_and_who_paid_pays(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    stays = asyncio.create_task(ask(gateway, http, CACHED))
    await (await stays).content.readany()
    left = await ask(gateway, http, CACHED)
    await left.content.readany()
    left.close()
    await read_events(await stays)
    rows = {row["source"]: row for row in await gateway.rows()}
    assert (rows["shared"]["outcome"], rows["shared"]["source_id"]) == ("client_abort", rows["provider"]["request_id"])
    assert (rows["shared"]["cost_micros"], rows["shared"]["saved_tokens"]) == (0, 0)
    assert rows["provider"]["outcome"] == "ok"
    assert rows["provider"]["completion_tokens"] > 0


async def test_an_answer_that_failed_saved_nothing(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    async def one() -> None:
        assert (await read_events(await ask(gateway, http, CACHED, f"{SLOW}&fault=truncate")))[-1] != "[DONE]"

    await asyncio.gather(*(one() for _ in range(1 + SHARERS)))
    rows = [row for row in await gateway.rows() if row["source"] == "shared"]
    assert [(row["outcome"], row["saved_tokens"]) for row in rows] == [("upstream_error", 0)] * SHARERS


async def test_a_budget_is_charged_by_who_paid_alone(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    key = await gateway.new_key(tokens_per_day=100_000)
    headers = {**CACHED, "Authorization": f"Bearer {key}"}
    await ask_at_once(gateway, http, headers)
    [paid] = [row for row in await gateway.rows() if row["source"] == "provider"]
    used = paid["prompt_tokens"] + paid["completion_tokens"]
    async with http.get(f"{gateway.root_url}/auth/keys/{key[4:16]}", headers=gateway.headers) as response:
        budgets = (await response.json())["budgets"]
    assert [budget["spent"] for budget in _leaves(budgets) if budget["limit"] == 100_000] == [used]


def _leaves(told: Any) -> list[dict[str, Any]]:
    """Every object with a limit in it."""
    if isinstance(told, list):
        return [leaf for one in told for leaf in _leaves(one)]
    if not isinstance(told, dict):
        return []
    return [told] if "limit" in told else [leaf for one in told.values() for leaf in _leaves(one)]


async def test_a_keys_setting_remembers_for_requests_that_say_nothing_and_is_changed_at_once(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    path = f"{gateway.root_url}/auth/keys/{gateway.api_key[4:16]}"
    for ttl, cache in ((0, None), (3600, "miss"), (0, None)):
        async with http.patch(path, json={"cache_ttl": ttl}, headers=gateway.headers) as response:
            assert (response.status, (await response.json())["cache_ttl"]) == (200, ttl)
        response = await ask(gateway, http, {}, "openai/mock-gpt")
        await response.read()
        assert response.headers.get("X-Gateway-Cache") == cache

"""One model name, several providers: who answers when one of them fails, and what is not done twice."""

import asyncio
import errno
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import aiohttp
import asyncpg
import pytest
from aiohttp import web

from gateway import appkeys, pool
from gateway.reserve import reserve
from tests.support.gateway import Gateway, chat_body, read_events, running_gateway

pytestmark = pytest.mark.integration

WELL = "tokens=3"
# What the first two of three providers may do, so that a single gateway has a model for each.
FAULTS = (
    "status=500", "status=503", "status=529", "status=429", "status=401", "status=403", "fault=close_before_headers",
    "fault=reset_before_headers", "fault=garbage", "fault=redirect", "fault=html",
)  # fmt: skip
PRICES = """
[prices.openai]
"mock-gpt*" = { input = 1, output = 1 }
[prices.anthropic]
"mock-claude*" = { input = 100, output = 100 }
"""


def config(first: str, second: str, third: str) -> str:
    """`smart` is asked of three providers that do so, `spread` of two in a group, `alone` of one; `far` of one that has
    no address, else of the first.

    And of each fault a model whose first two providers have it, and one with no other provider.
    """
    models = {
        "smart": ([f"openai/mock-gpt?{first}"], [f"anthropic/mock-claude?{second}", f"ollama/mock-llama?{third}"]),
        "spread": ([f"openai/mock-gpt?{first}", f"anthropic/mock-claude?{second}"], []),
        "alone": ([f"openai/mock-gpt?{first}"], []),
        "far": (["azure/gpt-4o"], [f"openai/mock-gpt?{first}"]),
    }
    for fault in FAULTS:
        others = [f"anthropic/mock-claude?{fault}", f"ollama/mock-llama?{WELL}"]
        models[f"both:{fault}"] = ([f"openai/mock-gpt?{fault}"], others)
    tables = [
        f"[models.{json.dumps(name)}]\ntargets = [{', '.join(f'{{ to = {json.dumps(to)} }}' for to in targets)}]\n"
        f"fallbacks = {json.dumps(fallbacks)}"
        for name, (targets, fallbacks) in models.items()
    ]
    return "\n".join([*tables, PRICES])


class Answer(NamedTuple):
    status: int
    headers: Any
    text: str

    @property
    def attempts(self) -> str:
        return str(self.headers.get("X-Gateway-Attempts"))

    @property
    def code(self) -> str:
        return str(json.loads(self.text)["error"]["code"])


class Failover:
    """A gateway whose model `smart` is OpenAI's, else Anthropic's, else a local one; each does what it was told."""

    def __init__(self, gateway: Gateway, client: aiohttp.ClientSession) -> None:
        self.gateway = gateway
        self._client = client

    async def ask(self, model: str = "smart", *, stream: bool = False, **headers: str) -> Answer:
        body = chat_body(model, stream=stream)
        async with self._client.post(
            f"{self.gateway.base_url}/chat/completions", json=body, headers=headers
        ) as response:
            if stream and response.status == 200:
                return Answer(200, response.headers, "\n".join(await read_events(response)))
            return Answer(response.status, response.headers, await response.text())

    @property
    def calls(self) -> list[str]:
        """The bare names of the models that were asked, in order."""
        return [call.model.partition("?")[0] for call in self.gateway.calls]

    async def row(self) -> asyncpg.Record:
        rows = await self.gateway.rows()
        assert len(rows) == 1
        return rows[0]

    async def metrics(self) -> str:
        async with self._client.get(f"{self.gateway.root_url}/metrics") as response:
            return await response.text()


Start = Callable[..., Any]


@pytest.fixture
async def start(database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[Start]:
    """`await start(openai, anthropic, local, **environment)`: what each provider does, in the mock's words."""
    opened: list[Any] = []

    async def begin(*does: str, account: str = "", **environ: str) -> Failover:
        path = tmp_path / f"gateway-{len(opened)}.toml"
        path.write_text(config(*[*does, WELL, WELL, WELL][:3]))
        running = running_gateway(database_url, redis_url, {"GATEWAY_CONFIG": str(path), **environ}, account)
        gateway = await running.__aenter__()
        opened.append(running)
        client = aiohttp.ClientSession(headers=gateway.headers)
        opened.append(client)
        return Failover(gateway, client)

    yield begin
    for one in reversed(opened):
        await one.__aexit__(None, None, None)


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> float:
    started = monotonic()
    while not condition():
        assert monotonic() - started < seconds, "it did not happen in time"
        await asyncio.sleep(0.01)
    return monotonic() - started


# --- from one to the next -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_when_two_providers_fail_before_a_byte_the_third_answers_at_once(
    start: Start, figure: Callable[[str], None], stream: bool
) -> None:
    world = await start()
    slowest = 0.0
    for fault in FAULTS:
        world.gateway.forget_faults()
        world.gateway.mock.received.clear()
        began = monotonic()
        answer = await world.ask(f"both:{fault}", stream=stream)
        slowest = max(slowest, monotonic() - began)
        assert answer.status == 200, (fault, answer.text)
        assert ("[DONE]" in answer.text) == stream
        # A connection that was closed while nobody used it is not the provider's answer: it is opened anew.
        assert list(dict.fromkeys(world.calls)) == ["mock-gpt", "mock-claude", "mock-llama"]
        assert answer.headers["X-Gateway-Provider"] == "ollama"
        assert answer.headers["X-Gateway-Model"] == f"mock-llama?{WELL}"
        first, second, third = [attempt.split("=") for attempt in answer.attempts.split(", ")]
        assert [first[0], second[0], *third] == ["openai", "anthropic", "ollama", "ok"]
        assert first[1] == second[1]
    rows = await world.gateway.rows()
    assert len(rows) == len(FAULTS)
    for row in rows:
        assert (row["provider"], row["status"], row["outcome"], row["error_code"]) == ("ollama", 200, "ok", "")
        assert (row["completion_tokens"], row["usage_source"]) == (3, "provider")
    figure(f"P14 failover: the third provider answered within {slowest * 1000:.0f} ms of the request")


async def test_what_the_client_has_to_mend_is_told_by_the_first_provider_alone(start: Start) -> None:
    world = await start()
    for status in (400, 404, 413, 422):
        answer = await world.ask(f"openai/mock-gpt?status={status}")
        assert (answer.status, answer.attempts) == (status, "openai=http_4xx")
    assert len(world.calls) == 4


async def test_a_provider_that_may_be_at_work_still_is_not_asked_again_nor_another(start: Start) -> None:
    world = await start("headers_ms=60000", GATEWAY_FIRST_BYTE_TIMEOUT="0.5", GATEWAY_TOTAL_TIMEOUT="0.5")
    for stream in (False, True):
        answer = await world.ask(stream=stream)
        assert (answer.status, answer.code) == (504, "upstream_timeout")
    assert world.calls == ["mock-gpt", "mock-gpt"]


async def test_a_stream_that_broke_in_the_middle_is_never_asked_for_again(start: Start) -> None:
    world = await start(GATEWAY_IDLE_TIMEOUT="0.5")
    faults = ("reset", "truncate", "cut", "stall", "error_event")
    for fault in faults:
        world.gateway.forget_faults()
        answer = await world.ask(f"openai/mock-gpt?fault={fault}&after=2&tokens=9", stream=True)
        assert (answer.status, answer.attempts) == (200, "openai=ok")
        assert "[DONE]" not in answer.text
        assert '"error"' in answer.text.splitlines()[-1]
    assert len(world.calls) == len(faults)
    assert all(row["completion_tokens"] > 0 for row in await world.gateway.rows())


async def test_a_whole_answer_that_broke_in_the_middle_was_paid_for_and_is_not_asked_for_again(start: Start) -> None:
    world = await start("fault=truncate")
    answer = await world.ask()
    assert (answer.status, answer.attempts, world.calls) == (502, "openai=truncated", ["mock-gpt"])


@pytest.mark.parametrize(("fault", "kind"), [("bad_json_3", "bad_event"), ("huge_event", "event_too_large")])
async def test_an_answer_that_breaks_with_its_first_event_is_not_asked_for_again(
    start: Start, fault: str, kind: str
) -> None:
    world = await start()
    answer = await world.ask(f"ollama/mock-llama?fault={fault}&after=0", stream=True)
    assert (answer.status, answer.attempts, world.calls) == (502, f"ollama={kind}", ["mock-llama"])


async def test_after_a_heartbeat_nobody_else_is_asked(start: Start) -> None:
    world = await start("headers_ms=1500&status=500", GATEWAY_HEARTBEAT="0.3")
    answer = await world.ask(stream=True)
    assert (answer.status, world.calls) == (200, ["mock-gpt"])
    assert '"error"' in answer.text
    assert answer.attempts == "openai=asked", "there was no answer when this was sent"


async def test_a_fallback_that_cannot_express_the_request_is_passed_over(start: Start) -> None:
    world = await start("status=500", WELL, WELL)
    body = chat_body("smart", n=2)
    async with world._client.post(f"{world.gateway.base_url}/chat/completions", json=body) as response:
        attempts = response.headers["X-Gateway-Attempts"]
        assert response.status == 502, await response.text()
    failed = "openai=http_5xx"
    assert attempts == f"{failed}, anthropic=unsupported, ollama=unsupported, {failed}, {failed}"
    assert world.calls == ["mock-gpt"] * 3


async def test_one_of_two_targets_that_cannot_express_the_request_is_passed_over(start: Start) -> None:
    world = await start(WELL, WELL)
    body = chat_body("spread", n=2)
    for _ in range(10):
        async with world._client.post(f"{world.gateway.base_url}/chat/completions", json=body) as response:
            assert response.status == 200, await response.text()
    assert set(world.calls) == {"mock-gpt"}


async def test_two_targets_share_what_comes(start: Start) -> None:
    world = await start(WELL, WELL)
    answers = [await world.ask("spread") for _ in range(30)]
    assert {answer.status for answer in answers} == {200}
    assert set(world.calls) == {"mock-gpt", "mock-claude"}


async def test_one_of_two_targets_that_fails_is_covered_by_the_other(start: Start) -> None:
    world = await start("status=500", WELL)
    answers = [await world.ask("spread") for _ in range(30)]
    assert {answer.status for answer in answers} == {200}
    assert 1 <= Counter(world.calls)["mock-gpt"] <= 5  # then its breaker is open


# --- the same provider once more ----------------------------------------------------------------------------------


async def test_a_fault_that_passes_is_over_with_the_next_attempt(start: Start) -> None:
    world = await start("status=500&times=2")
    answer = await world.ask("alone")
    assert (answer.status, answer.attempts) == (200, "openai=http_5xx, openai=http_5xx, openai=ok")
    row = await world.row()
    assert (row["status"], row["outcome"], row["prompt_tokens"] > 0) == (200, "ok", True)
    assert 'gateway_retries_total{kind="http_5xx",provider="openai"} 2' in await world.metrics()


async def test_one_request_is_three_attempts_at_most_and_what_failed_is_not_billed(start: Start) -> None:
    world = await start("status=500")
    answer = await world.ask("alone")
    assert (answer.status, len(world.calls)) == (502, 3)
    row = await world.row()
    assert (row["outcome"], row["prompt_tokens"], row["completion_tokens"]) == ("upstream_error", 0, 0)
    assert 'gateway_upstream_errors_total{kind="http_5xx",provider="openai"} 3' in await world.metrics()


CALLS = {
    "status=429": 1,
    "status=429&retry_after=30": 1,
    "status=503&retry_after=30": 1,
    "status=429&retry_after=1&times=1": 2,
    **{f"status={status}": 1 for status in (400, 401, 403, 404, 413, 422)},
    "fault=redirect": 1,
    "fault=html": 1,
    "status=500": 3,
    "status=503": 3,
    "fault=garbage": 3,
}


async def test_who_is_asked_again_and_how_often(start: Start, figure: Callable[[str], None]) -> None:
    world = await start()
    counts = {}
    for does in CALLS:
        world.gateway.forget_faults()
        world.gateway.mock.received.clear()
        await world.ask(f"openai/mock-gpt?{does}")
        counts[does] = len(world.calls)
    figure(f"P14 retries: at most {max(counts.values()) - 1}, and none after 400, 401, 403, 404, 413, 422")
    assert counts == CALLS


async def test_a_crowd_that_is_turned_away_retries_within_the_budget_of_retries(
    start: Start, figure: Callable[[str], None]
) -> None:
    crowd = 60
    world = await start("status=429&retry_after=1&headers_ms=300")
    balancer, peak = world.gateway.app[appkeys.BALANCER], 0
    asking = asyncio.gather(*(world.ask("alone") for _ in range(crowd)))
    while not asking.done():
        peak = max(peak, balancer.retrying)
        await asyncio.sleep(0.005)
    assert {answer.status for answer in await asking} == {429}
    retries = len(world.calls) - crowd
    figure(f"P14 retry budget: of {crowd} requests at once that were refused {peak} retried at a time, at most 12")
    assert 1 <= peak <= crowd // 5
    assert 1 <= retries <= 2 * crowd // 5


async def test_a_client_that_leaves_during_the_pause_leaves_nothing_behind(start: Start) -> None:
    world = await start("status=429&retry_after=1")
    asking = asyncio.create_task(world.ask("alone"))
    balancer = world.gateway.app[appkeys.BALANCER]
    await until(lambda: balancer.retrying == 1)
    asking.cancel()
    await until(lambda: world.gateway.app[appkeys.PULSE].idle)
    row = await world.row()
    assert (row["outcome"], row["prompt_tokens"]) == ("client_abort", 0)
    assert (balancer.retrying, balancer.in_flight("openai"), len(world.calls)) == (0, 0, 1)


async def test_a_drain_that_begins_during_the_pause_ends_the_request_after_it(start: Start) -> None:
    world = await start("status=429&retry_after=1")
    asking = asyncio.create_task(world.ask("alone"))
    await until(lambda: world.gateway.app[appkeys.BALANCER].retrying == 1)
    world.gateway.app[appkeys.PULSE].draining = True
    answer = await asking
    assert (answer.status, answer.attempts, len(world.calls)) == (429, "openai=http_429", 1)


async def test_a_gateway_that_must_go_during_the_pause_says_so(start: Start) -> None:
    world = await start("status=429&retry_after=1")
    asking = asyncio.create_task(world.ask("alone"))
    await until(lambda: world.gateway.app[appkeys.BALANCER].retrying == 1)
    world.gateway.app[appkeys.PULSE].interrupt_all()
    answer = await asking
    assert (answer.status, answer.code, len(world.calls)) == (503, "server_shutting_down", 1)
    assert (await world.row())["outcome"] == "interrupted"


async def test_a_gateway_that_must_go_says_so_of_the_attempt_that_it_cut(start: Start) -> None:
    world = await start("headers_ms=60000")
    asking = asyncio.create_task(world.ask("alone", stream=True))
    await until(lambda: world.calls)
    world.gateway.app[appkeys.PULSE].interrupt_all()
    answer = await asking
    assert (answer.status, answer.code, answer.attempts) == (503, "server_shutting_down", "openai=interrupted")


async def test_a_gateway_that_must_go_while_the_next_budget_is_asked_asks_nobody_else(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await start("status=500")

    async def reserved(request: web.Request, *rest: Any) -> Any:
        if world.calls:
            world.gateway.app[appkeys.PULSE].interrupt_all()
        return await reserve(request, *rest)

    monkeypatch.setattr("gateway.relay.reserve", reserved)
    answer = await world.ask()
    assert (answer.status, answer.code, world.calls) == (503, "server_shutting_down", ["mock-gpt"])


async def test_a_refusal_that_comes_when_the_client_has_left_is_not_billed(start: Start) -> None:
    """Also not where the provider is read on for a while."""
    world = await start("headers_ms=300&status=500")
    key = await world.gateway.new_key(drain_seconds=5)
    asking = asyncio.create_task(world.ask("alone", stream=True, Authorization=f"Bearer {key}"))
    await until(lambda: world.calls)
    asking.cancel()
    row = await world.row()
    assert (row["outcome"], row["prompt_tokens"], row["completion_tokens"]) == ("client_abort", 0, 0)


async def test_while_the_gateway_drains_nothing_is_tried_again(start: Start) -> None:
    world = await start("status=500")
    world.gateway.app[appkeys.PULSE].draining = True
    answer = await world.ask()
    assert (answer.status, world.calls) == (502, ["mock-gpt"])


# --- providers that are left alone --------------------------------------------------------------------------------


async def test_a_provider_that_asks_for_patience_is_left_alone_by_all_and_the_client_is_told(start: Start) -> None:
    world = await start("status=429&retry_after=30")
    first = await world.ask("alone")
    later = [await world.ask("alone") for _ in range(5)]
    assert (first.status, first.headers["Retry-After"]) == (429, "30")
    for answer in later:
        assert (answer.status, answer.attempts) == (429, "openai=cooling")
        assert 25 <= int(answer.headers["Retry-After"]) <= 30
    assert (len(world.calls), len(await world.gateway.rows())) == (1, 1)
    assert (await world.ask()).attempts == "openai=cooling, anthropic=ok"
    page = await world.metrics()
    assert 'gateway_provider_state{provider="openai",state="cooling"} 1' in page
    assert 'gateway_fallbacks_total{provider="anthropic"} 1' in page


async def test_a_breaker_opens_after_five_failures_answers_fast_and_is_closed_when_the_provider_is_back(
    start: Start, figure: Callable[[str], None]
) -> None:
    # The attempts of one request count once: three each of four requests, and the first of the fifth.
    world = await start("status=500&times=13")
    for _ in range(5):
        await world.ask("alone")
    opened = monotonic()
    assert len(world.calls) == 13
    began = monotonic()
    refused: Answer = await world.ask("alone")
    took = monotonic() - began
    assert (refused.status, refused.code, refused.attempts) == (503, "upstream_unavailable", "openai=open")
    assert 1 <= int(refused.headers["Retry-After"]) <= 5
    assert len(world.calls) == 13
    state = world.gateway.app[appkeys.BALANCER].state
    assert (await world.ask()).headers["X-Gateway-Provider"] == "anthropic"
    while (await world.ask("alone")).status != 200:
        assert monotonic() - opened < 20
        await asyncio.sleep(0.05)
    figure(f"P12 breaker: refused in {took * 1000:.1f} ms, closed {monotonic() - opened:.1f} s after it opened")
    assert state("openai") == "closed"
    async with world._client.get(f"{world.gateway.root_url}/health") as response:
        health = (await response.json())["providers"]["openai"]
    assert health["state"] == "closed"


async def test_a_credential_that_is_refused_takes_its_provider_out_and_siblings_hear_of_it(start: Start) -> None:
    world = await start("status=401")
    sibling = await start_beside(start, world)
    assert (await world.ask("alone")).code == "provider_auth"
    await until(lambda: sibling.gateway.app[appkeys.BALANCER].state("openai") == "open")
    answer = await sibling.ask("alone")
    assert (answer.status, answer.code, sibling.calls) == (502, "provider_auth", [])


async def test_a_gateway_that_is_short_of_descriptors_says_so_and_holds_it_against_nobody(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def short(addresses: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as shortage:
        shortage.setattr(pool, "_connected", short)
        world = await start()
        answers = [await world.ask() for _ in range(6)]
    assert {(answer.status, answer.code) for answer in answers} == {(503, "overloaded")}
    assert {answer.headers["Retry-After"] for answer in answers} == {"1"}
    assert world.gateway.app[appkeys.BALANCER].state("openai") == "closed"
    assert (await world.ask()).status == 200


async def start_beside(start: Start, world: Failover) -> Failover:
    """Another gateway on the same stores, in front of the same providers."""
    address = world.gateway.app[appkeys.CATALOGUE].routes.providers["openai"].base_url
    sibling: Failover = await start("status=401", account=world.gateway.account_id, OPENAI_BASE_URL=address)
    return sibling


# --- credentials and money ----------------------------------------------------------------------------------------


async def test_a_callers_own_credential_goes_to_no_other_provider_and_nobody_answers_in_its_place(
    start: Start,
) -> None:
    world = await start()
    own = {"X-API-Key": world.gateway.api_key, "Authorization": "Bearer sk-callers-own"}
    for fault in FAULTS:
        world.gateway.forget_faults()
        answer = await world.ask(f"both:{fault}", **own)
        assert answer.status != 200, fault
    assert set(world.calls) == {"mock-gpt"}
    assert {call.headers["authorization"] for call in world.gateway.calls} == {"Bearer sk-callers-own"}
    world.gateway.mock.received.clear()
    for fault in FAULTS:
        world.gateway.forget_faults()
        assert (await world.ask(f"both:{fault}")).status == 200
    assert "sk-callers-own" not in str([call.headers for call in world.gateway.calls])


async def test_a_callers_own_credential_for_a_provider_without_an_address_is_a_404_and_nobody_else_is_asked(
    start: Start,
) -> None:
    world = await start()
    assert (await world.ask("far")).headers["X-Gateway-Provider"] == "openai"
    own = {"X-API-Key": world.gateway.api_key, "Authorization": "Bearer sk-callers-own"}
    answer = await world.ask("far", **own)
    assert (answer.status, answer.code, world.calls) == (404, "model_not_found", ["mock-gpt"])


async def test_a_budget_holds_for_the_price_of_who_answers(start: Start) -> None:
    world = await start("status=500", "tokens=50")
    key = await world.gateway.new_key(cost_per_day=1_000_000)
    answer = await world.ask(stream=True, Authorization=f"Bearer {key}")
    assert answer.attempts == "openai=http_5xx, anthropic=ok"
    row = await world.row()
    tokens = row["prompt_tokens"] + row["completion_tokens"]
    assert (row["provider"], row["cost_micros"]) == ("anthropic", tokens * 100)
    budgets = world.gateway.app[appkeys.BUDGETS]
    await until(lambda: not budgets._running)
    async with asyncio.timeout(5):
        while (await budgets.spent(f"k:{row['key_id']}")).micros_day != row["cost_micros"]:
            await asyncio.sleep(0.02)


async def test_a_target_without_a_price_is_passed_over_by_who_has_a_budget_of_dollars(start: Start) -> None:
    world = await start("status=500", "status=500", WELL)
    key = await world.gateway.new_key(cost_per_day=1_000_000)
    answer = await world.ask(Authorization=f"Bearer {key}")
    assert answer.status == 502
    assert "ollama=unpaid" in answer.attempts
    assert "mock-llama" not in world.calls


async def test_a_fallback_that_is_too_dear_for_what_is_left_is_not_asked(start: Start) -> None:
    world = await start("status=500", WELL, WELL)
    key = await world.gateway.new_key(cost_per_day=100)  # micro-dollars: a hundred tokens of the first, one of the next
    answer = await world.ask(Authorization=f"Bearer {key}")
    assert answer.status == 502
    assert "anthropic=unpaid" in answer.attempts
    assert set(world.calls) == {"mock-gpt"}


async def test_what_is_billed_is_what_the_budget_counts_when_a_fallback_is_too_dear(start: Start) -> None:
    world = await start("fault=html", WELL, WELL)
    key = await world.gateway.new_key(cost_per_day=100)
    answer = await world.ask(Authorization=f"Bearer {key}")
    assert answer.attempts == "openai=bad_body, anthropic=unpaid, ollama=unpaid"
    row = await world.row()
    budgets = world.gateway.app[appkeys.BUDGETS]
    await until(lambda: not budgets._running)
    assert (await budgets.spent(f"k:{row['key_id']}")).micros_day == row["cost_micros"]

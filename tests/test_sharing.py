"""Identical requests in flight share one upstream call."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from gateway import appkeys
from gateway.exchange import Exchange
from gateway.sharing import SHARING
from gateway.stores.tokens import parse_token
from tests.support.gateway import Gateway, chat_body, read_events, running_gateway

pytestmark = pytest.mark.integration

ASKED = {"X-Gateway-Cache": "ttl=60"}
SLOW = "openai/mock-gpt?pace_ms=20"


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


class Asked:
    """One request and what came of it."""

    def __init__(self, gateway: Gateway, http: aiohttp.ClientSession, model: str = SLOW, **more: Any) -> None:
        self.gateway, self.http = gateway, http
        self.body = chat_body(model, **{"stream": True, **more})
        self.response: aiohttp.ClientResponse | None = None

    async def begin(self, headers: dict[str, str] | None = None) -> aiohttp.ClientResponse:
        url = f"{self.gateway.base_url}/chat/completions"
        sent = {**self.gateway.headers, **ASKED, **(headers or {})}
        self.response = await self.http.post(url, json=self.body, headers=sent)
        return self.response

    async def whole(self, headers: dict[str, str] | None = None) -> list[str]:
        return await read_events(await self.begin(headers))


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_hundred_identical_streams_are_one_call_and_equal(
    gateway: Gateway, http: aiohttp.ClientSession, figure: Any
) -> None:
    answers = await asyncio.gather(*(Asked(gateway, http).whole() for _ in range(100)))
    assert len(gateway.calls) == 1
    assert answers[0][-1] == "[DONE]"
    assert len(answers[0]) > 50
    assert all(answer == answers[0] for answer in answers)


async def test_one_that_comes_late_gets_all_and_then_follows_live(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    first = await Asked(gateway, http).begin()
    seen = b""
    while seen.count(b"data:") < 10:
        seen += await first.content.readany()
    late = await Asked(gateway, http).begin()
    assert late.headers["X-Gateway-Cache"] == "hit"
    assert first.headers["X-Gateway-Cache"] == "miss"
    assert late.headers["X-Gateway-Provider"] == "openai"
    head = await late.content.readany()
    assert head.count(b"data:") >= 5  # at once
    assert seen + await first.read() == head + await late.read()
    assert len(gateway.calls) == 1


# --- one of a hundred leaves --------------------------------------------------------------------------------------

PHASES = ("before headers", "first token", "middle", "last chunk")


class Party:
    """A hundred requests with one key. The first pays; all but the one that leaves read to the end."""

    def __init__(self, gateway: Gateway, http: aiohttp.ClientSession, model: str) -> None:
        self.gateway, self.http, self.model = gateway, http, model
        self.token = ""
        self.leader: asyncio.Task[aiohttp.ClientResponse]
        self.joiners: list[asyncio.Task[aiohttp.ClientResponse]] = []

    def ask(self) -> asyncio.Task[aiohttp.ClientResponse]:
        asked = Asked(self.gateway, self.http, self.model)
        return asyncio.create_task(asked.begin({"Authorization": f"Bearer {self.token}"}))

    async def begin(self, size: int = 100) -> None:
        self.token = await self.gateway.new_key(concurrent_requests=size, tokens_per_day=10**6)
        self.leader = self.ask()
        await until(lambda: len(self.gateway.calls) == 1)
        self.joiners = [self.ask() for _ in range(size - 1)]

    async def all_wait(self) -> None:
        [generation] = self.gateway.app[SHARING]._open.values()
        await until(lambda: len(generation.recording._listeners) == 1 + len(self.joiners))

    async def spent(self) -> int:
        """Tokens, as the key's budget has it."""
        parsed = parse_token(self.token)
        assert parsed is not None
        url = f"{self.gateway.root_url}/auth/keys/{parsed.id}"
        async with self.http.get(url, headers=self.gateway.headers) as response:
            budgets = (await response.json())["budgets"]
        [spent] = [one["spent"] for one in budgets if (one["what"], one["of"]) == ("tokens_per_day", "key")]
        return int(spent)


async def leave(task: "asyncio.Task[aiohttp.ClientResponse]", phase: str) -> None:
    if phase == "before headers":
        task.cancel()
        return
    response, seen = await task, b""
    wanted = {"first token": 2, "middle": 40, "last chunk": 100}[phase]
    while seen.count(b"data:") < wanted:
        seen += await response.content.readany()
    assert b"[DONE]" not in seen
    response.close()


@pytest.mark.parametrize("leaver", ["leader", "joiner"])
@pytest.mark.parametrize("phase", PHASES)
async def test_one_of_a_hundred_that_leaves_changes_nothing_for_the_rest(
    gateway: Gateway, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, leaver: str, phase: str
) -> None:
    said, may_end = asyncio.Event(), asyncio.Event()
    recorder = gateway.app[appkeys.RECORDER]
    settle = recorder.settle

    async def late(exchange: Exchange) -> None:
        said.set()
        await may_end.wait()
        await settle(exchange)

    monkeypatch.setattr(recorder, "settle", late)  # the provider has said all, and nobody has its last word
    party = Party(gateway, http, "openai/mock-gpt?tokens=100&pace_ms=15&ttft_ms=2500")
    await party.begin()
    gone = party.leader if leaver == "leader" else party.joiners[7]
    stay = [task for task in (party.leader, *party.joiners) if task is not gone]
    await party.all_wait()
    if phase == "last chunk":
        await said.wait()
    await leave(gone, phase)
    if phase == "last chunk":
        await until(lambda: len(next(iter(gateway.app[SHARING]._open.values())).recording._listeners) == 99)
    may_end.set()
    answers = [await read_events(await task) for task in stay]
    assert len(gateway.calls) == 1 and gateway.calls[0].client_gone_at is None
    assert answers[0][-1] == "[DONE]" and len(answers[0]) > 100
    assert all(answer == answers[0] for answer in answers)
    await check_rows(party, leaver, phase)


async def check_rows(party: Party, leaver: str, phase: str) -> None:
    rows = await party.gateway.rows()
    [paid] = [row for row in rows if row["source"] == "provider"]
    shared = [row for row in rows if row["source"] == "shared"]
    assert (len(shared), paid["completion_tokens"]) == (99, 100)
    assert {(row["source_id"], row["completion_tokens"], row["cost_micros"]) for row in shared} == {
        (paid["request_id"], 0, 0)
    }
    used = paid["prompt_tokens"] + paid["completion_tokens"]
    ends = sorted((row["outcome"], row["status"], row["saved_tokens"]) for row in shared)
    left = ("client_abort", 0 if phase == "before headers" else 200)
    # Who pays and leaves when all but the last word is there has left with everything, as of an answer of its own.
    settled = leaver == "leader" and phase != "last chunk"
    assert (paid["outcome"], paid["status"]) == (left if settled else ("ok", 200))
    assert ends == sorted([("ok", 200, used)] * 98 + [(*left, 0) if leaver == "joiner" else ("ok", 200, used)])
    assert party.gateway.app[appkeys.LIMITER]._grants.leases() == []
    assert await party.spent() == used


async def test_a_slot_is_free_when_its_own_client_is_done(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    """Who pays holds one while its answer goes on for others."""
    party = Party(gateway, http, "openai/mock-gpt?tokens=100&pace_ms=20")
    await party.begin(3)
    leases = gateway.app[appkeys.LIMITER]._grants.leases
    first, second, third = [await task for task in (party.leader, *party.joiners)]
    assert (await party.ask()).status == 429
    second.close()
    await until(lambda: len(leases()) == 2)
    first.close()
    [generation] = gateway.app[SHARING]._open.values()
    await until(lambda: len(generation.recording._listeners) == 1)
    assert len(leases()) == 2
    await read_events(third)
    await until(lambda: not leases())


async def test_the_last_one_that_leaves_stops_the_provider(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    model = f"{SLOW}&case=long"
    responses = [await Asked(gateway, http, model).begin() for _ in range(3)]
    for response in responses:
        await response.content.readany()
        response.close()
    await until(lambda: gateway.calls[0].client_gone_at is not None)
    rows = await gateway.rows()
    assert [row["outcome"] for row in rows if row["prompt_tokens"]] == ["client_abort"]


async def test_whole_answers_are_shared_too(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    async def ask() -> Any:
        asked = Asked(gateway, http, "openai/mock-gpt?headers_ms=200", stream=False)
        return await (await asked.begin()).json()

    answers = await asyncio.gather(*(ask() for _ in range(10)))
    assert len(gateway.calls) == 1
    assert all(answer == answers[0] for answer in answers)


async def test_an_error_is_everybodys_with_its_status(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    model = "openai/mock-gpt?headers_ms=200&status=400"
    responses = await asyncio.gather(*(Asked(gateway, http, model).begin() for _ in range(5)))
    assert [response.status for response in responses] == [400] * 5
    assert len(gateway.calls) == 1
    assert (await responses[0].json())["error"]["type"] == "invalid_request_error"
    await Asked(gateway, http, model).begin()
    assert len(gateway.calls) == 2, "what failed is not shared with who comes later"


async def test_a_stream_that_breaks_looks_whole_to_nobody(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    model = f"{SLOW}&fault=reset&after=20"
    answers = await asyncio.gather(*(Asked(gateway, http, model).whole() for _ in range(5)))
    assert all("error" in answer[-1] and "[DONE]" not in answer for answer in answers)
    assert len(gateway.calls) == 1


async def test_nobody_shares_without_asking_or_across_accounts(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    other = await gateway.app[appkeys.ACCOUNTS].register("other@example.com", "correct horse", registration="open")
    made = await gateway.app[appkeys.KEYS].create(other.id, "theirs", requests_per_minute=0, concurrent_requests=0)
    headers = {"Authorization": f"Bearer {made.token}"}
    await asyncio.gather(
        Asked(gateway, http).whole(),
        Asked(gateway, http).whole(headers),
        Asked(gateway, http).whole({"X-Gateway-Cache": ""}),
        Asked(gateway, http).whole({"X-Gateway-Cache": "bypass"}),
        Asked(gateway, http).whole({"Cache-Control": "no-store"}),
    )
    assert len(gateway.calls) == 5


async def test_a_slow_reader_holds_up_nobody(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    model = "openai/mock-gpt?case=long"
    slow = await Asked(gateway, http, model).begin()
    answer = await asyncio.wait_for(Asked(gateway, http, model).whole(), 20)
    assert answer[-1] == "[DONE]"
    assert (await read_events(slow)) == answer


async def test_who_paid_has_the_row_with_the_tokens(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    responses = await asyncio.gather(*(Asked(gateway, http).begin() for _ in range(3)))
    for response in responses:
        await response.read()
    rows = await gateway.rows()
    [paid] = [row for row in rows if row["completion_tokens"]]
    [miss] = [response for response in responses if response.headers["X-Gateway-Cache"] == "miss"]
    assert str(paid["request_id"]) == miss.headers["X-Request-Id"]
    assert paid["outcome"] == "ok"


async def test_heartbeats_are_each_clients_own_and_an_error_after_them_is_an_event(
    database_url: str, redis_url: str
) -> None:
    environ = {"GATEWAY_HEARTBEAT": "0.3"}
    async with running_gateway(database_url, redis_url, environ) as gateway, aiohttp.ClientSession() as http:
        model = "openai/mock-gpt?headers_ms=1200&status=400"
        responses = await asyncio.gather(*(Asked(gateway, http, model).begin() for _ in range(2)))
        assert [response.status for response in responses] == [200, 200]
        for response in responses:
            body = (await response.read()).decode()
            assert body.startswith(": ping")
            assert '"error"' in body.split("\n\n")[-2]
            assert "[DONE]" not in body
        rows = [(row["status"], row["outcome"], row["error_code"]) for row in await gateway.rows()]
        assert rows == [(200, "rejected", rows[0][2])] * 2, "what their clients saw"


async def test_a_shutdown_lets_shared_streams_finish(database_url: str, redis_url: str) -> None:
    async with running_gateway(database_url, redis_url) as gateway, aiohttp.ClientSession() as http:
        first = await Asked(gateway, http).begin()
        second = await Asked(gateway, http).begin()
        await first.content.readany()
        draining = asyncio.create_task(gateway.app[appkeys.PULSE].drain(10))
        answers = await asyncio.gather(read_events(second), first.read())
        assert answers[0][-1] == "[DONE]"
        await draining

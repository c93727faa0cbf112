"""The row of a shared answer is in the journal, and on disk, before who pays has the last byte."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from gateway import appkeys, recording
from gateway.client import Client
from gateway.exchange import Exchange
from gateway.reserve import reserve as gateway_reserve
from gateway.sharing import SHARING
from gateway.stores.journal import Journal
from tests.support import asking
from tests.support.gateway import Gateway, running_gateway
from tests.support.sharing import PACED, TTL, end_key, ends, keyed, read_on, slow_reader, until

pytestmark = pytest.mark.integration


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done, in order: `end` and `synced` of the journal, `last` byte of a client's."""
    seen: list[str] = []
    end, synced, last, tick = Journal.end, Journal.synced, Client.end, Journal.tick

    def ended(self: Journal, row: Any) -> None:
        seen.append("end")
        end(self, row)

    async def on_disk(self: Journal, *seconds: float) -> None:
        await synced(self, *seconds)
        if seconds:  # a client waited
            seen.append("synced")

    async def has_last(self: Client) -> Any:
        seen.append("last")
        return await last(self)

    def ticked(self: Journal, request_id: str, prompt: int, completion: int) -> None:
        seen.append(f"tick {completion}")
        tick(self, request_id, prompt, completion)

    monkeypatch.setattr(Journal, "end", ended)
    monkeypatch.setattr(Journal, "synced", on_disk)
    monkeypatch.setattr(Client, "end", has_last)
    monkeypatch.setattr(Journal, "tick", ticked)
    return seen


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("drain_seconds", [0, 10])
async def test_who_pays_has_its_last_byte_after_its_row_also_with_drain_seconds(
    gateway: Gateway, http: aiohttp.ClientSession, steps: list[str], drain_seconds: int, stream: bool
) -> None:
    headers = await keyed(gateway, drain_seconds=drain_seconds)
    got = await asking.ask(gateway, http, headers=headers, stream=stream)
    assert got.status == 200
    await gateway.rows()
    assert [step for step in steps if step in ("end", "last")] == ["end", "last"]
    assert "synced" in steps[steps.index("end") : steps.index("last")]


@pytest.mark.parametrize("drain_seconds", [0, 10])
async def test_a_row_that_has_waited_is_on_disk_before_who_pays_has_its_last_byte(
    gateway: Gateway, http: aiohttp.ClientSession, steps: list[str], monkeypatch: pytest.MonkeyPatch, drain_seconds: int
) -> None:
    """It is behind at the last piece but one, and has read all when the provider is done."""
    headers = await keyed(gateway, drain_seconds=drain_seconds)
    blocked, recorder = [False], gateway.app[appkeys.RECORDER]
    monkeypatch.setattr(Client, "blocked", property(lambda self: blocked[0]))
    settle, first = recorder.settle, [True]

    async def late(exchange: Exchange) -> None:
        if first[0]:
            first[0] = False
            [generation] = gateway.app[SHARING]._open.values()
            [listener] = generation.recording._listeners
            blocked[0] = False
            listener.push()
        await settle(exchange)

    monkeypatch.setattr(recorder, "settle", late)
    response = await asking.begin(gateway, http, PACED, headers=headers)
    await response.content.readany()
    blocked[0] = True
    assert (await response.read()).endswith(b"data: [DONE]\n\n")
    await gateway.rows()
    end = steps.index("end")
    assert "synced" in steps[end : steps.index("last")], steps


async def test_a_row_that_waits_is_counted_for_a_killed_process(
    gateway: Gateway, http: aiohttp.ClientSession, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "LAG", 1 << 30)  # bytes: the provider is read to its end
    model = "openai/mock-gpt?tokens=30000&ttft_ms=1000"
    reader, writer = await slow_reader(gateway, model)
    await until(lambda: len(gateway.calls) == 1)
    quick = await asking.begin(gateway, http, model, headers=TTL)
    assert (await quick.read()).endswith(b"data: [DONE]\n\n")
    assert "end" not in steps
    assert "tick 30000" in steps[: steps.index("last")], steps
    assert b"data: [DONE]" in await read_on(reader)
    writer.close()
    await until(lambda: not gateway.app[appkeys.LIMITER]._grants.leases())
    assert ends(await gateway.rows())["provider"] == ("ok", 200, "")


@pytest.mark.parametrize("budget", [{}, {"tokens_per_day": 10**6}])
async def test_who_pays_for_a_whole_answer_and_left_before_it_was_asked_for_is_said_to_have_left(
    gateway: Gateway, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, budget: dict[str, int]
) -> None:
    """With a budget it is made of a stream."""
    may, reserve = asyncio.Event(), gateway_reserve

    async def late(*arguments: Any) -> Any:
        await may.wait()
        return await reserve(*arguments)

    monkeypatch.setattr("gateway.relay.reserve", late)
    headers = await keyed(gateway, **budget)
    pays = asyncio.create_task(asking.begin(gateway, http, headers=headers, stream=False))
    running = gateway.app[SHARING]._open
    await until(lambda: running)
    [generation] = running.values()
    stays = asyncio.create_task(asking.ask(gateway, http, headers=headers, stream=False))
    await until(lambda: len(generation.recording._listeners) == 2)
    pays.cancel()
    await until(lambda: len(generation.recording._listeners) == 1)
    may.set()
    assert (await stays).status == 200
    rows = ends(await gateway.rows())
    assert rows == {"provider": ("client_abort", 0, ""), "shared": ("ok", 200, "")}


@pytest.mark.parametrize("how", ["its key ends", "we stop"])
async def test_who_is_cut_off_has_its_last_byte_after_its_row(
    gateway: Gateway, http: aiohttp.ClientSession, steps: list[str], how: str
) -> None:
    """More than once: which of the two tasks is told first is up to a set."""
    for number in range(6):
        steps.clear()
        headers = await keyed(gateway)
        response = await asking.begin(gateway, http, PACED, headers=headers, temperature=number / 10)
        await response.content.readany()
        if how == "we stop":
            gateway.app[appkeys.PULSE].interrupt_all()
        else:
            end_key(gateway, headers)
        await response.read()
        await gateway.rows()
        assert [step for step in steps if step in ("end", "last")] == ["end", "last"]

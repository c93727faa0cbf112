"""How shared answers end for each who waits: for who reads slowly, with another key, or comes when it was given up."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web

from gateway import appkeys, recording
from gateway.client import Client
from gateway.exchange import Exchange
from gateway.recording import Listener, Recording
from gateway.sharing import SHARING, Generation
from gateway.stores.tokens import parse_token
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


async def test_an_answer_that_is_there_but_not_read_is_not_ended_as_if_it_were_whole(gateway: Gateway) -> None:
    """The provider is done, and we stop before the client has it all."""
    generations: dict[bytes, Any] = gateway.app[SHARING]._open
    reader, writer = await slow_reader(gateway, "openai/mock-gpt?tokens=20000")
    got = await reader.read(1000)
    async with asyncio.timeout(20):
        while not generations:
            await asyncio.sleep(0.01)
        [generation] = generations.values()
        while not generation.recording.over and not generation.recording.blocked:
            await asyncio.sleep(0.05)
        gateway.app[appkeys.PULSE].interrupt_all()
        while data := await reader.read(65536):
            got += data
            if got.endswith(b"\r\n0\r\n\r\n"):
                break
    assert b"server_shutting_down" in got[-2000:]
    assert b"[DONE]" not in got
    writer.close()


@pytest.mark.parametrize("slow", ["provider", "shared"])
@pytest.mark.parametrize(
    ("then", "end"),
    [
        ("is cut off", ("interrupted", 200, "server_shutting_down")),
        ("leaves", ("client_abort", 200, "")),
        ("reads on", ("ok", 200, "")),
    ],
)
async def test_a_row_says_how_it_ended_for_who_is_behind_when_the_provider_is_done(
    gateway: Gateway,
    http: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
    slow: str,
    then: str,
    end: tuple[str, int, str],
) -> None:
    monkeypatch.setattr(recording, "LAG", 1 << 30)  # bytes: the provider is read to its end
    gateway.api_key = await gateway.new_key(concurrent_requests=5)
    model = "openai/mock-gpt?tokens=30000&ttft_ms=1000"
    running: dict[bytes, Generation] = gateway.app[SHARING]._open
    if slow == "shared":
        quick = asyncio.create_task(asking.begin(gateway, http, model, headers=TTL))
        await until(lambda: len(gateway.calls) == 1)
        reader, writer = await slow_reader(gateway, model)
    else:
        reader, writer = await slow_reader(gateway, model)
        await until(lambda: len(gateway.calls) == 1)
        quick = asyncio.create_task(asking.begin(gateway, http, model, headers=TTL))
    [generation] = running.values()
    await until(lambda: len(generation.recording._listeners) == 2)
    assert (await (await quick).read()).endswith(b"data: [DONE]\n\n")
    await until(generation.task.done)
    [behind] = generation.recording._listeners
    assert generation.recording.piece(behind.next) is not None
    leases = gateway.app[appkeys.LIMITER]._grants.leases
    assert len(leases()) == 1, "it is being answered"
    if then == "leaves":
        writer.transport.abort()
    elif then == "is cut off":
        gateway.app[appkeys.PULSE].interrupt_all()
    if then != "leaves":
        assert (b"data: [DONE]" in await read_on(reader)) == (then == "reads on")
        writer.close()
    await until(lambda: not leases())
    rows = await gateway.rows()
    other = "shared" if slow == "provider" else "provider"
    assert ends(rows) == {slow: end, other: ("ok", 200, "")}
    [paid] = [row for row in rows if row["source"] == "provider"]
    assert paid["completion_tokens"] == 30000
    assert [row["saved_tokens"] for row in rows if row is not paid] == [paid["prompt_tokens"] + 30000]


@pytest.mark.parametrize("stream", [True, False])
async def test_what_a_key_with_drain_seconds_asked_is_kept(
    gateway: Gateway, http: aiohttp.ClientSession, stream: bool
) -> None:
    headers = await keyed(gateway, drain_seconds=10)
    seen = [(await asking.ask(gateway, http, headers=headers, stream=stream)).cache for _ in range(3)]
    assert seen == ["miss", "hit", "hit"]


async def test_what_was_given_up_is_not_joined(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    """For drain_seconds its provider is read on, and then it is cut."""
    headers = await keyed(gateway, drain_seconds=1)
    model = "openai/mock-gpt?tokens=100&pace_ms=30"
    gone = await asking.begin(gateway, http, model, headers=headers)
    await gone.content.readany()
    gone.close()
    await asyncio.sleep(0.3)
    again = await asking.begin(gateway, http, model, headers=headers)
    assert (await again.read()).endswith(b"data: [DONE]\n\n")


async def test_only_if_cached_asks_nobody_also_without_a_ttl(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    got = await asking.ask(gateway, http, headers={"Cache-Control": "only-if-cached"})
    assert (got.status, gateway.calls) == (504, [])
    await asking.ask(gateway, http, headers=TTL)
    got = await asking.ask(gateway, http, headers={"Cache-Control": "only-if-cached"})
    assert (got.status, got.cache, len(gateway.calls)) == (200, "hit", 1)


async def test_another_keys_budget_cuts_nobody_elses_answer(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    poor = await asking.begin(gateway, http, PACED, headers=await keyed(gateway, tokens_per_day=60))
    await poor.content.readany()
    rich = await asking.begin(gateway, http, PACED, headers=await keyed(gateway))
    cut, whole = await poor.read(), await rich.read()
    assert (b'"length"' in cut, b'"length"' in whole) == (True, False)


async def test_another_keys_end_is_not_told_as_ones_own(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    token = await gateway.new_key()
    model = "openai/mock-gpt?headers_ms=3000"
    first = {"Authorization": f"Bearer {token}", **TTL}
    leader = asyncio.create_task(asking.begin(gateway, http, model, headers=first))
    await asyncio.sleep(0.3)
    joiner = asyncio.create_task(asking.begin(gateway, http, model, headers=await keyed(gateway)))
    await asyncio.sleep(0.5)
    parsed = parse_token(token)
    assert parsed is not None
    gateway.app[appkeys.PULSE].end_keys({parsed.id})
    assert (await leader).status == 401
    assert (await joiner).status == 503


def code_of(body: bytes) -> str:
    """Of the error that is the last event; "": it is whole."""
    last = body.split(b"\n\n")[-2].removeprefix(b"data: ")
    assert body.count(b'"error"') == (last != b"[DONE]")
    return "" if last == b"[DONE]" else str(json.loads(last)["error"]["code"])


async def test_each_is_told_of_its_own_key_alone_when_one_ends_in_the_middle(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    """The answer ends with the key that pays: from then on nothing is charged to it."""
    pays, other = await keyed(gateway), await keyed(gateway)
    responses = [await asking.begin(gateway, http, PACED, headers=headers) for headers in (pays, pays, other)]
    for response in responses:
        await response.content.readany()
    end_key(gateway, pays)
    codes = [code_of(await response.read()) for response in responses]
    assert codes == ["key_ended", "key_ended", "unavailable"]
    rows = await gateway.rows()
    assert [(row["outcome"], row["status"], row["error_code"]) for row in rows] == [
        ("interrupted", 200, code) for code in codes
    ]
    assert [row["source"] for row in rows] == ["provider", "shared", "shared"]
    again = await asking.ask(gateway, http, PACED, headers=other)
    assert (again.cache, code_of(again.body)) == ("miss", ""), "what was cut is neither joined nor kept"


async def test_the_end_of_a_key_that_does_not_pay_ends_nothing_for_others(
    gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    ended, pays = await keyed(gateway), await keyed(gateway)
    responses = [await asking.begin(gateway, http, PACED, headers=headers) for headers in (pays, ended, pays)]
    for response in responses:
        await response.content.readany()
    end_key(gateway, ended)
    assert [code_of(await response.read()) for response in responses] == ["", "key_ended", ""]
    rows = await gateway.rows()
    assert [(row["outcome"], row["error_code"]) for row in rows] == [
        ("ok", ""),
        ("interrupted", "key_ended"),
        ("ok", ""),
    ]


FALLBACK = """
[models.smart]
targets = [{{ to = "openai/mock-gpt?tokens=100&pace_ms=20&ttft_ms=500&fault=error_event&after={after}" }}]
fallbacks = ["anthropic/mock-claude"]
"""


@pytest.mark.parametrize("after", [0, 20])
async def test_what_broke_broke_for_each_and_no_fallback_is_asked_once_a_byte_was_sent(
    database_url: str, redis_url: str, http: aiohttp.ClientSession, tmp_path: Path, after: int
) -> None:
    """The first event has no text in it, and is sent all the same."""
    path = tmp_path / "gateway.toml"
    path.write_text(FALLBACK.format(after=after))
    async with running_gateway(database_url, redis_url, {"GATEWAY_CONFIG": str(path)}) as gateway:
        responses = await asyncio.gather(*(asking.begin(gateway, http, "smart", headers=TTL) for _ in range(3)))
        codes = {code_of(await response.read()) for response in responses}
        assert [response.status for response in responses] == [200] * 3
        assert len(gateway.calls) == 1
        rows = await gateway.rows()
        assert [(row["outcome"], row["status"], row["error_code"]) for row in rows] == [
            ("upstream_error", 200, *codes)
        ] * 3


@pytest.mark.parametrize("goes_on", [True, False])
async def test_who_pays_for_a_whole_answer_and_leaves_is_said_to_have_left(
    gateway: Gateway, http: aiohttp.ClientSession, goes_on: bool
) -> None:
    model = "openai/mock-gpt?headers_ms=1000"
    pays = asyncio.create_task(asking.begin(gateway, http, model, headers=TTL, stream=False))
    await until(lambda: len(gateway.calls) == 1)
    [generation] = gateway.app[SHARING]._open.values()
    if goes_on:
        stays = asyncio.create_task(asking.ask(gateway, http, model, headers=TTL, stream=False))
        await until(lambda: len(generation.recording._listeners) == 2)
    pays.cancel()
    if goes_on:
        assert (await stays).status == 200
        again = await asking.ask(gateway, http, model, headers=TTL, stream=False)
        assert again.cache == "hit", "it ended well"
    await until(generation.task.done)
    rows = ends(await gateway.rows())
    assert rows["provider"] == ("client_abort", 0, "")
    assert not goes_on or rows["shared"] == ("ok", 200, "")


async def test_where_no_provider_was_reached_nobody_has_a_row(database_url: str, redis_url: str) -> None:
    environ = {"OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}
    async with running_gateway(database_url, redis_url, environ) as gateway, aiohttp.ClientSession() as http:
        got = await asyncio.gather(*(asking.begin(gateway, http, headers=TTL) for _ in range(5)))
        assert {response.status for response in got} == {502}
        assert await gateway.rows() == []


class Reads:
    """A client that reads at once."""

    blocked = False
    prepared = True
    interrupted = on_flow = on_interrupt = None
    sent = 0.0

    def write(self, data: bytes) -> None:
        pass


async def test_the_row_of_a_whole_answer_waits_until_who_pays_has_it() -> None:
    request = cast(web.Request, SimpleNamespace(protocol=None, version=(1, 1)))
    shared, behind = Recording(request, Exchange()), list[bool]()
    shared.payer = Listener(shared, cast(Client, Reads()), Exchange())
    shared.join(shared.payer)

    async def before_last() -> None:
        behind.append(shared.behind)

    assert not shared.behind
    await shared.send_whole(b"{}", before_last)
    assert behind == [True]


async def test_what_a_piece_costs_grows_with_its_listeners_and_no_faster(figure: Callable[[str], None]) -> None:
    def seconds(listeners: int) -> float:
        request = cast(web.Request, SimpleNamespace(protocol=None, version=(1, 1)))
        recording = Recording(request, Exchange())
        for _ in range(listeners):
            recording.join(Listener(recording, cast(Client, Reads()), Exchange()))
        began = perf_counter()
        for _ in range(10):
            recording.write(b"x" * 300)
        return (perf_counter() - began) / 10

    few, many = min(seconds(50) for _ in range(5)), min(seconds(800) for _ in range(5))
    figure(f"a piece for 50 listeners {few * 1e6:.0f} µs, for 800 {many * 1e6:.0f} µs")
    assert many < 48 * few  # 16 times the listeners


async def test_a_heartbeat_of_one_that_waits_keeps_no_fallback_away_and_names_nobody(
    database_url: str, redis_url: str, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Nothing of the answer was sent, and a header that is out cannot be taken back."""
    path = tmp_path / "gateway.toml"
    path.write_text(
        '[models.smart]\ntargets = [{ to = "openai/mock-gpt?headers_ms=1200&status=500" }]\n'
        'fallbacks = ["anthropic/mock-claude"]\n'
    )
    environ = {"GATEWAY_CONFIG": str(path), "GATEWAY_HEARTBEAT": "0.3"}
    async with running_gateway(database_url, redis_url, environ) as gateway:
        first = asyncio.create_task(asking.begin(gateway, http, "smart", headers=TTL))
        await until(lambda: gateway.calls)
        answers = [await asking.begin(gateway, http, "smart", headers=TTL), await first]
        for answer in answers:
            assert answer.status == 200
            assert "X-Gateway-Provider" not in answer.headers
            body = await answer.read()
            assert body.startswith(b": ping\n\n")
            assert body.endswith(b"data: [DONE]\n\n")
        assert len(gateway.calls) == 2
        assert {(row["provider"], row["outcome"]) for row in await gateway.rows()} == {("anthropic", "ok")}

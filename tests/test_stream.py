"""What a stream's client gets does not depend on the way it takes through the gateway, and who does not read costs little."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import orjson
import pytest

from gateway import appkeys
from gateway.client import Client
from gateway.exchange import Exchange, Reservation
from gateway.http1 import Connection as Http1
from gateway.labels import INTER_TOKEN_SECONDS
from gateway.protocol.dialects import DIALECTS
from gateway.protocol.meter import Meter
from gateway.series import CounterSeries, HistogramSeries, Live
from gateway.stores.recorder import Recorder
from gateway.stream import Stream, Tally
from gateway.upstream import Answer
from tests.support.gateway import Gateway, chat_body, running_gateway
from tests.support.process import new_key, serving, until
from tests.support.streams import Case, load_cases, make_call

pytestmark = pytest.mark.integration

CASES = load_cases()
# What differs between two streams of the same bytes: ids and times of our own.
_OURS = re.compile(rb'chatcmpl-[0-9a-f]{32}|"created":\d+|call_[0-9a-f]{20,}')


# --- a provider that says what it is told, cut where it is told ---------------------------------------------------


def pieces_of(case: Case, cut: str) -> list[bytes]:
    if cut == "events":
        return case.events()
    size = int(cut)
    return [case.data[start : start + size] for start in range(0, len(case.data), size)]


async def replay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers `…-<number of the case>-<cut>`; a piece is a read of its own, as far as the loop can tell them apart."""
    with suppress(ConnectionError, asyncio.IncompleteReadError):
        while head := await reader.readuntil(b"\r\n\r\n"):
            declared = re.search(rb"(?i)content-length: (\d+)", head)
            if declared is None:  # the list of models
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                continue
            model = orjson.loads(await reader.readexactly(int(declared[1])))["model"]
            _, number, cut = model.split("-")
            case = CASES[int(number)]
            kind = b"text/event-stream" if case.is_sse else b"application/x-ndjson"
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % kind)
            for piece in pieces_of(case, cut):
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                await asyncio.sleep(0)
            writer.write(b"0\r\n\r\n")
    writer.close()


@asynccontextmanager
async def provider(answer: Callable[..., Any]) -> AsyncIterator[str]:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@asynccontextmanager
async def replaying(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with provider(replay) as address:
        addresses = dict.fromkeys(("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "OLLAMA_BASE_URL"), address)
        async with running_gateway(database_url, redis_url, addresses) as gateway:
            yield gateway


# --- one meaning, whatever the way --------------------------------------------------------------------------------


async def read_simply(stream: Stream, answer: Answer) -> None:
    """The reference, in place of `_follow`: a read, a feed, a write, and each is waited for."""
    while stream._stop is None:
        if passed := stream._pass(await answer.read()):
            stream._put(passed)
            await stream._client.drain()


async def ask(client: aiohttp.ClientSession, gateway: Gateway, key: str, number: int, cut: str) -> bytes:
    case = CASES[number]
    body = {**chat_body(f"{case.dialect}/case-{number}-{cut}", stream=True), **case.request}
    body["model"] = f"{case.dialect}/case-{number}-{cut}"
    headers = {"Authorization": f"Bearer {key}"}
    async with client.post(f"{gateway.base_url}/chat/completions", json=body, headers=headers) as response:
        return b"%d %b" % (response.status, _OURS.sub(b"*", await response.read()))


async def ask_all(gateway: Gateway, key: str, cut: str) -> list[bytes]:
    async with aiohttp.ClientSession() as client:
        return await asyncio.gather(*(ask(client, gateway, key, number, cut) for number in range(len(CASES))))


@pytest.mark.parametrize("budget", [False, True], ids=["no budget", "a budget that is asked for more"])
@pytest.mark.parametrize("cut", ["events", "13", "1000000"])
async def test_a_stream_that_is_followed_gives_the_bytes_of_one_that_is_read(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, cut: str, budget: bool
) -> None:
    monkeypatch.setattr("gateway.breaker.WINDOW", -1.0)  # never open: many of the cases are broken streams
    monkeypatch.setattr("gateway.reserve.SLICE", 2)  # the first grant, in tokens: every stream asks for another
    async with replaying(database_url, redis_url) as gateway:
        key = await gateway.new_key(**({"tokens_per_day": 1_000_000_000} if budget else {}))
        direct = await ask_all(gateway, key, cut)
        after_direct = [tuple(row.items()) for row in await gateway.rows()]
        gateway.app[appkeys.BALANCER].forget()  # some cases end with a provider that asks for patience
        monkeypatch.setattr(Stream, "_follow", read_simply)
        simple = await ask_all(gateway, key, cut)
        rows = await gateway.rows()
    for case, one, other in zip(CASES, direct, simple, strict=True):
        assert one == other, case.id
    counted = (
        "provider",
        "outcome",
        "error_code",
        "prompt_tokens",
        "completion_tokens",
        "usage_source",
        "finish_reason",
    )
    figures = sorted([tuple(str(row[name]) for name in counted) for row in rows[len(after_direct) :]])
    assert sorted([tuple(str(dict(row)[name]) for name in counted) for row in after_direct]) == figures
    assert sum(b"[DONE]" in one for one in direct) > len(CASES) / 2


# --- other clients than most --------------------------------------------------------------------------------------

HELLO = next(number for number, case in enumerate(CASES) if case.dialect == "openai" and b"[DONE]" in case.data)


def raw_request(gateway: Gateway, *, version: str = "1.1", more: str = "") -> bytes:
    body = orjson.dumps(chat_body(f"openai/case-{HELLO}-events", stream=True))
    head = (
        f"POST /v1/chat/completions HTTP/{version}\r\nHost: x\r\nAuthorization: Bearer {gateway.api_key}\r\n"
        f"Content-Type: application/json\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def exchange(gateway: Gateway, sent: bytes) -> bytes:
    """All that comes back until the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.root_url.rsplit(":", 1)[1]))
    writer.write(sent)
    async with asyncio.timeout(5):
        answered = await reader.read()
    writer.close()
    return answered


async def test_streams_that_were_asked_for_at_once_on_one_connection_follow_each_other(
    database_url: str, redis_url: str
) -> None:
    async with replaying(database_url, redis_url) as gateway:
        last = raw_request(gateway, more="Connection: close\r\n")
        answered = await exchange(gateway, raw_request(gateway) * 2 + last)
        one, two, three = answered.split(b"HTTP/1.1 200 OK")[1:]
        for answer in (one, two, three):
            assert answer.endswith(b"0\r\n\r\n")
            assert answer.count(b"[DONE]") == 1
        assert [b"Connection: close" in answer for answer in (one, two, three)] == [False, False, True]
        assert [row["outcome"] for row in await gateway.rows()] == ["ok"] * 3


async def test_a_client_of_http_1_0_gets_a_stream_that_ends_with_its_connection(
    database_url: str, redis_url: str
) -> None:
    async with replaying(database_url, redis_url) as gateway:
        answered = await exchange(gateway, raw_request(gateway, version="1.0", more="Connection: keep-alive\r\n"))
        head, _, body = answered.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.0 200 OK")
        assert b"chunked" not in head and b"keep-alive" not in head
        assert body.endswith(b"data: [DONE]\n\n")
        assert CASES[HELLO].events()[0] in body


# --- what a stream does with its answer, step by step -------------------------------------------------------------


class Connected:
    """A provider's connection, as far as an answer uses one."""

    is_open = True
    paused = False

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def cut(self) -> None:
        """Nothing is there."""


class Paid:
    """A reservation that pays for everything, as far as a stream asks one."""

    def used(self, tokens: int) -> bool:
        return True


def streaming(
    *, blocked: bool = False, live: Live | None = None, budget: bool = False
) -> tuple[Stream, Answer, Connected, Meter, Any]:
    """A stream of an OpenAI dialect's answer, to a client that is none."""
    call, meter, connected = make_call("openai"), Meter(()), Connected()
    exchange = Exchange(asked=call.asked, target=call.target, meter=meter)
    exchange.reservation = cast(Reservation, Paid()) if budget else None

    def write(data: bytes) -> None:
        if client.full:  # said within the write, as a transport says it
            client.full, client.blocked = False, True
            client.on_flow()

    client = SimpleNamespace(write=write, full=False, blocked=blocked, on_flow=None, reading_since=0.0, sent=0.0)
    tally = Tally(exchange, meter, live or Live(CounterSeries(), HistogramSeries(INTER_TOKEN_SECONDS)))
    recorder = cast(Recorder, SimpleNamespace(tick=lambda exchange: None))
    stream = Stream(exchange, DIALECTS["openai"].translator(call), tally, cast(Client, client), recorder)
    return stream, Answer(cast(Http1, connected), "example"), connected, meter, client


async def test_a_provider_is_not_read_for_a_client_that_is_blocked_from_the_start() -> None:
    stream, answer, connected, _, client = streaming(blocked=True)
    task = asyncio.create_task(stream.run(answer))
    await asyncio.sleep(0)
    assert connected.paused
    client.blocked = False
    client.on_flow()
    assert not connected.paused
    task.cancel()
    await asyncio.wait([task])


async def test_the_usage_that_came_in_the_turn_in_which_the_client_left_is_billed() -> None:
    stream, answer, _, meter, _ = streaming()
    task = asyncio.create_task(stream.run(answer))
    await asyncio.sleep(0)
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":11,"total_tokens":18}}\n\n'
    answer.received(usage + b"data: [DONE]\n\n")
    task.cancel()
    await asyncio.wait([task])
    stream.settle()
    assert meter.usage is not None
    assert (meter.usage.prompt_tokens, meter.usage.completion_tokens) == (7, 11)


async def test_a_stream_that_runs_says_when_it_last_sent_so_that_no_heartbeat_comes_between() -> None:
    stream, answer, _, _, client = streaming()
    task = asyncio.create_task(stream.run(answer))
    await asyncio.sleep(0)
    assert client.sent == 0.0
    answer.received(b'data: {"choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n')
    assert client.sent > 0.0 and client.reading_since > 0.0
    task.cancel()
    await asyncio.wait([task])


# --- how long the provider takes from text to text ----------------------------------------------------------------


def told(words: str = "", **choice: Any) -> bytes:
    fields = {"index": 0, "delta": {"content": words} if words else {}, **choice}
    return b"data: " + orjson.dumps({"choices": [fields]}) + b"\n\n"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Seconds, as a stream sees them."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("gateway.stream.monotonic", lambda: clock.now)
    return clock


@asynccontextmanager
async def running(*, budget: bool = False) -> AsyncIterator[tuple[Answer, HistogramSeries, Any]]:
    """A stream that is being read: its answer, the gaps that are counted by its end, and its client."""
    live = Live(CounterSeries(), HistogramSeries(INTER_TOKEN_SECONDS))
    stream, answer, _, _, client = streaming(live=live, budget=budget)
    task = asyncio.create_task(stream.run(answer))
    await asyncio.sleep(0)
    yield answer, live.gaps, client
    task.cancel()
    await asyncio.wait([task])
    stream.settle()


def buckets(gaps: HistogramSeries) -> dict[float, int]:
    """How many gaps are in each bucket that has any, by its upper bound."""
    counted = dict(zip((*INTER_TOKEN_SECONDS, float("inf")), gaps.numbers(), strict=False))
    return {bound: int(count) for bound, count in counted.items() if count}


@pytest.mark.parametrize("budget", [False, True], ids=["no budget", "a budget"])
async def test_the_gaps_between_texts_are_counted_and_a_read_without_text_is_none(
    clock: SimpleNamespace, budget: bool
) -> None:
    async with running(budget=budget) as (answer, gaps, _):
        for seconds, read in (
            (9.0, told()),  # the role alone: the model has said nothing yet
            (2.0, told("one")),
            (0.02, told("two") + told("three") + told("four")),
            (0.03, b": still here\n\n"),
            (0.04, told("five")),
            (4.0, told("six")),
            (0.5, told(finish_reason="stop")),
        ):
            clock.now += seconds
            answer.received(read)
    assert buckets(gaps) == {0.025: 1, 0.075: 1, 5.0: 1}
    assert gaps.sum == pytest.approx(4.09)


async def test_gaps_are_counted_while_the_stream_runs(clock: SimpleNamespace) -> None:
    async with running() as (answer, gaps, _):
        for _ in range(40):
            clock.now += 0.02
            answer.received(told("word"))
        assert gaps.count > 25
    assert gaps.count == 39


async def test_how_long_a_client_did_not_read_is_no_gap_of_the_providers(clock: SimpleNamespace) -> None:
    async with running() as (answer, gaps, client):
        for seconds, client.full in ((0.02, False), (0.02, True), (60.0, False), (0.02, False)):
            clock.now += seconds
            if client.blocked:
                client.blocked = False
                client.on_flow()
            answer.received(told("word"))
    assert buckets(gaps) == {0.025: 2}


async def test_what_the_gaps_cost_of_a_chunk(monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None]) -> None:
    """Beside the same stream without them, in turn, because the machine is shared; the median of what they differ by."""
    read, found = told("word"), list[tuple[float, float]]()

    async def cost() -> float:
        """Microseconds of a chunk."""
        async with running() as (answer, _, _):
            answer.received(read)
            began = perf_counter()
            for _ in range(200):
                answer.received(read)
            return (perf_counter() - began) / 200 * 1e6

    monkeypatch.setattr("gateway.stream.LIVE", 0.00005)  # of chunks that come as fast as they can: a dozen
    for _ in range(300):
        with monkeypatch.context() as patched:
            patched.setattr(HistogramSeries, "observe_gaps", lambda gaps, times: None)
            without = await cost()
        found.append((await cost(), without))
    added = median(one - other for one, other in found)
    chunk = median(other for _, other in found)
    figure(f"a chunk: {chunk:.2f} µs from its read to its write, and {added:.2f} to count the gap before it")
    assert (
        added < chunk / 4
    )  # half a microsecond of two; a ratio, because what watches the lines of tests is paid here too


# --- a client that does not read ----------------------------------------------------------------------------------

READERS = 8
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"x" * 4000 + b'"},"finish_reason":null}]}\n\n'


class Endless:
    """Sends as fast as it is read from."""

    def __init__(self) -> None:
        self.sent = 0  # bytes that were given to the kernel
        self.closed = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"POST" not in await reader.readuntil(b"\r\n\r\n"):
            writer.close()
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            while True:
                writer.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
                await writer.drain()
                self.sent += len(EVENT)
        except ConnectionError:
            self.closed += 1


async def stopped_reader(served_port: int, key: str) -> asyncio.StreamWriter:
    reader, writer = await asyncio.open_connection("127.0.0.1", served_port, limit=1024)
    body = orjson.dumps(chat_body("openai/endless", stream=True))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert b" 200 " in await reader.readline()
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    return writer


async def test_readers_that_stop_cost_at_most_8_mib_each_and_their_providers_wait(
    database_url: str, redis_url: str, figure: Callable[[str], None]
) -> None:
    endless = Endless()
    async with provider(endless.answer) as address:
        environ = {
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "OPENAI_BASE_URL": address,
            "GATEWAY_WRITE_TIMEOUT": "4",
            "LOG_LEVEL": "error",
        }
        async with serving(environ, coverage=False) as served:
            key, port = await new_key(served), int(served.root_url.rsplit(":", 1)[1])
            before = served.rss_mb()
            writers = [await stopped_reader(port, key) for _ in range(READERS)]
            sent = -1
            while sent != endless.sent:  # until nothing moves any more
                sent = endless.sent
                await asyncio.sleep(0.5)
            each = (served.rss_mb() - before) / READERS
            figure(f"P5 a reader that stops: {each:.2f} MiB in the gateway, {sent / READERS / 2**20:.1f} MiB were sent")
            assert each <= 8
            await until(lambda: endless.closed == READERS, seconds=15)  # they are dropped, and so are their providers
            for writer in writers:
                writer.close()

"""What providers can do to us, in each dialect, streamed and whole: what of it the client sees, the row, the metric,
and the provider.

Each fault is a provider of its own, so that all of them happen at once, and none is in another's way.
"""

import asyncio
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import formatdate
from itertools import product
from pathlib import Path
from time import monotonic, time
from typing import Any
from urllib.parse import quote, unquote
from uuid import UUID

import aiohttp
import asyncpg
import pytest

from gateway import appkeys
from gateway.http1 import Connection
from gateway.mock import Mock
from tests.support.far import HELLO, free_port, listening, read_request
from tests.support.gateway import MODELS, Gateway, chat_body, running_gateway
from tests.support.process import until

pytestmark = pytest.mark.integration

DIALECTS = list(MODELS)


@pytest.fixture(autouse=True)
def more_providers_than_anybody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their errors are counted apart all the same."""
    monkeypatch.setattr("gateway.metrics.MAX_PROVIDERS", 64)


TIMES = {
    "GATEWAY_FIRST_BYTE_TIMEOUT": "4",
    "GATEWAY_TOTAL_TIMEOUT": "4",
    "GATEWAY_IDLE_TIMEOUT": "2",
    "GATEWAY_MAX_STREAM": "4",
}
LONGEST = 3 * 4 + 2 + 5  # seconds: at most three attempts, a silence, and what a busy machine needs

UNSENT, REFUSED, BROKEN, LATE = "", "rejected", "upstream_error", "upstream_timeout"
ONCE = frozenset({"http_4xx", "auth", "timeout_headers", "timeout_total"})  # kinds that nothing is tried again after


@dataclass(frozen=True, slots=True)
class Fault:
    """What the provider does, and what has to come of it."""

    script: str  # the mock's; of a raw one its name in RAW
    status: int
    code: str | None  # None: the provider's own
    kind: str  # "": nothing went wrong
    outcome: str = BROKEN
    billed: bool | None = False  # the prompt is, at least; None: either may be
    retry_after: str = ""
    raw: bool = False


# --- before there is an answer --------------------------------------------------------------------------------------

UNREACHABLE = "upstream_unreachable"
EARLY = {
    "closes": Fault("fault=close_before_headers", 502, UNREACHABLE, "reset"),
    "resets": Fault("fault=reset_before_headers", 502, UNREACHABLE, "reset"),
    "speaks TLS": Fault("fault=garbage", 502, UNREACHABLE, "protocol"),
    "redirects": Fault("fault=redirect", 502, "upstream_error", "redirect"),
    "has a web page": Fault("fault=html", 502, "upstream_error", "bad_body", billed=None),
    "huge headers": Fault("huge headers", 502, UNREACHABLE, "protocol", raw=True),
    "NUL in a header": Fault("NUL in a header", 502, UNREACHABLE, "protocol", raw=True),
    "line feed in a header": Fault("line feed in a header", 502, UNREACHABLE, "protocol", raw=True),
    "unknown coding": Fault("unknown coding", 502, "upstream_error", "bad_body", billed=None, raw=True),
    "half a head": Fault("half a head", 502, UNREACHABLE, "reset", raw=True),
}
EARLY_STREAM = EARLY | {
    "is not gzip as it says": Fault("not gzip", 502, "upstream_error", "bad_body", billed=None, raw=True),
    "is silent": Fault("headers_ms=60000", 504, "upstream_timeout", "timeout_headers", LATE, billed=True),
    "dribbles its head": Fault("dribble", 504, "upstream_timeout", "timeout_headers", LATE, billed=True, raw=True),
    "is empty": Fault("fault=empty", 502, "upstream_truncated", "truncated", billed=None),
    "is half JSON": Fault("fault=broken_json", 502, "upstream_error", "bad_body", billed=None),
}
EARLY_WHOLE = EARLY | {
    "is silent": Fault("headers_ms=60000", 504, "upstream_timeout", "timeout_total", LATE, billed=True),
    "dribbles its head": Fault("dribble", 504, "upstream_timeout", "timeout_total", LATE, billed=True, raw=True),
    "dribbles its body": Fault("fault=stall", 504, "upstream_timeout", "timeout_total", LATE, billed=True),
    "is empty": Fault("fault=empty", 502, "upstream_error", "bad_body", billed=None),
    "is half JSON": Fault("fault=broken_json", 502, "upstream_error", "bad_body", billed=None),
    "is shorter than it says": Fault("fault=cut", 502, "upstream_truncated", "truncated", billed=None),
    "resets in the middle": Fault("fault=reset", 502, "upstream_truncated", "reset"),
    "is a bomb": Fault("bomb", 502, "upstream_error", "bad_body", billed=None, raw=True),
}
REFUSALS = {
    **{
        f"says {status}": Fault(f"status={status}", status, None, "http_4xx", REFUSED)
        for status in (400, 404, 413, 422)
    },
    **{f"says {status}": Fault(f"status={status}", 502, "provider_auth", "auth") for status in (401, 403)},
    "says 429": Fault("status=429&retry_after=7", 429, None, "http_429", REFUSED, retry_after="7"),
    "says 429 and no more": Fault("status=429", 429, None, "http_429", REFUSED, retry_after="1"),
    **{f"says {status}": Fault(f"status={status}", 502, None, "http_5xx") for status in (500, 502, 504, 599)},
    **{
        f"says {status}": Fault(f"status={status}&retry_after=7", 503, "overloaded", "http_5xx", retry_after="7")
        for status in (503, 529)
    },
}

# --- in the middle of a stream --------------------------------------------------------------------------------------

MIDDLE = {
    "resets in the middle": Fault("fault=reset", 200, "upstream_truncated", "reset", billed=True),
    "closes in the middle": Fault("fault=truncate", 200, "upstream_truncated", "truncated", billed=True),
    "ends without a last word": Fault("fault=cut", 200, "upstream_truncated", "truncated", billed=True),
    "falls silent": Fault("fault=stall", 200, "upstream_timeout", "timeout_idle", LATE, billed=True),
    "says that it failed": Fault("fault=error_event", 200, None, "error_event", billed=True),
    "talks nonsense": Fault("fault=bad_json_3", 200, "upstream_error", "bad_event", billed=True),
    "sends 2 MiB in one event": Fault("fault=huge_event", 200, "event_too_large", "event_too_large", billed=True),
    "never ends": Fault("fault=endless&pace_ms=20", 200, "upstream_too_long", "too_long", billed=True),
    "breaks its chunks": Fault("bad chunk", 200, "upstream_truncated", "protocol", billed=True, raw=True),
    "is not in UTF-8": Fault("bad UTF-8", 200, "upstream_error", "bad_event", billed=True, raw=True),
    "sends no line end": Fault("no line end", 200, "event_too_large", "event_too_large", billed=True, raw=True),
}

# --- what is no fault of the client's -------------------------------------------------------------------------------

FINE = {
    "one bad event": Fault("fault=bad_json", 200, None, "", "ok", billed=True),
    "an event of 256 KiB": Fault("fault=event_256k", 200, None, "", "ok", billed=True),
    "no last word": Fault("fault=no_done", 200, None, "", "ok", billed=True),
    "no usage": Fault("fault=no_usage", 200, None, "", "ok", billed=True),
    "open after the last word": Fault("fault=hang_open", 200, None, "", "ok", billed=True),
    "compressed": Fault("fault=gzip", 200, None, "", "ok", billed=True),
    "reset after the last word": Fault("fault=reset_after_reply", 200, None, "", "ok", billed=True),
}
_STREAMS = ("one bad event", "no last word", "open after the last word")
FINE_WHOLE = {name: fault for name, fault in FINE.items() if name not in _STREAMS} | {
    "2 MiB of text": Fault("fault=huge_event", 200, None, "", "ok", billed=True),
}

MODES = (True, False)

# --- providers that say what no server of HTTP would ----------------------------------------------------------------

SSE, NDJSON = b"text/event-stream", b"application/x-ndjson"
TYPES = {"openai": SSE, "anthropic": SSE, "ollama": NDJSON}
FIRST = {  # of a stream, with a text in it
    "openai": b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":"a few words"}}]}\n\n',
    "anthropic": b'data: {"type":"message_start","message":{"id":"m","model":"m","content":[],"usage":'
    b'{"input_tokens":9,"output_tokens":1}}}\n\n'
    b'data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":"a few words"}}\n\n',
    "ollama": b'{"model":"m","message":{"role":"assistant","content":"a few words"},"done":false}\n',
}
OK = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n"


def raw_answers(dialect: str) -> Mapping[str, list[bytes]]:
    """Pieces by the name of the fault. The connection is closed after them, but for what is said below."""
    head, first = OK % TYPES[dialect], FIRST[dialect]
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(first), first)
    until_close = head + b"\r\n" + first
    end = b"\n" if dialect == "ollama" else b"\n\n"
    return {
        "huge headers": [head + b"X: " + b"x" * (1 << 17) + b"\r\n\r\n"],
        "NUL in a header": [head + b"X: a\0b\r\nContent-Length: 2\r\n\r\n{}"],
        "line feed in a header": [head + b"X: a\nSet-Cookie: b\r\nContent-Length: 2\r\n\r\n{}"],
        "unknown coding": [head + b"Content-Encoding: br\r\nContent-Length: 2\r\n\r\n{}"],
        "half a head": [head + b"X: a"],
        "bomb": [OK % b"application/json" + b"Content-Encoding: gzip\r\n\r\n" + _bomb()],
        "bad chunk": [chunked + b"ZZ\r\nbad\r\n", HANG],
        "bad UTF-8": [until_close + (b'data: {"x":"\xff"}' + end) * 3, HANG],
        "no line end": [until_close, *[b"x" * (1 << 18)] * 8, HANG],
        "not gzip": [head + b"Content-Encoding: gzip\r\n\r\nthis is not gzip, which has a header of its own", HANG],
        "dribble": [DRIBBLE],
        **{f"{status} until a date": [_until_a_date(status)] for status in (429, 503, 529)},
    }


HANG, DRIBBLE = b"...", b"."  # in the place of a piece: nothing more comes; a byte of a head every 20 ms, without end


def _until_a_date(status: int) -> bytes:
    """RFC 9110 10.2.3: half a minute from now on."""
    date = formatdate(time() + 30, usegmt=True)
    return f"HTTP/1.1 {status} Later\r\nRetry-After: {date}\r\nContent-Length: 2\r\n\r\n{{}}".encode()


def _bomb() -> bytes:
    """A megabyte of it is a gigabyte of spaces; this is 160 MiB, more than any answer may have."""
    packer = zlib.compressobj(wbits=31)
    mebibyte = b" " * (1 << 20)
    return b"".join([packer.compress(mebibyte) for _ in range(160)]) + packer.flush()


class Raw:
    """Answers `POST /NAME/…` with the pieces of that name, and notes whose connections are open."""

    def __init__(self, answers: Mapping[str, list[bytes]]) -> None:
        self.address = ""
        self.calls: list[str] = []  # names
        self.open: list[str] = []
        self._answers = answers

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await read_request(reader)
            method, path = request.split(b" ", 2)[:2]
            name = unquote(path.split(b"/")[1].decode())
            if method == b"POST":
                await self._play(name, reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _play(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.calls.append(name)
        self.open.append(name)
        try:
            for piece in self._answers[name]:
                if piece == DRIBBLE:
                    await self._dribble(writer)
                elif piece == HANG:
                    await reader.read()
                else:
                    writer.write(piece)
                    await writer.drain()
        finally:
            self.open.remove(name)

    async def _dribble(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nX: ")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)


# --- one gateway before them all ------------------------------------------------------------------------------------


@dataclass
class World:
    """A gateway, and behind it a provider for each fault that is asked for."""

    gateway: Gateway
    dialect: str
    mock: Mock
    raw: Raw
    client: aiohttp.ClientSession

    async def call(self, name: str, fault: Fault, *, stream: bool) -> "Told":
        model = f"{provider_name(name, stream)}/{MODELS[self.dialect].partition('/')[2]}"
        body = chat_body(model if fault.raw else f"{model}?{fault.script}", f"{name} {stream}", stream=stream)
        started = monotonic()
        async with self.client.post(f"{self.gateway.base_url}/chat/completions", json=body) as response:
            text = await response.text()  # raises when the body does not end as HTTP says
        return Told(name, fault, response.status, response.headers, text, monotonic() - started)

    def calls(self, told: "Told", *, stream: bool) -> int:
        """How often its provider was asked."""
        if told.fault.raw:
            return self.raw.calls.count(told.fault.script)
        return sum(f'"{told.name} {stream}"'.encode() in call.body for call in self.mock.received)

    @property
    def idle(self) -> set[Connection]:
        pool = self.gateway.app[appkeys.UPSTREAM]._pool
        return {connection for kept in pool._idle.values() for connection in kept}

    async def none_in_use(self) -> None:
        """What is still open has nothing more to say, and waits in the pool."""
        pool = self.gateway.app[appkeys.UPSTREAM]._pool
        await until(lambda: pool._open == self.idle and not self.raw.open, 10)


@dataclass(frozen=True, slots=True)
class Told:
    """What the client was told."""

    name: str
    fault: Fault
    status: int
    headers: Mapping[str, str]
    text: str
    seconds: float

    @property
    def events(self) -> list[str]:
        return [line[6:] for line in self.text.split("\n") if line.startswith("data: ")]

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.events[-1] if self.status == 200 else self.text)["error"]
        return found


async def failures(gateway: Gateway, client: aiohttp.ClientSession) -> defaultdict[str, Counter[str]]:
    """Kinds, by the provider's name."""
    async with client.get(f"{gateway.root_url}/metrics") as response:
        page = await response.text()
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for line in page.splitlines():
        if line.startswith("gateway_upstream_errors_total{") and not line.endswith(" 0"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            found[labels["provider"]][labels["kind"]] = int(line.rpartition(" ")[2])
    return found


def provider_name(name: str, stream: bool) -> str:
    """Two for each fault: after a 401 a provider is not asked again for a while."""
    return f"{name.replace(' ', '-').lower()}-{'stream' if stream else 'whole'}"


@asynccontextmanager
async def world(
    database_url: str, redis_url: str, folder: Path, dialect: str, faults: Mapping[str, Fault], modes: tuple[bool, ...]
) -> AsyncIterator[World]:
    mock, raw = Mock(), Raw(raw_answers(dialect))
    server = await asyncio.start_server(raw.serve, "127.0.0.1", 0)
    raw.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    address = await mock.start()
    config = folder / "gateway.toml"
    config.write_text(
        "".join(
            row(name, fault, dialect, raw.address if fault.raw else address, stream)
            for name, fault in faults.items()
            for stream in modes
        )
    )
    environ = {**TIMES, "GATEWAY_CONFIG": str(config)}
    try:
        async with (
            running_gateway(database_url, redis_url, environ) as gateway,
            aiohttp.ClientSession(
                headers=gateway.headers,
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=2 * LONGEST),
            ) as client,
        ):
            looked_at = gateway.app[appkeys.CATALOGUE].reachable
            await until(
                lambda: all(provider_name(name, stream) in looked_at for name in faults for stream in modes), 30
            )
            await known(client, gateway)
            yield World(gateway, dialect, mock, raw, client)
    finally:
        server.close()
        await mock.stop()


async def known(client: aiohttp.ClientSession, gateway: Gateway) -> None:
    """A key that is not known yet is refused by a Postgres that takes longer than half a second, whatever the fault."""
    deadline = monotonic() + 30
    while monotonic() < deadline:
        async with client.get(f"{gateway.base_url}/models") as response:
            if response.status == 200:
                return
            assert response.status == 503, await response.text()
        await asyncio.sleep(0.1)
    raise AssertionError("the key was never known")


def row(name: str, fault: Fault, dialect: str, address: str, stream: bool) -> str:
    path = (f"/{quote(fault.script)}" if fault.raw else "") + ("/v1" if dialect == "openai" else "")
    return f'[providers."{provider_name(name, stream)}"]\nbase_url = "{address}{path}"\ndialect = "{dialect}"\nneeds_key = false\n'


async def run(world: World, faults: Mapping[str, Fault], *, stream: bool) -> list[Told]:
    """All of them, one beside the other; what every one of them must leave behind is asserted here."""
    told = await asyncio.gather(*[world.call(name, fault, stream=stream) for name, fault in faults.items()])
    rows = {row["request_id"]: row for row in await world.gateway.rows()}
    seen = await failures(world.gateway, world.client)
    assert max(one.seconds for one in told) < LONGEST, {one.name: one.seconds for one in told}
    for one in told:
        request_id = UUID(one.headers["X-Request-Id"])
        assert request_id in rows, f"{one.name} has no row: {one.status} {one.text[:300]} {dict(one.headers)}"
        check_row(one, rows[request_id])
        check_calls(one, world.calls(one, stream=stream), seen[provider_name(one.name, stream)])
    return told


def check_row(told: Told, row: asyncpg.Record) -> None:
    fault = told.fault
    assert (told.name, row["outcome"], row["status"]) == (told.name, fault.outcome, fault.status)
    if fault.kind:
        assert (told.name, row["error_code"]) == (told.name, told.error["code"])
    if fault.billed:
        assert row["prompt_tokens"] > 0, told.name
    elif fault.billed is False:
        assert (told.name, row["prompt_tokens"], row["completion_tokens"]) == (told.name, 0, 0)


def check_calls(told: Told, calls: int, failures: Counter[str]) -> None:
    """A provider is asked again only for what cannot have cost anything, at most twice, and never in mid-stream."""
    once = told.status == 200 or told.fault.kind in ONCE
    assert set(failures) == ({told.fault.kind} if told.fault.kind else set()), told.name
    attempts = failures.total() or 1
    assert attempts == 1 if once else 1 <= attempts <= 3, (told.name, attempts)
    # A connection from the pool that is closed without a byte may have been closed before, and does not count.
    assert calls == attempts or (told.fault.kind == "reset" and calls <= 2 * attempts), (told.name, calls, attempts)


def check_refusal(told: Told) -> None:
    fault = told.fault
    assert (told.name, told.status, told.headers["Content-Type"]) == (
        told.name,
        fault.status,
        "application/json; charset=utf-8",
    )
    error = told.error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"], told.name
    assert fault.code in (None, error["code"]), (told.name, error)
    assert told.headers.get("Retry-After", "") == fault.retry_after, told.name


# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_stream_that_breaks_never_looks_whole_and_one_that_never_began_is_a_status(
    database_url: str, redis_url: str, tmp_path: Path, figure: Callable[[str], None], dialect: str
) -> None:
    async with world(database_url, redis_url, tmp_path, dialect, EARLY_STREAM | MIDDLE, (True,)) as the:
        idle = the.idle  # the lists of models were read on them
        told = await run(the, EARLY_STREAM | MIDDLE, stream=True)
        await the.none_in_use()
        assert the.idle <= idle, "a connection that a fault came on is used again"
    broken = [one for one in told if one.name in MIDDLE]
    for one in broken:
        check_broken_stream(one)
    for one in told:
        if one.name not in MIDDLE:
            check_refusal(one)
    slowest = max(one.seconds for one in told)
    figure(f"P3 {dialect}: {len(broken)} of {len(MIDDLE)} mid-stream faults ended with an error event and no [DONE]")
    figure(f"P2 {dialect}, streamed: the longest of {len(told)} faults took {slowest:.1f} s of the {LONGEST} s allowed")


def check_broken_stream(told: Told) -> None:
    assert (told.name, told.status) == (told.name, 200)
    assert told.text.endswith("\n\n")
    *before, last = told.events
    assert any('"content":' in event for event in before), f"{told.name}: what came before must not be lost"
    assert not [event for event in before if '"error"' in event or event == "[DONE]"], told.name
    assert set(json.loads(last)["error"]) == {"message", "type", "param", "code"}
    assert told.fault.code in (None, told.error["code"]), (told.name, told.error)
    assert "HTTP/1.1" not in told.text


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_whole_answer_that_breaks_is_a_status(
    database_url: str, redis_url: str, tmp_path: Path, figure: Callable[[str], None], dialect: str
) -> None:
    async with world(database_url, redis_url, tmp_path, dialect, EARLY_WHOLE, (False,)) as the:
        told = await run(the, EARLY_WHOLE, stream=False)
        await the.none_in_use()
    for one in told:
        check_refusal(one)
    slowest = max(one.seconds for one in told)
    figure(f"P2 {dialect}, whole: the longest of {len(told)} faults took {slowest:.1f} s of the {LONGEST} s allowed")


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_refusals_keep_their_meaning_and_what_does_not_matter_is_served(
    database_url: str, redis_url: str, tmp_path: Path, dialect: str
) -> None:
    fine = {True: dict(FINE), False: FINE_WHOLE}
    if dialect == "ollama":
        del fine[True]["no last word"]  # the finish reason is in it
    async with world(database_url, redis_url, tmp_path, dialect, REFUSALS | FINE | FINE_WHOLE, MODES) as the:
        for stream in MODES:
            for one in await run(the, REFUSALS, stream=stream):
                check_refusal(one)
            for one in await run(the, fine[stream], stream=stream):
                assert (one.name, one.status) == (one.name, 200), one.text
                assert (one.events[-1:] == ["[DONE]"]) is stream, one.name
        await the.none_in_use()


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_date_until_which_a_provider_wants_to_be_left_alone_is_passed_on_in_seconds(
    database_url: str, redis_url: str, tmp_path: Path, dialect: str
) -> None:
    faults = {
        f"until a date {status}": Fault(f"{status} until a date", status, None, "", raw=True)
        for status in (429, 503, 529)
    }
    async with world(database_url, redis_url, tmp_path, dialect, faults, MODES) as the:
        for stream in MODES:
            for name, fault in faults.items():
                told = await the.call(name, fault, stream=stream)
                assert told.status == (429 if fault.status == 429 else 503)
                assert 1 <= int(told.headers["Retry-After"]) <= 30


async def test_a_provider_that_was_never_reached_costs_nothing_and_says_why(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    async def speak_plainly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HELLO)
        writer.close()

    async with listening(speak_plainly) as port:
        addresses = {
            "dns": "http://nothing.invalid/v1",  # RFC 2606 2
            "tls": f"https://127.0.0.1:{port}/v1",
            "connect": f"http://127.0.0.1:{await free_port()}/v1",
        }
        config = tmp_path / "gateway.toml"
        config.write_text(
            "".join(
                f'[providers.{provider_name(name, stream)}]\nbase_url = "{address}"\nneeds_key = false\n'
                for name, address in addresses.items()
                for stream in MODES
            )
        )
        async with (
            running_gateway(database_url, redis_url, {**TIMES, "GATEWAY_CONFIG": str(config)}) as gateway,
            aiohttp.ClientSession(headers=gateway.headers) as client,
        ):
            for name, stream in product(addresses, MODES):
                body = chat_body(f"{provider_name(name, stream)}/m", stream=stream)
                async with client.post(f"{gateway.base_url}/chat/completions", json=body) as response:
                    error = (await response.json())["error"]
                assert (name, response.status, error["code"]) == (name, 502, UNREACHABLE)
                assert "127.0.0.1" not in error["message"]
            assert await gateway.rows() == [], "nothing was sent"
            seen = await failures(gateway, client)
            for name, stream in product(addresses, MODES):
                assert set(seen[provider_name(name, stream)]) == {name}

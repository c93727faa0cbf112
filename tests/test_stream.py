"""What a stream's client gets does not depend on the way it takes through the gateway, and who does not read costs little."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import orjson
import pytest

from gateway import stream
from tests.support.gateway import Gateway, chat_body, running_gateway
from tests.support.process import new_key, serving, until
from tests.support.streams import Case, load_cases

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
async def test_the_direct_way_and_the_simple_one_give_the_same_bytes(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, cut: str, budget: bool
) -> None:
    monkeypatch.setattr("gateway.reserve.SLICE", 2)  # the first grant, in tokens: every stream asks for another
    async with replaying(database_url, redis_url) as gateway:
        key = await gateway.new_key(**({"tokens_per_day": 1_000_000_000} if budget else {}))
        direct = await ask_all(gateway, key, cut)
        after_direct = [tuple(row.items()) for row in await gateway.rows()]
        monkeypatch.setattr(stream, "DIRECT", False)
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
            figure(f"a reader that stops: {each:.2f} MiB in the gateway, {sent / READERS / 2**20:.1f} MiB were sent")
            assert each <= 8
            await until(lambda: endless.closed == READERS, seconds=15)  # they are dropped, and so are their providers
            for writer in writers:
                writer.close()

"""A client that leaves, at each phase of a request: one right row, or none where nothing was sent."""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import asyncpg
import pytest

from gateway.mock import Received
from gateway.mock.stage import reset
from tests.support.gateway import MODELS, Gateway, chat_body, running_gateway
from tests.support.process import until
from tests.support.standin import standing_in

pytestmark = pytest.mark.integration

DIALECTS = list(MODELS)
CONTENT = b'"content":"'
PROMPT = "one two three four " * 10


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        gateway.api_key = await gateway.new_key(concurrent_requests=1)  # whoever leaves must free it
        yield gateway


class Caller:
    """One request, written and read by hand, on a connection that can be dropped at any byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.received = b""

    async def read_texts(self, count: int, seconds: float = 5) -> None:
        """Until so many chunks with text in them have come."""
        while self.received.replace(CONTENT + b'"', b"").count(CONTENT) < count:
            await self._read_more(seconds)

    async def read_until(self, words: bytes) -> None:
        while words not in self.received:
            await self._read_more()

    async def _read_more(self, seconds: float = 5) -> None:
        data = await asyncio.wait_for(self._reader.read(1 << 16), seconds)
        assert data, f"the answer ended with {self.received[-200:]!r}"
        self.received += data

    def leave(self) -> None:
        self._writer.transport.abort()

    def say_goodbye(self) -> None:
        """A FIN, and nothing is taken any more."""
        self._writer.close()

    def reset(self) -> None:
        reset(self._writer.transport)

    def stop_reading(self) -> None:
        """What its kernel takes all the same is its own affair, and little."""
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]


@asynccontextmanager
async def calling(gateway: Gateway, body: dict[str, Any], *, send: float = 1.0) -> AsyncIterator[Caller]:
    """A caller that has sent its request, or that part of its body. It leaves at the end of the block."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.root_url.rsplit(":", 1)[1]))
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.api_key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data[: int(len(data) * send)])
    caller = Caller(reader, writer)
    try:
        yield caller
    finally:
        caller.leave()


async def last_row(gateway: Gateway) -> asyncpg.Record:
    """Once the key's only slot is free again. Every call has one, and no other has."""
    await slot_is_free(gateway)
    rows = await gateway.rows()
    assert len(rows) == len(gateway.calls)
    return rows[-1]


async def slot_is_free(gateway: Gateway, seconds: float = 1.0) -> None:
    """A request that is refused for what is in it takes a slot, and leaves no row."""
    deadline = monotonic() + seconds
    async with aiohttp.ClientSession(headers=gateway.headers) as client:
        while await _status(client, gateway, {}) == 429:
            assert monotonic() < deadline, f"the slot was not free within {seconds} s"
            await asyncio.sleep(0.01)


async def _status(client: aiohttp.ClientSession, gateway: Gateway, body: dict[str, Any]) -> int:
    async with client.post(f"{gateway.base_url}/chat/completions", json=body) as response:
        return response.status


async def provider_is_asked(gateway: Gateway, calls: int) -> None:
    """For the so many-th time, and what it says at once is with the gateway."""
    await until(lambda: len(gateway.calls) == calls and gateway.calls[-1].phase != "body", 5)
    await asyncio.sleep(0.05)


async def provider_sees_it(gateway: Gateway, seconds: float = 1.0) -> None:
    await until(lambda: gateway.calls[-1].client_gone_at is not None, seconds)


# --- nothing was sent ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_client_that_leaves_in_its_request_body_leaves_no_row(gateway: Gateway, stream: bool) -> None:
    async with calling(gateway, chat_body(MODELS["openai"], stream=stream), send=0.5):
        async with aiohttp.ClientSession(headers=gateway.headers) as client:
            while await _status(client, gateway, {}) != 429:  # until its headers are read and the slot is its own
                await asyncio.sleep(0.01)
    await slot_is_free(gateway)
    assert (await gateway.rows(), gateway.calls) == ([], [])


# --- before there was a text --------------------------------------------------------------------------------------

SILENT = {
    "before the headers": ("headers_ms=30000", True),
    "after the headers": ("ttft_ms=30000", True),
    "before a whole answer": ("headers_ms=30000", False),
    "in a whole answer": ("fault=stall", False),
}


@pytest.mark.parametrize("phase", SILENT)
async def test_a_client_that_leaves_before_any_text_pays_for_its_prompt(gateway: Gateway, phase: str) -> None:
    script, stream = SILENT[phase]
    for number, model in enumerate(MODELS.values(), 1):
        async with calling(gateway, chat_body(f"{model}?{script}", PROMPT, stream=stream)):
            await provider_is_asked(gateway, number)
        await provider_sees_it(gateway)
        row = await last_row(gateway)
        assert (row["outcome"], row["status"], row["error_code"], row["ttft_ms"]) == ("client_abort", 0, "", None)
        assert (row["completion_tokens"], row["finish_reason"]) == (0, "")
        assert 40 <= row["prompt_tokens"] <= 70  # of forty words
        assert row["usage_source"] in ("counted", "estimated")


# --- after the first text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [1, 20], ids=["first token", "middle"])
async def test_a_client_that_leaves_in_mid_stream_pays_for_the_text_so_far(gateway: Gateway, texts: int) -> None:
    for model in MODELS.values():
        async with calling(gateway, chat_body(f"{model}?fault=stall&after={texts}", PROMPT, stream=True)) as caller:
            await caller.read_texts(texts)
        await provider_sees_it(gateway)
        row = await last_row(gateway)
        assert (row["outcome"], row["status"], row["finish_reason"]) == ("client_abort", 200, "")
        assert texts <= row["completion_tokens"] <= texts * 2  # a piece of the mock's is a token, or a word of two
        assert row["prompt_tokens"] >= 40
        assert row["usage_source"] in ("counted", "estimated")
        assert row["ttft_ms"] is not None


async def test_a_client_that_leaves_while_text_flows_pays_for_what_had_passed(gateway: Gateway) -> None:
    for model in MODELS.values():
        async with calling(gateway, chat_body(f"{model}?case=long&pace_ms=20", stream=True)) as caller:
            await caller.read_texts(10)
        await provider_sees_it(gateway)
        row = await last_row(gateway)
        assert (row["outcome"], row["status"]) == ("client_abort", 200)
        assert 10 <= row["completion_tokens"] <= 100


# --- near the end -------------------------------------------------------------------------------------------------

_OPENAI = b'data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"m","choices":[%s],"usage":%s}\n\n'
_ANTHROPIC = b"event: %s\ndata: %s\n\n"
_OLLAMA = b'{"model":"m","created_at":"2026-11-01T00:00:00Z","message":{"role":"assistant","content":"%s"},"done":%s}\n'
# A text, the finish reason, and what comes after it; the usage is (9, 4), as soon as the provider says it.
ENDINGS = {
    "openai": [
        _OPENAI % (b'{"index":0,"delta":{"role":"assistant","content":"four little words here"}}', b"null"),
        _OPENAI % (b'{"index":0,"delta":{},"finish_reason":"stop"}', b"null"),
        _OPENAI % (b"", b'{"prompt_tokens":9,"completion_tokens":4,"total_tokens":13}') + b"data: [DONE]\n\n",
    ],
    "anthropic": [
        _ANTHROPIC
        % (
            b"message_start",
            b'{"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant","model":"m",'
            b'"content":[],"stop_reason":null,"usage":{"input_tokens":9,"output_tokens":1}}}',
        )
        + _ANTHROPIC
        % (
            b"content_block_start",
            b'{"type":"content_block_start","index":0,"content_block":{"type":"text","text":"four little words here"}}',
        ),
        _ANTHROPIC
        % (
            b"message_delta",
            b'{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":4}}',
        ),
        _ANTHROPIC % (b"message_stop", b'{"type":"message_stop"}'),
    ],
    "ollama": [
        _OLLAMA % (b"four little words here", b"false"),
        _OLLAMA % (b"", b'true,"done_reason":"stop","prompt_eval_count":9,"eval_count":4'),
    ],
}


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_client_that_leaves_after_the_finish_reason_leaves_one_row_with_all_that_was_said(
    database_url: str, redis_url: str, dialect: str
) -> None:
    media_type = "application/x-ndjson" if dialect == "ollama" else "text/event-stream"
    async with standing_in(ENDINGS[dialect], pause=0.3, content_type=media_type) as provider:
        address = {f"{dialect.upper()}_BASE_URL": provider.address + ("/v1" if dialect == "openai" else "")}
        async with running_gateway(database_url, redis_url, address) as gateway:
            gateway.api_key = await gateway.new_key(concurrent_requests=1)
            async with calling(gateway, chat_body(f"{dialect}/m", PROMPT, stream=True)) as caller:
                await caller.read_until(b'"finish_reason":"stop"')
            await slot_is_free(gateway)
            [row] = await gateway.rows()
    assert (row["status"], row["finish_reason"]) == (200, "stop")
    if dialect == "openai":  # its usage comes after the finish reason
        assert (row["outcome"], row["usage_source"] != "provider") == ("client_abort", True)
        assert row["prompt_tokens"] >= 40
        assert 4 <= row["completion_tokens"] <= 8
    else:
        # Ollama's last line is all at once, so there it may have had everything.
        assert row["outcome"] in (("client_abort",) if dialect == "anthropic" else ("client_abort", "ok"))
        assert (row["usage_source"], row["prompt_tokens"], row["completion_tokens"]) == ("provider", 9, 4)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_client_that_leaves_after_the_last_byte_had_everything(gateway: Gateway, stream: bool) -> None:
    for model in [*MODELS.values()] * 5:
        async with calling(gateway, chat_body(f"{model}?prompt_tokens=33&tokens=7", stream=stream)) as caller:
            await caller.read_until(b"data: [DONE]\n\n" if stream else b'"usage"')
        row = await last_row(gateway)
        assert (row["outcome"], row["status"], row["usage_source"]) == ("ok", 200, "provider")
        assert (row["prompt_tokens"], row["completion_tokens"]) == (33, 7)


async def test_a_client_that_leaves_while_it_gets_a_whole_answer_pays_the_provider_s_figure(
    database_url: str, redis_url: str
) -> None:
    long = json.dumps({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}, "x": "y" * 20_000_000})
    async with standing_in([long.encode()], content_type="application/json") as provider:
        address = {"OPENAI_BASE_URL": f"{provider.address}/v1"}
        async with running_gateway(database_url, redis_url, address) as gateway:
            async with calling(gateway, chat_body("gpt-4o")) as caller:
                await caller.read_until(b"yyy")
            [row] = await gateway.rows()
    assert (row["outcome"], row["status"], row["usage_source"]) == ("client_abort", 200, "provider")
    assert (row["prompt_tokens"], row["completion_tokens"]) == (9, 4)


# --- what is left of them -----------------------------------------------------------------------------------------

IDLE = len(MODELS)  # connections that may be open: on them the providers' lists of models are read now and then
DOING = {  # what the provider does when its client goes
    "before the headers": "headers_ms=60000",
    "before the first token": "ttft_ms=60000",
    "talking": "case=long&pace_ms=20",
    "silent in the middle": "fault=stall",
}


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_a_provider_is_closed_when_its_client_goes_whatever_it_is_doing(
    gateway: Gateway, figure: Callable[[str], None], how: str
) -> None:
    number, slowest = 0, 0.0
    for model in MODELS.values():
        for doing, script in DOING.items():
            number += 1
            async with calling(gateway, chat_body(f"{model}?{script}", stream=True)) as caller:
                await provider_is_asked(gateway, number)
                if doing in ("talking", "silent in the middle"):
                    await caller.read_texts(3)
                left = monotonic()
                caller.say_goodbye() if how == "FIN" else caller.reset()
                await provider_sees_it(gateway, 3)
            gone = gateway.calls[-1].client_gone_at
            assert gone is not None
            slowest = max(slowest, gone - left)
            await slot_is_free(gateway, 3)
    figure(f"P4 client gone ({how}): upstream closed within {slowest * 1000:.0f} ms, in {number} of {number} cases")


async def test_120_abandoned_streams_leave_no_call_no_descriptor_and_no_memory(
    gateway: Gateway, figure: Callable[[str], None]
) -> None:
    gateway.api_key = await gateway.new_key()
    await abandon(gateway, 12)  # what stays of the first is there for all
    descriptors, memory = open_descriptors(), resident()
    left = monotonic()
    calls = await abandon(gateway, 120)
    slowest = max(call.client_gone_at or 0 for call in calls) - left
    more, grown = open_descriptors() - descriptors, (resident() - memory) / 2**20
    open_calls = sum(not call.finished and call.client_gone_at is None for call in gateway.calls)
    figure(
        f"P15 120 abandoned streams: {open_calls} upstream calls left, all closed {slowest:.2f} s after the first began; "
        f"{more:+d} descriptors, {grown:+.1f} MiB, with the provider and the clients in the same process"
    )
    assert open_calls == 0
    assert gateway.mock.open_connections <= IDLE
    assert more <= 20
    assert grown <= 50
    rows = await gateway.rows()
    assert len(rows) == len(gateway.calls)
    assert {row["outcome"] for row in rows} == {"client_abort"}


async def abandon(gateway: Gateway, count: int) -> list[Received]:
    """So many streams at once, whose clients go at every moment in turn; what the provider was asked."""
    before = len(gateway.calls)
    scripts = list(DOING.values())
    async with AsyncExitStack() as callers:
        for number in range(count):
            model = list(MODELS.values())[number % 3]
            body = chat_body(f"{model}?{scripts[number % 4]}", stream=True)
            caller = await callers.enter_async_context(calling(gateway, body))
            if number % 8 == 2:
                caller.stop_reading()
        await until(lambda: len(gateway.calls) == before + count, 20)
    calls = gateway.calls[before:]
    await until(lambda: all(call.client_gone_at is not None for call in calls), 20)
    await until(lambda: gateway.mock.open_connections <= IDLE, 20)
    return calls


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_150_streams_at_once_run_at_once(gateway: Gateway, figure: Callable[[str], None]) -> None:
    gateway.api_key = await gateway.new_key()
    async with AsyncExitStack() as callers:
        running = []
        for model in [*MODELS.values()] * 50:
            body = chat_body(f"{model}?tokens=100000&pace_ms=200", stream=True)
            running.append(await callers.enter_async_context(calling(gateway, body)))
        await asyncio.gather(*[caller.read_texts(2, seconds=20) for caller in running])
        at_once = sum(call.phase == "stream" for call in gateway.calls)
    assert at_once == 150
    figure(f"P15 150 streams at once: all had a second token while {at_once} of them ran")


# --- a key whose answers are read to their end --------------------------------------------------------------------


async def draining_key(gateway: Gateway, seconds: int) -> str:
    login = {"email": "admin@example.com", "password": "correct horse"}
    wanted = {**login, "key_name": "drains", "drain_seconds": seconds, "concurrent_requests": 1}
    async with aiohttp.ClientSession() as client:
        async with client.post(f"{gateway.root_url}/auth/keys", json=wanted) as response:
            assert response.status == 201, await response.text()
            key: str = (await response.json())["api_key"]
            return key


@pytest.mark.parametrize("phase", ["middle", "before the headers", "whole"])
async def test_the_answer_of_a_client_that_left_is_read_to_its_end_when_its_key_says_so(
    gateway: Gateway, phase: str
) -> None:
    gateway.api_key = await draining_key(gateway, 5)
    script = "tokens=40&pace_ms=20&prompt_tokens=33" + ("" if phase == "middle" else "&headers_ms=500")
    for number, model in enumerate(MODELS.values(), 1):
        async with calling(gateway, chat_body(f"{model}?{script}", stream=phase != "whole")) as caller:
            await provider_is_asked(gateway, number)
            if phase == "middle":
                await caller.read_texts(5)
        async with aiohttp.ClientSession(headers=gateway.headers) as client:
            assert await _status(client, gateway, {}) == 429, "until then the slot is taken"
        await slot_is_free(gateway, seconds=5)
        call, row = gateway.calls[-1], await last_row(gateway)
        assert (call.finished, call.client_gone_at) == (True, None)
        assert (row["outcome"], row["usage_source"]) == ("client_abort", "provider")
        assert (row["prompt_tokens"], row["completion_tokens"], row["finish_reason"]) == (33, 40, "stop")
        assert row["status"] == (200 if phase == "middle" else 0)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_an_answer_that_takes_longer_than_its_key_says_is_cut_then_and_counted(
    gateway: Gateway, stream: bool, figure: Callable[[str], None]
) -> None:
    gateway.api_key = await draining_key(gateway, 1)
    script, took = "tokens=500&pace_ms=20" if stream else "headers_ms=30000", []
    for number, model in enumerate(MODELS.values(), 1):
        async with calling(gateway, chat_body(f"{model}?{script}", PROMPT, stream=stream)) as caller:
            await provider_is_asked(gateway, number)
            if stream:
                await caller.read_texts(5)
        left = monotonic()
        await slot_is_free(gateway, seconds=5)
        took.append(monotonic() - left)
        assert 0.8 < took[-1] < 2.5
        assert gateway.calls[-1].client_gone_at is not None
        row = await last_row(gateway)
        assert (row["outcome"], row["usage_source"] in ("counted", "estimated")) == ("client_abort", True)
        assert row["prompt_tokens"] >= 40
        assert row["completion_tokens"] >= (20 if stream else 0)
    figure(f"drain of 1 s: {'streams' if stream else 'whole answers'} were cut after at most {max(took):.2f} s")

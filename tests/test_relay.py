"""What a client and a provider see of each other through the gateway, also when one of them fails."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import pytest

from gateway import appkeys
from gateway.protocol.dialects.openai import OpenAITranslator
from gateway.protocol.request import Chunk
from gateway.stores.journal import Journal, JournalFull
from tests.support.gateway import MODELS, Gateway, chat_body, read_events, running_gateway
from tests.support.standin import standing_in

pytestmark = pytest.mark.integration

DIALECTS = list(MODELS)


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    # Short times, so that what waits for them is seen in a test; the defaults are asserted in test_settings.
    times = {
        "GATEWAY_IDLE_TIMEOUT": "1",
        "GATEWAY_FIRST_BYTE_TIMEOUT": "3",
        "GATEWAY_TOTAL_TIMEOUT": "3",
    }
    async with running_gateway(database_url, redis_url, times) as gateway:
        yield gateway


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(headers=gateway.headers) as session:
        yield session


async def until(condition: Callable[[], Any], seconds: float = 3.0) -> float:
    """Waits for it; how long it took."""
    started = monotonic()
    while not condition():
        assert monotonic() - started < seconds, "it did not happen in time"
        await asyncio.sleep(0.005)
    return monotonic() - started


def url(gateway: Gateway) -> str:
    return f"{gateway.base_url}/chat/completions"


# --- bytes that arrive as they are sent ---------------------------------------------------------------------------

OPENAI_PIECES = [
    b'data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}], "odd" : [1,  2.50]}\r\n\r\n',
    b": a comment\n\n",
    b'data:{"id":"c1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"h\xc3\xa9"},"finish_reason":null}]}\n\n',
    b'data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n',
]
ANTHROPIC_PIECES = [
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant","model":"m","content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":3,"output_tokens":1}}}\n\n',
    b'event: content_block_start\ndata: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":"a"}}\n\n',
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"b"}}\n\n',
    b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\nevent: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"output_tokens":2}}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n',
]
OLLAMA_PIECES = [
    b'{"model":"m","created_at":"2026-11-01T00:00:00Z","message":{"role":"assistant","content":"%d"},"done":false}\n'
    % n
    for n in range(3)
] + [
    b'{"model":"m","created_at":"2026-11-01T00:00:00Z","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop","prompt_eval_count":3,"eval_count":3}\n'
]


@pytest.mark.parametrize(
    ("dialect", "pieces", "content_type"),
    [
        ("openai", OPENAI_PIECES, "text/event-stream"),
        ("anthropic", ANTHROPIC_PIECES, "text/event-stream"),
        ("ollama", OLLAMA_PIECES, "application/x-ndjson"),
    ],
)
async def test_each_event_of_a_provider_that_trickles_arrives_within_50_ms(
    database_url: str,
    redis_url: str,
    figure: Callable[[str], None],
    dialect: str,
    pieces: list[bytes],
    content_type: str,
) -> None:
    async with standing_in(pieces, pause=1.0, content_type=content_type) as provider:
        path = "/v1" if dialect == "openai" else ""
        environ = {f"{dialect.upper()}_BASE_URL": provider.address + path}
        async with (
            running_gateway(database_url, redis_url, environ) as gateway,
            aiohttp.ClientSession(headers=gateway.headers) as client,
            client.post(url(gateway), json=chat_body(f"{dialect}/m", stream=True)) as response,
        ):
            assert response.status == 200
            arrived, received = [], []
            async for data in response.content.iter_any():
                arrived.append(monotonic())
                received.append(data)
    # The last piece comes in two: its last chunk waits until usage is on disk.
    assert len(arrived) in (len(pieces), len(pieces) + 1)
    late = [there - sent for there, sent in zip(arrived, provider.sent, strict=False)]
    figure(f"trickle: each event of {dialect} arrived within {max(late) * 1000:.1f} ms")
    assert max(late) < 0.050
    if dialect == "openai":
        assert b"".join(received) == b"".join(pieces)


async def test_a_request_body_that_need_not_change_reaches_the_provider_as_it_was_sent(
    database_url: str, redis_url: str
) -> None:
    body = (
        '{ "messages":[{"role":"user","content":"h\\u00e9 😀"}],"model":"mock-gpt",\n"x_unknown": 1.50, '
        '"stream":true,"stream_options":{"include_usage":true}}'
    ).encode()
    async with (
        # A provider's prefix in the model's name would be cut off, and so would change the body.
        running_gateway(database_url, redis_url, {"GATEWAY_DEFAULT_PROVIDER": "openai"}) as gateway,
        aiohttp.ClientSession(headers=gateway.headers) as client,
    ):
        headers = {"Content-Type": "application/json"}
        async with client.post(url(gateway), data=body, headers=headers) as response:
            assert response.status == 200
            await response.read()
        assert gateway.calls[-1].body == body


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_the_usage_chunk_comes_only_to_those_who_asked(
    gateway: Gateway, client: aiohttp.ClientSession, dialect: str
) -> None:
    for asked in (None, False, True):
        options: dict[str, Any] = {} if asked is None else {"stream_options": {"include_usage": asked}}
        async with client.post(url(gateway), json=chat_body(MODELS[dialect], stream=True, **options)) as response:
            events = await read_events(response)
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
        usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
        assert len(usages) == (1 if asked else 0)
    rows = await gateway.rows()
    assert [row["usage_source"] for row in rows] == ["provider"] * 3
    assert all(row["completion_tokens"] > 0 and row["prompt_tokens"] > 0 for row in rows)


async def test_connections_are_used_again_after_a_stream_that_ended(
    gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    counts = []
    for _ in range(5):
        async with client.post(url(gateway), json=chat_body(MODELS["openai"], stream=True)) as response:
            await response.read()
        await asyncio.sleep(0.05)
        counts.append(gateway.mock.open_connections)
    assert counts == [counts[0]] * 5


# --- streams that break -------------------------------------------------------------------------------------------

BREAKS = {
    "reset": "upstream_truncated",
    "truncate": "upstream_truncated",
    "cut": "upstream_truncated",
    "stall": "upstream_timeout",
    "error_event": None,  # the provider's own code
    "bad_json_3": "upstream_error",
    "huge_event": "event_too_large",
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("fault", BREAKS)
async def test_a_stream_that_breaks_ends_with_an_error_event_and_no_done(
    gateway: Gateway, client: aiohttp.ClientSession, dialect: str, fault: str
) -> None:
    body = chat_body(f"{MODELS[dialect]}?fault={fault}&after=4&pace_ms=2", stream=True)
    async with client.post(url(gateway), json=body) as response:
        assert response.status == 200
        events = await read_events(response)
    assert "[DONE]" not in events
    assert not any("HTTP/1.1" in event for event in events)
    error = json.loads(events[-1])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if BREAKS[fault] is not None:
        assert error["code"] == BREAKS[fault]
    assert any('"content":' in event for event in events[:-1]), "what came before the fault must not be lost"
    [row] = await gateway.rows()
    assert row["outcome"] == ("upstream_timeout" if fault == "stall" else "upstream_error")
    assert row["completion_tokens"] > 0
    assert row["error_code"] == error["code"]


async def test_one_bad_event_does_not_end_a_stream(gateway: Gateway, client: aiohttp.ClientSession) -> None:
    async with client.post(url(gateway), json=chat_body("openai/mock-gpt?fault=bad_json", stream=True)) as response:
        events = await read_events(response)
    assert events[-1] == "[DONE]"
    assert all(json.loads(event) for event in events[:-1])


async def test_a_stream_without_its_last_word_but_with_its_finish_reason_is_whole(
    gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    async with client.post(url(gateway), json=chat_body("openai/mock-gpt?fault=no_done", stream=True)) as response:
        events = await read_events(response)
    assert events[-1] == "[DONE]"


async def test_a_body_that_stays_open_after_the_last_word_ends_at_once(
    gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    for dialect in DIALECTS:
        started = monotonic()
        body = chat_body(f"{MODELS[dialect]}?fault=hang_open", stream=True)
        async with client.post(url(gateway), json=body) as response:
            events = await read_events(response)
        assert events[-1] == "[DONE]"
        assert monotonic() - started < 0.9


async def test_a_pooled_connection_that_died_is_tried_once_more(
    gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    for _ in range(3):
        async with client.post(url(gateway), json=chat_body("openai/mock-gpt?fault=reset_on_reuse")) as response:
            assert response.status == 200
            await response.read()


# --- errors before the first byte ---------------------------------------------------------------------------------

STATUSES = {400: 400, 401: 502, 403: 502, 404: 404, 413: 413, 422: 422, 429: 429, 500: 502, 503: 503, 529: 503}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_refusal_is_an_openai_error_object_with_the_right_status(
    gateway: Gateway, client: aiohttp.ClientSession, dialect: str, stream: bool
) -> None:
    for status, expected in STATUSES.items():
        gateway.forget_faults()
        model = f"{MODELS[dialect]}?status={status}" + ("&retry_after=7" if status in (429, 503) else "")
        async with client.post(url(gateway), json=chat_body(model, stream=stream)) as response:
            assert response.status == expected, (status, await response.text())
            assert response.content_type == "application/json"
            error = (await response.json())["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]
            if status in (401, 403):
                assert error["code"] == "provider_auth"
                assert "sk-" not in error["message"]
            if status in (429, 503):
                assert response.headers["Retry-After"] == "7"
    rows = await gateway.rows()
    assert len(rows) == len(STATUSES)
    assert {(row["prompt_tokens"], row["completion_tokens"]) for row in rows} == {(0, 0)}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("close_before_headers", 502, "upstream_unreachable"),
        ("reset_before_headers", 502, "upstream_unreachable"),
        ("garbage", 502, "upstream_unreachable"),
        ("redirect", 502, "upstream_error"),
        ("html", 502, "upstream_error"),
        ("empty", 502, None),
    ],
)
async def test_a_provider_that_does_not_answer_properly_is_a_502(
    gateway: Gateway, client: aiohttp.ClientSession, fault: str, status: int, code: str | None, stream: bool
) -> None:
    for dialect in DIALECTS:
        body = chat_body(f"{MODELS[dialect]}?fault={fault}", stream=stream)
        async with client.post(url(gateway), json=body) as response:
            assert response.status == status
            error = (await response.json())["error"]
            assert code is None or error["code"] == code
    assert not [request for request in gateway.calls if "elsewhere" in request.path]


async def test_a_silent_provider_is_a_504(gateway: Gateway, client: aiohttp.ClientSession) -> None:
    for stream in (True, False):
        body = chat_body("openai/mock-gpt?headers_ms=20000", stream=stream)
        async with client.post(url(gateway), json=body) as response:
            assert response.status == 504
            assert (await response.json())["error"]["code"] == "upstream_timeout"
    assert [row["outcome"] for row in await gateway.rows()] == ["upstream_timeout"] * 2


@pytest.mark.parametrize(
    "retry_after", ["inf", "1e400", "nan", "-5", "9e15", "soon", "Fri, 31 Dec 99999999 23:59:59 GMT", "7"]
)
async def test_a_retry_after_that_is_nonsense_is_not_passed_on(
    database_url: str, redis_url: str, retry_after: str
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 429 Slow\r\nRetry-After: {retry_after}\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        writer.close()

    async with raw_provider(answer) as address:
        async with (
            running_gateway(database_url, redis_url, {"OPENAI_BASE_URL": address}) as gateway,
            aiohttp.ClientSession(headers=gateway.headers) as client,
            client.post(url(gateway), json=chat_body("gpt-4o")) as response,
        ):
            assert response.status == 429
            assert 1 <= int(response.headers["Retry-After"]) <= 86_400


@asynccontextmanager
async def raw_provider(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()


EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    "rest",
    [
        b"\r\n%x\r\n%s\r\nZZZ\r\nbad\r\n" % (len(EVENT), EVENT),  # a chunk size that is none
        b"Content-Encoding: gzip\r\n\r\n5\r\nhello\r\n",  # not what it says it is
    ],
)
async def test_a_body_that_breaks_http_ends_the_stream_at_once(database_url: str, redis_url: str, rest: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head, _, tail = rest.partition(b"ZZZ")
        writer.write(STREAM_HEAD + head)
        await asyncio.sleep(0.2)
        writer.write(b"ZZZ" + tail)
        with suppress(ConnectionError):
            await asyncio.sleep(10)

    async with raw_provider(answer) as address:
        async with (
            running_gateway(database_url, redis_url, {"OPENAI_BASE_URL": address}) as gateway,
            aiohttp.ClientSession(headers=gateway.headers) as client,
        ):
            started = monotonic()
            async with client.post(url(gateway), json=chat_body("gpt-4o", stream=True)) as response:
                text = await response.text()
            assert monotonic() - started < 3
            assert '"error"' in text
            assert "[DONE]" not in text
            [row] = await gateway.rows()
            assert row["outcome"] == "upstream_error"


async def test_a_connection_that_never_opens_is_a_504_without_a_row(
    database_url: str, redis_url: str, figure: Callable[[str], None]
) -> None:
    with socket.socket() as listener:  # its queue is full, so that one more connection waits
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fill = [socket.socket() for _ in range(4)]
        for one in fill:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        times = {"GATEWAY_FIRST_BYTE_TIMEOUT": "1", "GATEWAY_TOTAL_TIMEOUT": "1"}
        environ = {"OPENAI_BASE_URL": f"http://127.0.0.1:{listener.getsockname()[1]}/v1", **times}
        async with (
            running_gateway(database_url, redis_url, environ) as gateway,
            aiohttp.ClientSession(headers=gateway.headers) as client,
        ):
            for stream in (True, False):
                gateway.forget_faults()
                began = monotonic()
                async with client.post(url(gateway), json=chat_body("gpt-4o", stream=stream)) as response:
                    took = monotonic() - began
                    assert response.status == 504
                    assert "connected" in (await response.json())["error"]["message"]
                    attempts = response.headers["X-Gateway-Attempts"].count("openai=timeout_connect")
                figure(f"P2 no connection: {attempts} attempts of 1 s ended after {took:.1f} s, at most 8")
                assert attempts == 3
                assert took < 3 * 1 + 5
            assert await gateway.rows() == []
        for one in fill:
            one.close()


async def test_an_address_where_nobody_listens_is_a_502_without_a_row(database_url: str, redis_url: str) -> None:
    environ = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}
    async with (
        running_gateway(database_url, redis_url, environ) as gateway,
        aiohttp.ClientSession(headers=gateway.headers) as client,
        client.post(url(gateway), json=chat_body("gpt-4o")) as response,
    ):
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "upstream_unreachable"
        assert await gateway.rows() == []


# --- bugs of ours -------------------------------------------------------------------------------------------------


def break_feed(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """From the call after so many on, the OpenAI translator has a bug."""
    feed, seen = OpenAITranslator.feed, [0]

    def broken(translator: OpenAITranslator, data: bytes) -> list[Chunk]:
        seen[0] += 1
        if seen[0] > calls:
            raise RuntimeError("CANARY of the bug")
        return feed(translator, data)

    monkeypatch.setattr(OpenAITranslator, "feed", broken)


async def test_a_bug_in_mid_stream_is_an_error_event(
    gateway: Gateway, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_feed(monkeypatch, calls=3)
    async with client.post(url(gateway), json=chat_body("openai/mock-gpt?pace_ms=10", stream=True)) as response:
        events = await read_events(response)
    assert json.loads(events[-1])["error"]["code"] == "internal_error"
    assert "[DONE]" not in events
    assert "CANARY" not in str(events)
    [row] = await gateway.rows()
    assert (row["outcome"], row["status"]) == ("gateway_error", 200)
    assert await until(lambda: gateway.calls[-1].client_gone_at is not None) < 1


async def test_a_bug_before_the_first_byte_is_a_500_that_says_nothing(
    gateway: Gateway, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_feed(monkeypatch, calls=0)
    async with client.post(url(gateway), json=chat_body(MODELS["openai"], stream=True)) as response:
        assert response.status == 500
        error = (await response.json())["error"]
        assert (error["code"], "CANARY" in error["message"]) == ("internal_error", False)
    [row] = await gateway.rows()
    assert (row["outcome"], row["status"]) == ("gateway_error", 500)
    async with client.get(f"{gateway.root_url}/metrics") as response:
        assert 'gateway_internal_errors_total{where="request"} 1' in await response.text()


async def test_a_bug_after_the_last_byte_writes_no_second_status_line(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(limiter: object, principal: object, exchange_id: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("gateway.stores.limits.Limiter.release", broken)
    port = int(gateway.root_url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps(chat_body(MODELS["openai"], stream=True)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.api_key}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    received = b""
    with suppress(ConnectionError):
        while data := await asyncio.wait_for(reader.read(1 << 16), 3):
            received += data
    writer.close()
    assert received.count(b"HTTP/1.1 ") == 1
    assert b"data: [DONE]\n\n" in received


# --- heartbeats ---------------------------------------------------------------------------------------------------


async def test_silence_is_filled_with_heartbeats_and_a_late_failure_is_an_event(
    database_url: str, redis_url: str
) -> None:
    async with (
        running_gateway(database_url, redis_url, {"GATEWAY_HEARTBEAT": "0.3"}) as gateway,
        aiohttp.ClientSession(headers=gateway.headers) as client,
    ):
        body = chat_body("openai/mock-gpt?headers_ms=1000&status=503", stream=True)
        async with client.post(url(gateway), json=body) as response:
            assert response.status == 200
            text = (await response.read()).decode()
        assert text.startswith(": ping\n\n")
        assert text.count(": ping\n\n") >= 2
        assert json.loads(text.rsplit("data: ", 1)[1])["error"]["code"] == "overloaded"
        assert "[DONE]" not in text

        body = chat_body("openai/mock-gpt?ttft_ms=800&tokens=3", stream=True)
        async with client.post(url(gateway), json=body) as response:
            text = (await response.read()).decode()
        assert ": ping\n\n" in text
        assert text.endswith("data: [DONE]\n\n")


async def test_heartbeats_do_not_keep_a_silent_provider_alive(database_url: str, redis_url: str) -> None:
    environ = {"GATEWAY_HEARTBEAT": "0.2", "GATEWAY_IDLE_TIMEOUT": "1"}
    async with (
        running_gateway(database_url, redis_url, environ) as gateway,
        aiohttp.ClientSession(headers=gateway.headers) as client,
    ):
        started = monotonic()
        async with client.post(url(gateway), json=chat_body("openai/mock-gpt?fault=stall", stream=True)) as response:
            text = (await response.read()).decode()
        assert 0.9 < monotonic() - started < 2.5
        assert text.count(": ping\n\n") >= 2
        assert json.loads(text.rsplit("data: ", 1)[1])["error"]["code"] == "upstream_timeout"


async def test_before_the_first_heartbeat_a_slow_refusal_keeps_its_status(
    gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    body = chat_body("anthropic/mock-claude?headers_ms=500&status=529", stream=True)
    async with client.post(url(gateway), json=body) as response:
        assert response.status == 503


async def open_request(gateway: Gateway, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request whose answer is read by hand; the kernel is asked to hold as little of it as it can."""
    port = int(gateway.root_url.rsplit(":", 1)[1])
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    small.setblocking(False)
    await asyncio.get_running_loop().sock_connect(small, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=small, limit=1024)
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.api_key}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    return reader, writer


async def test_a_whole_answer_that_is_not_read_is_dropped_too(database_url: str, redis_url: str) -> None:
    async with standing_in(
        [b'{"choices":[],"x":"' + b"y" * 20_000_000 + b'"}'], content_type="application/json"
    ) as provider:
        environ = {"GATEWAY_WRITE_TIMEOUT": "1", "OPENAI_BASE_URL": f"{provider.address}/v1"}
        async with running_gateway(database_url, redis_url, environ) as gateway:
            reader, writer = await open_request(gateway, chat_body("gpt-4o"))
            assert b" 200 " in await reader.readline()
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(0.1)
            await until(lambda: gateway.app[appkeys.PULSE].open_exchanges == 0, seconds=8)
            writer.close()
            [row] = await gateway.rows()
            assert (row["outcome"], row["error_code"]) == ("client_abort", "client_stalled")


async def test_a_reader_that_is_slow_but_reads_gets_every_byte(database_url: str, redis_url: str) -> None:
    body = b'{"choices":[],"x":"' + b"y" * 20_000_000 + b'"}'
    async with standing_in([body], content_type="application/json") as provider:
        environ = {"GATEWAY_WRITE_TIMEOUT": "0.5", "OPENAI_BASE_URL": f"{provider.address}/v1"}
        async with running_gateway(database_url, redis_url, environ) as gateway:
            reader, writer = await open_request(gateway, chat_body("gpt-4o"))
            await reader.readuntil(b"\r\n\r\n")
            started, received = monotonic(), 0
            while received < len(body):
                data = await reader.read(1 << 17)
                assert data, f"dropped after {received} bytes"
                received += len(data)
                if monotonic() - started < 3:
                    await asyncio.sleep(0.02)
            writer.close()
            assert received == len(body)


async def test_a_reader_that_stops_is_dropped_and_others_go_on(database_url: str, redis_url: str) -> None:
    async with running_gateway(database_url, redis_url, {"GATEWAY_WRITE_TIMEOUT": "1"}) as gateway:
        port = int(gateway.root_url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        body = json.dumps(chat_body("openai/mock-gpt?fault=endless&after=1", stream=True)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.api_key}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b" 200 " in await reader.readline()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        took = await until(lambda: gateway.calls and gateway.calls[-1].client_gone_at is not None, seconds=10)
        assert took < 8
        writer.close()
        [row] = await gateway.rows()
        assert (row["outcome"], row["error_code"]) == ("client_abort", "client_stalled")


# --- usage and what it costs --------------------------------------------------------------------------------------


async def test_a_row_has_the_operators_price_and_an_unknown_one_is_null(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text('[prices.openai]\n"mock-gpt*" = { input = 2.5, output = 10, cached_input = 1.25 }\n')
    async with (
        running_gateway(database_url, redis_url, {"GATEWAY_CONFIG": str(config)}) as gateway,
        aiohttp.ClientSession(headers=gateway.headers) as client,
    ):
        for model in ("openai/mock-gpt?prompt_tokens=1000&cached_tokens=400", MODELS["ollama"]):
            async with client.post(url(gateway), json=chat_body(model, stream=True)) as response:
                await response.read()
        priced, unpriced = await gateway.rows()
        assert priced["cost_micros"] == 600 * 2.5 + 400 * 1.25 + priced["completion_tokens"] * 10
        assert unpriced["cost_micros"] is None
        async with client.get(f"{gateway.root_url}/metrics") as response:
            page = await response.text()
        assert 'gateway_unpriced_total{provider="ollama"} 1' in page
        async with client.get(f"{gateway.root_url}/api/stats", params={"range": "all"}) as response:
            totals = (await response.json())["totals"]
        assert (totals["cost_micros"], totals["unpriced"]) == (priced["cost_micros"], 1)


async def test_a_request_that_cannot_be_accounted_is_not_sent(
    gateway: Gateway, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(journal: Journal, row: object) -> None:
        raise JournalFull("no room")

    monkeypatch.setattr(Journal, "begin", full)
    for stream in (True, False):
        async with client.post(url(gateway), json=chat_body(MODELS["openai"], stream=stream)) as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "usage_log_full"
    assert gateway.calls == []


async def test_an_operator_may_rather_serve_than_account(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(journal: Journal, row: object) -> None:
        raise JournalFull("no room")

    monkeypatch.setattr(Journal, "begin", full)
    async with (
        running_gateway(database_url, redis_url, {"GATEWAY_ON_JOURNAL_FULL": "open"}) as gateway,
        aiohttp.ClientSession(headers=gateway.headers) as client,
    ):
        async with client.post(url(gateway), json=chat_body(MODELS["openai"], stream=True)) as response:
            assert (await read_events(response))[-1] == "[DONE]"
        async with client.get(f"{gateway.root_url}/metrics") as response:
            assert "gateway_journal_dropped_rows 0" in await response.text()
        assert [row["outcome"] for row in await gateway.rows()] == ["ok"]  # its end found room


# --- what passes and what does not --------------------------------------------------------------------------------


async def test_client_headers_reach_a_provider_only_by_allow_list(
    gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    sent = {
        "Cookie": "session=secret",
        "OpenAI-Organization": "org-other",
        "X-Forwarded-For": "10.0.0.1",
        "X-User-Id": "user-1",
        "X-Anything": "x",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    for dialect in DIALECTS:
        async with client.post(url(gateway), json=chat_body(MODELS[dialect]), headers=sent) as response:
            assert response.status == 200
        headers = gateway.calls[-1].headers
        allowed = {
            "host", "accept", "accept-encoding", "user-agent", "content-type", "content-length", "traceparent",
            "authorization", "x-api-key", "anthropic-version", "x-request-id", "connection",
        }  # fmt: skip
        assert set(headers) <= allowed
        assert headers["traceparent"] == sent["traceparent"]
        assert gateway.api_key not in str(headers)
    by_path = {request.path: request.headers for request in gateway.calls}
    assert by_path["/v1/chat/completions"]["authorization"] == "Bearer sk-operator-openai"
    assert by_path["/v1/messages"]["x-api-key"] == "sk-operator-anthropic"
    assert "authorization" not in by_path["/api/chat"]


async def test_a_callers_own_credential_is_used_for_this_request_alone(gateway: Gateway) -> None:
    async with aiohttp.ClientSession() as client:
        headers = {"X-API-Key": gateway.api_key, "Authorization": "Bearer sk-the-callers-own"}
        for expected in (headers["Authorization"], "Bearer sk-operator-openai"):
            async with client.post(url(gateway), json=chat_body(MODELS["openai"]), headers=headers) as response:
                assert response.status == 200
            assert gateway.calls[-1].headers["authorization"] == expected
            headers.pop("Authorization", None)
        headers["Authorization"] = "Bearer sk-the-callers-own"
        body = chat_body("openai/mock-gpt?status=401")
        async with client.post(url(gateway), json=body, headers=headers) as response:
            assert response.status == 401  # the caller's credential is the caller's to mend
            assert "sk-" not in await response.text()


async def test_json_is_compressed_for_who_asks_and_event_streams_never(
    gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    headers = {"Accept-Encoding": "gzip, deflate"}
    for stream, expected in ((False, "gzip"), (True, None)):
        body = chat_body("openai/mock-gpt?case=long" if not stream else "openai/mock-gpt", stream=stream)
        async with client.post(url(gateway), json=body, headers=headers) as response:
            assert response.headers.get("Content-Encoding") == expected
            if not stream:
                assert (await response.json())["object"] == "chat.completion"
    for refused in ("identity", "gzip;q=0", "gzip;q=0.000, deflate"):
        async with client.post(
            url(gateway), json=chat_body("openai/mock-gpt?case=long"), headers={"Accept-Encoding": refused}
        ) as response:
            assert "Content-Encoding" not in response.headers


async def test_a_provider_that_compresses_what_it_was_asked_not_to_is_understood(
    gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    for stream in (False, True):
        body = chat_body("openai/mock-gpt?fault=gzip", stream=stream)
        async with client.post(url(gateway), json=body, headers={"Accept-Encoding": "identity"}) as response:
            assert response.status == 200
            assert "Content-Encoding" not in response.headers
            text = await response.text()
            assert "[DONE]" in text if stream else json.loads(text)["choices"]


async def test_every_response_says_which_request_it_answers_and_who_answered(
    gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    headers = {"X-Request-Id": "mine-1", "X-User-Id": "u1", "X-App-Id": "a1"}
    async with client.post(url(gateway), json=chat_body(MODELS["ollama"], stream=True), headers=headers) as response:
        await response.read()
        assert response.headers["X-Client-Request-Id"] == "mine-1"
        assert response.headers["X-Gateway-Provider"] == "ollama"
        assert response.headers["X-Gateway-Model"] == "mock-llama"
        assert response.headers["X-Gateway-Attempts"] == "ollama=ok"
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        request_id = response.headers["X-Request-Id"]
    [row] = await gateway.rows()
    assert str(row["request_id"]) == request_id
    assert (row["user_id"], row["app_id"], row["client_request_id"]) == ("u1", "a1", "mine-1")
    async with client.get(f"{gateway.root_url}/nowhere") as response:
        assert response.status == 404
        assert response.headers["X-Request-Id"]
        assert (await response.json())["error"]["code"] == "unknown_url"

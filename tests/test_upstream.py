"""What is sent to providers, when it is sent once more, what is made of faults, and what a cancellation leaves."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from gateway.protocol.errors import UpstreamBadBody, UpstreamError, UpstreamTimeout, UpstreamTruncated
from gateway.protocol.request import UpstreamRequest
from gateway.protocol.routing import Provider, Target
from gateway.upstream import Answer, _fixed
from tests.support.far import (
    CLOSE,
    HANG,
    HELLO,
    OK,
    ask,
    cancelled,
    client,
    exchange,
    free_port,
    idle,
    listening,
    on_asyncio,
    provider,
    read_request,
    target,
)

pytestmark = pytest.mark.mock

# --- what is sent


async def test_a_providers_query_stands_in_every_address() -> None:
    async with provider([HELLO], [HELLO]) as far, client() as upstream:
        row = Provider("acme", "openai", far.address, "k", auth="api-key", query="api-version=2024-10-21&x=%20")
        answer = await upstream.post(Target(row, "m", "k"), UpstreamRequest("/chat", b"{}"), {}, lambda: None)
        assert await answer.body(10) == b"hello"
        assert await upstream.get(row, "/models", 5) == b"hello"
    lines = [request.partition(b" HTTP/1.1")[0] for request in far.requests]
    assert lines == [b"POST /v1/chat?api-version=2024-10-21&x=%20", b"GET /v1/models?api-version=2024-10-21&x=%20"]
    assert all(b"\r\napi-key: k\r\n" in request for request in far.requests)


async def test_a_request_has_these_headers_and_no_others() -> None:
    async with provider([HELLO]) as far, client() as upstream:
        headers = {"X-Org": "o", "Content-Type": "text/x", "Connection": "close", "transfer-encoding": "gzip"}
        row = Provider("acme", "openai", far.address, api_key="sk-1", headers=headers)
        request = UpstreamRequest("/chat", b'{"a":1}', {"X-Request-Id": "r-1", "x-org": "p"})
        client_headers = {"traceparent": "00-1", "tracestate": "a=b", "Authorization": "Bearer aig_x", "Cookie": "c"}
        answer = await upstream.post(Target(row, "m", "sk-1"), request, client_headers, lambda: None)
        assert await answer.body(10) == b"hello"
    head, _, body = far.requests[0].partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    assert (first, body) == ("POST /v1/chat HTTP/1.1", b'{"a":1}')
    fields = dict(line.split(": ", 1) for line in lines)
    assert len(fields) == len(lines)
    assert fields.pop("User-Agent").startswith("ai-gateway/")
    assert fields == {
        "Host": far.address.split("/")[2],
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "Content-Type": "text/x",
        "Authorization": "Bearer sk-1",
        "Content-Length": "7",
        "X-Request-Id": "r-1",
        "x-org": "p",
        "traceparent": "00-1",
        "tracestate": "a=b",
    }


@pytest.mark.parametrize(
    ("auth", "expected"), [("bearer", b"\r\nAuthorization: Bearer k-2\r\n"), ("x-api-key", b"\r\nx-api-key: k-2\r\n")]
)
async def test_a_callers_own_credential_goes_out_in_place_of_the_operators(auth: str, expected: bytes) -> None:
    async with provider([HELLO]) as far, client() as upstream:
        for credential, own in (("k-1", False), ("k-2", True), ("k-1", False)):
            row = Provider("acme", "openai", far.address, api_key="k-1", auth=auth)
            chosen = Target(row, "m", credential, own_credential=own)
            await (await upstream.post(chosen, UpstreamRequest("/chat", b"{}"), {}, lambda: None)).body(10)
        await upstream.get(Provider("acme", "openai", far.address), "/models", 1)
    assert [expected in request for request in far.requests] == [False, True, False, False]
    assert [b"k-1" in request for request in far.requests] == [True, False, True, False]


async def test_a_callers_own_credential_is_not_remembered() -> None:
    async with provider([HELLO]) as far, client() as upstream:
        before = _fixed.cache_info().misses
        for credential in ("k-2", "k-3", "k-4"):
            chosen = Target(Provider("acme", "openai", far.address), "m", credential, own_credential=True)
            await (await upstream.post(chosen, UpstreamRequest("/chat", b"{}"), {}, lambda: None)).body(10)
        assert _fixed.cache_info().misses == before + 1
    assert [b"Bearer k-%d" % (i + 2) in request for i, request in enumerate(far.requests)] == [True] * 3


@pytest.mark.parametrize(
    ("address", "host", "place"),
    [
        ("http://h.example:80/v1", "h.example", "/v1/x"),
        ("http://H.Example:443/v1", "h.example:443", "/v1/x"),
        ("https://h.example:443", "h.example", "/x"),
        ("https://h.example:80/a%20b/ü", "h.example:80", "/a%20b/%C3%BC/x"),
        ("http://[2001:db8::1]/v1", "[2001:db8::1]", "/v1/x"),
        ("http://[2001:db8::1]:8080/v1", "[2001:db8::1]:8080", "/v1/x"),
        ("http://bücher.example/v1", "xn--bcher-kva.example", "/v1/x"),
    ],
)
def test_the_host_is_named_as_rfc_9110_wants_it(address: str, host: str, place: str) -> None:
    _, head = _fixed("GET", f"{address}/x", (), "bearer", None, ())
    assert head.startswith(f"GET {place} HTTP/1.1\r\nHost: {host}\r\n".encode())


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\nb", "a\rb", "a\0b", "日本"])
async def test_a_header_that_would_be_more_than_one_is_refused_and_nothing_is_sent(value: str) -> None:
    async with provider([HELLO]) as far, client() as upstream:
        for headers in ({"credential": value}, {"headers": {"X-Org": value}}):
            with pytest.raises(UpstreamError, match="a header for acme cannot be sent") as refused:
                await ask(upstream, far.address, **headers)
            assert refused.value.kind == "protocol"
            assert value not in str(refused.value)
        trace = {"traceparent": value, "tracestate": "a=b"}
        await (await upstream.post(target(far.address), UpstreamRequest("/chat", b""), trace, lambda: None)).body(10)
    [request] = far.requests
    assert b"traceparent" not in request, "a client's wrong trace is left out"
    assert b"tracestate: a=b\r\n" in request


async def test_a_large_request_and_a_large_answer_arrive_whole() -> None:
    body = bytes(range(256)) * 20_000
    answer = OK + b"Content-Length: %d\r\n\r\n" % len(body) + body
    async with provider([answer]) as far, client() as upstream:
        for _ in range(2):
            assert await exchange(upstream, far.address, body=body) == body
        assert [request.endswith(body) for request in far.requests] == [True, True]
        assert far.accepted == 1


async def test_a_provider_that_nobody_reads_waits() -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_request(reader)
        writer.write(OK + b"Content-Length: 1000000000\r\n\r\n")
        while True:
            writer.write(bytes(1 << 20))
            await writer.drain()
            sent += 1

    async with listening(flood) as port, client() as upstream:
        answer = await ask(upstream, f"http://127.0.0.1:{port}")
        before = -1
        async with asyncio.timeout(5):
            while sent != before:
                before = sent
                await asyncio.sleep(0.1)
        assert sent <= 16, "MiB: what two kernels' buffers and 256 KiB of ours hold"
        answer.close()


# --- once more


async def test_a_used_connection_that_dies_before_a_byte_is_replaced_once() -> None:
    async with provider([HELLO], [CLOSE], [HELLO]) as far, client() as upstream:
        await exchange(upstream, far.address)
        calls: list[int] = []
        answer = await upstream.post(
            target(far.address), UpstreamRequest("/chat", b"{}"), {}, lambda: calls.append(far.accepted)
        )
        assert await answer.body(10) == b"hello"
        assert (len(far.requests), far.accepted, len(calls)) == (3, 2, 2)


async def test_it_is_not_sent_a_third_time() -> None:
    async with provider([HELLO], [CLOSE], [CLOSE], [HELLO]) as far, client() as upstream:
        await exchange(upstream, far.address)
        with pytest.raises(UpstreamError) as raised:
            await ask(upstream, far.address)
        assert (raised.value.kind, len(far.requests)) == ("reset", 3)


@pytest.mark.parametrize("first", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_after_a_byte_of_an_answer_or_on_a_fresh_connection_it_is_not_sent_again(first: bytes) -> None:
    async with provider([HELLO], [first, CLOSE], [CLOSE]) as far, client() as upstream:
        await exchange(upstream, far.address)
        for _ in range(2):
            with pytest.raises(UpstreamError, match="acme closed the connection before it answered") as raised:
                await ask(upstream, far.address)
            assert raised.value.kind == "reset"
        assert len(far.requests) == 3


async def test_a_request_that_a_provider_may_have_worked_on_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.upstream.CLOSED_UNREAD", 0.05)

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HELLO)
        requests.append(await read_request(reader))
        await asyncio.sleep(0.2)
        writer.close()

    requests: list[bytes] = []
    async with listening(work) as port, client() as upstream:
        await exchange(upstream, f"http://127.0.0.1:{port}")
        with pytest.raises(UpstreamError) as raised:
            await ask(upstream, f"http://127.0.0.1:{port}")
        assert (raised.value.kind, len(requests)) == ("reset", 1)


# --- faults


async def test_a_body_that_breaks_says_how() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK + b"Content-Length: 50\r\n\r\nhello")
        await asyncio.sleep(0.02)
        writer.transport.get_extra_info("socket").setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER 0: RST
        writer.transport.abort()

    chunked = OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    async with (
        provider([chunked, CLOSE], [OK + b"Content-Length: 6\r\n\r\nhello", CLOSE], [chunked + b"zz\r\n"]) as far,
        listening(reset) as port,
        client() as upstream,
    ):
        for address, kind in (
            (far.address, "truncated"),
            (far.address, "truncated"),
            (far.address, "protocol"),
            (f"http://127.0.0.1:{port}", "reset"),
        ):
            answer = await ask(upstream, address)
            assert await answer.read() == b"hello"
            with pytest.raises(UpstreamTruncated) as raised:
                await answer.read()
            assert raised.value.kind == kind
            answer.close()


@pytest.mark.parametrize("status", [301, 302, 304, 307, 308])
async def test_a_redirect_is_not_followed(status: int) -> None:
    redirect = b"HTTP/1.1 %d X\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 9\r\n\r\n" % status
    async with provider([redirect, HANG]) as far, client() as upstream:
        with pytest.raises(UpstreamError) as raised:
            await ask(upstream, far.address)
        assert (raised.value.kind, len(far.requests)) == ("redirect", 1)
        if status != 304:
            await far.emptied()


async def test_an_answer_in_another_coding_than_we_can_undo_is_a_bad_body() -> None:
    async with provider([OK + b"Content-Encoding: br\r\nContent-Length: 1\r\n\r\nx"]) as far, client() as upstream:
        with pytest.raises(UpstreamBadBody):
            await ask(upstream, far.address)


async def test_who_cannot_be_reached_is_told_apart() -> None:
    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await reader.read()

    async with (
        listening(mute) as silent,
        listening(plain) as unsecured,
        provider([b"SSH-2.0-x\r\n"]) as other,
        provider([CLOSE]) as closing,
        client() as patient,
        client(GATEWAY_CONNECT_TIMEOUT="0.3") as impatient,
    ):
        for address, kind in (
            ("http://nowhere.invalid", "dns"),
            (f"http://{'x' * 64}.example", "dns"),
            (f"http://127.0.0.1:{await free_port()}", "connect"),
            (f"https://127.0.0.1:{silent}", "timeout_connect"),
            (f"https://127.0.0.1:{unsecured}", "tls"),
            (other.address, "protocol"),
            (closing.address, "reset"),
        ):
            with pytest.raises(UpstreamError) as raised:
                await ask(impatient if kind == "timeout_connect" else patient, address)
            assert (address, raised.value.kind) == (address, kind)
            assert "acme" in str(raised.value)
            assert isinstance(raised.value, UpstreamTimeout) == (kind == "timeout_connect")
        assert not patient._pool._open


async def test_a_document_is_got_whole_or_not_at_all() -> None:
    async with (
        provider([HELLO], [b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"], [OK + b"\r\n"], [HANG]) as far,
        client() as upstream,
    ):
        row = Provider("acme", "openai", far.address, api_key="sk-1")
        assert await upstream.get(row, "/models", 1) == b"hello"
        with pytest.raises(UpstreamError, match="acme answered 500"):
            await upstream.get(row, "/models", 1)
        for _ in range(2):
            with pytest.raises(UpstreamTimeout, match=r"did not answer in 0\.1 s"):
                await upstream.get(row, "/models", 0.1)
        await far.emptied()
    assert far.requests[0].startswith(b"GET /v1/models HTTP/1.1\r\n")
    assert b"Content-" not in far.requests[0]


# --- finish, close and cancel


async def test_finishing_early_keeps_the_connection_when_the_body_ends_soon() -> None:
    end = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(OK + b"Transfer-Encoding: chunked\r\n\r\n6\r\n[DONE]\r\n")
            await end.wait()
            end.clear()
            writer.write(b"0\r\n\r\n")

    async with listening(slow) as port, client() as upstream:
        for _ in range(2):
            answer = await ask(upstream, f"http://127.0.0.1:{port}")
            assert await answer.read() == b"[DONE]"
            answer.finish()
            assert idle(upstream) == 0
            end.set()
            async with asyncio.timeout(1):
                while not idle(upstream):
                    await asyncio.sleep(0.002)


async def test_finishing_and_closing_in_the_middle_cut_the_connection() -> None:
    async with provider([OK + b"Content-Length: 50\r\n\r\nhello", HANG]) as far, client() as upstream:
        for end in (Answer.finish, Answer.close):
            answer = await ask(upstream, far.address)
            assert await answer.read() == b"hello"
            end(answer)
            await far.emptied()
        assert idle(upstream) == 0


async def test_closing_closes_all_connections_also_those_in_use() -> None:
    async with provider([HELLO], [OK + b"Content-Length: 50\r\n\r\nhello", HANG]) as far:
        async with client() as upstream:
            await exchange(upstream, far.address)
            await ask(upstream, far.address)
            await ask(upstream, far.address)
        await far.emptied()


async def test_cancelled_while_the_answer_is_awaited_the_connection_is_closed() -> None:
    async with provider([HELLO], [HANG], [OK[:20], HANG], [HANG]) as far, client() as upstream:
        await exchange(upstream, far.address)
        for count in (2, 3, 4):  # a used connection, and fresh ones
            await cancelled(ask(upstream, far.address), lambda count=count: len(far.requests) == count)  # type: ignore[misc]
            await far.emptied()
        assert (idle(upstream), upstream._pool._open) == (0, set())


async def test_cancelled_at_any_moment_nothing_is_left() -> None:
    async with provider([OK + b"Content-Length: 9\r\n\r\nhello", HANG]) as far, client() as upstream:
        for turns in range(60):
            task = asyncio.ensure_future(ask(upstream, far.address))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                (await task).close()
        await far.emptied()
        assert (idle(upstream), upstream._pool._open) == (0, set())


# --- asyncio's own loop


@pytest.mark.parametrize(
    "scenario",
    [
        test_a_large_request_and_a_large_answer_arrive_whole,
        test_a_provider_that_nobody_reads_waits,
        test_a_used_connection_that_dies_before_a_byte_is_replaced_once,
        test_a_body_that_breaks_says_how,
        test_finishing_and_closing_in_the_middle_cut_the_connection,
        test_cancelled_while_the_answer_is_awaited_the_connection_is_closed,
        test_cancelled_at_any_moment_nothing_is_left,
    ],
)
def test_on_asyncios_own_loop_too(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    on_asyncio(scenario())

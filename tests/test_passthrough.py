"""What is passed on by path: what a fault on either side looks like, and that nobody is ever ahead of the other."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import aiohttp
import pytest

from gateway import appkeys
from gateway.exchange import Exchange
from tests.support.by_hand import (
    FILE,
    OK,
    UPLOAD,
    Far,
    answer_all,
    error_code,
    form,
    in_front,
    post,
    send_head,
    the_row,
)
from tests.support.process import until

pytestmark = pytest.mark.integration

HUGE = 64 << 20  # bytes; more than all the kernel's buffers on the way hold
Start = Callable[..., Any]


@pytest.fixture
def start(database_url: str, redis_url: str) -> Start:
    """A gateway in front of a provider by hand, and a client of it."""
    return partial(in_front, database_url, redis_url)


# --- back-pressure ------------------------------------------------------------------------------------------------


async def pieces(size: int, sent: list[int]) -> AsyncIterator[bytes]:
    for _ in range(size >> 16):
        yield bytes(1 << 16)
        sent.append(1 << 16)


async def test_a_provider_that_does_not_read_holds_its_client_up(start: Start) -> None:
    may_read = asyncio.Event()

    async def reads_later(far: Far) -> None:
        await may_read.wait()
        await answer_all(far)

    async with start(reads_later) as (gateway, _far, client):
        sent: list[int] = []
        headers = {**UPLOAD, "Content-Length": str(HUGE)}
        asking = asyncio.create_task(post(client, gateway, "/files", data=pieces(HUGE, sent), headers=headers))
        before = -1
        while not sent or sum(sent) != before:  # until nothing moves
            before = sum(sent)
            await asyncio.sleep(0.3)
        assert 0 < sum(sent) < HUGE // 2
        [connection] = [one for one in gateway.app[appkeys.UPSTREAM]._pool._open if one.unsent]
        assert connection.unsent <= 1 << 18
        may_read.set()
        assert (await asking)[0] == 200
        assert sum(sent) == HUGE
        assert (await the_row(gateway))["outcome"] == "ok"


async def test_a_client_that_does_not_read_holds_its_provider_up(start: Start) -> None:
    async def sends(far: Far) -> None:
        await far.send(b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nContent-Length: %d\r\n\r\n" % HUGE)
        for _ in range(HUGE >> 16):
            await far.send(bytes(1 << 16))

    async with start(sends) as (gateway, far, client):
        async with client.get(f"{gateway.base_url}/files/file-1/content") as response:
            before = -1
            while far.sent != before:
                before = far.sent
                await asyncio.sleep(0.3)
            assert 0 < far.sent < HUGE // 2
            assert len(await response.read()) == HUGE
        assert (await the_row(gateway))["outcome"] == "ok"


async def test_a_client_that_reads_nothing_is_dropped_and_its_provider_closed(start: Start) -> None:
    async def sends(far: Far) -> None:
        await far.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % HUGE)
        for _ in range(HUGE >> 16):
            await far.send(bytes(1 << 16))

    async with start(sends, GATEWAY_WRITE_TIMEOUT="1") as (gateway, far, client):
        async with client.get(f"{gateway.base_url}/files/file-1/content"):
            await until(lambda: far.gone, 20)
        row = await the_row(gateway)
        assert (row["outcome"], row["error_code"]) == ("client_abort", "client_stalled")


@pytest.mark.parametrize("framing", ["Content-Length: 8", "Transfer-Encoding: chunked"])
async def test_the_last_byte_waits_for_the_usage_row(
    start: Start, framing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answers(far: Far) -> None:
        body = b"4\r\nhalf\r\n4\r\nrest\r\n0\r\n\r\n" if "chunked" in framing else b"halfrest"
        await far.send(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode() + body)

    async with start(answers) as (gateway, _far, client):
        recorder, written = gateway.app[appkeys.RECORDER], asyncio.Event()
        settle = recorder.settle

        async def settle_later(exchange: Exchange) -> None:
            await written.wait()
            await settle(exchange)

        monkeypatch.setattr(recorder, "settle", settle_later)
        async with client.get(f"{gateway.base_url}/files/file-1/content") as response:
            reading = asyncio.create_task(response.read())
            await asyncio.sleep(0.2)
            assert not reading.done()
            written.set()
            assert await reading == b"halfrest"


# --- faults of the provider's -------------------------------------------------------------------------------------


async def test_an_answer_before_the_bodys_end_stops_the_body(start: Start) -> None:
    refused = b'{"error":{"message":"too big","type":"invalid_request_error","param":"file","code":"too_big"}}'

    async def answers_early(far: Far) -> None:
        await far.reader.readexactly(1 << 16)
        head = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        await far.send(head % len(refused) + refused)
        await far.hang()

    async with start(answers_early) as (gateway, far, client):
        sent: list[int] = []
        headers = {**UPLOAD, "Content-Length": str(HUGE)}
        asking = client.post(f"{gateway.base_url}/files", data=pieces(HUGE, sent), headers=headers)
        try:
            async with asking as response:
                assert (response.status, error_code(await response.json())) == (400, "too_big")
        except aiohttp.ClientOSError:  # it was still sending when we closed
            pass
        await until(lambda: far.gone == 1, 5)
        assert sum(sent) < HUGE
        row = await the_row(gateway)
        assert (row["status"], row["outcome"], row["error_code"]) == (400, "rejected", "too_big")


async def test_a_success_before_the_bodys_end_is_passed_on_and_its_connection_not_used_again(start: Start) -> None:
    async def answers_early(far: Far) -> None:
        await far.reader.readexactly(10)
        await far.send(OK)
        await far.hang()

    async with start(answers_early) as (gateway, far, _client):
        reader, writer = await send_head(gateway, 1000)
        writer.write(bytes(500))
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b"Connection: close" in answer
        assert answer.endswith(b'{"id":"file-1","a":"bcd"}')
        await until(lambda: far.gone == 1, 5)
        assert not gateway.app[appkeys.UPSTREAM]._pool._open - {
            connection for idle in gateway.app[appkeys.UPSTREAM]._pool._idle.values() for connection in idle
        }


async def test_a_provider_that_dies_in_the_middle_of_a_body_is_told_of(start: Start) -> None:
    async def dies(far: Far) -> None:
        await far.reader.readexactly(1 << 16)
        far.writer.transport.abort()

    async with start(dies) as (gateway, far, client):
        headers = {**UPLOAD, "Content-Length": str(HUGE)}
        try:
            status, answer = await post(client, gateway, "/files", data=pieces(HUGE, []), headers=headers)
            assert (status, error_code(answer)) == (502, "upstream_unreachable")
        except aiohttp.ClientOSError:  # it was still sending when we closed
            pass
        assert len(far.heads) == 1  # a body that has passed is never sent twice
        row = await the_row(gateway)
        assert (row["status"], row["outcome"]) == (502, "upstream_error")


@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
async def test_an_answer_that_breaks_never_looks_whole(start: Start, framing: str) -> None:
    async def breaks(far: Far) -> None:
        body = b"%x\r\n%b\r\n" % (100, bytes(100)) if "chunked" in framing else bytes(100)
        await far.send(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode() + body)
        await asyncio.sleep(0.1)
        far.writer.close()

    async with start(breaks) as (gateway, _far, client):
        async with client.get(f"{gateway.base_url}/files/file-1/content") as response:
            assert response.status == 200
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        row = await the_row(gateway)
        assert (row["status"], row["outcome"], row["error_code"]) == (200, "upstream_error", "upstream_truncated")


async def test_a_silent_provider_is_a_504_before_its_answer_and_a_broken_one_in_it(start: Start) -> None:
    async def silent(far: Far) -> None:
        if b"/content" in far.heads[-1]:
            await far.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await far.hang()

    async with start(silent, GATEWAY_TOTAL_TIMEOUT="1", GATEWAY_IDLE_TIMEOUT="1") as (gateway, _far, client):
        async with client.get(f"{gateway.base_url}/files/file-1") as response:
            assert (response.status, error_code(await response.json())) == (504, "upstream_timeout")
        async with client.get(f"{gateway.base_url}/files/file-1/content") as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        rows = await gateway.rows()
        assert [(row["status"], row["outcome"]) for row in rows] == [
            (504, "upstream_timeout"),
            (200, "upstream_timeout"),
        ]


async def test_a_provider_that_reads_nothing_of_a_body_is_a_504(start: Start) -> None:
    async def reads_nothing(far: Far) -> None:
        far.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(60)

    async with start(reads_nothing, GATEWAY_IDLE_TIMEOUT="1") as (gateway, _far, client):
        headers = {**UPLOAD, "Content-Length": str(HUGE)}
        try:
            status, answer = await post(client, gateway, "/files", data=pieces(HUGE, []), headers=headers)
            assert (status, error_code(answer)) == (504, "upstream_timeout")
        except aiohttp.ClientOSError:  # it was still sending when we closed
            pass
        assert (await the_row(gateway))["outcome"] == "upstream_timeout"


async def test_what_was_held_is_sent_once_more_when_its_connection_had_been_closed(start: Start) -> None:
    async def closes_after(far: Far) -> None:
        await answer_all(far)
        await asyncio.sleep(0.05)
        far.writer.close()

    async with start(closes_after) as (gateway, far, client):
        for _ in range(4):
            assert (await post(client, gateway, "/moderations", json={"input": "x"}))[0] == 200
            assert (await post(client, gateway, "/files", **form(FILE)))[0] == 200
        assert len(far.heads) >= 8
        assert {row["outcome"] for row in await gateway.rows()} == {"ok"}


# --- faults of the client's ---------------------------------------------------------------------------------------


async def test_a_client_that_leaves_in_the_middle_of_its_body_closes_the_provider(start: Start) -> None:
    async def reads(far: Far) -> None:
        await far.read_body()

    async with start(reads) as (gateway, far, _client):
        _reader, writer = await send_head(gateway, 1000)
        writer.write(bytes(500))
        await until(lambda: far.heads, 5)
        writer.transport.abort()
        await until(lambda: far.gone == 1, 5)
        row = await the_row(gateway)
        assert (row["status"], row["outcome"]) == (0, "client_abort")


async def test_a_client_that_leaves_in_the_middle_of_an_answer_closes_the_provider(start: Start) -> None:
    async def sends(far: Far) -> None:
        await far.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
        await far.hang()

    async with start(sends) as (gateway, far, client):
        async with client.get(f"{gateway.base_url}/files/file-1/content") as response:
            assert await response.content.readany() == b"half"
            response.close()
        await until(lambda: far.gone == 1, 5)
        row = await the_row(gateway)
        assert (row["status"], row["outcome"]) == (200, "client_abort")


async def test_a_body_that_stops_coming_is_a_408_and_closes_the_provider(start: Start) -> None:
    async def reads(far: Far) -> None:
        await far.read_body()

    async with start(reads, GATEWAY_BODY_TIMEOUT="0.5") as (gateway, far, client):

        async def stops() -> AsyncIterator[bytes]:
            for _ in range(4):  # longer than the limit in all
                yield b"some"
                await asyncio.sleep(0.3)
            await asyncio.sleep(3)

        headers = {**UPLOAD, "Content-Length": "1000"}
        status, answer = await post(client, gateway, "/files", data=stops(), headers=headers)
        assert (status, error_code(answer)) == (408, "request_timeout")
        await until(lambda: far.gone == 1, 5)
        row = await the_row(gateway)
        assert (row["status"], row["outcome"], row["error_code"]) == (408, "rejected", "request_timeout")


async def test_a_body_may_have_so_many_bytes_and_no_more(start: Start) -> None:
    async def reads(far: Far) -> None:
        await far.reader.read()
        raise ConnectionResetError

    async with start(reads, GATEWAY_MAX_UPLOAD="1000000") as (gateway, far, client):
        status, answer = await post(client, gateway, "/files", data=bytes(1_000_001), headers=UPLOAD)
        assert (status, error_code(answer)) == (413, "request_too_large")
        assert far.heads == []  # by the declared length
        try:
            status, answer = await post(client, gateway, "/files", data=pieces(4 << 20, []), headers=UPLOAD)
            assert (status, error_code(answer)) == (413, "request_too_large")
        except aiohttp.ClientOSError:  # it was still sending when we closed
            pass
        assert b"Transfer-Encoding: chunked\r\n" in far.heads[0]
        row = await the_row(gateway)
        assert (row["status"], row["outcome"]) == (413, "rejected")


async def test_a_client_that_expects_a_word_before_it_sends_gets_it(start: Start) -> None:
    async with start(answer_all, GATEWAY_MAX_UPLOAD="1000") as (gateway, _far, client):
        assert (await post(client, gateway, "/files", expect100=True, **form(FILE)))[0] == 200
        reader, writer = await send_head(gateway, 1001, "Expect: 100-continue\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 413 ")
        writer.close()


# --- what ends it from our side -----------------------------------------------------------------------------------


async def test_a_key_that_is_revoked_ends_what_it_pays_for(start: Start) -> None:
    async def sends(far: Far) -> None:
        await far.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
        await far.hang()

    async with start(sends) as (gateway, far, client):
        async with client.get(f"{gateway.base_url}/files/file-1/content") as response:
            await response.content.readany()
            pulse = gateway.app[appkeys.PULSE]
            pulse.end_keys(pulse.open_keys)
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        await until(lambda: far.gone == 1, 5)
        row = await the_row(gateway)
        assert (row["status"], row["outcome"], row["error_code"]) == (200, "interrupted", "key_ended")


async def test_the_end_of_a_drain_is_a_503_in_the_middle_of_a_body(start: Start) -> None:
    async def reads(far: Far) -> None:
        await far.read_body()

    async with start(reads) as (gateway, far, client):

        async def waits() -> AsyncIterator[bytes]:
            yield b"half"
            await asyncio.sleep(30)

        headers = {**UPLOAD, "Content-Length": "1000"}
        asking = asyncio.create_task(post(client, gateway, "/files", data=waits(), headers=headers))
        await until(lambda: far.heads, 5)
        gateway.app[appkeys.PULSE].interrupt_all()
        status, answer = await asking
        assert (status, error_code(answer)) == (503, "server_shutting_down")
        await until(lambda: far.gone == 1, 5)
        assert (await the_row(gateway))["outcome"] == "interrupted"

"""Requests whose bodies are sent as they come: what is on the wire, who waits for whom, and what a fault leaves."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any

import pytest

from gateway.protocol.errors import InvalidRequest, UpstreamTimeout, UpstreamUnreachable
from gateway.upstream import Answer, Passed, Upstream
from tests.support.far import CLOSE, HANG, HELLO, OK, cancelled, client, idle, listening, on_asyncio, provider, target

pytestmark = pytest.mark.mock


class Pieces:
    """A body, of which one piece comes in each turn of the loop; an exception among them is raised."""

    def __init__(self, pieces: Iterable[bytes | Exception], length: int | None = None) -> None:
        self._pieces = iter(pieces)
        self.length = length
        self.read_size = 0

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        piece = next(self._pieces, b"")
        if isinstance(piece, Exception):
            raise piece
        self.read_size += len(piece)
        return piece


async def send(upstream: Upstream, address: str, body: "Pieces | bytes", **more: Any) -> Answer:
    passed = Passed("POST", "/files", body, {"Content-Type": "text/x"}, **more)
    return await upstream.pass_on(target(address), passed, {}, lambda: None)


def endless(size: int = 1 << 16) -> Iterable[bytes]:
    while True:
        yield bytes(size)


@pytest.mark.parametrize("length", [6, None])
async def test_a_body_is_sent_with_its_length_or_in_chunks(length: int | None) -> None:
    async with provider([HELLO]) as far, client() as upstream:
        received = b""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal received
            while not received.endswith(b"0\r\n\r\n" if length is None else b"abcdef"):
                received += await reader.read(1 << 16)
            writer.write(HELLO)
            await reader.read()

        async with listening(serve) as port:
            answer = await send(upstream, f"http://127.0.0.1:{port}/v1", Pieces([b"abc", b"def"], length), query="a=b")
            assert await answer.body(10) == b"hello"
            assert idle(upstream) == 1
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/files?a=b HTTP/1.1\r\n")
    assert body == (b"abcdef" if length else b"3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n")
    framing = b"Content-Length: 6" if length else b"Transfer-Encoding: chunked"
    lines = head.lower().split(b"\r\n")
    assert lines.count(framing.lower()) == 1
    assert sum(line.startswith((b"content-length", b"transfer-encoding", b"content-type")) for line in lines) == 2
    assert far.requests == []


async def test_a_provider_that_does_not_read_stops_the_reading() -> None:
    await held_up(endless())


async def test_however_much_came_at_once_little_of_it_is_handed_on_unread() -> None:
    await held_up(endless(768_000))


async def held_up(pieces: Iterable[bytes]) -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(60)

    async with listening(deaf) as port, client() as upstream:
        body = Pieces(pieces)
        asking = asyncio.ensure_future(send(upstream, f"http://127.0.0.1:{port}", body))
        before = -1
        async with asyncio.timeout(10):
            while not body.read_size or body.read_size != before:
                before = body.read_size
                await asyncio.sleep(0.2)
        [connection] = upstream._pool._open
        assert 0 < connection.unsent <= 1 << 18
        assert body.read_size < 32 << 20, "what two kernels' buffers and 256 KiB of ours hold"
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        assert upstream._pool._open == set() or not connection.is_open


async def test_a_provider_that_reads_nothing_for_too_long_is_given_up_and_a_slow_one_is_not() -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(5):  # longer than the limit in all
            await asyncio.sleep(0.25)
            await reader.readexactly(4 << 20)
        await asyncio.sleep(60)

    async with listening(slow) as port, client(GATEWAY_IDLE_TIMEOUT="1") as upstream:
        body = Pieces(endless())
        with pytest.raises(UpstreamTimeout, match="acme read nothing of the request for 1 s"):
            await send(upstream, f"http://127.0.0.1:{port}", body)
        assert body.read_size > 20 << 20


async def test_an_answer_before_the_end_stops_the_body_and_is_whole() -> None:
    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HELLO)
        await reader.read()

    async with listening(early) as port, client() as upstream:
        answer = await send(upstream, f"http://127.0.0.1:{port}", Pieces(endless()))
        assert await answer.body(10) == b"hello"
        answer.finish()
        assert idle(upstream) == 0


async def test_what_is_wrong_with_the_body_is_not_the_providers_fault_and_closes_its_connection() -> None:
    async with provider([HANG]) as far, client() as upstream:
        with pytest.raises(InvalidRequest, match="no form"):
            await send(upstream, far.address, Pieces([b"abc", InvalidRequest("no form")], 100))
        await far.emptied()
        assert idle(upstream) == 0


async def test_a_provider_that_goes_in_the_middle_is_unreachable_and_not_asked_again() -> None:
    asked = 0

    async def goes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.readexactly(1 << 16)
        writer.transport.abort()

    async with listening(goes) as port, client() as upstream:
        with pytest.raises(UpstreamUnreachable):
            await send(upstream, f"http://127.0.0.1:{port}", Pieces(endless()))
        assert asked == 1


async def test_only_what_is_held_goes_out_on_a_used_connection() -> None:
    async with provider([HELLO], [HELLO], [HELLO], [CLOSE], [HELLO]) as far, client() as upstream:
        for body in (b"held", b"held", Pieces([b"abc"], 3), b"held"):
            answer = await send(upstream, far.address, body)
            assert await answer.body(10) == b"hello"
            answer.finish()
        assert far.ports[0] == far.ports[1] != far.ports[2]
        assert len(far.requests) == 5  # the last one once more: its connection had died


async def test_cancelled_at_any_moment_of_a_body_nothing_is_left() -> None:
    async with provider([OK + b"Content-Length: 9\r\n\r\nhello", HANG]) as far, client() as upstream:
        for turns in range(60):
            task = asyncio.ensure_future(send(upstream, far.address, Pieces([b"a"] * 10, 10)))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                (await task).close()
        await cancelled(send(upstream, far.address, Pieces([b"a"], 10)), lambda: bool(far.writers))
        await far.emptied()
        assert (idle(upstream), upstream._pool._open) == (0, set())
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not [task for task in others if "_send_body" in repr(task)]


@pytest.mark.parametrize(
    "scenario",
    [
        test_a_provider_that_does_not_read_stops_the_reading,
        test_an_answer_before_the_end_stops_the_body_and_is_whole,
        test_cancelled_at_any_moment_of_a_body_nothing_is_left,
    ],
)
def test_on_asyncios_own_loop_too(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    on_asyncio(scenario())

"""Who gets what of an answer, and when: a reader, a sink, one that pauses, one that leaves."""

import asyncio
import gzip
import zlib
from collections.abc import Callable
from typing import cast

import pytest

from gateway.answer import DRAIN, MAX_HELD, Answer, Broken
from gateway.http1 import Connection, Head
from gateway.inflate import MAX_STEP
from gateway.protocol.errors import GatewayError, ShuttingDown, UpstreamBadBody, UpstreamTruncated

pytestmark = pytest.mark.unit

PLAIN = b'{"choices":[]}' * 100


class Far:
    """A connection's side of it."""

    def __init__(self) -> None:
        self.reading = True
        self.cuts = 0

    def pause(self) -> None:
        self.reading = False

    def resume(self) -> None:
        self.reading = True

    def cut(self) -> None:
        self.cuts += 1


class Noted:
    """A sink that remembers, and does something at each piece."""

    def __init__(self, each: Callable[[bytes], None] = lambda data: None) -> None:
        self.heard: list[bytes | str] = []
        self.error: GatewayError | None = None
        self._each = each

    def received(self, data: bytes) -> None:
        assert data
        self.heard.append(data)
        self._each(data)

    def ended(self) -> None:
        self.heard.append("end")

    def failed(self, error: GatewayError) -> None:
        self.heard.append("fault")
        self.error = error


def opened(*fields: bytes) -> tuple[Answer, Far]:
    far = Far()
    answer = Answer(cast(Connection, far), "acme")
    answer.opened(Head(200, b"\r\n".join([b"HTTP/1.1 200 OK", *fields])))
    return answer, far


# --- its head


async def test_the_head_says_what_the_relay_has_to_know() -> None:
    answer, _ = opened(
        b"Content-Type: Text/Event-Stream; charset=utf-8",
        b"Retry-After-Ms: 1500",
        b"Request-Id: req_1",
        b"Retry-After: 9",
    )
    await answer.head()
    assert (answer.status, answer.content_type, answer.retry_after, answer.request_id) == (
        200,
        "text/event-stream",
        1.5,
        "req_1",
    )


async def test_the_head_says_how_long_nothing_is_left_of_a_limit() -> None:
    used_up, _ = opened(b"X-RateLimit-Remaining-Requests: 0", b"X-RateLimit-Reset-Requests: 1m2s")
    assert (used_up.exhausted_for, opened()[0].exhausted_for) == (62.0, 0.0)


async def test_a_head_that_says_nothing_has_the_defaults() -> None:
    answer, _ = opened()
    assert (answer.content_type, answer.retry_after, answer.request_id) == ("application/octet-stream", None, "")


@pytest.mark.parametrize("given", [b"x" * 129, "é".encode(), b"a\x7fb", b""])
async def test_a_request_id_that_cannot_be_shown_is_none(given: bytes) -> None:
    assert opened(b"x-request-id: " + given)[0].request_id == ""


@pytest.mark.parametrize("fault", ["unanswered", "reset", "protocol"])
async def test_what_happens_before_the_head_is_raised_to_who_waits_for_it(fault: str) -> None:
    answer = Answer(cast(Connection, Far()), "acme")
    waiting = asyncio.create_task(answer.head())
    await asyncio.sleep(0)
    answer.failed(fault)  # type: ignore[arg-type]
    with pytest.raises(Broken) as broken:
        await waiting
    assert broken.value.fault == fault


# --- a reader


async def test_a_reader_gets_what_has_come_at_once_and_then_waits() -> None:
    answer, _ = opened()
    answer.received(b"a")
    answer.received(b"b")
    assert await answer.read() == b"ab"
    waiting = asyncio.create_task(answer.read())
    await asyncio.sleep(0)
    assert not waiting.done()
    answer.received(b"c")
    assert await waiting == b"c"
    answer.ended()
    assert [await answer.read(), await answer.read()] == [b"", b""]


async def test_a_body_is_read_to_its_end_and_no_further_than_its_limit() -> None:
    for limit, fits in ((3, True), (2, False)):
        answer, _ = opened()
        answer.received(b"abc")
        answer.ended()
        if fits:
            assert await answer.body(limit) == b"abc"
        else:
            with pytest.raises(UpstreamBadBody, match="more than 2 bytes"):
                await answer.body(limit)


async def test_what_came_before_a_fault_is_read_before_it() -> None:
    answer, _ = opened()
    answer.received(b"a")
    answer.failed("truncated")
    assert await answer.read() == b"a"
    for _ in range(2):
        with pytest.raises(UpstreamTruncated, match="acme ended its answer in the middle") as raised:
            await answer.read()
        assert raised.value.kind == "truncated"


async def test_while_nobody_reads_the_provider_waits() -> None:
    answer, far = opened()
    answer.received(b"x" * (MAX_HELD - 1))
    assert far.reading
    answer.received(b"x")
    assert not far.reading
    assert len(await answer.read()) == MAX_HELD
    assert far.reading


@pytest.mark.parametrize("early", [True, False])
async def test_an_interruption_is_raised_by_the_read_that_waits_or_the_next(early: bool) -> None:
    answer, far = opened()
    if not early:
        answer.received(b"a")
        answer.interrupt(ShuttingDown("down"))
        with pytest.raises(ShuttingDown):
            await answer.read()
    else:
        waiting = asyncio.create_task(answer.read())
        await asyncio.sleep(0)
        answer.interrupt(ShuttingDown("down"))
        with pytest.raises(ShuttingDown):
            await waiting
    assert far.cuts == 1


async def test_a_reader_that_waits_while_the_answer_is_closed_is_told() -> None:
    answer, _ = opened()
    waiting = asyncio.create_task(answer.read())
    await asyncio.sleep(0)
    answer.close()
    with pytest.raises(UpstreamTruncated):
        await waiting


# --- a sink


async def test_a_sink_hears_at_once_what_came_before_it_and_then_each_read_by_itself() -> None:
    answer, _ = opened()
    answer.received(b"a")
    answer.received(b"b")
    answer.follow(sink := Noted())
    assert sink.heard == [b"ab"]
    answer.received(b"c")
    answer.received(b"d")
    assert sink.heard == [b"ab", b"c", b"d"]
    answer.ended()
    assert sink.heard[3:] == ["end"]


@pytest.mark.parametrize("fault", [None, "reset"])
async def test_a_sink_that_comes_late_hears_the_end_inside_follow(fault: str | None) -> None:
    answer, _ = opened()
    answer.received(b"a")
    if fault is None:
        answer.ended()
    else:
        answer.failed("reset")
    answer.follow(sink := Noted())
    assert sink.heard == [b"a", "fault" if fault else "end"]
    assert fault is None or (isinstance(sink.error, UpstreamTruncated) and sink.error.kind == "reset")


async def test_a_reader_may_become_a_sink() -> None:
    answer, far = opened()
    answer.received(b"x" * MAX_HELD)
    assert not far.reading
    answer.follow(sink := Noted())
    assert far.reading
    assert sink.heard == [b"x" * MAX_HELD]


async def test_nothing_is_given_while_the_sink_pauses_and_all_in_order_after_it() -> None:
    answer, far = opened()
    answer.follow(sink := Noted())
    answer.pause()
    answer.pause()
    assert not far.reading
    for data in (b"a", b"b"):  # what TLS had read already
        answer.received(data)
    answer.ended()
    assert sink.heard == []
    answer.resume()
    answer.resume()
    assert sink.heard == [b"ab", "end"]
    answer.pause()
    answer.resume()


async def test_a_sink_may_pause_in_the_middle_of_what_it_gets() -> None:
    answer, far = opened(b"Content-Encoding: gzip")
    await answer.head()
    answer.follow(sink := Noted(lambda data: answer.pause()))
    body = bytes(3 * MAX_STEP)
    answer.received(gzip.compress(body))
    answer.ended()
    assert len(sink.heard) == 1
    assert not far.reading
    while "end" not in sink.heard:
        answer.resume()
        assert len(sink.heard) < 9
    assert b"".join(data for data in sink.heard if isinstance(data, bytes)) == body


async def test_a_sink_that_pauses_and_resumes_within_a_piece_misses_nothing() -> None:
    def blink(data: bytes) -> None:
        answer.pause()
        answer.resume()

    answer, _ = opened()
    answer.received(b"a")
    answer.follow(sink := Noted(blink))
    answer.received(b"b")
    answer.ended()
    assert sink.heard == [b"a", b"b", "end"]


async def test_a_sink_is_never_given_a_piece_inside_another() -> None:
    inside = 0

    def blink(data: bytes) -> None:
        nonlocal inside
        inside += 1
        answer.pause()
        answer.resume()
        assert inside == 1
        inside -= 1

    answer, _ = opened(b"Content-Encoding: gzip")
    await answer.head()
    answer.follow(sink := Noted(blink))
    answer.received(gzip.compress(bytes(3 * MAX_STEP)))
    answer.ended()
    assert len(sink.heard) == 4


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
async def test_gzip_of_many_members_is_one_body(size: int) -> None:
    packed = gzip.compress(PLAIN) + 3000 * gzip.compress(b"") + gzip.compress(PLAIN)
    answer, _ = opened(b"Content-Encoding: gzip")
    await answer.head()
    answer.follow(sink := Noted())
    for start in range(0, len(packed), size):
        answer.received(packed[start : start + size])
    answer.ended()
    assert b"".join(part for part in sink.heard if isinstance(part, bytes)) == 2 * PLAIN


async def test_an_interruption_comes_before_what_is_wrong_with_the_body() -> None:
    answer, _ = opened(b"Content-Encoding: gzip")
    await answer.head()
    answer.received(gzip.compress(PLAIN)[:-9])
    assert await answer.read() == PLAIN
    answer.ended()
    answer.interrupt(ShuttingDown("down"))
    with pytest.raises(ShuttingDown):
        await answer.read()


async def test_an_interruption_is_told_once_even_to_a_sink_that_pauses() -> None:
    answer, far = opened()
    answer.follow(sink := Noted())
    answer.pause()
    answer.received(b"late")
    answer.interrupt(ShuttingDown("down"))
    answer.interrupt(ShuttingDown("again"))
    answer.received(b"later")
    answer.resume()
    assert sink.heard == ["fault"]
    assert str(sink.error) == "down"
    assert far.cuts == 1


async def test_after_the_end_was_told_nothing_more_is() -> None:
    answer, far = opened()
    answer.follow(sink := Noted())
    answer.ended()
    answer.interrupt(ShuttingDown("down"))
    answer.finish()
    answer.close()
    assert sink.heard == ["end"]
    assert far.cuts == 0, "the connection may be another answer's by now"


# --- finish and close


async def test_finishing_reads_to_the_end_so_that_the_connection_comes_back() -> None:
    answer, far = opened()
    answer.follow(sink := Noted(lambda data: answer.finish()))
    answer.received(b"data: [DONE]\n\n")
    answer.received(b"rest")
    answer.ended()
    await asyncio.sleep(DRAIN * 1.5)
    assert sink.heard == [b"data: [DONE]\n\n"]
    assert far.cuts == 0


async def test_finishing_goes_on_with_a_body_that_was_held_back() -> None:
    answer, far = opened()
    answer.received(b"x" * MAX_HELD)
    answer.finish()
    assert far.reading


async def test_a_body_that_stays_open_is_cut_after_a_tenth_of_a_second() -> None:
    answer, far = opened()
    started = asyncio.get_running_loop().time()
    answer.finish()
    async with asyncio.timeout(2):
        while not far.cuts:
            await asyncio.sleep(0.005)
    assert asyncio.get_running_loop().time() - started >= DRAIN - 0.01


async def test_the_first_of_finish_and_close_counts() -> None:
    answer, far = opened()
    answer.finish()
    answer.pause()
    answer.close()
    assert (far.cuts, far.reading) == (0, True)
    answer.ended()
    answer, far = opened()
    answer.close()
    answer.finish()
    answer.close()
    assert far.cuts == 1
    await asyncio.sleep(DRAIN * 1.5)
    assert far.cuts == 1


# --- compressed bodies


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "packed"),
    [
        (b"gzip", gzip.compress(PLAIN)),
        (b"X-GZip", gzip.compress(PLAIN)),
        (b"deflate", zlib.compress(PLAIN)),
        (b"deflate", raw_deflate(PLAIN)),
        (b"identity", PLAIN),
        (b"", PLAIN),
    ],
    ids=["gzip", "x-gzip", "deflate", "bare deflate", "identity", "none"],
)
async def test_a_body_is_inflated_however_it_is_cut(coding: bytes, packed: bytes) -> None:
    for step in (1, 7, len(packed)):
        answer, _ = opened(b"Content-Encoding: " + coding)
        await answer.head()
        for start in range(0, len(packed), step):
            answer.received(packed[start : start + step])
        answer.ended()
        assert await answer.body(len(PLAIN)) == PLAIN
    answer, _ = opened(b"Content-Encoding: " + coding)
    await answer.head()
    answer.follow(sink := Noted())
    for start in range(len(packed)):
        answer.received(packed[start : start + 1])
    answer.ended()
    assert b"".join(data for data in sink.heard if isinstance(data, bytes)) == PLAIN
    assert sink.heard[-1] == "end"


async def test_an_empty_body_is_whole_whatever_its_coding() -> None:
    answer, _ = opened(b"Content-Encoding: gzip")
    await answer.head()
    answer.ended()
    assert await answer.read() == b""


@pytest.mark.parametrize(
    "packed",
    [
        b"not gzip at all",
        gzip.compress(PLAIN)[:-9],
        gzip.compress(PLAIN) + b"more",
        gzip.compress(PLAIN)[:40] + bytes(40),
    ],
    ids=["another form", "cut short", "more after its end", "overwritten"],
)
async def test_a_compressed_body_that_is_broken_is_said_to_be(packed: bytes) -> None:
    answer, _ = opened(b"Content-Encoding: gzip")
    await answer.head()
    answer.received(packed)
    answer.ended()
    with pytest.raises(UpstreamBadBody, match="acme sent a compressed answer that is broken"):
        await answer.body(1 << 20)
    answer, _ = opened(b"Content-Encoding: gzip")
    await answer.head()
    answer.follow(sink := Noted())
    answer.received(packed)
    answer.ended()
    assert isinstance(sink.error, UpstreamBadBody)


async def test_a_bomb_costs_what_is_taken_of_it() -> None:
    answer, _ = opened(b"Content-Encoding: gzip")
    await answer.head()
    answer.received(gzip.compress(bytes(64 << 20)))
    assert len(await answer.read()) == MAX_STEP
    with pytest.raises(UpstreamBadBody, match="more than"):
        await answer.body(1 << 20)


async def test_a_coding_that_cannot_be_undone_is_refused() -> None:
    answer, _ = opened(b"Content-Encoding: br")
    with pytest.raises(UpstreamBadBody, match="not asked for"):
        await answer.head()

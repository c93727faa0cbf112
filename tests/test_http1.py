"""What an answer's bytes mean, however they are cut, and which connections are used again."""

import asyncio
from typing import Any, cast

import pytest

from gateway.http1 import MAX_HEAD, MAX_HEADERS, Connection, Fault, Head

pytestmark = pytest.mark.unit


class Wire:
    """A transport that goes nowhere."""

    def __init__(self) -> None:
        self.sent = b""
        self.waiting = 0  # bytes that are not sent yet
        self.closed = False
        self.reading = True

    def get_extra_info(self, name: str) -> Any:
        return self if name == "socket" else None

    def fileno(self) -> int:
        return 0

    def write(self, data: bytes) -> None:
        self.sent += data

    def writelines(self, parts: tuple[bytes, ...]) -> None:
        self.sent += b"".join(parts)

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class Heard:
    """A receiver that remembers."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.pieces: list[bytes] = []
        self.whole = False
        self.fault: Fault | None = None

    def opened(self, head: Head) -> None:
        assert self.head is None
        self.head = head

    def received(self, data: bytes) -> None:
        assert data and self.head is not None and not self.over
        self.pieces.append(data)

    def ended(self) -> None:
        assert self.head is not None and not self.over
        self.whole = True

    def failed(self, fault: Fault) -> None:
        assert not self.over
        self.fault = fault

    @property
    def over(self) -> bool:
        return self.whole or self.fault is not None

    @property
    def said(self) -> tuple[int, bytes, bool, Fault | None]:
        return self.head.status if self.head else 0, b"".join(self.pieces), self.whole, self.fault


class Line:
    """A connection with its wire, and how often it came back."""

    def __init__(self) -> None:
        self.free = self.lost = 0
        self.connection = Connection(self._note_free, self._note_lost)
        self.wire = Wire()
        self.connection.connection_made(cast(asyncio.Transport, self.wire))

    def _note_free(self, connection: Connection) -> None:
        self.free += 1

    def _note_lost(self, connection: Connection) -> None:
        self.lost += 1

    def ask(self) -> Heard:
        heard = Heard()
        self.connection.send(b"GET / HTTP/1.1\r\n\r\n", b"", heard)
        return heard

    def hear(self, *pieces: bytes) -> Heard:
        heard = self.ask()
        for piece in pieces:
            if not self.wire.closed:  # a transport that was aborted gives nothing more
                self.connection.data_received(piece)
        return heard

    def lose(self, error: Exception | None = None, *, eof: bool = True) -> None:
        if self.wire.closed:
            return
        if eof:
            self.connection.eof_received()
        self.wire.closed = True
        self.connection.connection_lost(error)


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
ANSWERS = {
    "a length": (OK + b"Content-Length: 5\r\n\r\nhello", b"hello"),
    "a length of nothing": (OK + b"Content-Length: 0\r\n\r\n", b""),
    "chunks": (CHUNKED + b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n", b"hello!"),
    "chunks with extensions": (CHUNKED + b'5;a=1;b="x;y"\r\nhello\r\n0;last\r\n\r\n', b"hello"),
    "chunks with trailers": (CHUNKED + b"5\r\nhello\r\n0\r\nDigest: x\r\nX-Status: 500\r\n\r\n", b"hello"),
    "a length among the trailers": (CHUNKED + b"5\r\nhello\r\n0\r\nContent-Length: 3\r\n\r\n", b"hello"),
    "sizes in both cases": (CHUNKED + b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n", b"0123456789" * 2),
    "a body like an answer": (
        OK + b"Content-Length: 39\r\n\r\n" + b"HTTP/1.1 500 X\r\nContent-Length: 1\r\n\r\n!\n",
        None,
    ),
    "an interim answer": (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\nhi", b"hi"),
    "interim answers with headers": (
        b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\nContent-Encoding: br\r\n\r\n"
        + OK
        + b"Content-Length: 2\r\n\r\nhi",
        b"hi",
    ),
    "no reason": (b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nhi", b"hi"),
    "an empty field": (OK + b"X-Empty:\r\nContent-Length: 2\r\n\r\nhi", b"hi"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_means_the_same_however_its_bytes_are_cut(name: str) -> None:
    data, expected = ANSWERS[name]
    body = data[-39:] if expected is None else expected
    cuts = [[data], [data[i : i + 1] for i in range(len(data))]]
    cuts += [[data[:i], data[i:]] for i in range(1, len(data))]
    cuts += [[data[:i], data[i : i + 2], data[i + 2 :]] for i in range(1, len(data) - 2)]
    for pieces in cuts:
        line = Line()
        heard = line.hear(*pieces)
        assert heard.said == (200, body, True, None)
        assert heard.head is not None
        assert heard.head.get(b"\r\ncontent-encoding:") == "", "an interim answer's headers are its own"
        assert (line.free, line.wire.closed) == (1, False)


@pytest.mark.parametrize("status", [204, 304])
def test_these_have_no_body_whatever_their_head_says(status: int) -> None:
    for field in (b"", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"):
        line = Line()
        assert line.hear(b"HTTP/1.1 %d X\r\n%b\r\n" % (status, field)).said == (status, b"", True, None)
        assert line.free == 1


def test_one_connection_carries_one_answer_after_the_other() -> None:
    line = Line()
    for data, _ in [*ANSWERS.values()] * 2:
        assert line.hear(data).said[2:] == (True, None)
    assert line.free == 2 * len(ANSWERS)


def test_a_length_may_stand_in_a_trailer_and_still_not_beside_chunks_in_the_next_head() -> None:
    line = Line()
    assert line.hear(ANSWERS["a length among the trailers"][0]).whole
    assert line.free == 1
    assert line.hear(OK + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n").said[3] == "protocol"


def test_all_that_was_in_a_read_is_one_piece() -> None:
    pieces = [b"5\r\nhello\r\n" * 100, b"5\r\nhello\r\n5\r\nhe", b"llo\r\n0\r\n\r\n"]
    assert Line().hear(CHUNKED, *pieces).pieces == [b"hello" * 100, b"hellohe", b"llo"]


def test_a_field_is_found_by_its_name_in_any_case_and_its_first_value_counts() -> None:
    head = Line().hear(OK + b"X-A:  one \r\nx-a: two\r\nX-B: y\r\nContent-Length: 0\r\nX-Last: \xe9\r\n\r\n").head
    assert head is not None
    found = [head.get(b"\r\n%b:" % name) for name in (b"x-a", b"x-b", b"x-last", b"x-c", b"y", b"content-length")]
    assert found == ["one", "y", "é", "", "", "0"]


# --- what is no answer --------------------------------------------------------------------------------------------

REFUSED = {
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a page": b"<html><body>gateway</body></html>",
    "TLS": b"\x15\x03\x01\x00\x02\x02\x16",
    "an empty line first": b"\r\n" + OK + b"Content-Length: 0\r\n\r\n",
    "HTTP/0.9": b"HTTP/0.9 200 OK\r\nContent-Length: 0\r\n\r\n",
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "another case": b"http/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 99 OK\r\nContent-Length: 0\r\n\r\n",
    "a status of four digits": b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
    "a status of nothing": b"HTTP/1.1 000 OK\r\nContent-Length: 0\r\n\r\n",
    "a switch": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
    "a switch to nothing": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "an empty line between two heads": b"HTTP/1.1 100 Continue\r\n\r\n\r\n" + OK + b"Content-Length: 0\r\n\r\n",
    "bare LF after the status": b"HTTP/1.1 200 OK\nContent-Length: 0\r\n\r\n",
    "bare LF after a field": OK + b"Content-Length: 0\n\r\n",
    "bare LF at the end": OK + b"Content-Length: 0\r\n\n",
    "bare CR in a value": OK + b"X: a\rb\r\nContent-Length: 0\r\n\r\n",
    "NUL in a value": OK + b"X: a\0b\r\nContent-Length: 0\r\n\r\n",
    "a folded line": OK + b"X: a\r\n b\r\nContent-Length: 0\r\n\r\n",
    "a line folded by a tab": OK + b"X: a\r\n\tb\r\nContent-Length: 0\r\n\r\n",
    "a folded first line": OK + b" X: a\r\nContent-Length: 0\r\n\r\n",
    "a space before the colon": OK + b"Content-Length : 0\r\n\r\n",
    "no colon": OK + b"Content-Length\r\n\r\n",
    "a name that is none": OK + b"X(: 1\r\nContent-Length: 0\r\n\r\n",
    "two lengths": OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
    "the same length twice": OK + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nab",
    "a list of lengths": OK + b"Content-Length: 2, 2\r\n\r\nab",
    "a length with a sign": OK + b"Content-Length: +2\r\n\r\nab",
    "a length below nothing": OK + b"Content-Length: -2\r\n\r\nab",
    "a length in hexadecimal": OK + b"Content-Length: 0x2\r\n\r\nab",
    "an empty length": OK + b"Content-Length:\r\n\r\nab",
    "a length beyond 64 bits": OK + b"Content-Length: 99999999999999999999\r\n\r\nab",
    "a length, then chunks": OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks, then a length": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
    "another coding": OK + b"Transfer-Encoding: gzip\r\n\r\nab",
    "another coding in chunks": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunks in another coding": OK + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "two codings": OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
    "two codings, chunked last": OK + b"Transfer-Encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "no coding by name": OK + b"Transfer-Encoding: identity\r\n\r\nab",
    "almost chunked": OK + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a vertical tab before chunked": OK + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "one field too large": OK + b"X: " + b"a" * MAX_HEAD + b"\r\nContent-Length: 0\r\n\r\n",
    "fields too large together": OK + b"".join(b"X: %b\r\n" % (b"a" * 1000) for _ in range(70)) + b"\r\n",
    "a head without an end": OK + b"X: " + b"a" * (2 * MAX_HEAD),
    "too many fields": OK + b"X: 1\r\n" * MAX_HEADERS + b"Content-Length: 0\r\n\r\n",
    "interim answers without an end": b"HTTP/1.1 100 Continue\r\n\r\n" * 3000,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_an_answer_in_http_1_1_is_refused_and_costs_the_connection(name: str) -> None:
    data = REFUSED[name]
    step = 997 if len(data) > 2000 else 1
    for pieces in ([data], [data[i : i + step] for i in range(0, len(data), step)]):
        line = Line()
        heard = line.hear(*pieces)
        assert heard.said == (0, b"", False, "protocol"), pieces
        assert (line.free, line.wire.closed) == (0, True)


def test_a_head_may_have_as_many_fields_and_bytes_as_the_limits_say() -> None:
    fields = b"".join(b"X-%d: %b\r\n" % (i, b"a" * 300) for i in range(MAX_HEADERS - 2)) + b"Content-Length: 0\r\n"
    assert Line().hear(OK + fields + b"\r\n").said == (200, b"", True, None)


BROKEN_CHUNKS = {
    "a size that is no number": b"x\r\n",
    "a size with a sign": b"-1\r\n",
    "a size with 0x": b"0x5\r\nhello\r\n",
    "a size in quotes": b'"5"\r\nhello\r\n',
    "a space after the size": b"5 \r\nhello\r\n0\r\n\r\n",
    "a size beyond 64 bits": b"11111111111111111\r\n",
    "bare LF after the size": b"5\nhello\r\n0\r\n\r\n",
    "bare LF after the data": b"5\r\nhello\n0\r\n\r\n",
    "more than the size says": b"5\r\nhello!\r\n0\r\n\r\n",
    "two lengths among the trailers": b"5\r\nhello\r\n0\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    "an extension without an end": b"5;" + b"x" * (2 * MAX_HEAD),
    "trailers without an end": b"0\r\n" + b"X: 1\r\n" * 30_000,
}


@pytest.mark.parametrize("name", BROKEN_CHUNKS)
def test_chunks_that_are_none_break_the_body_after_all_that_was_good(name: str) -> None:
    line = Line()
    data = b"3\r\nabc\r\n" + BROKEN_CHUNKS[name]
    heard = line.hear(CHUNKED, *[data[i : i + 1000] for i in range(0, len(data), 1000)])
    assert heard.said[0] == 200
    assert heard.said[1] in (b"abc", b"abchello")
    assert heard.said[2:] == (False, "protocol")
    assert (line.free, line.wire.closed) == (0, True)


# --- the end of the connection ------------------------------------------------------------------------------------


def test_a_body_without_a_length_ends_with_a_goodbye() -> None:
    line = Line()
    heard = line.hear(OK + b"\r\nhello", b" there")
    assert not heard.over
    line.lose()
    assert heard.said == (200, b"hello there", True, None)
    assert line.free == 0


def test_a_body_without_a_length_is_cut_short_by_an_end_without_a_goodbye() -> None:
    """TLS without close_notify: anybody on the way can make such an end."""
    line = Line()
    heard = line.hear(OK + b"\r\nhello")
    line.lose(eof=False)
    assert heard.said == (200, b"hello", False, "truncated")


@pytest.mark.parametrize(
    ("before", "error", "expected"),
    [
        (b"", None, (0, b"", False, "unanswered")),
        (b"", ConnectionResetError(), (0, b"", False, "unanswered")),
        (b"HTTP/1.1 2", None, (0, b"", False, "reset")),
        (b"HTTP/1.1 100 Continue\r\n\r\n", None, (0, b"", False, "reset")),
        (OK + b"Content-Length: 5\r\n\r\n", None, (200, b"", False, "truncated")),
        (OK + b"Content-Length: 5\r\n\r\nhell", None, (200, b"hell", False, "truncated")),
        (OK + b"Content-Length: 5\r\n\r\nhell", ConnectionResetError(), (200, b"hell", False, "reset")),
        (CHUNKED + b"5\r\nhello\r\n", None, (200, b"hello", False, "truncated")),
        (CHUNKED + b"5\r\nhello\r\n0\r\n", None, (200, b"hello", False, "truncated")),
        (CHUNKED + b"5\r\nhello\r\n", ConnectionResetError(), (200, b"hello", False, "reset")),
    ],
)
def test_what_is_missing_when_the_connection_ends_is_said(
    before: bytes, error: Exception | None, expected: Any
) -> None:
    line = Line()
    heard = line.hear(before) if before else line.ask()
    line.lose(error, eof=error is None)
    assert heard.said == expected
    assert (line.free, line.lost) == (0, 1)


def test_a_request_on_a_connection_that_is_gone_is_not_answered() -> None:
    line = Line()
    line.lose()
    assert line.ask().said == (0, b"", False, "unanswered")
    assert line.wire.sent == b""


# --- reuse --------------------------------------------------------------------------------------------------------

LAST = {
    "close": OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi",
    "close among others": OK + b"Connection: x, Close\r\nContent-Length: 2\r\n\r\nhi",
    "close in chunks": OK + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi",
    "HTTP/1.0 that would stay": b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi",
    "a byte more": OK + b"Content-Length: 2\r\n\r\nhi!",
    "a byte more after chunks": CHUNKED + b"2\r\nhi\r\n0\r\n\r\n!",
    "a whole answer more": OK + b"Content-Length: 2\r\n\r\nhi" + OK + b"Content-Length: 2\r\n\r\nho",
    "a byte more after close": OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi!",
}


@pytest.mark.parametrize("name", LAST)
def test_a_good_answer_on_a_connection_that_is_not_used_again(name: str) -> None:
    line = Line()
    assert line.hear(LAST[name]).said == (200, b"hi", True, None)
    assert (line.free, line.wire.closed) == (0, True)


@pytest.mark.parametrize("data", [b"HTTP/1.1 408 Request Timeout\r\n\r\n", b"\r\n", b"!"])
def test_an_idle_connection_that_talks_is_cut(data: bytes) -> None:
    line = Line()
    line.hear(ANSWERS["a length"][0])
    line.connection.data_received(data)
    assert line.wire.closed


def test_an_answer_to_half_a_request_costs_the_connection() -> None:
    line = Line()
    line.wire.waiting = 1
    assert line.hear(OK + b"Content-Length: 2\r\n\r\nhi").whole
    assert (line.free, line.wire.closed) == (0, True)


def test_a_connection_that_was_paused_reads_again_when_it_is_free() -> None:
    line = Line()
    heard = line.hear(OK + b"Content-Length: 2\r\n\r\nh")
    line.connection.pause()
    line.connection.pause()
    assert not line.wire.reading
    line.connection.data_received(b"i")
    assert heard.whole
    assert line.wire.reading
    assert line.free == 1


def test_who_cuts_hears_nothing_more() -> None:
    class Cutter(Heard):
        def received(self, data: bytes) -> None:
            super().received(data)
            line.connection.cut()

    line, cutter = Line(), Cutter()
    line.connection.send(b"GET / HTTP/1.1\r\n\r\n", b"", cutter)
    line.connection.data_received(OK + b"Content-Length: 2\r\n\r\nhi")
    line.connection.connection_lost(None)
    assert cutter.said == (200, b"hi", False, None)
    assert (line.free, line.lost) == (0, 1)


@pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 16) + 1, 1 << 20])
def test_a_request_is_sent_whole(size: int) -> None:
    line = Line()
    line.connection.send(b"POST / HTTP/1.1\r\n\r\n", b"x" * size, Heard())
    assert line.wire.sent == b"POST / HTTP/1.1\r\n\r\n" + b"x" * size


# --- a body in pieces


def test_a_body_in_pieces_is_on_the_wire_as_it_was_written_and_its_connection_comes_back_when_it_is_whole() -> None:
    line, heard = Line(), Heard()
    line.connection.begin(b"POST / HTTP/1.1\r\n\r\n", heard)
    line.connection.write(b"ab")
    line.connection.write(b"c")
    line.connection.sent()
    assert line.wire.sent == b"POST / HTTP/1.1\r\n\r\nabc"
    line.connection.data_received(OK + b"Content-Length: 2\r\n\r\nhi")
    assert (heard.said, line.free, line.wire.closed) == ((200, b"hi", True, None), 1, False)
    assert line.hear(OK + b"Content-Length: 2\r\n\r\nhi").whole  # and carries the next one
    assert line.free == 2


def test_an_answer_before_the_end_of_a_body_is_whole_and_costs_the_connection() -> None:
    line, heard = Line(), Heard()
    line.connection.begin(b"POST / HTTP/1.1\r\n\r\n", heard)
    line.connection.write(b"ab")
    line.connection.data_received(OK + b"Content-Length: 2\r\n\r\nhi")
    assert (heard.said, line.free, line.wire.closed) == ((200, b"hi", True, None), 0, True)
    line.connection.write(b"c")
    assert line.wire.sent.endswith(b"ab")


async def test_who_writes_waits_until_the_kernel_takes_more_or_the_connection_is_gone() -> None:
    line = Line()
    await line.connection.writable()
    for wake in (line.connection.resume_writing, line.lose):
        line.connection.pause_writing()
        waiting = asyncio.ensure_future(line.connection.writable())
        await asyncio.sleep(0)
        assert not waiting.done()
        wake()
        await waiting

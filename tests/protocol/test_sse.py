import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.protocol.errors import EventTooLarge
from gateway.protocol.sse import DONE, MAX_EVENT, PING, Event, SSEDecoder, data_event, decode_event

pytestmark = pytest.mark.unit

BOM = b"\xef\xbb\xbf"
TOKENS = [
    b"\n",
    b"\r",
    b"\r\n",
    b"\n\n",
    b"data: a",
    b"data:b",
    b"data",
    b": c",
    b"event: e",
    b"id: 1",
    b"x",
    b" ",
    BOM,
]
streams = st.lists(st.sampled_from(TOKENS), max_size=24).map(b"".join)


def decode(*pieces: bytes) -> list[Event]:
    decoder = SSEDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


def by_the_standard(data: bytes) -> list[tuple[bytes, str]]:
    """Data and name of every event, read line by line: the standard's own algorithm, for a whole stream at once."""
    events: list[tuple[bytes, str]] = []
    lines: list[bytes] = []
    name = ""
    for line in re.split(rb"\r\n|\n|\r", data.removeprefix(BOM))[:-1]:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            if lines:
                events.append((b"\n".join(lines), name))
            lines, name = [], ""
        elif field == b"data":
            lines.append(value)
        elif field == b"event":
            name = value.decode()
    return events


# --- framing ------------------------------------------------------------------------------------------------------


@given(streams)
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_events_are_those_of_the_standard(data: bytes) -> None:
    data += b":"  # whatever ended it has ended: a \r at the end of the bytes may still become \r\n
    dispatched = [(event.data, event.name) for event in decode(data) if event.data is not None]
    assert dispatched == by_the_standard(data)


@given(streams)
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_events_do_not_depend_on_where_the_network_cuts(data: bytes) -> None:
    whole = decode(data)
    assert decode(*(data[at : at + 1] for at in range(len(data)))) == whole
    for cut in range(len(data) + 1):
        assert decode(data[:cut], data[cut:]) == whole


@given(streams)
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_no_byte_is_lost_or_made_up(data: bytes) -> None:
    decoder = SSEDecoder()
    raw = b"".join(event.raw for event in decoder.feed(data))
    held = decoder.rest()
    assert raw + held == data.removeprefix(BOM)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_line_end_makes_the_same_events(end: bytes) -> None:
    data = b": hi\ndata: 1\n\nevent: e\ndata: 2\ndata: 3\n\n".replace(b"\n", end)
    assert [(event.data, event.name) for event in decode(data)] == [(b"1", ""), (b"2\n3", "e")]


@pytest.mark.parametrize("blank", [b"\n\n", b"\r\r", b"\n\r\n", b"\r\n\n", b"\r\n\r\n"])
def test_an_event_comes_out_with_its_last_byte(blank: bytes) -> None:
    decoder = SSEDecoder()
    for byte in (b"data: 1" + blank)[:-1]:
        assert decoder.feed(bytes([byte])) == []
    assert [event.data for event in decoder.feed(blank[-1:])] == [b"1"]


@pytest.mark.parametrize("blank", [b"\n\n", b"\r\r", b"\n\r\n", b"\r\n\n", b"\r\n\r\n"])
def test_a_read_of_several_events_may_end_them_as_it_likes(blank: bytes) -> None:
    events = decode(b"data: 1\n\n", b"data: 2" + blank + b"data: 3\n\n", b"data: 4\n\ndata: 5\n\n")
    assert [event.data for event in events] == [b"1", b"2", b"3", b"4", b"5"]


def test_a_newline_after_two_carriage_returns_is_no_line_of_its_own() -> None:
    first, second = decode(b"data: 1\r\r\ndata: 2\r\n\r\n")
    assert (first.raw, second.raw) == (b"data: 1\r\r", b"\ndata: 2\r\n\r\n")


def test_a_newline_that_belongs_to_a_carriage_return_makes_no_blank_line() -> None:
    data = b"data: 1\r\r\n\ndata: 2\n\n"
    for pieces in ([data], [data[:9], data[9:]], [data[:10], data[10:]]):
        assert [event.raw for event in decode(*pieces)] == [b"data: 1\r\r", b"\n\ndata: 2\n\n"]


def test_blank_lines_alone_come_out_at_once() -> None:
    assert [event.raw for event in decode(b"\n\n")] == [b"\n\n"]
    assert [event.raw for event in decode(b"data: 1\n\n\n\n")] == [b"data: 1\n\n", b"\n\n"]


def test_a_carriage_return_at_the_end_waits_for_its_newline() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"data: 1\n\r") == []
    assert [event.raw for event in decoder.feed(b"\n")] == [b"data: 1\n\r\n"]


def test_a_leading_byte_order_mark_is_dropped_and_no_other() -> None:
    first, second = decode(BOM + b"data: 1\n\n" + BOM + b"data: 2\n\n")
    assert (first.raw, first.data) == (b"data: 1\n\n", b"1")
    assert (second.raw, second.data) == (BOM + b"data: 2\n\n", None)


def test_separators_inside_json_end_no_line() -> None:
    text = '{"a": "\u2028 \u2029 \x85 \x0b \x0c \x1c \x1e"}'.encode()
    assert [event.data for event in decode(data_event(text))] == [text]


def test_the_rest_is_the_event_that_was_never_closed() -> None:
    decoder = SSEDecoder()
    decoder.feed(b"data: 1\n\ndata: 2\n")
    assert decoder.rest() == b"data: 2\n"


# --- one event ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\n\n", b"{}"),
        (b"data:  {}\n\n", b" {}"),
        (b"data: a\ndata:b\n\n", b"a\nb"),
        (b"data\n\n", b""),
        (b"data:\n\n", b""),
        (b": comment\n\n", None),
        (b"\n\n", None),
        (b"datum: 1\n\n", None),
        (b"Data: 1\n\n", None),
    ],
)
def test_data_is_read_by_the_standard(raw: bytes, data: bytes | None) -> None:
    assert decode_event(raw).data == data


def test_an_event_is_plain_when_it_may_be_passed_on_as_it_is() -> None:
    assert decode_event(b": c\nevent: e\ndata: 1\n\n").plain
    assert not decode_event(b"id: 1\ndata: 1\n\n").plain
    assert not decode_event(b"retry: 1\n\n").plain
    assert not decode_event(b"anything\ndata: 1\n\n").plain
    assert not decode_event(b": \xff\ndata: 1\n\n").plain
    assert not decode_event(b"event: \xff\ndata: 1\n\n").plain
    assert decode_event(": ü\nevent: ü\ndata: 1\n\n".encode()).plain


def test_the_field_named_error_is_kept() -> None:
    assert decode_event(b'error: {"message": "no"}\n\n').stray == b'{"message": "no"}'
    assert decode_event(b"data: 1\n\n").stray is None


def test_a_name_that_is_not_utf8_is_no_failure() -> None:
    assert decode_event(b"event: \xff\ndata: 1\n\n").name == "\ufffd"


def test_what_we_write_ourselves_is_read_again() -> None:
    assert [event.data for event in decode(data_event(b"{}") + PING + DONE)] == [b"{}", None, b"[DONE]"]


# --- size ---------------------------------------------------------------------------------------------------------


def test_a_megabyte_is_the_default_limit() -> None:
    event = data_event(b"x" * (MAX_EVENT - len(data_event(b""))))
    assert [event.raw for event in decode(event)] == [event]
    with pytest.raises(EventTooLarge, match="longer than 1048576 bytes"):
        decode(b"x" + event)


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_an_event_that_is_too_large_does_not_eat_the_good_ones_before_it(size: int) -> None:
    data = b"data: 1\n\ndata: 2\n\ndata: 34567\n\ndata: 8\n\n"
    decoder, events = SSEDecoder(max_event=10), []
    with pytest.raises(EventTooLarge, match="longer than 10 bytes"):
        for at in range(0, len(data) + size, size):
            events += [event.data for event in decoder.feed(data[at : at + size])]
    assert events == [b"1", b"2"]


def test_an_event_of_the_largest_size_may_wait_for_what_follows_it() -> None:
    decoder = SSEDecoder(max_event=10)
    assert decoder.feed(b"data: 12\n\r") == []
    assert [event.data for event in decoder.feed(b":")] == [b"12"]


def test_a_flood_without_a_line_end_is_not_held() -> None:
    decoder = SSEDecoder(max_event=10)
    with pytest.raises(EventTooLarge):
        decoder.feed(b"x" * 1000)
    assert decoder.rest() == b""

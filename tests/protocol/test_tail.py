"""The usage at the end of an answer that passed."""

import orjson
import pytest

from gateway.protocol.tail import KEPT, Tail
from gateway.protocol.usage import Usage

pytestmark = pytest.mark.unit

USAGE = {"input_tokens": 7, "output_tokens": 272, "total_tokens": 279, "input_tokens_details": {"cached_tokens": 3}}


def usage_of(body: bytes, size: int = 1 << 16) -> Usage | None:
    tail = Tail()
    for at in range(0, len(body), size):
        tail.add(body[at : at + size])
    return tail.usage()


@pytest.mark.parametrize("size", [1, 1000, 1 << 16])
def test_it_is_found_behind_megabytes(size: int) -> None:
    body = orjson.dumps({"data": [{"b64_json": "A" * (1 << 16 if size == 1 else 1 << 21)}], "usage": USAGE})
    assert usage_of(body, size) == Usage(7, 272, cached_tokens=3)


def test_the_last_event_has_it() -> None:
    events = [
        {"type": "a", "usage": None},
        {"type": "image_generation.completed", "b64_json": "A" * KEPT, "usage": USAGE},
    ]
    body = b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events)
    assert usage_of(body + b"data: [DONE]\n\n") == Usage(7, 272, cached_tokens=3)


def test_chat_s_words_are_known_too() -> None:
    assert usage_of(b'{"usage" : {"prompt_tokens": 1, "completion_tokens": 2}}') == Usage(1, 2)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xff\xfe", b'{"text": "a"}', b'{"usage": null}', b'{"usage": {"type": "duration", "seconds": 9}}', b'{"usage": {"inp',
        b'{"usage"', b'["usage", "x"]', b'{"usage": ' + b"[" * 5000, b'{"usage": {"input_tokens": -1, "output_tokens": "7"}}',
        orjson.dumps({"text": '{"usage": {"input_tokens": 9, "output_tokens": 9}}'}),
    ],
)  # fmt: skip
def test_what_is_not_usage_counts_nothing(body: bytes) -> None:
    assert usage_of(body) is None

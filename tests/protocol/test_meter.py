from collections.abc import Iterator

import pytest

from gateway.protocol.meter import Meter, estimate_tokens
from gateway.protocol.usage import Usage

pytestmark = pytest.mark.unit


def test_a_token_is_estimated_as_four_bytes_and_a_part_of_one_as_one() -> None:
    assert [estimate_tokens(count) for count in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_the_live_count_moves_with_the_text_and_never_counts_twice() -> None:
    meter = Meter([])
    added = [meter.see(text, None, None) for text in ("Hel", "lo", "", " there, you")]
    assert added == [1, 1, 0, 2]
    assert sum(added) == meter.completion_tokens == 4


def test_text_is_counted_in_bytes_not_in_characters() -> None:
    meter = Meter([])
    meter.see("日本", None, None)
    assert meter.bytes_out == 6


def test_half_an_emoji_is_counted() -> None:
    meter = Meter(["\ud83d"])
    assert meter.see("\ud83d", None, None) == 1
    assert meter.result() == (Usage(1, 1), "estimated")


def test_the_providers_usage_replaces_the_count() -> None:
    meter = Meter(["ignored, because the provider says what the prompt was"])
    meter.see("one two three four", None, None)
    meter.see("", Usage(12, 4, 3, 2, 1), "stop")
    assert meter.result() == (Usage(12, 4, 3, 2, 1), "provider")
    assert meter.completion_tokens == 4


def test_the_last_usage_wins() -> None:
    meter = Meter([])
    meter.see("a", Usage(5, 1), None)
    meter.see("b", Usage(5, 2), None)
    meter.see("c", None, None)
    assert meter.result() == (Usage(5, 2), "provider")


def test_the_last_finish_reason_wins() -> None:
    meter = Meter([])
    for reason in (None, "length", "stop", None):
        meter.see("", None, reason)
    assert meter.finish_reason == "stop"


def test_without_usage_both_sides_are_estimated() -> None:
    meter = Meter(["12345678", "1234"])
    meter.see("12345", None, None)
    assert meter.result() == (Usage(3, 2), "estimated")


def test_a_prompt_that_the_provider_did_not_count_is_estimated_and_the_rest_kept() -> None:
    meter = Meter(["12345678"])
    meter.see("many more bytes than that", Usage(None, 3, reasoning_tokens=2), "stop")
    assert meter.result() == (Usage(2, 3, reasoning_tokens=2), "estimated")


def test_a_completion_that_the_provider_did_not_count_is_estimated_and_the_prompt_kept() -> None:
    meter = Meter(["12345678"])
    meter.see("12345", Usage(99, None, cached_tokens=64), None)
    assert meter.result() == (Usage(99, 2, cached_tokens=64), "estimated")


def test_the_prompt_is_not_read_when_the_provider_counted() -> None:
    def prompt() -> Iterator[str]:
        raise AssertionError("was read")
        yield ""

    meter = Meter(prompt())
    meter.see("", Usage(1, 1), None)
    assert meter.result() == (Usage(1, 1), "provider")

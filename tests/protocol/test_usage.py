from typing import Any

import orjson
import pytest

from gateway.protocol.usage import Usage

pytestmark = pytest.mark.unit


def test_openai_usage_keeps_its_details_apart() -> None:
    usage = Usage.from_openai(
        {
            "prompt_tokens": 1220,
            "completion_tokens": 300,
            "total_tokens": 1520,
            "prompt_tokens_details": {"cached_tokens": 1024, "cache_write_tokens": 128, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 256},
        }
    )
    assert usage == Usage(1220, 300, cached_tokens=1024, cache_write_tokens=128, reasoning_tokens=256)
    assert usage.total_tokens == 1520


def test_usage_survives_the_way_to_the_client_and_back() -> None:
    usage = Usage(10, 20, 3, 4, 5)
    assert Usage.from_openai(usage.to_openai()) == usage


def test_counts_that_the_provider_left_out_are_shown_as_zero_and_kept_as_unknown() -> None:
    usage = Usage(None, 7)
    assert usage.prompt_tokens is None
    assert usage.to_openai()["prompt_tokens"] == 0
    assert usage.to_openai()["total_tokens"] == 7
    assert Usage(7, None).to_openai()["completion_tokens"] == 0
    assert Usage(7, None).total_tokens == 7


@pytest.mark.parametrize(
    "nothing", [None, [], "12", 12, {}, {"prompt_tokens": None, "completion_tokens": None}, {"total_tokens": 3}]
)
def test_what_holds_no_count_is_no_usage(nothing: Any) -> None:
    assert Usage.from_openai(nothing) is None


@pytest.mark.parametrize("nonsense", [None, "12", True, -1, 2**64, float("inf"), float("nan"), [], {}])
def test_a_count_that_cannot_be_one_is_unknown(nonsense: Any) -> None:
    assert Usage.from_openai({"prompt_tokens": nonsense, "completion_tokens": 2}) == Usage(None, 2)


def test_zero_is_a_count() -> None:
    assert Usage.from_openai({"prompt_tokens": 0, "completion_tokens": 0}) == Usage(0, 0)


def test_counts_sent_as_floats_are_counts() -> None:
    assert Usage.from_openai(orjson.loads(b'{"prompt_tokens": 12.0, "completion_tokens": 3.0}')) == Usage(12, 3)


@pytest.mark.parametrize("details", [None, [], "x", {"cached_tokens": None}, {"cached_tokens": "8"}])
def test_details_that_are_none_count_nothing(details: Any) -> None:
    assert Usage.from_openai({"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": details}) == Usage(
        9, 1
    )


@pytest.mark.parametrize(
    "said",
    [
        {"prompt_tokens_details": {"cached_tokens": 64}},
        {"prompt_cache_hit_tokens": 64, "prompt_cache_miss_tokens": 36},  # DeepSeek
        {"prompt_tokens_details": {"cached_tokens": 64}, "prompt_cache_hit_tokens": 64},
        {"cached_tokens": 64},  # Together
    ],
)
def test_cached_tokens_are_found_where_each_provider_puts_them(said: dict[str, Any]) -> None:
    usage = Usage.from_openai({"prompt_tokens": 100, "completion_tokens": 1, **said})
    assert usage == Usage(100, 1, cached_tokens=64)


def test_reasoning_beside_the_completion_is_added_to_it() -> None:
    """xAI bills 32 + 183 tokens of output here, and its total says so."""
    usage = Usage.from_openai(
        {
            "prompt_tokens": 49,
            "completion_tokens": 32,
            "total_tokens": 264,
            "completion_tokens_details": {"reasoning_tokens": 183},
        }
    )
    assert usage == Usage(49, 215, reasoning_tokens=183)
    assert usage.total_tokens == 264


def test_audio_beside_the_prompt_is_added_to_it() -> None:
    """Mistral counts what it heard outside `prompt_tokens`."""
    said = {"prompt_tokens": 9, "completion_tokens": 201, "total_tokens": 585}
    assert Usage.from_openai({**said, "prompt_tokens_details": {"audio_tokens": 375}}) == Usage(384, 201)


def test_a_total_without_its_parts_makes_none_up() -> None:
    assert Usage.from_openai({"prompt_tokens": 5, "completion_tokens": None, "total_tokens": 9}) == Usage(5, None)
    assert Usage.from_openai({"prompt_tokens": None, "completion_tokens": 4, "total_tokens": 9}) == Usage(None, 4)


@pytest.mark.parametrize("total", [None, 0, 21, 30, 1000])
def test_a_total_that_does_not_add_up_is_not_believed(total: int | None) -> None:
    said = {"prompt_tokens": 11, "completion_tokens": 10, "total_tokens": total}
    usage = Usage.from_openai({**said, "completion_tokens_details": {"reasoning_tokens": 8}})
    assert usage == Usage(11, 10, reasoning_tokens=8)

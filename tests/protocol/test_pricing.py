import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from importlib import resources
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.pricing import PICO, Price, PricesError, PriceTable, Tier, cost_micros, price_table
from gateway.protocol.usage import Usage

pytestmark = pytest.mark.unit

SHIPPED = resources.files("gateway").joinpath("prices.json").read_bytes()
TABLE = price_table(SHIPPED)


def usd(input: float, output: float, cached: float | None = None, write: float | None = None, **more: Any) -> Price:  # noqa: A002
    """A price by its numbers on a vendor's page, USD per million tokens."""
    return Price(
        input=round(input * PICO),
        output=round(output * PICO),
        cached_input=round((input if cached is None else cached) * PICO),
        cache_write=round((input if write is None else write) * PICO),
        reasoning=round(output * PICO),
        **more,
    )


def priced(own: dict[str, Any]) -> PriceTable:
    return price_table(SHIPPED, own)


def small(prices: dict[str, Any]) -> PriceTable:
    return price_table(json.dumps({"as_of": "2026-06-01", "source": "a test", "prices": prices}).encode())


# --- what the vendors ask -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "model", "price"),
    [
        # https://openai.com/api/pricing
        ("openai", "gpt-4o", usd(2.5, 10, 1.25)),
        ("openai", "gpt-4o-mini", usd(0.15, 0.6, 0.075)),
        ("openai", "gpt-5", usd(1.25, 10, 0.125)),
        ("openai", "o3", usd(2, 8, 0.5, since=date(2025, 6, 10))),
        ("openai", "text-embedding-3-small", usd(0.02, 0)),
        # https://platform.claude.com/docs/en/about-claude/pricing
        ("anthropic", "claude-opus-4-1-20250805", usd(15, 75, 1.5, 18.75)),
        ("anthropic", "claude-3-5-haiku-latest", usd(0.8, 4, 0.08, 1)),
        ("anthropic", "claude-sonnet-4-20250514", usd(3, 15, 0.3, 3.75)),
        # https://ai.google.dev/gemini-api/docs/pricing
        ("google", "gemini-2.5-flash", usd(0.3, 2.5, 0.03)),
        # https://groq.com/pricing, https://docs.x.ai/docs/models, https://www.together.ai/pricing
        ("groq", "llama-3.3-70b-versatile", usd(0.59, 0.79)),
        ("xai", "grok-4", usd(3, 15, 0.75)),
        ("together", "meta-llama/Llama-3.3-70B-Instruct-Turbo", usd(0.88, 0.88)),
        # https://openrouter.ai/google/gemini-2.5-flash: to write a cache is to read the tokens, and 5 minutes of storage
        ("openrouter", "google/gemini-2.5-flash", usd(0.3, 2.5, 0.03, 0.383333, since=date(2026, 10, 19))),
        ("fireworks", "accounts/fireworks/models/deepseek-v3p2", usd(0.56, 1.68, 0.28)),
    ],
)
def test_a_model_costs_what_its_vendors_page_says(provider: str, model: str, price: Price) -> None:
    assert TABLE.price(provider, model) == price


def test_a_long_prompt_has_the_price_of_its_tier() -> None:
    price = TABLE.price("google", "gemini-2.5-pro")
    assert price == usd(1.25, 10, 0.125, tiers=(Tier(200_000, usd(2.5, 15, 0.25)),))
    assert price.for_prompt(200_000) is price
    assert price.for_prompt(200_001) == usd(2.5, 15, 0.25)


def test_the_table_says_of_which_day_it_is_and_from_where() -> None:
    assert date(2026, 11, 21) <= TABLE.as_of
    assert TABLE.source.startswith("genai-prices ")
    assert "Permission is hereby granted" in resources.files("gateway").joinpath("prices.LICENSE").read_text("utf-8")


def test_the_tool_that_makes_the_table_is_not_needed_to_read_it() -> None:
    assert "genai_prices" not in sys.modules


# --- the name of a model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "model", "same"),
    [
        ("openai", "gpt-4o-2024-08-06", ("openai", "gpt-4o")),
        ("openai", "gpt-5-2099-01-31", ("openai", "gpt-5")),
        ("openai", "GPT-4o", ("openai", "gpt-4o")),
        ("anthropic", "claude-opus-5-20991231", ("anthropic", "claude-opus-5")),
        ("anthropic", "claude-3-5-haiku-20241022", ("anthropic", "claude-3-5-haiku-latest")),
        ("google", "claude-haiku-4-5@20251001", ("google", "claude-haiku-4-5")),
        ("gemini", "gemini-2.5-pro", ("google", "gemini-2.5-pro")),
        ("gemini", "models/gemini-2.5-pro-preview-05-06", ("google", "gemini-2.5-pro")),
        ("google", "gemini-2.0-flash-001", ("google", "gemini-2.0-flash")),
        ("x-ai", "grok-4", ("xai", "grok-4")),
        ("mistral", "magistral-medium-2509", ("mistral", "magistral-medium")),
        ("azure", "gpt-4o", ("openai", "gpt-4o")),
        ("openrouter", "openai/gpt-5-2099-01-31", ("openai", "gpt-5")),
        ("openrouter", "mistralai/codestral-2508", ("mistral", "codestral-2508")),
    ],
)
def test_a_name_finds_the_model_it_means(provider: str, model: str, same: tuple[str, str]) -> None:
    found, meant = TABLE.price(provider, model), TABLE.price(*same)
    assert found is not None
    assert meant is not None
    assert (found.input, found.output) == (meant.input, meant.output)


def test_a_dated_name_that_is_listed_has_its_own_price() -> None:
    assert TABLE.price("openai", "gpt-4o-2024-05-13") == usd(5, 15)


def test_a_providers_own_list_comes_before_the_makers() -> None:
    table = small(
        {
            "openrouter": {"openai/gpt-4o": {"input": 3, "output": 3}},
            "openai": {"gpt-4o": {"input": 1, "output": 1}, "gpt-4": {"input": 2, "output": 2}},
        }
    )
    assert table.price("openrouter", "openai/gpt-4o") == usd(3, 3)
    assert table.price("openrouter", "openai/gpt-4") == usd(2, 2)


def test_the_longest_start_of_a_name_wins() -> None:
    rows = {name: {"input": n, "output": n} for n, name in enumerate(("m*", "m-small*", "m-large", "m-small-x*"), 1)}
    table = small({"v": rows})
    costs = {
        name: price.input // PICO
        for name in ("m", "m-1", "m-small", "m-small-2", "m-small-x1", "m-large-2026-01-01", "m-large-2026-01-01-x")
        if (price := table.price("v", name))
    }
    assert list(costs.values()) == [1, 1, 2, 2, 4, 3, 1]


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "gpt-99"),
        ("openai", "gpt-4o-audio-preview"),  # a part of its tokens is sound, which our counts do not tell apart
        ("openai", "anthropic/claude-opus-5"),
        ("openrouter", "anthropic/claude-opus-5:turbo"),  # a variant of OpenRouter has a price of its own
        ("openrouter", "nobody/nothing"),
        ("google", "gemini-2.5-pro-preview-tts"),
        ("ollama", "llama3.2:1b"),
        ("mock", "mock-gpt"),
        ("nobody", "gpt-4o"),
        ("openai", ""),
        ("openai", "gpt-4o" + "-" * 1_000_000),
    ],
)
def test_an_unknown_model_has_no_price_and_never_the_price_0(provider: str, model: str) -> None:
    assert TABLE.price(provider, model) is None


def test_a_free_variant_is_known_to_be_free() -> None:
    assert TABLE.price("openrouter", "deepseek/deepseek-r1:free") == usd(0, 0)


def test_what_is_remembered_of_names_that_clients_choose_is_bounded() -> None:
    table = price_table(SHIPPED)
    for number in range(1500):
        table.price("ollama", f"model-{number}")
    assert table._remembered.cache_info().currsize == 1024


# --- time ---------------------------------------------------------------------------------------------------------


def test_a_price_that_is_announced_begins_on_its_day() -> None:
    rows = [{"input": 2, "output": 10}, {"input": 4, "output": 20, "since": "2026-12-01"}]
    table = small({"google": {"m": rows}})
    eve = datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC)
    assert table.price("google", "m", eve) == usd(2, 10)
    assert table.price("google", "m", eve + timedelta(seconds=1)) == usd(4, 20, since=date(2026, 12, 1))
    assert table.price("google", "m") == usd(2, 10)


def test_a_model_that_has_no_price_yet_has_the_first_one() -> None:
    table = small({"v": {"m": [{"input": 1, "output": 1, "since": "2030-01-01"}]}})
    assert table.price("v", "m") == usd(1, 1, since=date(2030, 1, 1))


def test_peak_hours_are_those_of_utc_and_count_when_no_time_is_given() -> None:
    low, peak = {"input": 0.15, "output": 0.6}, {"input": 0.3, "output": 1.2, "hours": ["01:00:00", "04:00:00"]}
    table = small({"deepseek": {"m": [low, peak]}})
    one = datetime(2026, 11, 21, 1, tzinfo=UTC)
    assert table.price("deepseek", "m", one) == usd(0.3, 1.2)
    assert table.price("deepseek", "m", datetime.fromisoformat("2026-11-21T09:00:00+08:00")) == usd(0.3, 1.2)
    assert table.price("deepseek", "m", one + timedelta(hours=3)) == usd(0.15, 0.6)
    assert table.price("deepseek", "m", one - timedelta(seconds=1)) == usd(0.15, 0.6)
    assert table.price("deepseek", "m") == usd(0.3, 1.2)


# --- the sum ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usage", "micros"),
    [
        (Usage(), 0),
        (Usage(prompt_tokens=1000, completion_tokens=500), 3000 + 7500),
        (Usage(prompt_tokens=1000, completion_tokens=500, reasoning_tokens=400), 3000 + 7500),
        (Usage(prompt_tokens=1000, completion_tokens=None, cached_tokens=1000), 300),
        (Usage(prompt_tokens=None, completion_tokens=500), 7500),
        # 3 new, 329 written and 2,240 read, as OpenRouter reported it of a Claude
        (Usage(2572, 10, cached_tokens=2240, cache_write_tokens=329), 9 + 672 + 1234 + 150),
    ],
)
def test_cached_and_written_tokens_are_parts_of_the_prompt_and_priced_apart(usage: Usage, micros: int) -> None:
    assert cost_micros(usd(3, 15, 0.3, 3.75), usage) == micros


def test_reasoning_can_have_a_price_of_its_own() -> None:
    price = priced({"v": {"m": {"input": 2, "output": 8, "reasoning": 3}}}).price("v", "m")
    assert price is not None
    assert cost_micros(price, Usage(0, 100, reasoning_tokens=40)) == 60 * 8 + 40 * 3


def test_a_part_larger_than_its_whole_is_the_whole() -> None:
    price = usd(3, 15, 0.3, 3.75)
    assert cost_micros(price, Usage(100, 0, cached_tokens=1000, cache_write_tokens=1000)) == 30
    assert cost_micros(price, Usage(0, 100, reasoning_tokens=1000)) == 1500


def test_a_long_prompt_pays_all_its_tokens_and_its_answer_at_the_tier() -> None:
    price = usd(3, 15, 0.3, 3.75, tiers=(Tier(200_000, usd(6, 22.5, 0.6, 7.5)),))
    assert cost_micros(price, Usage(200_000, 1000)) == 600_000 + 15_000
    assert cost_micros(price, Usage(200_001, 1000)) == 1_200_006 + 22_500
    assert cost_micros(price, Usage(200_001, 0, cached_tokens=200_000)) == 6 + 120_000


@pytest.mark.parametrize(("tokens", "micros"), [(1, 0), (3, 0), (4, 1), (5, 1), (11, 1), (12, 2)])
def test_half_a_micro_dollar_is_rounded_up(tokens: int, micros: int) -> None:
    """0.125 USD per million: 4 tokens are exactly half a micro-dollar."""
    assert cost_micros(usd(0.125, 0), Usage(prompt_tokens=tokens)) == micros


def test_the_sum_is_rounded_and_not_its_parts() -> None:
    assert cost_micros(usd(0.25, 0.25), Usage(prompt_tokens=1, completion_tokens=1)) == 1


COUNTS = st.integers(0, 400_000) | st.integers(0, 2**53)
PRICES = st.builds(
    Price,
    input=st.integers(0, 10**9),
    output=st.integers(0, 10**9),
    cached_input=st.integers(0, 10**9),
    cache_write=st.integers(0, 10**9),
    reasoning=st.integers(0, 10**9),
)


@given(PRICES, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS)
def test_a_cost_is_the_exact_sum_rounded(price: Price, new: int, read: int, written: int, said: int, mind: int) -> None:
    usage = Usage(new + read + written, said + mind, read, written, mind)
    dollars = sum(
        Fraction(count * pico, 10**12)
        for count, pico in (
            (new, price.input),
            (read, price.cached_input),
            (written, price.cache_write),
            (said, price.output),
            (mind, price.reasoning),
        )
    )
    assert abs(Fraction(cost_micros(price, usage)) - dollars * 10**6) <= Fraction(1, 2)
    assert cost_micros(price, usage) == (dollars * 10**6 + Fraction(1, 2)).__floor__()


@given(PRICES, st.integers(1, 300_000), st.lists(COUNTS, min_size=5, max_size=5), st.integers(0, 4), COUNTS)
def test_more_tokens_of_any_kind_never_cost_less(
    price: Price, above: int, counts: list[int], kind: int, more: int
) -> None:
    tiered = replace(price, tiers=(Tier(above, replace(price, input=2 * price.input, output=price.output + 1)),))
    grown = [count + more * (index == kind) for index, count in enumerate(counts)]
    assert cost_micros(tiered, _usage(counts)) <= cost_micros(tiered, _usage(grown))


def _usage(counts: list[int]) -> Usage:
    new, read, written, said, mind = counts
    return Usage(new + read + written, said + mind, read, written, mind)


# --- what the operator says ---------------------------------------------------------------------------------------


def test_the_operators_price_comes_before_the_shipped_one() -> None:
    table = priced({"openai": {"gpt-4o": {"input": 2, "output": 8, "cached_input": 0.1, "cache_write": 3.75}}})
    assert table.price("openai", "gpt-4o") == usd(2, 8, 0.1, 3.75)
    assert table.price("openai", "gpt-4o-2024-08-06") == usd(2, 8, 0.1, 3.75)
    assert table.price("openai", "gpt-4o-mini") == TABLE.price("openai", "gpt-4o-mini")
    assert table.as_of == TABLE.as_of


def test_floats_of_a_file_are_taken_by_their_text() -> None:
    price = priced({"v": {"m": {"input": 0.1, "output": 0.003625, "cached_input": 0.07}}}).price("v", "m")
    assert price is not None
    assert (price.input, price.output, price.cached_input, price.cache_write) == (100_000, 3_625, 70_000, 100_000)


def test_a_local_model_is_free_by_the_operators_word_alone() -> None:
    free = {"ollama": {"*": {"input": 0, "output": 0}, "gpt-oss:120b-cloud": {"input": 0.5, "output": 1}}}
    assert TABLE.price("ollama", "llama3.2:1b") is None
    assert priced(free).price("ollama", "llama3.2:1b") == usd(0, 0)
    assert priced(free).price("ollama", "gpt-oss:120b-cloud") == usd(0.5, 1)


def test_an_operators_price_may_have_tiers() -> None:
    row = {"input": 1, "output": 2, "tiers": [{"above": 100, "input": 3, "output": 4}]}
    assert priced({"v": {"M": row}}).price("v", "m") == usd(1, 2, tiers=(Tier(100, usd(3, 4)),))


@pytest.mark.parametrize(
    ("prices", "message"),
    [
        ({"openai": 3}, "prices.openai: a table of models is required"),
        ({"openai": {"gpt-4o": 3}}, 'prices.openai."gpt-4o": Expected `object`, got `int`'),
        ({"openai": {"gpt-4o": {"input": 3}}}, 'prices.openai."gpt-4o": Object missing required field `output`'),
        (
            {"openai": {"gpt-4o": {"input": True, "output": 1}}},
            'prices.openai."gpt-4o".input: Expected `decimal`, got `bool`',
        ),
        (
            {"openai": {"gpt-4o": {"input": 1, "output": 1, "cached": 1}}},
            'prices.openai."gpt-4o": Object contains unknown field `cached`',
        ),
        (
            {"openai": {"gpt-4o": {"input": 1, "output": -1}}},
            'prices.openai."gpt-4o": output: -1 is not between 0 and 1000000 USD per million tokens',
        ),
        (
            {"openai": {"gpt-4o": {"input": float("nan"), "output": 1}}},
            'prices.openai."gpt-4o": input: NaN is not between 0 and 1000000 USD per million tokens',
        ),
        (
            {"openai": {"gpt-4o": {"input": 1, "output": 1, "cached_input": 0.0000001}}},
            'prices.openai."gpt-4o": cached_input: 1E-7 has more than 6 decimals',
        ),
        (
            {"v": {"m": {"input": 1, "output": 1, "tiers": [{"above": 9, "input": -1, "output": 1}]}}},
            'prices.v."m".tiers[0]: input: -1 is not between 0 and 1000000 USD per million tokens',
        ),
        (
            {"v": {"m": {"input": 1, "output": 1, "tiers": [{"above": n, "input": 1, "output": 1} for n in (9, 9)]}}},
            'prices.v."m": tiers: `above` is a number of tokens that rises from tier to tier',
        ),
        ({"v": {"gpt-*o": {"input": 1, "output": 1}}}, 'prices.v."gpt-*o": a `*` stands at the end of a name'),
        (
            {"v": {"m": {"input": 1, "output": 1, "hours": ["01:00:00", "02:00:00"]}}},
            'prices.v."m": Object contains unknown field `hours`',
        ),
    ],
)
def test_a_wrong_price_is_named_by_its_key(prices: dict[str, Any], message: str) -> None:
    with pytest.raises(PricesError) as caught:
        priced(prices)
    assert str(caught.value) == message


# --- every row that ships -----------------------------------------------------------------------------------------

ROWS: dict[str, dict[str, Any]] = json.loads(SHIPPED)["prices"]


def test_the_vendors_of_interest_ship() -> None:
    known = {"anthropic", "azure", "deepseek", "fireworks", "google", "groq", "mistral", "openai", "openrouter"}
    assert set(ROWS) == known | {"together", "x-ai"}
    assert all(len(names) > 10 for names in ROWS.values())


def test_every_name_that_ships_is_found() -> None:
    for vendor, names in ROWS.items():
        for name in names:
            assert TABLE.price(vendor, name.removesuffix("*")) is not None, (vendor, name)


@pytest.mark.parametrize("vendor", sorted(ROWS))
def test_every_row_that_ships_is_sane(vendor: str) -> None:
    for name, row in _rows(vendor):
        price = priced({"v": {"m": {key: row[key] for key in row if key not in ("since", "hours", "context")}}}).price(
            "v", "m"
        )
        assert price is not None
        assert _sane(price), (vendor, name, price)
        assert ":free" in name or price.input > 0, (vendor, name)
        assert price.output > 0 or ":free" in name or "embed" in name or "ada" in name, (vendor, name)
        assert row.get("hours", ["0", "1"]) == sorted(row.get("hours", ["0", "1"])), (vendor, name)
        for cheaper, dearer in zip((price, *(tier.price for tier in price.tiers)), price.tiers, strict=False):
            assert cheaper.input <= dearer.price.input, (vendor, name)
            assert cheaper.output <= dearer.price.output, (vendor, name)


def test_windows_that_ship_are_found_by_any_name_of_a_model_and_an_operators_price_hides_none() -> None:
    assert TABLE.context_length("openai", "gpt-4o") == TABLE.context_length("azure", "gpt-4o-2024-08-06") == 128_000
    own = priced({"openai": {"gpt-4o": {"input": 1, "output": 1}}})
    assert own.context_length("openai", "gpt-4o") == 128_000
    assert own.context_length("ollama", "llama3") is None
    windows = [row["context"] for vendor in ROWS for _, row in _rows(vendor) if "context" in row]
    assert len(windows) > 300
    assert min(windows) > 100


def _rows(vendor: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, row in ROWS[vendor].items():
        if not isinstance(row, str):
            yield from ((name, each) for each in (row if isinstance(row, list) else [row]))


def _sane(price: Price) -> bool:
    """Reading from a cache is no dearer than reading, writing to it no cheaper, and no token costs over a tenth of a cent."""
    return (
        0 <= price.cached_input <= price.input <= price.cache_write
        and max(price.input, price.output, price.cache_write, price.reasoning) <= 1000 * PICO
        and all(_sane(tier.price) for tier in price.tiers)
    )

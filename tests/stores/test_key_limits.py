import orjson
import pytest

from gateway.exchange import Budget
from gateway.protocol.errors import InvalidRequest
from gateway.stores.key_limits import (
    BUDGET_NAMES,
    COSTS,
    MAX_DOLLARS,
    NO_LIMITS,
    RANGES,
    KeyLimits,
    budget_limits,
    complete,
    parse_limit,
    shown,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("written", "micros"),
    [
        ("0", 0),
        ("5", 5_000_000),
        ("0.1", 100_000),
        ("0.000001", 1),
        ("1.1", 1_100_000),
        ("4.35", 4_350_000),  # times a million as floats: 4349999.999999999
        ("2.675", 2_675_000),
        ("1e-6", 1),
        ("1234567.891234", 1_234_567_891_234),
        ("999999999.999999", 999_999_999_999_999),
        ("1000000000", 10**15),
    ],
)
def test_dollars_are_stored_to_the_last_digit_whether_they_come_as_json_or_as_text(written: str, micros: int) -> None:
    assert parse_limit("cost_per_day", written) == micros
    assert parse_limit("cost_per_month", orjson.loads(written)) == micros
    assert orjson.loads(orjson.dumps(shown({"cost_per_day": micros})["cost_per_day"])) == float(written)


def test_every_price_of_up_to_a_hundred_dollars_in_cents_is_exact_and_shown_as_it_was_written() -> None:
    for cents in range(10_000):
        written = f"{cents // 100}.{cents % 100:02}"
        micros = parse_limit("cost_per_day", orjson.loads(written))
        assert micros == cents * 10_000
        assert shown({"cost_per_day": micros}) == {"cost_per_day": float(written)}


@pytest.mark.parametrize(
    "value",
    [
        -1,
        -0.000001,
        0.0000001,
        1.0000001,
        MAX_DOLLARS + 1,
        1e300,
        "",
        "five",
        "$5",
        "nan",
        "inf",
        "-inf",
        "1e999999",
        "sNaN",
    ],
)
def test_what_is_no_amount_of_dollars_is_refused_by_name(value: float | str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_limit("cost_per_day", value)
    assert caught.value.param == "cost_per_day"
    assert "at most 6 decimals" in caught.value.message


@pytest.mark.parametrize("name", sorted(RANGES))
def test_a_limit_has_a_range_and_its_own_number_type(name: str) -> None:
    most, decimals = RANGES[name]
    assert parse_limit(name, 0) == 0
    assert parse_limit(name, most) == (most * 1_000_000 if name in COSTS else most)
    for value in (-1, most + 1, "x") if decimals else (-1, most + 1, "x", 1.5, "0.1"):
        with pytest.raises(InvalidRequest, match=f"invalid {name}: "):
            parse_limit(name, value)
    assert type(parse_limit(name, 1)) is (float if name == "requests_per_second" else int)


def test_every_limit_but_the_models_is_a_number_with_a_range() -> None:
    assert set(NO_LIMITS) == set(KeyLimits.__annotations__) == {*RANGES, "allowed_models"}


@pytest.mark.parametrize(
    ("limits", "burst"),
    [
        ({}, 0),
        ({"requests_per_second": 5.0}, 5),
        ({"requests_per_second": 0.1}, 1),
        ({"requests_per_second": 2.5, "burst": 0}, 3),
        ({"requests_per_second": 2.5, "burst": 20}, 20),
    ],
)
def test_a_rate_without_a_burst_holds_what_flows_in_a_second(limits: KeyLimits, burst: int) -> None:
    assert complete(limits) == {**NO_LIMITS, **limits, "burst": burst}


def test_a_budget_is_told_by_the_names_of_its_fields() -> None:
    budget = Budget(tokens_per_minute=1, tokens_per_day=2, cost_per_day=3, cost_per_month=4)
    assert Budget(**budget_limits(budget)) == budget
    assert tuple(budget_limits(budget)) == BUDGET_NAMES

"""What limits a key, and all keys of an account together: names, ranges, units.

A cost is dollars where people write or read it, and whole micro-dollars, a millionth of one, everywhere else. 0 and an
empty list are no limit; `drain_seconds` and `cache_ttl` are none in any case.
"""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Final, NamedTuple, TypedDict

from gateway.exchange import Budget
from gateway.protocol.errors import InvalidRequest
from gateway.protocol.remembering import MAX_TTL

MICROS = 1_000_000  # of a dollar
MAX_REQUESTS = 1_000_000
MAX_TOKENS = 10**12
MAX_DOLLARS = 10**9  # as micro-dollars still exact in the doubles of Lua and JSON
MAX_DRAIN = 600  # seconds; sql/migrations/0003_budgets.sql


class BudgetLimits(TypedDict, total=False):
    """Limits of Budget, of a key or an account."""

    tokens_per_minute: int
    tokens_per_day: int
    cost_per_day: int  # micro-dollars
    cost_per_month: int  # micro-dollars


class KeyLimits(BudgetLimits, total=False):
    """Limits of Principal; what is missing has none, or is left as it is."""

    requests_per_minute: int
    requests_per_second: float
    burst: int  # 0: as many as flow in a second
    concurrent_requests: int
    allowed_models: Sequence[str]
    drain_seconds: int
    cache_ttl: int


NO_LIMITS: Final[KeyLimits] = {
    "requests_per_minute": 0,
    "requests_per_second": 0.0,
    "burst": 0,
    "concurrent_requests": 0,
    "allowed_models": (),
    "tokens_per_minute": 0,
    "tokens_per_day": 0,
    "cost_per_day": 0,
    "cost_per_month": 0,
    "drain_seconds": 0,
    "cache_ttl": 0,
}


class _Range(NamedTuple):
    """From 0 on."""

    most: int
    decimals: int = 0


RANGES: Final[Mapping[str, _Range]] = {
    "requests_per_minute": _Range(MAX_REQUESTS),
    "requests_per_second": _Range(MAX_REQUESTS, 6),
    "burst": _Range(MAX_REQUESTS),
    "concurrent_requests": _Range(MAX_REQUESTS),
    "tokens_per_minute": _Range(MAX_TOKENS),
    "tokens_per_day": _Range(MAX_TOKENS),
    "cost_per_day": _Range(MAX_DOLLARS, 6),
    "cost_per_month": _Range(MAX_DOLLARS, 6),
    "drain_seconds": _Range(MAX_DRAIN),
    "cache_ttl": _Range(MAX_TTL),
}
BUDGET_NAMES: Final = tuple(BudgetLimits.__annotations__)
COSTS: Final = ("cost_per_day", "cost_per_month")


def parse_limit(name: str, value: float | str) -> int | float:
    """One of RANGES as it is stored, from a number or its text; exact to the last digit that was written.

    Raises InvalidRequest naming it.
    """
    most, decimals = RANGES[name]
    try:
        number = Decimal(str(value))  # of a float the shortest text, which is what was in the JSON
        fits = number.is_finite() and 0 <= number <= most and number == round(number, decimals)
    except InvalidOperation:
        fits = False
    if not fits:
        kind = f"a number with at most {decimals} decimals" if decimals else "an integer"
        raise InvalidRequest(f"invalid {name}: {kind} from 0 to {most} is required", param=name)
    if name in COSTS:
        return int(number * MICROS)
    return float(number) if decimals else int(number)


def burst_of(requests_per_second: float, burst: int) -> int:
    """Requests that the bucket holds."""
    return burst or math.ceil(requests_per_second)


def complete(limits: KeyLimits) -> KeyLimits:
    """All limits of a new key, as it will have them."""
    burst = burst_of(limits.get("requests_per_second", 0.0), limits.get("burst", 0))
    return {**NO_LIMITS, **limits, "burst": burst}


def budget_limits(budget: Budget) -> BudgetLimits:
    return {
        "tokens_per_minute": budget.tokens_per_minute,
        "tokens_per_day": budget.tokens_per_day,
        "cost_per_day": budget.cost_per_day,
        "cost_per_month": budget.cost_per_month,
    }


def shown(limits: Mapping[str, Any]) -> dict[str, Any]:
    """Limits as people read them: costs in dollars."""
    return {name: value / MICROS if name in COSTS else value for name, value in limits.items()}

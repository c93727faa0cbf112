"""How long a provider wants to be left alone, from what its headers say. Nonsense in them is read as nothing said."""

import re
from collections.abc import Callable
from datetime import datetime
from email.utils import parsedate_to_datetime
from math import isfinite

MAX_WAIT = 86_400.0  # seconds; what is longer is a slip of the provider's

# A count of what is left, and when it is full again: https://platform.openai.com/docs/guides/rate-limits (Groq and
# others have the same names) and https://platform.claude.com/docs/en/api/rate-limits.
RATE_LIMITS = tuple(
    (f"x-ratelimit-remaining-{what}", f"x-ratelimit-reset-{what}") for what in ("requests", "tokens")
) + tuple(
    (f"anthropic-ratelimit-{what}-remaining", f"anthropic-ratelimit-{what}-reset")
    for what in ("requests", "tokens", "input-tokens", "output-tokens")
)
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])")  # OpenAI's `1m13.588s` is Go's notation


def retry_after(milliseconds: str, seconds: str, now: float) -> float | None:
    """Seconds, from `retry-after-ms` or `Retry-After`: seconds or a date (RFC 9110 10.2.3); None when none is given.

    `now` is in seconds since the epoch, here and below.
    """
    value = _read(lambda: float(milliseconds) / 1000)
    if value is None:
        value = _read(lambda: float(seconds))
    if value is None:
        value = _read(lambda: parsedate_to_datetime(seconds).timestamp() - now)
    return value


def exhausted_for(header: Callable[[str], str], now: float) -> float:
    """Seconds until the provider has something left of a limit of which it says that nothing is; 0: it does not.

    `header` gives the value of one of the names in RATE_LIMITS, "" for one that did not come.
    """
    waits = [_reset_in(header(reset), now) for remaining, reset in RATE_LIMITS if _is_nothing(header(remaining))]
    return max(waits, default=0.0)


def _is_nothing(count: str) -> bool:
    return bool(count) and _read(lambda: float(count)) == 0


def _reset_in(text: str, now: float) -> float:
    """Of OpenAI's duration, Anthropic's instant (RFC 3339), or bare seconds."""
    parts = _DURATION.findall(text)
    if parts and _DURATION.sub("", text) == "":
        return _read(lambda: sum(float(number) * _UNITS[unit] for number, unit in parts)) or 0.0
    value = _read(lambda: float(text))
    if value is None:
        value = _read(lambda: datetime.fromisoformat(text).timestamp() - now)
    return value or 0.0


def _read(value_of: Callable[[], float]) -> float | None:
    try:
        value = value_of()
    except (ValueError, OverflowError, TypeError):
        return None
    return min(max(0.0, value), MAX_WAIT) if isfinite(value) else None

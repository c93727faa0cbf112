"""How long a provider wants to be left alone."""

from email.utils import formatdate

import pytest

from gateway.protocol.waits import MAX_WAIT, exhausted_for, retry_after

pytestmark = pytest.mark.unit

NOW = 1_763_785_000.0  # 2025-11-22T04:16:40Z


@pytest.mark.parametrize(
    ("milliseconds", "seconds", "expected"),
    [
        ("", "", None),
        ("", "7", 7.0),
        ("", "0.5", 0.5),
        ("1500", "9", 1.5),
        ("soon", "9", 9.0),
        ("", formatdate(NOW + 30, usegmt=True), 30.0),
        ("", formatdate(NOW - 30, usegmt=True), 0.0),
        ("", "-5", 0.0),
        ("", "9e15", MAX_WAIT),
        ("", "inf", None),
        ("", "nan", None),
        ("", "1e400", None),
        ("", "soon", None),
        ("", "Fri, 31 Dec 99999999 23:59:59 GMT", None),
    ],
)
def test_a_retry_after_is_seconds_or_a_date_and_nonsense_is_none(
    milliseconds: str, seconds: str, expected: float | None
) -> None:
    assert retry_after(milliseconds, seconds, NOW) == expected


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 0.0),
        ({"x-ratelimit-remaining-requests": "12", "x-ratelimit-reset-requests": "6m0s"}, 0.0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, 360.0),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "120ms"}, 0.12),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1h1m13.5s"}, 3673.5),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "12"}, 12.0),
        ({"x-ratelimit-remaining-tokens": "0"}, 0.0),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "soon 5s"}, 0.0),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "9" * 400 + "d"}, 0.0),
        ({"x-ratelimit-remaining-tokens": "none", "x-ratelimit-reset-tokens": "9s"}, 0.0),
        (
            {
                "anthropic-ratelimit-input-tokens-remaining": "0",
                "anthropic-ratelimit-input-tokens-reset": "2025-11-22T04:17:10Z",
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-requests-reset": "2025-11-22T04:16:50Z",
                "anthropic-ratelimit-tokens-remaining": "1000",
                "anthropic-ratelimit-tokens-reset": "2025-11-22T05:16:40Z",
            },
            30.0,
        ),
    ],
)
def test_a_provider_is_exhausted_until_the_last_of_its_empty_limits_is_full_again(
    headers: dict[str, str], expected: float
) -> None:
    assert exhausted_for(lambda name: headers.get(name, ""), NOW) == pytest.approx(expected)

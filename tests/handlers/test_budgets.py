from datetime import UTC, datetime, timedelta

import pytest

from gateway.handlers.budgets import resets_at

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("now", "day", "month"),
    [
        ("2026-01-31T23:59:59.999999", "2026-02-01", "2026-02-01"),
        ("2026-02-28T00:00:00", "2026-03-01", "2026-03-01"),
        ("2028-02-28T12:00:00", "2028-02-29", "2028-03-01"),
        ("2026-12-01T00:00:00", "2026-12-02", "2027-01-01"),
        ("2026-12-31T10:00:00", "2027-01-01", "2027-01-01"),
    ],
)
def test_a_budget_starts_again_with_the_next_day_or_month_of_utc(now: str, day: str, month: str) -> None:
    at = datetime.fromisoformat(now).replace(tzinfo=UTC)
    for name in ("tokens_per_day", "cost_per_day"):
        assert resets_at(name, at) == datetime.fromisoformat(day).replace(tzinfo=UTC)
    assert resets_at("cost_per_month", at) == datetime.fromisoformat(month).replace(tzinfo=UTC)
    assert at < resets_at("tokens_per_day", at) <= resets_at("cost_per_month", at) <= at + timedelta(days=31)

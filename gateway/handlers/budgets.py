"""What was spent of a budget, what is left of it, and when it starts again."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from gateway.appkeys import BUDGETS
from gateway.exchange import Budget
from gateway.protocol.errors import Unavailable
from gateway.stores.key_limits import budget_limits, shown
from gateway.stores.key_rows import Key
from gateway.stores.payers import day_ends, month_ends

# The budgets that last long enough to be worth a look, and what is spent of each.
_SPENT = {"tokens_per_day": "tokens_day", "cost_per_day": "micros_day", "cost_per_month": "micros_month"}


async def of_key(request: web.Request, key: Key) -> list[dict[str, Any]]:
    """The key's own, and then those of all keys of its account together; only those that are limited."""
    own = await _budgets(request, "key", f"k:{key.id}", key.limits)
    return own + await of_account(request, key.account_id, key.account_budget)


async def of_account(request: web.Request, account_id: str, budget: Budget) -> list[dict[str, Any]]:
    return await _budgets(request, "account", f"a:{account_id}", budget_limits(budget))


async def _budgets(request: web.Request, of: str, subject: str, limits: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`spent` and `left` are null when they cannot be known now."""
    limited = [name for name in _SPENT if limits[name]]
    if not limited:
        return []
    try:
        spent = await request.app[BUDGETS].spent(subject)
    except Unavailable:
        spent = None
    now, rows = datetime.now(UTC), []
    for name in limited:
        used = None if spent is None else getattr(spent, _SPENT[name])
        left = None if used is None else max(limits[name] - used, 0)
        amounts = {"limit": limits[name], "spent": used, "left": left}
        amounts = {what: amount if amount is None else shown({name: amount})[name] for what, amount in amounts.items()}
        rows.append({"of": of, "what": name, **amounts, "resets_at": resets_at(name, now)})
    return rows


def resets_at(name: str, now: datetime) -> datetime:
    """The next day's or month's begin, UTC."""
    return month_ends(now) if name.endswith("_month") else day_ends(now)

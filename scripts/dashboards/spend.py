"""Spend: who used how much of what, and what it cost. From Postgres: every row is in it, once.

Everything is asked of usage_hourly, which tells users, applications, keys and models apart and is kept when months of
single rows are dropped. An hour belongs to a range when its beginning does.
"""
# ruff: noqa: S608 - made of constants alone

from scripts.dashboards.list_prices import list_prices
from scripts.dashboards.panels import (
    Json,
    bars,
    constant,
    dashboard,
    sql,
    sql_variable,
    stat,
    table,
    wide,
    worse_above,
)

CHOSEN = """
from usage_hourly as hours
join accounts on accounts.id = hours.account_id
left join keys on keys.id = hours.key_id
where $__timeFilter(hours.hour)
  and ('*' in (${owner:sqlstring}) or accounts.email in (${owner:sqlstring}))
  and ('*' in (${provider:sqlstring}) or hours.provider in (${provider:sqlstring}))
  and ('*' in (${model:sqlstring}) or hours.model in (${model:sqlstring}))
"""
DOLLARS = "sum(hours.cost_micros) / 1e6"
MOST = 100  # rows of a table
# Names are the clients' to choose: a variable offers those that cost the most.
NAMES = f"""
select {{0}} from usage_hourly as hours join accounts on accounts.id = hours.account_id
where $__timeFilter(hours.hour) and {{0}} <> ''
group by 1 order by sum(hours.cost_micros) desc, sum(hours.requests) desc limit {MOST}
"""


def spend() -> Json:
    return dashboard(
        "aig-spend",
        "AI Gateway: spend",
        "Who used how much of what, and what it cost. From the usage rows in Postgres, by the hour.",
        [
            ("What does it cost?", _totals()),
            ("Where does the money go?", _course()),
            ("Who spends it?", _payers()),
            ("What do prompt caches save?", _savings()),
            ("What do remembered answers save?", _remembered()),
            ("Who is about to use up a budget?", _budgets()),
        ],
        [
            sql_variable("owner", "Key owner", NAMES.format("accounts.email")),
            sql_variable("provider", "Provider", NAMES.format("hours.provider")),
            sql_variable("model", "Model", NAMES.format("hours.model")),
            constant("list_prices", list_prices()),
        ],
        ("7d", "5m"),
    )


def _totals() -> list[Json]:
    days = "greatest(extract(epoch from $__timeTo()::timestamptz - $__timeFrom()::timestamptz) / 86400, 1e-3)"
    return [
        stat(
            "Cost", "currencyUSD", _one(DOLLARS), "US dollars of the time shown. Requests without a price add nothing."
        ),
        stat(
            "Thirty days at this pace",
            "currencyUSD",
            _one(f"{DOLLARS} / {days} * 30"),
            "The cost of the time shown, taken to thirty days.",
        ),
        stat(
            "Requests",
            "short",
            _one("sum(hours.requests)"),
            "Requests that reached a provider, however they ended, and those that were answered without one.",
        ),
        stat(
            "Tokens",
            "short",
            _one("sum(hours.prompt_tokens + hours.completion_tokens)"),
            "Of prompts, cached ones too, and of completions.",
        ),
        stat(
            "Cost of a thousand requests",
            "currencyUSD",
            _one("sum(hours.cost_micros) / 1e3 / nullif(sum(hours.requests), 0)"),
            "US dollars, on average.",
        ),
        stat(
            "Requests without a price",
            "percentunit",
            _one("sum(hours.unpriced)::float8 / nullif(sum(hours.requests), 0)"),
            "Nobody knows what they cost: give their models a price in the gateway's file.",
            worse_above(0.01, 0.1),
        ),
    ]


def _course() -> list[Json]:
    return [
        bars("Cost by model", "currencyUSD", [_course_of("hours.model")], "US dollars; the ten that cost the most."),
        bars(
            "Cost by key owner", "currencyUSD", [_course_of("accounts.email")], "US dollars; the ten who pay the most."
        ),
        bars("Cost by provider", "currencyUSD", [_course_of("hours.provider")], "US dollars."),
    ]


def _payers() -> list[Json]:
    return [
        _by("Models", {"Model": "hours.model", "Provider": "hours.provider"}, "By the name that clients asked for."),
        _by(
            "Keys",
            {"Key": "coalesce(keys.name, '')", "Id": "hours.key_id", "Owner": "accounts.email"},
            "The id is the public part of a key.",
        ),
        _by(
            "Users",
            {"User": "coalesce(nullif(hours.user_id, ''), '(none said)')", "Owner": "accounts.email"},
            "As the owner's application said in X-User-Id.",
        ),
        _by(
            "Applications",
            {"Application": "coalesce(nullif(hours.app_id, ''), '(none said)')", "Owner": "accounts.email"},
            "As the owner's application said in X-App-Id.",
        ),
    ]


_SAVED = """
sum(
    hours.cached_tokens * (price.input - price.cached) - hours.cache_write_tokens * (price.write - price.input)
) / 1e6"""
_PRICED = CHOSEN.replace(
    "where",
    """left join lateral (
    select * from (values ${list_prices:raw}) as listed (provider, pattern, input, cached, write)
    where listed.provider = hours.provider
      and (hours.model like listed.pattern or hours.model like listed.provider || '/' || listed.pattern)
    order by length(listed.pattern) desc limit 1
) as price on true
where""",
    1,
)
_OF_LIST_PRICES = " At the vendors' list prices of the day the dashboard was made; your own prices are not known to it."


def _savings() -> list[Json]:
    """Cached tokens at the price of others, less what caching them cost more."""
    return [
        stat(
            "Saved",
            "currencyUSD",
            sql(f"select coalesce({_SAVED}, 0) as saved{_PRICED}"),
            "US dollars that cached tokens would have cost more, less what writing to the cache cost."
            + _OF_LIST_PRICES,
        ),
        stat(
            "Prompt from the cache",
            "percentunit",
            _one("sum(hours.cached_tokens)::float8 / nullif(sum(hours.prompt_tokens), 0)"),
            "Share of all prompt tokens. Prompts that begin alike are cached by most vendors from 1,024 tokens on.",
        ),
        wide(
            bars(
                "Prompt tokens",
                "short",
                [
                    sql(
                        "select $__timeGroupAlias(hours.hour, $__interval),"
                        ' sum(hours.cached_tokens) as "from the cache",'
                        ' sum(hours.prompt_tokens - hours.cached_tokens) as "read anew"'
                        f"{CHOSEN}group by 1 order by 1",
                        over_time=True,
                    )
                ],
                "What the caches had, and what they had not.",
            ),
            16,
        ),
        _savings_by_model(),
    ]


def _savings_by_model() -> Json:
    return table(
        "Savings by model",
        [
            sql(
                f"""
select
    hours.model as "Model", hours.provider as "Provider",
    sum(hours.cached_tokens) as "Cached", sum(hours.cache_write_tokens) as "Written",
    sum(hours.cached_tokens)::float8 / nullif(sum(hours.prompt_tokens), 0) as "From the cache",
    {DOLLARS} as "Cost", {_SAVED.strip()} as "Saved"{_PRICED}group by 1, 2
order by "Saved" desc nulls last, "Cached" desc limit {MOST}"""
            )
        ],
        {
            "Model": "",
            "Provider": "",
            "Cached": "short",
            "Written": "short",
            "From the cache": "percentunit",
            "Cost": "currencyUSD",
            "Saved": "currencyUSD",
        },
        "Below zero: more was written to the cache than was read from it. Empty: no list price." + _OF_LIST_PRICES,
        width=24,
    )


def _remembered() -> list[Json]:
    """As each was priced when it was answered: by the operator's own prices, too."""
    return [
        stat(
            "Saved by remembering",
            "currencyUSD",
            _one("sum(hours.saved_micros) / 1e6"),
            "US dollars that answers would have cost that were kept, shared or replayed.",
        ),
        stat(
            "Answered without a provider",
            "percentunit",
            _one("sum(hours.remembered)::float8 / nullif(sum(hours.requests), 0)"),
            "Share of all requests: from the cache, with one in flight, or as one of the same Idempotency-Key was.",
        ),
        wide(
            bars(
                "Saved by remembering, by model",
                "currencyUSD",
                [_course_of("hours.model", "saved_micros")],
                "US dollars; the ten that saved the most.",
            ),
            16,
        ),
    ]


def _budgets() -> list[Json]:
    """Of today and of this month (UTC), whatever time is shown: that is what budgets are of."""
    text = f"""
select
    keys.name as "Key", keys.id as "Id", accounts.email as "Owner",
    spent.day / 1e6 as "Today", nullif(keys.cost_micros_per_day, 0) / 1e6 as "A day",
    spent.day / nullif(keys.cost_micros_per_day, 0) as "Of the day",
    spent.month / 1e6 as "This month", nullif(keys.cost_micros_per_month, 0) / 1e6 as "A month",
    spent.month / nullif(keys.cost_micros_per_month, 0) as "Of the month"
from keys
join accounts on accounts.id = keys.account_id
cross join lateral (
    select
        coalesce(sum(cost_micros), 0) as month,
        coalesce(sum(cost_micros) filter (where hour >= date_trunc('day', now(), 'UTC')), 0) as day
    from usage_hourly where key_id = keys.id and hour >= date_trunc('month', now(), 'UTC')
) as spent
where keys.revoked_at is null and (keys.cost_micros_per_day > 0 or keys.cost_micros_per_month > 0)
  and ('*' in (${{owner:sqlstring}}) or accounts.email in (${{owner:sqlstring}}))
order by greatest(
    spent.day / nullif(keys.cost_micros_per_day, 0), spent.month / nullif(keys.cost_micros_per_month, 0)
) desc nulls last
limit {MOST}"""
    money = {"Today": "currencyUSD", "A day": "currencyUSD", "Of the day": "percentunit"}
    month = {"This month": "currencyUSD", "A month": "currencyUSD", "Of the month": "percentunit"}
    return [
        table(
            "Keys with a budget in dollars",
            [sql(text)],
            {"Key": "", "Id": "", "Owner": "", **money, **month},
            "Spent today and this month (UTC) beside what may be, fullest first. What runs now is not in it yet.",
            width=24,
        )
    ]


def _one(what: str) -> Json:
    return sql(f"select {what} as value{CHOSEN}")


def _course_of(what: str, micros: str = "cost_micros") -> Json:
    """Of the ten that cost the most, or saved it; the others together."""
    return sql(
        f"""
with chosen as (
    select hours.hour, hours.{micros}, {what} as name{CHOSEN.rstrip()}
),
costly as (select name from chosen group by name order by sum({micros}) desc limit 10)
select
    $__timeGroupAlias(hour, $__interval),
    case when name in (select name from costly) then name else 'all others' end as metric,
    sum({micros}) / 1e6 as value
from chosen
group by 1, 2 order by 1, 2""",
        over_time=True,
    )


def _by(title: str, columns: dict[str, str], why: str) -> Json:
    names = ", ".join(f'{expression} as "{name}"' for name, expression in columns.items())
    groups = ", ".join(str(number) for number in range(1, len(columns) + 1))
    text = f"""
select
    {names},
    sum(hours.requests) as "Requests",
    sum(hours.prompt_tokens) as "Prompt", sum(hours.completion_tokens) as "Completion",
    sum(hours.errors)::float8 / nullif(sum(hours.requests - hours.remembered), 0) as "Errors",
    {DOLLARS} as "Cost"{CHOSEN}group by {groups}
order by "Cost" desc, "Requests" desc limit {MOST}"""
    figures = {
        "Requests": "short",
        "Prompt": "short",
        "Completion": "short",
        "Errors": "percentunit",
        "Cost": "currencyUSD",
    }
    return table(
        title, [sql(text)], {**dict.fromkeys(columns, ""), **figures}, why + f" The {MOST} that cost the most."
    )

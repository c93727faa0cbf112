"""What clients and provider saw, beside what the database has of it."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from tests.support.load import Call

# The sums, and the same from the rows: what is in one and not in the other.
LEDGER = """
with rows as (
    select
        account_id, date_trunc('hour', started_at, 'UTC') as hour, key_id, user_id, app_id, provider, model,
        count(*)::bigint as requests,
        count(*) filter (where outcome not in ('ok', 'client_abort', 'budget_exhausted')) as errors,
        count(*) filter (where outcome = 'client_abort') as client_aborts,
        sum(prompt_tokens)::bigint, sum(completion_tokens)::bigint, sum(cached_tokens)::bigint,
        sum(cache_write_tokens)::bigint, sum(reasoning_tokens)::bigint,
        coalesce(sum(cost_micros), 0)::bigint, count(*) filter (where cost_micros is null),
        coalesce(sum(latency_ms) filter (where source = 'provider'), 0)::bigint,
        count(*) filter (where source = 'provider' and (outcome <> 'interrupted' or latency_ms > 0)),
        coalesce(sum(ttft_ms) filter (where source = 'provider'), 0)::bigint,
        count(ttft_ms) filter (where source = 'provider'),
        count(*) filter (where source <> 'provider' and outcome in ('ok', 'client_abort', 'budget_exhausted')),
        sum(saved_tokens)::bigint, coalesce(sum(saved_micros), 0)::bigint
    from usage group by 1, 2, 3, 4, 5, 6, 7
),
sums as (select * from usage_hourly where requests <> 0)
select 'rows' as side, missing.* from (table rows except table sums) as missing
union all
select 'sums', missing.* from (table sums except table rows) as missing
"""

# The same of the rollups and the sums that they are made from, once `before` holds the rollups and they were made anew.
ROLLUPS = """
with before as (select * from before where requests <> 0),
after as (select * from usage_rollups where requests <> 0)
(table before except table after) union all (table after except table before)
"""

# All models in the operator's file: a micro-dollar for a prompt token, two for a completion token.
PRICES = """
[prices.openai]
"mock-gpt*" = { input = 1, output = 2 }
[prices.anthropic]
"mock-claude*" = { input = 1, output = 2 }
[prices.ollama]
"mock-llama*" = { input = 1, output = 2 }
[prices.nowhere]
"*" = { input = 1, output = 2 }
"""

Row = Mapping[str, Any]


@dataclass
class Ledger:
    """All counts of what is missing or wrong are 0 when the gateway lost nothing and made nothing up."""

    kills: int = 0
    stops: int = 0
    cut: int = 0  # requests that were open when their gateway was killed

    begun: int = 0  # ids that the provider was called with
    ended: int = 0  # calls whose client had all of an answer for which a row is due
    rows: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    cost_micros: int = 0

    begun_missing: int = 0
    ended_missing: int = 0
    doubled: int = 0
    wrong: int = 0  # rows that are not what their client and the provider saw
    unpriced: int = 0  # rows whose cost is not that of their tokens
    unbalanced: int = 0  # sums that are not those of the rows
    chain: str = ""  # what `gateway usage verify` said of it, when it found a fault
    faults: list[str] = field(default_factory=list)  # the first few, in words

    async def compare(self, pool: asyncpg.Pool, calls: Sequence[Call], at_provider: Collection[str]) -> None:
        columns = "request_id::text, client_request_id, outcome, usage_source, prompt_tokens, completion_tokens"
        rows = [dict(row) for row in await pool.fetch(f"select {columns}, cost_micros from usage")]
        self._count(rows, at_provider)
        by_label = {row["client_request_id"]: row for row in rows}
        self.doubled = len(rows) - len(by_label)
        for call in calls:
            self._compare_call(call, by_label.pop(call.label, None), at_provider)
        for row in by_label.values():
            self._fault("wrong", f"nobody asked for {row}")
        self.unbalanced = len(await pool.fetch(LEDGER)) + await unbalanced_rollups(pool)

    def _count(self, rows: Sequence[Row], at_provider: Collection[str]) -> None:
        self.rows, self.begun = len(rows), len(at_provider)
        self.outcomes = Counter(row["outcome"] for row in rows)
        self.cost_micros = sum(row["cost_micros"] or 0 for row in rows)
        for missing in set(at_provider) - {row["request_id"] for row in rows}:
            self._fault("begun_missing", f"the provider was called with {missing}")
        for row in rows:
            if row["cost_micros"] != row["prompt_tokens"] + 2 * row["completion_tokens"]:
                self._fault("unpriced", f"the cost of {row}")

    def _compare_call(self, call: Call, row: Row | None, at_provider: Collection[str]) -> None:
        refused = call.end == "ended" and (call.status == 503 or not call.play.outcome)
        due = call.end == "ended" and not refused
        self.ended += due
        if row is None or (due and row["outcome"] == "interrupted"):
            if due:
                self._fault("ended_missing", f"{call} has {row}")
            return
        arrived = row["request_id"] in at_provider
        if refused or not (arrived or row["outcome"] in ("interrupted", "client_abort")):
            self._fault("wrong", f"{call} has {row}")
        elif due and (problem := _difference(call, row)):
            self._fault("wrong", f"{problem}: {call} has {row}")
        elif row["outcome"] not in {"interrupted", call.play.outcome}:
            self._fault("wrong", f"{call} has {row}")

    def _fault(self, kind: str, words: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.faults) < 10:
            self.faults.append(f"{kind}: {words}")

    @property
    def holds(self) -> bool:
        lost = self.begun_missing or self.ended_missing or self.doubled
        return not (lost or self.wrong or self.unpriced or self.unbalanced or self.chain)

    def __str__(self) -> str:
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.most_common())
        lines = [
            f"usage through {self.kills} kill -9 of the gateway ({self.cut} requests open in them) "
            f"and {self.stops} immediate stops of Postgres:",
            f"  {self.begun} begun at the provider, {self.ended} ended at a client, {self.rows} rows ({outcomes})",
            f"  {self.ended_missing} ended missing, {self.begun_missing} begun missing, {self.doubled} doubled, "
            f"{self.wrong} wrong, {self.unpriced} at another price ({self.cost_micros} micro-dollars in all), "
            f"{self.unbalanced} sums out of balance; the audit chain {self.chain or 'verifies'}",
        ]
        return "\n".join([*lines, *(f"  {fault}" for fault in self.faults)])


def _difference(call: Call, row: Row) -> str:
    """What is wrong with the row of a call that ended; "": nothing."""
    tokens = row["prompt_tokens"], row["completion_tokens"]
    by_provider = row["usage_source"] == "provider"
    if row["request_id"] != call.id or row["outcome"] != call.play.outcome:
        return "the id or the outcome"
    if call.play.tokens is not None and (tokens != call.play.tokens or not by_provider):
        return "not the provider's figures"
    if call.play.tokens is None and (by_provider or 0 in tokens):
        return "not a count"
    if call.tokens is not None and call.tokens != tokens:
        return "not the figures that the client read"
    return ""


async def unbalanced_rollups(pool: asyncpg.Pool) -> int:
    """Cells that are not the sums of usage_hourly. Nothing is changed."""
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            await connection.execute("create temp table before as table usage_rollups")
            await connection.execute("select fill_usage_rollups()")
            return len(await connection.fetch(ROLLUPS))
        finally:
            await transaction.rollback()

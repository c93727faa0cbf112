"""The sums of usage by hour: the part of the ledger's statements that moves them.

It reads `moved`: the rows that the statement wrote, each with a `sign` (-1: what it was before).
"""

# Ordered, so that two processes that write the same sums wait for each other and do not deadlock.
COUNTED = """
counted as (
    insert into usage_hourly as sums
    select
        account_id, date_trunc('hour', started_at, 'UTC') as hour, key_id, user_id, app_id, provider, model,
        sum(sign),
        coalesce(sum(sign) filter (where outcome not in ('ok', 'client_abort', 'budget_exhausted')), 0),
        coalesce(sum(sign) filter (where outcome = 'client_abort'), 0),
        sum(sign * prompt_tokens), sum(sign * completion_tokens), sum(sign * cached_tokens),
        sum(sign * cache_write_tokens), sum(sign * reasoning_tokens),
        coalesce(sum(sign * cost_micros), 0),
        coalesce(sum(sign) filter (where cost_micros is null), 0),
        sum(sign * latency_ms::bigint),
        coalesce(sum(sign) filter (where outcome <> 'interrupted' or latency_ms > 0), 0),
        coalesce(sum(sign * ttft_ms::bigint), 0),
        coalesce(sum(sign) filter (where ttft_ms is not null), 0)
    from moved
    group by account_id, hour, key_id, user_id, app_id, provider, model
    order by account_id, hour, key_id, user_id, app_id, provider, model
    on conflict (account_id, hour, key_id, user_id, app_id, provider, model) do update set
        requests = sums.requests + excluded.requests,
        errors = sums.errors + excluded.errors,
        client_aborts = sums.client_aborts + excluded.client_aborts,
        prompt_tokens = sums.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = sums.completion_tokens + excluded.completion_tokens,
        cached_tokens = sums.cached_tokens + excluded.cached_tokens,
        cache_write_tokens = sums.cache_write_tokens + excluded.cache_write_tokens,
        reasoning_tokens = sums.reasoning_tokens + excluded.reasoning_tokens,
        cost_micros = sums.cost_micros + excluded.cost_micros,
        unpriced = sums.unpriced + excluded.unpriced,
        latency_ms = sums.latency_ms + excluded.latency_ms,
        latency_count = sums.latency_count + excluded.latency_count,
        ttft_ms = sums.ttft_ms + excluded.ttft_ms,
        ttft_count = sums.ttft_count + excluded.ttft_count
)
"""

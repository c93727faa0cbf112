-- migrate:up

-- What Postgres adds bigints up in is a numeric of each group.
create aggregate sum64(bigint) (sfunc = int8pl, stype = bigint, combinefunc = int8pl, parallel = safe);
comment on aggregate sum64(bigint) is 'As sum, but a bigint; an error when it is beyond one. Thousands of groups take half the time.';

-- As before, but the types are the same in all three parts: only then is the one that a question names planned as if it
-- stood there alone, and read by several processes.
create or replace view usage_cells as
select
    rollup as source, account_id, start, key_id, user_id, app_id, provider, model,
    requests, errors, client_aborts,
    prompt_tokens, completion_tokens, cached_tokens, cache_write_tokens, reasoning_tokens,
    cost_micros, unpriced, latency_ms, latency_count, ttft_ms, ttft_count,
    remembered, saved_tokens, saved_micros
from usage_rollups
union all
select
    'hour', account_id, hour, key_id, user_id, app_id, provider, model,
    requests, errors, client_aborts,
    prompt_tokens, completion_tokens, cached_tokens, cache_write_tokens, reasoning_tokens,
    cost_micros, unpriced, latency_ms, latency_count, ttft_ms, ttft_count,
    remembered, saved_tokens, saved_micros
from usage_hourly
union all
select
    'row', account_id, started_at, key_id, user_id, app_id, provider, model,
    1::bigint, (outcome not in ('ok', 'client_abort', 'budget_exhausted'))::integer::bigint,
    (outcome = 'client_abort')::integer::bigint,
    prompt_tokens, completion_tokens, cached_tokens, cache_write_tokens, reasoning_tokens,
    coalesce(cost_micros, 0), (cost_micros is null)::integer::bigint,
    case source when 'provider' then latency_ms else 0 end::bigint,
    (source = 'provider' and (outcome <> 'interrupted' or latency_ms > 0))::integer::bigint,
    case source when 'provider' then coalesce(ttft_ms, 0) else 0 end::bigint,
    (source = 'provider' and ttft_ms is not null)::integer::bigint,
    (source <> 'provider' and outcome in ('ok', 'client_abort', 'budget_exhausted'))::integer::bigint,
    saved_tokens, coalesce(saved_micros, 0)
from usage;

-- migrate:down
-- The view stays: what it says is the same.
drop aggregate sum64(bigint);

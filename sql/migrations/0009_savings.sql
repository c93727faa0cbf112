-- migrate:up

-- Whoever waits for a table holds up all who come after, for as long as a dump runs: a start that fails is tried again.
set local lock_timeout = '2s';

-- No row is written and none is read: the defaults are constants, and the wider check passes what the one before did.
-- All have a default, because gateways of the version before may still write, and name no column of these.
alter table usage
    add column source text not null default 'provider',
    add column source_id uuid,
    add column saved_tokens bigint not null default 0,
    add column saved_micros bigint,
    drop constraint usage_usage_source_check,
    add constraint usage_usage_source_check
        check (usage_source in ('provider', 'counted', 'estimated', 'none')) not valid;
comment on table usage is 'One row for every request that reached a provider, or was answered without one. A partition a month (UTC).';
comment on column usage.usage_source is 'Who counted the tokens; none: no provider was asked, so there are none.';
comment on column usage.source is 'Who made the answer: provider; else nobody for this request: cache, shared (with one in flight) or replay (of its Idempotency-Key).';
comment on column usage.source_id is 'The request whose provider made it, and that paid; null: this one.';
comment on column usage.saved_tokens is 'Of prompt and completion, which it would have used by itself.';
comment on column usage.saved_micros is 'Micro-dollars that these would have cost; null: nothing was saved, or no price is known.';

alter table usage_hourly
    add column remembered bigint not null default 0,
    add column saved_tokens bigint not null default 0,
    add column saved_micros bigint not null default 0;
comment on column usage_hourly.errors is 'Requests that ended neither well, nor by the client''s leaving, nor by a budget.';
comment on column usage_hourly.latency_count is 'Requests that a provider was asked for, but those whose end nobody saw.';
comment on column usage_hourly.ttft_count is 'Requests that a provider was asked for and that got a first text.';
comment on column usage_hourly.remembered is 'Requests that were answered without a provider, and were no errors.';
comment on column usage_hourly.saved_tokens is 'Of prompt and completion, which requests that no provider was asked for would have used.';
comment on column usage_hourly.saved_micros is 'Micro-dollars that these would have cost, where a price is known.';

alter table usage_rollups
    add column remembered bigint not null default 0,
    add column saved_tokens bigint not null default 0,
    add column saved_micros bigint not null default 0;

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
    1, (outcome not in ('ok', 'client_abort', 'budget_exhausted'))::integer, (outcome = 'client_abort')::integer,
    prompt_tokens, completion_tokens, cached_tokens, cache_write_tokens, reasoning_tokens,
    coalesce(cost_micros, 0), (cost_micros is null)::integer,
    case source when 'provider' then latency_ms else 0 end,
    (source = 'provider' and (outcome <> 'interrupted' or latency_ms > 0))::integer,
    case source when 'provider' then coalesce(ttft_ms, 0) else 0 end,
    (source = 'provider' and ttft_ms is not null)::integer,
    (source <> 'provider' and outcome in ('ok', 'client_abort', 'budget_exhausted'))::integer,
    saved_tokens, coalesce(saved_micros, 0)
from usage;

create or replace function fill_usage_rollups() returns void language sql as $$
    lock table usage_hourly in share row exclusive mode; -- who writes usage waits
    truncate usage_rollups;
    insert into usage_rollups
    select
        case grouping(key_id) when 0 then 'day_by_all' else 'hour_by_model' end,
        coalesce(account_id, '00000000-0000-0000-0000-000000000000'), coalesce(day, hour), coalesce(key_id, ''),
        coalesce(user_id, ''), app_id, provider, model,
        sum(requests), sum(errors), sum(client_aborts),
        sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens), sum(cache_write_tokens), sum(reasoning_tokens),
        sum(cost_micros), sum(unpriced), sum(latency_ms), sum(latency_count), sum(ttft_ms), sum(ttft_count),
        sum(remembered), sum(saved_tokens), sum(saved_micros)
    from (select *, date_trunc('day', hour, 'UTC') as day from usage_hourly) as hours
    group by grouping sets (
        (hour, app_id, provider, model), (day, account_id, key_id, user_id, app_id, provider, model)
    )
    order by 1, 3; -- as the gateway writes them: neighbours in time lie side by side
    insert into usage_rollups
    select
        span || case grouping(key_id, user_id)
            when 0 then '_by_all' when 1 then '_by_key' when 2 then '_by_user' else '_by_model'
        end,
        coalesce(account_id, '00000000-0000-0000-0000-000000000000'), beginning, coalesce(key_id, ''),
        coalesce(user_id, ''), coalesce(app_id, ''), coalesce(provider, ''), coalesce(model, ''),
        sum(requests), sum(errors), sum(client_aborts),
        sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens), sum(cache_write_tokens), sum(reasoning_tokens),
        sum(cost_micros), sum(unpriced), sum(latency_ms), sum(latency_count), sum(ttft_ms), sum(ttft_count),
        sum(remembered), sum(saved_tokens), sum(saved_micros)
    from (
        select days.*, span, date_trunc(span, start, 'UTC') as beginning
        from usage_rollups as days cross join (values ('day'), ('month')) as spans (span)
        where rollup = 'day_by_all'
    ) as days
    group by grouping sets (
        (span, beginning, app_id, provider, model),
        (span, beginning, account_id, key_id, app_id, provider, model),
        (span, beginning, account_id, user_id),
        (span, beginning, account_id, key_id, user_id, app_id, provider, model)
    )
    having span <> 'day' or grouping(key_id, user_id) <> 0
    order by 1, 3;
$$;

alter table keys
    add column cache_ttl integer not null default 0,
    add constraint keys_cache_ttl_check check (cache_ttl between 0 and 2592000) not valid;
comment on column keys.cache_ttl is 'Seconds that answers are kept and shared where a request says nothing of it; 0: not at all.';

-- migrate:down
alter table keys drop column cache_ttl;
drop view usage_cells;
drop function fill_usage_rollups;
alter table usage_rollups drop column remembered, drop column saved_tokens, drop column saved_micros;
alter table usage_hourly drop column remembered, drop column saved_tokens, drop column saved_micros;
alter table usage drop column source, drop column source_id, drop column saved_tokens, drop column saved_micros;
-- Its check stays as it is: rows of `none` are there.

create view usage_cells as
select
    rollup as source, account_id, start, key_id, user_id, app_id, provider, model,
    requests, errors, client_aborts,
    prompt_tokens, completion_tokens, cached_tokens, cache_write_tokens, reasoning_tokens,
    cost_micros, unpriced, latency_ms, latency_count, ttft_ms, ttft_count
from usage_rollups
union all
select
    'hour', account_id, hour, key_id, user_id, app_id, provider, model,
    requests, errors, client_aborts,
    prompt_tokens, completion_tokens, cached_tokens, cache_write_tokens, reasoning_tokens,
    cost_micros, unpriced, latency_ms, latency_count, ttft_ms, ttft_count
from usage_hourly
union all
select
    'row', account_id, started_at, key_id, user_id, app_id, provider, model,
    1, (outcome not in ('ok', 'client_abort', 'budget_exhausted'))::integer, (outcome = 'client_abort')::integer,
    prompt_tokens, completion_tokens, cached_tokens, cache_write_tokens, reasoning_tokens,
    coalesce(cost_micros, 0), (cost_micros is null)::integer,
    latency_ms, (outcome <> 'interrupted' or latency_ms > 0)::integer,
    coalesce(ttft_ms, 0), (ttft_ms is not null)::integer
from usage;

create function fill_usage_rollups() returns void language sql as $$
    lock table usage_hourly in share row exclusive mode; -- who writes usage waits
    truncate usage_rollups;
    insert into usage_rollups
    select
        case grouping(key_id) when 0 then 'day_by_all' else 'hour_by_model' end,
        coalesce(account_id, '00000000-0000-0000-0000-000000000000'), coalesce(day, hour), coalesce(key_id, ''),
        coalesce(user_id, ''), app_id, provider, model,
        sum(requests), sum(errors), sum(client_aborts),
        sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens), sum(cache_write_tokens), sum(reasoning_tokens),
        sum(cost_micros), sum(unpriced), sum(latency_ms), sum(latency_count), sum(ttft_ms), sum(ttft_count)
    from (select *, date_trunc('day', hour, 'UTC') as day from usage_hourly) as hours
    group by grouping sets (
        (hour, app_id, provider, model), (day, account_id, key_id, user_id, app_id, provider, model)
    )
    order by 1, 3; -- as the gateway writes them: neighbours in time lie side by side
    insert into usage_rollups
    select
        span || case grouping(key_id, user_id)
            when 0 then '_by_all' when 1 then '_by_key' when 2 then '_by_user' else '_by_model'
        end,
        coalesce(account_id, '00000000-0000-0000-0000-000000000000'), beginning, coalesce(key_id, ''),
        coalesce(user_id, ''), coalesce(app_id, ''), coalesce(provider, ''), coalesce(model, ''),
        sum(requests), sum(errors), sum(client_aborts),
        sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens), sum(cache_write_tokens), sum(reasoning_tokens),
        sum(cost_micros), sum(unpriced), sum(latency_ms), sum(latency_count), sum(ttft_ms), sum(ttft_count)
    from (
        select days.*, span, date_trunc(span, start, 'UTC') as beginning
        from usage_rollups as days cross join (values ('day'), ('month')) as spans (span)
        where rollup = 'day_by_all'
    ) as days
    group by grouping sets (
        (span, beginning, app_id, provider, model),
        (span, beginning, account_id, key_id, app_id, provider, model),
        (span, beginning, account_id, user_id),
        (span, beginning, account_id, key_id, user_id, app_id, provider, model)
    )
    having span <> 'day' or grouping(key_id, user_id) <> 0
    order by 1, 3;
$$;

-- migrate:up

-- A table of cells with fewer columns and longer spans than usage_hourly has: a question reads the smallest that knows
-- what it names. Each is a partition, so that the cells of one lie side by side.
create table usage_rollups (
    rollup             text not null,
    account_id         uuid not null,
    start              timestamptz not null,
    key_id             text not null,
    user_id            text not null,
    app_id             text not null,
    provider           text not null,
    model              text not null,
    requests           bigint not null,
    errors             bigint not null,
    client_aborts      bigint not null,
    prompt_tokens      bigint not null,
    completion_tokens  bigint not null,
    cached_tokens      bigint not null,
    cache_write_tokens bigint not null,
    reasoning_tokens   bigint not null,
    cost_micros        bigint not null,
    unpriced           bigint not null,
    latency_ms         bigint not null,
    latency_count      bigint not null,
    ttft_ms            bigint not null,
    ttft_count         bigint not null,
    primary key (rollup, account_id, start, key_id, user_id, app_id, provider, model)
) partition by list (rollup);
comment on table usage_rollups is 'Sums of usage_hourly, written with it in one transaction; kept when months of rows are dropped.';
comment on column usage_rollups.rollup is 'Span and what is told apart: model (and provider, app), key (and these), user (alone), all. The rest is empty.';
comment on column usage_rollups.account_id is 'Zero in the rollups by model: they are of all accounts together.';
comment on column usage_rollups.start is 'Begin of the hour, day or month (UTC) in which the requests arrived.';
comment on column usage_rollups.requests is 'This and all that follow: as in usage_hourly.';

-- Their rows are updated in place, several times a second; no index is on what changes.
create table usage_hour_by_model partition of usage_rollups for values in ('hour_by_model') with (fillfactor = 70);
create table usage_day_by_model partition of usage_rollups for values in ('day_by_model') with (fillfactor = 70);
create table usage_month_by_model partition of usage_rollups for values in ('month_by_model') with (fillfactor = 70);
create table usage_day_by_key partition of usage_rollups for values in ('day_by_key') with (fillfactor = 70);
create table usage_month_by_key partition of usage_rollups for values in ('month_by_key') with (fillfactor = 70);
create table usage_day_by_user partition of usage_rollups for values in ('day_by_user') with (fillfactor = 70);
create table usage_month_by_user partition of usage_rollups for values in ('month_by_user') with (fillfactor = 70);
create table usage_day_by_all partition of usage_rollups for values in ('day_by_all') with (fillfactor = 70);
create table usage_month_by_all partition of usage_rollups for values in ('month_by_all') with (fillfactor = 70);

-- For an admin, who names no account.
create index usage_rollups_start on usage_rollups (start);
create index usage_day_by_key_key_id on usage_day_by_key (key_id, start);
create index usage_month_by_key_key_id on usage_month_by_key (key_id, start);
create index usage_day_by_user_user_id on usage_day_by_user (user_id, start);
create index usage_month_by_user_user_id on usage_month_by_user (user_id, start);
create index usage_day_by_all_user_id on usage_day_by_all (user_id, start);
create index usage_month_by_all_user_id on usage_month_by_all (user_id, start);
create index usage_day_by_all_key_id on usage_day_by_all (key_id, start);
create index usage_month_by_all_key_id on usage_month_by_all (key_id, start);
create index usage_hourly_user_id on usage_hourly (user_id, hour);
create index usage_hourly_key_id on usage_hourly (key_id, hour);

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
comment on view usage_cells is 'All that figures are made of, from single rows to months: name the source, or all is counted many times.';

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
comment on function fill_usage_rollups is 'Makes all rollups anew from usage_hourly.';

select fill_usage_rollups();

-- migrate:down
drop view usage_cells;
drop function fill_usage_rollups;
drop index usage_hourly_key_id;
drop index usage_hourly_user_id;
drop table usage_rollups;

-- migrate:up

-- Whoever waits for a table holds up all who come after, for as long as a dump runs: a start that fails is tried again.
set local lock_timeout = '2s';
lock table usage_hourly in share row exclusive mode; -- who writes usage waits, and has locked no sums before it does

-- A range that ends in the middle of a month was days of up to half a month at either end.
create function usage_span_begin(span text, moment timestamptz) returns timestamptz language sql stable as $$
    select case span
        when 'pentad' then
            date_trunc('month', moment, 'UTC')
            + least((extract(day from moment at time zone 'UTC')::integer - 1) / 5, 5) * interval '120 hours'
        else date_trunc(span, moment, 'UTC')
    end
$$;
comment on function usage_span_begin is 'Begin of the hour, day, pentad or month (UTC) that a moment is in. A pentad begins on the 1st, 6th, 11th, 16th, 21st or 26th.';
comment on column usage_rollups.start is 'Begin of the hour, day, pentad or month (UTC) in which the requests arrived.';

create table usage_pentad_by_model partition of usage_rollups for values in ('pentad_by_model') with (fillfactor = 70);
create table usage_pentad_by_key partition of usage_rollups for values in ('pentad_by_key') with (fillfactor = 70);
create table usage_pentad_by_user partition of usage_rollups for values in ('pentad_by_user') with (fillfactor = 70);
create table usage_pentad_by_all partition of usage_rollups for values in ('pentad_by_all') with (fillfactor = 70);

create index usage_pentad_by_key_key_id on usage_pentad_by_key (key_id, start);
create index usage_pentad_by_user_user_id on usage_pentad_by_user (user_id, start);
create index usage_pentad_by_all_user_id on usage_pentad_by_all (user_id, start);
create index usage_pentad_by_all_key_id on usage_pentad_by_all (key_id, start);

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
        select days.*, span, usage_span_begin(span, start) as beginning
        from usage_rollups as days cross join (values ('day'), ('pentad'), ('month')) as spans (span)
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

insert into usage_rollups
select
    'pentad' || substr(rollup, 4), account_id, usage_span_begin('pentad', start) as beginning,
    key_id, user_id, app_id, provider, model,
    sum(requests), sum(errors), sum(client_aborts),
    sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens), sum(cache_write_tokens), sum(reasoning_tokens),
    sum(cost_micros), sum(unpriced), sum(latency_ms), sum(latency_count), sum(ttft_ms), sum(ttft_count),
    sum(remembered), sum(saved_tokens), sum(saved_micros)
from usage_rollups
where rollup in ('day_by_model', 'day_by_key', 'day_by_user', 'day_by_all')
group by rollup, account_id, beginning, key_id, user_id, app_id, provider, model
order by 1, 3; -- as the gateway writes them: neighbours in time lie side by side

-- migrate:down
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
drop table usage_pentad_by_model, usage_pentad_by_key, usage_pentad_by_user, usage_pentad_by_all;
drop function usage_span_begin;
comment on column usage_rollups.start is 'Begin of the hour, day or month (UTC) in which the requests arrived.';

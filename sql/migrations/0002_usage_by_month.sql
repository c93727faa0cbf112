-- migrate:up

-- Rows of one month in one partition: a month that is no longer kept is dropped, not deleted row by row.
alter table usage rename to usage_before;
alter table usage_before drop constraint usage_pkey;
alter table usage_before drop constraint usage_usage_source_check;
drop index usage_started_at;
drop index usage_account_id_started_at;
drop index usage_key_id_started_at;

create table usage (
    request_id         uuid not null,
    started_at         timestamptz not null,
    key_id             text not null,
    account_id         uuid not null,
    user_id            text not null default '',
    app_id             text not null default '',
    client_request_id  text not null default '',
    provider           text not null,
    model              text not null,
    upstream_model     text not null,
    stream             boolean not null,
    status             integer not null,
    outcome            text not null,
    error_code         text not null default '',
    finish_reason      text not null default '',
    prompt_tokens      bigint not null,
    completion_tokens  bigint not null,
    cached_tokens      bigint not null default 0,
    cache_write_tokens bigint not null default 0,
    reasoning_tokens   bigint not null default 0,
    usage_source       text not null check (usage_source in ('provider', 'counted', 'estimated')),
    latency_ms         integer not null,
    ttft_ms            integer,
    cost_micros        bigint,
    primary key (request_id, started_at)
) partition by range (started_at);
comment on table usage is 'One row for every request that reached a provider, however it ended. A partition a month (UTC).';
comment on column usage.request_id is 'The gateway''s own UUIDv7, X-Request-Id of the response.';
comment on column usage.user_id is 'X-User-Id as the client sent it.';
comment on column usage.app_id is 'X-App-Id as the client sent it.';
comment on column usage.model is 'The name that the client asked for.';
comment on column usage.upstream_model is 'The provider''s own name for it.';
comment on column usage.status is 'HTTP status that the client saw; 0: it had left before one was sent.';
comment on column usage.outcome is 'interrupted: the gateway went down; the row may be replaced by a better one.';
comment on column usage.cached_tokens is 'Part of prompt_tokens.';
comment on column usage.cache_write_tokens is 'Part of prompt_tokens.';
comment on column usage.reasoning_tokens is 'Part of completion_tokens.';
comment on column usage.ttft_ms is 'From the request''s arrival to the first text of the model; null: none came.';
comment on column usage.cost_micros is 'Micro-dollars, a millionth of a US dollar; null: no price is known.';
create index usage_started_at on usage (started_at);
create index usage_account_id_started_at on usage (account_id, started_at);
create index usage_key_id_started_at on usage (key_id, started_at);

-- A month that nobody made ahead, and clocks that are wrong by years: no row is refused for its time.
create table usage_default partition of usage default;

-- The rows of such a month move from the default partition into its own when it is made.
create function make_usage_partition(month date) returns boolean language plpgsql set lock_timeout = '2s' as $$
declare
    opens timestamptz := date_trunc('month', month::timestamp) at time zone 'UTC';
    closes timestamptz := (date_trunc('month', month::timestamp) + interval '1 month') at time zone 'UTC';
    name text := 'usage_' || to_char(month, 'YYYY_MM');
begin
    perform pg_advisory_xact_lock(hashtext('make_usage_partition'));
    if to_regclass(name) is not null then
        return false;
    end if;
    -- Whoever reads while rows move would see them in neither place.
    if exists (select from usage_default where started_at >= opens and started_at < closes) then
        lock table usage in access exclusive mode;
    end if;
    lock table usage_default in access exclusive mode;
    execute format('create table %I (like usage including all)', name);
    execute format(
        'with moved as (delete from usage_default where started_at >= %L and started_at < %L returning *) '
        'insert into %I select * from moved', opens, closes, name);
    -- Unlike CREATE TABLE PARTITION OF it lets others write to the other partitions.
    execute format('alter table usage attach partition %I for values from (%L) to (%L)', name, opens, closes);
    return true;
end
$$;
comment on function make_usage_partition is 'Makes the partition of a month; false: it is there already.';

create function drop_usage_before(month date) returns integer language plpgsql set lock_timeout = '2s' as $$
declare
    opens timestamptz := date_trunc('month', month::timestamp) at time zone 'UTC';
    partition record;
    dropped integer := 0;
begin
    perform pg_advisory_xact_lock(hashtext('make_usage_partition'));
    for partition in
        select inhrelid::regclass as name from pg_inherits join pg_class on pg_class.oid = inhrelid
        where inhparent = 'usage'::regclass
          and relname ~ '^usage_\d{4}_\d{2}$' and relname < 'usage_' || to_char(month, 'YYYY_MM')
    loop
        execute format('drop table %s', partition.name);
        dropped := dropped + 1;
    end loop;
    delete from usage_default where started_at < opens;
    return dropped;
end
$$;
comment on function drop_usage_before is 'Drops the rows of all months before this one, as partitions; how many those were.';

select make_usage_partition(month)
from (
    select distinct date_trunc('month', started_at at time zone 'UTC')::date as month from usage_before
    where started_at between '2025-01-01' and now() + interval '1 month'
) as months;
insert into usage select *, null from usage_before;
drop table usage_before;

create table usage_hourly (
    account_id         uuid not null,
    hour               timestamptz not null,
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
    primary key (account_id, hour, key_id, user_id, app_id, provider, model)
) with (fillfactor = 70); -- its rows are updated in place, several times a second
comment on table usage_hourly is 'The sums of table usage by hour, written with it in one transaction; kept when its months are dropped.';
comment on column usage_hourly.hour is 'Begin of the hour (UTC) in which the requests arrived.';
comment on column usage_hourly.requests is 'Rows of table usage.';
comment on column usage_hourly.errors is 'Requests that ended neither well nor by the client''s leaving.';
comment on column usage_hourly.client_aborts is 'Requests whose client left first.';
comment on column usage_hourly.prompt_tokens is 'Cached and cache-write tokens included.';
comment on column usage_hourly.completion_tokens is 'Reasoning tokens included.';
comment on column usage_hourly.cached_tokens is 'Part of prompt_tokens.';
comment on column usage_hourly.cache_write_tokens is 'Part of prompt_tokens.';
comment on column usage_hourly.reasoning_tokens is 'Part of completion_tokens.';
comment on column usage_hourly.cost_micros is 'Micro-dollars of the requests that have a price.';
comment on column usage_hourly.unpriced is 'Requests for which no price is known.';
comment on column usage_hourly.latency_ms is 'Sum over latency_count requests.';
comment on column usage_hourly.latency_count is 'Requests but those whose end nobody saw.';
comment on column usage_hourly.ttft_ms is 'Sum over ttft_count requests.';
comment on column usage_hourly.ttft_count is 'Requests that got a first text.';
create index usage_hourly_hour on usage_hourly (hour);

insert into usage_hourly
select
    account_id, date_trunc('hour', started_at, 'UTC'), key_id, user_id, app_id, provider, model,
    count(*),
    count(*) filter (where outcome not in ('ok', 'client_abort')),
    count(*) filter (where outcome = 'client_abort'),
    sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens), sum(cache_write_tokens), sum(reasoning_tokens),
    0,
    count(*),
    sum(latency_ms), count(*) filter (where outcome <> 'interrupted' or latency_ms > 0),
    coalesce(sum(ttft_ms), 0), count(ttft_ms)
from usage
group by 1, 2, 3, 4, 5, 6, 7;

-- migrate:down
drop function drop_usage_before;
drop function make_usage_partition;
drop table usage_hourly;
create table usage_before (like usage including all);
insert into usage_before select * from usage;
drop table usage;
alter table usage_before drop column cost_micros;
alter table usage_before rename to usage;

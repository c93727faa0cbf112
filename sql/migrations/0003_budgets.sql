-- migrate:up

-- Whoever waits for a table holds up all who come after, for as long as a dump runs: a start that fails is tried again.
set local lock_timeout = '2s';

-- No row is written, because the defaults are constants, and none is read, because every row has the default
-- (https://www.postgresql.org/docs/current/sql-altertable.html, Notes): a million keys would be locked for seconds.
alter table keys
    add column requests_per_second double precision not null default 0,
    add column burst integer not null default 0,
    add column tokens_per_minute bigint not null default 0,
    add column tokens_per_day bigint not null default 0,
    add column cost_micros_per_day bigint not null default 0,
    add column cost_micros_per_month bigint not null default 0,
    add column drain_seconds integer not null default 0,
    -- NaN is greater than all numbers.
    add constraint keys_rate_check check (requests_per_second >= 0 and requests_per_second < 'infinity') not valid,
    add constraint keys_burst_check check (burst >= 0) not valid,
    add constraint keys_tokens_check check (tokens_per_minute >= 0 and tokens_per_day >= 0) not valid,
    add constraint keys_cost_check check (cost_micros_per_day >= 0 and cost_micros_per_month >= 0) not valid,
    add constraint keys_drain_check check (drain_seconds between 0 and 600) not valid;
comment on column keys.requests_per_second is 'Token bucket, requests that flow in a second; 0: no limit.';
comment on column keys.burst is 'Requests that the bucket holds; 0: as many as flow in a second, rounded up.';
comment on column keys.tokens_per_minute is 'Prompt and completion tokens; 0: no limit.';
comment on column keys.tokens_per_day is 'Prompt and completion tokens of a day (UTC); 0: no limit.';
comment on column keys.cost_micros_per_day is 'Micro-dollars of a day (UTC); 0: no limit.';
comment on column keys.cost_micros_per_month is 'Micro-dollars of a month (UTC); 0: no limit.';
comment on column keys.drain_seconds is 'Seconds that a provider is read on for a client that left; 0: it is closed at once.';

alter table accounts
    add column tokens_per_minute bigint not null default 0,
    add column tokens_per_day bigint not null default 0,
    add column cost_micros_per_day bigint not null default 0,
    add column cost_micros_per_month bigint not null default 0,
    add constraint accounts_tokens_check check (tokens_per_minute >= 0 and tokens_per_day >= 0) not valid,
    add constraint accounts_cost_check check (cost_micros_per_day >= 0 and cost_micros_per_month >= 0) not valid;
comment on column accounts.tokens_per_minute is 'Prompt and completion tokens of all keys together; 0: no limit.';
comment on column accounts.tokens_per_day is 'Prompt and completion tokens of all keys in a day (UTC); 0: no limit.';
comment on column accounts.cost_micros_per_day is 'Micro-dollars of all keys in a day (UTC); 0: no limit.';
comment on column accounts.cost_micros_per_month is 'Micro-dollars of all keys in a month (UTC); 0: no limit.';

-- migrate:down
alter table accounts
    drop column tokens_per_minute,
    drop column tokens_per_day,
    drop column cost_micros_per_day,
    drop column cost_micros_per_month;
alter table keys
    drop column requests_per_second,
    drop column burst,
    drop column tokens_per_minute,
    drop column tokens_per_day,
    drop column cost_micros_per_day,
    drop column cost_micros_per_month,
    drop column drain_seconds;

-- migrate:up

-- Whoever waits for a table holds up all who come after, for as long as a dump runs: a start that fails is tried again.
set local lock_timeout = '2s';

alter table keys add column expires_at timestamptz;
comment on column keys.expires_at is 'From when on it is refused, by the clock of the database; null: never.';

-- migrate:down
alter table keys drop column expires_at;

-- The role that Grafana asks Postgres as: it reads what the dashboards show, and nothing that opens a door. Run by psql as
-- the owner of the tables, whose password it shares (PGPASSWORD); every run leaves the same.
--
-- Grafana's users may ask any SQL of a data source. With the gateway's own role they could read digests of keys, hashes of
-- passwords and the secrets that both are made with.
\set ON_ERROR_STOP on
\getenv password PGPASSWORD

begin;
do $$
begin
    if not exists (select from pg_roles where rolname = 'grafana') then
        create role grafana login;
    end if;
end
$$;
alter role grafana password :'password' connection limit 10;
alter role grafana set default_transaction_read_only = on;
alter role grafana set statement_timeout = '30s';
grant usage on schema public to grafana;
grant select on usage, usage_hourly, usage_rollups, usage_cells to grafana;
grant select (id, email, role, created_at) on accounts to grafana;
grant select (
    id, account_id, name, created_at, revoked_at, expires_at, allowed_models, requests_per_minute, concurrent_requests,
    requests_per_second, burst, tokens_per_minute, tokens_per_day, cost_micros_per_day, cost_micros_per_month
) on keys to grafana;
commit;

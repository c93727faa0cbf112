-- migrate:up
create table accounts (
    id            uuid primary key,
    email         text not null unique check (email = lower(email)),
    password_hash text not null,
    role          text not null check (role in ('admin', 'member')),
    created_at    timestamptz not null default now()
);
comment on table accounts is 'People who own keys. The first one registered is the admin.';
comment on column accounts.password_hash is 'Argon2id, PHC string.';

create table keys (
    id                  text primary key check (length(id) = 12),
    account_id          uuid not null references accounts (id),
    name                text not null,
    digest              bytea not null,
    hash                text not null,
    requests_per_minute integer not null check (requests_per_minute >= 0),
    concurrent_requests integer not null check (concurrent_requests >= 0),
    allowed_models      text[] not null default '{}',
    created_at          timestamptz not null default now(),
    revoked_at          timestamptz
);
comment on table keys is 'API keys. The key itself is never stored: a peppered HMAC of its secret, and its Argon2id hash.';
comment on column keys.id is 'The public part of the key, aig_<id>_…';
comment on column keys.digest is 'HMAC-SHA256(pepper, secret).';
comment on column keys.hash is 'Argon2id of the whole key, PHC string.';
comment on column keys.requests_per_minute is 'Sliding window of 60 seconds; 0: no limit.';
comment on column keys.concurrent_requests is 'Requests in flight, open streams included; 0: no limit.';
comment on column keys.allowed_models is 'Model names or patterns such as gpt-*; empty: all.';
create index keys_account_id on keys (account_id);

create table usage (
    request_id         uuid primary key,
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
    ttft_ms            integer
);
comment on table usage is 'One row for every request that reached a provider, however it ended.';
comment on column usage.request_id is 'The gateway''s own UUIDv7, X-Request-Id of the response.';
comment on column usage.user_id is 'X-User-Id as the client sent it.';
comment on column usage.app_id is 'X-App-Id as the client sent it.';
comment on column usage.model is 'The name that the client asked for.';
comment on column usage.upstream_model is 'The provider''s own name for it.';
comment on column usage.status is 'HTTP status that the client saw; 0: it had left before one was sent.';
comment on column usage.cached_tokens is 'Part of prompt_tokens.';
comment on column usage.cache_write_tokens is 'Part of prompt_tokens.';
comment on column usage.reasoning_tokens is 'Part of completion_tokens.';
comment on column usage.ttft_ms is 'From the request''s arrival to the first text of the model; null: none came.';
create index usage_started_at on usage (started_at);
create index usage_account_id_started_at on usage (account_id, started_at);
create index usage_key_id_started_at on usage (key_id, started_at);

create table secrets (
    name  text primary key,
    value bytea not null
);
comment on table secrets is 'Secrets that all processes of a deployment share and that no setting gave.';

-- migrate:down
drop table secrets;
drop table usage;
drop table keys;
drop table accounts;

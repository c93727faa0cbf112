-- migrate:up

-- Whoever waits for a table holds up all who come after, for as long as a dump runs: a start that fails is tried again.
set local lock_timeout = '2s';

create table answers (
    kind        text not null check (kind in ('cache', 'idempotency')),
    digest      bytea not null,
    account_id  uuid not null references accounts (id) on delete cascade,
    asked       bytea,
    exchange_id uuid not null,
    status      smallint,
    provider    text not null default '',
    model       text not null default '',
    marks       bytea,
    body        bytea,
    usage       jsonb,
    size        integer not null default 0,
    kept_at     timestamptz not null default now(),
    expires_at  timestamptz not null,
    primary key (kind, digest)
);
-- It is compressed already.
alter table answers alter column body set storage external;
comment on table answers is 'Answers that are given again: to the same request (cache), to the same Idempotency-Key (idempotency).';
comment on column answers.digest is 'SHA-256 of the account and all that shapes the answer; or of the account, the path and the Idempotency-Key.';
comment on column answers.asked is 'SHA-256 of what the body said that came with an Idempotency-Key.';
comment on column answers.exchange_id is 'Whose provider was paid for it: the request_id of a row in usage.';
comment on column answers.status is 'HTTP status; null: the answer is being made, by a process that puts expires_at off while it lives.';
comment on column answers.marks is 'Of a stream: for each piece the millisecond at which it came and its bytes, as little-endian uint32; null: it was none.';
comment on column answers.body is 'What the client was sent, as zlib compresses it.';
comment on column answers.usage is 'Tokens that it took, and that each repetition saves.';
comment on column answers.size is 'Bytes that count against GATEWAY_CACHE_MAX_BYTES.';
comment on column answers.expires_at is 'From when on it is as if it were not there, by the clock of the database.';
create index answers_expires_at on answers (expires_at);
create index answers_account_id on answers (account_id, kind, kept_at) include (size);

alter table accounts add column answers_cleared_at timestamptz;
comment on column accounts.answers_cleared_at is 'When its cache was last emptied: what was begun before is not kept.';

-- migrate:down
alter table accounts drop column answers_cleared_at;
drop table answers;

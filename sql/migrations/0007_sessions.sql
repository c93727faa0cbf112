-- migrate:up

-- Whoever waits for a table holds up all who come after, for as long as a dump runs: a start that fails is tried again.
set local lock_timeout = '2s';

create table sessions (
    digest     bytea primary key,
    account_id uuid not null references accounts (id) on delete cascade,
    created_at timestamptz not null,
    expires_at timestamptz not null
);
comment on table sessions is 'Who is signed in with a browser. The token itself is never stored.';
comment on column sessions.digest is 'SHA-256 of the token in the cookie: 32 random bytes, which nobody guesses from it.';
comment on column sessions.expires_at is 'From when on it is refused, by the clock of the database.';
create index sessions_account_id on sessions (account_id, created_at);
create index sessions_expires_at on sessions (expires_at);

-- migrate:down
drop table sessions;

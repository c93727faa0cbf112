-- migrate:up

-- Whoever waits for a table holds up all who come after, for as long as a dump runs: a start that fails is tried again.
set local lock_timeout = '2s';

create table belongings (
    provider   text not null,
    kind       text not null check (kind in ('file', 'batch')),
    id         text not null,
    account_id uuid not null references accounts (id) on delete cascade,
    created_at timestamptz not null default now(),
    primary key (provider, kind, id)
);
comment on table belongings is 'Whose the files and batches are that all accounts keep in the one provider account of the operator.';
comment on column belongings.provider is 'Its name in the provider table.';
comment on column belongings.id is 'The provider''s own, as in file-abc123.';
create index belongings_account_id on belongings (account_id);

-- migrate:down
drop table belongings;

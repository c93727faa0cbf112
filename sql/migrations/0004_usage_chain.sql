-- migrate:up
create table usage_chain (
    seq         bigint primary key,
    at          timestamptz not null,
    width       smallint not null,
    request_ids uuid[] not null,
    started_ats timestamptz[] not null,
    digests     bytea[] not null,
    replaces    boolean not null,
    covers_from timestamptz,
    head        bytea not null
);
comment on table usage_chain is 'One link for every transaction that wrote to table usage, sealed with a key over the link before it: `gateway usage verify`.';
comment on column usage_chain.seq is 'Without gaps; 0 is where the chain begins, and has neither rows nor a head.';
comment on column usage_chain.width is 'Columns of table usage that the digests cover, from the first.';
comment on column usage_chain.request_ids is 'The rows that were written, in the order of started_at; none: only covers_from changed.';
comment on column usage_chain.started_ats is 'Of the same rows: with the request''s id their primary key.';
comment on column usage_chain.digests is 'Of the same rows: HMAC-SHA256 over their values, the first 16 bytes.';
comment on column usage_chain.replaces is 'The rows replace `interrupted` ones, which earlier links name.';
comment on column usage_chain.covers_from is 'Rows that arrived before are not judged: they are older than the chain, or retention dropped their months. Null: all are.';
comment on column usage_chain.head is 'HMAC-SHA256 over the head of the link before and all of the above.';
-- Random bytes do not get smaller.
alter table usage_chain
    alter request_ids set storage external,
    alter digests set storage external;
create index usage_chain_started_ats on usage_chain ((started_ats[1]), (started_ats[cardinality(started_ats)]));

-- Rows that are there already were never sealed, and gateways of before this migration may still write while they are
-- replaced: in a deployment that has rows the chain covers what arrives one to two hours from now.
insert into usage_chain
select 0, now(), 0, '{}', '{}', '{}', false,
    case when exists (select from usage) then date_trunc('hour', now(), 'UTC') + interval '2 hours' end,
    '';

-- Its statements see what was committed while it waited; a subquery beside the lock would not.
create function last_usage_link(out seq bigint, out covers_from timestamptz, out head bytea, out at timestamptz)
language plpgsql as $$
begin
    perform pg_advisory_xact_lock(hashtext('usage_chain'));
    select link.seq, link.covers_from, link.head into seq, covers_from, head
    from usage_chain as link order by link.seq desc limit 1;
    at := clock_timestamp();
end
$$;
comment on function last_usage_link is 'The last link, which stays the last until the transaction ends. Null where the table is empty.';

-- migrate:down
drop function last_usage_link;
drop table usage_chain;

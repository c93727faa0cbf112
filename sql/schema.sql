-- The sum of all migrations, by pg_dump. Written by `make schema`; a test compares.

CREATE FUNCTION public.drop_usage_before(month date) RETURNS integer
    LANGUAGE plpgsql
    SET lock_timeout TO '2s'
    AS $_$
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
$_$;

COMMENT ON FUNCTION public.drop_usage_before(month date) IS 'Drops the rows of all months before this one, as partitions; how many those were.';

CREATE FUNCTION public.fill_usage_rollups() RETURNS void
    LANGUAGE sql
    AS $$
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

COMMENT ON FUNCTION public.fill_usage_rollups() IS 'Makes all rollups anew from usage_hourly.';

CREATE FUNCTION public.last_usage_link(OUT seq bigint, OUT covers_from timestamp with time zone, OUT head bytea, OUT at timestamp with time zone) RETURNS record
    LANGUAGE plpgsql
    AS $$
begin
    perform pg_advisory_xact_lock(hashtext('usage_chain'));
    select link.seq, link.covers_from, link.head into seq, covers_from, head
    from usage_chain as link order by link.seq desc limit 1;
    at := clock_timestamp();
end
$$;

COMMENT ON FUNCTION public.last_usage_link(OUT seq bigint, OUT covers_from timestamp with time zone, OUT head bytea, OUT at timestamp with time zone) IS 'The last link, which stays the last until the transaction ends. Null where the table is empty.';

CREATE FUNCTION public.make_usage_partition(month date) RETURNS boolean
    LANGUAGE plpgsql
    SET lock_timeout TO '2s'
    AS $$
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

COMMENT ON FUNCTION public.make_usage_partition(month date) IS 'Makes the partition of a month; false: it is there already.';

CREATE FUNCTION public.usage_span_begin(span text, moment timestamp with time zone) RETURNS timestamp with time zone
    LANGUAGE sql STABLE
    AS $$
    select case span
        when 'pentad' then
            date_trunc('month', moment, 'UTC')
            + least((extract(day from moment at time zone 'UTC')::integer - 1) / 5, 5) * interval '120 hours'
        else date_trunc(span, moment, 'UTC')
    end
$$;

COMMENT ON FUNCTION public.usage_span_begin(span text, moment timestamp with time zone) IS 'Begin of the hour, day, pentad or month (UTC) that a moment is in. A pentad begins on the 1st, 6th, 11th, 16th, 21st or 26th.';

CREATE AGGREGATE public.sum64(bigint) (
    SFUNC = int8pl,
    STYPE = bigint,
    COMBINEFUNC = int8pl,
    PARALLEL = safe
);

COMMENT ON AGGREGATE public.sum64(bigint) IS 'As sum, but a bigint; an error when it is beyond one. Thousands of groups take half the time.';

CREATE TABLE public.accounts (
    id uuid NOT NULL,
    email text NOT NULL,
    password_hash text NOT NULL,
    role text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    tokens_per_minute bigint DEFAULT 0 NOT NULL,
    tokens_per_day bigint DEFAULT 0 NOT NULL,
    cost_micros_per_day bigint DEFAULT 0 NOT NULL,
    cost_micros_per_month bigint DEFAULT 0 NOT NULL,
    answers_cleared_at timestamp with time zone,
    CONSTRAINT accounts_email_check CHECK ((email = lower(email))),
    CONSTRAINT accounts_role_check CHECK ((role = ANY (ARRAY['admin'::text, 'member'::text])))
);

COMMENT ON TABLE public.accounts IS 'People who own keys. The first one registered is the admin.';

COMMENT ON COLUMN public.accounts.password_hash IS 'Argon2id, PHC string.';

COMMENT ON COLUMN public.accounts.tokens_per_minute IS 'Prompt and completion tokens of all keys together; 0: no limit.';

COMMENT ON COLUMN public.accounts.tokens_per_day IS 'Prompt and completion tokens of all keys in a day (UTC); 0: no limit.';

COMMENT ON COLUMN public.accounts.cost_micros_per_day IS 'Micro-dollars of all keys in a day (UTC); 0: no limit.';

COMMENT ON COLUMN public.accounts.cost_micros_per_month IS 'Micro-dollars of all keys in a month (UTC); 0: no limit.';

COMMENT ON COLUMN public.accounts.answers_cleared_at IS 'When its cache was last emptied: what was begun before is not kept.';

CREATE TABLE public.answers (
    kind text NOT NULL,
    digest bytea NOT NULL,
    account_id uuid NOT NULL,
    asked bytea,
    exchange_id uuid NOT NULL,
    status smallint,
    provider text DEFAULT ''::text NOT NULL,
    model text DEFAULT ''::text NOT NULL,
    marks bytea,
    body bytea,
    usage jsonb,
    size integer DEFAULT 0 NOT NULL,
    kept_at timestamp with time zone DEFAULT now() NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    CONSTRAINT answers_kind_check CHECK ((kind = ANY (ARRAY['cache'::text, 'idempotency'::text])))
);
ALTER TABLE ONLY public.answers ALTER COLUMN body SET STORAGE EXTERNAL;

COMMENT ON TABLE public.answers IS 'Answers that are given again: to the same request (cache), to the same Idempotency-Key (idempotency).';

COMMENT ON COLUMN public.answers.digest IS 'SHA-256 of the account and all that shapes the answer; or of the account, the path and the Idempotency-Key.';

COMMENT ON COLUMN public.answers.asked IS 'SHA-256 of what the body said that came with an Idempotency-Key.';

COMMENT ON COLUMN public.answers.exchange_id IS 'Whose provider was paid for it: the request_id of a row in usage.';

COMMENT ON COLUMN public.answers.status IS 'HTTP status; null: the answer is being made, by a process that puts expires_at off while it lives.';

COMMENT ON COLUMN public.answers.marks IS 'Of a stream: for each piece the millisecond at which it came and its bytes, as little-endian uint32; null: it was none.';

COMMENT ON COLUMN public.answers.body IS 'What the client was sent, as zlib compresses it.';

COMMENT ON COLUMN public.answers.usage IS 'Tokens that it took, and that each repetition saves.';

COMMENT ON COLUMN public.answers.size IS 'Bytes that count against GATEWAY_CACHE_MAX_BYTES.';

COMMENT ON COLUMN public.answers.expires_at IS 'From when on it is as if it were not there, by the clock of the database.';

CREATE TABLE public.belongings (
    provider text NOT NULL,
    kind text NOT NULL,
    id text NOT NULL,
    account_id uuid NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT belongings_kind_check CHECK ((kind = ANY (ARRAY['file'::text, 'batch'::text])))
);

COMMENT ON TABLE public.belongings IS 'Whose the files and batches are that all accounts keep in the one provider account of the operator.';

COMMENT ON COLUMN public.belongings.provider IS 'Its name in the provider table.';

COMMENT ON COLUMN public.belongings.id IS 'The provider''s own, as in file-abc123.';

CREATE TABLE public.keys (
    id text NOT NULL,
    account_id uuid NOT NULL,
    name text NOT NULL,
    digest bytea NOT NULL,
    hash text NOT NULL,
    requests_per_minute integer NOT NULL,
    concurrent_requests integer NOT NULL,
    allowed_models text[] DEFAULT '{}'::text[] NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    revoked_at timestamp with time zone,
    requests_per_second double precision DEFAULT 0 NOT NULL,
    burst integer DEFAULT 0 NOT NULL,
    tokens_per_minute bigint DEFAULT 0 NOT NULL,
    tokens_per_day bigint DEFAULT 0 NOT NULL,
    cost_micros_per_day bigint DEFAULT 0 NOT NULL,
    cost_micros_per_month bigint DEFAULT 0 NOT NULL,
    drain_seconds integer DEFAULT 0 NOT NULL,
    expires_at timestamp with time zone,
    cache_ttl integer DEFAULT 0 NOT NULL,
    CONSTRAINT keys_concurrent_requests_check CHECK ((concurrent_requests >= 0)),
    CONSTRAINT keys_id_check CHECK ((length(id) = 12)),
    CONSTRAINT keys_requests_per_minute_check CHECK ((requests_per_minute >= 0))
);

COMMENT ON TABLE public.keys IS 'API keys. The key itself is never stored: a peppered HMAC of its secret, and its Argon2id hash.';

COMMENT ON COLUMN public.keys.id IS 'The public part of the key, aig_<id>_…';

COMMENT ON COLUMN public.keys.digest IS 'HMAC-SHA256(pepper, secret).';

COMMENT ON COLUMN public.keys.hash IS 'Argon2id of the whole key, PHC string.';

COMMENT ON COLUMN public.keys.requests_per_minute IS 'Sliding window of 60 seconds; 0: no limit.';

COMMENT ON COLUMN public.keys.concurrent_requests IS 'Requests in flight, open streams included; 0: no limit.';

COMMENT ON COLUMN public.keys.allowed_models IS 'Model names or patterns such as gpt-*; empty: all.';

COMMENT ON COLUMN public.keys.requests_per_second IS 'Token bucket, requests that flow in a second; 0: no limit.';

COMMENT ON COLUMN public.keys.burst IS 'Requests that the bucket holds; 0: as many as flow in a second, rounded up.';

COMMENT ON COLUMN public.keys.tokens_per_minute IS 'Prompt and completion tokens; 0: no limit.';

COMMENT ON COLUMN public.keys.tokens_per_day IS 'Prompt and completion tokens of a day (UTC); 0: no limit.';

COMMENT ON COLUMN public.keys.cost_micros_per_day IS 'Micro-dollars of a day (UTC); 0: no limit.';

COMMENT ON COLUMN public.keys.cost_micros_per_month IS 'Micro-dollars of a month (UTC); 0: no limit.';

COMMENT ON COLUMN public.keys.drain_seconds IS 'Seconds that a provider is read on for a client that left; 0: it is closed at once.';

COMMENT ON COLUMN public.keys.expires_at IS 'From when on it is refused, by the clock of the database; null: never.';

COMMENT ON COLUMN public.keys.cache_ttl IS 'Seconds that answers are kept and shared where a request says nothing of it; 0: not at all.';

CREATE TABLE public.secrets (
    name text NOT NULL,
    value bytea NOT NULL
);

COMMENT ON TABLE public.secrets IS 'Secrets that all processes of a deployment share and that no setting gave.';

CREATE TABLE public.sessions (
    digest bytea NOT NULL,
    account_id uuid NOT NULL,
    created_at timestamp with time zone NOT NULL,
    expires_at timestamp with time zone NOT NULL
);

COMMENT ON TABLE public.sessions IS 'Who is signed in with a browser. The token itself is never stored.';

COMMENT ON COLUMN public.sessions.digest IS 'SHA-256 of the token in the cookie: 32 random bytes, which nobody guesses from it.';

COMMENT ON COLUMN public.sessions.expires_at IS 'From when on it is refused, by the clock of the database.';

CREATE TABLE public.usage (
    request_id uuid CONSTRAINT usage_request_id_not_null1 NOT NULL,
    started_at timestamp with time zone CONSTRAINT usage_started_at_not_null1 NOT NULL,
    key_id text CONSTRAINT usage_key_id_not_null1 NOT NULL,
    account_id uuid CONSTRAINT usage_account_id_not_null1 NOT NULL,
    user_id text DEFAULT ''::text CONSTRAINT usage_user_id_not_null1 NOT NULL,
    app_id text DEFAULT ''::text CONSTRAINT usage_app_id_not_null1 NOT NULL,
    client_request_id text DEFAULT ''::text CONSTRAINT usage_client_request_id_not_null1 NOT NULL,
    provider text CONSTRAINT usage_provider_not_null1 NOT NULL,
    model text CONSTRAINT usage_model_not_null1 NOT NULL,
    upstream_model text CONSTRAINT usage_upstream_model_not_null1 NOT NULL,
    stream boolean CONSTRAINT usage_stream_not_null1 NOT NULL,
    status integer CONSTRAINT usage_status_not_null1 NOT NULL,
    outcome text CONSTRAINT usage_outcome_not_null1 NOT NULL,
    error_code text DEFAULT ''::text CONSTRAINT usage_error_code_not_null1 NOT NULL,
    finish_reason text DEFAULT ''::text CONSTRAINT usage_finish_reason_not_null1 NOT NULL,
    prompt_tokens bigint CONSTRAINT usage_prompt_tokens_not_null1 NOT NULL,
    completion_tokens bigint CONSTRAINT usage_completion_tokens_not_null1 NOT NULL,
    cached_tokens bigint DEFAULT 0 CONSTRAINT usage_cached_tokens_not_null1 NOT NULL,
    cache_write_tokens bigint DEFAULT 0 CONSTRAINT usage_cache_write_tokens_not_null1 NOT NULL,
    reasoning_tokens bigint DEFAULT 0 CONSTRAINT usage_reasoning_tokens_not_null1 NOT NULL,
    usage_source text CONSTRAINT usage_usage_source_not_null1 NOT NULL,
    latency_ms integer CONSTRAINT usage_latency_ms_not_null1 NOT NULL,
    ttft_ms integer,
    cost_micros bigint,
    source text DEFAULT 'provider'::text NOT NULL,
    source_id uuid,
    saved_tokens bigint DEFAULT 0 NOT NULL,
    saved_micros bigint
)
PARTITION BY RANGE (started_at);

COMMENT ON TABLE public.usage IS 'One row for every request that reached a provider, or was answered without one. A partition a month (UTC).';

COMMENT ON COLUMN public.usage.request_id IS 'The gateway''s own UUIDv7, X-Request-Id of the response.';

COMMENT ON COLUMN public.usage.user_id IS 'X-User-Id as the client sent it.';

COMMENT ON COLUMN public.usage.app_id IS 'X-App-Id as the client sent it.';

COMMENT ON COLUMN public.usage.model IS 'The name that the client asked for.';

COMMENT ON COLUMN public.usage.upstream_model IS 'The provider''s own name for it.';

COMMENT ON COLUMN public.usage.status IS 'HTTP status that the client saw; 0: it had left before one was sent.';

COMMENT ON COLUMN public.usage.outcome IS 'interrupted: the gateway went down; the row may be replaced by a better one.';

COMMENT ON COLUMN public.usage.cached_tokens IS 'Part of prompt_tokens.';

COMMENT ON COLUMN public.usage.cache_write_tokens IS 'Part of prompt_tokens.';

COMMENT ON COLUMN public.usage.reasoning_tokens IS 'Part of completion_tokens.';

COMMENT ON COLUMN public.usage.usage_source IS 'Who counted the tokens; none: no provider was asked, so there are none.';

COMMENT ON COLUMN public.usage.ttft_ms IS 'From the request''s arrival to the first text of the model; null: none came.';

COMMENT ON COLUMN public.usage.cost_micros IS 'Micro-dollars, a millionth of a US dollar; null: no price is known.';

COMMENT ON COLUMN public.usage.source IS 'Who made the answer: provider; else nobody for this request: cache, shared (with one in flight) or replay (of its Idempotency-Key).';

COMMENT ON COLUMN public.usage.source_id IS 'The request whose provider made it, and that paid; null: this one.';

COMMENT ON COLUMN public.usage.saved_tokens IS 'Of prompt and completion, which it would have used by itself.';

COMMENT ON COLUMN public.usage.saved_micros IS 'Micro-dollars that these would have cost; null: nothing was saved, or no price is known.';

CREATE TABLE public.usage_hourly (
    account_id uuid NOT NULL,
    hour timestamp with time zone NOT NULL,
    key_id text NOT NULL,
    user_id text NOT NULL,
    app_id text NOT NULL,
    provider text NOT NULL,
    model text NOT NULL,
    requests bigint NOT NULL,
    errors bigint NOT NULL,
    client_aborts bigint NOT NULL,
    prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    cached_tokens bigint NOT NULL,
    cache_write_tokens bigint NOT NULL,
    reasoning_tokens bigint NOT NULL,
    cost_micros bigint NOT NULL,
    unpriced bigint NOT NULL,
    latency_ms bigint NOT NULL,
    latency_count bigint NOT NULL,
    ttft_ms bigint NOT NULL,
    ttft_count bigint NOT NULL,
    remembered bigint DEFAULT 0 NOT NULL,
    saved_tokens bigint DEFAULT 0 NOT NULL,
    saved_micros bigint DEFAULT 0 NOT NULL
)
WITH (fillfactor='70');

COMMENT ON TABLE public.usage_hourly IS 'The sums of table usage by hour, written with it in one transaction; kept when its months are dropped.';

COMMENT ON COLUMN public.usage_hourly.hour IS 'Begin of the hour (UTC) in which the requests arrived.';

COMMENT ON COLUMN public.usage_hourly.requests IS 'Rows of table usage.';

COMMENT ON COLUMN public.usage_hourly.errors IS 'Requests that ended neither well, nor by the client''s leaving, nor by a budget.';

COMMENT ON COLUMN public.usage_hourly.client_aborts IS 'Requests whose client left first.';

COMMENT ON COLUMN public.usage_hourly.prompt_tokens IS 'Cached and cache-write tokens included.';

COMMENT ON COLUMN public.usage_hourly.completion_tokens IS 'Reasoning tokens included.';

COMMENT ON COLUMN public.usage_hourly.cached_tokens IS 'Part of prompt_tokens.';

COMMENT ON COLUMN public.usage_hourly.cache_write_tokens IS 'Part of prompt_tokens.';

COMMENT ON COLUMN public.usage_hourly.reasoning_tokens IS 'Part of completion_tokens.';

COMMENT ON COLUMN public.usage_hourly.cost_micros IS 'Micro-dollars of the requests that have a price.';

COMMENT ON COLUMN public.usage_hourly.unpriced IS 'Requests for which no price is known.';

COMMENT ON COLUMN public.usage_hourly.latency_ms IS 'Sum over latency_count requests.';

COMMENT ON COLUMN public.usage_hourly.latency_count IS 'Requests that a provider was asked for, but those whose end nobody saw.';

COMMENT ON COLUMN public.usage_hourly.ttft_ms IS 'Sum over ttft_count requests.';

COMMENT ON COLUMN public.usage_hourly.ttft_count IS 'Requests that a provider was asked for and that got a first text.';

COMMENT ON COLUMN public.usage_hourly.remembered IS 'Requests that were answered without a provider, and were no errors.';

COMMENT ON COLUMN public.usage_hourly.saved_tokens IS 'Of prompt and completion, which requests that no provider was asked for would have used.';

COMMENT ON COLUMN public.usage_hourly.saved_micros IS 'Micro-dollars that these would have cost, where a price is known.';

CREATE TABLE public.usage_rollups (
    rollup text NOT NULL,
    account_id uuid NOT NULL,
    start timestamp with time zone NOT NULL,
    key_id text NOT NULL,
    user_id text NOT NULL,
    app_id text NOT NULL,
    provider text NOT NULL,
    model text NOT NULL,
    requests bigint NOT NULL,
    errors bigint NOT NULL,
    client_aborts bigint NOT NULL,
    prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    cached_tokens bigint NOT NULL,
    cache_write_tokens bigint NOT NULL,
    reasoning_tokens bigint NOT NULL,
    cost_micros bigint NOT NULL,
    unpriced bigint NOT NULL,
    latency_ms bigint NOT NULL,
    latency_count bigint NOT NULL,
    ttft_ms bigint NOT NULL,
    ttft_count bigint NOT NULL,
    remembered bigint DEFAULT 0 NOT NULL,
    saved_tokens bigint DEFAULT 0 NOT NULL,
    saved_micros bigint DEFAULT 0 NOT NULL
)
PARTITION BY LIST (rollup);

COMMENT ON TABLE public.usage_rollups IS 'Sums of usage_hourly, written with it in one transaction; kept when months of rows are dropped.';

COMMENT ON COLUMN public.usage_rollups.rollup IS 'Span and what is told apart: model (and provider, app), key (and these), user (alone), all. The rest is empty.';

COMMENT ON COLUMN public.usage_rollups.account_id IS 'Zero in the rollups by model: they are of all accounts together.';

COMMENT ON COLUMN public.usage_rollups.start IS 'Begin of the hour, day, pentad or month (UTC) in which the requests arrived.';

COMMENT ON COLUMN public.usage_rollups.requests IS 'This and all that follow: as in usage_hourly.';

CREATE VIEW public.usage_cells AS
 SELECT usage_rollups.rollup AS source,
    usage_rollups.account_id,
    usage_rollups.start,
    usage_rollups.key_id,
    usage_rollups.user_id,
    usage_rollups.app_id,
    usage_rollups.provider,
    usage_rollups.model,
    usage_rollups.requests,
    usage_rollups.errors,
    usage_rollups.client_aborts,
    usage_rollups.prompt_tokens,
    usage_rollups.completion_tokens,
    usage_rollups.cached_tokens,
    usage_rollups.cache_write_tokens,
    usage_rollups.reasoning_tokens,
    usage_rollups.cost_micros,
    usage_rollups.unpriced,
    usage_rollups.latency_ms,
    usage_rollups.latency_count,
    usage_rollups.ttft_ms,
    usage_rollups.ttft_count,
    usage_rollups.remembered,
    usage_rollups.saved_tokens,
    usage_rollups.saved_micros
   FROM public.usage_rollups
UNION ALL
 SELECT 'hour'::text AS source,
    usage_hourly.account_id,
    usage_hourly.hour AS start,
    usage_hourly.key_id,
    usage_hourly.user_id,
    usage_hourly.app_id,
    usage_hourly.provider,
    usage_hourly.model,
    usage_hourly.requests,
    usage_hourly.errors,
    usage_hourly.client_aborts,
    usage_hourly.prompt_tokens,
    usage_hourly.completion_tokens,
    usage_hourly.cached_tokens,
    usage_hourly.cache_write_tokens,
    usage_hourly.reasoning_tokens,
    usage_hourly.cost_micros,
    usage_hourly.unpriced,
    usage_hourly.latency_ms,
    usage_hourly.latency_count,
    usage_hourly.ttft_ms,
    usage_hourly.ttft_count,
    usage_hourly.remembered,
    usage_hourly.saved_tokens,
    usage_hourly.saved_micros
   FROM public.usage_hourly
UNION ALL
 SELECT 'row'::text AS source,
    usage.account_id,
    usage.started_at AS start,
    usage.key_id,
    usage.user_id,
    usage.app_id,
    usage.provider,
    usage.model,
    (1)::bigint AS requests,
    (((usage.outcome <> ALL (ARRAY['ok'::text, 'client_abort'::text, 'budget_exhausted'::text])))::integer)::bigint AS errors,
    (((usage.outcome = 'client_abort'::text))::integer)::bigint AS client_aborts,
    usage.prompt_tokens,
    usage.completion_tokens,
    usage.cached_tokens,
    usage.cache_write_tokens,
    usage.reasoning_tokens,
    COALESCE(usage.cost_micros, (0)::bigint) AS cost_micros,
    (((usage.cost_micros IS NULL))::integer)::bigint AS unpriced,
    (
        CASE usage.source
            WHEN 'provider'::text THEN usage.latency_ms
            ELSE 0
        END)::bigint AS latency_ms,
    ((((usage.source = 'provider'::text) AND ((usage.outcome <> 'interrupted'::text) OR (usage.latency_ms > 0))))::integer)::bigint AS latency_count,
    (
        CASE usage.source
            WHEN 'provider'::text THEN COALESCE(usage.ttft_ms, 0)
            ELSE 0
        END)::bigint AS ttft_ms,
    ((((usage.source = 'provider'::text) AND (usage.ttft_ms IS NOT NULL)))::integer)::bigint AS ttft_count,
    ((((usage.source <> 'provider'::text) AND (usage.outcome = ANY (ARRAY['ok'::text, 'client_abort'::text, 'budget_exhausted'::text]))))::integer)::bigint AS remembered,
    usage.saved_tokens,
    COALESCE(usage.saved_micros, (0)::bigint) AS saved_micros
   FROM public.usage;

COMMENT ON VIEW public.usage_cells IS 'All that figures are made of, from single rows to months: name the source, or all is counted many times.';

CREATE TABLE public.usage_chain (
    seq bigint NOT NULL,
    at timestamp with time zone NOT NULL,
    width smallint NOT NULL,
    request_ids uuid[] NOT NULL,
    started_ats timestamp with time zone[] NOT NULL,
    digests bytea[] NOT NULL,
    replaces boolean NOT NULL,
    covers_from timestamp with time zone,
    head bytea NOT NULL
);
ALTER TABLE ONLY public.usage_chain ALTER COLUMN request_ids SET STORAGE EXTERNAL;
ALTER TABLE ONLY public.usage_chain ALTER COLUMN digests SET STORAGE EXTERNAL;

COMMENT ON TABLE public.usage_chain IS 'One link for every transaction that wrote to table usage, sealed with a key over the link before it: `gateway usage verify`.';

COMMENT ON COLUMN public.usage_chain.seq IS 'Without gaps; 0 is where the chain begins, and has neither rows nor a head.';

COMMENT ON COLUMN public.usage_chain.width IS 'Columns of table usage that the digests cover, from the first.';

COMMENT ON COLUMN public.usage_chain.request_ids IS 'The rows that were written, in the order of started_at; none: only covers_from changed.';

COMMENT ON COLUMN public.usage_chain.started_ats IS 'Of the same rows: with the request''s id their primary key.';

COMMENT ON COLUMN public.usage_chain.digests IS 'Of the same rows: HMAC-SHA256 over their values, the first 16 bytes.';

COMMENT ON COLUMN public.usage_chain.replaces IS 'The rows replace `interrupted` ones, which earlier links name.';

COMMENT ON COLUMN public.usage_chain.covers_from IS 'Rows that arrived before are not judged: they are older than the chain, or retention dropped their months. Null: all are.';

COMMENT ON COLUMN public.usage_chain.head IS 'HMAC-SHA256 over the head of the link before and all of the above.';

CREATE TABLE public.usage_day_by_all (
    rollup text CONSTRAINT usage_rollups_rollup_not_null NOT NULL,
    account_id uuid CONSTRAINT usage_rollups_account_id_not_null NOT NULL,
    start timestamp with time zone CONSTRAINT usage_rollups_start_not_null NOT NULL,
    key_id text CONSTRAINT usage_rollups_key_id_not_null NOT NULL,
    user_id text CONSTRAINT usage_rollups_user_id_not_null NOT NULL,
    app_id text CONSTRAINT usage_rollups_app_id_not_null NOT NULL,
    provider text CONSTRAINT usage_rollups_provider_not_null NOT NULL,
    model text CONSTRAINT usage_rollups_model_not_null NOT NULL,
    requests bigint CONSTRAINT usage_rollups_requests_not_null NOT NULL,
    errors bigint CONSTRAINT usage_rollups_errors_not_null NOT NULL,
    client_aborts bigint CONSTRAINT usage_rollups_client_aborts_not_null NOT NULL,
    prompt_tokens bigint CONSTRAINT usage_rollups_prompt_tokens_not_null NOT NULL,
    completion_tokens bigint CONSTRAINT usage_rollups_completion_tokens_not_null NOT NULL,
    cached_tokens bigint CONSTRAINT usage_rollups_cached_tokens_not_null NOT NULL,
    cache_write_tokens bigint CONSTRAINT usage_rollups_cache_write_tokens_not_null NOT NULL,
    reasoning_tokens bigint CONSTRAINT usage_rollups_reasoning_tokens_not_null NOT NULL,
    cost_micros bigint CONSTRAINT usage_rollups_cost_micros_not_null NOT NULL,
    unpriced bigint CONSTRAINT usage_rollups_unpriced_not_null NOT NULL,
    latency_ms bigint CONSTRAINT usage_rollups_latency_ms_not_null NOT NULL,
    latency_count bigint CONSTRAINT usage_rollups_latency_count_not_null NOT NULL,
    ttft_ms bigint CONSTRAINT usage_rollups_ttft_ms_not_null NOT NULL,
    ttft_count bigint CONSTRAINT usage_rollups_ttft_count_not_null NOT NULL,
    remembered bigint DEFAULT 0 CONSTRAINT usage_rollups_remembered_not_null NOT NULL,
    saved_tokens bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_tokens_not_null NOT NULL,
    saved_micros bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_micros_not_null NOT NULL
)
WITH (fillfactor='70');

CREATE TABLE public.usage_day_by_key (
    rollup text CONSTRAINT usage_rollups_rollup_not_null NOT NULL,
    account_id uuid CONSTRAINT usage_rollups_account_id_not_null NOT NULL,
    start timestamp with time zone CONSTRAINT usage_rollups_start_not_null NOT NULL,
    key_id text CONSTRAINT usage_rollups_key_id_not_null NOT NULL,
    user_id text CONSTRAINT usage_rollups_user_id_not_null NOT NULL,
    app_id text CONSTRAINT usage_rollups_app_id_not_null NOT NULL,
    provider text CONSTRAINT usage_rollups_provider_not_null NOT NULL,
    model text CONSTRAINT usage_rollups_model_not_null NOT NULL,
    requests bigint CONSTRAINT usage_rollups_requests_not_null NOT NULL,
    errors bigint CONSTRAINT usage_rollups_errors_not_null NOT NULL,
    client_aborts bigint CONSTRAINT usage_rollups_client_aborts_not_null NOT NULL,
    prompt_tokens bigint CONSTRAINT usage_rollups_prompt_tokens_not_null NOT NULL,
    completion_tokens bigint CONSTRAINT usage_rollups_completion_tokens_not_null NOT NULL,
    cached_tokens bigint CONSTRAINT usage_rollups_cached_tokens_not_null NOT NULL,
    cache_write_tokens bigint CONSTRAINT usage_rollups_cache_write_tokens_not_null NOT NULL,
    reasoning_tokens bigint CONSTRAINT usage_rollups_reasoning_tokens_not_null NOT NULL,
    cost_micros bigint CONSTRAINT usage_rollups_cost_micros_not_null NOT NULL,
    unpriced bigint CONSTRAINT usage_rollups_unpriced_not_null NOT NULL,
    latency_ms bigint CONSTRAINT usage_rollups_latency_ms_not_null NOT NULL,
    latency_count bigint CONSTRAINT usage_rollups_latency_count_not_null NOT NULL,
    ttft_ms bigint CONSTRAINT usage_rollups_ttft_ms_not_null NOT NULL,
    ttft_count bigint CONSTRAINT usage_rollups_ttft_count_not_null NOT NULL,
    remembered bigint DEFAULT 0 CONSTRAINT usage_rollups_remembered_not_null NOT NULL,
    saved_tokens bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_tokens_not_null NOT NULL,
    saved_micros bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_micros_not_null NOT NULL
)
WITH (fillfactor='70');

CREATE TABLE public.usage_day_by_model (
    rollup text CONSTRAINT usage_rollups_rollup_not_null NOT NULL,
    account_id uuid CONSTRAINT usage_rollups_account_id_not_null NOT NULL,
    start timestamp with time zone CONSTRAINT usage_rollups_start_not_null NOT NULL,
    key_id text CONSTRAINT usage_rollups_key_id_not_null NOT NULL,
    user_id text CONSTRAINT usage_rollups_user_id_not_null NOT NULL,
    app_id text CONSTRAINT usage_rollups_app_id_not_null NOT NULL,
    provider text CONSTRAINT usage_rollups_provider_not_null NOT NULL,
    model text CONSTRAINT usage_rollups_model_not_null NOT NULL,
    requests bigint CONSTRAINT usage_rollups_requests_not_null NOT NULL,
    errors bigint CONSTRAINT usage_rollups_errors_not_null NOT NULL,
    client_aborts bigint CONSTRAINT usage_rollups_client_aborts_not_null NOT NULL,
    prompt_tokens bigint CONSTRAINT usage_rollups_prompt_tokens_not_null NOT NULL,
    completion_tokens bigint CONSTRAINT usage_rollups_completion_tokens_not_null NOT NULL,
    cached_tokens bigint CONSTRAINT usage_rollups_cached_tokens_not_null NOT NULL,
    cache_write_tokens bigint CONSTRAINT usage_rollups_cache_write_tokens_not_null NOT NULL,
    reasoning_tokens bigint CONSTRAINT usage_rollups_reasoning_tokens_not_null NOT NULL,
    cost_micros bigint CONSTRAINT usage_rollups_cost_micros_not_null NOT NULL,
    unpriced bigint CONSTRAINT usage_rollups_unpriced_not_null NOT NULL,
    latency_ms bigint CONSTRAINT usage_rollups_latency_ms_not_null NOT NULL,
    latency_count bigint CONSTRAINT usage_rollups_latency_count_not_null NOT NULL,
    ttft_ms bigint CONSTRAINT usage_rollups_ttft_ms_not_null NOT NULL,
    ttft_count bigint CONSTRAINT usage_rollups_ttft_count_not_null NOT NULL,
    remembered bigint DEFAULT 0 CONSTRAINT usage_rollups_remembered_not_null NOT NULL,
    saved_tokens bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_tokens_not_null NOT NULL,
    saved_micros bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_micros_not_null NOT NULL
)
WITH (fillfactor='70');

CREATE TABLE public.usage_day_by_user (
    rollup text CONSTRAINT usage_rollups_rollup_not_null NOT NULL,
    account_id uuid CONSTRAINT usage_rollups_account_id_not_null NOT NULL,
    start timestamp with time zone CONSTRAINT usage_rollups_start_not_null NOT NULL,
    key_id text CONSTRAINT usage_rollups_key_id_not_null NOT NULL,
    user_id text CONSTRAINT usage_rollups_user_id_not_null NOT NULL,
    app_id text CONSTRAINT usage_rollups_app_id_not_null NOT NULL,
    provider text CONSTRAINT usage_rollups_provider_not_null NOT NULL,
    model text CONSTRAINT usage_rollups_model_not_null NOT NULL,
    requests bigint CONSTRAINT usage_rollups_requests_not_null NOT NULL,
    errors bigint CONSTRAINT usage_rollups_errors_not_null NOT NULL,
    client_aborts bigint CONSTRAINT usage_rollups_client_aborts_not_null NOT NULL,
    prompt_tokens bigint CONSTRAINT usage_rollups_prompt_tokens_not_null NOT NULL,
    completion_tokens bigint CONSTRAINT usage_rollups_completion_tokens_not_null NOT NULL,
    cached_tokens bigint CONSTRAINT usage_rollups_cached_tokens_not_null NOT NULL,
    cache_write_tokens bigint CONSTRAINT usage_rollups_cache_write_tokens_not_null NOT NULL,
    reasoning_tokens bigint CONSTRAINT usage_rollups_reasoning_tokens_not_null NOT NULL,
    cost_micros bigint CONSTRAINT usage_rollups_cost_micros_not_null NOT NULL,
    unpriced bigint CONSTRAINT usage_rollups_unpriced_not_null NOT NULL,
    latency_ms bigint CONSTRAINT usage_rollups_latency_ms_not_null NOT NULL,
    latency_count bigint CONSTRAINT usage_rollups_latency_count_not_null NOT NULL,
    ttft_ms bigint CONSTRAINT usage_rollups_ttft_ms_not_null NOT NULL,
    ttft_count bigint CONSTRAINT usage_rollups_ttft_count_not_null NOT NULL,
    remembered bigint DEFAULT 0 CONSTRAINT usage_rollups_remembered_not_null NOT NULL,
    saved_tokens bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_tokens_not_null NOT NULL,
    saved_micros bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_micros_not_null NOT NULL
)
WITH (fillfactor='70');

CREATE TABLE public.usage_default (
    request_id uuid CONSTRAINT usage_request_id_not_null1 NOT NULL,
    started_at timestamp with time zone CONSTRAINT usage_started_at_not_null1 NOT NULL,
    key_id text CONSTRAINT usage_key_id_not_null1 NOT NULL,
    account_id uuid CONSTRAINT usage_account_id_not_null1 NOT NULL,
    user_id text DEFAULT ''::text CONSTRAINT usage_user_id_not_null1 NOT NULL,
    app_id text DEFAULT ''::text CONSTRAINT usage_app_id_not_null1 NOT NULL,
    client_request_id text DEFAULT ''::text CONSTRAINT usage_client_request_id_not_null1 NOT NULL,
    provider text CONSTRAINT usage_provider_not_null1 NOT NULL,
    model text CONSTRAINT usage_model_not_null1 NOT NULL,
    upstream_model text CONSTRAINT usage_upstream_model_not_null1 NOT NULL,
    stream boolean CONSTRAINT usage_stream_not_null1 NOT NULL,
    status integer CONSTRAINT usage_status_not_null1 NOT NULL,
    outcome text CONSTRAINT usage_outcome_not_null1 NOT NULL,
    error_code text DEFAULT ''::text CONSTRAINT usage_error_code_not_null1 NOT NULL,
    finish_reason text DEFAULT ''::text CONSTRAINT usage_finish_reason_not_null1 NOT NULL,
    prompt_tokens bigint CONSTRAINT usage_prompt_tokens_not_null1 NOT NULL,
    completion_tokens bigint CONSTRAINT usage_completion_tokens_not_null1 NOT NULL,
    cached_tokens bigint DEFAULT 0 CONSTRAINT usage_cached_tokens_not_null1 NOT NULL,
    cache_write_tokens bigint DEFAULT 0 CONSTRAINT usage_cache_write_tokens_not_null1 NOT NULL,
    reasoning_tokens bigint DEFAULT 0 CONSTRAINT usage_reasoning_tokens_not_null1 NOT NULL,
    usage_source text CONSTRAINT usage_usage_source_not_null1 NOT NULL,
    latency_ms integer CONSTRAINT usage_latency_ms_not_null1 NOT NULL,
    ttft_ms integer,
    cost_micros bigint,
    source text DEFAULT 'provider'::text CONSTRAINT usage_source_not_null NOT NULL,
    source_id uuid,
    saved_tokens bigint DEFAULT 0 CONSTRAINT usage_saved_tokens_not_null NOT NULL,
    saved_micros bigint
);

CREATE TABLE public.usage_hour_by_model (
    rollup text CONSTRAINT usage_rollups_rollup_not_null NOT NULL,
    account_id uuid CONSTRAINT usage_rollups_account_id_not_null NOT NULL,
    start timestamp with time zone CONSTRAINT usage_rollups_start_not_null NOT NULL,
    key_id text CONSTRAINT usage_rollups_key_id_not_null NOT NULL,
    user_id text CONSTRAINT usage_rollups_user_id_not_null NOT NULL,
    app_id text CONSTRAINT usage_rollups_app_id_not_null NOT NULL,
    provider text CONSTRAINT usage_rollups_provider_not_null NOT NULL,
    model text CONSTRAINT usage_rollups_model_not_null NOT NULL,
    requests bigint CONSTRAINT usage_rollups_requests_not_null NOT NULL,
    errors bigint CONSTRAINT usage_rollups_errors_not_null NOT NULL,
    client_aborts bigint CONSTRAINT usage_rollups_client_aborts_not_null NOT NULL,
    prompt_tokens bigint CONSTRAINT usage_rollups_prompt_tokens_not_null NOT NULL,
    completion_tokens bigint CONSTRAINT usage_rollups_completion_tokens_not_null NOT NULL,
    cached_tokens bigint CONSTRAINT usage_rollups_cached_tokens_not_null NOT NULL,
    cache_write_tokens bigint CONSTRAINT usage_rollups_cache_write_tokens_not_null NOT NULL,
    reasoning_tokens bigint CONSTRAINT usage_rollups_reasoning_tokens_not_null NOT NULL,
    cost_micros bigint CONSTRAINT usage_rollups_cost_micros_not_null NOT NULL,
    unpriced bigint CONSTRAINT usage_rollups_unpriced_not_null NOT NULL,
    latency_ms bigint CONSTRAINT usage_rollups_latency_ms_not_null NOT NULL,
    latency_count bigint CONSTRAINT usage_rollups_latency_count_not_null NOT NULL,
    ttft_ms bigint CONSTRAINT usage_rollups_ttft_ms_not_null NOT NULL,
    ttft_count bigint CONSTRAINT usage_rollups_ttft_count_not_null NOT NULL,
    remembered bigint DEFAULT 0 CONSTRAINT usage_rollups_remembered_not_null NOT NULL,
    saved_tokens bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_tokens_not_null NOT NULL,
    saved_micros bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_micros_not_null NOT NULL
)
WITH (fillfactor='70');

CREATE TABLE public.usage_month_by_all (
    rollup text CONSTRAINT usage_rollups_rollup_not_null NOT NULL,
    account_id uuid CONSTRAINT usage_rollups_account_id_not_null NOT NULL,
    start timestamp with time zone CONSTRAINT usage_rollups_start_not_null NOT NULL,
    key_id text CONSTRAINT usage_rollups_key_id_not_null NOT NULL,
    user_id text CONSTRAINT usage_rollups_user_id_not_null NOT NULL,
    app_id text CONSTRAINT usage_rollups_app_id_not_null NOT NULL,
    provider text CONSTRAINT usage_rollups_provider_not_null NOT NULL,
    model text CONSTRAINT usage_rollups_model_not_null NOT NULL,
    requests bigint CONSTRAINT usage_rollups_requests_not_null NOT NULL,
    errors bigint CONSTRAINT usage_rollups_errors_not_null NOT NULL,
    client_aborts bigint CONSTRAINT usage_rollups_client_aborts_not_null NOT NULL,
    prompt_tokens bigint CONSTRAINT usage_rollups_prompt_tokens_not_null NOT NULL,
    completion_tokens bigint CONSTRAINT usage_rollups_completion_tokens_not_null NOT NULL,
    cached_tokens bigint CONSTRAINT usage_rollups_cached_tokens_not_null NOT NULL,
    cache_write_tokens bigint CONSTRAINT usage_rollups_cache_write_tokens_not_null NOT NULL,
    reasoning_tokens bigint CONSTRAINT usage_rollups_reasoning_tokens_not_null NOT NULL,
    cost_micros bigint CONSTRAINT usage_rollups_cost_micros_not_null NOT NULL,
    unpriced bigint CONSTRAINT usage_rollups_unpriced_not_null NOT NULL,
    latency_ms bigint CONSTRAINT usage_rollups_latency_ms_not_null NOT NULL,
    latency_count bigint CONSTRAINT usage_rollups_latency_count_not_null NOT NULL,
    ttft_ms bigint CONSTRAINT usage_rollups_ttft_ms_not_null NOT NULL,
    ttft_count bigint CONSTRAINT usage_rollups_ttft_count_not_null NOT NULL,
    remembered bigint DEFAULT 0 CONSTRAINT usage_rollups_remembered_not_null NOT NULL,
    saved_tokens bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_tokens_not_null NOT NULL,
    saved_micros bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_micros_not_null NOT NULL
)
WITH (fillfactor='70');

CREATE TABLE public.usage_month_by_key (
    rollup text CONSTRAINT usage_rollups_rollup_not_null NOT NULL,
    account_id uuid CONSTRAINT usage_rollups_account_id_not_null NOT NULL,
    start timestamp with time zone CONSTRAINT usage_rollups_start_not_null NOT NULL,
    key_id text CONSTRAINT usage_rollups_key_id_not_null NOT NULL,
    user_id text CONSTRAINT usage_rollups_user_id_not_null NOT NULL,
    app_id text CONSTRAINT usage_rollups_app_id_not_null NOT NULL,
    provider text CONSTRAINT usage_rollups_provider_not_null NOT NULL,
    model text CONSTRAINT usage_rollups_model_not_null NOT NULL,
    requests bigint CONSTRAINT usage_rollups_requests_not_null NOT NULL,
    errors bigint CONSTRAINT usage_rollups_errors_not_null NOT NULL,
    client_aborts bigint CONSTRAINT usage_rollups_client_aborts_not_null NOT NULL,
    prompt_tokens bigint CONSTRAINT usage_rollups_prompt_tokens_not_null NOT NULL,
    completion_tokens bigint CONSTRAINT usage_rollups_completion_tokens_not_null NOT NULL,
    cached_tokens bigint CONSTRAINT usage_rollups_cached_tokens_not_null NOT NULL,
    cache_write_tokens bigint CONSTRAINT usage_rollups_cache_write_tokens_not_null NOT NULL,
    reasoning_tokens bigint CONSTRAINT usage_rollups_reasoning_tokens_not_null NOT NULL,
    cost_micros bigint CONSTRAINT usage_rollups_cost_micros_not_null NOT NULL,
    unpriced bigint CONSTRAINT usage_rollups_unpriced_not_null NOT NULL,
    latency_ms bigint CONSTRAINT usage_rollups_latency_ms_not_null NOT NULL,
    latency_count bigint CONSTRAINT usage_rollups_latency_count_not_null NOT NULL,
    ttft_ms bigint CONSTRAINT usage_rollups_ttft_ms_not_null NOT NULL,
    ttft_count bigint CONSTRAINT usage_rollups_ttft_count_not_null NOT NULL,
    remembered bigint DEFAULT 0 CONSTRAINT usage_rollups_remembered_not_null NOT NULL,
    saved_tokens bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_tokens_not_null NOT NULL,
    saved_micros bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_micros_not_null NOT NULL
)
WITH (fillfactor='70');

CREATE TABLE public.usage_month_by_model (
    rollup text CONSTRAINT usage_rollups_rollup_not_null NOT NULL,
    account_id uuid CONSTRAINT usage_rollups_account_id_not_null NOT NULL,
    start timestamp with time zone CONSTRAINT usage_rollups_start_not_null NOT NULL,
    key_id text CONSTRAINT usage_rollups_key_id_not_null NOT NULL,
    user_id text CONSTRAINT usage_rollups_user_id_not_null NOT NULL,
    app_id text CONSTRAINT usage_rollups_app_id_not_null NOT NULL,
    provider text CONSTRAINT usage_rollups_provider_not_null NOT NULL,
    model text CONSTRAINT usage_rollups_model_not_null NOT NULL,
    requests bigint CONSTRAINT usage_rollups_requests_not_null NOT NULL,
    errors bigint CONSTRAINT usage_rollups_errors_not_null NOT NULL,
    client_aborts bigint CONSTRAINT usage_rollups_client_aborts_not_null NOT NULL,
    prompt_tokens bigint CONSTRAINT usage_rollups_prompt_tokens_not_null NOT NULL,
    completion_tokens bigint CONSTRAINT usage_rollups_completion_tokens_not_null NOT NULL,
    cached_tokens bigint CONSTRAINT usage_rollups_cached_tokens_not_null NOT NULL,
    cache_write_tokens bigint CONSTRAINT usage_rollups_cache_write_tokens_not_null NOT NULL,
    reasoning_tokens bigint CONSTRAINT usage_rollups_reasoning_tokens_not_null NOT NULL,
    cost_micros bigint CONSTRAINT usage_rollups_cost_micros_not_null NOT NULL,
    unpriced bigint CONSTRAINT usage_rollups_unpriced_not_null NOT NULL,
    latency_ms bigint CONSTRAINT usage_rollups_latency_ms_not_null NOT NULL,
    latency_count bigint CONSTRAINT usage_rollups_latency_count_not_null NOT NULL,
    ttft_ms bigint CONSTRAINT usage_rollups_ttft_ms_not_null NOT NULL,
    ttft_count bigint CONSTRAINT usage_rollups_ttft_count_not_null NOT NULL,
    remembered bigint DEFAULT 0 CONSTRAINT usage_rollups_remembered_not_null NOT NULL,
    saved_tokens bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_tokens_not_null NOT NULL,
    saved_micros bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_micros_not_null NOT NULL
)
WITH (fillfactor='70');

CREATE TABLE public.usage_month_by_user (
    rollup text CONSTRAINT usage_rollups_rollup_not_null NOT NULL,
    account_id uuid CONSTRAINT usage_rollups_account_id_not_null NOT NULL,
    start timestamp with time zone CONSTRAINT usage_rollups_start_not_null NOT NULL,
    key_id text CONSTRAINT usage_rollups_key_id_not_null NOT NULL,
    user_id text CONSTRAINT usage_rollups_user_id_not_null NOT NULL,
    app_id text CONSTRAINT usage_rollups_app_id_not_null NOT NULL,
    provider text CONSTRAINT usage_rollups_provider_not_null NOT NULL,
    model text CONSTRAINT usage_rollups_model_not_null NOT NULL,
    requests bigint CONSTRAINT usage_rollups_requests_not_null NOT NULL,
    errors bigint CONSTRAINT usage_rollups_errors_not_null NOT NULL,
    client_aborts bigint CONSTRAINT usage_rollups_client_aborts_not_null NOT NULL,
    prompt_tokens bigint CONSTRAINT usage_rollups_prompt_tokens_not_null NOT NULL,
    completion_tokens bigint CONSTRAINT usage_rollups_completion_tokens_not_null NOT NULL,
    cached_tokens bigint CONSTRAINT usage_rollups_cached_tokens_not_null NOT NULL,
    cache_write_tokens bigint CONSTRAINT usage_rollups_cache_write_tokens_not_null NOT NULL,
    reasoning_tokens bigint CONSTRAINT usage_rollups_reasoning_tokens_not_null NOT NULL,
    cost_micros bigint CONSTRAINT usage_rollups_cost_micros_not_null NOT NULL,
    unpriced bigint CONSTRAINT usage_rollups_unpriced_not_null NOT NULL,
    latency_ms bigint CONSTRAINT usage_rollups_latency_ms_not_null NOT NULL,
    latency_count bigint CONSTRAINT usage_rollups_latency_count_not_null NOT NULL,
    ttft_ms bigint CONSTRAINT usage_rollups_ttft_ms_not_null NOT NULL,
    ttft_count bigint CONSTRAINT usage_rollups_ttft_count_not_null NOT NULL,
    remembered bigint DEFAULT 0 CONSTRAINT usage_rollups_remembered_not_null NOT NULL,
    saved_tokens bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_tokens_not_null NOT NULL,
    saved_micros bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_micros_not_null NOT NULL
)
WITH (fillfactor='70');

CREATE TABLE public.usage_pentad_by_all (
    rollup text CONSTRAINT usage_rollups_rollup_not_null NOT NULL,
    account_id uuid CONSTRAINT usage_rollups_account_id_not_null NOT NULL,
    start timestamp with time zone CONSTRAINT usage_rollups_start_not_null NOT NULL,
    key_id text CONSTRAINT usage_rollups_key_id_not_null NOT NULL,
    user_id text CONSTRAINT usage_rollups_user_id_not_null NOT NULL,
    app_id text CONSTRAINT usage_rollups_app_id_not_null NOT NULL,
    provider text CONSTRAINT usage_rollups_provider_not_null NOT NULL,
    model text CONSTRAINT usage_rollups_model_not_null NOT NULL,
    requests bigint CONSTRAINT usage_rollups_requests_not_null NOT NULL,
    errors bigint CONSTRAINT usage_rollups_errors_not_null NOT NULL,
    client_aborts bigint CONSTRAINT usage_rollups_client_aborts_not_null NOT NULL,
    prompt_tokens bigint CONSTRAINT usage_rollups_prompt_tokens_not_null NOT NULL,
    completion_tokens bigint CONSTRAINT usage_rollups_completion_tokens_not_null NOT NULL,
    cached_tokens bigint CONSTRAINT usage_rollups_cached_tokens_not_null NOT NULL,
    cache_write_tokens bigint CONSTRAINT usage_rollups_cache_write_tokens_not_null NOT NULL,
    reasoning_tokens bigint CONSTRAINT usage_rollups_reasoning_tokens_not_null NOT NULL,
    cost_micros bigint CONSTRAINT usage_rollups_cost_micros_not_null NOT NULL,
    unpriced bigint CONSTRAINT usage_rollups_unpriced_not_null NOT NULL,
    latency_ms bigint CONSTRAINT usage_rollups_latency_ms_not_null NOT NULL,
    latency_count bigint CONSTRAINT usage_rollups_latency_count_not_null NOT NULL,
    ttft_ms bigint CONSTRAINT usage_rollups_ttft_ms_not_null NOT NULL,
    ttft_count bigint CONSTRAINT usage_rollups_ttft_count_not_null NOT NULL,
    remembered bigint DEFAULT 0 CONSTRAINT usage_rollups_remembered_not_null NOT NULL,
    saved_tokens bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_tokens_not_null NOT NULL,
    saved_micros bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_micros_not_null NOT NULL
)
WITH (fillfactor='70');

CREATE TABLE public.usage_pentad_by_key (
    rollup text CONSTRAINT usage_rollups_rollup_not_null NOT NULL,
    account_id uuid CONSTRAINT usage_rollups_account_id_not_null NOT NULL,
    start timestamp with time zone CONSTRAINT usage_rollups_start_not_null NOT NULL,
    key_id text CONSTRAINT usage_rollups_key_id_not_null NOT NULL,
    user_id text CONSTRAINT usage_rollups_user_id_not_null NOT NULL,
    app_id text CONSTRAINT usage_rollups_app_id_not_null NOT NULL,
    provider text CONSTRAINT usage_rollups_provider_not_null NOT NULL,
    model text CONSTRAINT usage_rollups_model_not_null NOT NULL,
    requests bigint CONSTRAINT usage_rollups_requests_not_null NOT NULL,
    errors bigint CONSTRAINT usage_rollups_errors_not_null NOT NULL,
    client_aborts bigint CONSTRAINT usage_rollups_client_aborts_not_null NOT NULL,
    prompt_tokens bigint CONSTRAINT usage_rollups_prompt_tokens_not_null NOT NULL,
    completion_tokens bigint CONSTRAINT usage_rollups_completion_tokens_not_null NOT NULL,
    cached_tokens bigint CONSTRAINT usage_rollups_cached_tokens_not_null NOT NULL,
    cache_write_tokens bigint CONSTRAINT usage_rollups_cache_write_tokens_not_null NOT NULL,
    reasoning_tokens bigint CONSTRAINT usage_rollups_reasoning_tokens_not_null NOT NULL,
    cost_micros bigint CONSTRAINT usage_rollups_cost_micros_not_null NOT NULL,
    unpriced bigint CONSTRAINT usage_rollups_unpriced_not_null NOT NULL,
    latency_ms bigint CONSTRAINT usage_rollups_latency_ms_not_null NOT NULL,
    latency_count bigint CONSTRAINT usage_rollups_latency_count_not_null NOT NULL,
    ttft_ms bigint CONSTRAINT usage_rollups_ttft_ms_not_null NOT NULL,
    ttft_count bigint CONSTRAINT usage_rollups_ttft_count_not_null NOT NULL,
    remembered bigint DEFAULT 0 CONSTRAINT usage_rollups_remembered_not_null NOT NULL,
    saved_tokens bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_tokens_not_null NOT NULL,
    saved_micros bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_micros_not_null NOT NULL
)
WITH (fillfactor='70');

CREATE TABLE public.usage_pentad_by_model (
    rollup text CONSTRAINT usage_rollups_rollup_not_null NOT NULL,
    account_id uuid CONSTRAINT usage_rollups_account_id_not_null NOT NULL,
    start timestamp with time zone CONSTRAINT usage_rollups_start_not_null NOT NULL,
    key_id text CONSTRAINT usage_rollups_key_id_not_null NOT NULL,
    user_id text CONSTRAINT usage_rollups_user_id_not_null NOT NULL,
    app_id text CONSTRAINT usage_rollups_app_id_not_null NOT NULL,
    provider text CONSTRAINT usage_rollups_provider_not_null NOT NULL,
    model text CONSTRAINT usage_rollups_model_not_null NOT NULL,
    requests bigint CONSTRAINT usage_rollups_requests_not_null NOT NULL,
    errors bigint CONSTRAINT usage_rollups_errors_not_null NOT NULL,
    client_aborts bigint CONSTRAINT usage_rollups_client_aborts_not_null NOT NULL,
    prompt_tokens bigint CONSTRAINT usage_rollups_prompt_tokens_not_null NOT NULL,
    completion_tokens bigint CONSTRAINT usage_rollups_completion_tokens_not_null NOT NULL,
    cached_tokens bigint CONSTRAINT usage_rollups_cached_tokens_not_null NOT NULL,
    cache_write_tokens bigint CONSTRAINT usage_rollups_cache_write_tokens_not_null NOT NULL,
    reasoning_tokens bigint CONSTRAINT usage_rollups_reasoning_tokens_not_null NOT NULL,
    cost_micros bigint CONSTRAINT usage_rollups_cost_micros_not_null NOT NULL,
    unpriced bigint CONSTRAINT usage_rollups_unpriced_not_null NOT NULL,
    latency_ms bigint CONSTRAINT usage_rollups_latency_ms_not_null NOT NULL,
    latency_count bigint CONSTRAINT usage_rollups_latency_count_not_null NOT NULL,
    ttft_ms bigint CONSTRAINT usage_rollups_ttft_ms_not_null NOT NULL,
    ttft_count bigint CONSTRAINT usage_rollups_ttft_count_not_null NOT NULL,
    remembered bigint DEFAULT 0 CONSTRAINT usage_rollups_remembered_not_null NOT NULL,
    saved_tokens bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_tokens_not_null NOT NULL,
    saved_micros bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_micros_not_null NOT NULL
)
WITH (fillfactor='70');

CREATE TABLE public.usage_pentad_by_user (
    rollup text CONSTRAINT usage_rollups_rollup_not_null NOT NULL,
    account_id uuid CONSTRAINT usage_rollups_account_id_not_null NOT NULL,
    start timestamp with time zone CONSTRAINT usage_rollups_start_not_null NOT NULL,
    key_id text CONSTRAINT usage_rollups_key_id_not_null NOT NULL,
    user_id text CONSTRAINT usage_rollups_user_id_not_null NOT NULL,
    app_id text CONSTRAINT usage_rollups_app_id_not_null NOT NULL,
    provider text CONSTRAINT usage_rollups_provider_not_null NOT NULL,
    model text CONSTRAINT usage_rollups_model_not_null NOT NULL,
    requests bigint CONSTRAINT usage_rollups_requests_not_null NOT NULL,
    errors bigint CONSTRAINT usage_rollups_errors_not_null NOT NULL,
    client_aborts bigint CONSTRAINT usage_rollups_client_aborts_not_null NOT NULL,
    prompt_tokens bigint CONSTRAINT usage_rollups_prompt_tokens_not_null NOT NULL,
    completion_tokens bigint CONSTRAINT usage_rollups_completion_tokens_not_null NOT NULL,
    cached_tokens bigint CONSTRAINT usage_rollups_cached_tokens_not_null NOT NULL,
    cache_write_tokens bigint CONSTRAINT usage_rollups_cache_write_tokens_not_null NOT NULL,
    reasoning_tokens bigint CONSTRAINT usage_rollups_reasoning_tokens_not_null NOT NULL,
    cost_micros bigint CONSTRAINT usage_rollups_cost_micros_not_null NOT NULL,
    unpriced bigint CONSTRAINT usage_rollups_unpriced_not_null NOT NULL,
    latency_ms bigint CONSTRAINT usage_rollups_latency_ms_not_null NOT NULL,
    latency_count bigint CONSTRAINT usage_rollups_latency_count_not_null NOT NULL,
    ttft_ms bigint CONSTRAINT usage_rollups_ttft_ms_not_null NOT NULL,
    ttft_count bigint CONSTRAINT usage_rollups_ttft_count_not_null NOT NULL,
    remembered bigint DEFAULT 0 CONSTRAINT usage_rollups_remembered_not_null NOT NULL,
    saved_tokens bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_tokens_not_null NOT NULL,
    saved_micros bigint DEFAULT 0 CONSTRAINT usage_rollups_saved_micros_not_null NOT NULL
)
WITH (fillfactor='70');

ALTER TABLE ONLY public.usage_rollups ATTACH PARTITION public.usage_day_by_all FOR VALUES IN ('day_by_all');

ALTER TABLE ONLY public.usage_rollups ATTACH PARTITION public.usage_day_by_key FOR VALUES IN ('day_by_key');

ALTER TABLE ONLY public.usage_rollups ATTACH PARTITION public.usage_day_by_model FOR VALUES IN ('day_by_model');

ALTER TABLE ONLY public.usage_rollups ATTACH PARTITION public.usage_day_by_user FOR VALUES IN ('day_by_user');

ALTER TABLE ONLY public.usage ATTACH PARTITION public.usage_default DEFAULT;

ALTER TABLE ONLY public.usage_rollups ATTACH PARTITION public.usage_hour_by_model FOR VALUES IN ('hour_by_model');

ALTER TABLE ONLY public.usage_rollups ATTACH PARTITION public.usage_month_by_all FOR VALUES IN ('month_by_all');

ALTER TABLE ONLY public.usage_rollups ATTACH PARTITION public.usage_month_by_key FOR VALUES IN ('month_by_key');

ALTER TABLE ONLY public.usage_rollups ATTACH PARTITION public.usage_month_by_model FOR VALUES IN ('month_by_model');

ALTER TABLE ONLY public.usage_rollups ATTACH PARTITION public.usage_month_by_user FOR VALUES IN ('month_by_user');

ALTER TABLE ONLY public.usage_rollups ATTACH PARTITION public.usage_pentad_by_all FOR VALUES IN ('pentad_by_all');

ALTER TABLE ONLY public.usage_rollups ATTACH PARTITION public.usage_pentad_by_key FOR VALUES IN ('pentad_by_key');

ALTER TABLE ONLY public.usage_rollups ATTACH PARTITION public.usage_pentad_by_model FOR VALUES IN ('pentad_by_model');

ALTER TABLE ONLY public.usage_rollups ATTACH PARTITION public.usage_pentad_by_user FOR VALUES IN ('pentad_by_user');

ALTER TABLE public.accounts
    ADD CONSTRAINT accounts_cost_check CHECK (((cost_micros_per_day >= 0) AND (cost_micros_per_month >= 0))) NOT VALID;

ALTER TABLE ONLY public.accounts
    ADD CONSTRAINT accounts_email_key UNIQUE (email);

ALTER TABLE ONLY public.accounts
    ADD CONSTRAINT accounts_pkey PRIMARY KEY (id);

ALTER TABLE public.accounts
    ADD CONSTRAINT accounts_tokens_check CHECK (((tokens_per_minute >= 0) AND (tokens_per_day >= 0))) NOT VALID;

ALTER TABLE ONLY public.answers
    ADD CONSTRAINT answers_pkey PRIMARY KEY (kind, digest);

ALTER TABLE ONLY public.belongings
    ADD CONSTRAINT belongings_pkey PRIMARY KEY (provider, kind, id);

ALTER TABLE public.keys
    ADD CONSTRAINT keys_burst_check CHECK ((burst >= 0)) NOT VALID;

ALTER TABLE public.keys
    ADD CONSTRAINT keys_cache_ttl_check CHECK (((cache_ttl >= 0) AND (cache_ttl <= 2592000))) NOT VALID;

ALTER TABLE public.keys
    ADD CONSTRAINT keys_cost_check CHECK (((cost_micros_per_day >= 0) AND (cost_micros_per_month >= 0))) NOT VALID;

ALTER TABLE public.keys
    ADD CONSTRAINT keys_drain_check CHECK (((drain_seconds >= 0) AND (drain_seconds <= 600))) NOT VALID;

ALTER TABLE ONLY public.keys
    ADD CONSTRAINT keys_pkey PRIMARY KEY (id);

ALTER TABLE public.keys
    ADD CONSTRAINT keys_rate_check CHECK (((requests_per_second >= (0)::double precision) AND (requests_per_second < 'Infinity'::double precision))) NOT VALID;

ALTER TABLE public.keys
    ADD CONSTRAINT keys_tokens_check CHECK (((tokens_per_minute >= 0) AND (tokens_per_day >= 0))) NOT VALID;

ALTER TABLE ONLY public.secrets
    ADD CONSTRAINT secrets_pkey PRIMARY KEY (name);

ALTER TABLE ONLY public.sessions
    ADD CONSTRAINT sessions_pkey PRIMARY KEY (digest);

ALTER TABLE ONLY public.usage_chain
    ADD CONSTRAINT usage_chain_pkey PRIMARY KEY (seq);

ALTER TABLE ONLY public.usage_rollups
    ADD CONSTRAINT usage_rollups_pkey PRIMARY KEY (rollup, account_id, start, key_id, user_id, app_id, provider, model);

ALTER TABLE ONLY public.usage_day_by_all
    ADD CONSTRAINT usage_day_by_all_pkey PRIMARY KEY (rollup, account_id, start, key_id, user_id, app_id, provider, model);

ALTER TABLE ONLY public.usage_day_by_key
    ADD CONSTRAINT usage_day_by_key_pkey PRIMARY KEY (rollup, account_id, start, key_id, user_id, app_id, provider, model);

ALTER TABLE ONLY public.usage_day_by_model
    ADD CONSTRAINT usage_day_by_model_pkey PRIMARY KEY (rollup, account_id, start, key_id, user_id, app_id, provider, model);

ALTER TABLE ONLY public.usage_day_by_user
    ADD CONSTRAINT usage_day_by_user_pkey PRIMARY KEY (rollup, account_id, start, key_id, user_id, app_id, provider, model);

ALTER TABLE ONLY public.usage
    ADD CONSTRAINT usage_pkey PRIMARY KEY (request_id, started_at);

ALTER TABLE ONLY public.usage_default
    ADD CONSTRAINT usage_default_pkey PRIMARY KEY (request_id, started_at);

ALTER TABLE ONLY public.usage_hour_by_model
    ADD CONSTRAINT usage_hour_by_model_pkey PRIMARY KEY (rollup, account_id, start, key_id, user_id, app_id, provider, model);

ALTER TABLE ONLY public.usage_hourly
    ADD CONSTRAINT usage_hourly_pkey PRIMARY KEY (account_id, hour, key_id, user_id, app_id, provider, model);

ALTER TABLE ONLY public.usage_month_by_all
    ADD CONSTRAINT usage_month_by_all_pkey PRIMARY KEY (rollup, account_id, start, key_id, user_id, app_id, provider, model);

ALTER TABLE ONLY public.usage_month_by_key
    ADD CONSTRAINT usage_month_by_key_pkey PRIMARY KEY (rollup, account_id, start, key_id, user_id, app_id, provider, model);

ALTER TABLE ONLY public.usage_month_by_model
    ADD CONSTRAINT usage_month_by_model_pkey PRIMARY KEY (rollup, account_id, start, key_id, user_id, app_id, provider, model);

ALTER TABLE ONLY public.usage_month_by_user
    ADD CONSTRAINT usage_month_by_user_pkey PRIMARY KEY (rollup, account_id, start, key_id, user_id, app_id, provider, model);

ALTER TABLE ONLY public.usage_pentad_by_all
    ADD CONSTRAINT usage_pentad_by_all_pkey PRIMARY KEY (rollup, account_id, start, key_id, user_id, app_id, provider, model);

ALTER TABLE ONLY public.usage_pentad_by_key
    ADD CONSTRAINT usage_pentad_by_key_pkey PRIMARY KEY (rollup, account_id, start, key_id, user_id, app_id, provider, model);

ALTER TABLE ONLY public.usage_pentad_by_model
    ADD CONSTRAINT usage_pentad_by_model_pkey PRIMARY KEY (rollup, account_id, start, key_id, user_id, app_id, provider, model);

ALTER TABLE ONLY public.usage_pentad_by_user
    ADD CONSTRAINT usage_pentad_by_user_pkey PRIMARY KEY (rollup, account_id, start, key_id, user_id, app_id, provider, model);

ALTER TABLE public.usage
    ADD CONSTRAINT usage_usage_source_check CHECK ((usage_source = ANY (ARRAY['provider'::text, 'counted'::text, 'estimated'::text, 'none'::text]))) NOT VALID;

CREATE INDEX answers_account_id ON public.answers USING btree (account_id, kind, kept_at) INCLUDE (size);

CREATE INDEX answers_expires_at ON public.answers USING btree (expires_at);

CREATE INDEX belongings_account_id ON public.belongings USING btree (account_id);

CREATE INDEX keys_account_id ON public.keys USING btree (account_id);

CREATE INDEX sessions_account_id ON public.sessions USING btree (account_id, created_at);

CREATE INDEX sessions_expires_at ON public.sessions USING btree (expires_at);

CREATE INDEX usage_account_id_started_at ON ONLY public.usage USING btree (account_id, started_at);

CREATE INDEX usage_chain_started_ats ON public.usage_chain USING btree ((started_ats[1]), (started_ats[cardinality(started_ats)]));

CREATE INDEX usage_day_by_all_key_id ON public.usage_day_by_all USING btree (key_id, start);

CREATE INDEX usage_rollups_start ON ONLY public.usage_rollups USING btree (start);

CREATE INDEX usage_day_by_all_start_idx ON public.usage_day_by_all USING btree (start);

CREATE INDEX usage_day_by_all_user_id ON public.usage_day_by_all USING btree (user_id, start);

CREATE INDEX usage_day_by_key_key_id ON public.usage_day_by_key USING btree (key_id, start);

CREATE INDEX usage_day_by_key_start_idx ON public.usage_day_by_key USING btree (start);

CREATE INDEX usage_day_by_model_start_idx ON public.usage_day_by_model USING btree (start);

CREATE INDEX usage_day_by_user_start_idx ON public.usage_day_by_user USING btree (start);

CREATE INDEX usage_day_by_user_user_id ON public.usage_day_by_user USING btree (user_id, start);

CREATE INDEX usage_default_account_id_started_at_idx ON public.usage_default USING btree (account_id, started_at);

CREATE INDEX usage_key_id_started_at ON ONLY public.usage USING btree (key_id, started_at);

CREATE INDEX usage_default_key_id_started_at_idx ON public.usage_default USING btree (key_id, started_at);

CREATE INDEX usage_started_at ON ONLY public.usage USING btree (started_at);

CREATE INDEX usage_default_started_at_idx ON public.usage_default USING btree (started_at);

CREATE INDEX usage_hour_by_model_start_idx ON public.usage_hour_by_model USING btree (start);

CREATE INDEX usage_hourly_hour ON public.usage_hourly USING btree (hour);

CREATE INDEX usage_hourly_key_id ON public.usage_hourly USING btree (key_id, hour);

CREATE INDEX usage_hourly_user_id ON public.usage_hourly USING btree (user_id, hour);

CREATE INDEX usage_month_by_all_key_id ON public.usage_month_by_all USING btree (key_id, start);

CREATE INDEX usage_month_by_all_start_idx ON public.usage_month_by_all USING btree (start);

CREATE INDEX usage_month_by_all_user_id ON public.usage_month_by_all USING btree (user_id, start);

CREATE INDEX usage_month_by_key_key_id ON public.usage_month_by_key USING btree (key_id, start);

CREATE INDEX usage_month_by_key_start_idx ON public.usage_month_by_key USING btree (start);

CREATE INDEX usage_month_by_model_start_idx ON public.usage_month_by_model USING btree (start);

CREATE INDEX usage_month_by_user_start_idx ON public.usage_month_by_user USING btree (start);

CREATE INDEX usage_month_by_user_user_id ON public.usage_month_by_user USING btree (user_id, start);

CREATE INDEX usage_pentad_by_all_key_id ON public.usage_pentad_by_all USING btree (key_id, start);

CREATE INDEX usage_pentad_by_all_start_idx ON public.usage_pentad_by_all USING btree (start);

CREATE INDEX usage_pentad_by_all_user_id ON public.usage_pentad_by_all USING btree (user_id, start);

CREATE INDEX usage_pentad_by_key_key_id ON public.usage_pentad_by_key USING btree (key_id, start);

CREATE INDEX usage_pentad_by_key_start_idx ON public.usage_pentad_by_key USING btree (start);

CREATE INDEX usage_pentad_by_model_start_idx ON public.usage_pentad_by_model USING btree (start);

CREATE INDEX usage_pentad_by_user_start_idx ON public.usage_pentad_by_user USING btree (start);

CREATE INDEX usage_pentad_by_user_user_id ON public.usage_pentad_by_user USING btree (user_id, start);

ALTER INDEX public.usage_rollups_pkey ATTACH PARTITION public.usage_day_by_all_pkey;

ALTER INDEX public.usage_rollups_start ATTACH PARTITION public.usage_day_by_all_start_idx;

ALTER INDEX public.usage_rollups_pkey ATTACH PARTITION public.usage_day_by_key_pkey;

ALTER INDEX public.usage_rollups_start ATTACH PARTITION public.usage_day_by_key_start_idx;

ALTER INDEX public.usage_rollups_pkey ATTACH PARTITION public.usage_day_by_model_pkey;

ALTER INDEX public.usage_rollups_start ATTACH PARTITION public.usage_day_by_model_start_idx;

ALTER INDEX public.usage_rollups_pkey ATTACH PARTITION public.usage_day_by_user_pkey;

ALTER INDEX public.usage_rollups_start ATTACH PARTITION public.usage_day_by_user_start_idx;

ALTER INDEX public.usage_account_id_started_at ATTACH PARTITION public.usage_default_account_id_started_at_idx;

ALTER INDEX public.usage_key_id_started_at ATTACH PARTITION public.usage_default_key_id_started_at_idx;

ALTER INDEX public.usage_pkey ATTACH PARTITION public.usage_default_pkey;

ALTER INDEX public.usage_started_at ATTACH PARTITION public.usage_default_started_at_idx;

ALTER INDEX public.usage_rollups_pkey ATTACH PARTITION public.usage_hour_by_model_pkey;

ALTER INDEX public.usage_rollups_start ATTACH PARTITION public.usage_hour_by_model_start_idx;

ALTER INDEX public.usage_rollups_pkey ATTACH PARTITION public.usage_month_by_all_pkey;

ALTER INDEX public.usage_rollups_start ATTACH PARTITION public.usage_month_by_all_start_idx;

ALTER INDEX public.usage_rollups_pkey ATTACH PARTITION public.usage_month_by_key_pkey;

ALTER INDEX public.usage_rollups_start ATTACH PARTITION public.usage_month_by_key_start_idx;

ALTER INDEX public.usage_rollups_pkey ATTACH PARTITION public.usage_month_by_model_pkey;

ALTER INDEX public.usage_rollups_start ATTACH PARTITION public.usage_month_by_model_start_idx;

ALTER INDEX public.usage_rollups_pkey ATTACH PARTITION public.usage_month_by_user_pkey;

ALTER INDEX public.usage_rollups_start ATTACH PARTITION public.usage_month_by_user_start_idx;

ALTER INDEX public.usage_rollups_pkey ATTACH PARTITION public.usage_pentad_by_all_pkey;

ALTER INDEX public.usage_rollups_start ATTACH PARTITION public.usage_pentad_by_all_start_idx;

ALTER INDEX public.usage_rollups_pkey ATTACH PARTITION public.usage_pentad_by_key_pkey;

ALTER INDEX public.usage_rollups_start ATTACH PARTITION public.usage_pentad_by_key_start_idx;

ALTER INDEX public.usage_rollups_pkey ATTACH PARTITION public.usage_pentad_by_model_pkey;

ALTER INDEX public.usage_rollups_start ATTACH PARTITION public.usage_pentad_by_model_start_idx;

ALTER INDEX public.usage_rollups_pkey ATTACH PARTITION public.usage_pentad_by_user_pkey;

ALTER INDEX public.usage_rollups_start ATTACH PARTITION public.usage_pentad_by_user_start_idx;

ALTER TABLE ONLY public.answers
    ADD CONSTRAINT answers_account_id_fkey FOREIGN KEY (account_id) REFERENCES public.accounts(id) ON DELETE CASCADE;

ALTER TABLE ONLY public.belongings
    ADD CONSTRAINT belongings_account_id_fkey FOREIGN KEY (account_id) REFERENCES public.accounts(id) ON DELETE CASCADE;

ALTER TABLE ONLY public.keys
    ADD CONSTRAINT keys_account_id_fkey FOREIGN KEY (account_id) REFERENCES public.accounts(id);

ALTER TABLE ONLY public.sessions
    ADD CONSTRAINT sessions_account_id_fkey FOREIGN KEY (account_id) REFERENCES public.accounts(id) ON DELETE CASCADE;

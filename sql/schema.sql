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

CREATE TABLE public.accounts (
    id uuid NOT NULL,
    email text NOT NULL,
    password_hash text NOT NULL,
    role text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT accounts_email_check CHECK ((email = lower(email))),
    CONSTRAINT accounts_role_check CHECK ((role = ANY (ARRAY['admin'::text, 'member'::text])))
);

COMMENT ON TABLE public.accounts IS 'People who own keys. The first one registered is the admin.';

COMMENT ON COLUMN public.accounts.password_hash IS 'Argon2id, PHC string.';

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

CREATE TABLE public.secrets (
    name text NOT NULL,
    value bytea NOT NULL
);

COMMENT ON TABLE public.secrets IS 'Secrets that all processes of a deployment share and that no setting gave.';

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
    CONSTRAINT usage_usage_source_check CHECK ((usage_source = ANY (ARRAY['provider'::text, 'counted'::text, 'estimated'::text])))
)
PARTITION BY RANGE (started_at);

COMMENT ON TABLE public.usage IS 'One row for every request that reached a provider, however it ended. A partition a month (UTC).';

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

COMMENT ON COLUMN public.usage.ttft_ms IS 'From the request''s arrival to the first text of the model; null: none came.';

COMMENT ON COLUMN public.usage.cost_micros IS 'Micro-dollars, a millionth of a US dollar; null: no price is known.';

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
    CONSTRAINT usage_usage_source_check CHECK ((usage_source = ANY (ARRAY['provider'::text, 'counted'::text, 'estimated'::text])))
);

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
    ttft_count bigint NOT NULL
)
WITH (fillfactor='70');

COMMENT ON TABLE public.usage_hourly IS 'The sums of table usage by hour, written with it in one transaction; kept when its months are dropped.';

COMMENT ON COLUMN public.usage_hourly.hour IS 'Begin of the hour (UTC) in which the requests arrived.';

COMMENT ON COLUMN public.usage_hourly.requests IS 'Rows of table usage.';

COMMENT ON COLUMN public.usage_hourly.errors IS 'Requests that ended neither well nor by the client''s leaving.';

COMMENT ON COLUMN public.usage_hourly.client_aborts IS 'Requests whose client left first.';

COMMENT ON COLUMN public.usage_hourly.prompt_tokens IS 'Cached and cache-write tokens included.';

COMMENT ON COLUMN public.usage_hourly.completion_tokens IS 'Reasoning tokens included.';

COMMENT ON COLUMN public.usage_hourly.cached_tokens IS 'Part of prompt_tokens.';

COMMENT ON COLUMN public.usage_hourly.cache_write_tokens IS 'Part of prompt_tokens.';

COMMENT ON COLUMN public.usage_hourly.reasoning_tokens IS 'Part of completion_tokens.';

COMMENT ON COLUMN public.usage_hourly.cost_micros IS 'Micro-dollars of the requests that have a price.';

COMMENT ON COLUMN public.usage_hourly.unpriced IS 'Requests for which no price is known.';

COMMENT ON COLUMN public.usage_hourly.latency_ms IS 'Sum over latency_count requests.';

COMMENT ON COLUMN public.usage_hourly.latency_count IS 'Requests but those whose end nobody saw.';

COMMENT ON COLUMN public.usage_hourly.ttft_ms IS 'Sum over ttft_count requests.';

COMMENT ON COLUMN public.usage_hourly.ttft_count IS 'Requests that got a first text.';

ALTER TABLE ONLY public.usage ATTACH PARTITION public.usage_default DEFAULT;

ALTER TABLE ONLY public.accounts
    ADD CONSTRAINT accounts_email_key UNIQUE (email);

ALTER TABLE ONLY public.accounts
    ADD CONSTRAINT accounts_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.keys
    ADD CONSTRAINT keys_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.secrets
    ADD CONSTRAINT secrets_pkey PRIMARY KEY (name);

ALTER TABLE ONLY public.usage
    ADD CONSTRAINT usage_pkey PRIMARY KEY (request_id, started_at);

ALTER TABLE ONLY public.usage_default
    ADD CONSTRAINT usage_default_pkey PRIMARY KEY (request_id, started_at);

ALTER TABLE ONLY public.usage_hourly
    ADD CONSTRAINT usage_hourly_pkey PRIMARY KEY (account_id, hour, key_id, user_id, app_id, provider, model);

CREATE INDEX keys_account_id ON public.keys USING btree (account_id);

CREATE INDEX usage_account_id_started_at ON ONLY public.usage USING btree (account_id, started_at);

CREATE INDEX usage_default_account_id_started_at_idx ON public.usage_default USING btree (account_id, started_at);

CREATE INDEX usage_key_id_started_at ON ONLY public.usage USING btree (key_id, started_at);

CREATE INDEX usage_default_key_id_started_at_idx ON public.usage_default USING btree (key_id, started_at);

CREATE INDEX usage_started_at ON ONLY public.usage USING btree (started_at);

CREATE INDEX usage_default_started_at_idx ON public.usage_default USING btree (started_at);

CREATE INDEX usage_hourly_hour ON public.usage_hourly USING btree (hour);

ALTER INDEX public.usage_account_id_started_at ATTACH PARTITION public.usage_default_account_id_started_at_idx;

ALTER INDEX public.usage_key_id_started_at ATTACH PARTITION public.usage_default_key_id_started_at_idx;

ALTER INDEX public.usage_pkey ATTACH PARTITION public.usage_default_pkey;

ALTER INDEX public.usage_started_at ATTACH PARTITION public.usage_default_started_at_idx;

ALTER TABLE ONLY public.keys
    ADD CONSTRAINT keys_account_id_fkey FOREIGN KEY (account_id) REFERENCES public.accounts(id);

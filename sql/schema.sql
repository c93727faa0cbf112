-- The sum of all migrations, by pg_dump. Written by `make schema`; a test compares.

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
    request_id uuid NOT NULL,
    started_at timestamp with time zone NOT NULL,
    key_id text NOT NULL,
    account_id uuid NOT NULL,
    user_id text DEFAULT ''::text NOT NULL,
    app_id text DEFAULT ''::text NOT NULL,
    client_request_id text DEFAULT ''::text NOT NULL,
    provider text NOT NULL,
    model text NOT NULL,
    upstream_model text NOT NULL,
    stream boolean NOT NULL,
    status integer NOT NULL,
    outcome text NOT NULL,
    error_code text DEFAULT ''::text NOT NULL,
    finish_reason text DEFAULT ''::text NOT NULL,
    prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    cached_tokens bigint DEFAULT 0 NOT NULL,
    cache_write_tokens bigint DEFAULT 0 NOT NULL,
    reasoning_tokens bigint DEFAULT 0 NOT NULL,
    usage_source text NOT NULL,
    latency_ms integer NOT NULL,
    ttft_ms integer,
    CONSTRAINT usage_usage_source_check CHECK ((usage_source = ANY (ARRAY['provider'::text, 'counted'::text, 'estimated'::text])))
);

COMMENT ON TABLE public.usage IS 'One row for every request that reached a provider, however it ended.';

COMMENT ON COLUMN public.usage.request_id IS 'The gateway''s own UUIDv7, X-Request-Id of the response.';

COMMENT ON COLUMN public.usage.user_id IS 'X-User-Id as the client sent it.';

COMMENT ON COLUMN public.usage.app_id IS 'X-App-Id as the client sent it.';

COMMENT ON COLUMN public.usage.model IS 'The name that the client asked for.';

COMMENT ON COLUMN public.usage.upstream_model IS 'The provider''s own name for it.';

COMMENT ON COLUMN public.usage.status IS 'HTTP status that the client saw; 0: it had left before one was sent.';

COMMENT ON COLUMN public.usage.cached_tokens IS 'Part of prompt_tokens.';

COMMENT ON COLUMN public.usage.cache_write_tokens IS 'Part of prompt_tokens.';

COMMENT ON COLUMN public.usage.reasoning_tokens IS 'Part of completion_tokens.';

COMMENT ON COLUMN public.usage.ttft_ms IS 'From the request''s arrival to the first text of the model; null: none came.';

ALTER TABLE ONLY public.accounts
    ADD CONSTRAINT accounts_email_key UNIQUE (email);

ALTER TABLE ONLY public.accounts
    ADD CONSTRAINT accounts_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.keys
    ADD CONSTRAINT keys_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.secrets
    ADD CONSTRAINT secrets_pkey PRIMARY KEY (name);

ALTER TABLE ONLY public.usage
    ADD CONSTRAINT usage_pkey PRIMARY KEY (request_id);

CREATE INDEX keys_account_id ON public.keys USING btree (account_id);

CREATE INDEX usage_account_id_started_at ON public.usage USING btree (account_id, started_at);

CREATE INDEX usage_key_id_started_at ON public.usage USING btree (key_id, started_at);

CREATE INDEX usage_started_at ON public.usage USING btree (started_at);

ALTER TABLE ONLY public.keys
    ADD CONSTRAINT keys_account_id_fkey FOREIGN KEY (account_id) REFERENCES public.accounts(id);

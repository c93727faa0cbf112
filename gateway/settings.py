"""Every setting: its environment variable, type, unit, default, and one sentence.

The variable is the field's name in capitals. Names that the ecosystem has are kept as they are; all others start with
GATEWAY_. A `GATEWAY_…` variable that is not here stops the start: it is a typing error, and a limit that was not set.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, parse_qs, urlsplit

import msgspec
from msgspec import Meta

# A million seconds are eleven days: more is a slip of the pen, and infinity is no number that a timer takes.
Seconds = Annotated[float, Meta(gt=0, le=1e6)]
SecondsOrNone = Annotated[float, Meta(ge=0, le=1e6)]
Count = Annotated[int, Meta(ge=0)]
Dollars = Annotated[float, Meta(ge=0, le=1e9)]

SECRETS = frozenset(
    {
        "database_url",
        "redis_url",
        "openai_api_key",
        "anthropic_api_key",
        "gateway_proxy",
        "gateway_key_pepper",
        "gateway_audit_key",
    }
)
# What `make up` writes for scripts; sourcing that file must not stop a later start.
_SCRIPTS = frozenset({"GATEWAY_BASE_URL", "GATEWAY_API_KEY"})


class SettingsError(Exception):
    """One line that names the setting and what is wrong with it."""


def _doc(words: str) -> Meta:
    return Meta(description=words)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    host: Annotated[str, _doc("address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535), _doc("port to listen on")] = 3000
    gateway_workers: Annotated[
        Annotated[int, Meta(ge=0, le=512)], _doc("processes that serve, under one that supervises them; 0: one a core")
    ] = 1
    environment: Annotated[
        Literal["development", "production"],
        _doc("`development` offers the built-in mock models and readable logs; `production` neither"),
    ] = "development"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        _doc("least severe log line written: `debug`, `info`, `warning`, `error`"),
    ] = "info"

    gateway_traces: Annotated[
        Literal["off", "otlp"],
        _doc("`otlp` sends traces to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names; needs the extra `otel`"),
    ] = "off"

    database_url: Annotated[str, _doc("Postgres; empty: the embedded one in the data folder")] = ""
    redis_url: Annotated[str, _doc("Redis or Valkey; empty: the embedded one in the data folder")] = ""
    gateway_data_dir: Annotated[str, _doc("folder of the embedded servers")] = ".gateway/data"
    gateway_config: Annotated[
        str, _doc("the operator's TOML file: providers, models and their fallbacks, aliases, prices, limits of routes")
    ] = ""

    openai_api_key: Annotated[str, _doc("OpenAI's key")] = ""
    openai_base_url: Annotated[str, _doc("OpenAI's address, with its `/v1`")] = ""
    anthropic_api_key: Annotated[str, _doc("Anthropic's key")] = ""
    anthropic_base_url: Annotated[str, _doc("Anthropic's address, without `/v1`")] = ""
    anthropic_version: Annotated[str, _doc("`anthropic-version` sent upstream")] = "2023-06-01"
    ollama_base_url: Annotated[str, _doc("Ollama's address; empty: it is looked for, and used while it answers")] = ""
    gateway_ollama_probe: Annotated[str, _doc("where Ollama is looked for; empty: `http://localhost:11434`")] = ""
    gateway_mock: Annotated[
        Literal["auto", "on", "off"], _doc("the built-in mock provider: `on`, `off`, `auto` (on in development)")
    ] = "auto"
    gateway_default_provider: Annotated[str, _doc("answers for models that no rule names")] = "ollama"
    gateway_own_credential: Annotated[
        bool, _doc("a caller whose key is in `X-API-Key` may bring a provider credential in `Authorization`")
    ] = True

    gateway_proxy: Annotated[
        str, _doc("`http://user:password@host:port`, through which https providers are reached; empty: directly")
    ] = ""
    gateway_connect_timeout: Annotated[Seconds, _doc("seconds to connect to a provider")] = 60.0
    gateway_first_byte_timeout: Annotated[Seconds, _doc("seconds until a stream's response headers")] = 60.0
    gateway_idle_timeout: Annotated[Seconds, _doc("seconds of silence that end a stream")] = 60.0
    # Two minutes are long for an answer, and ten for one that reasons; research models stream for half an hour
    # (https://platform.openai.com/docs/guides/deep-research). What goes on after an hour does not end by itself.
    gateway_max_stream: Annotated[Seconds, _doc("seconds after which a stream is ended that still moves")] = 3600.0
    gateway_total_timeout: Annotated[Seconds, _doc("seconds for a whole answer that is not streamed")] = 60.0
    gateway_heartbeat: Annotated[Seconds, _doc("seconds of silence after which `: ping` is sent")] = 15.0
    gateway_write_timeout: Annotated[Seconds, _doc("seconds a client may not read before it is dropped")] = 30.0
    gateway_header_timeout: Annotated[Seconds, _doc("seconds for a request's headers to arrive")] = 30.0
    gateway_body_timeout: Annotated[Seconds, _doc("seconds for a request body to arrive")] = 60.0
    gateway_drain_timeout: Annotated[Seconds, _doc("seconds that open streams may go on after SIGTERM")] = 110.0
    gateway_drain_delay: Annotated[
        SecondsOrNone, _doc("seconds that new requests are still served after SIGTERM (10 behind a load balancer)")
    ] = 0.0
    gateway_max_body: Annotated[Annotated[int, Meta(gt=0)], _doc("bytes of a request body")] = 32 << 20
    gateway_max_upload: Annotated[
        Annotated[int, Meta(gt=0)], _doc("bytes of a request body that is passed on as it comes: files, audio, images")
    ] = 512 << 20
    gateway_max_reply: Annotated[Annotated[int, Meta(gt=0)], _doc("bytes of an answer that is not streamed")] = 64 << 20

    gateway_cache_max_answer: Annotated[
        Annotated[int, Meta(gt=0, le=8 << 20)], _doc("bytes of an answer that is kept to be given again; 8 MiB at most")
    ] = 1 << 20
    gateway_cache_max_bytes: Annotated[
        Annotated[int, Meta(gt=0)], _doc("bytes in Postgres of all answers that are kept; the oldest go first")
    ] = 1 << 30

    gateway_resume_linger: Annotated[
        SecondsOrNone, _doc("seconds that a resumable stream goes on when its client is gone")
    ] = 60.0
    gateway_resume_ttl: Annotated[Seconds, _doc("seconds after its last byte that a stream can be resumed")] = 600.0
    gateway_resume_max_bytes: Annotated[
        Annotated[int, Meta(ge=1 << 10, le=1 << 26)], _doc("bytes of a resumable stream that are kept, the newest")
    ] = 4 << 20
    gateway_resume_max_streams: Annotated[
        Annotated[int, Meta(ge=1, le=1 << 10)], _doc("resumable streams of a key that run or are kept")
    ] = 32

    gateway_requests_per_minute: Annotated[Count, _doc("a new key's limit; 0: none")] = 60
    gateway_concurrent_requests: Annotated[Count, _doc("a new key's limit of requests in flight; 0: none")] = 20
    gateway_global_requests_per_minute: Annotated[Count, _doc("all keys together; 0: none")] = 0
    gateway_global_tokens_per_minute: Annotated[Count, _doc("all keys together; 0: none")] = 0
    gateway_global_tokens_per_day: Annotated[Count, _doc("all keys together, a day of UTC; 0: none")] = 0
    gateway_global_cost_per_day: Annotated[Dollars, _doc("all keys together, US dollars; 0: none")] = 0
    gateway_global_cost_per_month: Annotated[Dollars, _doc("all keys together, US dollars; 0: none")] = 0
    gateway_nodes: Annotated[
        Annotated[int, Meta(ge=1)], _doc("processes that share the limits: each grants 1/N of them while Redis is gone")
    ] = 1
    gateway_on_redis_down: Annotated[
        Literal["local", "open", "closed"],
        _doc("limits and budgets while Redis is gone: `local` (each process its share), `open` (none), `closed` (503)"),
    ] = "local"

    gateway_fsync: Annotated[
        Literal["group", "always", "never"],
        _doc(
            "a client's last byte waits for its usage on disk: `always`; `group`, half a millisecond at most; `never`"
        ),
    ] = "group"
    gateway_on_journal_full: Annotated[
        Literal["closed", "open"], _doc("no room for usage on disk: `closed` refuses (503), `open` serves unaccounted")
    ] = "closed"
    gateway_usage_copy: Annotated[
        Literal["none", "redis"], _doc("a second copy of usage that is not in Postgres yet: `redis` survives the host")
    ] = "none"
    gateway_keep_months: Annotated[Count, _doc("whole months of usage rows kept beside this one; 0: all")] = 0

    gateway_trusted_proxies: Annotated[
        Count, _doc("proxies in front that add to `X-Forwarded-For` and say `X-Forwarded-Proto`; 0: neither is read")
    ] = 0
    gateway_registration: Annotated[
        str,
        _doc(
            "`open`: anybody may register; `closed`: the first account alone, which is the admin;"
            " `example.com,example.org`: whose email is of these domains"
        ),
    ] = "open"
    gateway_revoked_streams: Annotated[
        Literal["cut", "finish"],
        _doc("what is being answered for a key when it is revoked or expires: `cut` within seconds, or `finish`"),
    ] = "cut"
    gateway_key_pepper: Annotated[
        str, _doc("secret that keys' digests are made with; empty: one kept in the database")
    ] = ""
    gateway_audit_key: Annotated[
        str, _doc("secret that usage rows are chained with; empty: one kept in the database, beside them")
    ] = ""
    gateway_key_cache: Annotated[Seconds, _doc("seconds that a verified key is trusted without a look-up")] = 60.0
    gateway_key_stale: Annotated[Seconds, _doc("seconds it is trusted while Postgres is gone")] = 900.0

    def __repr__(self) -> str:
        """Without the secrets: what is logged or shown in a traceback is read by more people than may know them."""
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        hidden = {name: "***" for name in SECRETS if shown[name]}
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in {**shown, **hidden}.items())})"


def load_settings(environ: Mapping[str, str]) -> Settings:
    """The settings in an environment. Raises SettingsError, which never repeats a secret's value."""
    known = {field.upper(): field for field in Settings.__struct_fields__}
    unknown = sorted(name for name in environ if name.startswith("GATEWAY_") and name not in known.keys() | _SCRIPTS)
    if unknown:
        raise SettingsError(f"unknown setting {unknown[0]}")
    given = {field: environ[name].strip() for name, field in known.items() if environ.get(name, "").strip()}
    for field in ("environment", "log_level"):
        if field in given:
            given[field] = given[field].lower()
    return _checked(given)


def change(settings: Settings, changes: Mapping[str, object]) -> Settings:
    """The same settings with other values for some, which are checked as those of the environment are."""
    return _checked({**msgspec.structs.asdict(settings), **changes})


def _checked(values: Mapping[str, object]) -> Settings:
    try:
        settings = msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        field, problem = explain(error)
        raise SettingsError(f"{field.upper()}: {problem}") from None
    if settings.gateway_drain_delay > settings.gateway_drain_timeout:
        raise SettingsError("GATEWAY_DRAIN_DELAY: it is a part of GATEWAY_DRAIN_TIMEOUT, and cannot be longer")
    _check_registration("GATEWAY_REGISTRATION", settings.gateway_registration)
    _check_postgres("DATABASE_URL", settings.database_url)
    _check_redis("REDIS_URL", settings.redis_url)
    _check_proxy("GATEWAY_PROXY", settings.gateway_proxy)
    for field in ("openai_base_url", "anthropic_base_url", "ollama_base_url", "gateway_ollama_probe"):
        if url := getattr(settings, field):
            check_provider(field.upper(), url)
    return settings


def explain(error: msgspec.ValidationError) -> tuple[str, str]:
    """Where in the data the error is, as `providers.x.base_url`, and what it is."""
    problem, _, path = str(error).partition(" - at `$")
    return path.rstrip("`").removeprefix("."), problem


_DOMAIN = re.compile(r"[a-z0-9-]{1,63}(\.[a-z0-9-]{1,63})+")


def _check_registration(name: str, text: str) -> None:
    """A word that is neither is no domain either: `opne` must not close the door, or open it."""
    domains = [domain.strip() for domain in text.lower().split(",")]
    if text not in ("open", "closed") and not all(map(_DOMAIN.fullmatch, domains)):
        raise SettingsError(f"{name}: `open`, `closed`, or domains as example.com,example.org are required")


# --- addresses ----------------------------------------------------------------------------------------------------
# Of each its form; what stands at it is found out later. None of these repeats a part of an address: a password with
# an `@` or a `/` in it makes any part of it a part of the password.


def _check_postgres(name: str, url: str) -> None:
    """A connection URI (https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-URIS)."""
    if not url:
        return
    parts = _split(name, url)
    if parts.scheme not in ("postgresql", "postgres"):
        raise SettingsError(f"{name}: an address as postgresql://user:password@host:5432/database is required")
    try:
        options = parse_qs(parts.query, strict_parsing=True) if parts.query else {}
    except ValueError:
        raise SettingsError(f"{name}: what follows the `?` is name=value, joined by `&`") from None
    hosts = parts.netloc.rpartition("@")[2]
    ports = [_port(host) for host in [*hosts.split(","), *",".join(options.get("host", [])).split(",")]]
    ports += ",".join(options.get("port", [])).split(",")
    if not all(_is_port(port) for port in ports if port):
        raise SettingsError(f"{name}: a port is a number from 1 to 65535")


def _port(host: str) -> str:
    """Of `host:port`, `[address]:port` or `/folder/of/a/socket`."""
    return "" if host.startswith("/") else host.rpartition("]")[2].partition(":")[2]


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5 and 0 < int(text) < 65536


def _check_redis(name: str, url: str) -> None:
    if not url:
        return
    parts = _split(name, url)
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise SettingsError(f"{name}: an address as redis://host:6379/0, rediss:// or unix:// is required")
    if parts.scheme != "unix":
        _check_port(name, parts)
        database = parts.path.strip("/")
        if database and not (database.isascii() and database.isdecimal()):
            raise SettingsError(f"{name}: the path of a Redis address is the number of a database")


def _check_proxy(name: str, url: str) -> None:
    if not url:
        return
    parts = _split(name, url)
    # What is printable ASCII can stand in a header, and a password with anything else in it can be written with `%`.
    if parts.scheme != "http" or not parts.hostname or not (url.isascii() and url.isprintable()) or " " in url:
        raise SettingsError(f"{name}: an address as http://user:password@host:3128 is required")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise SettingsError(f"{name}: nothing follows the host and port of a proxy")
    _check_port(name, parts)


def check_provider(name: str, url: str) -> None:
    parts = _split(name, url)
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", url):
        raise SettingsError(f"{name}: an http or https address is required")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise SettingsError(f"{name}: no credentials, query or fragment in an address")
    _check_port(name, parts)


def _split(name: str, url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
    except ValueError:  # an IPv6 address without its other bracket
        raise SettingsError(f"{name}: this is not an address") from None
    if parts.netloc.count("@") > 1:
        raise SettingsError(f"{name}: in a user's name or password `@` is written %40")
    return parts


def _check_port(name: str, parts: SplitResult) -> None:
    try:
        wrong = parts.port == 0
    except ValueError:
        wrong = True
    if wrong:
        raise SettingsError(f"{name}: a port is a number from 1 to 65535")


def describe() -> list[dict[str, Any]]:
    """One row a setting: variable, default, meaning. The README's table is compared with it."""
    fields = msgspec.inspect.type_info(Settings).fields  # type: ignore[attr-defined]
    return [{"name": field.name.upper(), "default": field.default, "meaning": _meaning(field.type)} for field in fields]


def _meaning(kind: Any) -> str:
    while kind is not None:
        description = (getattr(kind, "extra_json_schema", None) or {}).get("description")
        if description:
            return str(description)
        kind = getattr(kind, "type", None)
    return ""

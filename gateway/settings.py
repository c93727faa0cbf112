"""Every setting: its environment variable, type, unit, default, and one sentence.

The variable is the field's name in capitals. Names that the ecosystem has are kept as they are; all others start with
GATEWAY_. A `GATEWAY_…` variable that is not here stops the start: it is a typing error, and a limit that was not set.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, parse_qs, urlsplit

import msgspec
from msgspec import Meta

from gateway.protocol.pricing import PricesError, PriceTable, price_table
from gateway.protocol.routing import Provider, Routes

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
    environment: Annotated[
        Literal["development", "production"],
        _doc("`development` offers the built-in mock models and readable logs; `production` neither"),
    ] = "development"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        _doc("least severe log line written: `debug`, `info`, `warning`, `error`"),
    ] = "info"

    database_url: Annotated[str, _doc("Postgres; empty: the embedded one in the data folder")] = ""
    redis_url: Annotated[str, _doc("Redis or Valkey; empty: the embedded one in the data folder")] = ""
    gateway_data_dir: Annotated[str, _doc("folder of the embedded servers")] = ".gateway/data"
    gateway_config: Annotated[
        str, _doc("the operator's TOML file: providers, model aliases, prices, limits of routes")
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
    gateway_total_timeout: Annotated[Seconds, _doc("seconds for a whole answer that is not streamed")] = 60.0
    gateway_heartbeat: Annotated[Seconds, _doc("seconds of silence after which `: ping` is sent")] = 15.0
    gateway_write_timeout: Annotated[Seconds, _doc("seconds a client may not read before it is dropped")] = 30.0
    gateway_body_timeout: Annotated[Seconds, _doc("seconds for a request body to arrive")] = 60.0
    gateway_drain_timeout: Annotated[Seconds, _doc("seconds that open streams may go on after SIGTERM")] = 110.0
    gateway_drain_delay: Annotated[
        SecondsOrNone, _doc("seconds that new requests are still served after SIGTERM (10 behind a load balancer)")
    ] = 0.0
    gateway_max_body: Annotated[Annotated[int, Meta(gt=0)], _doc("bytes of a request body")] = 32 << 20
    gateway_max_reply: Annotated[Annotated[int, Meta(gt=0)], _doc("bytes of an answer that is not streamed")] = 64 << 20

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

    gateway_registration: Annotated[
        Literal["open", "closed"],
        _doc("`open`: anybody may register; `closed`: the first account alone, which is the admin"),
    ] = "open"
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
        field, problem = _explain(error)
        raise SettingsError(f"{field.upper()}: {problem}") from None
    if settings.gateway_drain_delay > settings.gateway_drain_timeout:
        raise SettingsError("GATEWAY_DRAIN_DELAY: it is a part of GATEWAY_DRAIN_TIMEOUT, and cannot be longer")
    _check_postgres("DATABASE_URL", settings.database_url)
    _check_redis("REDIS_URL", settings.redis_url)
    _check_proxy("GATEWAY_PROXY", settings.gateway_proxy)
    for field in ("openai_base_url", "anthropic_base_url", "ollama_base_url", "gateway_ollama_probe"):
        if url := getattr(settings, field):
            _check_provider(field.upper(), url)
    return settings


def _explain(error: msgspec.ValidationError) -> tuple[str, str]:
    """Where in the data the error is, as `providers.x.base_url`, and what it is."""
    problem, _, path = str(error).partition(" - at `$")
    return path.rstrip("`").removeprefix("."), problem


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


def _check_provider(name: str, url: str) -> None:
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


# --- providers ----------------------------------------------------------------------------------------------------


class ProviderRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A `[providers.NAME]` table of providers.toml or of the operator's file."""

    dialect: Literal["openai", "anthropic", "ollama"] = "openai"
    base_url: str
    api_key_env: str = ""  # name of the environment variable that holds the key
    auth: Literal["bearer", "x-api-key", "api-key"] = "bearer"
    headers: dict[str, str] = {}
    rules: list[str] = []
    models: list[str] = []
    asks_usage: bool = True
    needs_key: bool = True  # off until the variable above is set
    label: str = ""


class RateRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A `[limits."/v1/…"]` table: a token bucket for all requests to a route."""

    requests_per_second: Annotated[float, Meta(gt=0, le=1e6)]
    burst: Annotated[int, Meta(ge=1, le=1_000_000)] = 1


class ConfigFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    providers: dict[str, ProviderRow] = {}
    aliases: dict[str, str] = {}
    limits: dict[str, RateRow] = {}  # by route
    prices: dict[str, dict[str, Any]] = {}  # by provider and model, USD per million tokens; checked by `price_table`


@dataclass(frozen=True, slots=True)
class Address:
    """Where a provider of a given environment stands, before anything was asked of it."""

    url: str
    given: bool  # by the operator, so it is used even without a key


def load_routes(settings: Settings, environ: Mapping[str, str]) -> Routes:
    """Routes from the shipped table, the operator's file and the environment. Raises SettingsError."""
    shipped = _read_config("providers.toml", resources.files("gateway").joinpath("providers.toml").read_text("utf-8"))
    own = _read_own(settings)
    rows = {**shipped.providers, **own.providers}
    providers = {name: _provider(name, row, settings, environ, own) for name, row in rows.items()}
    for alias, target in own.aliases.items():
        if alias == target:
            raise SettingsError(f"{settings.gateway_config}: aliases.{alias}: points to itself")
    return Routes(providers=providers, aliases=own.aliases, default=settings.gateway_default_provider)


def load_prices(settings: Settings) -> PriceTable:
    """The shipped prices and the operator's own before them. Raises SettingsError."""
    shipped = resources.files("gateway").joinpath("prices.json").read_bytes()
    try:
        return price_table(shipped, _read_own(settings).prices)
    except PricesError as error:
        raise SettingsError(f"{settings.gateway_config}: {error}") from None


LIMITED_ROUTES = ("/v1/chat/completions",)


def load_rates(settings: Settings) -> Mapping[str, RateRow]:
    """The operator's limits of whole routes. Raises SettingsError."""
    rates = _read_own(settings).limits
    for route in rates:
        if route not in LIMITED_ROUTES:
            raise SettingsError(f'{settings.gateway_config}: limits."{route}": there are {", ".join(LIMITED_ROUTES)}')
    return rates


def _read_own(settings: Settings) -> ConfigFile:
    if not settings.gateway_config:
        return ConfigFile()
    path = Path(settings.gateway_config)
    try:
        return _read_config(str(path), path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"GATEWAY_CONFIG: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"GATEWAY_CONFIG: {path} is not UTF-8 text") from None


def _read_config(name: str, text: str) -> ConfigFile:
    try:
        return msgspec.convert(tomllib.loads(text), ConfigFile)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{name}: {error}") from None
    except msgspec.ValidationError as error:
        key, problem = _explain(error)
        raise SettingsError(f"{name}: {key}: {problem}" if key else f"{name}: {problem}") from None


def _provider(name: str, row: ProviderRow, settings: Settings, environ: Mapping[str, str], own: ConfigFile) -> Provider:
    address = _address(name, row, settings, own)
    key = environ.get(row.api_key_env, "").strip() if row.api_key_env else ""
    headers = dict(row.headers)
    if row.dialect == "anthropic":
        headers.setdefault("anthropic-version", settings.anthropic_version)
    return Provider(
        name=name,
        dialect=row.dialect,
        base_url=address.url,
        api_key=key or None,
        enabled=bool(key) or address.given or not row.needs_key,
        auth=row.auth,
        headers=headers,
        rules=tuple(row.rules),
        models=tuple(row.models),
        asks_usage=row.asks_usage,
        label=row.label or name,
    )


def _address(name: str, row: ProviderRow, settings: Settings, own: ConfigFile) -> Address:
    given: str = getattr(settings, f"{name}_base_url", "")
    probe: str = "" if name in own.providers else getattr(settings, f"gateway_{name}_probe", "")
    url = (given or probe or row.base_url).rstrip("/")
    _check_provider(f"providers.{name}.base_url", url)
    parts = urlsplit(url)
    if row.dialect == "openai":
        url += "" if parts.path else "/v1"  # an OpenAI-compatible server's address ends in it; a bare host is a slip
    else:
        url = url.removesuffix("/v1")  # not a part of these addresses, but people write it all the same
    return Address(url, given=bool(given) or (name in own.providers and not row.needs_key))


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

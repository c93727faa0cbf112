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
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from gateway.protocol.routing import Provider, Routes

Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=0)]


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
    gateway_config: Annotated[str, _doc("the operator's TOML file: providers, model aliases")] = ""

    openai_api_key: Annotated[str, _doc("OpenAI's key")] = ""
    openai_base_url: Annotated[str, _doc("OpenAI's address, with its `/v1`")] = ""
    anthropic_api_key: Annotated[str, _doc("Anthropic's key")] = ""
    anthropic_base_url: Annotated[str, _doc("Anthropic's address, without `/v1`")] = ""
    anthropic_version: Annotated[str, _doc("`anthropic-version` sent upstream")] = "2023-06-01"
    ollama_base_url: Annotated[str, _doc("Ollama's address; empty: looked for on localhost:11434")] = ""
    gateway_mock: Annotated[
        Literal["auto", "on", "off"], _doc("the built-in mock provider: `on`, `off`, `auto` (on in development)")
    ] = "auto"
    gateway_default_provider: Annotated[str, _doc("answers for models that no rule names")] = "ollama"
    gateway_own_credential: Annotated[
        bool, _doc("a caller whose key is in `X-API-Key` may bring a provider credential in `Authorization`")
    ] = True

    gateway_connect_timeout: Annotated[Seconds, _doc("seconds to connect to a provider")] = 60.0
    gateway_first_byte_timeout: Annotated[Seconds, _doc("seconds until a stream's response headers")] = 60.0
    gateway_idle_timeout: Annotated[Seconds, _doc("seconds of silence that end a stream")] = 60.0
    gateway_total_timeout: Annotated[Seconds, _doc("seconds for a whole answer that is not streamed")] = 60.0
    gateway_heartbeat: Annotated[Seconds, _doc("seconds of silence after which `: ping` is sent")] = 15.0
    gateway_write_timeout: Annotated[Seconds, _doc("seconds a client may not read before it is dropped")] = 30.0
    gateway_body_timeout: Annotated[Seconds, _doc("seconds for a request body to arrive")] = 60.0
    gateway_drain_timeout: Annotated[Seconds, _doc("seconds that open streams may go on after SIGTERM")] = 110.0
    gateway_drain_delay: Annotated[
        float, Meta(ge=0), _doc("seconds that new requests are still served after SIGTERM (10 behind a load balancer)")
    ] = 0.0
    gateway_max_body: Annotated[Annotated[int, Meta(gt=0)], _doc("bytes of a request body")] = 32 << 20
    gateway_max_reply: Annotated[Annotated[int, Meta(gt=0)], _doc("bytes of an answer that is not streamed")] = 64 << 20

    gateway_requests_per_minute: Annotated[Count, _doc("a new key's limit; 0: none")] = 60
    gateway_concurrent_requests: Annotated[Count, _doc("a new key's limit of requests in flight; 0: none")] = 20
    gateway_global_requests_per_minute: Annotated[Count, _doc("all keys together; 0: none")] = 0
    gateway_nodes: Annotated[
        Annotated[int, Meta(ge=1)], _doc("processes that share the limits: each grants 1/N of them while Redis is gone")
    ] = 1
    gateway_on_redis_down: Annotated[
        Literal["local", "open", "closed"],
        _doc("limits while Redis is gone: `local` (each process its share), `open` (none), `closed` (503)"),
    ] = "local"

    gateway_registration: Annotated[
        Literal["open", "closed"],
        _doc("`open`: anybody may register; `closed`: the first account alone, which is the admin"),
    ] = "open"
    gateway_key_pepper: Annotated[
        str, _doc("secret that keys' digests are made with; empty: one kept in the database")
    ] = ""
    gateway_key_cache: Annotated[Seconds, _doc("seconds that a verified key is trusted without a look-up")] = 60.0
    gateway_key_stale: Annotated[Seconds, _doc("seconds it is trusted while Postgres is gone")] = 900.0


SECRETS = frozenset({"database_url", "redis_url", "openai_api_key", "anthropic_api_key", "gateway_key_pepper"})


def load_settings(environ: Mapping[str, str]) -> Settings:
    """The settings in an environment. Raises SettingsError, which never repeats a secret's value."""
    known = {field.upper(): field for field in Settings.__struct_fields__}
    unknown = sorted(name for name in environ if name.startswith("GATEWAY_") and name not in known | _SCRIPTS)
    if unknown:
        raise SettingsError(f"unknown setting {unknown[0]}")
    given = {field: environ[name].strip() for name, field in known.items() if environ.get(name, "").strip()}
    for field in ("environment", "log_level"):
        if field in given:
            given[field] = given[field].lower()
    try:
        return msgspec.convert(given, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(_explain(str(error))) from None


# What `make up` writes for scripts; sourcing that file must not stop a later start.
_SCRIPTS = {"GATEWAY_BASE_URL": "", "GATEWAY_API_KEY": ""}


def _explain(error: str) -> str:
    problem, _, path = error.partition(" - at `$.")
    return f"{path.rstrip('`').upper()}: {problem}" if path else problem


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


class ConfigFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    providers: dict[str, ProviderRow] = {}
    aliases: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a provider of a given environment stands, before anything was asked of it."""

    url: str
    given: bool  # by the operator, so it is used even without a key


def load_routes(settings: Settings, environ: Mapping[str, str]) -> Routes:
    """Routes from the shipped table, the operator's file and the environment. Raises SettingsError."""
    shipped = _read_config("providers.toml", resources.files("gateway").joinpath("providers.toml").read_text("utf-8"))
    own = ConfigFile()
    if settings.gateway_config:
        path = Path(settings.gateway_config)
        try:
            own = _read_config(str(path), path.read_text("utf-8"))
        except OSError as error:
            raise SettingsError(f"GATEWAY_CONFIG: cannot read {path}: {error.strerror}") from None
    rows = {**shipped.providers, **own.providers}
    providers = {name: _provider(name, row, settings, environ, own) for name, row in rows.items()}
    for alias, target in own.aliases.items():
        if alias == target:
            raise SettingsError(f"{settings.gateway_config}: aliases.{alias}: points to itself")
    return Routes(providers=providers, aliases=own.aliases, default=settings.gateway_default_provider)


def _read_config(name: str, text: str) -> ConfigFile:
    try:
        return msgspec.convert(tomllib.loads(text), ConfigFile)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{name}: {error}") from None
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        raise SettingsError(f"{name}: {path.rstrip('`')}: {problem}" if path else f"{name}: {problem}") from None


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
    url = (given or row.base_url).rstrip("/")
    parts = urlsplit(url)
    where = f"{name.upper()}_BASE_URL" if given else f"providers.{name}.base_url"
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", url):
        raise SettingsError(f"{where}: an http or https address is required")
    if parts.username or parts.query or parts.fragment:
        raise SettingsError(f"{where}: no credentials, query or fragment in an address")
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

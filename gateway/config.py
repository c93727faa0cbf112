"""The deployment's configuration: providers, targets, aliases, prices and limits of routes, from one TOML file.

The providers that ship are a file of the same form (providers.toml), which the operator's own adds to.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from gateway.protocol.pricing import PricesError, PriceTable, price_table
from gateway.protocol.routing import Provider, Routes
from gateway.settings import Settings, SettingsError, check_provider, explain


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


@dataclass(frozen=True, slots=True)
class Config:
    """What a reload replaces, whole."""

    routes: Routes
    prices: PriceTable
    rates: Mapping[str, RateRow]  # by route


def load_config(settings: Settings, environ: Mapping[str, str]) -> Config:
    """From the shipped tables, the operator's file and the environment. Raises SettingsError."""
    own = _read_own(settings)
    return Config(_routes(settings, environ, own), _prices(settings, own), _rates(settings, own))


def _routes(settings: Settings, environ: Mapping[str, str], own: ConfigFile) -> Routes:
    shipped = _read_config("providers.toml", resources.files("gateway").joinpath("providers.toml").read_text("utf-8"))
    rows = {**shipped.providers, **own.providers}
    providers = {name: _provider(name, row, settings, environ, own) for name, row in rows.items()}
    for alias, target in own.aliases.items():
        if alias == target:
            raise SettingsError(f"{settings.gateway_config}: aliases.{alias}: points to itself")
    return Routes(providers=providers, aliases=own.aliases, default=settings.gateway_default_provider)


def _prices(settings: Settings, own: ConfigFile) -> PriceTable:
    """The shipped prices and the operator's own before them."""
    shipped = resources.files("gateway").joinpath("prices.json").read_bytes()
    try:
        return price_table(shipped, own.prices)
    except PricesError as error:
        raise SettingsError(f"{settings.gateway_config}: {error}") from None


LIMITED_ROUTES = ("/v1/chat/completions",)


def _rates(settings: Settings, own: ConfigFile) -> Mapping[str, RateRow]:
    for route in own.limits:
        if route not in LIMITED_ROUTES:
            raise SettingsError(f'{settings.gateway_config}: limits."{route}": there are {", ".join(LIMITED_ROUTES)}')
    return own.limits


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
        key, problem = explain(error)
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
    check_provider(f"providers.{name}.base_url", url)
    parts = urlsplit(url)
    if row.dialect == "openai":
        url += "" if parts.path else "/v1"  # an OpenAI-compatible server's address ends in it; a bare host is a slip
    else:
        url = url.removesuffix("/v1")  # not a part of these addresses, but people write it all the same
    return Address(url, given=bool(given) or (name in own.providers and not row.needs_key))

"""The deployment's configuration: providers, targets, aliases, prices and limits of routes, from one TOML file.

The providers that ship are a file of the same form (providers.toml), which the operator's own adds to. All of it is
checked before any of it is used, and a reload takes it whole or not at all.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import resources
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gateway.config_file import ConfigFile, ModelRow, ProviderRow, RateRow
from gateway.protocol.pricing import PricesError, PriceTable, price_table
from gateway.protocol.routing import SAME_NAME, Plan, Provider, Routes, Share, is_pattern
from gateway.settings import Settings, SettingsError, check_provider
from gateway.toml_lines import KeyPath


@dataclass(frozen=True, slots=True)
class Config:
    """What a reload replaces, whole."""

    routes: Routes
    prices: PriceTable
    rates: Mapping[str, tuple[float, int]]  # by route: requests a second, and how many at once


def load_config(settings: Settings, environ: Mapping[str, str]) -> Config:
    """From the shipped tables, the operator's file and the environment. Raises SettingsError, or its ConfigError."""
    own = _own_file(settings)
    routes = _routes(settings, environ, own)
    config = Config(routes, _prices(own), _rates(own))
    own.check()
    return config


def _own_file(settings: Settings) -> ConfigFile:
    if not settings.gateway_config:
        return ConfigFile("GATEWAY_CONFIG", "")
    path = Path(settings.gateway_config)
    try:
        return ConfigFile(str(path), path.read_text("utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"GATEWAY_CONFIG: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"GATEWAY_CONFIG: {path} is not UTF-8 text") from None


# --- prices and limits --------------------------------------------------------------------------------------------


def _prices(own: ConfigFile) -> PriceTable:
    """The shipped prices and the operator's own before them."""
    shipped = resources.files("gateway").joinpath("prices.json").read_bytes()
    prices = own.table("prices")
    try:
        return price_table(shipped, prices)
    except PricesError as error:
        own.wrong_at(_price_path(prices, str(error)), str(error))
        return price_table(shipped)


def _price_path(prices: Mapping[str, Any], problem: str) -> KeyPath:
    """Which price a problem names at its beginning."""
    for name, models in prices.items():
        for model in models if isinstance(models, dict) else ():
            if problem.startswith((f'prices.{name}."{model}":', f'prices.{name}."{model}".')):
                return ("prices", name, model)
        if problem.startswith(f"prices.{name}:"):
            return ("prices", name)
    return ("prices",)


LIMITED_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


def _rates(own: ConfigFile) -> Mapping[str, tuple[float, int]]:
    for route in own.table("limits"):
        if route not in LIMITED_ROUTES:
            own.wrong(("limits", route), f"there are {', '.join(LIMITED_ROUTES)}")
    return {route: (row.requests_per_second, row.burst) for route, row in own.rows("limits", RateRow).items()}


# --- routes -------------------------------------------------------------------------------------------------------


def _routes(settings: Settings, environ: Mapping[str, str], own: ConfigFile) -> Routes:
    providers = _providers(settings, environ, own)
    plans = {name: _plan(row) for name, row in own.rows("models", ModelRow).items()}
    aliases = {alias: meant for alias, meant in own.table("aliases").items() if isinstance(meant, str)}
    routes = Routes(providers, aliases, plans, settings.gateway_default_provider)
    known = with_mock(routes, "") if wants_mock(settings) else routes
    if routes.default not in known.providers:
        names = ", ".join(known.providers)
        raise SettingsError(f"GATEWAY_DEFAULT_PROVIDER: no provider has this name; there are {names}")
    _check_aliases(own, known)
    _check_plans(own, known)
    return routes


def _plan(row: ModelRow) -> Plan:
    targets = [(*target.to.partition("/"), target.weight) for target in row.targets]
    return Plan(tuple(Share(name, model, weight) for name, _, model, weight in targets), tuple(row.fallbacks))


def _check_aliases(own: ConfigFile, known: Routes) -> None:
    aliases = own.table("aliases")
    for alias, meant in aliases.items():
        if not isinstance(meant, str) or not meant:
            problem = "the name of a model is required"
        elif is_pattern(alias):
            problem = "an alias is one name; what is meant of many is said under `models`"
        elif alias == meant:
            problem = "points to itself"
        elif meant in aliases:
            problem = f"{meant!r} is an alias itself, and they do not chain"
        else:
            problem = _nobody(meant, known)
        if problem:
            own.wrong(("aliases", alias), problem)


def _check_plans(own: ConfigFile, known: Routes) -> None:
    configured = own.table("providers")  # one with a mistake of its own has been told about
    for name, plan in known.plans.items():
        path: KeyPath = ("models", name)
        if not name:
            own.wrong(path, "the name of a model, or a pattern, is required")
        if not plan.shares and not plan.fallbacks:
            own.wrong(path, "`targets` or `fallbacks` are required")
        if name in known.aliases:
            own.wrong(path, "an alias has this name, and comes first")
        for number, share in enumerate(plan.shares):
            where = (*path, "targets", number, "to")
            if not share.provider or not share.model:
                own.wrong(where, "`provider/model` is required")
            elif share.provider not in known.providers and share.provider not in configured:
                own.wrong(where, _no_provider(share.provider, known))
            elif "*" in share.model and share.model != SAME_NAME:
                own.wrong(where, "a `*` stands alone, for the name that was asked for")
        for number, fallback in enumerate(plan.fallbacks):
            problem = "falls back to itself" if fallback == name else _nobody(fallback, known)
            if problem and fallback.partition("/")[0] not in configured:
                own.wrong((*path, "fallbacks", number), problem)


def _nobody(name: str, known: Routes) -> str:
    """Why a model that the operator names cannot be meant; "" when it can.

    The default provider answers for any name. One with a slash in it is far more often a provider's name misspelt.
    """
    meant = known.aliases.get(name, name)
    provider, model = known.choose(meant)
    prefix, slash, _ = meant.partition("/")
    by_rule = any(fnmatchcase(meant, rule) for rule in known.providers[provider].rules)
    if not meant or (slash and model == meant and not by_rule and known.plan_of(meant) is None):
        return f"{_no_provider(prefix, known)}. A model of {provider} is written {provider}/{meant}"
    return ""


def _no_provider(name: str, known: Routes) -> str:
    return f"there is no provider {name!r}; there are {', '.join(known.providers)}"


# --- providers ----------------------------------------------------------------------------------------------------


def _providers(settings: Settings, environ: Mapping[str, str], own: ConfigFile) -> dict[str, Provider]:
    shipped = ConfigFile("providers.toml", resources.files("gateway").joinpath("providers.toml").read_text("utf-8"))
    theirs = own.rows("providers", ProviderRow, _without(own.table("providers"), shipped.table("providers")))
    _check_rows(own, theirs)
    rows = {**shipped.rows("providers", ProviderRow), **theirs}
    shipped.check()
    taken = {rule for row in theirs.values() for rule in row.rules}  # the operator's word comes first
    found: dict[str, Provider] = {}
    for name, row in rows.items():
        access = _access(name, row, environ, own)
        rules = [rule for rule in row.rules if name in theirs or rule not in taken]
        found[name] = _provider(name, row, access, rules, settings.anthropic_version)
    return found


def _without(own: Mapping[str, Any], shipped: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """What a table of the operator's leaves as it ships: all that it does not say; if it says where, little of it."""
    kept = ("base_url_env", "probed")
    return {
        name: {key: row[key] for key in row if key in kept} if "base_url" in own[name] else row
        for name, row in shipped.items()
        if isinstance(own.get(name), dict)
    }


_FIELD = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 5.6.2


def _check_rows(own: ConfigFile, rows: Mapping[str, ProviderRow]) -> None:
    owners: dict[str, str] = {}
    for name, row in rows.items():
        path: KeyPath = ("providers", name)
        if not name or "/" in name:
            own.wrong(path, "a provider's name has no `/`: it stands before one, as `name/model`")
        elif not re.fullmatch(r"[\w.-]+", name, re.ASCII):
            own.wrong(path, "a provider's name is of ASCII letters, digits, `.`, `_` and `-`: it is sent in headers")
        for header, value in row.headers.items():
            if not _FIELD.fullmatch(header) or not (value.isascii() and value.isprintable()):
                own.wrong((*path, "headers", header), "this cannot be sent as a header")
        if not row.base_url and not row.base_url_env:
            own.wrong((*path, "base_url"), "this key is required")
        if not re.fullmatch(r"[!-~]*", row.query) or "#" in row.query:
            own.wrong((*path, "query"), "`name=value`, joined by `&`, is required")
        for number, rule in enumerate(row.rules):
            owner = owners.setdefault(rule, name)
            if owner != name:
                own.wrong((*path, "rules", number), f"{owner} has the rule {rule!r}, too")


@dataclass(frozen=True, slots=True)
class _Access:
    """What the environment and the operator's file say of how a provider is reached."""

    address: str  # "": nobody said
    given: bool  # by the operator, so it is used even without a key
    key: str


def _access(name: str, row: ProviderRow, environ: Mapping[str, str], own: ConfigFile) -> _Access:
    def value(variable: str) -> str:
        return environ.get(variable, "").strip() if variable else ""

    given, key = value(row.base_url_env), value(row.api_key_env)
    url = (given or value(row.probe_env) or row.base_url).rstrip("/")
    problem = _problem(url, row, key) if url else ""
    if problem and not given and name in own.table("providers"):
        own.wrong(("providers", name, "base_url"), problem)
    elif problem:
        raise SettingsError(f"{row.base_url_env if given else row.probe_env}: {problem}")
    elif url and row.dialect == "openai":
        url += "" if urlsplit(url).path else row.base_path  # a bare host is a slip, or all that a vendor shows
    else:
        url = url.removesuffix("/v1")  # not a part of these addresses, but people write it all the same
    return _Access(url, bool(given), key)


# Of AWS beside its link-local ones
# (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/configuring-instance-metadata-service.html).
_METADATA = ip_address("fd00:ec2::254")


def _problem(url: str, row: ProviderRow, key: str) -> str:
    """Why this address is not used; "" when it is.

    Plain http is what local servers speak, and a name says nothing of where they stand (`http://ollama:11434`): a key
    does not go over it to where it is surely a mistake, a public address or a host that we know to speak https.
    """
    try:
        check_provider("", url)
    except SettingsError as error:
        return str(error).removeprefix(": ")
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        address = ip_address(host)
    except ValueError:
        address = None
    address = getattr(address, "ipv4_mapped", None) or address
    if address is not None and (address.is_link_local or address == _METADATA):
        return "this is where a cloud keeps its machines' credentials, not a provider"
    speaks_https = row.base_url.startswith("https:") and host == urlsplit(row.base_url).hostname
    if key and parts.scheme == "http" and not row.insecure and (speaks_https or (address and address.is_global)):
        return "https is required where a key is sent (`insecure = true` in the provider's table allows http)"
    return ""


def _provider(name: str, row: ProviderRow, access: _Access, rules: Iterable[str], anthropic_version: str) -> Provider:
    enabled = bool(access.address) and (bool(access.key) or access.given or not row.needs_key)
    headers = dict(row.headers)
    if row.dialect == "anthropic":
        headers.setdefault("anthropic-version", anthropic_version)
    return Provider(
        name=name,
        dialect=row.dialect,
        base_url=access.address,
        api_key=access.key or None,
        enabled=enabled,
        probed=row.probed and not enabled,
        auth=row.auth,
        headers=headers,
        query=row.query,
        rules=tuple(rules) if enabled or not row.rules_need_key else (),
        models=tuple(row.models),
        label=row.label or name,
        asks_usage=row.asks_usage,
        renames=row.renames,
        drops=tuple(row.drops),
        roles=row.roles,
        tool_id_length=row.tool_id_length,
    )


# --- the built-in mock --------------------------------------------------------------------------------------------

# Name, dialect and rule of the mock provider's three faces.
_MOCKS = (
    ("mock-openai", "openai", "mock-gpt"),
    ("mock-anthropic", "anthropic", "mock-claude"),
    ("mock-ollama", "ollama", "mock-llama"),
)


def wants_mock(settings: Settings) -> bool:
    return settings.gateway_mock == "on" or (settings.gateway_mock == "auto" and settings.environment == "development")


def with_mock(routes: Routes, address: str) -> Routes:
    """The same routes and the mock provider's, which answers at this address."""
    mocks = {
        name: Provider(
            name=name,
            dialect=dialect,
            base_url=address + ("/v1" if dialect == "openai" else ""),
            headers={"anthropic-version": "2023-06-01"} if dialect == "anthropic" else {},
            rules=(f"{model}*",),
            models=(model,),
            label="mock: built in, not a model",
        )
        for name, dialect, model in _MOCKS
    }
    return replace(routes, providers={**routes.providers, **mocks})


def with_mock_of(routes: Routes, before: Routes) -> Routes:
    """The same routes and the mock provider of others, which goes on answering where it did."""
    mocks = {name: before.providers[name] for name, _, _ in _MOCKS if name in before.providers}
    return replace(routes, providers={**routes.providers, **mocks})

"""What an exchange costs: exact prices, a table of them with its date, and one rounding at the end.

Prices are whole pico-dollars a token, so that no sum knows a float: 1 USD for a million tokens is 1,000,000 of them,
and every price that a vendor prints with up to six decimals is exact. A cost is micro-dollars.

A model that no list names has no price, which is not the price 0: its rows cost null and are seen. That holds for a
local model too. What it costs is known to the operator alone (hardware, power; Ollama also serves models of its cloud,
which are billed), who says so: `[prices.ollama]`, `"*" = { input = 0, output = 0 }`.

The shipped table is a file of the package that others read (this module does no I/O) and `make prices` writes. An
operator's rows have the same form, except that a shipped row may also have a date and hours:

    [prices.openai]
    "gpt-4o" = { input = 2.5, output = 10, cached_input = 1.25 }  # USD per million tokens, as vendors print them
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import msgspec

PICO = 10**6  # pico-dollars a token in 1 USD per million tokens, and also in 1 micro-dollar
MAX_DOLLARS = 10**6  # USD per million tokens, a dollar a token: beyond it is a slip of the keyboard
MAX_NAME = 256  # characters of a model's name; a longer one belongs to nobody
REMEMBERED = 1024  # look-ups; names are the client's to choose


# --- a price and a cost -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Price:
    """Pico-dollars a token, each for the tokens that no later field prices."""

    input: int
    output: int
    cached_input: int  # prompt tokens read from the provider's cache
    cache_write: int  # prompt tokens written to it
    reasoning: int  # completion tokens that were thought
    tiers: tuple["Tier", ...] = ()  # for longer prompts, the shortest first
    since: date | None = None  # when the vendor began to ask it, where that is known

    def to_openrouter(self) -> dict[str, str]:
        """USD a token, in the words of https://openrouter.ai/docs/overview/models; what costs as much as its whole is
        left out."""
        prices = {"prompt": self.input, "completion": self.output}
        parts = {
            "input_cache_read": (self.cached_input, self.input),
            "input_cache_write": (self.cache_write, self.input),
            "internal_reasoning": (self.reasoning, self.output),
        }
        prices |= {name: part for name, (part, whole) in parts.items() if part != whole}
        return {name: f"{Decimal(pico).scaleb(-12).normalize():f}" for name, pico in prices.items()}

    def for_prompt(self, tokens: int) -> "Price":
        """The price of a prompt of this length. Vendors charge all its tokens, and its answer, at the tier it is in.

        https://ai.google.dev/gemini-api/docs/pricing, https://platform.claude.com/docs/en/about-claude/pricing
        """
        for tier in reversed(self.tiers):
            if tokens > tier.above:
                return tier.price
        return self


@dataclass(frozen=True, slots=True)
class Tier:
    above: int  # tokens of the prompt, cached ones too
    price: Price


class Counts(Protocol):
    """Tokens of an exchange: a provider's Usage, or a row of ours."""

    @property
    def prompt_tokens(self) -> int | None: ...
    @property
    def completion_tokens(self) -> int | None: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def cache_write_tokens(self) -> int: ...
    @property
    def reasoning_tokens(self) -> int: ...


def cost_micros(price: Price, usage: Counts) -> int:
    """Micro-dollars, half a one rounded up, once for the whole exchange.

    A provider that reports more cached tokens than the prompt has (or more reasoning than the completion) is charged
    by the whole: a part never costs more tokens than there were.
    """
    prompt, completion = usage.prompt_tokens or 0, usage.completion_tokens or 0
    price = price.for_prompt(prompt) if price.tiers else price
    pico = prompt * price.input + completion * price.output
    if usage.cached_tokens or usage.cache_write_tokens:
        cached = min(usage.cached_tokens, prompt)
        written = min(usage.cache_write_tokens, prompt - cached)
        pico += cached * (price.cached_input - price.input) + written * (price.cache_write - price.input)
    if usage.reasoning_tokens:
        pico += min(usage.reasoning_tokens, completion) * (price.reasoning - price.output)
    return (pico + PICO // 2) // PICO


# --- rows, as files have them -------------------------------------------------------------------------------------


class PricesError(ValueError):
    """One line that names the key of the operator's file and what is wrong with it."""


class _Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """USD per million tokens. What is left out costs what the tokens it is a part of cost."""

    input: Decimal
    output: Decimal
    cached_input: Decimal | None = None
    cache_write: Decimal | None = None
    reasoning: Decimal | None = None

    def __post_init__(self) -> None:
        for name in ("input", "output", "cached_input", "cache_write", "reasoning"):
            dollars = getattr(self, name)
            if dollars is None:
                continue
            if not dollars.is_finite() or not 0 <= dollars <= MAX_DOLLARS:
                raise ValueError(f"{name}: {dollars} is not between 0 and {MAX_DOLLARS} USD per million tokens")
            if dollars * PICO % 1:
                raise ValueError(f"{name}: {dollars} has more than 6 decimals")

    def price(self, tiers: tuple[Tier, ...] = (), since: date | None = None) -> Price:
        def pico(dollars: Decimal | None, otherwise: Decimal) -> int:
            return int((otherwise if dollars is None else dollars) * PICO)

        return Price(
            input=pico(self.input, self.input),
            output=pico(self.output, self.output),
            cached_input=pico(self.cached_input, self.input),
            cache_write=pico(self.cache_write, self.input),
            reasoning=pico(self.reasoning, self.output),
            tiers=tiers,
            since=since,
        )


class _TierRow(_Rates, frozen=True, forbid_unknown_fields=True, kw_only=True):
    above: int


class PriceRow(_Rates, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model of a `[prices.PROVIDER]` table of the operator's file."""

    tiers: list[_TierRow] = []

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(above <= shorter for shorter, above in pairwise([0, *(tier.above for tier in self.tiers)])):
            raise ValueError("tiers: `above` is a number of tokens that rises from tier to tier")

    def all_tiers(self) -> tuple[Tier, ...]:
        return tuple(Tier(tier.above, tier.price()) for tier in self.tiers)


class _ShippedRow(PriceRow, frozen=True, forbid_unknown_fields=True, kw_only=True):
    since: date | None = None
    hours: tuple[time, time] | None = None  # UTC, from and before; a vendor's peak
    context: int | None = None  # tokens of prompt and answer; known from the same source


class _Shipped(msgspec.Struct, frozen=True, kw_only=True):
    as_of: date
    source: str
    # By vendor and name. A row, rows of which the last one in force counts, or the name whose rows are meant. They are
    # left as text until a request needs one: a thousand models ship, and a process meets a handful.
    prices: dict[str, dict[str, msgspec.Raw]]


_READER = msgspec.json.Decoder(_Shipped)
_ROWS = msgspec.json.Decoder(_ShippedRow | list[_ShippedRow] | str)


@dataclass(frozen=True, slots=True)
class _Rate:
    price: Price
    hours: tuple[time, time] | None = None
    context: int | None = None

    def stands(self, day: date, clock: time | None) -> bool:
        """In force on that day, at that time of it; without a time, at any."""
        begun = self.price.since is None or self.price.since <= day
        return begun and (clock is None or self.hours is None or self.hours[0] <= clock < self.hours[1])


# --- the table ----------------------------------------------------------------------------------------------------


# What people call a vendor in their configuration, or before a model's name, beside the name of its list.
_SPELLINGS = {"gemini": "google", "xai": "x-ai", "mistralai": "mistral"}

# Who sells the models of others at the makers' prices, as genai-prices has it of Azure's Global deployments
# (`fallback_model_providers`, https://github.com/pydantic/genai-prices/blob/main/prices/providers/azure.yml).
_SELLS = {"azure": ("openai", "anthropic", "deepseek", "x-ai")}

# Who passes the maker's price on, of `maker/model` (https://openrouter.ai/docs/faq); a variant (`:free`) has its own.
_PASSES_ON = ("openrouter",)

# A dated name that is not listed itself is the model it is a release of: `gpt-4o-2024-08-06`, `claude-opus-5-20260401`,
# `claude-haiku-4-5@20251001` (Vertex AI), `gemini-2.5-pro-preview-05-06`, `gemini-2.0-flash-001`.
_DATED = re.compile(r"(-20\d\d-\d\d-\d\d|[-@]20\d{6}|-preview-\d\d-(\d\d|20\d\d)|-00\d)$")

Names = Mapping[str, Sequence[_Rate]]
T = TypeVar("T")


class PriceTable:
    """Prices by provider and model. It remembers look-ups, and changes when the operator's file does: `follow`."""

    def __init__(self, shipped: _Shipped, own: Mapping[str, Names]) -> None:
        self.as_of = shipped.as_of
        self.source = shipped.source
        self._shipped = shipped.prices
        self._own = own
        self._remembered = lru_cache(REMEMBERED)(self._find)

    def follow(self, other: "PriceTable") -> None:
        """From now on this table says what the other does."""
        self.as_of, self.source = other.as_of, other.source
        self._shipped, self._own, self._remembered = other._shipped, other._own, other._remembered

    def price(self, provider: str, model: str, at: datetime | None = None) -> Price | None:
        """What a provider asks for a model at a time (an aware one); None when no list says it.

        The operator's rows come first, then the provider's own list, then the list of the vendor whose model it sells.
        In each: the name, else the longest of the name without its date and of any `name*`. Without a time it is the
        price on the day of the table, and of two within a day the peak's: a budget must not be charged too little.
        """
        rates = self._remembered(provider, model) if len(model) <= MAX_NAME else ()
        if not rates:
            return None
        if len(rates) == 1:
            return rates[0].price
        at = at and at.astimezone(UTC)
        day, clock = (at.date(), at.time()) if at else (self.as_of, None)
        return next((rate.price for rate in reversed(rates) if rate.stands(day, clock)), rates[0].price)

    def context_length(self, provider: str, model: str) -> int | None:
        """Tokens of prompt and answer together; None where nobody says it."""
        return next((rate.context for rate in self._find_shipped(provider, model.lower()) if rate.context), None)

    def _find(self, provider: str, model: str) -> Sequence[_Rate]:
        name = model.lower()
        return _look_up(self._own.get(provider, {}), name) or self._find_shipped(provider, name)

    def _find_shipped(self, provider: str, name: str) -> Sequence[_Rate]:
        for vendor, theirs in _lists(provider, name):
            if text := _look_up(self._shipped.get(vendor, {}), theirs):
                return self._read(vendor, text)
        return ()

    def _read(self, vendor: str, text: msgspec.Raw) -> Sequence[_Rate]:
        rows = _ROWS.decode(text)
        if isinstance(rows, str):
            return self._read(vendor, self._shipped[vendor][rows])
        rows = rows if isinstance(rows, list) else [rows]
        return tuple(_Rate(row.price(row.all_tiers(), row.since), row.hours, row.context) for row in rows)


def price_table(shipped: bytes, own: Mapping[str, Any] | None = None) -> PriceTable:
    """The table of the package's prices.json and of the operator's `prices`, as TOML was parsed. Raises PricesError."""
    return PriceTable(_READER.decode(shipped), _own(own or {}))


def _own(prices: Mapping[str, Any]) -> dict[str, Names]:
    for provider, models in prices.items():
        if not isinstance(models, Mapping):
            raise PricesError(f"prices.{provider}: a table of models is required")
    return {
        provider: {model.lower(): (_Rate(_own_price(provider, model, row)),) for model, row in models.items()}
        for provider, models in prices.items()
    }


def _own_price(provider: str, model: str, row: Any) -> Price:
    if "*" in model[:-1]:
        raise PricesError(f'prices.{provider}."{model}": a `*` stands at the end of a name')
    try:
        given = msgspec.convert(row, PriceRow)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        raise PricesError(f'prices.{provider}."{model}"{path.rstrip("`")}: {problem}') from None
    return given.price(given.all_tiers())


def _lists(provider: str, name: str) -> Iterator[tuple[str, str]]:
    """The lists that may have a provider's model, and its name there."""
    vendor = _SPELLINGS.get(provider, provider)
    yield vendor, name.removeprefix("models/")  # as Gemini's own list of models has it
    for other in _SELLS.get(vendor, ()):
        yield other, name
    maker, slash, rest = name.partition("/")
    if vendor in _PASSES_ON and slash and ":" not in rest:
        yield _SPELLINGS.get(maker, maker), rest


def _look_up(names: Mapping[str, T], name: str) -> T | None:
    if name in names:
        return names[name]
    undated = _DATED.sub("", name)
    for length in range(len(name), -1, -1):
        start = name[:length]
        if found := names.get(f"{start}*") or (names.get(start) if start == undated else None):
            return found
    return None

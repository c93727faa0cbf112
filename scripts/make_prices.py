"""Write gateway/prices.json anew, from the prices that the genai-prices project collects (`make prices` installs it).

genai-prices (MIT, https://github.com/pydantic/genai-prices) is needed here alone and is no dependency of the gateway.
What is taken: models that answer with text and are priced by the token, at the standard tier (no batch, flex or
priority), from the day of the run on. What is left out stays without a price, which a metric shows; a wrong price would
not be seen.
"""

import json
import re
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import Any

from genai_prices import types  # type: ignore[import-not-found, unused-ignore]
from genai_prices.data import providers  # type: ignore[import-not-found, unused-ignore]

from gateway.protocol.pricing import price_table

VENDORS = (
    "anthropic",
    "azure",
    "deepseek",
    "fireworks",
    "google",
    "groq",
    "mistral",
    "openai",
    "openrouter",
    "together",
    "x-ai",
)

FIELDS = {
    "input_mtok": "input",
    "output_mtok": "output",
    "cache_read_mtok": "cached_input",
    "cache_write_mtok": "cache_write",
    "output_reasoning_mtok": "reasoning",
}

# Answers that are not text, or that are not charged by the token alone: our counts do not tell their parts apart.
OTHER_ANSWERS = ("output_audio_mtok", "output_image_mtok", "output_video_mtok", "audio_hours", "requests_kcount")
OTHER_NAMES = re.compile(r"audio|image|tts|realtime|whisper|transcribe|speech|ocr|lyria|-live|^~|:batch$")

PACKAGE = Path(__file__).parents[1] / "gateway"


def main() -> None:
    today = datetime.now(UTC).date()
    prices = {vendor.id: dict(sorted(_names(vendor, today))) for vendor in providers if vendor.id in VENDORS}
    head = {"as_of": today.isoformat(), "source": f"genai-prices {metadata.version('genai-prices')}"}
    text = _lay_out(head, prices)
    _compare(text, prices)
    (PACKAGE / "prices.json").write_text(text, "utf-8")
    (PACKAGE / "prices.LICENSE").write_text(_licence(), "utf-8")
    sys.stdout.write(f"{sum(map(len, prices.values()))} names, {len(text)} bytes\n")


def _lay_out(head: dict[str, str], prices: dict[str, dict[str, Any]]) -> str:
    """One line a name, so that a change of prices is read as one."""
    vendors = []
    for vendor, names in prices.items():
        lines = (f"{json.dumps(name)}:{json.dumps(row, separators=(',', ':'))}" for name, row in names.items())
        vendors.append(json.dumps(vendor) + ":{\n" + ",\n".join(lines) + "\n}")
    return json.dumps(head)[:-1] + ', "prices":{\n' + ",\n".join(vendors) + "\n}}\n"


# --- names --------------------------------------------------------------------------------------------------------


def _names(vendor: Any, today: date) -> Iterator[tuple[str, Any]]:
    """Each name of each model: the first with the row, the others with the first."""
    for model in vendor.models:
        rows = _rows(model, today)
        names = [name for name in dict.fromkeys(_said(vendor, model)) if not OTHER_NAMES.search(name)]
        if vendor.id == "openrouter":  # a model of OpenRouter has its maker's name before its own
            names = [name for name in names if "/" in name]
        if rows and names:
            yield names[0], rows[0] if len(rows) == 1 else rows
            yield from ((name, names[0]) for name in names[1:])


def _said(vendor: Any, model: Any) -> Iterator[str]:
    """The names a model goes by: words of its rule, if the rule of no model before it takes them."""
    for name in (model.id, *_words(model.match)):
        if vendor.find_model(name.removesuffix("*")) is model:
            yield name.lower()


def _words(rule: Any) -> Iterator[str]:
    """`name` for an equality, `name*` for a start. A regular expression is a date, which the look-up strips itself."""
    match rule:
        case types.ClauseEquals():
            yield rule.equals
        case types.ClauseStartsWith():
            yield rule.starts_with + "*"
        case types.ClauseContains():
            yield rule.contains + "*"
        case types.ClauseEndsWith():
            yield rule.ends_with
        case types.ClauseOr():
            for part in rule.or_:
                yield from _words(part)
        case types.ClauseAnd():  # a start without its exceptions; the start itself is a name, what follows is not known
            for part in rule.and_:
                yield from (word.removesuffix("*") for word in _words(part))


# --- rows ---------------------------------------------------------------------------------------------------------


def _rows(model: Any, today: date) -> list[dict[str, Any]]:
    """What is in force today or will be; empty for a model that the table cannot price."""
    dated = model.prices if isinstance(model.prices, list) else [types.ConditionalPrice(prices=model.prices)]
    begun = [index for index, each in enumerate(dated) if _since(each) is None or _since(each) <= today]
    plain = [index for index in begun if not isinstance(dated[index].constraint, types.TimeOfDateConstraint)]
    rows = [_row(model, each) for each in dated[max(plain, default=0) :]]
    return [row for row in rows if row] if all(rows) else []


def _since(dated: Any) -> Any:
    return dated.constraint.start_date if isinstance(dated.constraint, types.StartDateConstraint) else None


def _row(model: Any, dated: Any) -> dict[str, Any]:
    given = {name: price for name, price in vars(dated.prices).items() if price is not None}
    if not given and model.id.endswith(":free"):
        return {"input": 0, "output": 0}
    if "embed" in model.id:
        given.setdefault("output_mtok", Decimal(0))  # a vector is not counted
    if not {"input_mtok", "output_mtok"} <= set(given) or not set(given).isdisjoint(OTHER_ANSWERS):
        return {}
    row: dict[str, Any] = _rates(given, 0)
    starts = sorted({tier.start for price in given.values() for tier in getattr(price, "tiers", ())})
    if starts:
        row["tiers"] = [{"above": start, **_rates(given, start + 1)} for start in starts]
    if model.context_window:
        row["context"] = model.context_window
    if since := _since(dated):
        row["since"] = since.isoformat()
    if isinstance(dated.constraint, types.TimeOfDateConstraint):
        row["hours"] = _hours(dated.constraint.start_time, dated.constraint.end_time)
    return row


def _hours(start: time, end: time) -> list[str]:
    if start.tzinfo is not UTC or end.tzinfo is not UTC or start >= end:
        raise ValueError(f"{start} to {end}: the table has hours of one day of UTC only")
    return [each.strftime("%H:%M:%S") for each in (start, end)]


def _rates(given: dict[str, Any], prompt: int) -> dict[str, float | int]:
    rates = {ours: _for_prompt(given[theirs], prompt) for theirs, ours in FIELDS.items() if theirs in given}
    # A write "below" the input is what OpenRouter asks for Gemini's storage, on top of the tokens' own price:
    # https://openrouter.ai/docs/features/prompt-caching
    if rates.get("cache_write", rates["input"]) < rates["input"]:
        rates["cache_write"] = (rates["input"] + rates["cache_write"]).quantize(Decimal("0.000001"))
    if rates.get("cached_input", Decimal(0)) > rates["input"]:
        del rates["cached_input"]
    return {name: _number(price) for name, price in rates.items()}


def _for_prompt(price: Any, prompt: int) -> Decimal:
    if isinstance(price, Decimal):
        return price
    reached = [tier.price for tier in price.tiers if prompt > tier.start]
    return Decimal(reached[-1] if reached else price.base)


def _number(price: Decimal) -> float | int:
    """A number whose JSON text is the price, digit for digit."""
    number = int(price) if price == int(price) else float(price)
    if Decimal(json.dumps(number)) != price or price * 10**6 % 1:
        raise ValueError(f"{price} cannot be written exactly")
    return number


# --- checks -------------------------------------------------------------------------------------------------------


def _compare(text: str, prices: dict[str, dict[str, Any]]) -> None:
    """Raises when a name would be found at another price than genai-prices has for it today."""
    table, now = price_table(text.encode()), datetime.now(UTC)
    for vendor in providers:
        for name in prices.get(vendor.id, ()):
            theirs = vendor.find_model(name.removesuffix("*")).get_prices(now)
            ours = table.price(vendor.id, name.removesuffix("*"), now)
            asked = [_for_prompt(price or Decimal(0), 0) * 10**6 for price in (theirs.input_mtok, theirs.output_mtok)]
            if ours is None or [ours.input, ours.output] != asked:
                raise ValueError(f"{vendor.id} {name}: {ours} is not {theirs}")


def _licence() -> str:
    files = metadata.files("genai-prices") or []
    text = next(file.read_text() for file in files if file.name == "LICENSE")
    return f"The prices in prices.json are those of genai-prices, https://github.com/pydantic/genai-prices:\n\n{text}"


if __name__ == "__main__":
    main()

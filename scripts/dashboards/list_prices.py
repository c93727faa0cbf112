"""What vendors charge for prompt tokens, as rows of SQL: what their caches save is the difference.

A row of usage holds what it cost, and not what it would have cost: so the spend dashboard brings the list prices along.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PRICES = Path(__file__).parents[2] / "gateway" / "prices.json"
# Whose models are asked for by the vendors' own names. Resellers sell the same ones, by thousands of names.
VENDORS = ("anthropic", "google", "groq", "mistral", "openai", "x-ai")

Rates = tuple[float, float, float]  # USD per million tokens of a prompt: read, read from the cache, written to it


def list_prices() -> str:
    """`('openai','gpt-4o%',2.5,1.25,2.5),…`: provider, pattern of LIKE, and the rates.

    The longest pattern that fits a model is its own. Models without a price for cached tokens are not among them, nor
    are prices of longer prompts.
    """
    table = json.loads(PRICES.read_text())["prices"]
    rows = (row for vendor in VENDORS for row in _rows(vendor, table[vendor]))
    return ",\n".join(
        f"('{vendor}','{pattern}',{','.join(f'{rate:g}' for rate in rates)})" for vendor, pattern, rates in rows
    )


def _rows(vendor: str, names: Mapping[str, Any]) -> Iterator[tuple[str, str, Rates]]:
    known = {name: rates for name in names if (rates := _rates(names, name)) is not None}
    for name, rates in sorted(known.items()):
        shorter = (name[:length] + "*" for length in range(len(name.removesuffix("*")) - (name[-1] == "*"), 0, -1))
        covering = next((pattern for pattern in shorter if pattern in names), None)
        if covering is None or known.get(covering) != rates:
            yield vendor, name.replace("*", "%"), rates


def _rates(names: Mapping[str, Any], name: str) -> Rates | None:
    found = names[name]
    while isinstance(found, str):  # another name of the same model
        found = names[found]
    if not isinstance(found, dict) or "cached_input" not in found:
        return None
    read: float = found["input"]
    return read, found["cached_input"], found.get("cache_write", read)

"""`gateway usage`."""

import argparse
from typing import TYPE_CHECKING, Any

from gateway.commands.database import Rows, Stores, add_json, print_rows, with_database
from gateway.settings import Settings

if TYPE_CHECKING:
    from gateway.stores.stats import Figures


def describe_usage(parser: argparse.ArgumentParser) -> None:
    from gateway.stores.stats import GROUP_BY, RANGES

    parser.description = "Tokens and requests of a time range, as a table or JSON."
    parser.add_argument("--since", choices=tuple(RANGES), default="24h", help="how far back (24h)")
    parser.add_argument("--group-by", choices=GROUP_BY, default="model")
    add_json(parser)
    parser.set_defaults(run=_usage)


def _usage(arguments: argparse.Namespace, settings: Settings) -> int:
    from gateway.stores.stats import Scope, read_stats

    async def work(stores: Stores) -> Rows:
        stats = await read_stats(stores.pool, Scope(None, arguments.since), arguments.group_by)
        return [{arguments.group_by: group.name, **_figures(group)} for group in stats.groups]

    return print_rows(with_database(settings, work), arguments.json)


def _figures(group: "Figures") -> dict[str, Any]:
    return {
        "requests": group.requests,
        "errors": group.errors,
        "prompt_tokens": group.prompt_tokens,
        "completion_tokens": group.completion_tokens,
        "total_tokens": group.total_tokens,
        "cached_tokens": group.cached_tokens,
        "cost_usd": f"{group.cost_micros / 1e6:.6f}",
        "unpriced": group.unpriced,
    }

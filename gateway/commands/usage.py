"""`gateway usage`."""

import argparse
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import orjson

from gateway.commands.database import Rows, Stores, add_json, print_rows, with_database
from gateway.settings import Settings

if TYPE_CHECKING:
    from gateway.stores.stats import Bound, Figures


def describe_usage(parser: argparse.ArgumentParser) -> None:
    from gateway.commands.audit import describe_audit
    from gateway.stores.stats import GROUP_BY

    parser.description = (
        "Requests, tokens and cost of a time range, as a table or JSON. --since and --until take a duration back from "
        "now, such as 36h, 7d or 2w, or an RFC 3339 time or date (UTC)."
    )
    parser.add_argument("--since", type=_bound, default="24h", help="begin of the range, or `all` (24h)")
    parser.add_argument("--until", type=_bound, help="end of the range (now)")
    parser.add_argument("--group-by", choices=GROUP_BY, default="model")
    add_json(parser)
    parser.set_defaults(run=_usage)
    actions = parser.add_subparsers(required=False, metavar="ACTION")
    _describe_show(actions)
    describe_audit(actions)


def _describe_show(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    show = actions.add_parser(
        "show",
        help="print all that is known of one request",
        description="Print the usage row of one request, every column on a line of its own.",
    )
    show.add_argument("id", help="the X-Request-Id of its answer")
    add_json(show)
    show.set_defaults(run=_show)


def _bound(text: str) -> "Bound | None":
    from gateway.stores.stats import bound_of

    try:
        return None if text == "all" else bound_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _usage(arguments: argparse.Namespace, settings: Settings) -> int:
    from gateway.stores.stats import Scope, read_stats

    async def work(stores: Stores) -> Rows:
        scope = Scope(None, arguments.since, arguments.until)
        stats = await read_stats(stores.pool, scope, arguments.group_by)
        # A table has room for what there is; a script finds the same names each time.
        saving = arguments.json or any(group.remembered for group in stats.groups)
        more = _savings if saving else lambda group: {}
        return [{arguments.group_by: group.name, **_figures(group), **more(group)} for group in stats.groups]

    rows = with_database(settings, work)
    try:
        status = print_rows(rows, arguments.json)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads has seen enough; the interpreter would complain again when it flushes what is left:
        # https://docs.python.org/3/library/signal.html#note-on-sigpipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _show(arguments: argparse.Namespace, settings: Settings) -> int:
    from gateway.stores.stats import read_row

    async def work(stores: Stores) -> Rows:
        row = await read_row(stores.pool, None, arguments.id)
        return [{**asdict(row), "total_tokens": row.total_tokens}]

    [row] = with_database(settings, work)
    if arguments.json:
        print(orjson.dumps(row, option=orjson.OPT_INDENT_2 | orjson.OPT_UTC_Z).decode())
        return 0
    return print_rows([{"column": name, "value": value} for name, value in row.items()], False)


def _figures(group: "Figures") -> dict[str, Any]:
    return {
        "requests": group.requests,
        "errors": group.errors,
        "prompt_tokens": group.prompt_tokens,
        "completion_tokens": group.completion_tokens,
        "total_tokens": group.total_tokens,
        "cached_tokens": group.cached_tokens,
        "cached_percent": round(100 * group.cache_hit_rate, 1),
        "cost_usd": f"{group.cost_micros / 1e6:.6f}",
        "unpriced": group.unpriced,
    }


def _savings(group: "Figures") -> dict[str, Any]:
    return {
        "remembered": group.remembered,
        "saved_tokens": group.saved_tokens,
        "saved_usd": f"{group.saved_micros / 1e6:.6f}",
    }

"""What was used, and what was saved: figures, and the rows they are made of. A member sees its own, an admin
everybody's."""

import asyncio
import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from functools import partial
from typing import Any, NoReturn
from uuid import UUID

import orjson
from aiohttp import web

from gateway.appkeys import POOL, SHIPPER
from gateway.exchange import Principal
from gateway.identity import MAX_LABEL, identify, tenant
from gateway.protocol.checks import MAX_MODEL
from gateway.protocol.errors import InvalidRequest
from gateway.stores.percentiles import RANGES as LATENCY_RANGES
from gateway.stores.percentiles import Percentiles, Point, read_latency
from gateway.stores.stats import (
    GROUP_BY,
    Bound,
    Figures,
    Scope,
    Stats,
    Turns,
    bound_of,
    read_row,
    read_rows,
    read_stats,
)
from gateway.stores.tokens import PREFIX, prefix_of
from gateway.stores.usage import UsageRow

MAX_ROWS = 1000  # of one page
DEFAULT_ROWS = 100
FORMATS = ("json", "csv")
RANGES = ("1h", "24h", "7d", "30d", "all")
MAX_PROVIDER = 256  # characters

_COLUMNS_ASKED = frozenset({"user", "app", "model", "provider", "key"})
_FILTERS = _COLUMNS_ASKED | {"range", "since", "until"}


def routes() -> list[web.RouteDef]:
    turns = Turns()  # of one application, taken by all routes; there is nothing to close
    return [
        web.get("/api/stats", partial(stats, turns)),
        web.get("/api/latency", partial(latency, turns)),
        web.get("/api/usage", partial(usage, turns)),
        web.get("/api/usage/{id}", partial(one_request, turns)),
    ]


async def stats(turns: Turns, request: web.Request) -> web.Response:
    """Totals of a range and of the last hour, top models, and groups.

    Rows that are still `queued` in this process are in no figure; `as_of` is the moment that all figures are of.
    """
    principal, _ = await identify(request)
    query = _query(request, _FILTERS | {"group_by", "format"})
    form = _choice(query, "format", FORMATS, "json")
    group_by = _choice(query, "group_by", GROUP_BY, "")
    scope = _scope(principal, query, default_range="24h")
    queued = request.app[SHIPPER].queued  # before the rows are read: one that is shipped meanwhile is in both
    async with turns.take(principal.account_id):
        found = await read_stats(request.app[POOL], scope, group_by or None)
    if form == "csv":
        return await asyncio.to_thread(_stats_csv, found, group_by)
    body: dict[str, Any] = {
        "range": _range(query, "24h"),
        "since": found.begin,
        "until": found.end,
        "as_of": found.as_of,
        "queued": queued,
        "totals": _figures(found.totals),
        "last_hour": _figures(found.last_hour),
        "top_models": [{"model": top.name, **_figures(top)} for top in found.top_models],
    }
    if group_by:
        body["group_by"] = group_by
        body["groups"] = [_group(group_by, group) for group in found.groups]
        body["more_groups"] = found.more_groups
    return _json(body)


async def latency(turns: Turns, request: web.Request) -> web.Response:
    """Percentiles of latency and of the time to the first token, in steps of a range that grow with it.

    `sampled`: there are so many rows that some were read for all; then `requests` are estimates,
    too, and of a model, user or application with few requests most steps have no point. A step without a
    request has no point.
    """
    principal, _ = await identify(request)
    query = _query(request, _COLUMNS_ASKED | {"range"})
    name = _choice(query, "range", LATENCY_RANGES, "24h")
    scope = _scope(principal, query, default_range="24h")
    async with turns.take(principal.account_id):
        found = await read_latency(request.app[POOL], scope, name)
    return _json(
        {
            "range": name,
            "since": found.begin,
            "until": found.end,
            "step_seconds": round(found.step.total_seconds()),
            "sampled": found.sampled,
            "points": [_point(point) for point in found.points],
        }
    )


async def usage(turns: Turns, request: web.Request) -> web.Response:
    """A page of rows, newest first; the next page begins at `next_cursor` (CSV: the header `X-Next-Cursor`)."""
    principal, _ = await identify(request)
    query = _query(request, _FILTERS | {"limit", "cursor", "format"})
    form = _choice(query, "format", FORMATS, "json")
    limit, cursor = _limit(query), _cursor(query)
    scope = _scope(principal, query, default_range="all")
    queued = request.app[SHIPPER].queued  # before the rows are read, as above
    async with turns.take(principal.account_id):
        found = await read_rows(request.app[POOL], scope, cursor, limit + 1)
    page, more = found[:limit], len(found) > limit
    next_cursor = page[-1].request_id if more else None
    # A thousand rows are five milliseconds of work as JSON and twenty as CSV: streams would feel it.
    if form == "csv":
        return await asyncio.to_thread(_rows_csv, page, next_cursor)
    return await asyncio.to_thread(_page, page, next_cursor, queued)


async def one_request(turns: Turns, request: web.Request) -> web.Response:
    """The row of one request, by its X-Request-Id."""
    principal, _ = await identify(request)
    _query(request, ())
    async with turns.take(principal.account_id):
        row = await read_row(request.app[POOL], tenant(principal), request.match_info["id"])
    return _json(_row(row))


# --- what was asked -----------------------------------------------------------------------------------------------


def _query(request: web.Request, known: Collection[str]) -> Mapping[str, str]:
    """The parameters that were given a value. A misspelt filter would show more than was asked for: it is refused."""
    given: dict[str, str] = {}
    for name, value in request.query.items():
        if name not in known:
            _refuse(name[:64], f"unknown here; known are {', '.join(sorted(known)) or 'none'}")
        if name in given:
            _refuse(name, "given twice")
        given[name] = value
    return {name: value for name, value in given.items() if value}


def _scope(principal: Principal, query: Mapping[str, str], *, default_range: str) -> Scope:
    named = _range(query, default_range)
    return Scope(
        account_id=tenant(principal),
        since=_bound(query, "since") if named in (None, "all") else bound_of(named),
        until=_bound(query, "until"),
        user=_text(query, "user", MAX_LABEL),
        app=_text(query, "app", MAX_LABEL),
        model=_text(query, "model", MAX_MODEL),
        provider=_text(query, "provider", MAX_PROVIDER),
        key=_key(query),
    )


def _range(query: Mapping[str, str], default: str) -> str | None:
    """One of RANGES; None: `since` and `until` say it."""
    given = {"since", "until"} & query.keys()
    if given and "range" in query:
        _refuse("range", "give it, or since and until")
    return None if given else _choice(query, "range", RANGES, default)


def _bound(query: Mapping[str, str], name: str) -> Bound | None:
    if name not in query:
        return None
    try:
        return bound_of(query[name])
    except ValueError as error:
        _refuse(name, str(error))


def _key(query: Mapping[str, str]) -> str | None:
    """The id of a key, from that or its prefix."""
    value = query.get("key")
    if value is None:
        return None
    key_id = value.removeprefix(PREFIX)
    if not key_id.isascii() or not key_id.isalnum() or len(key_id) > MAX_LABEL:
        _refuse("key", f"the id of a key or its prefix {PREFIX}… is required, never the key itself")
    return key_id


def _choice(query: Mapping[str, str], name: str, choices: Collection[str], default: str) -> str:
    value = query.get(name, default)
    if value not in choices and value != default:
        _refuse(name, f"one of {', '.join(choices)} is required")
    return value


def _text(query: Mapping[str, str], name: str, longest: int) -> str | None:
    value = query.get(name)
    if value is not None and (len(value) > longest or not value.isprintable()):
        _refuse(name, f"at most {longest} printable characters")
    return value


def _limit(query: Mapping[str, str]) -> int:
    value = query.get("limit", str(DEFAULT_ROWS))
    if not value.isascii() or not value.isdecimal() or len(value) > 4 or not 1 <= int(value) <= MAX_ROWS:
        _refuse("limit", f"a number from 1 to {MAX_ROWS} is required")
    return int(value)


def _cursor(query: Mapping[str, str]) -> str | None:
    value = query.get("cursor")
    if value is None:
        return None
    try:
        return str(UUID(value))
    except ValueError:
        _refuse("cursor", "take it from the page before")


def _refuse(param: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"invalid {param}: {problem}", param=param)


# --- what is answered ---------------------------------------------------------------------------------------------


def _json(body: Mapping[str, Any]) -> web.Response:
    return web.Response(
        body=orjson.dumps(body, option=orjson.OPT_UTC_Z),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


def _figures(figures: Figures) -> dict[str, Any]:
    return {
        "requests": figures.requests,
        "errors": figures.errors,
        "error_rate": round(figures.error_rate, 4),
        "client_aborts": figures.client_aborts,
        "prompt_tokens": figures.prompt_tokens,
        "completion_tokens": figures.completion_tokens,
        "total_tokens": figures.total_tokens,
        "cost_micros": figures.cost_micros,
        "unpriced": figures.unpriced,
        "cached_tokens": figures.cached_tokens,
        "cache_write_tokens": figures.cache_write_tokens,
        "reasoning_tokens": figures.reasoning_tokens,
        "cache_hit_rate": round(figures.cache_hit_rate, 4),
        "average_latency_ms": _rounded(figures.average_latency_ms),
        "average_ttft_ms": _rounded(figures.average_ttft_ms),
        "remembered": figures.remembered,
        "saved_tokens": figures.saved_tokens,
        "saved_micros": figures.saved_micros,
    }


def _rounded(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else round(milliseconds, 1)


def _point(point: Point) -> dict[str, Any]:
    return {
        "start": point.start,
        "requests": point.requests,
        "latency_ms": _percentiles(point.latency_ms),
        "ttft_ms": None if point.ttft_ms is None else _percentiles(point.ttft_ms),
    }


def _percentiles(percentiles: Percentiles) -> dict[str, float]:
    return {name: round(milliseconds, 1) for name, milliseconds in percentiles._asdict().items()}


def _group(group_by: str, group: Figures) -> dict[str, Any]:
    name = prefix_of(group.name) if group_by == "key" else group.name
    return {group_by: name, **_figures(group)}


_COLUMNS = tuple(field.name for field in fields(UsageRow) if field.name != "key_id")


def _row(row: UsageRow) -> dict[str, Any]:
    """The row as the table has it, but for the key: what people see of one is its prefix."""
    columns = {name: getattr(row, name) for name in _COLUMNS}
    return {**columns, "key": prefix_of(row.key_id), "total_tokens": row.total_tokens}


def _page(rows: list[UsageRow], next_cursor: str | None, queued: int) -> web.Response:
    return _json({"data": [_row(row) for row in rows], "next_cursor": next_cursor, "queued": queued})


def _rows_csv(rows: list[UsageRow], next_cursor: str | None) -> web.Response:
    following = {} if next_cursor is None else {"X-Next-Cursor": next_cursor}
    return _csv("usage", [*_COLUMNS, "key", "total_tokens"], (_row(row).values() for row in rows), following)


def _stats_csv(found: Stats, group_by: str) -> web.Response:
    """The groups; the totals when there are none."""
    if not group_by:
        totals = _figures(found.totals)
        return _csv("stats", [*totals], [totals.values()], {})
    more = {"X-More-Groups": "true" if found.more_groups else "false"}
    columns = [*_group(group_by, found.totals)]
    return _csv("stats", columns, (_group(group_by, group).values() for group in found.groups), more)


def _csv(name: str, columns: Sequence[str], rows: Iterable[Iterable[Any]], headers: Mapping[str, str]) -> web.Response:
    """RFC 4180, with a header line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in rows)
    attached = {"Cache-Control": "no-store", "Content-Disposition": f'attachment; filename="{name}.csv"'}
    return web.Response(text=out.getvalue(), content_type="text/csv", charset="utf-8", headers={**attached, **headers})


# What makes a spreadsheet take a cell for a formula (https://owasp.org/www-community/attacks/CSV_Injection).
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)

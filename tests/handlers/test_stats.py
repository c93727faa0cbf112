import asyncio
import csv
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import asyncpg
import pytest
from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.typedefs import Handler

from gateway.appkeys import KEYS, POOL, SETTINGS, SHIPPER
from gateway.exchange import new_id
from gateway.handlers.stats import routes
from gateway.protocol.errors import GatewayError
from gateway.settings import Settings
from gateway.stores.journal import Journal
from gateway.stores.keys import KeyStore
from gateway.stores.ledger import write_rows
from gateway.stores.passwords import HashingPool
from gateway.stores.shipper import Shipper
from gateway.stores.usage import UsageRow

pytestmark = pytest.mark.integration


@dataclass(frozen=True)
class Person:
    token: str
    key_id: str
    account_id: str


@dataclass
class World:
    """The two routes, an admin and two members with a key each."""

    client: TestClient[web.Request, web.Application]
    journal: Journal
    pool: asyncpg.Pool
    admin: Person
    ann: Person
    ben: Person

    async def get(self, path: str, person: Person | None = None, **query: str) -> ClientResponse:
        headers = {"Authorization": f"Bearer {person.token}"} if person else {}
        return await self.client.get(path, params=query, headers=headers)

    async def json(self, path: str, person: Person, **query: str) -> Any:
        response = await self.get(path, person, **query)
        assert response.status == 200, await response.text()
        return await response.json()

    async def write(self, *rows: UsageRow) -> None:
        assert await write_rows(self.pool, rows) == len(rows)


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except GatewayError as error:
        return web.Response(body=error.body(), status=error.http_status, content_type="application/json")


@pytest.fixture
async def world(pool: asyncpg.Pool, tmp_path: Path) -> AsyncIterator[World]:
    hashing = HashingPool()
    keys = KeyStore(pool, None, pepper=b"pepper", cache_seconds=60, stale_seconds=60, hashing=hashing)

    async def person(name: str, role: str) -> Person:
        # Not by registering: three passwords' hashes would be most of every test's time.
        account_id = str(uuid4())
        await pool.execute("insert into accounts values ($1, $2, 'no password', $3)", account_id, name, role)
        key = await keys.create(account_id, name, requests_per_minute=0, concurrent_requests=0, allowed_models=())
        return Person(key.token, key.id, account_id)

    app = web.Application(middlewares=[errors])
    app[SETTINGS] = Settings()
    app[POOL] = pool
    app[KEYS] = keys
    journal = Journal(tmp_path / "journal", fsync="never")
    app[SHIPPER] = Shipper(pool, journal)
    app.add_routes(routes())
    async with TestClient(TestServer(app)) as client:
        people = [await person("admin", "admin"), await person("ann", "member"), await person("ben", "member")]
        yield World(client, journal, pool, *people)
    hashing.close()
    journal.close()


def row(person: Person, **changes: Any) -> UsageRow:
    values: dict[str, Any] = {
        "request_id": new_id(),
        "started_at": datetime.now(UTC),
        "key_id": person.key_id,
        "account_id": person.account_id,
        "user_id": "",
        "app_id": "",
        "client_request_id": "",
        "provider": "openai",
        "model": "gpt-4o",
        "upstream_model": "gpt-4o",
        "stream": True,
        "status": 200,
        "outcome": "ok",
        "error_code": "",
        "finish_reason": "stop",
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "cached_tokens": 4,
        "cache_write_tokens": 2,
        "reasoning_tokens": 1,
        "usage_source": "provider",
        "latency_ms": 100,
        "ttft_ms": 20,
    }
    return UsageRow(**{**values, **changes})


def remembered(person: Person, source_id: str, **changes: Any) -> UsageRow:
    """Of a request that got the answer of another."""
    saved = {"usage_source": "none", "cost_micros": 0, "source_id": source_id, "saved_tokens": 15, "saved_micros": 700}
    tokens = ("prompt_tokens", "completion_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens")
    return row(person, **dict.fromkeys(tokens, 0), **{**saved, "source": "cache", **changes})


# --- /api/stats ---------------------------------------------------------------------------------------------------

NOTHING_SAVED = {"remembered": 0, "saved_tokens": 0, "saved_micros": 0}


async def test_stats_tell_totals_the_last_hour_top_models_and_when(world: World) -> None:
    earlier = datetime.now(UTC) - timedelta(hours=5)
    await world.write(
        row(world.ann, latency_ms=100, cost_micros=1500),
        row(world.ann, latency_ms=201, outcome="upstream_error", status=502, ttft_ms=None),
        row(world.ann, latency_ms=300, outcome="client_abort", status=0, model="claude", started_at=earlier),
    )
    stats = await world.json("/api/stats", world.ann)
    as_of = datetime.fromisoformat(stats.pop("as_of"))
    assert datetime.fromisoformat(stats.pop("since")) == as_of - timedelta(days=1)
    last_hour = {
        "requests": 2,
        "errors": 1,
        "error_rate": 0.5,
        "client_aborts": 0,
        "prompt_tokens": 20,
        "completion_tokens": 10,
        "total_tokens": 30,
        "cost_micros": 1500,
        "unpriced": 1,
        "cached_tokens": 8,
        "cache_write_tokens": 4,
        "reasoning_tokens": 2,
        "cache_hit_rate": 0.4,
        "average_latency_ms": 150.5,
        "average_ttft_ms": 20.0,
        **NOTHING_SAVED,
    }
    assert stats.pop("top_models") == [
        {"model": "gpt-4o", **last_hour},
        {
            "model": "claude",
            "requests": 1,
            "errors": 0,
            "error_rate": 0.0,
            "client_aborts": 1,
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "total_tokens": 15,
            "cost_micros": 0,
            "unpriced": 1,
            "cached_tokens": 4,
            "cache_write_tokens": 2,
            "reasoning_tokens": 1,
            "cache_hit_rate": 0.4,
            "average_latency_ms": 300.0,
            "average_ttft_ms": 20.0,
            **NOTHING_SAVED,
        },
    ]
    assert stats == {
        "range": "24h",
        "until": None,
        "queued": 0,
        "last_hour": last_hour,
        "totals": {
            "requests": 3,
            "errors": 1,
            "error_rate": 0.3333,
            "client_aborts": 1,
            "prompt_tokens": 30,
            "completion_tokens": 15,
            "total_tokens": 45,
            "cost_micros": 1500,
            "unpriced": 2,
            "cached_tokens": 12,
            "cache_write_tokens": 6,
            "reasoning_tokens": 3,
            "cache_hit_rate": 0.4,
            "average_latency_ms": 200.3,
            "average_ttft_ms": 20.0,
            **NOTHING_SAVED,
        },
    }


async def test_stats_of_nothing_are_zeros(world: World) -> None:
    stats = await world.json("/api/stats", world.ann, group_by="user")
    assert (stats["totals"]["requests"], stats["totals"]["error_rate"]) == (0, 0.0)
    assert stats["totals"]["average_latency_ms"] is None
    assert (stats["top_models"], stats["groups"], stats["more_groups"]) == ([], [], False)


async def test_rows_on_their_way_are_in_no_figure_but_counted(world: World) -> None:
    world.journal.end(row(world.ann))
    world.journal.end(row(world.ann))
    stats = await world.json("/api/stats", world.ann)
    assert (stats["queued"], stats["totals"]["requests"]) == (2, 0)


@pytest.mark.parametrize(("name", "requests"), [("1h", 1), ("24h", 2), ("7d", 3), ("30d", 4), ("all", 5)])
async def test_a_range_goes_back_from_now(world: World, name: str, requests: int) -> None:
    ages = [timedelta(), timedelta(hours=2), timedelta(days=2), timedelta(days=10), timedelta(days=400)]
    await world.write(*(row(world.ann, started_at=datetime.now(UTC) - age) for age in ages))
    stats = await world.json("/api/stats", world.ann, range=name)
    assert (stats["range"], stats["totals"]["requests"], stats["last_hour"]["requests"]) == (name, requests, 1)


BOTH = ["/api/stats", "/api/usage"]


async def requests(world: World, path: str, person: Person, **query: str) -> int:
    """How many requests the figures are of, or the rows are."""
    answer = await world.json(path, person, **query)
    return len(answer["data"]) if path == "/api/usage" else int(answer["totals"]["requests"])


@pytest.mark.parametrize("path", BOTH)
async def test_filters_narrow_the_figures_and_the_rows(world: World, path: str) -> None:
    await world.write(
        row(world.ann, user_id="u1", app_id="a1", model="m1"),
        row(world.ann, user_id="u1", app_id="a2", model="m1", provider="anthropic"),
        row(world.ann, user_id="u2", app_id="a1", model="m2", key_id="Key000000002"),
    )

    async def asked(**query: str) -> int:
        return await requests(world, path, world.ann, range="24h", **query)

    assert await asked(user="u1") == 2
    assert await asked(app="a1") == 2
    assert await asked(model="m2") == 1
    assert await asked(provider="anthropic") == 1
    assert await asked(key=world.ann.key_id) == 2
    assert await asked(key=f"aig_{world.ann.key_id}") == 2
    assert await asked(user="u1", app="a1", model="m1") == 1
    assert await asked(provider="openai", key="Key000000002", user="u2") == 1
    assert await asked(user="' or true --") == 0
    assert await asked(key="Key999999999") == 0
    assert await asked(user="") == 3


@pytest.mark.parametrize("path", BOTH)
async def test_a_range_is_named_or_has_a_begin_and_an_end(world: World, path: str) -> None:
    now = datetime.now(UTC)
    days = [timedelta(), timedelta(days=1.5), timedelta(days=10), timedelta(days=400)]
    await world.write(*(row(world.ann, started_at=now - age) for age in days))

    async def asked(**query: str) -> int:
        return await requests(world, path, world.ann, **query)

    assert await asked(since="36h") == await asked(since="2160m") == 1
    assert await asked(since="37h") == await asked(since="2d") == await asked(since="1w") == 2
    assert await asked(since="2w") == 3
    assert await asked(since="2w", until="2d") == 1
    assert await asked(until="2d") == 2
    assert await asked(since="1d", until="2d") == 0
    ten_days_ago = now - timedelta(days=10, seconds=1)
    assert await asked(since=ten_days_ago.isoformat()) == 3
    assert await asked(since=ten_days_ago.isoformat().replace("+", " ")) == 3, "a plus that was not escaped"
    assert await asked(until=f"{ten_days_ago:%Y-%m-%dT%H:%M:%S}Z") == 1
    east = ten_days_ago.astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert await asked(since=east.isoformat(), until=now.isoformat()) == 2
    assert await asked(since=f"{now - timedelta(days=12):%Y-%m-%d}") == 3


async def test_the_moments_that_a_range_means_are_told(world: World) -> None:
    stats = await world.json("/api/stats", world.ann, since="2026-01-01", until="2026-01-01T12:00:00+02:00")
    assert (stats["range"], stats["since"], stats["until"]) == (None, "2026-01-01T00:00:00Z", "2026-01-01T10:00:00Z")
    stats = await world.json("/api/stats", world.ann, range="all")
    assert (stats["range"], stats["since"], stats["until"]) == ("all", None, None)


async def test_groups_are_named_by_what_they_are_grouped_by(world: World) -> None:
    await world.write(row(world.ann, user_id="u1", app_id="a1"), row(world.ann, user_id="u1"), row(world.ben))
    for group_by, names in {
        "user": ["u1", ""],
        "app": ["", "a1"],
        "model": ["gpt-4o"],
        "provider": ["openai"],
        "key": [f"aig_{world.ann.key_id}", f"aig_{world.ben.key_id}"],
    }.items():
        stats = await world.json("/api/stats", world.admin, group_by=group_by)
        assert stats["group_by"] == group_by
        assert [group[group_by] for group in stats["groups"]] == names
        assert sum(group["requests"] for group in stats["groups"]) == 3


async def test_days_and_hours_are_told_in_their_order(world: World) -> None:
    noon = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0) - timedelta(days=5)
    times = [noon, noon + timedelta(minutes=59), noon + timedelta(hours=1), noon + timedelta(days=2)]
    await world.write(*(row(world.ann, started_at=time) for time in [*times, times[-1]]))
    for group_by, counts in {"day": [3, 2], "hour": [2, 1, 2]}.items():
        stats = await world.json("/api/stats", world.ann, range="7d", group_by=group_by)
        assert [group["requests"] for group in stats["groups"]] == counts
        assert not stats["more_groups"]
    assert stats["groups"][1]["hour"] == f"{times[2]:%Y-%m-%dT%H}:00:00Z"


async def test_the_hit_rate_of_the_prompt_cache_is_told_of_each_key(world: World) -> None:
    await world.write(
        row(world.ann, prompt_tokens=30, cached_tokens=10),
        row(world.ann, prompt_tokens=10, cached_tokens=10),
        row(world.ann, key_id="Key000000002", prompt_tokens=0, cached_tokens=0),
    )
    stats = await world.json("/api/stats", world.ann, group_by="key")
    assert [(group["key"], group["cache_hit_rate"]) for group in stats["groups"]] == [
        (f"aig_{world.ann.key_id}", 0.5),
        ("aig_Key000000002", 0.0),
    ]


async def test_a_budget_that_was_used_up_is_no_error(world: World) -> None:
    outcomes = ["ok", "budget_exhausted", "client_abort", "upstream_error"]
    await world.write(*(row(world.ann, outcome=outcome) for outcome in outcomes))
    for since in ("24h", "1m"):  # of the rollups, and of the rows
        totals = (await world.json("/api/stats", world.ann, since=since))["totals"]
        assert (totals["requests"], totals["errors"], totals["error_rate"]) == (4, 1, 0.25)


async def test_what_remembered_answers_saved_is_told_in_totals_and_groups(world: World) -> None:
    paid = row(world.ann, app_id="a", cost_micros=700)
    hits = [remembered(world.ann, paid.request_id, app_id="a") for _ in range(3)]
    unpriced = remembered(world.ann, paid.request_id, app_id="b", saved_micros=None)
    await world.write(paid, *hits, unpriced, remembered(world.ben, new_id(), app_id="a"))
    for since in ("24h", "1m"):  # of the rollups, and of the rows
        stats = await world.json("/api/stats", world.ann, since=since, group_by="app")
        figures = [stats["totals"], *stats["groups"]]
        assert [one["remembered"] for one in figures] == [4, 3, 1]
        assert [one["saved_tokens"] for one in figures] == [60, 45, 15]
        assert [one["saved_micros"] for one in figures] == [2100, 2100, 0]
        assert [one["total_tokens"] for one in figures] == [15, 15, 0]
        assert [one["cost_micros"] for one in figures] == [700, 700, 0]
        assert [one["unpriced"] for one in figures] == [0, 0, 0]
    response = await world.get("/api/stats", world.ann, format="csv", group_by="app", app="b")
    [told] = csv.DictReader(io.StringIO(await response.text()))
    assert (told["remembered"], told["saved_tokens"], told["saved_micros"]) == ("1", "15", "0")
    everybody = await world.json("/api/stats", world.admin, app="a", model="gpt-4o")
    assert everybody["totals"]["saved_micros"] == 2800


async def test_remembered_answers_hide_neither_errors_nor_how_long_providers_take(world: World) -> None:
    now = datetime.now(UTC)
    await world.write(
        row(world.ann, started_at=now, latency_ms=1000, ttft_ms=400),
        row(world.ann, started_at=now, latency_ms=3000, ttft_ms=None, outcome="upstream_error", status=502),
        *(remembered(world.ann, new_id(), latency_ms=1, ttft_ms=1) for _ in range(50)),
        remembered(world.ann, new_id(), latency_ms=1, outcome="client_abort"),
    )
    for since in ("24h", "1m"):  # of the rollups, and of the rows
        totals = (await world.json("/api/stats", world.ann, since=since))["totals"]
        assert (totals["requests"], totals["remembered"], totals["errors"], totals["error_rate"]) == (53, 51, 1, 0.5)
        assert (totals["average_latency_ms"], totals["average_ttft_ms"]) == (2000.0, 400.0)
    points = (await world.json("/api/latency", world.ann, range="1h"))["points"]
    assert [(point["requests"], point["latency_ms"]["p50"], point["ttft_ms"]["p50"]) for point in points] == [
        (2, 2000.0, 400.0)
    ]


async def test_a_shared_answer_that_failed_is_an_error_of_each_who_waited_for_it(world: World) -> None:
    failed = {"outcome": "upstream_error", "status": 502}
    paid = row(world.ann, **failed)
    await world.write(paid, *(remembered(world.ann, paid.request_id, source="shared", **failed) for _ in range(3)))
    for since in ("24h", "1m"):
        totals = (await world.json("/api/stats", world.ann, since=since))["totals"]
        assert (totals["requests"], totals["remembered"], totals["errors"], totals["error_rate"]) == (4, 0, 4, 1.0)


async def test_figures_as_csv_are_the_groups_or_the_totals(world: World) -> None:
    await world.write(row(world.ann, app_id="=1+1"), row(world.ann, app_id="=1+1"), row(world.ann, app_id="b"))
    for query in ({"group_by": "app"}, {}):
        stats = await world.json("/api/stats", world.ann, **query)
        response = await world.get("/api/stats", world.ann, format="csv", **query)
        assert response.headers["Content-Type"] == "text/csv; charset=utf-8"
        assert response.headers["Content-Disposition"] == 'attachment; filename="stats.csv"'
        told = list(csv.DictReader(io.StringIO(await response.text())))
        groups = stats.get("groups", [stats["totals"]])
        assert [list(one) for one in told] == [list(group) for group in groups]
        assert [one["requests"] for one in told] == [str(group["requests"]) for group in groups]
        assert response.headers.get("X-More-Groups") == ("false" if query else None)
        if query:
            assert [one["app"] for one in told] == ["'=1+1", "b"]


# --- /api/usage ---------------------------------------------------------------------------------------------------


async def test_a_row_is_told_with_every_column_and_the_prefix_of_its_key(world: World) -> None:
    one = row(world.ann, user_id="u", client_request_id="theirs", ttft_ms=None, cost_micros=2500)
    await world.write(one)
    answer = await world.json("/api/usage", world.ann)
    assert (answer["next_cursor"], answer["queued"]) == (None, 0)
    [told] = answer["data"]
    assert datetime.fromisoformat(told.pop("started_at")) == one.started_at
    assert told == {
        "request_id": one.request_id,
        "account_id": world.ann.account_id,
        "key": f"aig_{world.ann.key_id}",
        "user_id": "u",
        "app_id": "",
        "client_request_id": "theirs",
        "provider": "openai",
        "model": "gpt-4o",
        "upstream_model": "gpt-4o",
        "stream": True,
        "status": 200,
        "outcome": "ok",
        "error_code": "",
        "finish_reason": "stop",
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "cached_tokens": 4,
        "cache_write_tokens": 2,
        "reasoning_tokens": 1,
        "usage_source": "provider",
        "latency_ms": 100,
        "ttft_ms": None,
        "cost_micros": 2500,
        "source": "provider",
        "source_id": None,
        "saved_tokens": 0,
        "saved_micros": None,
    }


async def test_a_row_of_a_remembered_answer_says_who_paid_and_what_was_saved(world: World) -> None:
    paid = row(world.ann, cost_micros=700)
    await world.write(paid, remembered(world.ann, paid.request_id, source="shared"))
    listed = (await world.json("/api/usage", world.ann))["data"]
    assert sorted(one["source"] for one in listed) == ["provider", "shared"]
    [told] = [one for one in listed if one["source"] == "shared"]  # ids of one millisecond have no order
    assert (told["source"], told["source_id"], told["saved_tokens"], told["saved_micros"]) == (
        "shared", paid.request_id, 15, 700,
    )  # fmt: skip
    assert (told["usage_source"], told["total_tokens"], told["cost_micros"]) == ("none", 0, 0)
    assert await world.json(f"/api/usage/{told['request_id']}", world.ann) == told
    response = await world.get("/api/usage", world.ann, format="csv")
    [in_csv] = [one for one in csv.DictReader(io.StringIO(await response.text())) if one["source"] == "shared"]
    assert (in_csv["source"], in_csv["source_id"], in_csv["saved_micros"]) == ("shared", paid.request_id, "700")


async def test_pages_are_walked_by_their_cursor_newest_first(world: World) -> None:
    rows = [row(world.ann) for _ in range(7)]
    await world.write(*rows)
    seen, query = [], {"limit": "3"}
    while True:
        page = await world.json("/api/usage", world.ann, **query)
        seen.append([one["request_id"] for one in page["data"]])
        if page["next_cursor"] is None:
            break
        query["cursor"] = page["next_cursor"]
    assert [len(page) for page in seen] == [3, 3, 1]
    assert [name for page in seen for name in page] == sorted((one.request_id for one in rows), reverse=True)


async def test_the_last_page_when_full_has_no_cursor(world: World) -> None:
    await world.write(row(world.ann), row(world.ann))
    page = await world.json("/api/usage", world.ann, limit="2")
    assert (len(page["data"]), page["next_cursor"]) == (2, None)


async def test_rows_take_the_filters_of_figures(world: World) -> None:
    old = datetime.now(UTC) - timedelta(days=2)
    await world.write(row(world.ann, user_id="u1"), row(world.ann, user_id="u1", started_at=old), row(world.ann))
    assert len((await world.json("/api/usage", world.ann))["data"]) == 3
    assert len((await world.json("/api/usage", world.ann, user="u1"))["data"]) == 2
    assert len((await world.json("/api/usage", world.ann, user="u1", range="24h"))["data"]) == 1


async def test_csv_has_the_same_rows_and_its_cursor_in_a_header(world: World) -> None:
    rows = [row(world.ann, user_id='quote " comma , Ü', ttft_ms=None) for _ in range(3)]
    await world.write(*rows)
    response = await world.get("/api/usage", world.ann, format="csv", limit="2")
    assert response.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert "attachment" in response.headers["Content-Disposition"]
    told = list(csv.DictReader(io.StringIO(await response.text())))
    in_json = (await world.json("/api/usage", world.ann, limit="2"))["data"]
    assert list(told[0]) == list(in_json[0])
    assert [one["request_id"] for one in told] == [one["request_id"] for one in in_json]
    assert response.headers["X-Next-Cursor"] == told[-1]["request_id"]
    assert (told[0]["user_id"], told[0]["stream"], told[0]["ttft_ms"]) == ('quote " comma , Ü', "true", "")
    assert abs(datetime.fromisoformat(told[0]["started_at"]) - rows[-1].started_at) < timedelta(seconds=1)
    rest = await world.get("/api/usage", world.ann, format="csv", cursor=told[-1]["request_id"])
    assert "X-Next-Cursor" not in rest.headers


async def test_no_cell_of_a_csv_is_a_formula(world: World) -> None:
    starts = ["=", "+", "-", "@", "\t", "\r", "\n", "＝"]
    await world.write(
        *(row(world.ann, app_id=f'{start}HYPERLINK("http://evil","x")', user_id="a=b") for start in starts)
    )
    response = await world.get("/api/usage", world.ann, format="csv")
    told = list(csv.DictReader(io.StringIO(await response.text(), newline="")))
    assert sorted(one["app_id"][:2] for one in told) == sorted(f"'{start}" for start in starts)
    assert {one["user_id"] for one in told} == {"a=b"}


# --- /api/usage/{id} ----------------------------------------------------------------------------------------------


async def test_one_request_is_told_as_its_row_is_among_others(world: World) -> None:
    one = row(world.ann, user_id="u", client_request_id="theirs", ttft_ms=None, cost_micros=2500)
    await world.write(one, row(world.ann))
    told = await world.json(f"/api/usage/{one.request_id}", world.ann)
    assert told in (await world.json("/api/usage", world.ann))["data"]
    assert (told["request_id"], told["key"], told["ttft_ms"]) == (one.request_id, f"aig_{world.ann.key_id}", None)
    assert await world.json(f"/api/usage/{one.request_id.upper()}", world.admin) == told
    assert (await world.get(f"/api/usage/{one.request_id}", world.ann)).headers["Cache-Control"] == "no-store"


async def test_anothers_request_is_as_unknown_as_one_that_never_was(world: World) -> None:
    of_ben = row(world.ben)
    await world.write(of_ben)
    assert (await world.json(f"/api/usage/{of_ben.request_id}", world.ben))["model"] == "gpt-4o"
    unknown = [of_ben.request_id, new_id(), "1", "' or true --", "x" * 500, "\N{REPLACEMENT CHARACTER}", "%00"]
    answers = [await world.get(f"/api/usage/{quote(name)}", world.ann) for name in unknown]
    words = set()
    for name, answer in zip(unknown, answers, strict=True):
        error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (404, "request_not_found"), name
        words.add(error["message"].replace(repr(name[:64]), "ID"))
    assert words == {"there is no request ID of yours with usage"}
    assert (await world.get(f"/api/usage/{of_ben.request_id}")).status == 401
    assert (await world.get(f"/api/usage/{of_ben.request_id}", world.ben, user="u")).status == 400


# --- /api/latency -------------------------------------------------------------------------------------------------


async def test_percentiles_are_told_of_each_step_of_a_range(world: World) -> None:
    at = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=30)
    latencies = [100, 200, 301]
    await world.write(
        *(row(world.ann, started_at=at, latency_ms=latency, ttft_ms=latency // 10) for latency in latencies),
        row(world.ann, started_at=at + timedelta(minutes=5), latency_ms=7, ttft_ms=None),
        row(world.ann, started_at=at - timedelta(hours=1)),
    )
    told = await world.json("/api/latency", world.ann, range="1h")
    since, until = (datetime.fromisoformat(told.pop(name)) for name in ("since", "until"))
    assert until - since == timedelta(hours=1)
    assert told == {
        "range": "1h",
        "step_seconds": 60,
        "sampled": False,
        "points": [
            {
                "start": f"{at:%Y-%m-%dT%H:%M}:00Z",
                "requests": 3,
                "latency_ms": {"p50": 200.0, "p95": 290.9, "p99": 299.0},
                "ttft_ms": {"p50": 20.0, "p95": 29.0, "p99": 29.8},
            },
            {
                "start": f"{at + timedelta(minutes=5):%Y-%m-%dT%H:%M}:00Z",
                "requests": 1,
                "latency_ms": {"p50": 7.0, "p95": 7.0, "p99": 7.0},
                "ttft_ms": None,
            },
        ],
    }


@pytest.mark.parametrize(
    ("name", "step", "requests"), [("1h", 60, 1), ("24h", 1800, 2), ("7d", 10800, 3), ("30d", 43200, 4)]
)
async def test_steps_grow_with_the_range(world: World, name: str, step: int, requests: int) -> None:
    ages = [timedelta(minutes=1), timedelta(hours=2), timedelta(days=2), timedelta(days=10), timedelta(days=40)]
    await world.write(*(row(world.ann, started_at=datetime.now(UTC) - age) for age in ages))
    told = await world.json("/api/latency", world.ann, range=name)
    assert (told["step_seconds"], sum(point["requests"] for point in told["points"])) == (step, requests)
    assert (await world.json("/api/latency", world.ann))["range"] == "24h"


async def test_percentiles_are_of_the_tenants_own_rows_and_take_filters(world: World) -> None:
    await world.write(
        row(world.ann, model="m1", user_id="u1", latency_ms=100),
        row(world.ann, model="m2", app_id="a1", latency_ms=200),
        row(world.ben, model="m1", provider="of-ben", latency_ms=900),
    )

    async def slowest(person: Person, **query: str) -> float:
        points = (await world.json("/api/latency", person, **query))["points"]
        return max((float(point["latency_ms"]["p99"]) for point in points), default=0.0)

    assert await slowest(world.ann) < 201
    assert await slowest(world.ben) == 900
    assert await slowest(world.admin) > 800
    assert await slowest(world.ann, model="m1") == await slowest(world.ann, user="u1") == 100
    assert await slowest(world.ann, app="a1") == 200
    assert await slowest(world.admin, key=f"aig_{world.ben.key_id}") == 900
    for foreign in ({"provider": "of-ben"}, {"key": world.ben.key_id}):
        assert await slowest(world.ann, **foreign) == 0


# --- who may ask --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/stats", "/api/latency", "/api/usage"])
async def test_without_a_valid_key_nothing_is_told(world: World, path: str) -> None:
    nobody = Person("aig_Key012345678_wrong", "Key012345678", str(uuid4()))
    assert (await world.get(path)).status == 401
    assert (await world.get(path, nobody)).status == 401
    assert (await world.get(path, nobody, range="nonsense")).status == 401


async def test_a_member_sees_its_own_and_an_admin_everybodys(world: World) -> None:
    await world.write(
        row(world.ann, model="of-ann", user_id="shared"), row(world.ben, model="of-ben", user_id="shared")
    )
    for person, models in [
        (world.ann, {"of-ann"}),
        (world.ben, {"of-ben"}),
        (world.admin, {"of-ann", "of-ben"}),
    ]:
        stats = await world.json("/api/stats", person, group_by="model", user="shared")
        assert {group["model"] for group in stats["groups"]} == models
        assert {top["model"] for top in stats["top_models"]} == models
        assert stats["totals"]["requests"] == stats["last_hour"]["requests"] == len(models)
        usage = await world.json("/api/usage", person)
        assert {one["model"] for one in usage["data"]} == models
        told = await (await world.get("/api/usage", person, format="csv")).text()
        assert {name for name in ("of-ann", "of-ben") if name in told} == models


async def test_a_member_cannot_reach_into_another_account(world: World) -> None:
    of_ben = row(world.ben, model="of-ben", user_id="of-ben", app_id="of-ben", provider="of-ben")
    await world.write(row(world.ann, model="of-ann"), of_ben)
    foreign = {"user": "of-ben", "app": "of-ben", "model": "of-ben", "provider": "of-ben", "key": world.ben.key_id}
    for name, value in foreign.items():
        assert await requests(world, "/api/usage", world.ann, **{name: value}) == 0
        for group_by in ("user", "app", "model", "provider", "key", "day", "hour"):
            stats = await world.json("/api/stats", world.ann, group_by=group_by, **{name: value})
            assert (stats["totals"]["requests"], stats["last_hour"]["requests"]) == (0, 0)
            assert (stats["groups"], stats["top_models"], stats["more_groups"]) == ([], [], False)
        assert await requests(world, "/api/stats", world.admin, **{name: value}) == 1
    assert "of-ben" not in await (await world.get("/api/usage", world.ann, cursor=of_ben.request_id)).text()
    refused = await world.get("/api/stats", world.ann, account_id=world.ben.account_id)
    assert refused.status == 400


async def test_answers_are_not_kept_by_caches(world: World) -> None:
    for query in ({}, {"format": "csv"}):
        assert (await world.get("/api/usage", world.ann, **query)).headers["Cache-Control"] == "no-store"
    assert (await world.get("/api/stats", world.ann)).headers["Cache-Control"] == "no-store"


# --- what is refused ----------------------------------------------------------------------------------------------


REFUSED = [
    ("/api/stats", "range", "2h"),
    ("/api/stats", "group_by", "account_id"),
    ("/api/stats", "group_by", "user_id; drop table usage"),
    ("/api/stats", "user", "x" * 129),
    ("/api/stats", "user", "a\0b"),
    ("/api/stats", "app", "a\nb"),
    ("/api/stats", "model", "x" * 257),
    ("/api/stats", "usr", "ann"),
    ("/api/stats", "limit", "10"),
    ("/api/stats", "provider", "x" * 257),
    ("/api/stats", "key", "aig_Key012345678_secret"),
    ("/api/stats", "key", "aig_"),
    ("/api/stats", "format", "xml"),
    ("/api/stats", "group_by", "week"),
    ("/api/stats", "since", "yesterday"),
    ("/api/stats", "since", "7"),
    ("/api/stats", "since", "999999d"),
    ("/api/stats", "since", "-1d"),
    ("/api/stats", "since", "٣d"),
    ("/api/stats", "since", "2026-02-30"),
    ("/api/stats", "since", "2026-W07-1"),
    ("/api/stats", "until", "0001-01-01T00:00:00+14:00"),
    ("/api/usage", "until", "9999-12-31T23:59:59-01:00"),
    ("/api/usage", "since", "20260101"),
    ("/api/usage", "limit", "0"),
    ("/api/usage", "limit", "1001"),
    ("/api/usage", "limit", "-1"),
    ("/api/usage", "limit", "ten"),
    ("/api/usage", "limit", "٣"),
    ("/api/usage", "limit", "9" * 5000),
    ("/api/usage", "cursor", "yesterday"),
    ("/api/usage", "format", "xml"),
    ("/api/usage", "group_by", "user"),
    ("/api/latency", "range", "all"),
    ("/api/latency", "since", "7d"),
    ("/api/latency", "group_by", "model"),
    ("/api/latency", "user", "a\0b"),
    ("/api/latency", "key", "aig_Key012345678_secret"),
]


async def test_a_bad_value_is_refused_by_the_name_of_its_parameter(world: World) -> None:
    for path, param, value in REFUSED:
        response = await world.get(path, world.ann, **{param: value})
        error = (await response.json()).get("error", {})
        answer = (response.status, error.get("type"), error.get("param"))
        assert answer == (400, "invalid_request_error", param), (path, value[:20])
        assert len(error["message"]) < 200


async def test_a_named_range_and_another_are_one_too_many(world: World) -> None:
    for path in BOTH:
        response = await world.get(path, world.ann, range="7d", until="1d")
        assert (response.status, (await response.json())["error"]["param"]) == (400, "range")


async def test_a_parameter_given_twice_is_refused(world: World) -> None:
    headers = {"Authorization": f"Bearer {world.ann.token}"}
    response = await world.client.get("/api/stats?user=a&user=b", headers=headers)
    assert (response.status, (await response.json())["error"]["param"]) == (400, "user")


async def test_bytes_that_are_no_text_in_a_query_are_no_fault_of_ours(world: World) -> None:
    headers = {"Authorization": f"Bearer {world.ann.token}"}
    for query in ("user=%FF", "user=%00", "user=%ED%A0%80", "%FF=1", "cursor=%FF"):
        assert (await world.client.get(f"/api/usage?{query}", headers=headers)).status in (200, 400)


async def test_a_member_with_forty_questions_at_once_shuts_out_nobodys_key(world: World) -> None:
    async with world.pool.acquire() as slow, slow.transaction():
        await slow.execute("lock table usage in access exclusive mode")  # every question takes long now
        paths = ["/api/stats", "/api/usage"] * 20
        crowd = [asyncio.create_task(world.get(path, world.ann, range="all")) for path in paths]
        refused, waiting = await asyncio.wait(crowd, timeout=1.8)
        # Its key is new to the process, so its row is looked up; the bad query is refused after that.
        assert (await world.get("/api/stats", world.ben, range="nonsense")).status == 400
    assert (len(refused), len(waiting)) == (39, 1)
    for answer in refused:
        response = await answer
        assert (response.status, (await response.json())["error"]["code"]) == (503, "stats_busy")
    assert [(await answer).status for answer in waiting] == [200]


async def test_without_a_database_the_answer_is_503(world: World) -> None:
    assert (await world.get("/api/stats", world.ann)).status == 200  # its key is known from here on
    world.pool.terminate()
    for path in ("/api/stats", "/api/latency", "/api/usage", f"/api/usage/{new_id()}"):
        response = await world.get(path, world.ann)
        assert (response.status, (await response.json())["error"]["code"]) == (503, "database_unavailable")

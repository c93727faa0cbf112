import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from time import monotonic, perf_counter
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.exchange import Exchange, Principal, new_id
from gateway.protocol.chat import ChatRequest
from gateway.protocol.errors import Unavailable
from gateway.protocol.meter import Meter
from gateway.protocol.routing import Provider, Target
from gateway.protocol.usage import Usage
from gateway.stores import stats as stats_module
from gateway.stores import usage as usage_module
from gateway.stores.stats import GROUP_BY, Figures, Scope, read_rows, read_stats
from gateway.stores.usage import BATCH, MAX_TEXT, MAX_TOKENS, UsageRow, UsageStore, row_of, storable
from tests.support.proxy import proxied_postgres

pytestmark = pytest.mark.integration

ALICE, BOB = str(uuid4()), str(uuid4())
EVERYTHING = Scope(account_id=None)

NASTY = ["\0", "a\0b", "\ud800", "a\udfff", "\x7f\x1b[31m", "'; drop table usage; --", "x" * 5000, "🦙" * 300, "\u2028"]


def row(**changes: Any) -> UsageRow:
    plain = UsageRow(
        request_id=new_id(),
        started_at=datetime.now(UTC),
        key_id="Key012345678",
        account_id=ALICE,
        user_id="user",
        app_id="app",
        client_request_id="",
        provider="openai",
        model="gpt-4o",
        upstream_model="gpt-4o-2024-11-20",
        stream=True,
        status=200,
        outcome="ok",
        error_code="",
        finish_reason="stop",
        prompt_tokens=100,
        completion_tokens=50,
        cached_tokens=20,
        cache_write_tokens=10,
        reasoning_tokens=5,
        usage_source="provider",
        latency_ms=1500,
        ttft_ms=300,
    )
    return replace(plain, **changes)


def exchange(**changes: Any) -> Exchange:
    """One that arrived four seconds ago: 1 s to the first text, 3 s in all."""
    started = monotonic() - 4
    meter = Meter(["the prompt"])
    meter.see("text", Usage(7, 3, cached_tokens=2, cache_write_tokens=1, reasoning_tokens=1), "stop")
    record = Exchange(
        started=started,
        first_byte=started + 1,
        ended=started + 3,
        principal=Principal("Key012345678", "aig_Key012345678", "a key", ALICE, "member"),
        chat=ChatRequest(body=b"{}", fields={}, model="fast", stream=True, wants_usage=False),
        target=Target(Provider(name="openai", dialect="openai", base_url="http://localhost/v1"), "gpt-4o"),
        model="fast",
        meter=meter,
        outcome="ok",
        status=200,
    )
    for name, value in changes.items():
        setattr(record, name, value)
    return record


class Heard:
    """What a store told its hooks."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.batches: list[int] = []
        self.errors = 0

    def on_rows(self, result: str, count: int) -> None:
        self.rows[result] += count
        if result == "written":
            self.batches.append(count)

    def on_error(self) -> None:
        self.errors += 1


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
async def store(pool: asyncpg.Pool, heard: Heard) -> AsyncIterator[UsageStore]:
    """A store whose writer runs."""
    store = UsageStore(pool, on_rows=heard.on_rows, on_error=heard.on_error)
    async with running(store):
        yield store


@asynccontextmanager
async def running(store: UsageStore) -> AsyncIterator[asyncio.Task[None]]:
    writer = asyncio.create_task(store.run())
    try:
        yield writer
    finally:
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)


async def until(true: Callable[[], bool], seconds: float = 10) -> None:
    deadline = monotonic() + seconds
    while not true():
        assert monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.01)


async def write(pool: asyncpg.Pool, rows: list[UsageRow]) -> None:
    """Put these rows in the table."""
    store = UsageStore(pool)
    for one in rows:
        store.record(one)
    assert await store.close(10) == 0


# --- the row of an exchange ---------------------------------------------------------------------------------------


def test_an_exchange_becomes_the_row_that_the_table_describes() -> None:
    done = exchange(user_id="u", app_id="a", client_request_id="theirs")
    assert row_of(done) == UsageRow(
        request_id=done.id,
        started_at=datetime.fromtimestamp(done.started_at, UTC),
        key_id="Key012345678",
        account_id=ALICE,
        user_id="u",
        app_id="a",
        client_request_id="theirs",
        provider="openai",
        model="fast",
        upstream_model="gpt-4o",
        stream=True,
        status=200,
        outcome="ok",
        error_code="",
        finish_reason="stop",
        prompt_tokens=7,
        completion_tokens=3,
        cached_tokens=2,
        cache_write_tokens=1,
        reasoning_tokens=1,
        usage_source="provider",
        latency_ms=3000,
        ttft_ms=1000,
    )


def test_an_exchange_that_broke_before_any_text_has_no_first_token_and_an_estimated_usage() -> None:
    broken = row_of(
        exchange(first_byte=0.0, meter=Meter(["12345678"]), outcome="upstream_error", error_code="upstream_truncated")
    )
    assert (broken.ttft_ms, broken.prompt_tokens, broken.completion_tokens) == (None, 2, 0)
    assert (broken.usage_source, broken.outcome, broken.error_code) == (
        "estimated",
        "upstream_error",
        "upstream_truncated",
    )


def test_numbers_that_no_column_could_hold_are_clamped() -> None:
    meter = Meter([])
    meter.see("", Usage(10**30, -5), None)
    absurd = row_of(exchange(meter=meter, started=-1e12, status=-1))
    assert (absurd.prompt_tokens, absurd.completion_tokens, absurd.latency_ms) == (MAX_TOKENS, 0, 2**31 - 1)
    assert absurd.status == 0


async def test_text_that_postgres_refuses_is_made_storable(pool: asyncpg.Pool, heard: Heard) -> None:
    store = UsageStore(pool, on_rows=heard.on_rows)
    for text in NASTY:
        meter = Meter([])
        meter.see("", Usage(1, 1), text)
        store.record(
            row_of(
                exchange(user_id=text, app_id=text, client_request_id=text, model=text, error_code=text, meter=meter)
            )
        )
    assert await store.close(10) == 0
    assert heard.rows == {"written": len(NASTY)}
    kept = {one.user_id for one in await read_rows(pool, EVERYTHING, None, 100)}
    assert kept == {storable(text) for text in NASTY}
    assert "'; drop table usage; --" in kept


@given(st.text(st.characters(categories=["L", "N", "P", "Cc", "Cs", "Co", "Cn", "Zs", "Zl"]), max_size=2 * MAX_TEXT))
def test_storable_text_is_short_has_no_nul_and_is_utf8(text: str) -> None:
    kept = storable(text)
    assert len(kept) == min(len(text), MAX_TEXT)
    assert "\0" not in kept
    assert kept.encode().decode() == kept
    assert kept == text[:MAX_TEXT] or "\0" in text or not text.isascii()


def test_storable_text_that_needs_no_change_is_not_changed() -> None:
    assert storable("Zürich 模型 🦙 \t\n") == "Zürich 模型 🦙 \t\n"


# --- writing ------------------------------------------------------------------------------------------------------


async def test_a_row_that_is_recorded_is_soon_in_the_table_with_every_column(
    store: UsageStore, pool: asyncpg.Pool
) -> None:
    rows = [row(), row(ttft_ms=None, stream=False, status=0, outcome="client_abort", usage_source="estimated")]
    started = perf_counter()
    for one in rows:
        store.record(one)
    assert store.queued == 2
    await until(lambda: store.queued == 0)
    assert perf_counter() - started < 2
    found = await read_rows(pool, EVERYTHING, None, 10)
    assert sorted(found, key=lambda one: one.request_id) == sorted(rows, key=lambda one: one.request_id)


async def test_the_row_has_exactly_the_columns_of_the_table(pool: asyncpg.Pool) -> None:
    columns = await pool.fetch(
        "select column_name from information_schema.columns where table_name = 'usage' order by ordinal_position"
    )
    assert [column["column_name"] for column in columns] == [field.name for field in fields(UsageRow)]


async def test_rows_are_written_in_batches(store: UsageStore, heard: Heard) -> None:
    for _ in range(2 * BATCH + 200):
        store.record(row())
    await until(lambda: store.queued == 0)
    assert heard.batches == [BATCH, BATCH, 200]


async def test_a_row_written_twice_is_one_row_and_no_failure(pool: asyncpg.Pool, heard: Heard) -> None:
    twice = row()
    for rows in ([twice, twice], [twice, row()]):
        store = UsageStore(pool, on_rows=heard.on_rows)
        for one in rows:
            store.record(one)
        assert await store.close(10) == 0
    assert await pool.fetchval("select count(*) from usage") == 2
    assert heard.rows == {"written": 4}


@pytest.mark.parametrize("positions", [[0], [999], [0, 1, 2], [499, 500], [3, 250, 251, 700, 999]])
async def test_rows_that_the_database_refuses_do_not_take_others_with_them(
    store: UsageStore, heard: Heard, pool: asyncpg.Pool, positions: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    poisons: list[dict[str, Any]] = [
        {"user_id": "canary\0"},  # refused by the server
        {"usage_source": "canary"},  # by a check of the table
        {"latency_ms": 2**40},  # by asyncpg, which cannot encode it
        {"app_id": "canary\ud800"},
        {"account_id": "canary"},
    ]
    rows = [row() for _ in range(1000)]
    for position, poison in zip(positions, poisons, strict=False):
        rows[position] = replace(rows[position], **poison)
    with caplog.at_level(logging.ERROR):
        for one in rows:
            store.record(one)
        await until(lambda: store.queued == 0)
    assert heard.rows == {"written": 1000 - len(positions), "failed": len(positions)}
    assert await pool.fetchval("select count(*) from usage") == 1000 - len(positions)
    assert heard.errors == 0
    assert len(caplog.messages) == len(positions)
    for message, position in zip(caplog.messages, positions, strict=True):
        assert rows[position].request_id in message
        assert "canary" not in message


async def test_many_rows_a_second_pass(store: UsageStore, heard: Heard, figure: Callable[[str], None]) -> None:
    rows = [row() for _ in range(10_000)]
    started = perf_counter()
    for one in rows:
        store.record(one)
    recorded = perf_counter()
    await until(lambda: store.queued == 0, seconds=30)
    seconds = perf_counter() - started
    micros = (recorded - started) / len(rows) * 1e6
    figure(f"usage: {len(rows) / seconds:.0f} rows a second, {micros:.2f} µs to record one")
    assert heard.rows["written"] == len(rows)


# --- when the database is gone ------------------------------------------------------------------------------------


class Outage:
    """Cuts all connections to the test's database and lets none in: what clients see of a server that went down."""

    def __init__(self, database_url: str) -> None:
        parts = urlsplit(database_url)
        self._name = parts.path.removeprefix("/")
        self._server = urlunsplit(parts._replace(path="/postgres"))

    async def begin(self) -> None:
        await self._run(f"alter database {self._name} allow_connections false")
        await self._run(f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{self._name}'")

    async def end(self) -> None:
        await self._run(f"alter database {self._name} allow_connections true")

    async def _run(self, statement: str) -> None:
        admin = await asyncpg.connect(self._server)
        try:
            await admin.execute(statement)
        finally:
            await admin.close()


async def test_rows_wait_for_a_database_that_is_gone_and_are_written_when_it_is_back(
    store: UsageStore,
    heard: Heard,
    database_url: str,
    pool: asyncpg.Pool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(usage_module, "RETRY_LAST", 0.3)
    store.record(row())
    await until(lambda: store.queued == 0)
    outage = Outage(database_url)
    with caplog.at_level(logging.INFO, "gateway.stores.usage"):
        await outage.begin()
        for _ in range(BATCH + 100):
            store.record(row())
        await until(lambda: heard.errors >= 3)
        assert store.queued == BATCH + 100
        await outage.end()
        await until(lambda: store.queued == 0)
    assert await pool.fetchval("select count(*) from usage") == BATCH + 101
    assert heard.rows == {"written": BATCH + 101}
    said = [record.levelname for record in caplog.records if record.name == "gateway.stores.usage"]
    assert said == ["ERROR", "INFO"], "one word at its begin, one at its end"


async def test_an_error_that_is_no_fault_of_the_rows_costs_none_of_them(
    store: UsageStore, heard: Heard, pool: asyncpg.Pool
) -> None:
    await pool.execute("alter table usage rename to gone")
    store.record(row())
    await until(lambda: heard.errors >= 2)
    assert store.queued == 1
    await pool.execute("alter table gone rename to usage")
    await until(lambda: store.queued == 0)
    assert heard.rows == {"written": 1}


async def test_rows_outlive_a_database_that_stalls(
    database_url: str, heard: Heard, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_module, "PATIENCE", 0.2)
    async with proxied_postgres(database_url) as (proxy, url), asyncpg.create_pool(url, min_size=1) as stalling:
        store = UsageStore(stalling, on_rows=heard.on_rows, on_error=heard.on_error)
        async with running(store):
            proxy.stall()
            for _ in range(10):
                store.record(row())
            await until(lambda: heard.errors >= 2)
            proxy.resume()
            await until(lambda: store.queued == 0)
    assert heard.rows == {"written": 10}
    assert await pool.fetchval("select count(*) from usage") == 10


async def test_a_full_queue_drops_what_comes_and_says_so_once(
    pool: asyncpg.Pool, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    store = UsageStore(pool, on_rows=heard.on_rows, max_queue=10)
    with caplog.at_level(logging.ERROR):
        for _ in range(25):
            store.record(row())
    assert (store.queued, heard.rows["dropped"]) == (10, 15)
    assert len(caplog.messages) == 1
    assert await store.close(10) == 0
    assert heard.rows["written"] == 10


async def test_a_writer_that_is_cancelled_in_the_middle_of_a_batch_loses_nothing_and_doubles_nothing(
    pool: asyncpg.Pool, heard: Heard
) -> None:
    store = UsageStore(pool, on_rows=heard.on_rows)
    async with locked(pool) as blocked, running(store) as writer:
        for _ in range(BATCH):
            store.record(row())
        await until(blocked.is_set)
        writer.cancel()
        await asyncio.wait([writer], timeout=1)
        assert writer.cancelled()
        assert store.queued == BATCH
    assert await store.close(10) == 0
    assert await pool.fetchval("select count(*) from usage") == BATCH


@asynccontextmanager
async def locked(pool: asyncpg.Pool) -> AsyncIterator[asyncio.Event]:
    """Nobody can write the table meanwhile; the event tells that somebody tries."""
    blocked = asyncio.Event()

    async def watch() -> None:
        while not await pool.fetchval(
            "select count(*) from pg_locks where not granted and relation = 'usage'::regclass"
        ):
            await asyncio.sleep(0.01)
        blocked.set()

    async with pool.acquire() as holder, holder.transaction():
        await holder.execute("lock table usage in exclusive mode")
        watcher = asyncio.create_task(watch())
        try:
            yield blocked
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)


# --- closing ------------------------------------------------------------------------------------------------------


async def test_closing_writes_all_that_is_queued_beside_a_running_writer(
    store: UsageStore, heard: Heard, pool: asyncpg.Pool
) -> None:
    for _ in range(3 * BATCH):
        store.record(row())
    assert await store.close(10) == 0
    assert heard.rows == {"written": 3 * BATCH}
    assert await pool.fetchval("select count(*) from usage") == 3 * BATCH


async def test_the_writer_ends_when_the_store_is_closed(pool: asyncpg.Pool) -> None:
    store = UsageStore(pool)
    async with running(store) as writer:
        await asyncio.sleep(0)
        assert await store.close(10) == 0
        await asyncio.wait([writer], timeout=2)
        assert writer.done() and writer.exception() is None


async def test_closing_gives_up_in_time_and_tells_how_many_rows_are_left(pool: asyncpg.Pool) -> None:
    store = UsageStore(pool)
    async with locked(pool), running(store):
        for _ in range(7):
            store.record(row())
        started = perf_counter()
        assert await store.close(0.5) == 7
        assert perf_counter() - started < 2


async def test_closing_gives_up_in_time_on_a_database_that_stalls(database_url: str) -> None:
    async with proxied_postgres(database_url) as (proxy, url), asyncpg.create_pool(url, min_size=1) as stalling:
        store = UsageStore(stalling)
        proxy.stall()
        store.record(row())
        started = perf_counter()
        assert await store.close(0.3) == 1
        assert perf_counter() - started < 2
        proxy.resume()


async def test_closing_without_a_database_tells_how_many_rows_are_left(database_url: str) -> None:
    pool = await asyncpg.create_pool(database_url, min_size=0)
    store = UsageStore(pool)
    store.record(row())
    await pool.close()
    assert await store.close(0.3) == 1


async def test_a_row_that_comes_after_the_end_is_counted_as_dropped(pool: asyncpg.Pool, heard: Heard) -> None:
    store = UsageStore(pool, on_rows=heard.on_rows)
    await store.close(1)
    store.record(row())
    assert (store.queued, heard.rows) == (0, {"dropped": 1})


# --- figures ------------------------------------------------------------------------------------------------------


def some_rows(count: int = 300) -> list[UsageRow]:
    """Rows of two tenants over 40 days, the same ones in every run but for their ids and the hour they count from."""
    chance = random.Random(7)
    now = datetime.now(UTC)
    ages = [timedelta(minutes=5), timedelta(hours=3), timedelta(days=3), timedelta(days=20), timedelta(days=40)]
    return [
        row(
            account_id=chance.choice([ALICE, BOB]),
            key_id=chance.choice(["KeyA", "KeyB", "KeyC"]),
            started_at=now - chance.choice(ages),
            user_id=chance.choice(["", "ann", "ben"]),
            app_id=chance.choice(["web", "cli"]),
            model=chance.choice(["gpt-4o", "claude", "llama3"]),
            provider=chance.choice(["openai", "ollama"]),
            outcome=chance.choice(["ok", "ok", "ok", "client_abort", "upstream_error", "rejected"]),
            prompt_tokens=chance.randrange(1000),
            completion_tokens=chance.randrange(1000),
            cached_tokens=chance.randrange(10),
            latency_ms=chance.randrange(5000),
            ttft_ms=chance.choice([None, 100, 200]),
        )
        for _ in range(count)
    ]


def expect(rows: list[UsageRow], name: str = "") -> Figures:
    """The figures by Python's own arithmetic."""
    first = [one.ttft_ms for one in rows if one.ttft_ms is not None]
    return Figures(
        name=name,
        requests=len(rows),
        errors=sum(one.outcome in ("upstream_error", "rejected") for one in rows),
        client_aborts=sum(one.outcome == "client_abort" for one in rows),
        prompt_tokens=sum(one.prompt_tokens for one in rows),
        completion_tokens=sum(one.completion_tokens for one in rows),
        cached_tokens=sum(one.cached_tokens for one in rows),
        average_latency_ms=about([one.latency_ms for one in rows]),
        average_ttft_ms=about(first),
    )


def about(numbers: list[int]) -> Any:
    return pytest.approx(sum(numbers) / len(numbers)) if numbers else None


def within(rows: list[UsageRow], **age: float) -> list[UsageRow]:
    return [one for one in rows if one.started_at > datetime.now(UTC) - timedelta(**age)]


@pytest.mark.parametrize(
    ("name", "age"),
    [("1h", {"hours": 1}), ("24h", {"hours": 24}), ("7d", {"days": 7}), ("30d", {"days": 30}), ("all", {"days": 99})],
)
async def test_totals_are_the_sums_of_the_range(pool: asyncpg.Pool, name: str, age: dict[str, float]) -> None:
    rows = some_rows()
    await write(pool, rows)
    stats = await read_stats(pool, Scope(None, name))
    assert stats.totals == expect(within(rows, **age))
    assert stats.last_hour == expect(within(rows, hours=1))
    assert abs(stats.as_of - datetime.now(UTC)) < timedelta(seconds=30)


async def test_filters_are_joined_by_and(pool: asyncpg.Pool) -> None:
    rows = some_rows()
    await write(pool, rows)
    stats = await read_stats(pool, Scope(ALICE, "all", user="ann", app="cli", model="claude"))
    wanted = [
        one for one in rows if (one.account_id, one.user_id, one.app_id, one.model) == (ALICE, "ann", "cli", "claude")
    ]
    assert wanted
    assert stats.totals == expect(wanted)
    assert stats.last_hour == expect(within(wanted, hours=1))


@pytest.mark.parametrize("group_by", GROUP_BY)
async def test_groups_split_the_totals(pool: asyncpg.Pool, group_by: str) -> None:
    rows = some_rows()
    await write(pool, rows)
    stats = await read_stats(pool, Scope(None), group_by)
    column = {"user": "user_id", "app": "app_id", "key": "key_id"}.get(group_by, group_by)
    names = {getattr(one, column) for one in rows}
    expected = [expect([one for one in rows if getattr(one, column) == name], name) for name in names]
    assert sorted(stats.groups, key=lambda group: group.name) == sorted(expected, key=lambda group: group.name)
    assert [group.requests for group in stats.groups] == sorted((g.requests for g in stats.groups), reverse=True)
    assert not stats.more_groups


async def test_top_models_are_the_most_asked_for(pool: asyncpg.Pool) -> None:
    rows = [row(model=f"model-{number:02}") for number in range(12) for _ in range(number + 1)]
    await write(pool, rows)
    stats = await read_stats(pool, EVERYTHING)
    assert [(top.name, top.requests) for top in stats.top_models] == [
        (f"model-{n:02}", n + 1) for n in range(11, 1, -1)
    ]


async def test_groups_beyond_the_most_that_are_told_are_announced(
    pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats_module, "MAX_GROUPS", 3)
    await write(pool, [row(user_id=f"user-{number}") for number in range(4)])
    stats = await read_stats(pool, EVERYTHING, "user")
    assert (len(stats.groups), stats.more_groups) == (3, True)


async def test_no_rows_are_figures_of_zero(pool: asyncpg.Pool) -> None:
    stats = await read_stats(pool, Scope(ALICE), "user")
    assert stats.totals == stats.last_hour == Figures()
    assert (stats.totals.error_rate, stats.top_models, stats.groups) == (0.0, [], [])


async def test_absurd_counts_of_one_provider_do_not_break_the_sums(pool: asyncpg.Pool) -> None:
    await write(pool, [row(prompt_tokens=MAX_TOKENS) for _ in range(1000)])
    assert (await read_stats(pool, EVERYTHING)).totals.prompt_tokens == 1000 * MAX_TOKENS


async def test_a_tenant_sees_its_own_figures_and_rows_only(pool: asyncpg.Pool) -> None:
    """However it asks: by the other's user, app, model, or from the other's row on."""
    of_bob = [row(account_id=BOB, user_id="bob", app_id="bob", model="bob", key_id="bob") for _ in range(5)]
    of_alice = [row() for _ in range(3)]
    await write(pool, [*of_bob, *of_alice])
    for group_by in GROUP_BY:
        stats = await read_stats(pool, Scope(ALICE), group_by)
        assert stats.totals.requests == stats.last_hour.requests == 3
        assert "bob" not in {group.name for group in (*stats.groups, *stats.top_models)}
    for asked in (Scope(ALICE, user="bob"), Scope(ALICE, app="bob"), Scope(ALICE, model="bob")):
        assert (await read_stats(pool, asked, "user")).totals.requests == 0
        assert await read_rows(pool, asked, None, 100) == []
    seen = [
        *await read_rows(pool, Scope(ALICE), None, 100),
        *await read_rows(pool, Scope(ALICE), of_bob[0].request_id, 100),
    ]
    assert {one.account_id for one in seen} == {ALICE}
    assert await read_rows(pool, Scope(str(uuid4())), None, 100) == []


# --- the audit trail ----------------------------------------------------------------------------------------------


async def test_rows_are_paged_newest_first_each_one_once(pool: asyncpg.Pool) -> None:
    rows = [row() for _ in range(25)]
    await write(pool, rows)
    pages: list[list[UsageRow]] = []
    cursor = None
    while page := await read_rows(pool, EVERYTHING, cursor, 10):
        pages.append(page)
        cursor = page[-1].request_id
    assert [len(page) for page in pages] == [10, 10, 5]
    ids = [one.request_id for page in pages for one in page]
    assert ids == sorted((one.request_id for one in rows), reverse=True)


async def test_rows_can_be_filtered_like_figures(pool: asyncpg.Pool) -> None:
    rows = some_rows()
    await write(pool, rows)
    found = await read_rows(pool, Scope(BOB, "7d", user="ben", app="web", model="llama3"), None, 1000)
    wanted = [
        one
        for one in within(rows, days=7)
        if (one.account_id, one.user_id, one.app_id, one.model) == (BOB, "ben", "web", "llama3")
    ]
    assert wanted
    assert {one.request_id for one in found} == {one.request_id for one in wanted}


async def test_questions_to_a_database_that_is_gone_are_answered_as_unavailable(database_url: str) -> None:
    pool = await asyncpg.create_pool(database_url, min_size=0)
    await pool.close()
    with pytest.raises(Unavailable):
        await read_stats(pool, EVERYTHING, "user")
    with pytest.raises(Unavailable):
        await read_rows(pool, EVERYTHING, None, 10)

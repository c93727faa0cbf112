import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.exchange import Exchange, Principal, new_id
from gateway.protocol.errors import Unavailable
from gateway.protocol.meter import Meter
from gateway.protocol.request import ModelRequest
from gateway.protocol.routing import Provider, Target
from gateway.protocol.usage import Usage
from gateway.stores import stats as stats_module
from gateway.stores.ledger import write_rows
from gateway.stores.stats import GROUP_BY, SERIES, Figures, Scope, bound_of, read_rows, read_stats
from gateway.stores.usage import MAX_TEXT, MAX_TOKENS, UsageRow, row_of, storable

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
        asked=ModelRequest(body=b"{}", fields={}, model="fast", stream=True, wants_usage=False),
        target=Target(Provider(name="openai", dialect="openai", base_url="http://localhost/v1"), "gpt-4o"),
        model="fast",
        meter=meter,
        outcome="ok",
        status=200,
    )
    for name, value in changes.items():
        setattr(record, name, value)
    return record


async def write(pool: asyncpg.Pool, rows: list[UsageRow]) -> None:
    """Put these rows in the table."""
    assert await write_rows(pool, rows) == len(rows)


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
    assert (broken.ttft_ms, broken.prompt_tokens, broken.completion_tokens) == (None, 10, 0)
    assert (broken.usage_source, broken.outcome, broken.error_code) == (
        "estimated",
        "upstream_error",
        "upstream_truncated",
    )


texts = st.sampled_from(["", "a", "b", *NASTY])
counts = st.integers(0, 3) | st.sampled_from([None, -5, MAX_TOKENS, 10**30])


@st.composite
def moments(draw: st.DrawFn) -> dict[str, Any]:
    """How far an exchange is: what may change of it from its begin to its end."""
    meter = Meter(["the prompt"])
    details = st.integers(-1, 4)
    usage = Usage(draw(counts), draw(counts), draw(details), draw(details), draw(details))
    meter.see(draw(texts), draw(st.none() | st.just(usage)), draw(texts))
    provider = Provider(name=draw(texts), dialect="openai", base_url="http://localhost/v1")
    return {
        "target": Target(provider, draw(texts)),
        "asked": ModelRequest(body=b"{}", fields={}, model="fast", stream=draw(st.booleans()), wants_usage=False),
        "meter": meter,
        "status": draw(st.sampled_from([0, 200, 502, -1, 7000])),
        "outcome": draw(st.sampled_from(["", "interrupted", "ok"])),
        "error_code": draw(texts),
        "source": draw(st.sampled_from(["provider", "shared"])),
        "first_byte": draw(st.sampled_from([0.0, 101.0])),
        "ended": draw(st.sampled_from([103.0, 104.0])),
    }


@given(st.lists(moments(), min_size=2, max_size=4))
def test_a_row_that_is_asked_for_again_is_the_one_that_would_be_made_then(course: list[dict[str, Any]]) -> None:
    running = exchange(started=100.0)
    for moment in course:
        for name, value in moment.items():
            setattr(running, name, value)
        later = row_of(running)
        assert later is row_of(running)
        assert later == row_of(replace(running, row=None))
        later.cost_micros = 7  # of what is an estimate yet; the next one may have no price


def test_numbers_that_no_column_could_hold_are_clamped() -> None:
    meter = Meter([])
    meter.see("", Usage(10**30, -5), None)
    absurd = row_of(exchange(meter=meter, started=-1e12, status=-1))
    assert (absurd.prompt_tokens, absurd.completion_tokens, absurd.latency_ms) == (MAX_TOKENS, 0, 2**31 - 1)
    assert absurd.status == 0


async def test_text_that_postgres_refuses_is_made_storable(pool: asyncpg.Pool) -> None:
    rows = []
    for text in NASTY:
        meter = Meter([])
        meter.see("", Usage(1, 1), text)
        done = exchange(user_id=text, app_id=text, client_request_id=text, model=text, error_code=text, meter=meter)
        rows.append(row_of(done))
    await write(pool, rows)
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
        cache_write_tokens=sum(one.cache_write_tokens for one in rows),
        reasoning_tokens=sum(one.reasoning_tokens for one in rows),
        cost_micros=sum(one.cost_micros or 0 for one in rows),
        unpriced=sum(one.cost_micros is None for one in rows),
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
    stats = await read_stats(pool, Scope(None, None if name == "all" else bound_of(name)))
    assert stats.totals == expect(within(rows, **age))
    assert stats.last_hour == expect(within(rows, hours=1))
    assert abs(stats.as_of - datetime.now(UTC)) < timedelta(seconds=30)


async def test_filters_are_joined_by_and(pool: asyncpg.Pool) -> None:
    rows = some_rows()
    await write(pool, rows)
    stats = await read_stats(pool, Scope(ALICE, user="ann", app="cli", model="claude"))
    wanted = [
        one for one in rows if (one.account_id, one.user_id, one.app_id, one.model) == (ALICE, "ann", "cli", "claude")
    ]
    assert wanted
    assert stats.totals == expect(wanted)
    assert stats.last_hour == expect(within(wanted, hours=1))


@pytest.mark.parametrize("group_by", [name for name in GROUP_BY if name not in SERIES])
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
    found = await read_rows(pool, Scope(BOB, timedelta(days=7), user="ben", app="web", model="llama3"), None, 1000)
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

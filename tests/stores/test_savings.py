"""Rows of answers that no provider made for their request: written, counted, chained, and on the way through versions."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import astuple, replace
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

import asyncpg
import orjson
import pytest

from gateway.exchange import Exchange, Principal, new_id
from gateway.protocol.pricing import Price
from gateway.protocol.request import ModelRequest
from gateway.protocol.routing import Provider, Target
from gateway.protocol.usage import MAX_COUNT, Usage
from gateway.stores import journal as journal_module
from gateway.stores import records
from gateway.stores.chain import link_rows, verify
from gateway.stores.journal import Journal
from gateway.stores.ledger import COLUMNS, Given, make_partitions, unfolded, values_of, write_rows
from gateway.stores.migrations import migrate
from gateway.stores.postgres import Connection
from gateway.stores.recorder import Recorder
from gateway.stores.segments import Tail
from gateway.stores.shipper import Shipper
from gateway.stores.stats import Scope, read_stats
from gateway.stores.usage import UsageRow
from tests.prove.ledger import LEDGER
from tests.support.journal_writer import ALICE, remembered, row
from tests.support.stores import SCHEMA

pytestmark = pytest.mark.integration

KEY = b"of the chain"
PRICE = Price(1_000_000, 2_000_000, 500_000, 1_000_000, 2_000_000)  # micro-dollars 1 a token in, 2 a token out
PAID = new_id()


def exchange(**changes: Any) -> Exchange:
    """One that got another's answer: 10 tokens in, 4 of them cached, 5 out."""
    started = monotonic() - 2
    made = Exchange(
        started=started,
        first_byte=started + 0.5,
        principal=Principal("Key012345678", "aig_Key012345678", "a key", ALICE, "member"),
        asked=ModelRequest(body=b"{}", fields={}, model="fast", stream=True, wants_usage=False),
        target=Target(Provider(name="openai", dialect="openai", base_url="http://localhost/v1"), "gpt-4o"),
        model="fast",
        outcome="ok",
        status=200,
        source="cache",
        source_id=PAID,
        saved=Usage(10, 5, cached_tokens=4),
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def rows(journal: Journal) -> list[UsageRow]:
    batch = Tail(journal.folder).read(1000, journal.reached)
    return [unfolded(one) for one in batch.rows] if batch is not None else []


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    journal = Journal(tmp_path / "journal", fsync="never")
    yield journal
    journal.close()


def price(provider: str, model: str, at: datetime) -> Price | None:
    return PRICE if model == "gpt-4o" else None


# --- recorded -----------------------------------------------------------------------------------------------------


def test_a_remembered_answer_costs_nothing_and_says_what_it_saved(journal: Journal) -> None:
    done = exchange()
    Recorder(journal, price).end(done)
    [written] = rows(journal)
    assert (written.prompt_tokens, written.completion_tokens, written.cost_micros) == (0, 0, 0)
    assert (written.usage_source, written.source, written.source_id) == ("none", "cache", PAID)
    assert (written.saved_tokens, written.saved_micros) == (15, 6 + 4 // 2 + 5 * 2)
    assert (written.provider, written.model, written.upstream_model) == ("openai", "fast", "gpt-4o")
    assert (written.outcome, written.status, written.ttft_ms) == ("ok", 200, 500)
    assert (done.cost_micros, done.saved_micros, done.recorded) == (0, written.saved_micros, True)


def test_it_is_written_once(journal: Journal) -> None:
    done, recorder = exchange(), Recorder(journal, price)
    recorder.end(done)
    recorder.end(done)
    assert len(rows(journal)) == 1


def test_without_a_price_nobody_knows_what_it_saved(journal: Journal) -> None:
    done = exchange(target=replace(exchange().target, model="unheard-of"))  # type: ignore[type-var]
    Recorder(journal, price).end(done)
    [written] = rows(journal)
    assert (written.saved_tokens, written.saved_micros, written.cost_micros) == (15, None, 0)


def test_a_client_that_left_before_the_end_has_a_row_and_saved_nothing(journal: Journal) -> None:
    Recorder(journal, price).end(exchange(outcome="client_abort", status=0, first_byte=0.0, saved=None))
    [written] = rows(journal)
    assert (written.outcome, written.status, written.ttft_ms) == ("client_abort", 0, None)
    assert (written.saved_tokens, written.saved_micros) == (0, 0)


@pytest.mark.parametrize(("prepared", "outcome"), [(True, "ok"), (False, "gateway_error")])
def test_a_row_always_has_an_outcome(journal: Journal, prepared: bool, outcome: str) -> None:
    Recorder(journal, price).end(exchange(outcome="", prepared=prepared))
    assert [written.outcome for written in rows(journal)] == [outcome]


def test_nothing_is_written_where_nobody_would_have_answered(journal: Journal) -> None:
    Recorder(journal, price).end(exchange(target=None))
    Recorder(journal, price).end(exchange(source="provider"))
    assert rows(journal) == []


def test_the_nonsense_of_a_provider_saved_nobody_a_fortune(journal: Journal) -> None:
    Recorder(journal, price).end(exchange(saved=Usage(MAX_COUNT, MAX_COUNT)))
    [written] = rows(journal)
    assert (written.saved_tokens, written.saved_micros) == (10**12, None)


def test_the_payers_of_a_remembered_answer_get_all_back_that_was_held(journal: Journal) -> None:
    settled: list[tuple[int, int]] = []

    class Reserved:
        def settle(self, tokens: int, micros: int) -> None:
            settled.append((tokens, micros))

    Recorder(journal, price).end(exchange(reservation=Reserved()))
    assert settled == [(0, 0)]


# --- the journal --------------------------------------------------------------------------------------------------


def test_without_room_a_row_that_cost_nothing_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reserve is for those that somebody pays for."""
    monkeypatch.setattr(journal_module, "ROOM", 512)
    journal = Journal(tmp_path / "journal", fsync="never", max_bytes=4096)
    paid = [row() for _ in range(3)]
    for one in paid:
        journal.begin(one)
    added = 0
    while added < 100 and journal.add(remembered()):
        added += 1
    assert 0 < added < 8
    for one in paid:
        journal.end(one)
    assert journal.dropped == 1
    assert (journal.ended, len(journal.unwritten)) == (added + 3, 0)
    assert [one.request_id for one in rows(journal)[added:]] == [one.request_id for one in paid]
    journal.close()


@pytest.mark.parametrize("policy", ["always", "group", "never"])
def test_nobody_waits_for_the_disk_of_a_row_that_cost_nothing(tmp_path: Path, policy: Any) -> None:
    synced: list[int] = []
    journal = Journal(tmp_path / "journal", fsync=policy, fdatasync=synced.append)
    assert journal.add(remembered())
    assert synced == []
    journal.close()


async def test_it_is_shipped_without_a_begin_and_counted_once(journal: Journal, pool: asyncpg.Pool) -> None:
    done = exchange()
    Recorder(journal, price).end(done)
    shipper = Shipper(pool, journal, key=KEY)
    assert await shipper.close(10) == 0
    [stored] = await pool.fetch("select * from usage")
    assert (str(stored["request_id"]), str(stored["source_id"])) == (done.id, PAID)
    assert await pool.fetch(LEDGER) == []
    totals = (await read_stats(pool, Scope(ALICE))).totals
    assert (totals.requests, totals.remembered, totals.saved_tokens, totals.saved_micros) == (1, 1, 15, 18)
    assert (totals.total_tokens, totals.cost_micros, totals.unpriced) == (0, 0, 0)
    assert totals.average_latency_ms is None and totals.average_ttft_ms is None


# --- versions -----------------------------------------------------------------------------------------------------

WIDTH = COLUMNS.index("source")  # columns of the version before


def test_a_journal_of_the_version_before_is_read() -> None:
    one = row()
    line = records._framed(("end", *values_of(one)[:WIDTH])).rstrip(b"\n")
    read = records.read(line, COLUMNS[:WIDTH])
    assert isinstance(read, Given)
    assert read.row == one


# As the version before writes its rows and their sums by the hour.
OLD = """
with given as (
    select * from json_to_recordset($1::json) as given (
        request_id uuid, started_at timestamptz, key_id text, account_id uuid, user_id text, app_id text,
        client_request_id text, provider text, model text, upstream_model text,
        stream boolean, status integer, outcome text, error_code text, finish_reason text,
        prompt_tokens bigint, completion_tokens bigint, cached_tokens bigint, cache_write_tokens bigint,
        reasoning_tokens bigint, usage_source text, latency_ms integer, ttft_ms integer, cost_micros bigint
    )
),
fresh as (
    insert into usage select * from given order by request_id
    on conflict (request_id, started_at) do nothing
    returning *
),
hours as (
    select
        account_id, date_trunc('hour', started_at, 'UTC') as hour, key_id, user_id, app_id, provider, model,
        count(*) as requests, 0 as errors, 0 as client_aborts,
        sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens), sum(cache_write_tokens), sum(reasoning_tokens),
        sum(cost_micros), 0 as unpriced, sum(latency_ms), count(*), sum(ttft_ms), count(ttft_ms)
    from fresh group by account_id, hour, key_id, user_id, app_id, provider, model
),
counted as (insert into usage_hourly as sums select * from hours),
rolled as (
    insert into usage_rollups select 'month_by_all', account_id, date_trunc('month', hour, 'UTC'), key_id, user_id,
        app_id, provider, model, requests, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
    from hours
)
select {} from fresh
""".format(", ".join(COLUMNS[:WIDTH]))


async def write_old(connection: Connection, one: UsageRow) -> None:
    """As the version before does, which knows neither the columns nor the sums of this one."""
    known = dict(zip(COLUMNS[:WIDTH], astuple(one)[:WIDTH], strict=True))
    async with connection.transaction():
        written = await connection.fetch(OLD, orjson.dumps([known]).decode())
        given = [(str(one[0]), one[1], orjson.dumps(tuple(one), default=str)) for one in written]
        await link_rows(connection, KEY, given, replaces=False, timeout=5)


async def test_the_chain_holds_across_the_migration_while_both_versions_write(
    empty_database_url: str, tmp_path: Path
) -> None:
    for path in (SCHEMA.parent / "migrations").glob("000[1-7]*"):
        (tmp_path / path.name).write_text(path.read_text())
    await migrate(empty_database_url, tmp_path)
    async with asyncpg.create_pool(empty_database_url, min_size=1) as pool, pool.acquire() as old:
        paid = [row(user_id=f"user {number}") for number in range(4)]
        for one in paid[:2]:
            await write_old(old, one)  # its statement stays prepared
        await migrate(empty_database_url)
        await make_partitions(pool)
        await write_old(old, paid[2])
        hits = [remembered(paid[0]), remembered(paid[2], saved_micros=None)]
        await write_rows(pool, hits, KEY)
        await write_old(old, paid[3])
        report = await verify(pool, KEY)
        assert (report.fault, report.links, report.rows) == (None, 5, 6)
        assert await pool.fetch(LEDGER) == []
        told = await pool.fetch("select source, count(*) from usage group by source")
        assert {tuple(one) for one in told} == {("provider", 4), ("shared", 2)}
        await pool.execute("update usage set saved_micros = 10000 where saved_micros is not null")
        assert (await verify(pool, KEY)).fault is not None, "what was saved is sealed as what was spent"


async def test_who_counted_is_checked_in_every_partition_that_there_is_or_will_be(pool: asyncpg.Pool) -> None:
    moments = [datetime(1970, 1, 1, tzinfo=UTC), datetime.now(UTC)]  # in the default partition, in one of its own
    await make_partitions(pool)
    for moment in moments:
        await write_rows(pool, [remembered(started_at=moment)])
        with pytest.raises(Exception, match="CheckViolation"):
            await write_rows(pool, [row(started_at=moment, usage_source="guessed")])


# --- the figures move as one ---------------------------------------------------------------------------------------


async def test_many_processes_that_write_the_same_rows_count_each_once(pool: asyncpg.Pool) -> None:
    chance = random.Random(3)
    paid = [row(user_id=chance.choice(["ann", "ben"])) for _ in range(20)]
    hits = [remembered(chance.choice(paid), outcome=chance.choice(["ok", "client_abort", "upstream_error"]))
            for _ in range(60)]  # fmt: skip
    everything = [*paid, *hits]
    writers: list[Callable[[], Awaitable[int]]] = [
        lambda: write_rows(pool, chance.sample(everything, 50), KEY) for _ in range(5)
    ]
    await asyncio.gather(*(write() for write in writers))
    await write_rows(pool, everything, KEY)
    assert await pool.fetch(LEDGER) == []
    assert (await verify(pool, KEY)).fault is None
    totals = (await read_stats(pool, Scope(None))).totals
    assert totals.requests == 80
    assert totals.remembered == sum(hit.outcome != "upstream_error" for hit in hits)
    assert totals.saved_tokens == 60 * 150
    assert totals.total_tokens == 20 * 150

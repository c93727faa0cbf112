import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import asyncpg
import pytest
from rs_bpe.bpe import openai

from gateway.exchange import Exchange, Principal
from gateway.protocol.meter import Meter
from gateway.protocol.pricing import Price
from gateway.protocol.request import ModelRequest
from gateway.protocol.routing import Provider, Target
from gateway.protocol.usage import Usage
from gateway.protocol.vocabulary import Vocabulary
from gateway.stores import recorder as recorder_module
from gateway.stores.journal import Journal
from gateway.stores.ledger import Given
from gateway.stores.recorder import Recorder
from gateway.stores.records import Begin, Record, Tick, Void
from gateway.stores.segments import Tail
from gateway.stores.shipper import Shipper
from gateway.stores.usage import UsageRow
from tests.support.gateway import Gateway, chat_body, running_gateway
from tests.support.journal_writer import ALICE
from tests.support.standin import standing_in

pytestmark = pytest.mark.integration

PRICE = Price(1_000_000, 2_000_000, 1_000_000, 1_000_000, 2_000_000)  # micro-dollars 1 a token in, 2 a token out
PROMPT, ANSWER = "Say hello to everybody here.", "Hello everybody, it is good to see you."
ESTIMATED, COUNTED = (15, 12), (107, 1000)  # tokens: by the meter, and as `Counter` says


@dataclass
class Counter:
    """Stands for the tokeniser: 100 tokens for a prompt and 1000 for an answer, when it is let."""

    asked: list[tuple[list[str], Vocabulary, float]] = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, texts: Sequence[str], vocabulary: Vocabulary, seconds: float) -> list[int] | None:
        self.asked.append((list(texts), vocabulary, seconds))
        try:
            async with asyncio.timeout(seconds):
                await self.ready.wait()
        except TimeoutError:
            return None
        return [100, 1000]


@dataclass
class Reserved:
    """A reservation that notes how it was settled."""

    settled: list[tuple[int, int]] = field(default_factory=list)

    def used(self, tokens: int) -> bool:
        return True

    async def more(self, tokens: int) -> bool:
        return True

    def settle(self, tokens: int, micros: int) -> None:
        self.settled.append((tokens, micros))


def exchange(outcome: str = "client_abort", *, model: str = "gpt-4o", usage: Usage | None = None) -> Exchange:
    """One that is over, but for its row."""
    meter = Meter([PROMPT])
    meter.see(ANSWER, usage, None)
    made = Exchange(
        principal=Principal("Key012345678", "aig_Key012345678", "a key", ALICE, "member"),
        asked=ModelRequest(body=b"{}", fields={}, model="fast", stream=True, wants_usage=False),
        target=Target(Provider(name="openai", dialect="openai", base_url="http://localhost/v1"), model),
        model="fast",
        reservation=Reserved(),
        meter=meter,
        connected=True,
        status=200,
    )
    made.outcome = outcome  # type: ignore[assignment]
    return made


def price(provider: str, model: str, at: datetime) -> Price:
    return PRICE


@pytest.fixture
def counter() -> Counter:
    return Counter()


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    journal = Journal(tmp_path / "journal")
    yield journal
    journal.close()


@pytest.fixture
async def recorder(journal: Journal, counter: Counter) -> AsyncIterator[Recorder]:
    recorder = Recorder(journal, price, count=counter)
    yield recorder
    await recorder.close(0.1)


def records(journal: Journal) -> list[Record]:
    """All that was written, but for the first records of exchanges."""
    batch = Tail(journal.folder).read(1000, journal.reached)
    return [record for record in batch.records if not isinstance(record, Begin)] if batch is not None else []


def rows(journal: Journal) -> list[UsageRow]:
    return [record.row for record in records(journal) if isinstance(record, Given)]


def figures(row: UsageRow) -> tuple[int, int, str]:
    return row.prompt_tokens, row.completion_tokens, row.usage_source


def settled(done: Exchange) -> list[tuple[int, int]]:
    assert isinstance(done.reservation, Reserved)
    return done.reservation.settled


async def until(true: Callable[[], object], seconds: float = 20) -> None:
    deadline = monotonic() + seconds
    while not true():
        assert monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.005)


# --- nothing to count ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["ok", "client_abort"])
async def test_what_the_provider_counted_is_written_at_once(
    recorder: Recorder, journal: Journal, counter: Counter, outcome: str
) -> None:
    done = exchange(outcome, usage=Usage(10, 5, cached_tokens=4))
    await recorder.begin(done)
    recorder.end(done)
    recorder.end(done)
    assert [figures(row) for row in rows(journal)] == [(10, 5, "provider")]
    assert done.recorded
    assert settled(done) == [(15, done.cost_micros)]
    assert not counter.asked


@pytest.mark.parametrize("model", ["claude-sonnet-4-5", "llama3"])
async def test_other_makers_models_are_estimated_at_once(
    recorder: Recorder, journal: Journal, counter: Counter, model: str
) -> None:
    done = exchange(model=model)
    await recorder.begin(done)
    recorder.end(done)
    assert [figures(row) for row in rows(journal)] == [(*ESTIMATED, "estimated")]
    assert settled(done) == [(sum(ESTIMATED), 15 + 2 * 12)]
    assert not counter.asked


async def test_without_a_tokeniser_everything_is_estimated_at_once(journal: Journal) -> None:
    done = exchange()
    recorder = Recorder(journal, price)
    await recorder.begin(done)
    recorder.end(done)
    assert [figures(row) for row in rows(journal)] == [(*ESTIMATED, "estimated")]


async def test_what_reached_no_provider_leaves_no_row_and_gives_all_back(recorder: Recorder, journal: Journal) -> None:
    refused = exchange()
    refused.connected = False
    await recorder.begin(refused)
    recorder.end(refused)
    assert [type(record) for record in records(journal)] == [Void]
    assert settled(refused) == [(0, 0)]


async def test_an_exchange_that_never_began_gives_all_back(recorder: Recorder, journal: Journal) -> None:
    never = exchange()
    never.meter = None
    recorder.end(never)
    assert records(journal) == []
    assert settled(never) == [(0, 0)]


# --- counted when nobody waits ------------------------------------------------------------------------------------


async def test_a_broken_exchange_is_ended_when_its_count_is_in_and_a_tick_holds_the_estimate_until_then(
    recorder: Recorder, journal: Journal, counter: Counter
) -> None:
    done = exchange()
    await recorder.begin(done)
    recorder.end(done)
    (tick,) = records(journal)
    assert isinstance(tick, Tick)
    assert (tick.prompt_tokens, tick.completion_tokens) == ESTIMATED
    assert (done.recorded, done.cost_micros, recorder.counting) == (False, 15 + 2 * 12, 1)
    assert settled(done) == []
    ended = done.ended

    counter.ready.set()
    await until(lambda: not recorder.counting)
    (row,) = rows(journal)
    assert figures(row) == (*COUNTED, "counted")
    assert (row.outcome, row.cost_micros) == ("client_abort", 107 + 2 * 1000)
    assert (done.recorded, done.ended) == (True, ended)
    assert settled(done) == [(1107, 2107)]
    assert counter.asked == [([PROMPT, ANSWER], "o200k_base", recorder_module.COUNTING)]


async def test_an_exchange_that_is_being_counted_ends_once_however_often_it_is_ended(
    recorder: Recorder, journal: Journal, counter: Counter
) -> None:
    done = exchange("upstream_error")
    await recorder.begin(done)
    async with asyncio.timeout(5):
        await recorder.settle(done)  # the client is told of the error at once
    recorder.end(done)
    counter.ready.set()
    await until(lambda: done.recorded)
    recorder.end(done)
    await recorder.settle(done)
    assert [figures(row) for row in rows(journal)] == [(*COUNTED, "counted")]
    assert settled(done) == [(1107, 2107)]


async def test_a_count_that_does_not_come_leaves_the_estimate(
    recorder: Recorder, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "COUNTING", 0.05)
    done = exchange()
    await recorder.begin(done)
    recorder.end(done)
    await until(lambda: done.recorded)
    assert [figures(row) for row in rows(journal)] == [(*ESTIMATED, "estimated")]


async def test_closing_waits_for_counts_but_not_for_ever(journal: Journal, counter: Counter) -> None:
    recorder = Recorder(journal, price, count=counter)
    first, second = exchange(), exchange()
    for done in (first, second):
        await recorder.begin(done)
    recorder.end(first)
    asyncio.get_running_loop().call_later(0.05, counter.ready.set)
    await recorder.close()
    assert [figures(row) for row in rows(journal)] == [(*COUNTED, "counted")]

    counter.ready.clear()
    recorder.end(second)
    await recorder.close(0.05)
    assert [figures(row) for row in rows(journal)][1:] == [(*ESTIMATED, "estimated")]
    assert settled(second) == [(27, 39)]


async def test_a_process_that_is_killed_while_it_counts_leaves_the_row_with_the_estimate(
    tmp_path: Path, pool: asyncpg.Pool
) -> None:
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from tests.stores.test_recorder import Counter, Journal, Recorder, exchange, price\n"
        "async def main():\n"
        "    recorder = Recorder(Journal(Path(sys.argv[1])), price, count=Counter())\n"
        "    done = exchange()\n"
        "    await recorder.begin(done)\n"
        "    recorder.end(done)\n"
        "    print(done.id, flush=True)\n"
        "    await asyncio.sleep(100)\n"
        "asyncio.run(main())\n"
    )
    root = tmp_path / "journal"
    killed = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(root), stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert killed.stdout is not None
    request_id = (await asyncio.wait_for(killed.stdout.readline(), 30)).decode().strip()
    killed.kill()
    await killed.wait()

    query = "select outcome, prompt_tokens, completion_tokens, usage_source from usage where request_id = $1::uuid"
    async with shipping(pool, root):
        async with asyncio.timeout(20):
            while (row := await pool.fetchrow(query, request_id)) is None:
                await asyncio.sleep(0.02)
    assert tuple(row) == ("interrupted", *ESTIMATED, "estimated")


@asynccontextmanager
async def shipping(pool: asyncpg.Pool, root: Path) -> AsyncIterator[None]:
    """Another process of the gateway, on the same folder."""
    journal = Journal(root)
    shipper = Shipper(pool, journal, linger=0.02)
    task = asyncio.create_task(shipper.run())
    try:
        yield
    finally:
        await shipper.close(1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        journal.close()


# --- counted while the client waits -------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["ok", "budget_exhausted"])
async def test_a_whole_answer_without_usage_is_counted_before_its_last_byte(
    recorder: Recorder, journal: Journal, counter: Counter, outcome: str
) -> None:
    done = exchange(outcome)
    await recorder.begin(done)
    counter.ready.set()
    await recorder.settle(done)
    assert [figures(row) for row in rows(journal)] == [(*COUNTED, "counted")]
    assert settled(done) == [(1107, 2107)]


@pytest.mark.parametrize(("outcome", "seconds"), [("ok", 0.05), ("budget_exhausted", 0.25)])
async def test_its_client_does_not_wait_long_for_that(
    recorder: Recorder, journal: Journal, counter: Counter, outcome: str, seconds: float
) -> None:
    done = exchange(outcome)
    await recorder.begin(done)
    await recorder.settle(done)
    assert [figures(row) for row in rows(journal)] == [(*ESTIMATED, "estimated")]
    assert counter.asked == [([PROMPT, ANSWER], "o200k_base", seconds)]


async def test_what_the_client_is_told_is_what_the_row_says(
    recorder: Recorder, journal: Journal, counter: Counter
) -> None:
    in_time, late = exchange("budget_exhausted"), exchange("budget_exhausted")
    told = []
    for done in (late, in_time):
        await recorder.begin(done)
        await recorder.counted(done)
        assert done.meter is not None
        told.append(done.meter.result())
        counter.ready.set()  # too late for the first, which is not asked again
        await recorder.settle(done)
    assert told == [(Usage(*ESTIMATED), "estimated"), (Usage(*COUNTED), "counted")]
    assert [figures(row) for row in rows(journal)] == [(*ESTIMATED, "estimated"), (*COUNTED, "counted")]
    assert len(counter.asked) == 2


async def test_a_client_that_leaves_while_it_waits_leaves_one_row(
    recorder: Recorder, journal: Journal, counter: Counter
) -> None:
    done = exchange("ok")
    await recorder.begin(done)
    settling = asyncio.create_task(recorder.settle(done))
    await until(lambda: counter.asked)
    settling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await settling
    recorder.end(done)  # as the middleware does
    assert [(row.outcome, *figures(row)) for row in rows(journal)] == [("ok", *ESTIMATED, "estimated")]


# --- through a whole gateway --------------------------------------------------------------------------------------

WORDS = ["It", " was", " the", " best", " of", " times", ",", " it", " was", " 最悪", " of", " times", "."]
EVENTS = [
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":null}]}\n\n'
    % word.encode()
    for word in WORDS
]
LAST = [
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n',
    b"data: [DONE]\n\n",
]
QUESTION = "Which book begins with the best of times? Quote it."
Ask = Callable[[aiohttp.ClientSession, Gateway], Awaitable[None]]


async def read_it_all(client: aiohttp.ClientSession, gateway: Gateway) -> None:
    body = chat_body("openai/gpt-4o", QUESTION, stream=True)
    async with client.post(f"{gateway.base_url}/chat/completions", json=body) as response:
        await response.read()


async def leave_after_the_words(client: aiohttp.ClientSession, gateway: Gateway) -> None:
    body = chat_body("openai/gpt-4o", QUESTION, stream=True)
    async with client.post(f"{gateway.base_url}/chat/completions", json=body) as response:
        received = b""
        while b'"."' not in received:
            received += await response.content.readany()


@pytest.mark.parametrize(
    ("events", "pause", "ask", "outcome"),
    [
        (EVENTS, 0.0, read_it_all, "upstream_error"),
        ([*EVENTS, b": waiting\n\n" * 3], 0.0, read_it_all, "upstream_error"),
        ([b"".join(EVENTS), *LAST], 1.0, leave_after_the_words, "client_abort"),
    ],
    ids=["cut", "cut with a comment", "left"],
)
async def test_a_stream_that_ends_without_usage_is_billed_by_the_tokens_that_passed(
    database_url: str, redis_url: str, events: list[bytes], pause: float, ask: Ask, outcome: str
) -> None:
    row = await row_after(database_url, redis_url, events, pause, ask)
    exact = openai.o200k_base()
    prompt, completion = exact.count(QUESTION) + 4 + 3, exact.count("".join(WORDS))
    assert (row["outcome"], row["usage_source"]) == (outcome, "counted")
    assert (row["prompt_tokens"], row["completion_tokens"]) == (prompt, completion)
    assert row["cost_micros"] > 0


async def row_after(database_url: str, redis_url: str, events: list[bytes], pause: float, ask: Ask) -> Any:
    async with standing_in(events, pause) as provider:
        environ = {"OPENAI_BASE_URL": f"{provider.address}/v1"}
        async with (
            running_gateway(database_url, redis_url, environ) as gateway,
            aiohttp.ClientSession(headers=gateway.headers) as client,
        ):
            await ask(client, gateway)
            async with asyncio.timeout(20):
                while not (rows := await gateway.rows()):
                    await asyncio.sleep(0.02)
            (row,) = rows
            return row

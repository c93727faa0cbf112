"""One request, again and again, with its first, second, third … call of anything failing, or its client leaving there.

After each the same must hold: no stream that broke looks whole (P3), nothing is open at the provider (P4), the usage row
is there once with the right sums (P6), no slot and no reservation is held (P7), no bug was counted, and the next request
is served as if nothing had been.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import asyncpg
import orjson
import pytest
from redis.asyncio import Redis

from gateway import appkeys
from gateway.mock import Received
from gateway.stores import copy, script, shipper
from tests.prove.ledger import LEDGER
from tests.support.gateway import Gateway, chat_body, running_gateway
from tests.support.seams import SEAMS, Seams

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

PATIENCE = 20.0  # seconds until what a fault left behind is cleared away
MOST = 200  # calls at one seam; more is a loop
REFUSED = {502, 503, 504}  # what a client may be told; a 4xx would blame it, a 500 is a bug

OPENAI, CLAUDE = "openai/mock-gpt?tokens=8&pace_ms=1", "anthropic/mock-claude?tokens=8&pace_ms=1"
WARM = tuple(
    seam for seam in SEAMS if seam not in ("redis", "connect", "open")
)  # where there are connections and files
CHAIN = f"""
[models.chain]
targets = [{{ to = "openai/mock-gpt?status=500" }}]
fallbacks = ["{CLAUDE}"]
"""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is asked, of which key, and what is done before each request."""

    body: Mapping[str, Any]
    limits: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    config: str = ""  # of GATEWAY_CONFIG, TOML
    unknown_key: bool = False  # no process has seen it yet
    forgotten: bool = False  # Redis has lost its memory
    fresh: bool = False  # there is no connection to the provider or to Redis, and no file of the journal
    cuts: bool = False  # its faults are such that its provider is cut off
    seams: tuple[str, ...] = WARM


SCENARIOS: Mapping[str, Scenario] = {
    "streamed": Scenario(chat_body(OPENAI, stream=True)),
    "whole": Scenario(chat_body(OPENAI)),
    "translated": Scenario(chat_body(CLAUDE, stream=True), seams=("script", "send", "read", "write", "request")),
    "fresh": Scenario(
        chat_body(OPENAI, stream=True),
        fresh=True,
        seams=("script", "redis", "connect", "send", "read", "open", "journal", "sync", "request"),
    ),
    "slow": Scenario(  # whose provider has not said all by far when its client leaves
        chat_body("openai/mock-gpt?tokens=8&pace_ms=15", stream=True),
        cuts=True,
        seams=("write", "request"),
    ),
    "budgeted": Scenario(
        # Three slices: two are asked for while it runs.
        chat_body("openai/mock-gpt?tokens=600", stream=True, max_tokens=1000),
        {"tokens_per_day": 10**9, "tokens_per_minute": 10**8},
        seams=("script", "read", "write", "journal", "request"),
    ),
    "budgeted whole": Scenario(
        chat_body(OPENAI), {"tokens_per_day": 10**9}, seams=("script", "read", "journal", "request")
    ),
    "budget forgotten": Scenario(
        chat_body(OPENAI, stream=True),
        {"tokens_per_day": 10**9},
        forgotten=True,
        seams=("script", "acquire", "postgres", "request"),
    ),
    "unknown key": Scenario(
        chat_body(OPENAI, stream=True), unknown_key=True, seams=("script", "acquire", "postgres", "request")
    ),
    "failed over": Scenario(  # its first target is always out, the other one speaks another dialect
        chat_body("chain", stream=True),
        {"tokens_per_day": 10**9},
        config=CHAIN,
        seams=("script", "send", "read", "write", "journal", "request"),
    ),
    "copied": Scenario(
        chat_body(OPENAI, stream=True),
        environ={"GATEWAY_USAGE_COPY": "redis"},
        seams=("script", "redis", "journal", "request"),
    ),
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits before it tries again waits less: there are hundreds of faults to recover from."""
    monkeypatch.setattr(script, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(copy, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(shipper, "RETRY_FIRST", 0.01)


@pytest.mark.parametrize("name", SCENARIOS)
async def test_no_fault_at_any_point_of_a_request_breaks_a_promise(
    name: str,
    database_url: str,
    redis_url: str,
    redis: Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[[str], None],
) -> None:
    scenario, seams = SCENARIOS[name], Seams()
    seams.install(monkeypatch)
    config = tmp_path / "gateway.toml"
    config.write_text(scenario.config)
    scenario = replace(scenario, environ={**scenario.environ, "GATEWAY_CONFIG": str(config)})
    async with _staged(scenario, seams, database_url, redis_url, redis) as stage:
        met = {seam: [await _all_of(stage, seam, how) for how in SEAMS[seam]] for seam in scenario.seams}
        assert await stage.pool.fetch(LEDGER) == []
        assert not stage.bugs, stage.bugs
    count = sum(map(sum, met.values()))
    assert count > len(scenario.seams)
    figure(f"P3 P4 P6 P7 the Nth call fails, {name}: {count} faults")
    points = ", ".join(f"{max(counts)} {seam} in {len(counts)} ways" for seam, counts in met.items())
    figure(f"points of a {name} request at which the Nth call failed: {points}")


async def _all_of(stage: "Stage", seam: str, how: str) -> int:
    """At how many points the fault was met: every one that a request has at this seam."""
    for number in range(1, MOST):
        where = f"{seam} {how} {number}"
        await stage.prepare()
        stage.seams.arm(seam, how, number)
        await stage.check(await stage.ask(), where)
        met = stage.seams.met
        stage.seams.disarm()
        if not met:
            return number - 1
        served = await stage.ask()
        assert served.whole, f"the request after {where}: {served}"
        await stage.check(served, f"the request after {where}")
    raise AssertionError(f"{seam} is met again and again")


# --- one request --------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the client had of an answer."""

    id: str = ""
    status: int = 0  # 0: it never came
    body: bytes = b""
    ended: bool = False  # by the rules of HTTP

    @property
    def text(self) -> str:
        """What the model said."""
        return "".join(
            choice.get("delta", choice.get("message", {})).get("content") or ""
            for value in self._values
            for choice in value.get("choices", ())
        )

    @property
    def events(self) -> int:
        return self.body.count(b"data: ")

    @property
    def done(self) -> bool:
        return self.body.endswith(b"data: [DONE]\n\n")

    @property
    def error(self) -> str:
        """Code of an error, as an answer or as an event."""
        return next((value["error"]["code"] or "error" for value in self._values if "error" in value), "")

    @property
    def whole(self) -> bool:
        """It says of itself that nothing is missing."""
        return self.status == 200 and self.ended and not self.error and (self.done or not self._streamed)

    @property
    def _streamed(self) -> bool:
        return self.body.startswith((b"data: ", b": "))

    @property
    def _values(self) -> list[dict[str, Any]]:
        if not self._streamed:
            return [orjson.loads(self.body)] if self.body and self.ended else []
        events = [event[6:] for event in self.body.split(b"\n\n")[:-1] if event.startswith(b"data: {")]
        return [orjson.loads(event) for event in events]


@dataclass
class Stage:
    """A gateway, its provider, and what must hold of them."""

    scenario: Scenario
    seams: Seams
    gateway: Gateway
    client: aiohttp.ClientSession
    pool: asyncpg.Pool
    redis: Redis
    key: str = ""
    expected: Seen = field(default_factory=Seen)  # an answer without faults
    tokens: tuple[int, int] | None = None  # of its row
    bugs: list[str] = field(default_factory=list)  # that nobody caught
    before: int = 0  # requests that the provider had had

    async def prepare(self) -> None:
        self.gateway.forget_faults()  # or the breaker of the provider opens
        if self.scenario.unknown_key:
            self.gateway.app[appkeys.KEYS]._verified.clear()
        if self.scenario.fresh:
            await self._forget_connections()
        if self.scenario.forgotten:
            with self.seams.spared():
                await self.redis.flushdb()

    async def _forget_connections(self) -> None:
        app = self.gateway.app
        for idle in app[appkeys.UPSTREAM]._pool._idle.values():
            for connection in list(idle):
                connection.cut()
        app[appkeys.RECORDER]._journal.retire()
        to_redis = app[appkeys.SCRIPT]._connection
        if to_redis is not None:
            to_redis.abort()
        await asyncio.sleep(0)

    async def ask(self) -> Seen:
        self.before = len(self.gateway.calls)
        seen, headers = Seen(), {"Authorization": f"Bearer {self.key}"}
        url = f"{self.gateway.base_url}/chat/completions"
        try:
            async with asyncio.timeout(30), self.client.post(url, json=self.scenario.body, headers=headers) as response:
                seen.id, seen.status = response.headers["X-Request-Id"], response.status
                async for data in response.content.iter_any():
                    seen.body += data
                seen.ended = True
        except aiohttp.ClientError:
            pass
        return seen

    @property
    def _calls(self) -> list[Received]:
        """Of the provider, for the last request."""
        return self.gateway.calls[self.before :]

    # --- what must hold

    async def check(self, seen: Seen, where: str) -> None:
        self._check_answer(seen, where)
        with self.seams.spared():
            await self._until(self._settled, where)
            rows = await self.pool.fetch("select * from usage")
        called = {call.headers["x-request-id"] for call in self._calls}
        ids = [str(row["request_id"]) for row in rows]
        assert len(ids) == len(set(ids)), f"{where}: a row is doubled"
        assert called <= set(ids), f"{where}: the provider was called and no row tells of it, {seen}"
        if seen.whole:
            [row] = [row for row in rows if str(row["request_id"]) == seen.id]
            tokens = row["prompt_tokens"], row["completion_tokens"]
            assert (row["outcome"], tokens) == ("ok", self.tokens or tokens), where
        if self.scenario.cuts and seen.events < self.expected.events // 2:
            assert all(call.client_gone_at for call in self._calls), f"{where}: the provider was read to its end"
        assert not self.bugs, f"{where}: {self.bugs}"
        assert self._internal_errors() == 0, f"{where}: a bug was counted"

    def _check_answer(self, seen: Seen, where: str) -> None:
        if seen.whole:
            assert seen.text == self.expected.text or not self.expected.text, f"{where}: it looks whole: {seen}"
        elif seen.status == 200 and seen.ended:
            assert seen.error and not seen.done, f"{where}: it ended without a word: {seen}"
        elif seen.status != 200 and seen.ended:
            assert seen.status in REFUSED and seen.error, f"{where}: {seen}"

    async def _settled(self) -> str:
        """What is left behind; "": nothing."""
        app = self.gateway.app
        work = app[appkeys.SHIPPER].queued + app[appkeys.RECORDER].counting
        if not app[appkeys.PULSE].idle or work or app[appkeys.PULSE].open_exchanges:
            return "work"
        upstream = app[appkeys.UPSTREAM]._pool
        if len(upstream._open) != sum(map(len, upstream._idle.values())):
            return "a connection to the provider"
        if not all(call.finished or call.client_gone_at for call in self._calls):
            return "a call of the provider"
        second = app[appkeys.COPY]
        if app[appkeys.SCRIPT].gone or (second is not None and second._lost.is_set()):
            return "a Redis that is there, and not used"
        if second is not None and (second.rows or second.behind):
            return "a second copy of a row that is in the ledger"
        await app[appkeys.SCRIPT].heard()
        leases = [key async for key in self.redis.scan_iter("aig:limits:leases:*")]
        if leases or app[appkeys.LIMITER]._grants.leases():
            return "a slot"
        return await self._reserved()

    async def _reserved(self) -> str:
        budgets = self.gateway.app[appkeys.BUDGETS]
        if budgets._running or [key async for key in self.redis.scan_iter("aig:hold:*")]:
            return "a reservation"
        key_id = self.key.split("_")[1]
        used = await self.pool.fetchval("select coalesce(sum(prompt_tokens + completion_tokens), 0)::bigint from usage")
        if self.scenario.limits.get("tokens_per_day"):
            spent = (await budgets.spent(f"k:{key_id}")).tokens_day
            return "" if spent == used else f"a budget of which {spent} are spent and {used} are in the ledger"
        return ""

    async def _until(self, left: Callable[[], Any], where: str) -> None:
        deadline = monotonic() + PATIENCE
        while found := await left():
            assert monotonic() < deadline, f"{where} left behind: {found}"
            await asyncio.sleep(0.005)

    def _internal_errors(self) -> float:
        page = self.gateway.app[appkeys.METRICS].render().decode().splitlines()
        return sum(float(line.split()[-1]) for line in page if line.startswith("gateway_internal_errors_total"))


@asynccontextmanager
async def _staged(
    scenario: Scenario, seams: Seams, database_url: str, redis_url: str, redis: Redis
) -> AsyncIterator[Stage]:
    connector = aiohttp.TCPConnector(force_close=True)  # a connection that was just reset is no fault of the next
    async with (
        running_gateway(database_url, redis_url, scenario.environ) as gateway,
        aiohttp.ClientSession(connector=connector) as client,
        asyncpg.create_pool(database_url, min_size=1, max_size=1) as pool,
    ):
        gateway.app[appkeys.SHIPPER]._linger = 0.0
        stage = Stage(scenario, seams, gateway, client, pool, redis)
        stage.key = await gateway.new_key(concurrent_requests=3, **scenario.limits)
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: stage.bugs.append(str(context)))
        stage.expected = await stage.ask()
        assert stage.expected.whole and stage.expected.text, stage.expected
        await stage.check(stage.expected, "a request without faults")
        [row] = await pool.fetch("select * from usage")
        stage.tokens = row["prompt_tokens"], row["completion_tokens"]
        yield stage

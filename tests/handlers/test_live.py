"""`GET /api/live`: what admins see of all workers, once a second; who may, and how it ends."""

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import aiohttp
import pytest

from gateway import appkeys
from gateway.handlers import live
from gateway.handlers.live import Figures, Live, Seen, follow
from gateway.metrics import Metrics
from gateway.protocol.errors import Unavailable
from gateway.stores.tokens import parse_token
from gateway.tally import Snapshot, Tally, end
from tests.support.gateway import Gateway, chat_body, running_gateway
from tests.support.process import new_key, serving

pytestmark = pytest.mark.integration


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty events a second, for tests that wait for some."""
    monkeypatch.setattr(live, "TICK", 0.05)


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


class Watcher:
    """Who reads the events of a response."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def raw(self) -> bytes:
        """The next event; empty at the end."""
        async with asyncio.timeout(20):
            while True:
                try:
                    event = await self.response.content.readuntil(b"\n\n")
                except asyncio.IncompleteReadError as cut:
                    event = cut.partial
                if not event.startswith(b"retry:"):
                    return event

    async def figures(self) -> dict[str, Any]:
        name, data = (await self.raw()).decode().rstrip("\n").split("\n")
        assert (name, data[:6]) == ("event: figures", "data: ")
        told: dict[str, Any] = json.loads(data[6:])
        return told

    async def until(self, true: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        async with asyncio.timeout(30):
            while True:
                if true(told := await self.figures()):
                    return told

    async def to_the_end(self) -> None:
        while await self.raw():
            pass


@asynccontextmanager
async def watching(client: aiohttp.ClientSession, root_url: str, token: str) -> AsyncIterator[Watcher]:
    async with client.get(f"{root_url}/api/live", headers=bearer(token)) as response:
        assert response.status == 200, await response.text()
        yield Watcher(response)


def live_of(gateway: Gateway) -> Live:
    [handler] = {
        route.handler.args[0]
        for route in gateway.app.router.routes()
        if isinstance(route.handler, partial) and route.handler.func is live.watch
    }
    assert isinstance(handler, Live)
    return handler


async def reached(true: Callable[[], object], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.01)


# --- what is told -------------------------------------------------------------------------------------------------


async def test_figures_move_while_a_stream_runs_and_are_those_of_the_table_at_its_end(
    gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    body = chat_body("openai/mock-gpt?tokens=300&pace_ms=10", stream=True)
    async with watching(client, gateway.root_url, gateway.api_key) as watcher:
        assert (await watcher.figures())["totals"]["requests"] == 0
        async with client.post(f"{gateway.base_url}/chat/completions", json=body, headers=gateway.headers) as stream:
            reading = asyncio.create_task(stream.read())
            moving = await watcher.until(lambda told: told["tokens_per_second"]["completion"] > 0)
            assert moving["totals"]["completion_tokens"] > 0
            assert moving["streams_open"] == 1, "who watches is no stream"
            await reading
        assert len(await gateway.rows()) == 1, "who watches is not waited for"
        await watcher.until(lambda told: told["streams_open"] == 0 and told["totals"]["requests"] == 1)
        still = await watcher.until(lambda told: told["requests_per_second"] == 0)
    async with client.get(f"{gateway.root_url}/api/stats", headers=gateway.headers) as response:
        stats = (await response.json())["totals"]
    totals, tokens = still["totals"], gateway.app[appkeys.METRICS].tokens.numbers()
    assert {name: totals[name] for name in EXACT} == {name: stats[name] for name in EXACT}
    assert totals["completion_tokens"] == sum(sum(n) for labels, n in tokens.items() if labels[2] == "completion")
    assert still["tokens_per_second"] == {"prompt": 0.0, "completion": 0.0}


EXACT = ("requests", "prompt_tokens", "completion_tokens", "cost_micros")


async def test_an_event_has_all_that_is_promised_and_nothing_else(
    often: None, gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    for status, body in ((200, chat_body("openai/mock-gpt")), (400, {"model": "openai/mock-gpt"})):
        url = f"{gateway.base_url}/chat/completions"
        async with client.post(url, json=body, headers=gateway.headers) as response:
            assert response.status == status
    async with watching(client, gateway.root_url, gateway.api_key) as watcher:
        told = await watcher.figures()
        assert watcher.response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert watcher.response.headers["Cache-Control"] == "no-store"
        assert watcher.response.headers["X-Accel-Buffering"] == "no"
    assert list(told) == [
        "at", "requests_per_second", "errors_per_second", "tokens_per_second", "totals", "models", "streams_open",
        "usage_queue", "usage_lag_seconds", "journal_bytes", "event_loop_lag_seconds", "resident_bytes",
    ]  # fmt: skip
    assert (told["totals"]["requests"], told["streams_open"], told["errors_per_second"]) == (2, 0, 0)
    assert told["resident_bytes"] > 1 << 20
    [model] = told["models"]  # what was refused before it had a provider is in the totals alone
    assert (model["provider"], model["requests_per_second"], model["completion_tokens_per_second"]) == ("openai", 0, 0)


def counted(uptime: float, **tokens: float) -> Snapshot:
    series: dict[tuple[str, ...], list[float]] = {
        (model, "openai", "completion"): [number] for model, number in tokens.items()
    }
    return Snapshot({"gateway_tokens_total": series}, {"gateway_uptime_seconds": {(): [uptime]}})


def test_speed_goes_by_each_workers_own_clock() -> None:
    """A file that was read twice is no standstill, and the next one no leap."""
    figures = Figures()
    seen = []
    for ours, theirs, tokens in ((10.0, 5.0, 100), (11.0, 6.0, 150), (12.0, 6.0, 150), (13.0, 8.0, 250)):
        rates, totals = figures.look({1: counted(ours, m=ours * 10), 2: counted(theirs, m=tokens)})
        seen.append(rates.get(("m", "openai", "completion")))
        assert totals["m", "openai", "completion"] == ours * 10 + tokens
    assert seen == [None, 60.0, 60.0, 60.0]


def test_a_worker_that_writes_nothing_new_for_long_does_nothing() -> None:
    key = ("m", "openai", "completion")
    seen = follow(Seen(1.0, {key: 10}, {}), 2.0, {key: 30})
    rates = []
    for _ in range(live.STALE):
        rates.append(seen.rates.get(key))
        seen = follow(seen, 2.0, {key: 30})
    assert (rates, seen.rates) == ([20.0] * live.STALE, {})
    assert follow(seen, 12.0, {key: 130}).rates == {key: 10.0}


def test_what_goes_down_and_who_is_new_or_gone_have_no_speed() -> None:
    figures = Figures()
    figures.look({1: counted(10, m=100), 2: counted(10, m=100)})
    rates, _ = figures.look({1: counted(11, m=40), 3: counted(1, m=1000)})
    assert rates == {}
    ended = Snapshot(counted(0, m=500).counts, {}, ended=[2])
    rates, totals = figures.look({0: ended, 1: counted(12, m=40)})
    assert (rates, totals["m", "openai", "completion"]) == ({}, 540)


def test_twenty_models_are_told_busiest_first() -> None:
    figures = Figures()
    names = {f"m{number:02}": 0.0 for number in range(30)}
    figures.look({1: counted(1, **names)})
    busy = {name: float(number) for number, name in enumerate(names)}
    told = live._models(*figures.look({1: counted(2, **busy)}))
    assert [one["model"] for one in told] == [f"m{number:02}" for number in range(29, 9, -1)]
    assert [one["completion_tokens_per_second"] for one in told] == [float(number) for number in range(29, 9, -1)]
    refused = Snapshot({"gateway_requests_total": {("other", "none", "401"): [7.0]}}, {})
    rates, totals = Figures().look({1: refused})
    assert (live._models(rates, totals), totals["other", "none", "errors"]) == ([], 7)


def test_gauges_of_several_workers_are_joined_as_their_metric_says(tmp_path: Path) -> None:
    workers = [Metrics(), Metrics(), Metrics()]
    for number, (metrics, lag) in enumerate(zip(workers, (0.5, 0.25, 0.75), strict=True), 1):
        metrics.tally = Tally(tmp_path, number)
        metrics.streams_open.set(number)
        metrics.event_loop_lag_seconds.set(lag)
        metrics.requests.labels("m", "openai", "200").inc(10)
        metrics.publish()
    end(tmp_path, 3)
    figures = Figures()
    assert figures.event(workers[0]) is None
    event = figures.event(workers[0])
    assert event is not None
    told = json.loads(event.partition(b"data: ")[2])
    assert (told["streams_open"], told["event_loop_lag_seconds"], told["totals"]["requests"]) == (3, 0.5, 30)


# --- what it costs ------------------------------------------------------------------------------------------------


async def test_all_who_watch_are_told_the_same_by_one_task_that_ends_with_the_last(
    often: None, gateway: Gateway, client: aiohttp.ClientSession
) -> None:
    hub, before = live_of(gateway), len(asyncio.all_tasks())
    assert (hub.watchers, hub._task) == (0, None)
    async with watching(client, gateway.root_url, gateway.api_key) as one:
        first = await one.raw()
        task = hub._task
        async with watching(client, gateway.root_url, gateway.api_key) as other:
            theirs = [await other.raw() for _ in range(3)]
            ours = [await one.raw() for _ in range(30)]
            assert hub.watchers == 2
            assert set(theirs) <= {first, *ours}
            assert hub._task is task
        await reached(lambda: hub.watchers == 1)
        assert await one.raw()
    await reached(lambda: hub._task is None)
    assert task is not None
    await reached(task.done)
    await reached(lambda: len(asyncio.all_tasks()) <= before)


def test_an_event_of_thousands_of_series_takes_milliseconds(figure: Callable[[str], None]) -> None:
    metrics, figures = Metrics(providers=["openai"]), Figures()
    for number in range(300):
        for status in ("200", "429", "502"):
            metrics.requests.labels(f"m{number}", "openai", status).inc()
        for kind in ("prompt", "completion", "cached"):
            metrics.tokens.labels(f"m{number}", "openai", kind).inc(number)
    figures.event(metrics)
    times = []
    for _ in range(20):
        started = perf_counter()
        assert figures.event(metrics)
        times.append(1000 * (perf_counter() - started))
    assert min(times) < 50
    size = len(figures.event(metrics) or b"")
    figure(f"live figures of 1,800 series: {min(times):.1f} ms in a thread, {size} bytes, once a second for all")


# --- who may, and for how long ------------------------------------------------------------------------------------


async def test_only_an_admin_watches(gateway: Gateway, client: aiohttp.ClientSession) -> None:
    member = await gateway.app[appkeys.ACCOUNTS].register("ada@example.com", "correct horse", registration="open")
    key = await gateway.app[appkeys.KEYS].create(member.id, "laptop")
    for token, status in ((key.token, 403), ("aig_Key012345678_wrong", 401)):
        async with client.get(f"{gateway.root_url}/api/live", headers=bearer(token)) as response:
            assert response.status == status
    async with client.head(f"{gateway.root_url}/api/live", headers=gateway.headers) as response:
        assert (response.status, response.headers["Cache-Control"]) == (200, "no-store")
    assert live_of(gateway).watchers == 0


async def test_more_than_so_many_watchers_are_told_to_come_again(
    often: None, gateway: Gateway, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_WATCHERS", 2)
    one, two = (watching(client, gateway.root_url, gateway.api_key) for _ in range(2))
    async with one as watcher:
        async with two:
            async with client.get(f"{gateway.root_url}/api/live", headers=gateway.headers) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (503, "live_busy")
                assert response.headers["Retry-After"] == "10"
        await reached(lambda: live_of(gateway).watchers == 1)
        async with watching(client, gateway.root_url, gateway.api_key) as late:
            assert await late.figures()
        assert await watcher.figures()


async def test_a_key_that_is_revoked_watches_no_longer(
    often: None, gateway: Gateway, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "IDENTIFY", 0.2)
    token = await gateway.new_key()
    async with (
        watching(client, gateway.root_url, token) as revoked,
        watching(client, gateway.root_url, gateway.api_key) as other,
    ):
        await revoked.figures()
        parsed = parse_token(token)
        assert parsed is not None
        await gateway.app[appkeys.KEYS].revoke(parsed.id, None)
        await revoked.to_the_end()
        assert await other.figures()
    assert gateway.app[appkeys.METRICS].internal_errors.labels("request").value == 0


async def test_who_watches_an_outage_of_the_database_goes_on(
    often: None, gateway: Gateway, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "IDENTIFY", 0.0)
    asked = []

    async def unavailable(token: str) -> None:
        asked.append(token)
        raise Unavailable("the database cannot be reached")

    async with watching(client, gateway.root_url, gateway.api_key) as watcher:
        monkeypatch.setattr(gateway.app[appkeys.KEYS], "verify", unavailable)
        for _ in range(5):
            assert await watcher.figures()
    assert asked


async def test_who_does_not_read_is_dropped_and_nobody_else_feels_it(
    often: None, gateway: Gateway, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PATIENCE", 0.5)
    large = b"event: figures\ndata: {}\n" + (b":" + b"x" * 1023 + b"\n") * 1024 + b"\n"  # the kernel takes a few MB
    monkeypatch.setattr(Figures, "event", lambda self, metrics: large)
    slow_clients = gateway.app[appkeys.METRICS].slow_clients.labels("read")
    host, _, port = gateway.root_url.rpartition("/")[2].partition(":")
    with socket.create_connection((host, int(port))) as silent:
        silent.setblocking(False)
        head = f"GET /api/live HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.api_key}\r\n\r\n"
        await asyncio.get_running_loop().sock_sendall(silent, head.encode())
        async with client.get(f"{gateway.root_url}/api/live", headers=gateway.headers) as response:
            got = 0
            while not slow_clients.value:
                got += len(await response.content.readany())
                wires = [connection.wire for connection in gateway.app[appkeys.CONNECTIONS]._open]
                assert max(wire.get_write_buffer_size() for wire in wires) < 2 * len(large)
            await reached(lambda: live_of(gateway).watchers == 1)
            assert got > len(large)
            assert await response.content.readany()


async def test_an_event_that_cannot_be_made_is_counted_and_the_next_one_comes(
    often: None, gateway: Gateway, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    bugs = gateway.app[appkeys.METRICS].internal_errors.labels("task")
    async with watching(client, gateway.root_url, gateway.api_key) as watcher:
        await watcher.figures()
        with monkeypatch.context() as patched:
            patched.setattr(Figures, "event", lambda self, metrics: 1 / 0)
            await reached(lambda: bugs.value)
        assert await watcher.figures()


# --- processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_watcher_does_not_hold_up_the_end(
    database_url: str, redis_url: str, client: aiohttp.ClientSession, workers: str
) -> None:
    environ = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "GATEWAY_WORKERS": workers}
    async with serving(environ) as served:
        token = await new_key(served)
        async with watching(client, served.root_url, token) as watcher:
            await watcher.figures()
            started = monotonic()
            stopping = asyncio.create_task(served.terminate())
            await watcher.to_the_end()
            assert await stopping == 0
            assert monotonic() - started < 8, "the drain takes 110 s"


async def test_watchers_of_replaced_workers_are_let_go_and_find_others(
    database_url: str, redis_url: str, client: aiohttp.ClientSession
) -> None:
    environ = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "GATEWAY_WORKERS": "2"}
    async with serving(environ) as served:
        token = await new_key(served)
        async with watching(client, served.root_url, token) as watcher:
            await watcher.figures()
            served.process.send_signal(signal.SIGUSR2)
            await watcher.to_the_end()
        async with asyncio.timeout(30):
            while True:  # as a browser does: the worker that it found may be the next to be replaced
                async with watching(client, served.root_url, token) as watcher:
                    event = await watcher.raw()
                if event:
                    break
        assert event.startswith(b"event: figures\ndata: {")


async def test_every_worker_tells_the_figures_of_all_without_leaps(
    database_url: str, redis_url: str, client: aiohttp.ClientSession, figure: Callable[[str], None]
) -> None:
    environ = {
        "DATABASE_URL": database_url, "REDIS_URL": redis_url, "GATEWAY_WORKERS": "2", "GATEWAY_MOCK": "on"
    }  # fmt: skip
    body = chat_body("mock-gpt?tokens=600&pace_ms=20", stream=True)
    async with serving(environ) as served:
        token = await new_key(served)

        async def stream() -> None:
            connector = aiohttp.TCPConnector(force_close=True)  # connections of its own, to either worker
            async with aiohttp.ClientSession(connector=connector, headers=bearer(token)) as own:
                async with own.post(f"{served.base_url}/chat/completions", json=body) as response:
                    assert response.status == 200, await response.text()
                    await response.read()

        streams = [asyncio.create_task(stream()) for _ in range(8)]
        async with watching(client, served.root_url, token) as watcher:
            await watcher.until(lambda told: told["streams_open"] == 8)
            await watcher.figures()
            first = await watcher.figures()
            events = [await watcher.figures() for _ in range(6)]
        rates = [told["tokens_per_second"]["completion"] for told in events]
        seconds = events[-1]["at"] - first["at"]
        counted = events[-1]["totals"]["completion_tokens"] - first["totals"]["completion_tokens"]
        assert all(rates), rates
        assert sum(rates) / len(rates) == pytest.approx(counted / seconds, rel=0.4)
        assert {told["streams_open"] for told in events} == {8}
        figure(f"live: 8 streams on two workers, tokens a second as told: {', '.join(f'{rate:.0f}' for rate in rates)}")
        await asyncio.gather(*streams)

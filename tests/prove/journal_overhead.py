"""What the journal adds to a request: 200 clients at once, at a steady rate, with and without it.

    python -m tests.prove.journal_overhead [--rates 400,1000] [--seconds 3] [--rounds 3] [--folder DIR] [--http]

A request is `begin`, 5 ms in which the loop does something else, `end`, and `synced`; beside them it takes the loop
CPU seconds, as a request of the gateway does. All ways take turns in one run, so that what else the machine does
meets them alike, and a bare fdatasync of the same disk takes its turn with them: no wait for the disk is shorter.

    off      no journal
    never    it is written, and syncing is left to the kernel
    turn     a request waits for its next turn of the loop, and for no disk
    group    a request waits for the disk, with all others that do, and no longer than a request of the gateway does
    thread   the same where the kernel does not sync by itself, and a thread does

Goal: `group` adds 1 ms at p99, and a begin and an end take 10 µs of CPU without fsync. It holds on a machine whose
cores are free: the wait for the disk is bounded, the wait for a core is not, and `turn` has no other. `--http` runs two
whole gateways, `never` and `group`, too.
"""

import argparse
import asyncio
import os
import random
import tempfile
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from time import perf_counter, process_time, sleep

import aiohttp
import uvloop

from gateway.stores.journal import Journal
from gateway.stores.recorder import DISK
from tests.support.journal_writer import begun
from tests.support.process import new_key, serving

CLIENTS = 200
WORK = 0.005  # seconds until the provider has answered
BUSY = 0.00015  # seconds of CPU that a request takes beside the journal
FIRST = begun()
LAST = replace(FIRST, outcome="ok", status=200, finish_reason="stop", completion_tokens=50)


class _NextTurn(Journal):
    async def synced(self, seconds: float = inf) -> None:
        await asyncio.sleep(0)


WAYS: dict[str, Callable[[Path], Journal | None]] = {
    "off": lambda folder: None,
    "never": lambda folder: Journal(folder, fsync="never"),
    "turn": lambda folder: _NextTurn(folder, fsync="never"),
    "group": lambda folder: Journal(folder, fsync="group"),
    "thread": lambda folder: Journal(folder, fsync="group", fdatasync=os.fdatasync),
}


@dataclass
class Figures:
    """Of all rounds of one way."""

    added: list[float] = field(default_factory=list)  # seconds in the journal's calls, a request each
    whole: list[float] = field(default_factory=list)  # seconds from begin to synced, the work included
    cpu: list[float] = field(default_factory=list)  # seconds a request, one for each round

    def __str__(self) -> str:
        return (
            f"added p50 {_ms(self.added, 0.5)}, p99 {_ms(self.added, 0.99)}; "
            f"whole p50 {_ms(self.whole, 0.5)}, p99 {_ms(self.whole, 0.99)} ms; {min(self.cpu) * 1e6:.0f} µs of CPU"
        )


# --- the journal alone --------------------------------------------------------------------------------------------


async def compare(rate: float, seconds: float, rounds: int, root: Path) -> None:
    figures = {way: Figures() for way in WAYS}
    bare: list[float] = []
    waits: list[float] = []
    for _ in range(rounds):
        for way, make in WAYS.items():
            with tempfile.TemporaryDirectory(dir=root) as folder:
                journal = make(Path(folder))
                await play(journal, rate, seconds, figures[way])
                if journal is not None:
                    journal.close()
        one_by_one, of_any_moment = fdatasyncs(root, seconds)
        bare += one_by_one
        waits += of_any_moment
    for way, measured in figures.items():
        print(f"{rate:5.0f}/s  {way:6} {measured}")
    disk = f"a bare fdatasync p50 {_ms(bare, 0.5)}, p99 {_ms(bare, 0.99)}"
    print(
        f"{rate:5.0f}/s  disk   {disk}; the wait for one p50 {_ms(waits, 0.5)}, p99 {_ms(waits, 0.99)} ms", flush=True
    )


async def play(journal: Journal | None, rate: float, seconds: float, figures: Figures) -> None:
    """CLIENTS clients, each in its own rhythm, `rate` requests a second together."""
    ends = perf_counter() + seconds
    asked = len(figures.added)

    async def client() -> None:
        due = perf_counter() + random.random() * CLIENTS / rate
        while due < ends:
            await asyncio.sleep(due - perf_counter())
            due += CLIENTS / rate
            added, whole = await request(journal)
            figures.added.append(added)
            figures.whole.append(whole)

    before = process_time()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    figures.cpu.append((process_time() - before) / (len(figures.added) - asked))


async def request(journal: Journal | None) -> tuple[float, float]:
    """Seconds that the journal took, and that it took in all."""
    started = perf_counter()
    if journal is not None:
        journal.begin(FIRST)
    begun_at = perf_counter()
    _be_busy(BUSY / 2)
    await asyncio.sleep(WORK)
    _be_busy(BUSY / 2)
    worked = perf_counter()
    if journal is not None:
        journal.end(LAST)
        await journal.synced(DISK)
    ended = perf_counter()
    return begun_at - started + ended - worked, ended - started


def _be_busy(seconds: float) -> None:
    until = perf_counter() + seconds
    while perf_counter() < until:
        pass


def fdatasyncs(root: Path, seconds: float) -> tuple[list[float], list[float]]:
    """How long each takes, of a file that grows by a record between two; and how long he waits who comes at any moment:
    for the rest of the one that runs, and for the next. A disk that stands still is one slow fdatasync, and many who
    wait for it."""
    began: list[float] = []
    ended: list[float] = []
    with tempfile.NamedTemporaryFile(dir=root, buffering=0) as file:
        until = perf_counter() + seconds
        while perf_counter() < until:
            file.write(bytes(600))
            began.append(perf_counter())
            os.fdatasync(file.fileno())
            ended.append(perf_counter())
            sleep(0.001)
    waits = []
    for _ in range(round(seconds * 1000)):
        moment = random.uniform(began[0], began[-1])
        following = bisect_right(began, moment, hi=len(began) - 1)
        rest = max(ended[following - 1] - moment, 0.0)
        waits.append(rest + ended[following] - began[following])
    return [end - begin for begin, end in zip(began, ended, strict=True)], waits


def cpu_of_records(root: Path) -> float:
    """Seconds of CPU of a `begin` and an `end`, the least of some rounds: what else runs can only add to it."""
    found = []
    with tempfile.TemporaryDirectory(dir=root) as folder:
        journal = Journal(Path(folder), fsync="never")
        for _ in range(100):
            before = process_time()
            for _ in range(CLIENTS):
                journal.begin(FIRST)
                journal.end(LAST)
            found.append((process_time() - before) / CLIENTS)
        journal.close()
    return min(found)


# --- whole gateways -----------------------------------------------------------------------------------------------


async def compare_gateways(rate: float, seconds: float, rounds: int, root: Path) -> None:
    """Two processes, each with stores of its own, answered by the mock provider."""
    async with AsyncExitStack() as running:
        calls: dict[str, Callable[[], Awaitable[None]]] = {}
        for policy in ("never", "group"):
            data_dir = running.enter_context(tempfile.TemporaryDirectory(dir=root))
            environ = {
                "GATEWAY_FSYNC": policy,
                "GATEWAY_DATA_DIR": data_dir,
                "GATEWAY_MOCK": "on",
                "LOG_LEVEL": "error",
            }
            served = await running.enter_async_context(serving(environ, coverage=False))
            headers = {"Authorization": f"Bearer {await new_key(served)}"}
            connector = aiohttp.TCPConnector(limit=0)
            client = await running.enter_async_context(aiohttp.ClientSession(headers=headers, connector=connector))
            calls[policy] = _caller(client, f"{served.base_url}/chat/completions")
            await _timed(calls[policy], rate, 1)  # the first calls open connections and verify the key
        found: dict[str, list[float]] = {policy: [] for policy in calls}
        for _ in range(rounds):
            for policy, call in calls.items():
                found[policy] += await _timed(call, rate, seconds)
    for policy, times in found.items():
        print(f"{rate:5.0f}/s  HTTP, {policy}: p50 {_ms(times, 0.5)}, p99 {_ms(times, 0.99)} ms", flush=True)


def _caller(client: aiohttp.ClientSession, url: str) -> Callable[[], Awaitable[None]]:
    body = {"model": "mock-gpt?tokens=3", "messages": [{"role": "user", "content": "Say hello."}]}

    async def call() -> None:
        async with client.post(url, json=body) as response:
            assert response.status == 200, await response.text()
            await response.read()

    return call


async def _timed(call: Callable[[], Awaitable[None]], rate: float, seconds: float) -> list[float]:
    found: list[float] = []
    ends = perf_counter() + seconds

    async def client() -> None:
        due = perf_counter() + random.random() * CLIENTS / rate
        while due < ends:
            await asyncio.sleep(due - perf_counter())
            due += CLIENTS / rate
            started = perf_counter()
            await call()
            found.append(perf_counter() - started)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return found


def _ms(times: Sequence[float], part: float) -> str:
    return f"{sorted(times)[int((len(times) - 1) * part)] * 1000:.2f}"


async def _run(chosen: argparse.Namespace) -> None:
    root = Path(chosen.folder)
    print(f"a begin and an end: {cpu_of_records(root) * 1e6:.1f} µs of CPU")
    for rate in chosen.rates.split(","):
        await compare(float(rate), chosen.seconds, chosen.rounds, root)
    if chosen.http:
        await compare_gateways(200, chosen.seconds, chosen.rounds, root)
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="400,1000", help="requests a second, of all clients together")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk that is measured")
    parser.add_argument("--http", action="store_true")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()

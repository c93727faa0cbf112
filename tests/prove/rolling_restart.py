"""Two gateways behind nginx: restarted one after the other under load, killed, and asked for more than limits allow.

`make prove-restart` runs it at full length. It fails when a client sees an error in a rolling restart, when a stream
is lost, when a row is missing, doubled or wrong, when a limit lets more or fewer pass than it says, or when a slot or a
budget is not what the rows are. Clients retry nothing.
"""

import argparse
import asyncio
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from gateway.embedded import Embedded
from tests.prove.fleet import Fleet, Seen, Traffic, running_fleet, stream
from tests.prove.ledger import Ledger
from tests.prove.soak import Soak

# What may happen to a request while nginx is not told: it is refused, or comes as the process ends. No provider hears of it.
REFUSED = {"503 server_shutting_down", "502 by nginx"}


@dataclass(frozen=True, slots=True)
class Size:
    rounds: int  # restarts of each gateway
    streams: int  # at a time
    answers: int  # whole ones, at a time
    seconds: tuple[float, float]  # of the shortest and the longest stream


FULL = Size(rounds=3, streams=150, answers=10, seconds=(5.0, 30.0))


@dataclass
class Restarts:
    """What clients saw while gateways were restarted."""

    restarts: int
    seconds: float
    streams: int = 0
    lost: int = 0  # streams that had begun and were not whole
    answers: int = 0  # whole ones
    by_node: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)  # requests that got no whole answer, by what they got

    def __str__(self) -> str:
        where = ", ".join(f"{count} at {node}" for node, count in sorted(self.by_node.items()))
        failed = ", ".join(f"{count} got {what}" for what, count in self.failed.items())
        return (
            f"{self.restarts} restarts in {self.seconds:.0f} s under {self.streams} streams and {self.answers} whole "
            f"answers ({where}): {self.lost} streams lost, {self.failed.total()} requests failed{f' ({failed})' * bool(failed)}"
        )


async def restart_all(fleet: Fleet, size: Size, *, announced: bool = True) -> Restarts:
    """Gateway a, then b, `size.rounds` times."""
    traffic = Traffic(fleet, size.streams, size.answers, size.seconds)
    await traffic.flows()
    began = monotonic()
    for _ in range(size.rounds):
        for node in fleet.nodes:
            await fleet.restart(node, announced=announced)
            await asyncio.sleep(1)  # for some of the load to come back to it
    seconds = monotonic() - began
    await traffic.stop()
    return _count(Restarts(size.rounds * len(fleet.nodes), seconds), traffic.seen)


def _count(found: Restarts, seen: Iterable[Seen]) -> Restarts:
    for one in seen:
        is_stream = one.play.kind == "stream"
        found.streams += is_stream
        found.answers += not is_stream
        found.lost += is_stream and one.status == 200 and not one.whole
        found.by_node[one.node or "neither"] += 1
        if one.failed:
            found.failed[one.failed] += 1
    return found


# --- kill -9 ------------------------------------------------------------------------------------------------------


@dataclass
class Crash:
    open_there: int = 0  # streams that the killed one had open
    interrupted: int = 0  # their rows, each `interrupted`
    others: int = 0  # streams that the other one had open
    others_whole: int = 0
    later: int = 0  # requests that were made after the kill
    later_failed: Counter[str] = field(default_factory=Counter)
    passed_on: int = 0  # of them, that nginx had offered to the dead one first

    @property
    def holds(self) -> bool:
        kept = self.others_whole == self.others > 0 and not self.later_failed
        return kept and self.interrupted == self.open_there > 0

    def __str__(self) -> str:
        return (
            f"kill -9 of one: {self.interrupted} rows interrupted of its {self.open_there} open streams, "
            f"{self.others_whole} of the other's {self.others} whole; of {self.later} requests after it "
            f"{self.later_failed.total()} failed, {self.passed_on} were passed on"
        )


async def crash(fleet: Fleet, size: Size) -> Crash:
    """Gateway a dies in the middle, is gone for a while, and comes back."""
    traffic = Traffic(fleet, size.streams, size.answers, size.seconds)
    await traffic.flows()
    await asyncio.sleep(size.seconds[0] / 2)
    dead, other = fleet.nodes
    there, elsewhere = traffic.open_streams(dead.name), traffic.open_streams(other.name)
    await dead.kill()
    since = len(traffic.seen)
    await asyncio.sleep(2.5)  # nginx tries it again, every two seconds
    await dead.start()
    await traffic.stop()
    await fleet.shipped()
    rows = await fleet.pool.fetch("select client_request_id, outcome from usage")
    interrupted = Counter(row["client_request_id"] for row in rows if row["outcome"] == "interrupted")
    later = traffic.seen[since:]
    return Crash(
        open_there=len(there),
        interrupted=sum(interrupted[one.label] == 1 for one in there),
        others=len(elsewhere),
        others_whole=sum(one.whole for one in elsewhere),
        later=len(later),
        later_failed=Counter(one.failed for one in later if one.failed),
        passed_on=sum(one.tries > 1 for one in later),
    )


# --- limits -------------------------------------------------------------------------------------------------------


@dataclass
class Limits:
    """A key of 40 requests a minute, and one of 10 at a time; each asked for four times as much."""

    minute: int = 0
    minute_over_restart: tuple[int, int] = (0, 0)  # before and after one gateway was restarted
    at_once: int = 0
    at_once_over_restart: tuple[int, int] = (0, 0)  # while it drained, and when all had ended

    @property
    def holds(self) -> bool:
        window = self.minute == 40 and self.minute_over_restart == (25, 15)
        return window and self.at_once == 10 and self.at_once_over_restart == (0, 10)

    def __str__(self) -> str:
        before, after = self.minute_over_restart
        drained, ended = self.at_once_over_restart
        return (
            f"40 a minute: {self.minute} of 160 passed, {before} and {after} of 25 and 135 before and after a restart; "
            f"10 at a time: {self.at_once} of 40 streams, {drained} of 40 while one drained, {ended} of 40 afterwards"
        )


async def limits(fleet: Fleet) -> Limits:
    found, quick, held = Limits(), stream(3, 0.001), stream(60, 0.05)
    found.minute = await fleet.count_that_pass(await fleet.new_key(requests_per_minute=40), quick, 160)
    key = await fleet.new_key(requests_per_minute=40)
    slots = await fleet.new_key(concurrent_requests=10)
    before = await fleet.count_that_pass(key, quick, 25)
    holding = asyncio.create_task(fleet.count_that_pass(slots, held, 40))
    await asyncio.sleep(1)
    restarting = asyncio.create_task(fleet.restart(fleet.nodes[0]))
    await asyncio.sleep(0.5)
    drained = await fleet.count_that_pass(slots, quick, 40)
    found.at_once = await holding
    await restarting
    found.minute_over_restart = before, await fleet.count_that_pass(key, quick, 135)
    found.at_once_over_restart = drained, await fleet.count_that_pass(slots, stream(20, 0.05), 40)
    return found


# --- all of it ----------------------------------------------------------------------------------------------------


def balance(ledger: Ledger, soak: Soak) -> str:
    """One line of what the database and Redis have at the end."""
    return (
        f"{ledger.begun} requests at the provider, {ledger.rows} rows: {ledger.begun_missing + ledger.ended_missing} missing, "
        f"{ledger.doubled} doubled, {ledger.wrong + ledger.unpriced} wrong, {ledger.unbalanced} sums out of balance, the audit "
        f"chain {ledger.chain or 'verifies'}; {soak.slots} slots held, the budget {soak.spent - soak.used:+d} tokens off"
    )


def balanced(ledger: Ledger, soak: Soak) -> bool:
    return ledger.holds and not soak.slots and soak.spent == soak.used


@asynccontextmanager
async def _fleet_of_its_own() -> AsyncIterator[Fleet]:
    with tempfile.TemporaryDirectory() as folder:
        stores = Embedded(Path(folder), postgres=True, redis=True)
        await asyncio.to_thread(stores.start)
        try:
            async with running_fleet(stores.database_url, stores.redis_url, Path(folder)) as fleet:
                yield fleet
        finally:
            await asyncio.to_thread(stores.stop)


async def run(size: Size) -> bool:
    """Prints what it finds, and says whether all of it is as it should be."""
    async with _fleet_of_its_own() as fleet:
        rolling = await restart_all(fleet, size)
        print(f"rolling: {rolling}", flush=True)
        unannounced = await restart_all(fleet, Size(1, size.streams, size.answers, size.seconds), announced=False)
        print(f"nginx is not told: {unannounced}", flush=True)
        limited = await limits(fleet)
        print(limited, flush=True)
        crashed = await crash(fleet, size)
        print(crashed, flush=True)
        ledger, soak = await fleet.compare(), await fleet.look_at_limits()
        print(balance(ledger, soak), *ledger.faults, sep="\n  ")
    kept = not (rolling.lost or rolling.failed or unannounced.lost) and unannounced.failed.keys() <= REFUSED
    return kept and limited.holds and crashed.holds and balanced(ledger, soak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--streams", type=int, default=FULL.streams)
    parser.add_argument("--longest", type=float, default=FULL.seconds[1], help="seconds of a stream")
    chosen = parser.parse_args()
    started = monotonic()
    shortest = min(FULL.seconds[0], chosen.longest / 2)
    held = asyncio.run(run(Size(chosen.rounds, chosen.streams, FULL.answers, (shortest, chosen.longest))))
    print(f"{'all of it held' if held else 'NOT held'} ({monotonic() - started:.0f} s)")
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()

"""Kills gateways under load, and stops their Postgres in the middle, again and again; then counts what is there.

`make prove-usage` runs it at full length: two gateways on one database and one data folder, with a Postgres, a Valkey
and a provider that live on, and clients of every kind. It fails when the row of an ended request is missing or wrong,
one of a begun request is missing, one is doubled, a cost is not that of the row's tokens, the sums are not the sums of
the rows, or the audit chain does not verify. After it come the writers of `journal_kills`.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import asyncpg

from gateway.embedded import Embedded
from gateway.stores.segments import take
from tests.prove import journal_kills
from tests.prove.ledger import LEDGER, PRICES, Ledger
from tests.prove.postgres import Postgres, running_postgres
from tests.support.load import Door, Load
from tests.support.process import Served, new_key, serving, until
from tests.support.provider import noting_provider

__all__ = ["LEDGER", "Postgres", "run"]

GATEWAYS = 2  # at a time
CLIENTS = 50
BUSY = 5  # answers of a gateway before it is killed
LONG_LIFE = 0.1  # part of the gateways that live long enough for their streams' ticks
CONFIG = f"""
[providers.nowhere]
base_url = "http://127.0.0.1:9/v1"
needs_key = false
{PRICES}"""


@dataclass
class Stage:
    """What all gateways of a run share, and the doors that clients know them by."""

    environ: Mapping[str, str]
    log: Path  # what the gateways said
    ledger: Ledger
    doors: list[Door] = field(default_factory=lambda: [Door() for _ in range(GATEWAYS)])

    @asynccontextmanager
    async def gateway(self) -> AsyncIterator[Served]:
        async with serving(self.environ, coverage=False, log=self.log) as served:
            yield served

    def folders(self) -> list[Path]:
        """Of journals: those of gateways that live, and those that dead ones left."""
        return [lock.parent for lock in Path(self.environ["GATEWAY_DATA_DIR"]).glob("journal/*/*/lock")]


async def run(data: Path, *, kills: int, stops: int) -> Ledger:
    """Everything it needs is made in `data`."""
    ledger, calls = Ledger(), data / "calls"
    async with (
        running_postgres(data / "postgres") as postgres,
        running_valkey(data / "valkey") as redis_url,
        noting_provider(calls) as provider,
    ):
        stage = Stage(environment(data, postgres.url, redis_url, provider), data / "gateway.log", ledger)
        async with stage.gateway() as first:
            load = Load(stage.doors, await new_key(first), CLIENTS)
        async with asyncio.TaskGroup() as group:
            for door in stage.doors:
                group.create_task(_live_and_die(stage, door, kills))
            group.create_task(_stop_and_start(postgres, ledger, kills, stops))
        await load.stop()
        await _settle(stage)
        async with asyncpg.create_pool(postgres.url, min_size=1, max_size=2) as pool:
            await ledger.compare(pool, load.calls, set(calls.read_text().split()))
        ledger.chain = await verify(stage)
    return ledger


# --- what is killed -----------------------------------------------------------------------------------------------


async def _live_and_die(stage: Stage, door: Door, kills: int) -> None:
    """A gateway after the other behind one door, until there were so many kills at all doors together."""
    while stage.ledger.kills < kills:
        async with stage.gateway() as served:
            door.answers, door.url = 0, served.base_url
            await until(lambda: door.answers > BUSY)
            await asyncio.sleep(6 + random.random() if random.random() < LONG_LIFE else 2 * random.random())
            stage.ledger.kills += 1
            stage.ledger.cut += door.open_calls
            served.process.send_signal(signal.SIGKILL)
            assert await served.process.wait() == -signal.SIGKILL
            door.url = ""
        if random.random() < 0.5:
            _forget_notes(stage)


def _forget_notes(stage: Stage) -> None:
    """As if the dead had been killed between a commit and the note of it: whoever adopts them ships all again."""
    for folder in stage.folders():
        lock = take(folder)
        if lock is not None:
            (folder / "shipped").unlink(missing_ok=True)
            os.close(lock)


async def _stop_and_start(postgres: Postgres, ledger: Ledger, kills: int, stops: int) -> None:
    """Postgres goes at once, in the middle of everything, `stops` times among the kills."""
    while ledger.stops < stops:
        due = (ledger.stops + 1) * kills // (stops + 1)
        await until(lambda due=due: ledger.kills >= due, seconds=3600)  # type: ignore[misc]
        await postgres.stop_at_once()
        ledger.stops += 1
        await asyncio.sleep(2 * random.random())
        await postgres.start()


# --- what lives on ------------------------------------------------------------------------------------------------


def environment(data: Path, database_url: str, redis_url: str, provider: str) -> Mapping[str, str]:
    config = data / "gateway.toml"
    config.write_text(CONFIG)
    return {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "OPENAI_BASE_URL": f"{provider}/v1",
        "OPENAI_API_KEY": "sk-operator-openai",
        "ANTHROPIC_BASE_URL": provider,
        "ANTHROPIC_API_KEY": "sk-operator-anthropic",
        "OLLAMA_BASE_URL": provider,
        "LOG_LEVEL": "error",
        "GATEWAY_MOCK": "off",
        "GATEWAY_CONFIG": str(config),
        "GATEWAY_DATA_DIR": str(data / "gateway"),
        "GATEWAY_FSYNC": "group",
        "GATEWAY_AUDIT_KEY": "the audit key of the kill loop",
    }


@asynccontextmanager
async def running_valkey(data: Path) -> AsyncIterator[str]:
    server = Embedded(data, postgres=False, redis=True)
    await asyncio.to_thread(server.start)
    try:
        yield server.redis_url
    finally:
        await asyncio.to_thread(server.stop)


# --- the end ------------------------------------------------------------------------------------------------------


async def _settle(stage: Stage) -> None:
    """The next start adopts what the dead left; when it ends, no journal is left."""
    async with stage.gateway() as last:
        await until(lambda: len(stage.folders()) == 1)
        assert await last.terminate() == 0
    assert stage.folders() == []


async def verify(stage: Stage) -> str:
    """What `gateway usage verify` says when it finds a fault; "": it finds none."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "usage", "verify",
        env={"PATH": os.environ["PATH"], **stage.environ}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    return said.decode().strip() if process.returncode else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stops", type=int, default=5)
    chosen = parser.parse_args()
    started = monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ledger = asyncio.run(run(Path(folder), kills=chosen.kills, stops=chosen.stops))
        print(f"{ledger}\n({monotonic() - started:.0f} s)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        journals = asyncio.run(journal_kills.run(Path(folder), kills=chosen.kills // 5, stops=1))
        print(journals)
    sys.exit(0 if ledger.holds and journals.holds else 1)


if __name__ == "__main__":
    main()

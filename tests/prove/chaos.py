"""Everything that can break the gateway, and one table of what it promises: `make chaos`.

It runs the test files that show a promise, whose figures begin with its name, and the faults that take long to show:
100 kills, a drain of 110 seconds, readers that stop, and a soak among stores that fail at random. A promise is held when
somebody showed it and nobody found it broken; one that nobody shows counts as broken.
"""

import argparse
import asyncio
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import NamedTuple
from xml.etree import ElementTree

from tests.prove import kill_loop, long_faults, soak
from tests.prove.drain import STREAMS, drain_200
from tests.prove.long_faults import Shown, Stage

ROOT = Path(__file__).parents[2]
WIDTH = 118  # columns of the table
FIGURES = 6  # of each promise, beside those that broke it; those that took long are the last
KILLS, STOPS = (100, 5), (8, 1)  # of gateways and of Postgres: at full length, and quickly


class Promise(NamedTuple):
    name: str
    words: str
    gate: str


PROMISES = (
    Promise("P1", "malformed input: no 5xx, no hang, no call of a provider", "0 of all cases"),
    Promise("P2", "every request ends", "its time-outs + 5 s"),
    Promise("P3", "a stream that broke never looks whole", "100 % of faults in mid-stream"),
    Promise("P4", "a client that leaves takes its provider's connection along", "3 s"),
    Promise("P5", "a client that reads nothing costs little and is dropped", "8 MiB, 30 s; 20 of them 64 MiB"),
    Promise("P6", "no usage row lost, none doubled, the ledger is their sum", "0"),
    Promise("P7", "limits and budgets exact at 4x on two nodes, no slot lost", "the limit; 0"),
    Promise("P8", "a bad key costs next to nothing", "20 µs, no Argon2; others' p95 1 s"),
    Promise("P9", "a revoked key is dead on all nodes", "5 s; 60 s without Redis"),
    Promise("P10", "SIGTERM: not ready at once, no stream cut, nothing lost", "1 s, 0, 120 s, 0"),
    Promise("P11", "a store that stalls is hardly felt", "Redis 100 ms once; Postgres 0, 500 ms"),
    Promise("P12", "all is well again when the fault is gone", "1 s; 5 s with a breaker"),
    Promise("P13", "no secret and no prompt in logs, metrics, errors; no label that a client chose", "0"),
    Promise("P14", "few retries, none after a byte of an answer", "2; 20 % of the active"),
    Promise("P15", "many streams at once, and many abandoned ones", "150; 20 files, 50 MiB, 0 calls"),
)

# The test files, and the promises that are broken when one of their tests fails before it says a figure.
FILES = {
    "tests/test_malformed.py": ("P1",),
    "tests/test_fuzz_chat.py": ("P1",),
    "tests/test_upstream_faults.py": ("P2", "P3", "P4", "P15"),
    "tests/test_leaving.py": ("P4", "P6"),
    "tests/test_pressure.py": ("P5",),
    "tests/test_nth_await.py": ("P3", "P4", "P6", "P7"),
    "tests/test_dependency_faults.py": ("P6", "P7", "P11", "P12"),
    "tests/test_faults.py": ("P11", "P12", "P13"),
    "tests/test_budget_race.py": ("P7",),
    "tests/test_keys_under_attack.py": ("P8",),
    "tests/test_revocation.py": ("P9",),
    "tests/test_drain.py": ("P10",),
    "tests/test_failover.py": ("P12", "P14"),
    "tests/test_secrets.py": ("P13",),
}


# --- the test files -----------------------------------------------------------------------------------------------


def run_tests(report: Path) -> Iterator[Shown]:
    """What the tests show; the file of one that is missing shows that."""
    present = [file for file in FILES if (ROOT / file).exists()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "2",
        "--tb=line",
        "--show-capture=no",
        f"--junitxml={report}",
        *present,
    ]
    subprocess.run(command, cwd=ROOT, check=False)
    for file in FILES.keys() - set(present):
        yield from (Shown(promise, f"{file} is missing", False) for promise in FILES[file])
    if report.exists():
        yield from read_report(report)
    else:
        yield from (Shown(promise.name, "pytest broke off", False) for promise in PROMISES)


def read_report(report: Path) -> Iterator[Shown]:
    """Figures are properties of their tests (tests/conftest.py); pytest writes them with what became of each."""
    for case in ElementTree.parse(report).iter("testcase"):
        failed = case.find("failure") is not None or case.find("error") is not None
        found = [one.get("value", "") for one in case.iter("property") if one.get("name") == "figure"]
        figures = [shown for line in found for shown in _figures(line, held=not failed)]
        yield from figures
        if failed:
            broken = {shown.promise for shown in figures} or _promises_of(case.get("classname", ""))
            yield from (Shown(promise, f"FAILED: {case.get('name')}", False) for promise in broken)


def _figures(line: str, *, held: bool) -> list[Shown]:
    """`P3 P4 words` is a figure of both."""
    names, words = re.match(r"((?:P\d+ )*)(.*)", line.partition("\n")[0], re.DOTALL).groups()  # type: ignore[union-attr]
    return [Shown(name, words, held) for name in names.split()]


def _promises_of(module: str) -> Sequence[str]:
    return FILES.get(module.replace(".", "/") + ".py", ())


# --- what takes long ----------------------------------------------------------------------------------------------

LONG: Sequence[Callable[[Stage], Awaitable[list[Shown]]]] = (
    long_faults.abandoned_streams,
    long_faults.stopped_readers,
    long_faults.revocation,
)


async def run_long(*, quick: bool, minutes: float) -> list[Shown]:
    shown: list[Shown] = []
    with tempfile.TemporaryDirectory() as folder:
        async with long_faults.staged(Path(folder), quick=quick) as stage:
            for scenario in LONG:
                shown += await _guarded(scenario.__name__, scenario(stage))
    shown += await _guarded("drain", _drain(8.0 if quick else 100.0))
    shown += await _guarded("kill_loop", _kill(*(STOPS if quick else KILLS)))
    shown += await _guarded("soak", _soak(minutes))
    return shown


async def _guarded(name: str, scenario: Awaitable[list[Shown]]) -> list[Shown]:
    """A scenario that broke off has shown nothing: that is a fault of every promise that it is about."""
    started = monotonic()
    try:
        shown = await scenario
    except Exception as error:  # whatever it was, the others still run
        words = f"{name} broke off: {type(error).__name__}: {str(error)[:200]}"
        shown = [Shown(promise, words, False) for promise in _ABOUT[name]]
    print(f"{name}: {monotonic() - started:.0f} s", flush=True)
    return shown


_ABOUT = {
    "abandoned_streams": ("P4", "P15"),
    "stopped_readers": ("P5",),
    "revocation": ("P9",),
    "drain": ("P10",),
    "kill_loop": ("P6",),
    "soak": ("P3", "P6", "P7", "P12"),
}


async def _drain(seconds: float) -> list[Shown]:
    found = await drain_200(seconds)
    lost = found.rows != {"ok": STREAMS}
    ended = found.status == 0 and found.gone < 120
    return [
        Shown(
            "P10",
            str(found).removeprefix("P10 "),
            ended and not (found.cut or lost) and found.unready - found.glance <= 1,
        )
    ]


async def _kill(kills: int, stops: int) -> list[Shown]:
    with tempfile.TemporaryDirectory() as folder:
        ledger = await kill_loop.run(Path(folder), kills=kills, stops=stops)
    lost, wrong = ledger.begun_missing + ledger.ended_missing, ledger.wrong + ledger.unpriced
    words = (
        f"{ledger.kills} kill -9, {ledger.stops} stops of Postgres: {ledger.rows} rows, {lost} lost, {ledger.doubled} doubled, "
        f"{wrong} wrong, {ledger.unbalanced} sums out of balance"
    )
    return [Shown("P6", words, ledger.holds)]


async def _soak(minutes: float) -> list[Shown]:
    with tempfile.TemporaryDirectory() as folder:
        soaked = await soak.run(Path(folder), minutes * 60)
    ledger = soaked.ledger
    lost = ledger.begun_missing + ledger.ended_missing
    among = f"{minutes:g} minutes among {soaked.faults} faults of the stores: "
    refused = ", ".join(f"{count} {code}" for code, count in soaked.refused.items())
    calls = f"{soaked.calls} requests, {soaked.refused.total()} refused with 503 ({refused or 'none'})"
    budget = f"{soaked.slots} slots held, the budget {soaked.spent - soaked.used:+d} tokens off its rows"
    return [
        Shown(
            "P3", f"{among}{calls}, {ledger.wrong} answers or rows that were not what was asked for", not ledger.wrong
        ),
        Shown("P6", f"{among}{ledger.rows} rows, {lost} lost, {ledger.doubled} doubled", ledger.holds),
        Shown("P7", among + budget, not soaked.slots and soaked.spent == soaked.used),
        Shown("P12", f"{among}well again {soaked.recovery:.1f} s after the last", soaked.recovery <= 6),
    ]


# --- the table ----------------------------------------------------------------------------------------------------


def verdict(shown: Sequence[Shown]) -> str:
    if not shown:
        return "no figure"
    return "held" if all(one.held for one in shown) else "NOT"


def table(shown: Iterable[Shown], most: int = FIGURES) -> Iterator[str]:
    """A promise, its gate, whether it was held, and below it what was measured: what broke it, and `most` others."""
    shown = list(shown)
    for promise in PROMISES:
        figures = [one for one in shown if one.promise == promise.name]
        yield f"{promise.name:<4}{verdict(figures):<10}{promise.words}  [{promise.gate}]"
        held = [one for one in figures if one.held]
        for figure in [*(one for one in figures if not one.held), *held[-most:]]:
            mark = "  " if figure.held else "! "
            lines = textwrap.wrap(figure.figure, WIDTH - 16) or [""]
            yield from (f"{'':14}{mark if line is lines[0] else '  '}{line}" for line in lines)
        if len(held) > most:
            yield f"{'':16}and {len(held) - most} more"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="everything, for a shorter time")
    parser.add_argument("--all", action="store_true", help="print all figures")
    parser.add_argument("--minutes", type=float, help="of the soak")
    chosen = parser.parse_args()
    minutes = chosen.minutes or (0.5 if chosen.quick else 4.0)
    started = monotonic()
    with tempfile.TemporaryDirectory() as folder:
        shown = list(run_tests(Path(folder) / "report.xml"))
    shown += asyncio.run(run_long(quick=chosen.quick, minutes=minutes))
    verdicts = [verdict([one for one in shown if one.promise == promise.name]) for promise in PROMISES]
    print("\n".join(["", *table(shown, len(shown) if chosen.all else FIGURES), ""]))
    print(f"{verdicts.count('held')} of {len(PROMISES)} promises held ({monotonic() - started:.0f} s)")
    sys.exit(0 if set(verdicts) == {"held"} else 1)


if __name__ == "__main__":
    main()

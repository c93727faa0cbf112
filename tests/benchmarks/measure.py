"""One measurement: the load generator on a subject, as a process of its own."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from tests.benchmarks.processes import cpu_us, rss_mb, used_us
from tests.benchmarks.subjects import Bench, Subject

_SETTLED = 0.01  # of a core
_LOOK = 0.4  # seconds between two looks; longer than anything that is done later is put off
_PATIENCE = 8.0  # seconds
_LONGEST = 120.0  # seconds that the load generator may take beside the time that counts


class MeasurementError(Exception):
    """An answer that was not as it must be: no figure is made of it."""


@dataclass(frozen=True, slots=True)
class Load:
    """Arguments of the load generator, `load.py`; those of a stream are ignored for whole answers."""

    mode: str = "requests"
    dialect: str = "openai"
    connections: int = 64
    seconds: float = 2  # that count
    events: int = 64
    pace: int = 20  # milliseconds
    spread: str = "pace"


def steady(connections: int, seconds: float, dialect: str = "openai", slack: float = 0.6) -> Load:
    """Streams that are all open before the time that counts, and none ends in it: what a chunk costs, and no more.

    `slack`: seconds that it may take to open them, and more; all at 20 ms.
    """
    return Load("streams", dialect, connections, seconds, int((seconds + slack) * 50), 20)


def renewed(connections: int, seconds: float, events: int = 64, pace: int = 20) -> Load:
    """Streams that begin and end evenly over the time: what clients see."""
    return Load("streams", "openai", connections, seconds, events, pace, "stream")


@dataclass(frozen=True, slots=True)
class Measured:
    fields: Mapping[str, Any]  # what the load generator printed
    charged: float  # microseconds of the subject's CPU, until it was idle again; for whole answers alone
    memory: Sequence[tuple[float, float]]  # of the subject: seconds, monotonic, and 2^20 bytes resident

    @property
    def requests(self) -> int:
        return int(self.fields["requests"])

    @property
    def chunks(self) -> int:
        return int(self.fields["chunks"])

    @property
    def rss_mb(self) -> float:
        """The most that was resident, in 2^20 bytes."""
        return max(size for _, size in self.memory)

    @property
    def request_cpu_us(self) -> float:
        """Microseconds for each answer, also those of what is done after it, as shipping its row."""
        return self.charged / float(self.fields["answers"])

    def cpu_us(self, of: str = "subject") -> float:
        """Microseconds in the time that counts, of subject, provider, stores or load."""
        return float(self.fields["cpu_us"][of])

    @property
    def chunk_cpu_us(self) -> float:
        """Microseconds for each chunk: of `steady` streams, where none begins or ends, that is all there is to do."""
        return self.cpu_us() / self.chunks

    def quantile(self, what: str, part: str) -> float:
        """Microseconds; `what` is latency, first, gap or transit, `part` p50, p99 or max. Infinite when an answer was
        wrong, or nothing came in time."""
        return inf if self.fields["errors"] else float(self.fields[f"{what}_us"].get(part, inf))

    @property
    def per_second(self) -> float:
        return self.requests / float(self.fields["seconds"])


def measure(bench: Bench, subject: Subject, load: Load, *, strict: bool = True) -> Measured:
    """Raises MeasurementError when an answer was wrong, but for `strict=False`."""
    before = cpu_us(subject.pids)
    with subprocess.Popen(_command(bench, subject, load), stdout=subprocess.PIPE, text=True) as running:
        memory = _watch_memory(subject, running, load.seconds + _LONGEST)
        assert running.stdout is not None
        printed = running.stdout.read()
    if running.returncode:
        raise MeasurementError(f"{subject.name}, {load}: the load generator failed")
    charged = used_us(before, settled(subject)) if load.mode == "requests" else 0.0
    measured = Measured(json.loads(printed), charged, memory)
    if strict and (measured.fields["errors"] or not measured.fields["answers"]):
        raise MeasurementError(f"{subject.name}, {load}: {printed}")
    return measured


def _command(bench: Bench, subject: Subject, load: Load) -> list[str]:
    arguments = asdict(load)
    command = [sys.executable, "-m", "tests.benchmarks.load", arguments.pop("mode")]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    command += ["--translated"] * subject.translated + ["--port", str(subject.port), "--token", subject.token]
    for header in subject.headers:
        command += ["--header", header]
    for name, pids in (("subject", subject.pids), ("provider", bench.direct.pids), ("stores", bench.store_pids)):
        command += ["--cpu", f"{name}={','.join(map(str, pids))}"]
    return command


def _watch_memory(subject: Subject, running: "subprocess.Popen[str]", seconds: float) -> Sequence[tuple[float, float]]:
    """Until the load ends; one that does not end in time is killed."""
    found = [(time.monotonic(), rss_mb(subject.pids))]
    while running.poll() is None:
        time.sleep(0.1)
        found.append((time.monotonic(), rss_mb(subject.pids)))
        if time.monotonic() > found[0][0] + seconds:
            running.kill()
    return found


def settled(subject: Subject) -> Mapping[int, float]:
    """The CPU of the subject's processes once they use next to none any more, microseconds."""
    deadline = time.monotonic() + _PATIENCE
    used = cpu_us(subject.pids)
    while True:
        time.sleep(_LOOK)
        used, before = cpu_us(subject.pids), used
        if used_us(before, used) < _SETTLED * _LOOK * 1e6 or time.monotonic() > deadline:
            return used

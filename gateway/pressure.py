"""What the machine may run out of: memory, and the event loop's time. (Connections are bounded where they are made.)

Each look at memory has one of four answers. There is enough: nothing is done. It is tight: connections are not kept. It
is short: new requests are told to come again. It is nearly gone: readers that do not read are dropped, for what they
have not taken is held for them.
"""

import asyncio
import logging
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from time import monotonic
from typing import NamedTuple

from gateway.connection import Connections
from gateway.metrics import Metrics
from gateway.pulse import Pulse

log = logging.getLogger("gateway.pressure")

LOOK = 1.0  # seconds between two looks at memory
PROBE = 0.1  # seconds that the event loop is asked to sleep, to see for how long it does
TIGHT, SHORT, NEARLY_GONE = 0.85, 0.90, 0.95  # of the memory that we may have
SLOW = 1.0  # seconds of lag that are logged
STALLED = 10.0  # seconds of lag with which we are no longer live
LAG_WINDOW = 15.0  # seconds; a scrape of any usual interval sees the longest lag in one of the last two


class Pressure:
    """Watches this process and tells the pulse. Opened by app.py, which runs it."""

    def __init__(self, pulse: Pulse, connections: Connections, metrics: Metrics) -> None:
        self._pulse = pulse
        self._connections = connections
        self.memory = Memory()
        self._probed = monotonic()  # when the loop last did what it was asked for, seconds
        self._lag = 0.0  # how late that was, seconds
        self._window = self._probed  # when the newer window of lag began, seconds
        self._longest = self._longest_before = 0.0  # lag in it and in the one before, seconds
        metrics.event_loop_lag_seconds.follow(lambda: max(self._longest, self._longest_before))

    @property
    def stalled(self) -> bool:
        """Whether the event loop is held up so long that somebody should start us anew."""
        return max(self._lag, monotonic() - self._probed - PROBE) > STALLED

    async def run(self) -> None:
        looked = 0.0
        while True:
            self._probed = monotonic()
            await asyncio.sleep(PROBE)
            now = monotonic()
            self.note_lag(now, now - self._probed - PROBE)
            if now - looked >= LOOK:
                looked = now
                self.look()

    def note_lag(self, now: float, lag: float) -> None:
        """The loop was late by so many seconds."""
        if now - self._window >= LAG_WINDOW:
            self._window, self._longest_before, self._longest = now, self._longest, 0.0
        self._lag = lag
        self._longest = max(self._longest, lag)
        if lag > SLOW:
            log.warning("the event loop was held up for %.1f s", lag)

    def look(self) -> None:
        """At memory, and do what its answer asks for."""
        used = self.memory.used()
        pulse = self._pulse
        if pulse.overloaded != (used >= SHORT):
            log.warning(
                "%d %% of memory is in use: new requests are %s", used * 100, "refused" if used >= SHORT else "served"
            )
        pulse.tight, pulse.overloaded = used >= TIGHT, used >= SHORT
        if used >= NEARLY_GONE and (dropped := self._connections.drop_slowest()):
            log.warning("%d %% of memory is in use: %d clients that do not read were dropped", used * 100, dropped)


# --- memory -------------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """The files of a version of cgroups."""

    limit: str
    current: str
    cache: str  # the field of memory.stat with what the kernel takes back by itself


# https://docs.kernel.org/admin-guide/cgroup-v2.html and https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
_V2 = _Kind("memory.max", "memory.current", "inactive_file")
_V1 = _Kind("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


class Memory:
    """How much is in use of the memory that this process may have; `root` is the folder with `proc` and `sys`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._proc = root / "proc"
        self._total = self._machine().get("MemTotal:", 0) << 10  # bytes; 0: nobody says
        self._groups = list(_groups(root / "sys/fs/cgroup", _read(self._proc / "self/cgroup")))

    def used(self) -> float:
        """From 0 to 1: of the tightest group's limit, else of what the machine has for us. 0 where nobody says."""
        shares = [share for folder, kind in self._groups if (share := _share(folder, kind, self._total)) is not None]
        return max(shares) if shares else self._of_machine()

    def _machine(self) -> dict[str, int]:
        """KiB by name, proc_meminfo(5)."""
        return _fields(_read(self._proc / "meminfo"))

    def _of_machine(self) -> float:
        """Our part of what is ours or free: refusing requests would not help against another's hunger."""
        available = self._machine().get("MemAvailable:", 0) << 10
        pages = _read(self._proc / "self/statm").split()
        if not available or len(pages) < 2:
            return 0.0
        ours = int(pages[1]) * os.sysconf("SC_PAGE_SIZE")
        return ours / (ours + available)


def _groups(mounted: Path, membership: str) -> Iterator[tuple[Path, _Kind]]:
    """Folders of the groups that we are in and of those around them: in a container some are not to be seen."""
    for line in membership.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers not in ("", "memory"):
            continue
        kind, top = (_V1, mounted / "memory") if controllers else (_V2, mounted)
        own = PurePosixPath(path.lstrip("/"))
        for part in (own, *own.parents):
            folder = top / part
            if (folder / kind.limit).exists():
                yield folder, kind


def _share(folder: Path, kind: _Kind, total: int) -> float | None:
    """None: this group has no limit, or one above the machine's own."""
    limit, current = _read(folder / kind.limit).strip(), _read(folder / kind.current).strip()
    if not limit.isdecimal() or not current.isdecimal() or not 0 < int(limit) < (total or 1 << 60):
        return None
    used = int(current)
    if used >= TIGHT * int(limit):  # the file below takes the kernel a while to write
        used -= _fields(_read(folder / "memory.stat")).get(kind.cache, 0)
    return used / int(limit)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # another system, or a group that is gone
        return ""


def _fields(text: str) -> dict[str, int]:
    """The number of each line that has a name and one."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) >= 2 and pair[1].isdecimal()}

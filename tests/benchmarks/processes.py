"""What processes cost, from /proc: CPU and memory of whole trees (https://docs.kernel.org/filesystems/proc.html)."""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

_TICK = 1e6 / os.sysconf("SC_CLK_TCK")  # microseconds
_PAGE = os.sysconf("SC_PAGE_SIZE")  # bytes


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                children.setdefault(int(_stat(int(folder.name))[1]), []).append(int(folder.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def cpu_us(pids: Iterable[int]) -> dict[int, float]:
    """Microseconds of CPU, user and system, that each has used since it was started; without those that are gone."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            found[pid] = _cpu_us(pid)
    return found


def used_us(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """Microseconds between two looks, of those that were there at both."""
    return sum(after[pid] - before[pid] for pid in after if pid in before)


def rss_mb(pids: Iterable[int]) -> float:
    """Resident memory of those that are there, in 2^20 bytes. What several of them share is counted in each."""
    pages = 0
    for pid in pids:
        with suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * _PAGE / (1 << 20)


def _cpu_us(pid: int) -> float:
    """In nanoseconds where the kernel keeps them, a thread at a time; else in ticks of 10 ms."""
    try:
        folders = list(Path(f"/proc/{pid}/task").iterdir())
        return sum(int((folder / "schedstat").read_text().split()[0]) for folder in folders) / 1000
    except FileNotFoundError:
        fields = _stat(pid)
        return (int(fields[11]) + int(fields[12])) * _TICK


def _stat(pid: int) -> list[str]:
    """Of proc(5)'s /proc/PID/stat what follows the program's name, which may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()

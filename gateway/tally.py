"""The numbers of several workers, added up: each keeps its own in a file, and whoever is asked reads the others'.

Rule 1: a file is written whole beside its name and renamed, so it is never read half.
Rule 2: what a worker has shown is in its file first. Whoever is asked next adds up at least as much: a sum of counters
never goes down, whichever worker a scrape meets.
Rule 3: what only goes up outlives its worker: the supervisor adds it to the file `ended`, which names whom it holds.
That file is read last, and who is in it is not counted twice.
Rule 4: a worker that was killed takes with it what it counted since its last file, a second at most.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock

import msgspec

EVERY = 1.0  # seconds between two files of a worker
_ENDED = "ended"

# By a metric's name and its label values; several numbers of a histogram, one of all others.
Numbers = dict[str, dict[tuple[str, ...], list[float]]]


class Snapshot(msgspec.Struct):
    """`counts` only go up, `gauges` are of this moment. `ended`: the workers whose counts these are."""

    counts: Numbers
    gauges: Numbers
    ended: list[int] = []


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Snapshot)


class Tally:
    """One worker's share in a folder of all workers' files. Any thread may call it."""

    def __init__(self, folder: Path, worker: int) -> None:
        self._folder = folder
        self.worker = worker
        self._lock = Lock()  # a file is never followed by an older one

    def publish(self, take: Callable[[], Snapshot]) -> Snapshot:
        """What `take` gives, once others can read it. Raises OSError."""
        with self._lock:
            snapshot = take()
            _write(self._folder, str(self.worker), snapshot)
            return snapshot

    def others(self) -> Mapping[int, Snapshot]:
        """By worker; those that ended together as 0, which is nobody's number. Empty while nothing can be read."""
        try:
            found = read_all(self._folder)
        except OSError:
            return {}
        found.pop(self.worker, None)
        return found


def read_all(folder: Path) -> dict[int, Snapshot]:
    # By the stem: a file that is being replaced may be seen under its other name alone.
    numbers = {int(path.stem) for path in folder.iterdir() if path.stem.isdigit()}
    found = {number: snapshot for number in sorted(numbers) if (snapshot := _read(folder, str(number))) is not None}
    ended = _read(folder, _ENDED)
    if ended is not None:
        found = {0: ended, **{number: found[number] for number in found if number not in ended.ended}}
    return found


def end(folder: Path, worker: int) -> None:
    """For the supervisor alone, once the worker is gone. Raises OSError."""
    last = _read(folder, str(worker))
    if last is None:
        return
    ended = _read(folder, _ENDED) or Snapshot({}, {})
    _add(ended.counts, last.counts)
    ended.ended.append(worker)
    _write(folder, _ENDED, ended)
    (folder / str(worker)).unlink()


def _add(sums: Numbers, counts: Numbers) -> None:
    for name, series in counts.items():
        known = sums.setdefault(name, {})
        for labels, numbers in series.items():
            before = known.get(labels, ())
            # Of another length they are a histogram's whose buckets a new version changed: it begins anew.
            alike = len(before) == len(numbers)
            known[labels] = [a + b for a, b in zip(before, numbers, strict=True)] if alike else numbers


def _write(folder: Path, name: str, snapshot: Snapshot) -> None:
    beside = folder / f"{name}.new"
    beside.write_bytes(_encode(snapshot))
    beside.replace(folder / name)


def _read(folder: Path, name: str) -> Snapshot | None:
    with suppress(FileNotFoundError, msgspec.MsgspecError):  # its worker ended meanwhile, or is of another version
        return _decoder.decode((folder / name).read_bytes())
    return None

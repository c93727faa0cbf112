"""A process's journal as it lies on disk, and how it is read: by the process itself, or by another after its death.

A folder a process, named by a UUIDv7; in it

    lock        held (flock) by the process that writes here, and later by the one that reads what it left
    00000001    segments: whole records, a heading first
    shipped     segment and byte up to which all is in the database; what is behind it may be there, too
    reserve     room for the last records of a disk that is full

Rule 1: nobody reads a folder whose lock another has. A running exchange would be taken for one that died.
Rule 2: a segment is removed when all of it is shipped, and no exchange is open whose last words are in it.
Rule 3: reading changes nothing. `Tail.advance` does, when what was read is safe.
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import sleep
from typing import NamedTuple

from gateway.exchange import new_id
from gateway.stores import records
from gateway.stores.ledger import Given, Row
from gateway.stores.records import Begin, Record, Tick
from gateway.stores.usage import UsageRow

CHUNK = 1 << 20  # bytes read at once; one record is never longer than 32 KiB
SAMPLE = 1 << 15  # bytes that are kept of a damaged line
# Records that are read in one go, and seconds until the next: they are read in a thread, and it keeps the interpreter
# from the event loop.
SLICE, PAUSE = 250, 0.0002

_NAME = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Position(NamedTuple):
    segment: int
    offset: int  # bytes


# --- folders ------------------------------------------------------------------------------------------------------


def claim(root: Path) -> tuple[Path, int]:
    """A new folder of our own, and the file descriptor of its lock."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    while True:
        folder = root / new_id()
        folder.mkdir(mode=0o700)
        lock = take(folder)
        if lock is not None:
            return folder, lock
        # A sibling looked for abandoned folders between our two steps. It finds this one empty and removes it.


def take(folder: Path) -> int | None:
    """The descriptor of a folder's lock; None when another has it, or the folder is gone."""
    path = folder / "lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it until now may have removed it with the folder.
        if os.fstat(lock).st_ino == path.stat().st_ino:
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(lock)
        raise
    os.close(lock)
    return None


def abandoned(root: Path) -> list["Tail"]:
    """The folders of processes that are gone, from now on ours."""
    found = []
    for folder in sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name)):
        with suppress(OSError):  # of another user, or of a file system that is going: none of ours
            lock = take(folder)
            if lock is not None:
                found.append(Tail(folder, lock))
    return found


def remove(folder: Path) -> None:
    """A folder whose lock the caller has."""
    for path in folder.iterdir():
        if path.name != "lock":
            path.unlink()
    (folder / "lock").unlink()  # last: as long as it is there the folder is ours
    with suppress(OSError):  # a sibling looks into it, and will find it empty
        folder.rmdir()


def segments_of(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def path_of(folder: Path, segment: int) -> Path:
    return folder / f"{segment:08d}"


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Batch:
    """Records that follow each other in one segment."""

    segment: int
    records: list[Record]
    rows: list[Row]  # the ends among them
    damaged: list[bytes]  # lines that are no records
    end: Position


@dataclass(slots=True)
class _Open:
    """An exchange that began and has not ended."""

    begin: Begin
    begun: int  # segment
    tick: Tick | None = None  # the last
    ticked: int = 0  # its segment

    def interrupted(self) -> UsageRow:
        """The row by the last that was heard of it. Raises Unreadable."""
        row = replace(self.begin.row, outcome="interrupted")
        if self.tick is None:
            return replace(row, latency_ms=0)  # how long it ran nobody knows
        return replace(
            row,
            prompt_tokens=self.tick.prompt_tokens,
            completion_tokens=self.tick.completion_tokens,
            latency_ms=self.tick.latency_ms,
        )


class Tail:
    """Reads one folder from its first byte to its last. Whoever makes it owns `lock`, until `remove` or `release`."""

    def __init__(self, folder: Path, lock: int | None = None) -> None:
        self.folder = folder
        self.position = Position(0, 0)
        self._lock = lock  # None: the process's own folder, whose journal has it
        self._shipped = _read_shipped(folder)
        self._open: dict[str, _Open] = {}  # written by `advance` alone

    def read(self, rows: int, bound: Position | None = None) -> Batch | None:
        """The next records, at most `rows` ends among them; None: there are no more.

        `bound` is where the living process that writes here stands. A dead one's folder is read to its end.
        """
        for segment, offset, size in self._unread(bound):
            data = _read_at(path_of(self.folder, segment), offset, min(size - offset, CHUNK))
            if b"\n" in data:
                return self._batch(segment, offset, data, rows)
            if len(data) == CHUNK:  # no record is that long
                return Batch(segment, [], [], [data[:SAMPLE]], Position(segment, offset + CHUNK))
            # Nothing, or a record that its process could not complete: nobody was told of it.
        return None

    def _unread(self, bound: Position | None) -> Iterator[tuple[int, int, int]]:
        """Segment, offset and size of what was not read yet, in order."""
        for segment in segments_of(self.folder):
            if segment < self.position.segment or (bound and segment > bound.segment):
                continue
            offset = self.position.offset if segment == self.position.segment else 0
            size = bound.offset if bound and segment == bound.segment else path_of(self.folder, segment).stat().st_size
            # What is shipped and what is not are never in one batch.
            if segment == self._shipped.segment and offset < self._shipped.offset < size:
                size = self._shipped.offset
            yield segment, offset, size

    def _batch(self, segment: int, offset: int, data: bytes, rows: int) -> Batch:
        batch = Batch(segment, [], [], [], Position(segment, offset))
        columns = records.columns_of(_first_line(path_of(self.folder, segment)))
        start = 0
        while len(batch.rows) < rows and (stop := data.find(b"\n", start)) >= 0:
            line, start = data[start:stop], stop + 1
            try:
                record = records.read(line, columns)
            except records.Unreadable:
                batch.damaged.append(line[:SAMPLE])
                continue
            if record is None:
                continue
            batch.records.append(record)
            if isinstance(record, Given):
                batch.rows.append(record)
            if len(batch.records) % SLICE == 0:
                sleep(PAUSE)
        if batch.end < self._shipped:
            batch.rows, batch.damaged = [], []  # read for what is open alone
        batch.end = Position(segment, offset + start)
        return batch

    def advance(self, batch: Batch) -> None:
        """What is in the batch is in the database."""
        for record in batch.records:
            if isinstance(record, Begin):
                self._open[record.request_id] = _Open(record, batch.segment)
            elif isinstance(record, Tick):
                running = self._open.get(record.request_id)
                if running is not None:
                    running.tick, running.ticked = record, batch.segment
            else:
                self._open.pop(record.request_id, None)
        self.move_to(batch.end)

    def move_to(self, position: Position) -> None:
        """All before it is in the database."""
        self.position = max(self.position, position)
        if self.position > self._shipped:
            self._shipped = self.position
            with suppress(
                OSError
            ):  # the disk is full, and shipping is what makes room; without it some is shipped twice
                _write_shipped(self.folder, self._shipped)

    def forget(self, request_id: str) -> None:
        """It ended, although its end could not be written."""
        self._open.pop(request_id, None)

    # --- what is left behind

    def interrupted(self) -> Batch:
        """Rows of the exchanges that began and never ended. Their process must be dead, and all of the folder read."""
        batch = Batch(self.position.segment, [], [], [], self.position)
        for exchange in self._open.values():
            try:
                batch.rows.append(exchange.interrupted())
            except records.Unreadable:
                batch.damaged.append(repr(exchange.begin).encode()[:SAMPLE])
        return batch

    @property
    def idle(self) -> bool:
        """No exchange is open."""
        return not self._open

    def finished(self) -> list[Path]:
        """Segments that nobody needs any more."""
        needed = {segment for exchange in self._open.values() for segment in (exchange.begun, exchange.ticked)}
        return [
            path_of(self.folder, segment)
            for segment in segments_of(self.folder)
            if segment < self.position.segment and segment not in needed
        ]

    def remove(self) -> None:
        """The folder of a dead process, when all of it is in the database."""
        remove(self.folder)
        self.release()

    def release(self) -> None:
        """Leave the folder to the next one who looks for abandoned ones."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def bytes_in(folder: Path) -> int:
    return sum(path_of(folder, segment).stat().st_size for segment in segments_of(folder))


def _read_at(path: Path, offset: int, size: int) -> bytes:
    if size <= 0:
        return b""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.pread(file, size, offset)
    finally:
        os.close(file)


def _first_line(path: Path) -> bytes:
    return _read_at(path, 0, 4096).partition(b"\n")[0]


def _read_shipped(folder: Path) -> Position:
    """From the beginning, when the file is not there or broken: what is shipped twice is counted once."""
    with suppress(FileNotFoundError, ValueError):
        segment, offset, end = (folder / "shipped").read_text().split(" ")
        if end == "\n":
            return Position(int(segment), int(offset))
    return Position(0, 0)


def _write_shipped(folder: Path, position: Position) -> None:
    """In place: one write(2) of always the same length. To replace the file takes some disks ten milliseconds."""
    file = os.open(folder / "shipped", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.write(file, b"%010d %020d \n" % position)
    finally:
        os.close(file)

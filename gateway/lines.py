"""Lines on their way to stderr: a thread writes them, many at once, so that no request waits for who reads them.

It also makes those that are given as what makes them: one made between two requests costs several times what it does
after another.

What a kill -9 may take is the lines of the last LINGER seconds; usage rows do not come this way. What nobody reads (a
pipe that is full) is kept up to MAX_WAITING, and what comes then is counted and told of when there is room again.
"""

import asyncio
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from queue import Empty, SimpleQueue
from typing import TextIO

LINGER = 0.05  # seconds that a line may wait for others to share its write(2)
ENOUGH = 1 << 16  # characters that wait no longer: what a pipe holds (pipe(7))
MAX_WAITING = 8 << 20  # characters
PATIENCE = 1.0  # seconds that `flush` waits for a reader

Line = str | Callable[[], str]
_NOT_MADE = 1 << 10  # characters that one counts for until it is made: what it is made of takes about as much


class _Ring(Enum):
    LINE = auto()  # there is one, which may wait for others
    HURRY = auto()
    END = auto()


class LineWriter:
    """Writes to `stream`, whose owner closes it. Whoever adds lines keeps others from doing so at the same time.

    `dropped(count)` is the line that says that so many were left out. The thread starts with the first line; after
    `close` a line is written at once.
    """

    def __init__(self, stream: TextIO, dropped: Callable[[int], str]) -> None:
        self._stream = stream
        self._file = _descriptor(stream)
        self._dropped_line = dropped
        self._lines: deque[Line | threading.Event] = deque()
        # Characters and lines, ever. Each has one writer, so none needs a lock: a finaliser may log while one is held.
        self._added = 0
        self._taken = 0
        self._dropped = 0
        self._told = 0  # how many of the dropped ones
        self._bell: SimpleQueue[_Ring] = SimpleQueue()
        self._rung = False
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, line: Line, *, hurry: bool = False) -> None:
        """`hurry`: it does not wait for others. Without an event loop it is written when this returns."""
        if self._closed:
            self._write(_made(line) + "\n")
            return
        waiting = self._added - self._taken
        if waiting > MAX_WAITING:
            self._dropped += 1
            return
        self._lines.append(line)
        self._added += _size(line)
        if hurry or waiting > ENOUGH:
            self._ring(_Ring.HURRY)
        elif not self._rung:
            self._ring(_Ring.LINE)
        if asyncio._get_running_loop() is None and threading.current_thread() is threading.main_thread():
            self.flush()

    def flush(self) -> None:
        """Returns when all that was added is written, or after PATIENCE."""
        if self._closed or self._thread is None:
            return
        written = threading.Event()
        self._lines.append(written)
        self._ring(_Ring.HURRY)
        written.wait(PATIENCE)

    def close(self) -> None:
        """The thread ends when it has written all; nobody waits for it but in `flush`."""
        self._closed = True
        self._bell.put(_Ring.END)

    def _ring(self, ring: "_Ring") -> None:
        self._rung = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the machine has no more threads, or the interpreter ends
                self._closed = True
                self._write_all()
        self._bell.put(ring)

    # --- in the thread

    def _run(self) -> None:
        ring = _Ring.LINE
        while ring is not _Ring.END:
            ring = self._bell.get()
            if ring is _Ring.LINE:
                with suppress(Empty):
                    ring = self._bell.get(timeout=LINGER)
            self._rung = False  # before we look: a line that comes from now on rings again
            self._write_all()

    def _write_all(self) -> None:
        while self._lines:
            batch: list[str] = []
            size, written = 0, None
            while self._lines and size < ENOUGH and written is None:
                line = self._lines.popleft()
                if isinstance(line, threading.Event):
                    written = line
                else:
                    batch.append(_made(line))
                    size += _size(line)
            if batch:
                self._write("\n".join(batch) + "\n")
                self._taken += size
            if self._dropped > self._told and not self._lines:
                dropped, self._told = self._dropped - self._told, self._dropped
                self._write(self._dropped_line(dropped) + "\n")
            if written is not None:
                written.set()

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # stderr is closed, or its reader is gone
            if self._file is None:
                self._stream.write(text)
                self._stream.flush()
                return
            # Not by way of the stream: who blocks in it holds its lock, and the interpreter asks for that at its end.
            left = text.encode(self._stream.encoding, "backslashreplace")
            while left:
                left = left[self._write_some(self._file, left) :]

    def _write_some(self, file: int, data: bytes) -> int:
        try:
            return os.write(file, data)
        except BlockingIOError:  # somebody who shares it has set O_NONBLOCK
            select.select([], [file], [], PATIENCE)
            return 0


def _size(line: Line) -> int:
    return len(line) + 1 if isinstance(line, str) else _NOT_MADE


def _made(line: Line) -> str:
    """Never raises: it would end the thread."""
    if isinstance(line, str):
        return line
    try:
        return line()
    except Exception as error:
        return f"a log line cannot be made: {type(error).__name__}"


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None  # a stream of a test, or a closed one

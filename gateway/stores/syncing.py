"""Waiting for the disk: the thread that does what the kernel does not do by itself (`stores/kernel_sync.py`), and the
answers that wait for it, each no longer than it wants to.

Every answer pays for this, so it is made of less than asyncio has for it: a call of `run_in_executor` and an
`asyncio.wait` of each who waits took 150 µs of CPU a sync, and the timers of event loops count whole milliseconds.
"""

import asyncio
import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import ceil, inf
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from time import monotonic

FDATASYNC: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync

_LIBC = ctypes.CDLL(None)
_CLOCK_MONOTONIC = 1

_Job = Callable[[], None]


class SyncThread:
    """Does what blocks, one thing after the other. It starts with the first of them and ends with `shutdown`."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread: Thread | None = None

    def start(self, work: Callable[[], None], done: Callable[[OSError | None], None]) -> None:
        """`work` in the thread; then `done` in the loop that runs now, with what `work` raised."""
        if self._thread is None:
            self._thread = Thread(target=self._run, name="journal", daemon=True)
            self._thread.start()
        self._jobs.put(partial(_do, work, done, asyncio.get_running_loop()))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def shutdown(self) -> None:
        """Returns when all that was started is done."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None


def _do(work: Callable[[], None], done: Callable[[OSError | None], None], loop: asyncio.AbstractEventLoop) -> None:
    error = None
    try:
        work()
    except OSError as raised:
        error = raised
    except Exception as raised:  # it must not end the thread: nobody would be told of the disk any more
        error = OSError(f"{type(raised).__name__}: {raised}")
    with suppress(RuntimeError):  # the loop is closed: nobody is left to hear of it
        loop.call_soon_threadsafe(done, error)


class Waiting:
    """Those who wait until so many records are on disk. `close` when nobody does any more."""

    def __init__(self) -> None:
        # Records that must be there, how long that is waited for (seconds, monotonic), and what is waited on.
        self._waiting: list[tuple[int, float, asyncio.Future[None]]] = []
        self._on_disk = 0  # records
        self._alarm: Alarm | None = None
        self._alarm_at = inf  # seconds, monotonic

    async def wait(self, records: int, seconds: float) -> None:
        """Returns when `reached` told of so many, or after so many seconds."""
        released = asyncio.get_running_loop().create_future()
        until = monotonic() + seconds
        self._waiting.append((records, until, released))
        if until < self._alarm_at:
            self._set_alarm(until, seconds)
        await released

    def reached(self, records: int) -> None:
        """So many are on disk."""
        self._on_disk = records
        self._release()

    def _release(self) -> None:
        now, first = monotonic(), inf
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            records, until, released = one
            if records > self._on_disk and until > now:
                self._waiting.append(one)
                first = min(first, until)
            elif not released.done():  # it may have been cancelled
                released.set_result(None)
        if first != self._alarm_at:
            self._set_alarm(first, first - now)

    def _ring(self) -> None:
        self._alarm_at = inf
        self._release()

    def _set_alarm(self, at: float, seconds: float) -> None:
        self._alarm_at = at
        if self._alarm is None:
            self._alarm = Alarm(self._ring)
        self._alarm.set(0 if at == inf else max(seconds, 1e-6))

    def close(self) -> None:
        if self._alarm is not None:
            self._alarm.close()
            self._alarm = None


class Alarm:
    """Rings in the event loop, to the microsecond: by timerfd_create(2), which Python has from 3.13 on.

    Where there is none it is the loop's own timer, and a millisecond the least.
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._file = -1
        if hasattr(_LIBC, "timerfd_create"):
            self._file = _LIBC.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file >= 0:
            self._loop.add_reader(self._file, self._rung)

    def set(self, seconds: float) -> None:
        """Once, after so many seconds and not when it was set to before; 0: not at all."""
        if self._file >= 0:
            # struct itimerspec: every 0 s and 0 ns, first after these.
            at = divmod(ceil(seconds * 1e9), 10**9)
            _LIBC.timerfd_settime(self._file, 0, (ctypes.c_long * 4)(0, 0, *at), None)
            return
        if self._timer is not None:
            self._timer.cancel()
        due = monotonic() + seconds
        self._timer = self._loop.call_later(max(seconds, 0.001), self._look, due) if seconds else None

    def _look(self, due: float) -> None:
        """The loop counts whole milliseconds: it may be early by a part of one."""
        left = due - monotonic()
        if left > 0:
            self.set(left)
        else:
            self._ring()

    def _rung(self) -> None:
        with suppress(BlockingIOError):  # it was set again before we came to hear it
            os.read(self._file, 8)
            self._ring()

    def close(self) -> None:
        self.set(0)
        if self._file >= 0:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._file)
            os.close(self._file)
            self._file = -1


def sync_folder(folder: Path) -> None:
    """A file survives a power cut only with its folder's entry."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

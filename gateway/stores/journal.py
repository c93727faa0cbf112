"""The usage journal: what a request will cost is on disk before its provider is called, and what it cost before its
client has the last byte. A killed process loses none of it; `stores/shipper.py` brings it to Postgres.

Rule 1: `begin` may refuse, and then the provider must not be called. `end` and `tick` never do; what no provider was
called for takes no room from them.
Rule 2: a record is one write(2), so a killed process leaves it to the kernel whole or not at all. What a power cut
leaves is decided by `fsync` (https://man7.org/linux/man-pages/man2/fdatasync.2.html).
Rule 3: everything here runs on the event loop; only the syncing has a thread.
"""

import asyncio
import errno
import logging
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import inf
from pathlib import Path
from time import monotonic
from typing import Literal

from gateway.protocol.errors import Unavailable
from gateway.stores import records
from gateway.stores.kernel_sync import KernelSync
from gateway.stores.segments import Position, claim, path_of, remove, segments_of
from gateway.stores.syncing import FDATASYNC, SyncThread, Waiting, sync_folder
from gateway.stores.usage import UsageRow

log = logging.getLogger("gateway.stores.journal")

Fsync = Literal["group", "always", "never"]

ROOM = 1024  # bytes kept free below the cap for the end of each open exchange; a usual one takes 350
RESERVE = 1 << 19  # bytes kept on disk for the same when the disk is full: 1,500 ends
MAX_UNWRITTEN = 100_000  # rows in memory when not even the reserve was enough; about 100 MB
LOGGED_EVERY = 60.0  # seconds between two words about the same trouble


class JournalFull(Unavailable):
    """No room for another exchange. The provider must not be called."""

    code = "usage_log_full"


class Journal:
    """One process's journal. `close` after the shipper's; what is not shipped then waits for the next start.

    `fsync`: "group" syncs for all who wait in `synced` at once, as fast as the disk returns; "always" makes `begin` and
    `end` wait for the disk themselves, and with them every other request; "never" leaves it to the kernel, which is
    enough for a killed process and not for a power cut. `fdatasync`: called instead of the kernel's, in a thread.
    """

    def __init__(
        self,
        root: Path,
        *,
        fsync: Fsync = "group",
        max_bytes: int = 2 << 30,
        segment_bytes: int = 16 << 20,
        fdatasync: Callable[[int], None] | None = None,
    ) -> None:
        self.root = root
        self.bytes = 0  # on disk, of this process and of those it inherited from; the shipper subtracts
        self.ended = 0  # rows since the start, also those not written yet
        self.dropped = 0  # rows lost because neither disk nor memory had room
        self.fresh = asyncio.Event()  # there is a new end; the shipper clears it
        self.unwritten: deque[UsageRow] = deque()  # ends that found no room on disk
        self.unwritten_voids: list[str] = []  # ids of voids that found none
        self.folder, self._lock = claim(root)
        self._fsync = fsync
        self._fdatasync = fdatasync or FDATASYNC
        self._kernel = KernelSync() if fdatasync is None else None
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._segment = 0  # number of the last one
        self._file = -1  # descriptor of the one that is written; -1: the next record opens one
        self._size = 0  # bytes in it
        self._heading = records.heading()
        self._open: dict[str, float] = {}  # exchanges: when they began, seconds, monotonic
        self._reserved = self._set_reserve()
        self._refused = False  # the last `begin` was
        self._quiet_until = 0.0  # seconds, monotonic
        self._written = 0  # records
        self._synced = 0  # records among them that are on disk, whatever happens
        self._wanted = 0  # records that somebody wanted there
        self._closing = False
        self._finished: list[int] = []  # descriptors of full segments that were not synced yet
        self._new_files = True  # the folder has entries that were not synced yet
        self._syncing = False
        self._waiting = Waiting()
        self._thread = SyncThread()

    # --- one exchange

    def begin(self, row: UsageRow) -> None:
        """Before the provider is called: the row as far as it is known. Raises JournalFull."""
        record = records.begin(row)
        try:
            self._check_room(len(record))
            self._append(record)
        except OSError as error:
            self.retire()  # so that it can be removed when it is shipped
            raise self._refusal(error) from error
        self._refused = False
        self._open[row.request_id] = monotonic()
        try:
            self._sync_if_always()
        except OSError as error:
            self.void(row.request_id)
            raise self._refusal(error) from error

    def tick(self, request_id: str, prompt_tokens: int, completion_tokens: int) -> None:
        """How far a running exchange is: what is billed if we are killed now. Without room it is left out."""
        begun = self._open.get(request_id)
        if begun is not None:
            latency_ms = round((monotonic() - begun) * 1000)
            with suppress(OSError):
                self._append(records.tick(request_id, prompt_tokens, completion_tokens, latency_ms))

    def end(self, row: UsageRow) -> None:
        """The row as it is to be stored, also without a `begin`. Its id and `started_at` are those of the `begin`."""
        self._open.pop(row.request_id, None)
        self.ended += 1
        if not self._wrote(records.end(row)):
            self._keep(row)
        try:
            self._sync_if_always()
        except OSError as error:
            self._sync_failed(error)
        self.fresh.set()

    def add(self, row: UsageRow) -> bool:
        """The row of an exchange that cost nothing, without a `begin`. False: there is no room, and it is lost.

        The reserve is for what somebody pays for; no policy syncs this by itself.
        """
        record = records.end(row)
        try:
            self._check_room(len(record))
            self._append(record)
        except OSError as error:
            self.dropped += 1
            self._say("usage rows of remembered answers are lost: %s", error.strerror or error)
            return False
        self.ended += 1
        self.fresh.set()
        return True

    def void(self, request_id: str) -> None:
        """The provider was not reached after all: no row is due."""
        if self._open.pop(request_id, None) is not None and not self._wrote(records.void(request_id)):
            self.unwritten_voids.append(request_id)

    def _refusal(self, error: OSError) -> JournalFull:
        self._refused = True
        self._say("the usage journal takes no more requests: %s", error.strerror or error)
        return JournalFull("usage cannot be recorded at the moment", retry_after=5)

    # --- room

    @property
    def full(self) -> bool:
        """Whether `begin` would refuse. After it did the disk is asked: whoever goes by this sends nothing to begin."""
        try:
            self._check_room(ROOM)
            if self._refused:
                self._try_disk()
        except OSError:
            return True
        self._refused = False
        return False

    def _try_disk(self) -> None:
        """Raises OSError when it takes no record."""
        path = self.folder / "trial"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            if os.write(file, bytes(ROOM)) < ROOM:
                raise OSError(errno.ENOSPC, "no space left on device")
        finally:
            os.close(file)
            path.unlink(missing_ok=True)

    def _check_room(self, size: int) -> None:
        kept = ROOM * (len(self._open) + 1)
        if self.bytes + size + kept > self._max_bytes:
            raise OSError(errno.EDQUOT, f"{self.bytes} of {self._max_bytes} bytes are used")
        if self.unwritten:
            raise OSError(errno.ENOSPC, f"{len(self.unwritten)} rows wait in memory")
        if not self._reserved:
            self._reserved = self._set_reserve()
        if not self._reserved:
            raise OSError(errno.ENOSPC, "no space left on device")

    def _set_reserve(self) -> bool:
        path = self.folder / "reserve"
        try:
            with path.open("wb", 0) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, RESERVE)
                elif file.write(bytes(RESERVE)) < RESERVE:
                    raise OSError(errno.ENOSPC, "no space left on device")
        except OSError:
            path.unlink(missing_ok=True)
            return False
        return True

    def _wrote(self, record: bytes) -> bool:
        """Writes also what the cap or a full disk would refuse, as long as there is the reserve."""
        for _ in range(2):
            try:
                self._append(record)
            except OSError as error:
                self._say("the usage journal cannot be written: %s", error.strerror or error)
                if not self._reserved:
                    break
                self._reserved = False
                (self.folder / "reserve").unlink(missing_ok=True)
            else:
                return True
        return False

    def _keep(self, row: UsageRow) -> None:
        if len(self.unwritten) >= MAX_UNWRITTEN:
            self.dropped += 1
            self.ended -= 1
            self._say("%d usage rows are lost: the disk is full, and so is our memory", self.dropped)
            return
        self.unwritten.append(row)
        self._say("%d usage rows are in memory alone: the disk is full", len(self.unwritten))

    def write_unwritten(self) -> None:
        """Try the disk again. The shipper calls it: what it ships makes room."""
        while self.unwritten and self._wrote(records.end(self.unwritten[0])):
            self.unwritten.popleft()

    def _say(self, words: str, *values: object) -> None:
        if monotonic() >= self._quiet_until:
            self._quiet_until = monotonic() + LOGGED_EVERY
            log.error(words, *values)

    # --- segments

    @property
    def reached(self) -> Position:
        """Where the next record will be: what is before it is whole."""
        return Position(self._segment, self._size) if self._file >= 0 else Position(self._segment + 1, 0)

    def _append(self, record: bytes) -> None:
        """Raises OSError; nothing of the record is then left in a segment."""
        if self._file >= 0 and self._size + len(record) > self._segment_bytes:
            self.retire()
        if self._file < 0:
            self._start_segment()
        self._write(record)
        self._written += 1

    def _start_segment(self) -> None:
        path = path_of(self.folder, self._segment + 1)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._segment, self._size, self._new_files = self._segment + 1, 0, True
        try:
            self._write(self._heading)
        except OSError:
            self._abandon()
            self._segment -= 1
            path.unlink()
            raise

    def _write(self, record: bytes) -> None:
        try:
            if os.write(self._file, record) < len(record):
                raise OSError(errno.ENOSPC, "no space left on device")
        except OSError:
            self._cut_back()
            raise
        self._size += len(record)
        self.bytes += len(record)

    def _cut_back(self) -> None:
        """A reader of this segment must find no half record with whole ones behind it."""
        try:
            os.ftruncate(self._file, self._size)
        except OSError:
            self._abandon()

    def _abandon(self) -> None:
        """The next record begins a new segment, and this one is left as it is."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def retire(self) -> None:
        """The next record begins a new segment, and this one is synced with the others."""
        if self._file < 0 or self._size <= len(self._heading):
            return
        if self._fsync == "never" or self._synced == self._written:
            os.close(self._file)  # one that is kept open keeps its room also when it is removed
        else:
            self._finished.append(self._file)
        self._file = -1

    # --- syncing

    async def synced(self, seconds: float = inf) -> None:
        """Returns when all that was written so far would survive a power cut, if the policy is "group".

        Or after so many seconds; the disk then goes on by itself.
        """
        if self._fsync != "group" or self._synced == self._written:
            return
        self._wanted = self._written
        # Those who come in this turn of the loop share a sync, and those who come while it runs share the next.
        if not self._syncing:
            self._syncing = True
            asyncio.get_running_loop().call_soon(self._start_sync)
        await self._waiting.wait(self._written, seconds)

    def _start_sync(self) -> None:
        if self._closing:
            return
        self._syncing = True
        done = partial(self._sync_done, self._written)
        several = self._finished or self._new_files or self._file < 0
        if several or self._kernel is None or not self._kernel.start(self._file, done):
            self._thread.start(partial(self._sync, *self._to_sync()), done)

    def _to_sync(self) -> tuple[list[int], int, bool]:
        """Finished segments, the one that is written (or -1), and whether there are new ones."""
        files, folder = self._finished, self._new_files
        self._finished, self._new_files = [], False
        return files, self._file, folder

    def _sync(self, finished: list[int], current: int, folder: bool) -> None:
        """In the thread, or where nothing is in it. Closes what is finished; `current` outlives it: see `retire`."""
        try:
            for file in (*finished, *([current] if current >= 0 else [])):
                self._fdatasync(file)
            if folder:
                sync_folder(self.folder)
        finally:
            for file in finished:
                os.close(file)

    def _sync_done(self, written: int, error: OSError | None) -> None:
        self._syncing = False
        if error is not None:
            self._sync_failed(error)
        self._synced = max(self._synced, written)
        if self._synced < self._wanted:
            self._start_sync()  # also when nobody waits for it any more
        self._waiting.reached(self._synced)

    def _sync_failed(self, error: OSError) -> None:
        """The kernel forgets what it could not write, and the next fdatasync would lie: go on in another file.

        Nobody can wait for it any more. It is shipped all the same (https://wiki.postgresql.org/wiki/Fsync_Errors).
        """
        log.error("the usage journal cannot be synced: %s", error)
        self.retire()

    def _sync_if_always(self) -> None:
        if self._fsync == "always" and self._synced < self._written:
            self._sync(*self._to_sync())
            self._synced = self._written

    # --- the end

    def close(self) -> None:
        """Let go of the folder, with all on disk that is in it; it is removed when nothing is."""
        self._closing = True
        self._thread.shutdown()
        if self._kernel is not None:
            self._kernel.close()
        if self._fsync != "never":
            try:
                self._sync(*self._to_sync())
            except OSError as error:
                log.error("the usage journal cannot be synced: %s", error)
        self._synced = self._written
        self._waiting.reached(self._synced)
        self._waiting.close()
        only_heading = self._size <= len(self._heading)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            if only_heading:
                path_of(self.folder, self._segment).unlink()
        if self.unwritten:
            log.error("%d usage rows are lost: they were in memory alone", len(self.unwritten))
        (self.folder / "reserve").unlink(missing_ok=True)
        if not segments_of(self.folder):
            remove(self.folder)
        os.close(self._lock)

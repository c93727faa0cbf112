import asyncio
import ctypes
import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.stores import kernel_sync
from gateway.stores.journal import Journal
from gateway.stores.kernel_sync import KernelSync
from gateway.stores.segments import segments_of
from tests.support.journal_writer import begun

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"),
        reason="the system calls of Linux on two architectures; elsewhere a thread does it",
    ),
]


@pytest.fixture
def kernel() -> Iterator[KernelSync]:
    kernel = KernelSync()
    yield kernel
    kernel.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    with (tmp_path / "file").open("wb", 0) as opened:
        opened.write(b"something")
        yield opened.fileno()


class Libc:
    """The real one, but for the system calls that are told otherwise."""

    def __init__(self, **results: int) -> None:
        numbers = kernel_sync._CALLS[platform.machine()]
        self._results = {getattr(numbers, name): result for name, result in results.items()}
        self._getevents = numbers.getevents
        self.result = 0  # what the kernel says of an fdatasync
        self.eventfd = ctypes.CDLL(None).eventfd

    def syscall(self, number: int, *arguments: Any) -> int:
        if number in self._results:
            return self._results[number]
        returned = int(ctypes.CDLL(None).syscall(number, *arguments))
        if number == self._getevents and returned == 1 and self.result:
            arguments[3][2] = self.result
        return returned


async def sync(kernel: KernelSync, file: int) -> OSError | None:
    told: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
    assert kernel.start(file, told.set_result)
    assert not told.done(), "it is told in a later turn of the loop"
    async with asyncio.timeout(20):
        return await told


async def test_it_syncs_one_file_after_the_other_and_says_when(kernel: KernelSync, file: int) -> None:
    for _ in range(100):
        os.write(file, bytes(350))
        assert await sync(kernel, file) is None


async def test_what_the_disk_says_is_told(kernel: KernelSync, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    libc = Libc()
    libc.result = -errno.EIO
    monkeypatch.setattr(kernel_sync, "_LIBC", libc)
    error = await sync(kernel, file)
    assert error is not None and error.errno == errno.EIO
    libc.result = 0
    assert await sync(kernel, file) is None


async def test_what_cannot_be_synced_is_not_begun_and_never_tried_again(kernel: KernelSync, file: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert await sync(kernel, file) is None
    ends = os.pipe()
    try:
        assert not kernel.start(ends[1], lambda error: pytest.fail("nothing was begun"))
        assert not kernel.start(file, lambda error: pytest.fail("nothing was begun"))
    finally:
        for end in ends:
            os.close(end)
    assert len(os.listdir("/proc/self/fd")) == before, "what it held it gave back"


@pytest.mark.parametrize("forbidden", ["setup", "submit", "architecture", "libc"])
async def test_where_the_kernel_does_not_the_journal_asks_its_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forbidden: str
) -> None:
    if forbidden == "architecture":
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    else:
        libc = SimpleNamespace() if forbidden == "libc" else Libc(**{forbidden: -1})
        monkeypatch.setattr(kernel_sync, "_LIBC", libc)
    synced: list[int] = []
    journal = Journal(tmp_path)
    monkeypatch.setattr(journal, "_fdatasync", synced.append)
    await _ended_and_synced(journal)
    await _ended_and_synced(journal)
    assert len(synced) == 2
    journal.close()


async def test_without_a_descriptor_the_journal_asks_its_thread_and_the_kernel_once_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = Libc()
    monkeypatch.setattr(libc, "eventfd", lambda *arguments: -1)
    monkeypatch.setattr(kernel_sync, "_LIBC", libc)
    synced: list[int] = []
    journal = Journal(tmp_path)
    monkeypatch.setattr(journal, "_fdatasync", synced.append)
    for _ in range(3):
        await _ended_and_synced(journal)
    assert len(synced) == 3
    monkeypatch.setattr(libc, "eventfd", ctypes.CDLL(None).eventfd)
    await _ended_and_synced(journal)
    assert len(synced) == 3
    journal.close()


async def test_a_journal_asks_its_thread_for_what_is_new_and_the_kernel_for_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    journal = Journal(tmp_path)
    monkeypatch.setattr(journal, "_fdatasync", synced.append)
    await _ended_and_synced(journal)
    assert len(synced) == 1, "the folder is synced with its first file"
    for _ in range(20):
        await _ended_and_synced(journal)
    assert len(synced) == 1
    journal.end(begun())
    journal.retire()
    await _ended_and_synced(journal)
    assert len(synced) == 3, "the segment that was left, and the new one"
    await _ended_and_synced(journal)
    assert len(synced) == 3
    journal.close()


async def _ended_and_synced(journal: Journal) -> None:
    journal.end(begun())
    async with asyncio.timeout(20):
        await journal.synced()


async def test_a_journal_whose_disk_fails_under_the_kernel_goes_on_in_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    libc = Libc()
    monkeypatch.setattr(kernel_sync, "_LIBC", libc)
    journal = Journal(tmp_path)
    await _ended_and_synced(journal)
    libc.result = -errno.EIO
    await _ended_and_synced(journal)
    assert "cannot be synced: [Errno 5]" in caplog.text
    libc.result = 0
    await _ended_and_synced(journal)
    assert segments_of(journal.folder) == [1, 2]
    journal.close()


async def test_closed_while_one_runs_it_waits_for_it_and_tells_nobody(kernel: KernelSync, file: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        os.write(file, bytes(1 << 20))
        assert kernel.start(file, lambda error: pytest.fail("nobody is left to hear of it"))
        kernel.close()
        await asyncio.sleep(0)
    kernel.close()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_journal_that_is_closed_while_the_kernel_syncs_releases_who_waits(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    await _ended_and_synced(journal)
    journal.end(begun())
    waits = asyncio.create_task(journal.synced())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    journal.close()
    async with asyncio.timeout(20):
        await waits

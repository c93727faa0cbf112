import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from typing import TextIO

import pytest

from gateway import lines as lines_module
from gateway.lines import LineWriter

pytestmark = pytest.mark.integration


class Pipe:
    """A stderr, and who reads it or does not."""

    def __init__(self) -> None:
        self._reading, writing = os.pipe()
        self.stream: TextIO = os.fdopen(writing, "w", encoding="utf-8")
        self._text = ""
        os.set_blocking(self._reading, False)

    def read(self) -> list[str]:
        """The lines that are there by now, from the first one on."""
        while True:
            try:
                data = os.read(self._reading, 1 << 16)
            except BlockingIOError:
                return self._text.splitlines()
            if not data:
                return self._text.splitlines()
            self._text += data.decode()

    def close(self) -> None:
        self.read()
        os.close(self._reading)
        self.stream.close()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


@pytest.fixture
def writer(pipe: Pipe) -> Iterator[LineWriter]:
    writer = LineWriter(pipe.stream, lambda count: f"dropped {count}")
    yield writer
    writer.flush()
    writer.close()


async def until(true: Callable[[], object], seconds: float = 20) -> None:
    deadline = monotonic() + seconds
    while not true():
        assert monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.002)


async def test_lines_of_one_moment_share_a_write(
    pipe: Pipe, writer: LineWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "LINGER", 0.2)
    writes: list[int] = []

    def write(file: int, data: bytes) -> int:
        writes.append(len(data))
        return len(data)

    monkeypatch.setattr(os, "write", write)
    for number in range(100):
        writer.add(f"line {number}")
    await until(lambda: writes)
    assert writes == [sum(len(f"line {number}\n") for number in range(100))]


async def test_a_line_in_a_hurry_takes_those_before_it_with_it(
    pipe: Pipe, writer: LineWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "LINGER", 60)
    writer.add("one")
    writer.add("two", hurry=True)
    await until(lambda: pipe.read() == ["one", "two"])


async def test_many_lines_do_not_wait_for_more(pipe: Pipe, writer: LineWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "LINGER", 60)
    monkeypatch.setattr(lines_module, "ENOUGH", 100)
    for number in range(100):
        writer.add(f"line {number}")
    await until(lambda: len(pipe.read()) > 10)


def test_without_an_event_loop_a_line_is_written_at_once(
    pipe: Pipe, writer: LineWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "LINGER", 60)
    writer.add("before the loop runs")
    assert pipe.read() == ["before the loop runs"]


async def test_flush_returns_when_all_is_written(
    pipe: Pipe, writer: LineWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "LINGER", 60)
    for number in range(1000):
        writer.add(f"line {number}")
    writer.flush()
    assert pipe.read() == [f"line {number}" for number in range(1000)]


async def test_lines_after_the_end_are_written_at_once(pipe: Pipe, writer: LineWriter) -> None:
    writer.add("one")
    writer.flush()
    writer.close()
    writer.add("two")
    assert pipe.read() == ["one", "two"]


async def test_without_a_thread_lines_are_written_at_once(
    pipe: Pipe, writer: LineWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    writer.add("one")
    writer.add("two")
    assert pipe.read() == ["one", "two"]


async def test_lines_of_threads_come_whole(pipe: Pipe, writer: LineWriter) -> None:
    one_at_a_time = threading.Lock()

    def write(name: str) -> None:
        for number in range(200):
            with one_at_a_time:
                writer.add(f"{name} {number}")

    await asyncio.gather(*(asyncio.to_thread(write, name) for name in "abcd"))
    writer.flush()
    written = pipe.read()
    for name in "abcd":
        assert [line for line in written if line[0] == name] == [f"{name} {number}" for number in range(200)]


async def test_a_line_is_made_in_the_thread_and_in_its_turn(pipe: Pipe, writer: LineWriter) -> None:
    def make() -> str:
        return f"made in {threading.current_thread().name}"

    for line in ("one", make, "three"):
        writer.add(line)
    writer.flush()
    assert pipe.read() == ["one", "made in log", "three"]
    writer.close()
    writer.add(make)
    assert pipe.read()[3:] == ["made in MainThread"], "there is no thread any more"


async def test_a_line_that_cannot_be_made_leaves_one_and_stops_no_other(pipe: Pipe, writer: LineWriter) -> None:
    def fail() -> str:
        raise LookupError("a prompt")

    for line in ("one", fail, "three"):
        writer.add(line)
    writer.flush()
    assert pipe.read() == ["one", "a log line cannot be made: LookupError", "three"]


async def test_lines_that_are_not_made_yet_are_bounded_too(
    pipe: Pipe, writer: LineWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "MAX_WAITING", 1 << 20)
    monkeypatch.setattr(lines_module, "PATIENCE", 0.01)
    made: list[int] = []

    def make() -> str:
        made.append(1)
        return "x" * (1 << 12)  # more than it counted for

    for _ in range(5000):
        writer.add(make)
    writer.flush()
    await until(lambda: any(line.startswith("dropped ") for line in pipe.read()))
    count = next(int(line.split()[1]) for line in pipe.read() if line.startswith("dropped "))
    assert len(made) + count == 5000 and count > 3500
    writer.add("after")  # what was made counts as it did when it was added: there is room again
    await until(lambda: pipe.read()[-1] == "after")


async def test_who_does_not_read_holds_up_nobody_and_is_told_what_is_missing(
    pipe: Pipe, writer: LineWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "MAX_WAITING", 1 << 20)
    monkeypatch.setattr(lines_module, "PATIENCE", 0.01)
    line = "x" * 1023
    for _ in range(2000):  # two megabytes: more than the pipe and the writer hold
        writer.add(line)
    writer.flush()
    dropped: list[str] = []

    def told() -> list[str]:
        dropped[:] = [one for one in pipe.read() if one != line]
        return dropped

    await until(told)
    writer.flush()
    (word, count), arrived = dropped[0].split(), sum(one == line for one in pipe.read())
    assert word == "dropped" and int(count) > 500
    assert arrived + int(count) == 2000


PROCESS = """
import asyncio, logging, signal, sys
from gateway import lines
from gateway.logs import setup

lines.LINGER = 60
setup("info", "production")
log = logging.getLogger("gateway.test")

async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    for number in range(50):
        log.info("line %d", number)
    {end}

asyncio.run(main())
"""


@pytest.mark.parametrize("end", ["pass", "raise LookupError('bug')", "print('up', flush=True); await stop.wait()"])
def test_a_process_writes_all_its_lines_before_it_ends(end: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROCESS.format(end=end)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        if "stop" in end:
            assert process.stdout is not None and process.stdout.readline() == "up\n"
            process.send_signal(signal.SIGTERM)
        _, written = process.communicate(timeout=20)
    found = written.splitlines()
    assert [f'"line {number}"' in found[number] for number in range(50)] == [True] * 50
    assert ("LookupError: bug" in found[-1]) == ("raise" in end), "a crash's traceback comes last"
    assert len(found) == 50 or "raise" in end


def test_a_process_whose_stderr_nobody_reads_still_ends() -> None:
    code = PROCESS.format(end="[log.info('x' * 1000) for _ in range(1000)]")
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as process:
        assert process.wait(20) == 0


async def test_a_stderr_that_somebody_made_non_blocking_loses_no_line(pipe: Pipe, writer: LineWriter) -> None:
    os.set_blocking(pipe.stream.fileno(), False)
    sent = [f"line {number} {'x' * 100}" for number in range(3000)]
    for line in sent:
        writer.add(line)
    await until(lambda: len(pipe.read()) >= len(sent))
    assert pipe.read() == sent


async def test_a_line_that_is_logged_by_a_finaliser_stops_nobody() -> None:
    """A collection may begin wherever memory is allocated, also inside a lock, and what it ends may log."""
    program = """
import asyncio, gc, logging, threading
from gateway.logs import setup
setup("info", "production")
gc.disable()
real, armed = threading._allocate_lock, []
def allocate():
    if armed and threading.current_thread().name == "log":
        armed.clear()
        gc.collect()
    return real()
threading._allocate_lock = allocate
async def fail(): raise LookupError("x")
def garbage():
    box = [asyncio.get_running_loop().create_task(fail())]
    box.append(box)
async def main():
    for word in ("one", "two", "three"):
        garbage()
        await asyncio.sleep(0.03)
        armed.append(1)
        logging.getLogger("gateway.test").info(word)
        await asyncio.sleep(0.03)
        gc.collect()
        logging.getLogger("gateway.test").warning(word)
asyncio.run(main())
print("survived")
"""
    command = [sys.executable, "-c", program]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=20)
    assert done.stdout == "survived\n", done.stderr[-500:]

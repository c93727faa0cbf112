"""Slots, sockets and what is handed over; whole processes are in test_workers.py."""

import asyncio
import os
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from gateway import supervisor
from gateway.settings import load_settings
from gateway.supervisor import (
    CRASHES,
    HANDOVER,
    LONGEST_PAUSE,
    PAUSE,
    STEADY,
    WITHIN,
    Handover,
    Slot,
    Supervisor,
    address_of,
    handed_over,
    open_sockets,
    workers_of,
)
from tests.support.process import until

pytestmark = pytest.mark.mock


def test_pauses_double_up_to_five_seconds_while_workers_crash() -> None:
    slot = Slot([])
    pauses = [slot.crashed(now=20.0 * number) for number in range(9)]
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]


def test_a_crash_after_a_steady_life_is_the_first_again() -> None:
    slot = Slot([])
    for now in (0.0, 20.0, 40.0):
        slot.crashed(now)
    assert slot.crashed(40.0 + STEADY + 1) == PAUSE


def test_three_crashes_within_ten_seconds_are_too_many() -> None:
    slot = Slot([])
    assert [slot.crashed(now) for now in (0.0, 4.0, 9.9)] == [0.1, 0.2, None]
    assert CRASHES == 3 and WITHIN == 10


def test_three_crashes_in_more_than_ten_seconds_are_not() -> None:
    slot = Slot([])
    assert None not in [slot.crashed(now) for now in (0.0, 4.0, 10.1, 14.1)]


def test_only_what_a_supervisor_started_is_handed_anything() -> None:
    assert handed_over({"PATH": "/bin"}) is None
    words = '{"worker":3,"sockets":[4,5],"line":6,"folder":"/run/x"}'
    assert handed_over({HANDOVER: words}) == Handover(3, [4, 5], 6, "/run/x")


def test_no_workers_are_as_many_as_cores() -> None:
    assert workers_of(load_settings({})) == 1
    assert workers_of(load_settings({"GATEWAY_WORKERS": "3"})) == 3
    assert workers_of(load_settings({"GATEWAY_WORKERS": "0"})) == len(os.sched_getaffinity(0))


def test_an_address_that_listens_everywhere_is_shown_as_one_that_can_be_called() -> None:
    assert address_of("0.0.0.0", 3000) == "http://127.0.0.1:3000"
    assert address_of("gateway.internal", 3000) == "http://gateway.internal:3000"


# --- sockets ------------------------------------------------------------------------------------------------------


@contextmanager
def sockets(host: str, port: int, slots: int) -> Iterator[list[list[socket.socket]]]:
    opened = open_sockets(host, port, slots)
    try:
        yield opened
    finally:
        for slot in opened:
            Slot(slot).close()


def test_every_slot_has_a_socket_of_its_own_on_one_port() -> None:
    with sockets("127.0.0.1", 0, 3) as opened:
        assert len({each.fileno() for (each,) in opened}) == 3
        assert len({each.getsockname() for (each,) in opened}) == 1
        assert opened[0][0].getsockname()[1] > 0


def test_a_name_with_two_addresses_is_listened_on_at_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(*arguments: object, **keywords: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, 1, 6, "", (address, 0)) for address in ("127.0.0.1", "127.0.0.2")]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with sockets("two.example", 0, 2) as opened:
        names = [[each.getsockname() for each in slot] for slot in opened]
        assert names[0] == names[1]
        assert [name[0] for name in names[0]] == ["127.0.0.1", "127.0.0.2"]


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            open_sockets("127.0.0.1", port, 2)


def test_a_port_that_another_supervisor_shares_among_its_workers_is_taken_too() -> None:
    with sockets("127.0.0.1", 0, 2) as theirs:
        for (each,) in theirs:
            each.listen()
        with pytest.raises(OSError, match="Address already in use"):
            open_sockets("127.0.0.1", theirs[0][0].getsockname()[1], 2)


def test_a_slot_that_steps_aside_leaves_all_clients_to_the_others() -> None:
    with sockets("127.0.0.1", 0, 2) as opened:
        left, stays = Slot(opened[0]), Slot(opened[1])
        for (each,) in opened:
            each.listen()
        left.step_aside()
        (accepting,) = stays.sockets
        for _ in range(20):
            with socket.create_connection(accepting.getsockname(), timeout=10):
                accepting.accept()[0].close()
        left.close()


# --- workers that crash -------------------------------------------------------------------------------------------

# In place of `gateway serve`: no worker starts while there is a file `wrong`, nor the second while there is one `slow`.
WORKER = """
import json, os, pathlib, signal, socket, sys, time
handover = json.loads(os.environ["AI_GATEWAY_WORKER"])
line = socket.socket(fileno=handover["line"])
folder = pathlib.Path(__file__).parent
if (folder / "wrong").exists():
    sys.exit(2)
if handover["worker"] == 2:
    while (folder / "slow").exists():
        time.sleep(0.01)
line.send(b"!")
signal.pause()
"""


@asynccontextmanager
async def supervised(
    folder: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> AsyncIterator[tuple[list[Slot], "asyncio.Task[int]", asyncio.Event]]:
    """Workers that do nothing but serve; the event is set once all do."""
    (folder / "worker.py").write_text(WORKER)
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-S", str(folder / "worker.py")])
    for name in ("PAUSE", "LONGEST_PAUSE"):
        monkeypatch.setattr(supervisor, name, 0.05)
    settings = load_settings({"DATABASE_URL": "postgres://x", "REDIS_URL": "redis://x"})
    with sockets("127.0.0.1", 0, slots) as opened:
        places, ready = [Slot(each) for each in opened], asyncio.Event()
        supervising = Supervisor(settings, dict(os.environ), places, folder)
        running = asyncio.create_task(supervising.run(ready.set))
        try:
            yield places, running, ready
        finally:
            supervising._stop()
            await running
            for place in places:
                place.close()


def kill(slot: Slot) -> int:
    """The number of its worker."""
    assert slot.worker is not None
    slot.worker.process.kill()
    return slot.worker.number


def serves_anew(slot: Slot, number: int) -> bool:
    return slot.worker is not None and slot.worker.number > number and slot.serves


async def test_a_worker_that_crashes_while_another_starts_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow").touch()
    async with supervised(tmp_path, monkeypatch, 3) as (slots, _running, ready):
        started: list[Any] = []
        start = Supervisor._start

        def noted(self: Supervisor, slot: Slot) -> Any:
            started.append(start(self, slot))
            return started[-1]

        monkeypatch.setattr(Supervisor, "_start", noted)
        await until(lambda: len(started) == 3 and started[2].serves.done())
        started[2].process.kill()
        await until(lambda: started[2].status is not None)
        (tmp_path / "slow").unlink()
        await asyncio.wait_for(ready.wait(), 30)
        await until(lambda: serves_anew(slots[2], 3))


async def test_what_ends_new_workers_ends_none_that_serve_and_when_it_is_mended_they_are_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with supervised(tmp_path, monkeypatch, 2) as (slots, running, ready):
        await asyncio.wait_for(ready.wait(), 30)
        (tmp_path / "wrong").touch()
        number = kill(slots[0])
        await until(lambda: slots[0].worker is not None and slots[0].worker.number > number + CRASHES)
        assert slots[1].serves and not running.done()
        (tmp_path / "wrong").unlink()
        await until(lambda: slots[0].serves)


async def test_a_worker_that_cannot_be_started_for_a_while_ends_none_that_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[object] = []

    def broken(*arguments: object, **keywords: object) -> NoReturn:
        failed.append(arguments)
        raise OSError(12, "Cannot allocate memory")

    async with supervised(tmp_path, monkeypatch, 2) as (slots, running, ready):
        await asyncio.wait_for(ready.wait(), 30)
        with monkeypatch.context() as shortage:
            shortage.setattr(subprocess, "Popen", broken)
            number = kill(slots[0])
            await until(lambda: len(failed) > 1)
        await until(lambda: serves_anew(slots[0], number))
        assert slots[1].serves and not running.done()


# --- the process --------------------------------------------------------------------------------------------------


def test_the_file_limit_is_raised_as_far_as_it_may_be() -> None:
    program = (
        "import resource as r; from gateway.serve import _raise_file_limit\n"
        "_, hard = r.getrlimit(r.RLIMIT_NOFILE); r.setrlimit(r.RLIMIT_NOFILE, (64, hard))\n"
        "_raise_file_limit(); print(r.getrlimit(r.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def test_a_supervisor_is_small(figure: Callable[[str], None]) -> None:
    """What it imports; `gateway serve` itself brings a little more."""
    program = (
        "import gateway.__main__, gateway.logs, gateway.supervisor, sys\n"
        "size = next(line for line in open('/proc/self/status') if line.startswith('VmRSS')).split()[1]\n"
        "print(size, sorted({'aiohttp', 'asyncpg', 'redis', 'uvloop', 'aioprometheus'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    size, _, imported = done.stdout.partition(" ")
    figure(f"supervisor: {int(size) / 1024:.0f} MB resident")
    assert imported.strip() == "[]"
    assert int(size) < 40 * 1024

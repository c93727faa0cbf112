"""Several workers on one port, and who looks after them.

Rule 1: listening sockets belong to a slot, not to the worker in it. They are opened once, here, and each worker of the
slot inherits them: what waits in a backlog is taken by the worker that is there or by the next, and nothing is refused.
Rule 2: between us and each worker is a line, a pair of sockets. The worker says on it that it serves. It is not used
for anything else; but when it ends, the other side is gone, however that came about.
Rule 3: all else is told by signals. Workers have a session of their own, so that a Ctrl-C reaches them once, from us.
Rule 4: what a worker needs is not imported here. A supervisor is small, and starts the code that it finds on disk.
"""

import asyncio
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import msgspec

from gateway import tally
from gateway.embedded import EmbeddedError, open_database
from gateway.settings import Settings

log = logging.getLogger("gateway.supervisor")

BACKLOG = 1024  # connections that wait for a worker
PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds before a worker that crashed is replaced; it doubles from one to the other
STEADY = 60.0  # seconds that a worker lives until its slot's pauses are short again
CRASHES, WITHIN = 3, 10.0  # of one slot, in so many seconds, and we give up, unless another slot serves
LAST = 30.0  # seconds beyond the drain that workers have for their last rows; then they are killed

HANDOVER = "AI_GATEWAY_WORKER"  # environment variable


class StartError(Exception):
    """One line that says what the gateway needs and cannot have."""


class Handover(msgspec.Struct, frozen=True):
    """What a worker inherits: file descriptors, and the folder of the workers' metrics."""

    worker: int  # its number, from 1; never given twice
    sockets: list[int]
    line: int
    folder: str


def handed_over(environ: Mapping[str, str]) -> Handover | None:
    """None in a process that no supervisor started."""
    words = environ.get(HANDOVER)
    return msgspec.json.decode(words, type=Handover) if words else None


def supervise(settings: Settings, environ: Mapping[str, str], ready: Callable[[str], None]) -> int:
    """Serve with `gateway_workers` processes until SIGTERM; the exit status. `ready` is called with the address once
    all of them answer. Raises StartError; a worker that cannot start has said why itself."""
    try:
        with ExitStack() as opened:
            folder = Path(tempfile.mkdtemp(prefix="aig-workers-"))
            opened.callback(shutil.rmtree, folder, ignore_errors=True)
            slots = [Slot(sockets) for sockets in open_sockets(settings.host, settings.port, workers_of(settings))]
            for each in slots:
                opened.callback(each.close)
            supervisor = Supervisor(settings, environ, slots, folder)
            address = address_of(settings.host, slots[0].sockets[0].getsockname()[1])
            return asyncio.run(supervisor.run(lambda: ready(address)))
    except (EmbeddedError, OSError) as error:
        raise StartError(f"cannot start: {error}") from None


def workers_of(settings: Settings) -> int:
    """0 is one for each core that we may use."""
    if settings.gateway_workers:
        return settings.gateway_workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_hangup(reload: Callable[[], None], stop: Callable[[], None]) -> Callable[[], None]:
    """What SIGHUP means: to reload, but where the terminal that we were started in is closed, to stop."""
    had_terminal = os.isatty(0)
    return lambda: stop() if had_terminal and not os.isatty(0) else reload()


# --- sockets ------------------------------------------------------------------------------------------------------


def open_sockets(host: str, port: int, slots: int) -> list[list[socket.socket]]:
    """For each slot one for each of the host's addresses, bound and not listening yet. Raises OSError."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = list(dict.fromkeys((family, address) for family, *_, address in found))
    if sys.platform != "linux":  # elsewhere SO_REUSEPORT does not share connections out: all workers accept from one
        return [[_bind(family, address) for family, address in addresses]] * slots
    for family, address in addresses:
        _bind(family, address).close()  # with SO_REUSEPORT alone, a second gateway would take a part of our clients
    opened: list[list[socket.socket]] = [[] for _ in range(slots)]
    for slot in opened:
        for family, address in addresses:
            slot.append(_bind(family, (address[0], port, *address[2:]), share=True))
            port = slot[-1].getsockname()[1]  # where it was 0, the first is given one, which the others share
    return opened


def _bind(family: int, address: tuple[object, ...], *, share: bool = False) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a socket of its own
        bound.bind(address)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise OSError(error.errno, f"cannot listen on {address[0]} port {address[1]}: {error.strerror}") from None
    return bound


def address_of(host: str, port: int) -> str:
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '::', '') else host}:{port}"


# --- workers ------------------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Worker:
    number: int
    process: "subprocess.Popen[bytes]"
    line: socket.socket
    serves: "asyncio.Future[bool]"  # False: it ended before it did
    status: int | None = None  # its exit status, once it ended; negative: by a signal
    outdated: bool = False  # it may have read its configuration before we were told that there is another

    def tell(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def reload(self) -> None:
        if self.serves.done():
            self.tell(signal.SIGHUP)
        else:  # it has no handler yet, and would die of it
            self.outdated = True


@dataclass(eq=False)
class Slot:
    """One place to work. Its sockets stay open as long as we live."""

    sockets: Sequence[socket.socket]
    worker: Worker | None = None  # the one that is meant to serve
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)  # held by who replaces it
    _ends: deque[float] = field(default_factory=lambda: deque(maxlen=CRASHES))  # of workers; seconds, monotonic
    _pause: float = PAUSE

    def crashed(self, now: float) -> float | None:
        """Seconds until the next worker may start; None: there were too many."""
        steady = not self._ends or now - self._ends[-1] > STEADY
        self._pause = PAUSE if steady else min(LONGEST_PAUSE, 2 * self._pause)
        self._ends.append(now)
        return None if len(self._ends) == CRASHES and now - self._ends[0] < WITHIN else self._pause

    @property
    def serves(self) -> bool:
        worker = self.worker
        return worker is not None and worker.status is None and worker.serves.done() and worker.serves.result()

    def step_aside(self) -> None:
        """Other slots take our clients until a worker listens again. Raises OSError."""
        if sys.platform == "linux":  # elsewhere the sockets are those of all slots
            fresh = [_bind(each.family, each.getsockname(), share=True) for each in self.sockets]
            self.close()
            self.sockets = fresh

    def close(self) -> None:
        for each in self.sockets:
            each.close()


class Supervisor:
    """Starts and ends all workers; `run` is its whole life."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], slots: Sequence[Slot], folder: Path) -> None:
        self._settings = settings
        # A limit that each process keeps by itself is shared by all of them, on every node.
        self._environ = {**environ, "GATEWAY_NODES": str(settings.gateway_nodes * len(slots))}
        self._slots = slots
        self._folder = folder
        self._started = 0  # workers
        self._workers: set[Worker] = set()  # that live, also those that retire
        self._followed: set[asyncio.Task[None]] = set()  # one for each of them
        self._renewing: asyncio.Task[None] | None = None
        self._told = asyncio.Event()  # to stop, by a signal
        self._gave_up = asyncio.Event()  # too many crashed
        self._ending = asyncio.Event()  # no other worker is started, for whatever reason

    async def run(self, ready: Callable[[], None]) -> int:
        """The exit status. Raises EmbeddedError, and OSError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, on_hangup(self._reload, self._stop))
        loop.add_signal_handler(signal.SIGUSR2, self._renew)
        work, told = asyncio.create_task(self._work(ready)), asyncio.create_task(self._told.wait())
        await asyncio.wait({work, told}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if not work.done() and not self._ending.is_set():
            work.cancel()
        with suppress(asyncio.CancelledError):
            return await work
        return 0

    async def _work(self, ready: Callable[[], None]) -> int:
        async with open_database(self._settings) as (database_url, redis_url):
            self._environ |= {"DATABASE_URL": database_url, "REDIS_URL": redis_url}
            try:
                failed = await self._start_all()
                if failed is not None:
                    return failed
                ready()
                await self._gave_up.wait()
                return 1
            finally:
                await self._end_all()

    async def _start_all(self) -> int | None:
        """None once all serve; else what the first that could not exited with. What is wrong with one is wrong with
        all, so the first goes alone, and it is said once."""
        first, *others = self._slots
        for slots in ([first], others):
            started = [(slot, self._start(slot)) for slot in slots]
            for slot, worker in started:
                if not await asyncio.shield(worker.serves):
                    return worker.status if worker.status in (1, 2) else 1
                slot.worker = worker
                if worker.status is not None:  # it has crashed while we waited for another
                    await self._replace(slot, worker)
        return None

    def _start(self, slot: Slot) -> Worker:
        """The command that we are ourselves, once more. Raises OSError."""
        self._started += 1
        ours, its = socket.socketpair()
        inherited = [each.fileno() for each in slot.sockets]
        handover = Handover(self._started, inherited, its.fileno(), str(self._folder))
        with its:
            process = subprocess.Popen(  # noqa: S603 - our own command line
                [sys.executable, *sys.orig_argv[1:]],
                env={**self._environ, HANDOVER: msgspec.json.encode(handover).decode()},
                pass_fds=[*inherited, its.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        ours.setblocking(False)
        worker = Worker(self._started, process, ours, asyncio.get_running_loop().create_future())
        self._workers.add(worker)
        task = asyncio.create_task(self._follow(slot, worker))
        self._followed.add(task)
        task.add_done_callback(self._was_followed)
        return worker

    def _was_followed(self, task: "asyncio.Task[None]") -> None:
        self._followed.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a worker cannot be looked after: %s", error)
            self._gave_up.set()

    async def _follow(self, slot: Slot, worker: Worker) -> None:
        """From a worker's start until it is gone and, where that is needed, another is started."""
        loop = asyncio.get_running_loop()
        serves = bool(await loop.sock_recv(worker.line, 1))
        if serves:
            worker.serves.set_result(True)
            if worker.outdated:
                worker.reload()
            await loop.sock_recv(worker.line, 1)
        worker.status = await asyncio.to_thread(worker.process.wait)
        if not serves:
            worker.serves.set_result(False)
        worker.line.close()
        self._workers.discard(worker)
        try:
            tally.end(self._folder, worker.number)
        except OSError as error:
            log.warning("worker %d: its metrics cannot be read: %s", worker.number, error.strerror)
        await self._replace(slot, worker)

    async def _replace(self, slot: Slot, worker: Worker) -> None:
        async with slot.changing:
            if slot.worker is not worker or self._ending.is_set():
                return
            pause = slot.crashed(monotonic())
            if pause is None:
                if not any(each.serves for each in self._slots):
                    words = "worker %d ended, %s: %d in its place in %g s, we give up"
                    log.error(words, *_end(worker), CRASHES, WITHIN)
                    self._gave_up.set()
                    return
                # What ends new workers, a wrong file perhaps, is no reason to end those that serve.
                with suppress(OSError):
                    slot.step_aside()
                pause = LONGEST_PAUSE
            log.error("worker %d ended, %s: another starts in %g s", *_end(worker), pause)
            await self._rest(pause)
            while not self._ending.is_set():
                try:
                    slot.worker = self._start(slot)
                    return
                except OSError as error:  # no memory, too many processes: those that serve go on
                    log.error("no worker can be started, once more in %g s: %s", LONGEST_PAUSE, error.strerror)
                    await self._rest(LONGEST_PAUSE)

    async def _rest(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), seconds)

    # --- what we are told

    def _stop(self) -> None:
        if self._ending.is_set():  # once more: the workers are to hurry
            self._tell_all(signal.SIGTERM)
        self._told.set()

    def _tell_all(self, number: signal.Signals) -> None:
        for worker in self._workers:
            worker.tell(number)

    def _reload(self) -> None:
        for worker in self._workers:
            worker.reload()

    def _renew(self) -> None:
        if self._renewing is not None and not self._renewing.done():
            log.warning("told to replace the workers while they are being replaced")
        else:
            self._renewing = asyncio.create_task(self._renew_all())

    async def _renew_all(self) -> None:
        """One slot after the other."""
        try:
            for slot in self._slots:
                async with slot.changing:
                    await self._renew_one(slot)
        except (OSError, StartError) as error:
            log.error("the workers that serve go on: %s", error)

    async def _renew_one(self, slot: Slot) -> None:
        """The old worker retires once the new one serves, on the same sockets."""
        old, new = slot.worker, self._start(slot)
        if not await asyncio.shield(new.serves):
            raise StartError("worker {} does not start, {}".format(*_end(new)))
        slot.worker = new
        if old is not None:
            old.tell(signal.SIGUSR2)
            log.info("worker %d serves, worker %d retires", new.number, old.number)

    async def _end_all(self) -> None:
        """Each drains as a single process does."""
        self._ending.set()
        if self._renewing is not None:
            self._renewing.cancel()
        self._tell_all(signal.SIGTERM)
        followed = set(self._followed)
        if followed:
            await asyncio.wait(followed, timeout=self._settings.gateway_drain_timeout + LAST)
        self._tell_all(signal.SIGKILL)
        await asyncio.gather(*followed, return_exceptions=True)  # `_was_followed` has said it


def _end(worker: Worker) -> tuple[int, str]:
    """For the log: number, and how it went."""
    status = worker.status or 0
    return worker.number, f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"

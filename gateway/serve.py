"""The process: it starts, says where it answers, and goes when it is told, in good order."""

import asyncio
import logging
import os
import re
import resource
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from time import monotonic

import aiohttp
import asyncpg
import uvloop
from aiohttp import http_parser, web

from gateway.app import make_app
from gateway.appkeys import METRICS, PULSE
from gateway.connection import Runner
from gateway.databases import reason
from gateway.embedded import EmbeddedError
from gateway.metrics import Metrics
from gateway.pulse import Pulse
from gateway.reload import reload
from gateway.settings import Settings, SettingsError
from gateway.stores.migrations import MigrationError
from gateway.supervisor import BACKLOG, Handover, StartError, address_of, on_hangup
from gateway.tally import EVERY, Tally

log = logging.getLogger("gateway")

KEEPALIVE = 130.0  # seconds; longer than a load balancer's usual 60 or 120, so that it never reuses a closed connection
OLDEST_AIOHTTP = (3, 14, 5)  # a security floor: header time-out, smuggling and memory advisories are mended in it


def serve(
    settings: Settings, environ: Mapping[str, str], ready: Callable[[str], None], handover: Handover | None = None
) -> None:
    """Serve until SIGTERM. `ready` is called with the address once it answers. `handover`: what a worker inherits.

    Raises SettingsError, or StartError for a dependency or a port that cannot be had.
    """
    check_runtime()
    _raise_file_limit()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, environ, ready, handover))
    except asyncpg.ClientConfigurationError as error:
        raise SettingsError(f"DATABASE_URL: {reason(error)}") from None
    except (EmbeddedError, MigrationError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise StartError(f"cannot start: {reason(error)}") from None


def make_runner(app: web.Application) -> Runner:
    return Runner(
        app,
        handler_cancellation=True,  # a client that leaves is noticed while the provider is silent
        keepalive_timeout=KEEPALIVE,
        access_log=None,  # one line per exchange is written by middlewares.errors
        auto_decompress=False,  # compressed bodies are refused unread, so there is no bomb to inflate
        lingering_time=1.0,  # seconds for the rest of a body that was refused, so that the client can read why
        shutdown_timeout=1.0,  # what is open was drained before
    )


async def _serve(
    settings: Settings, environ: Mapping[str, str], ready: Callable[[str], None], handover: Handover | None
) -> None:
    app = make_app(settings, environ, settle=True)
    told = _Told(worker=handover is not None)
    runner = make_runner(app)
    async with AsyncExitStack() as last:
        try:
            if not await _set_up(runner, told.stop):
                return
            await last.enter_async_context(_counted_together(app[METRICS], handover))
            await _listen(runner, settings, handover)
            ready(address_of(settings.host, runner.addresses[0][1]))
            last.enter_context(_tied(handover, app[METRICS], told.retire))
            await told.to_go(lambda: reload(app))
            if told.retire.is_set():
                await _retire(runner, app[PULSE], settings, told.stop)
            if told.stop.is_set():
                told.stop.clear()
                await _until_drained(app[PULSE], settings, told.stop)
        finally:
            await runner.cleanup()


async def _listen(runner: web.AppRunner, settings: Settings, handover: Handover | None) -> None:
    """Raises OSError."""
    if handover is None:
        await web.TCPSite(runner, settings.host, settings.port, backlog=BACKLOG, reuse_address=True).start()
        return
    for descriptor in handover.sockets:
        await web.SockSite(runner, socket.socket(fileno=descriptor), backlog=BACKLOG).start()


@contextmanager
def _tied(handover: Handover | None, metrics: Metrics, retire: asyncio.Event) -> Iterator[None]:
    """A worker tells its supervisor that it serves. Without one it retires: the sockets are free for another."""
    if handover is None:
        yield
        return
    loop = asyncio.get_running_loop()

    def alone() -> None:
        """It never says anything, so what is to be read is its end."""
        loop.remove_reader(line)
        log.error("the supervisor is gone")
        metrics.tally = None
        shutil.rmtree(handover.folder, ignore_errors=True)
        retire.set()

    with socket.socket(fileno=handover.line) as line:
        loop.add_reader(line, alone)
        with suppress(OSError):
            line.send(b"!")
        try:
            yield
        finally:
            loop.remove_reader(line)


@asynccontextmanager
async def _counted_together(metrics: Metrics, handover: Handover | None) -> AsyncIterator[None]:
    """What this worker counts is on the page of the others, too."""
    if handover is None:
        yield
        return
    metrics.tally = Tally(Path(handover.folder), handover.worker)
    publishing = asyncio.create_task(_publish(metrics))
    try:
        yield
    finally:
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        metrics.publish()


async def _publish(metrics: Metrics) -> None:
    while True:
        try:
            await asyncio.to_thread(metrics.publish)
        except Exception:  # one page less; without this task the others would add up our last one for ever
            metrics.internal_errors.labels("task").inc()
            log.exception("metrics cannot be added up for the other workers")
        await asyncio.sleep(EVERY)


async def _retire(runner: web.AppRunner, pulse: Pulse, settings: Settings, stop: asyncio.Event) -> None:
    """Another accepts in our place. Each connection that we have ends with its next answer, all of them when the time
    to drain is over; nobody else need know that we go. Returns before when we are told to stop."""
    for site in list(runner.sites):
        await site.stop()
    pulse.retiring = True
    server = runner.server
    assert server is not None
    log.info("retiring: %d connections open", len(server.connections))
    deadline = monotonic() + settings.gateway_drain_timeout
    while (server.connections or not pulse.idle) and monotonic() < deadline:
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.05)
            return
    pulse.draining = pulse.refusing = True
    await pulse.drain(0)


async def _set_up(runner: web.AppRunner, stop: asyncio.Event) -> bool:
    """Open everything; False when we were told to stop before it was open. Raises what the opening raises."""
    setup, told = asyncio.create_task(runner.setup()), asyncio.create_task(stop.wait())
    await asyncio.wait({setup, told}, return_when=asyncio.FIRST_COMPLETED)
    if setup.done():
        told.cancel()
        await setup
        return True
    log.info("told to stop while starting")
    setup.cancel()
    await asyncio.gather(setup, return_exceptions=True)  # whatever it was about to say, nobody waits for it
    return False


async def _until_drained(pulse: Pulse, settings: Settings, again: asyncio.Event) -> None:
    """Not ready at once; what is open finishes; a second signal ends it with an error event."""
    log.info("shutting down: %d exchanges open", pulse.open_exchanges)
    pulse.draining = True
    drain = asyncio.create_task(_drain(pulse, settings))
    hurry = asyncio.create_task(again.wait())
    await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
    hurried = not drain.done()
    for task in (drain, hurry):
        task.cancel()
    await asyncio.gather(drain, hurry, return_exceptions=True)
    if hurried:
        pulse.refusing = True
        await pulse.drain(0)


async def _drain(pulse: Pulse, settings: Settings) -> None:
    # A load balancer sends requests until it has seen that we are not ready: they are served for that long. The
    # listener stays open to the end, so that what comes later is told so instead of being refused by the kernel.
    await asyncio.sleep(settings.gateway_drain_delay)
    pulse.refusing = True
    await pulse.drain(max(0.0, settings.gateway_drain_timeout - settings.gateway_drain_delay))


class _Told:
    """What signals ask of us."""

    def __init__(self, *, worker: bool) -> None:
        self.stop = asyncio.Event()
        self.retire = asyncio.Event()  # a worker: another takes our place
        self.reload = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop.set)
        loop.add_signal_handler(signal.SIGHUP, on_hangup(self.reload.set, self.stop.set))
        loop.add_signal_handler(signal.SIGUSR2, self.retire.set if worker else _cannot_be_replaced)

    async def to_go(self, reload: Callable[[], object]) -> None:
        """Returns when we are to stop or to retire; until then `reload` is called as often as we are told to."""
        while not (self.stop.is_set() or self.retire.is_set()):
            waiting = [asyncio.create_task(event.wait()) for event in (self.stop, self.retire, self.reload)]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
            if self.reload.is_set():
                self.reload.clear()
                reload()


def _cannot_be_replaced() -> None:
    log.warning("SIGUSR2 replaces workers; this is a single process, GATEWAY_WORKERS says how many there are")


def _raise_file_limit() -> None:
    """Every connection is a file, and the soft limit is 1024 where nobody set it, for programs that call select(2).
    We do not; nor does nginx with its worker_rlimit_nofile, or any program in Go (https://go.dev/issue/46279)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS: the hard limit is infinity, which it does not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_runtime() -> None:
    """aiohttp's pure-Python parser has known request smuggling: without the compiled one we do not start."""
    if os.environ.get("AIOHTTP_NO_EXTENSIONS") or http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise SettingsError("aiohttp's compiled HTTP parser is required: install aiohttp from its wheel")
    if tuple(map(int, re.findall(r"\d+", aiohttp.__version__)[:3])) < OLDEST_AIOHTTP:
        raise SettingsError(f"aiohttp {'.'.join(map(str, OLDEST_AIOHTTP))} is required, this is {aiohttp.__version__}")

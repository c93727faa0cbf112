"""The process: it starts, says where it answers, and goes when it is told, in good order."""

import asyncio
import logging
import os
import re
import signal
from collections.abc import Callable, Mapping

import aiohttp
import asyncpg
import uvloop
from aiohttp import http_parser, web

from gateway.app import make_app
from gateway.appkeys import PULSE
from gateway.connection import Runner
from gateway.embedded import EmbeddedError
from gateway.pulse import Pulse
from gateway.settings import Settings, SettingsError
from gateway.stores.migrations import MigrationError

log = logging.getLogger("gateway")

KEEPALIVE = 130.0  # seconds; longer than a load balancer's usual 60 or 120, so that it never reuses a closed connection
OLDEST_AIOHTTP = (3, 14, 5)  # a security floor: header time-out, smuggling and memory advisories are mended in it


class StartError(Exception):
    """One line that says what the gateway needs and cannot have."""


def serve(settings: Settings, environ: Mapping[str, str], ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM. `ready` is called with the address once it answers.

    Raises SettingsError, or StartError for a dependency or a port that cannot be had.
    """
    check_runtime()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, environ, ready))
    except asyncpg.ClientConfigurationError as error:
        raise SettingsError(f"DATABASE_URL: {reason(error)}") from None
    except (EmbeddedError, MigrationError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise StartError(f"cannot start: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """What an error says; its class's name if it says nothing, as a time-out does."""
    return str(error) or type(error).__name__


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


async def _serve(settings: Settings, environ: Mapping[str, str], ready: Callable[[str], None]) -> None:
    stop = _signals()
    app = make_app(settings, environ, settle=True)
    runner = make_runner(app)
    try:
        if not await _set_up(runner, stop):
            return
        site = web.TCPSite(runner, settings.host, settings.port, backlog=1024, reuse_address=True)
        await site.start()
        ready(_address(runner, settings.host))
        await stop.wait()
        stop.clear()
        await _until_drained(app[PULSE], settings, stop)
    finally:
        await runner.cleanup()


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


def _signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def _address(runner: web.AppRunner, host: str) -> str:
    port = runner.addresses[0][1]
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '::', '') else host}:{port}"


def check_runtime() -> None:
    """aiohttp's pure-Python parser has known request smuggling: without the compiled one we do not start."""
    if os.environ.get("AIOHTTP_NO_EXTENSIONS") or http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise SettingsError("aiohttp's compiled HTTP parser is required: install aiohttp from its wheel")
    if tuple(map(int, re.findall(r"\d+", aiohttp.__version__)[:3])) < OLDEST_AIOHTTP:
        raise SettingsError(f"aiohttp {'.'.join(map(str, OLDEST_AIOHTTP))} is required, this is {aiohttp.__version__}")

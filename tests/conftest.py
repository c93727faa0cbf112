"""Fixtures of all tests: real servers, one pair a process, and a fresh database for each test that asks for one.

TEST_DATABASE_URL and TEST_REDIS_URL name servers to use instead of the embedded pair; databases are created and
dropped in the one, and the databases 0 to 15 of the other are flushed.
"""

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, cast
from unittest.mock import Mock

import aioresponses as aioresponses_library
import asyncpg
import pytest
import redis as redis_library
import uvloop
from aiohttp import ClientResponse
from aiohttp.abc import AbstractStreamWriter
from redis.asyncio import Redis

from gateway.embedded import Embedded
from gateway.stores import answers, key_rows, script
from tests.support.stores import Databases, switch_off_fsync

LAYERS = {"unit", "mock", "integration"}


# --- layers -------------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wrong = [item.nodeid for item in items if len(_layers(item)) != 1]
    if wrong:
        raise pytest.UsageError("exactly one of unit, mock, integration must mark: " + ", ".join(wrong))


def _layers(item: pytest.Item) -> set[str]:
    return {mark.name for mark in item.iter_markers()} & LAYERS


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """What runs in production, but for unit tests: the guard below cannot see uvloop's sockets."""
    if "unit" in _layers(item):
        return {"asyncio": asyncio.new_event_loop}
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def no_sockets_in_unit_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "unit" not in _layers(request.node):
        return

    def refuse(*arguments: object) -> NoReturn:
        raise RuntimeError("a unit test opened a socket")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse, raising=False)


# --- time-outs ----------------------------------------------------------------------------------------------------

# What a request waits for a store at most, seconds: a promise about one that stalls.
HASTE = (
    (script, "TIMEOUT"),
    (key_rows, "HOT_ACQUIRE_TIMEOUT"),
    (key_rows, "HOT_COMMAND_TIMEOUT"),
    (answers, "HOT_ACQUIRE_TIMEOUT"),
    (answers, "HOT_COMMAND_TIMEOUT"),
    (answers, "FIND_WAIT"),
    (answers, "FIND_ACQUIRE"),
    (answers, "FIND_COMMAND"),
)
PATIENCE = 10.0  # times


@pytest.fixture(autouse=True)
def patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two test processes and their stores share two cores, and a store that waits for one for 0.1 s is not gone.

    What is about these promises is marked `haste`, and has them as they are.
    """
    if request.node.get_closest_marker("haste") is None:
        for module, name in HASTE:
            monkeypatch.setattr(module, name, PATIENCE * getattr(module, name))


# --- figures ------------------------------------------------------------------------------------------------------


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Prints a line under "figures" at the end of the run; what a test prints itself is lost in xdist's workers."""
    return lambda line: record_property("figure", line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = [
        line
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, line in report.user_properties
        if name == "figure"
    ]
    if lines:
        terminalreporter.section("figures")
        terminalreporter.write_line("\n".join(sorted(lines)))


# --- servers ------------------------------------------------------------------------------------------------------


class Servers(NamedTuple):
    database_url: str
    redis_url: str  # without a database number


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """One Postgres and one Valkey for all tests of this process; the databases in them are not for tests' use."""
    database_url, redis_url = os.environ.get("TEST_DATABASE_URL", ""), os.environ.get("TEST_REDIS_URL", "")
    folder = tmp_path_factory.mktemp("servers")
    embedded = Embedded(folder, postgres=not database_url, redis=not redis_url)
    embedded.start()
    if embedded.database_url:
        switch_off_fsync(embedded.database_url)
    try:
        yield Servers(database_url or embedded.database_url, redis_url or embedded.redis_url)
    finally:
        embedded.stop()
        shutil.rmtree(folder)  # pytest keeps the folders of three runs


@pytest.fixture(scope="session")
def databases(servers: Servers) -> Iterator[Databases]:
    databases = Databases(servers.database_url, f"aig_test_{os.getpid()}")
    yield databases
    databases.close()


@pytest.fixture
def database_url(databases: Databases) -> Iterator[str]:
    """A fresh database with all migrations applied and no rows."""
    with databases.fresh() as url:
        yield url


@pytest.fixture
def empty_database_url(databases: Databases) -> Iterator[str]:
    """A fresh database without a table in it."""
    with databases.fresh(migrated=False) as url:
        yield url


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(database_url, min_size=1, max_size=10, command_timeout=10) as pool:
        yield pool


@pytest.fixture
def redis_url(servers: Servers, worker_id: str) -> str:
    """An empty Redis database. Each xdist worker has its own, also on a shared server."""
    number = int(worker_id.removeprefix("gw") or 0) % 16 if worker_id != "master" else 0
    url = f"{servers.redis_url}{'&' if '?' in servers.redis_url else '?'}db={number}"
    with redis_library.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


# --- small JSON answers -------------------------------------------------------------------------------------------


class AnsweredResponse(ClientResponse):
    """aiohttp 3.14 wants the writer of the request's body, and aioresponses 0.7.9 has none to give."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        writer = Mock(spec=AbstractStreamWriter, output_size=0)
        super().__init__(*arguments, **{"stream_writer": writer, **keywords})


class aioresponses(aioresponses_library.aioresponses):
    def add(self, *arguments: Any, **keywords: Any) -> None:
        super().add(*arguments, **{"response_class": AnsweredResponse, **keywords})


@pytest.fixture
def provider_answers() -> Iterator[aioresponses]:
    """aioresponses, for answers under 128 KiB that are not streamed; requests to 127.0.0.1 pass through."""
    with aioresponses(passthrough=["http://127.0.0.1"]) as answers:
        yield cast(aioresponses, answers)

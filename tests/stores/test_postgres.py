import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest
from asyncpg import exceptions as pg

from gateway.databases import connect_database
from gateway.protocol.errors import Unavailable
from gateway.stores.postgres import HOT_ACQUIRE_TIMEOUT, HOT_COMMAND_TIMEOUT, connection, database_errors, kind_of

if TYPE_CHECKING:
    from tests.conftest import Servers

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(),
        FileNotFoundError("no socket"),
        TimeoutError(),
        pg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        pg.CannotConnectNowError("the database system is starting up"),
        pg.AdminShutdownError("terminating connection"),
        pg.QueryCanceledError("statement timeout"),
        pg.TooManyConnectionsError("sorry, too many clients already"),
        pg.DiskFullError("no space left"),
        pg.DeadlockDetectedError("deadlock"),
        pg.InvalidPasswordError("rotated"),
        pg.ReadOnlySQLTransactionError("standby"),
        pg.ObjectNotInPrerequisiteStateError("the database is not currently accepting connections"),
        pg.LockNotAvailableError("canceling statement due to lock timeout"),
        asyncpg.InternalClientError("cannot switch to state 15; another operation (2) is in progress"),
        asyncpg.TargetServerAttributeNotMatched("none of the hosts match the target attribute requirement"),
        asyncpg.InterfaceError("pool is closed"),
        asyncpg.InterfaceError("cannot perform operation: connection is closed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_outage_is_unavailable_and_says_when_to_come_back(error: Exception) -> None:
    with pytest.raises(Unavailable) as caught, database_errors():
        raise error
    assert (caught.value.error_code, caught.value.retry_after) == ("database_unavailable", 1)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TimeoutError(), "timeout"),
        (ConnectionRefusedError(), "connection"),
        (pg.ConnectionDoesNotExistError(""), "connection"),
        (asyncpg.InterfaceError("pool is closed"), "connection"),
        (pg.AdminShutdownError(""), "shutdown"),
        (pg.ReadOnlySQLTransactionError(""), "readonly"),
        (pg.TooManyConnectionsError(""), "resources"),
        (pg.DeadlockDetectedError(""), "conflict"),
        (pg.UndefinedTableError(""), "error"),
    ],
)
def test_what_was_wrong_is_said_in_a_word_also_of_an_outage_that_was_made_of_it(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind
    if kind != "error":
        with pytest.raises(Unavailable) as caught, database_errors():
            raise error
        assert kind_of(caught.value) == kind


def test_a_look_up_that_a_completion_waits_for_takes_half_a_second_at_most() -> None:
    assert HOT_ACQUIRE_TIMEOUT + HOT_COMMAND_TIMEOUT <= 0.5


@pytest.mark.parametrize(
    "error",
    [
        pg.UniqueViolationError("duplicate"),
        pg.UndefinedTableError("no such table"),
        pg.CharacterNotInRepertoireError("NUL"),
        asyncpg.InterfaceError("the server expects 1 argument for this query, 2 were passed"),
        pg.DataError("invalid input"),
        ValueError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_fault_of_ours_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, database_errors():
        raise error
    assert caught.value is error


async def test_a_connection_serves_and_goes_back(pool: asyncpg.Pool) -> None:
    async with connection(pool) as borrowed:
        assert await borrowed.fetchval("select 1") == 1
    assert pool.get_idle_size() == pool.get_size()


async def test_a_connection_goes_back_without_a_word_to_the_server(database_url: str, servers: "Servers") -> None:
    pool = await connect_database(database_url)
    admin = await asyncpg.connect(servers.database_url)
    try:
        async with connection(pool) as borrowed:
            served = await borrowed.fetchval("select pg_backend_pid()")
        said = await admin.fetchval("select query from pg_stat_activity where pid = $1", served)
        assert said == "select pg_backend_pid()"
    finally:
        await admin.close()
        await pool.close()


async def test_a_transaction_that_somebody_left_open_is_rolled_back(database_url: str) -> None:
    pool = await connect_database(database_url)
    try:
        async with connection(pool) as borrowed:
            served = await borrowed.fetchval("select pg_backend_pid()")
            await borrowed.execute("begin; set local work_mem = '64MB'; create table left_open ()")
        async with connection(pool) as borrowed:
            assert await borrowed.fetchval("select pg_backend_pid()") == served
            assert not borrowed.is_in_transaction()
            assert await borrowed.fetchval("select to_regclass('left_open')") is None
            assert await borrowed.fetchval("show work_mem") != "64MB"
    finally:
        await pool.close()


async def test_a_closed_pool_is_unavailable(pool: asyncpg.Pool) -> None:
    await pool.close()
    with pytest.raises(Unavailable):
        async with connection(pool):
            raise AssertionError("there was a connection")


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    pool = await asyncpg.create_pool(host="127.0.0.1", port=1, user="x", password="x", database="x", min_size=0)
    with pytest.raises(Unavailable):
        async with connection(pool):
            raise AssertionError("there was a connection")


async def test_a_database_that_takes_no_connections_now_is_unavailable(servers: "Servers", database_url: str) -> None:
    admin = await asyncpg.connect(servers.database_url)
    await admin.execute(f"alter database {urlsplit(database_url).path[1:]} with allow_connections false")
    await admin.close()
    async with asyncpg.create_pool(database_url, min_size=0) as pool:
        with pytest.raises(Unavailable) as caught:
            async with connection(pool):
                raise AssertionError("there was a connection")
    assert isinstance(caught.value.__cause__, pg.ObjectNotInPrerequisiteStateError)


async def test_a_pool_that_is_all_taken_is_waited_for_no_longer_than_its_time(database_url: str) -> None:
    async with asyncpg.create_pool(database_url, min_size=1, max_size=1) as pool, connection(pool):
        started = time.monotonic()
        with pytest.raises(Unavailable):
            async with connection(pool, HOT_ACQUIRE_TIMEOUT):
                raise AssertionError("there was a second connection")
        assert HOT_ACQUIRE_TIMEOUT * 0.9 < time.monotonic() - started < HOT_ACQUIRE_TIMEOUT + 0.5


async def test_a_connection_that_the_server_ended_does_not_stay_in_the_pool(pool: asyncpg.Pool) -> None:
    with pytest.raises(Unavailable):
        async with connection(pool) as borrowed:
            await borrowed.fetchval("select pg_terminate_backend(pg_backend_pid())")
    async with connection(pool) as borrowed:
        assert await borrowed.fetchval("select 1") == 1


async def test_a_time_out_on_a_connection_that_was_lost_meanwhile_is_unavailable(pool: asyncpg.Pool) -> None:
    with pytest.raises(Unavailable):
        async with connection(pool) as borrowed:
            with pytest.raises(asyncpg.PostgresError):
                await borrowed.execute("select pg_terminate_backend(pg_backend_pid())")
            with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
                async with asyncio.timeout(5):
                    while True:
                        borrowed.is_closed()
                        await asyncio.sleep(0.001)
            raise TimeoutError


async def test_connections_that_the_server_ends_at_any_moment_are_unavailable_and_leave_a_pool_that_serves(
    pool: asyncpg.Pool, servers: "Servers", database_url: str
) -> None:
    """Between two steps of asyncpg's own as well, after a time-out, in the middle of a transaction."""
    ended = asyncio.Event()
    causes: Counter[type[BaseException | None]] = Counter()

    async def ask(timeout: float) -> None:
        while not ended.is_set():
            try:
                async with connection(pool) as borrowed, borrowed.transaction():
                    await borrowed.fetchval("select 1", timeout=1)
                    await borrowed.fetchval("select pg_sleep(0.001)", timeout=timeout)
            except Unavailable as error:
                causes[type(error.__cause__)] += 1

    admin = await asyncpg.connect(servers.database_url)
    asking = asyncio.gather(*(ask(timeout) for timeout in (1, 0.001) * 10))
    for _ in range(20):
        await asyncio.sleep(0.05)
        await admin.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1", urlsplit(database_url).path[1:]
        )
    ended.set()
    await asking
    await admin.close()
    assert len(causes) > 1
    for _ in range(50):
        async with connection(pool) as borrowed:
            assert await borrowed.fetchval("select 1") == 1


async def test_a_server_that_falls_silent_costs_no_more_than_the_time_outs(database_url: str) -> None:
    async with Link.to(database_url) as link:
        pool = await asyncpg.create_pool(link.url, min_size=1, max_size=1)
        try:
            link.stalled = True
            started = time.monotonic()
            with pytest.raises(Unavailable):
                async with connection(pool, HOT_ACQUIRE_TIMEOUT) as borrowed:
                    await borrowed.fetchval("select 1", timeout=HOT_COMMAND_TIMEOUT)
            assert time.monotonic() - started < HOT_ACQUIRE_TIMEOUT + HOT_COMMAND_TIMEOUT + 0.35
            link.stalled = False
            async with connection(pool) as borrowed:
                assert await borrowed.fetchval("select 1", timeout=HOT_COMMAND_TIMEOUT) == 1
        finally:
            pool.terminate()


class Link:
    """A TCP connection to the database's server that can fall silent without closing."""

    stalled = False
    url = ""

    @classmethod
    @asynccontextmanager
    async def to(cls, database_url: str) -> AsyncIterator["Link"]:
        link, parts = cls(), urlsplit(database_url)
        folder = parse_qs(parts.query).get("host", [""])[0]
        tasks: set[asyncio.Task[None]] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if folder:
                upstream = await asyncio.open_unix_connection(f"{folder}/.s.PGSQL.{parts.port or 5432}")
            else:
                upstream = await asyncio.open_connection(parts.hostname, parts.port or 5432)
            for source, sink in ((reader, upstream[1]), (upstream[0], writer)):
                tasks.add(asyncio.create_task(link._copy(source, sink)))

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        user = parts.netloc.rpartition("@")[0] or "postgres"
        link.url = f"postgresql://{user}@127.0.0.1:{port}{parts.path}?sslmode=disable"
        try:
            yield link
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                while self.stalled:
                    await asyncio.sleep(0.01)
                sink.write(data)
        finally:
            sink.close()

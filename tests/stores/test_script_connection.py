import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.connection import Connection

from gateway.stores.script import connect_redis
from gateway.stores.script_connection import ScriptConnection, open_connection
from tests.support.proxy import Proxy
from tests.support.valkey import Valkey, valkey

pytestmark = pytest.mark.integration

SCRIPT = b"redis.call('INCR', 'calls') return table.concat(ARGV, ',')"
# Ciphers that need no certificate.
ANONYMOUS = "AECDH-AES256-SHA:@SECLEVEL=0"


@pytest.fixture
def server() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


async def command(redis: Any, words: str) -> Any:
    """For what redis-py types loosely, or not at all."""
    return await redis.execute_command(*words.split())


async def asked(connection: ScriptConnection, argument: bytes) -> bytes | Exception:
    answer: asyncio.Future[bytes | Exception] = asyncio.get_running_loop().create_future()
    connection.call(argument, answer.set_result)
    return await asyncio.wait_for(answer, 5)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[ScriptConnection]:
    async with connect_redis(url) as redis:
        connection = await open_connection(redis, SCRIPT)
        try:
            yield connection
        finally:
            await connection.close()


# --- what an address can say --------------------------------------------------------------------------------------


@asynccontextmanager
async def listener(server: Valkey, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A port that leads to it."""
    proxy = Proxy(server.url.removeprefix("unix://"))
    listener = await asyncio.start_server(proxy._accept, "127.0.0.1", 0, ssl=context)
    async with listener:
        yield listener.sockets[0].getsockname()[1]
    await proxy.cut()


async def works(url: str, database: int) -> None:
    async with connected(url) as connection:
        assert (await asked(connection, b"first")).endswith(b",new,first")  # type: ignore[union-attr]
        assert (await asked(connection, b"second")).endswith(b",,second")  # type: ignore[union-attr]
    async with connect_redis(url) as redis:
        assert int(await redis.get("calls") or 0) == 2
        assert redis.connection_pool.connection_kwargs.get("db", 0) == database


async def test_a_socket_with_a_password_and_a_database(server: Valkey) -> None:
    async with connect_redis(server.url) as redis:
        await redis.config_set("requirepass", "secret")
    await works(f"{server.url}?password=secret&db=3", 3)


async def test_an_address_with_a_user_and_a_database(server: Valkey) -> None:
    async with connect_redis(server.url) as redis:
        await command(redis, "ACL SETUSER gateway on >secret ~* &* +@all")
        await command(redis, "ACL SETUSER default off")
    async with listener(server) as port:
        await works(f"redis://gateway:secret@127.0.0.1:{port}/2", 2)
        async with connect_redis(f"redis://gateway:wrong@127.0.0.1:{port}/2?socket_connect_timeout=5") as redis:
            with pytest.raises(exceptions.AuthenticationError):
                await open_connection(redis, SCRIPT)


async def test_tls(server: Valkey) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(ANONYMOUS)
    async with listener(server, context) as port:
        await works(
            f"rediss://127.0.0.1:{port}/1?ssl_cert_reqs=none&ssl_ciphers={ANONYMOUS}&socket_connect_timeout=5", 1
        )
        async with connect_redis(f"rediss://127.0.0.1:{port}/1?socket_connect_timeout=5") as redis:
            with pytest.raises(exceptions.ConnectionError):
                await open_connection(redis, SCRIPT)


@pytest.mark.parametrize("option", ["decode_responses=true", "protocol=3", "client_name=gateway"])
async def test_options_of_the_client_library(server: Valkey, option: str) -> None:
    await works(f"{server.url}?{option}", 0)


async def test_an_answer_longer_than_a_read(server: Valkey) -> None:
    async with connected(server.url) as connection:
        argument = b"0123456789abcdef" * 2**16
        assert (await asked(connection, argument)).endswith(argument)  # type: ignore[union-attr]


# --- what goes wrong ----------------------------------------------------------------------------------------------


async def test_what_redis_refuses_is_told_as_the_library_would_raise_it(server: Valkey) -> None:
    async with connected(server.url) as connection, connect_redis(server.url) as redis:
        await asked(connection, b"")
        await redis.script_flush()
        assert isinstance(await asked(connection, b""), exceptions.NoScriptError)
        await command(redis, "REPLICAOF 127.0.0.1 1")
        assert isinstance(await asked(connection, b""), exceptions.ResponseError)
        assert connection.is_open


async def test_a_connection_that_ends_while_it_is_asked_says_so_and_one_that_rests_knows_it(server: Valkey) -> None:
    async with connected(server.url) as asking, connected(server.url) as resting:
        server.kill()
        error = await asked(asking, b"")
        assert isinstance(error, exceptions.ConnectionError | OSError)
        assert not asking.is_open
        while resting.is_open:
            await asyncio.sleep(0)


async def test_it_knows_how_far_the_clock_of_redis_is_from_ours(
    server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(server.url) as connection:
        assert abs(connection.ahead) < 1
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    async with connected(server.url) as connection:
        assert abs(connection.ahead - 3600) < 1


async def test_nobody_is_told_after_it_was_aborted(server: Valkey) -> None:
    async with connected(server.url) as connection, connect_redis(server.url) as redis:
        answers: list[bytes | Exception] = []
        connection.call(b"", answers.append)
        connection.abort()
        await redis.ping()
        assert not answers and not connection.is_open


# --- what it reads ------------------------------------------------------------------------------------------------


class Transport:
    """What the connection does to one."""

    def __init__(self) -> None:
        self.aborted = False

    def get_protocol(self) -> asyncio.Protocol:
        return asyncio.Protocol()

    def set_protocol(self, protocol: asyncio.Protocol) -> None:
        pass

    def write(self, data: bytes) -> None:
        pass

    def abort(self) -> None:
        self.aborted = True


def reading() -> tuple[ScriptConnection, Transport, list[Any]]:
    """A connection that was asked something, and what it tells."""
    transport, told = Transport(), list[Any]()
    opened = cast(Connection, SimpleNamespace(_writer=SimpleNamespace(transport=transport)))
    connection = ScriptConnection(opened, SCRIPT, b"run")
    connection.call(b"", told.append)
    return connection, transport, told


ANSWERS: dict[bytes, Callable[[Any], bool]] = {
    b"$5\r\n1\r\n23\r\n": lambda answer: answer == b"1\r\n23",
    b"$0\r\n\r\n": lambda answer: answer == b"",
    b"-NOSCRIPT No matching script.\r\n": lambda answer: isinstance(answer, exceptions.NoScriptError),
    b"-OOM command not allowed\r\n": lambda answer: isinstance(answer, exceptions.OutOfMemoryError),
    b"-LOADING \xff\r\n": lambda answer: isinstance(answer, exceptions.BusyLoadingError),
}


@pytest.mark.parametrize("sent", ANSWERS)
def test_an_answer_is_the_same_however_it_is_cut(sent: bytes) -> None:
    for first in range(1, len(sent) - 1):
        for second in range(first + 1, len(sent)):
            connection, transport, told = reading()
            for part in (sent[:first], sent[first:second], sent[second:]):
                assert not told
                connection.data_received(part)
            assert len(told) == 1 and ANSWERS[sent](told[0]) and connection.is_open and not transport.aborted


@pytest.mark.parametrize(
    "sent",
    [b"+OK\r\n", b":1\r\n", b"*1\r\n$1\r\na\r\n", b"$-1\r\n", b"$x\r\n", b"$1\r\na\r\n$", b"-A\r\n-B\r\n", b"\r\n"],
)
def test_what_is_no_answer_ends_the_connection(sent: bytes) -> None:
    connection, transport, told = reading()
    connection.data_received(sent)
    assert [type(answer) for answer in told] == [exceptions.InvalidResponse]
    assert not connection.is_open and transport.aborted


def test_what_nobody_asked_for_ends_the_connection() -> None:
    connection, transport, told = reading()
    connection.data_received(b"$1\r\na\r\n")
    connection.data_received(b"-ERR max number of clients reached\r\n")
    assert told == [b"a"] and not connection.is_open and transport.aborted


async def test_a_server_that_says_more_than_it_was_asked_is_not_connected_to() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            writer.write(b"$3\r\nabc\r\n" * 9)  # one read may hold several of redis-py's commands

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as listener:
        redis: Redis = connect_redis(f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
        async with redis:
            with pytest.raises(exceptions.InvalidResponse):
                await open_connection(redis, SCRIPT)

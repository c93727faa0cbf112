"""How a process comes by its Postgres and its Redis, wherever they are."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

import asyncpg
from redis.asyncio import Redis

from gateway.protocol.errors import Unavailable
from gateway.settings import SettingsError
from gateway.stores.migrations import migrate
from gateway.stores.script import connect_redis

log = logging.getLogger("gateway")

DATABASE_WAIT = 30.0  # seconds that a start waits for Postgres: in a new stack both come up together


async def connect_database(url: str, wait: float = DATABASE_WAIT) -> asyncpg.Pool:
    """A pool on a migrated database. Waits for a server that is still coming up; raises what the last try did."""

    async def connect() -> asyncpg.Pool:
        await migrate(url)
        return await _open_pool(url)

    return await patiently(connect, wait)


# What a server says that starts, stops or is started again; the last is our own word for it.
_COMING_UP = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    Unavailable,
)

T = TypeVar("T")


async def patiently(ask: Callable[[], Awaitable[T]], wait: float = DATABASE_WAIT) -> T:
    """What Postgres answers, as soon as it does."""
    deadline = asyncio.get_running_loop().time() + wait
    while True:
        try:
            return await ask()
        except _COMING_UP as error:
            if asyncio.get_running_loop().time() > deadline:
                raise
            log.warning("waiting for Postgres: %s", type(error).__name__)
            await asyncio.sleep(0.5)


async def _open_pool(url: str) -> asyncpg.Pool:
    return await asyncpg.create_pool(
        url,
        min_size=3,  # usage rows and upkeep have one each, and a look-up of a key does not wait for a new one
        max_size=10,
        timeout=5,
        # asyncio.wait_for does not end a query on a stalled server; asyncpg's own time-out does.
        command_timeout=5,
        server_settings={"application_name": "ai-gateway"},
        reset=_keep_as_it_is,
    )


async def _keep_as_it_is(connection: object) -> None:
    """What a connection goes through on its way back into the pool.

    asyncpg itself sees to transactions that are still open, and statements that were given up. What else it would send
    (`reset all`, `unlisten`, `close all`, `pg_advisory_unlock_all`) is a round trip, a quarter of what a look-up costs.
    Nobody needs it: we `set local`, have no cursors, and end a connection that may hold the lock of a session.
    """


async def close_database(pool: asyncpg.Pool) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(5):
            await pool.close()


def open_redis(url: str) -> Redis:
    """A client of Redis, not connected yet. Raises SettingsError for an option that it does not know."""
    try:
        redis = connect_redis(url)
        redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # it complains here, or at a request
    except (TypeError, ValueError):
        raise SettingsError("REDIS_URL: what follows the `?` is no option of Redis, or has a wrong value") from None
    return redis


def reason(error: BaseException) -> str:
    """What an error says; its class's name if it says nothing, as a time-out does."""
    return str(error) or type(error).__name__

"""Where a request meets what may fail: each call there is counted, and the Nth fails as the real thing does.

In the manner of SQLite's anomaly tests (https://www.sqlite.org/testing.html, "Anomaly Testing"): run a thing again and
again with its first, second, third … call at a seam failing, until it runs through without meeting the fault.
"""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
from aiohttp import web
from aiohttp.typedefs import Handler
from asyncpg.connection import Connection as PostgresConnection
from asyncpg.pool import Pool as PostgresPool
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection as RedisConnection

from gateway import client, http1, middlewares, pool
from gateway.stores import journal, script_connection

# How the calls at each seam fail. "late": it was done, and nobody hears of it.
SEAMS: Mapping[str, tuple[str, ...]] = {
    "script": ("cut", "late", "silent", "readonly", "loading"),
    "redis": ("refused", "timeout", "cut", "oom"),
    "acquire": ("refused", "timeout"),
    "postgres": ("cut", "late", "timeout", "deadlock", "shutdown", "full"),
    "connect": ("refused",),
    "send": ("reset",),
    "read": ("reset", "late"),
    "write": ("reset", "late"),
    "journal": ("full", "broken", "short"),
    "open": ("full", "broken"),
    "sync": ("broken",),
    "request": ("leaves", "late"),
}

_SPARED = ContextVar("_SPARED", default=False)


class Seams:
    """One fault at a time: `arm` it, run, and look at `met`. `install` before the application is made."""

    def __init__(self) -> None:
        self.met = True  # the armed fault has happened
        self._seam = self._how = ""
        self._left = 0  # calls until it does

    def arm(self, seam: str, how: str, number: int) -> None:
        self.met, self._seam, self._how, self._left = False, seam, how, number

    def disarm(self) -> None:
        self.met = True

    @contextmanager
    def spared(self) -> Iterator[None]:
        """What the test itself asks meanwhile does not fail, nor does it count."""
        token = _SPARED.set(True)
        try:
            yield
        finally:
            _SPARED.reset(token)

    def due(self, seam: str) -> str:
        """How this call is to fail; "": it is not."""
        if self.met or seam != self._seam or _SPARED.get():
            return ""
        self._left -= 1
        self.met = self._left == 0
        return self._how if self.met else ""

    def install(self, patch: pytest.MonkeyPatch) -> None:
        self._install_redis(patch)
        self._install_postgres(patch)
        self._install_upstream(patch)
        self._install_client(patch)
        self._install_journal(patch)

    # --- Redis

    def _install_redis(self, patch: pytest.MonkeyPatch) -> None:
        connection = script_connection.ScriptConnection
        call = connection.call

        def failing(self_: Any, argument: bytes, told: script_connection.Told) -> None:
            how = self.due("script")
            if how in _REFUSALS:
                asyncio.get_running_loop().call_soon(told, _REFUSALS[how])
            elif how:
                call(self_, argument, _OUTCOMES[how](self_, told))
                if how == "cut":
                    self_._transport.abort()
            else:
                call(self_, argument, told)

        patch.setattr(connection, "call", failing)
        for name in ("connect", "send_packed_command", "read_response"):
            self._wrap(patch, RedisConnection, name, "redis", _REDIS)

    # --- Postgres

    def _install_postgres(self, patch: pytest.MonkeyPatch) -> None:
        self._wrap(patch, PostgresPool, "_acquire", "acquire", _ACQUIRE)
        for name in ("execute", "fetch", "fetchrow", "fetchval", "executemany"):
            self._wrap(patch, PostgresConnection, name, "postgres", _POSTGRES)

    def _wrap(
        self, patch: pytest.MonkeyPatch, cls: Any, name: str, seam: str, errors: Mapping[str, Callable[[], Exception]]
    ) -> None:
        """Errors that end a connection end it."""
        method: Callable[..., Awaitable[Any]] = getattr(cls, name)

        async def failing(self_: Any, *arguments: Any, **keywords: Any) -> Any:
            how = self.due(seam)
            if not how:
                return await method(self_, *arguments, **keywords)
            if how == "late":
                await method(self_, *arguments, **keywords)
            if how in _ENDING and hasattr(self_, "terminate"):
                self_.terminate()
            elif arguments == ("commit",):  # what a server refuses to commit it has rolled back
                await method(self_, "rollback", **keywords)
            raise errors[how]()

        patch.setattr(cls, name, failing)

    # --- the provider

    def _install_upstream(self, patch: pytest.MonkeyPatch) -> None:
        connected, connection = pool._connected, http1.Connection
        send, received = connection.send, connection.data_received

        async def failing_connect(*arguments: Any) -> Any:
            if self.due("connect"):
                raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
            return await connected(*arguments)

        def failing_send(self_: Any, *arguments: Any) -> None:
            how = self.due("send")
            send(self_, *arguments)
            if how:
                self_._transport.abort()

        def failing_read(self_: Any, data: bytes) -> None:
            how = self.due("read")
            if how != "reset":
                received(self_, data)
            if how:
                self_._transport.abort()

        patch.setattr(pool, "_connected", failing_connect)
        patch.setattr(connection, "send", failing_send)
        patch.setattr(connection, "data_received", failing_read)

    # --- the client

    def _install_client(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("write", "_write"):
            write: Callable[..., None] = getattr(client.Client, name)
            patch.setattr(client.Client, name, self._failing_write(write))
        patch.setattr(middlewares, "errors", self._leaving(middlewares.errors))

    def _failing_write(self, write: Callable[..., None]) -> Callable[..., None]:
        def failing(self_: Any, data: bytes) -> None:
            how = self.due("write")
            transport = self_._connection.transport
            if how == "reset" and transport is not None:
                transport.abort()
            write(self_, data)
            if how == "late" and transport is not None:
                transport.abort()

        return failing

    def _leaving(self, handler_of: Callable[..., Awaitable[web.StreamResponse]]) -> Callable[..., Any]:
        @web.middleware
        async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
            answer: web.StreamResponse = await _Stepped(
                handler_of(request, handler), lambda future: self._step(request, future)
            )
            return answer

        return errors

    def _step(self, request: web.Request, future: Any) -> None:
        """The request is about to wait: its client leaves now, or in the turn in which what it waits for is there."""
        how = self.due("request")
        if how == "leaves" or (how and future is None):
            _leave(request)
        elif how:
            task = asyncio.current_task()
            assert task is not None
            future.add_done_callback(lambda _: _leave(request))
            future.add_done_callback(lambda _: task.cancel())

    # --- the disk

    def _install_journal(self, patch: pytest.MonkeyPatch) -> None:
        def write(file: int, data: bytes) -> int:
            how = self.due("journal")
            if how == "short":
                return os.write(file, data[: len(data) // 2])
            if how:
                raise _DISK[how]()
            return os.write(file, data)

        def opened(*arguments: Any) -> int:
            how = self.due("open")
            if how:
                raise _DISK[how]()
            return os.open(*arguments)

        def fdatasync(file: int) -> None:
            if self.due("sync"):
                raise _DISK["broken"]()
            os.fdatasync(file)

        patched = SimpleNamespace(**{**vars(os), "write": write, "open": opened})
        patch.setattr(journal, "os", patched)
        made = journal.Journal.__init__

        def make(self_: Any, *arguments: Any, **keywords: Any) -> None:
            made(self_, *arguments, **{"fdatasync": fdatasync, **keywords})

        patch.setattr(journal.Journal, "__init__", make)


class _Stepped:
    """Awaits a coroutine, and calls `step` with what it waits for each time before it waits."""

    def __init__(self, coroutine: Awaitable[Any], step: Callable[[Any], None]) -> None:
        self._coroutine = coroutine
        self._step = step

    def __await__(self) -> Generator[Any, Any, Any]:
        running = self._coroutine.__await__()
        error: BaseException | None = None
        while True:
            try:
                future = running.send(None) if error is None else running.throw(error)
            except StopIteration as returned:
                return returned.value
            self._step(future)
            error = None
            try:
                yield future
            except BaseException as thrown:  # whatever it is, it is the coroutine's
                error = thrown


def _leave(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _ended(connection: script_connection.ScriptConnection) -> Exception:
    connection.abort()
    return ConnectionResetError(errno.ECONNRESET, "reset")


# --- what the real things raise -----------------------------------------------------------------------------------

_REFUSALS: Mapping[str, Exception] = {
    "readonly": redis_errors.ReadOnlyError("You can't write against a read only replica."),
    "loading": redis_errors.BusyLoadingError("Redis is loading the dataset in memory"),
}

# What a call of the script comes to, by how it fails.
_OUTCOMES: Mapping[str, Callable[[Any, script_connection.Told], script_connection.Told]] = {
    "cut": lambda connection, told: told,
    "silent": lambda connection, told: lambda answer: None,
    "late": lambda connection, told: lambda answer: told(_ended(connection)),
}

_REDIS: Mapping[str, Callable[[], Exception]] = {
    "refused": lambda: redis_errors.ConnectionError("Error 111 connecting to Redis"),
    "timeout": lambda: redis_errors.TimeoutError("Timeout reading from Redis"),
    "cut": lambda: ConnectionResetError(errno.ECONNRESET, "reset"),
    "oom": lambda: redis_errors.OutOfMemoryError("command not allowed when used memory > 'maxmemory'"),
}

_ACQUIRE: Mapping[str, Callable[[], Exception]] = {
    "refused": lambda: ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
    "timeout": TimeoutError,
}

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_POSTGRES: Mapping[str, Callable[[], Exception]] = {
    "cut": lambda: asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
    "late": lambda: asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
    "timeout": TimeoutError,
    "deadlock": lambda: asyncpg.DeadlockDetectedError("deadlock detected"),
    "shutdown": lambda: asyncpg.AdminShutdownError("terminating connection due to administrator command"),
    "full": lambda: asyncpg.DiskFullError("could not extend file"),
}
_ENDING = frozenset({"cut", "late", "shutdown"})

_DISK: Mapping[str, Callable[[], Exception]] = {
    "full": lambda: OSError(errno.ENOSPC, "no space left on device"),
    "broken": lambda: OSError(errno.EIO, "input/output error"),
}

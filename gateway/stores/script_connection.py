"""A connection to Redis that runs one script; a call of it is one write and one callback.

redis-py opens it: it knows what an address can say, passwords, TLS, databases. From then on the transport is ours. A
call of redis-py's client costs 66 µs of CPU, on a connection that it keeps for us 27, and here 9, of which the kernel
takes 6. https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

import asyncio
import hashlib
import re
import time
from collections.abc import Callable
from typing import cast

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.connection import Connection, DefaultParser

Told = Callable[[bytes | Exception], None]

_RUN_ID = re.compile(rb"^run_id:(\w+)", re.MULTILINE)
_CLOCK = re.compile(rb"^server_time_usec:(\d+)", re.MULTILINE)


class ScriptConnection(asyncio.Protocol):
    """Made by `open_connection`. Whoever has it closes it, also when it was lost."""

    def __init__(self, opened: Connection, script: bytes, run_id: bytes, ahead: float = 0.0) -> None:
        # redis-py has no public name for its writer, which closes the transport when it is collected: we keep both.
        assert opened._writer is not None
        self._opened = opened
        self._transport = opened._writer.transport
        self._former = cast(asyncio.Protocol, self._transport.get_protocol())  # redis-py's, which waits for the end
        self._transport.set_protocol(self)
        sha = hashlib.sha1(script, usedforsecurity=False).hexdigest().encode()  # the name that EVALSHA knows it by
        self._head = _head(b"EVAL", script, b"0", run_id, b"new")
        self._later_head = _head(b"EVALSHA", sha, b"0", run_id, b"")
        self.ahead = ahead  # seconds that Redis's clock was, of ours, when it was opened
        self._told: Told | None = None  # of the call under way
        self._unread = b""
        self.is_open = True

    def call(self, argument: bytes, told: Told) -> None:
        """Runs the script with the server's run id, "new" in the first call and later nothing, and the argument.

        `told` gets its answer, which is one string, or an exception: Redis's, or why there is no answer. It is not
        called after `abort` and `close`. One call at a time.
        """
        self._told = told
        self._transport.write(b"%b$%d\r\n%b\r\n" % (self._head, len(argument), argument))
        self._head = self._later_head

    def abort(self) -> None:
        """At once."""
        self.is_open, self._told = False, None
        self._transport.abort()

    async def close(self) -> None:
        self.abort()
        await self._opened.disconnect()

    # --- called by the transport ---

    def data_received(self, data: bytes) -> None:
        self._unread += data
        try:
            answer = self._answer()
        except ValueError:
            self._lose(exceptions.InvalidResponse("what Redis sent is no answer to the script"))
            return
        if answer is not None and self._told is not None:
            told, self._told, self._unread = self._told, None, b""
            try:
                told(answer)
            except BaseException:
                self.is_open = False  # a transport ends when its protocol raises
                raise

    def eof_received(self) -> None:
        self._lose(exceptions.ConnectionError("closed by Redis"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._former.connection_lost(None)
        self._lose(exc or exceptions.ConnectionError("closed"))

    def _answer(self) -> bytes | Exception | None:
        """None: it is not whole yet. Raises ValueError for what was not asked for, or is neither string nor error."""
        data = self._unread
        if self._told is None or data[:1] not in (b"$", b"-"):
            raise ValueError
        end = data.find(b"\r\n")
        if end < 0:
            return None
        first = end + 2
        if data[:1] == b"-" and len(data) == first:
            return cast(Exception, DefaultParser.parse_error(data[1:end].decode("utf-8", "replace")))  # type: ignore[no-untyped-call]
        size = first + int(data[1:end]) + 2
        if not first + 2 <= size >= len(data):
            raise ValueError
        return data[first:-2] if size == len(data) else None

    def _lose(self, error: Exception) -> None:
        told = self._told
        self.abort()
        if told is not None:
            told(error)


def _head(*words: bytes) -> bytes:
    """A command but for its last word."""
    return b"*%d\r\n" % (len(words) + 1) + b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])


async def open_connection(redis: Redis, script: bytes) -> ScriptConnection:
    """A new one, outside of the client's pool. Raises what redis-py does."""
    opened: Connection = redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    opened.socket_connect_timeout = opened.socket_timeout  # the script's own is shorter, but for its first
    try:
        await opened.connect()  # type: ignore[no-untyped-call]
        asked = time.time()
        await opened.send_command("INFO", "server")
        about = await opened.read_response(disable_decoding=True)
        found, clock = _RUN_ID.search(about), _CLOCK.search(about)
        ahead = int(clock[1]) / 1e6 - (asked + time.time()) / 2 if clock else 0.0
        if await opened.can_read():
            raise exceptions.InvalidResponse("Redis sent more than it was asked for")
        return ScriptConnection(opened, script, found[1] if found else b"unknown", ahead)
    except BaseException:
        await opened.disconnect(nowait=True)
        raise


# --- what went wrong ----------------------------------------------------------------------------------------------

# The first that fits.
_KINDS: tuple[tuple[type[Exception], str], ...] = (
    (TimeoutError, "timeout"),
    (exceptions.TimeoutError, "timeout"),
    (exceptions.BusyLoadingError, "loading"),
    (exceptions.ConnectionError, "connection"),
    (OSError, "connection"),
    (exceptions.ReadOnlyError, "readonly"),
    (exceptions.OutOfMemoryError, "oom"),
    (exceptions.MovedError, "moved"),
)


KINDS = ("timeout", "connection", "loading", "readonly", "oom", "misconf", "moved", "error")


def kind_of(error: BaseException) -> str:
    """In a word, one of KINDS."""
    if str(error).startswith("MISCONF"):  # redis-py has no class for it
        return "misconf"
    return next((kind for cls, kind in _KINDS if isinstance(error, cls)), "error")

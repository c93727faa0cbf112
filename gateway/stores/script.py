"""What all gateways of a deployment keep in Redis: one Lua script, and the queue of what is asked of it.

One call is one round trip for any number of operations, which the script does in their order, each whole or not at all,
on Redis's own clock.

Rule 1: what is asked in one turn of the event loop, or while a round trip is under way, shares the next round trip.
There is only ever one, so operations reach Redis in the order in which they were made.
Rule 2: nobody waits for a Redis that does not answer longer than TIMEOUT, and only the first ones wait at all: then
each operation is told, and whoever asked goes on without Redis, until a probe in the background finds it back.
"""

import asyncio
import hashlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from importlib import resources
from typing import Any, Literal

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

log = logging.getLogger(__name__)

OnRedisDown = Literal["local", "open", "closed"]

TIMEOUT = 0.1  # seconds that Redis may take; the most that it can add to a request
FIRST_PAUSE = 1.0  # seconds between the loss of Redis and the first probe; doubles with each probe that fails
LONGEST_PAUSE = 5.0 - 2 * TIMEOUT  # seconds; a Redis that is back is used again within 5
MAX_OPERATIONS = 100  # in one call, which takes Redis 10 to 50 µs each; meanwhile it answers nobody else
MAX_RENEWALS = 100  # of those that can wait, beside them


def connect_redis(url: str) -> Redis:
    """A client that never makes a request wait: redis-py's defaults retry for seconds and hang on a stalled server.

    RESP2, because RESP3 makes a new connection cost one more round trip and stops redis-py from looking whether an
    idle one is still open. Our own time-out is shorter than the client's, and knows when the loop was held up. Whoever
    calls this closes it.
    """
    client: Redis = Redis.from_url(
        url, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=1.0, socket_connect_timeout=TIMEOUT
    )
    return client


# --- what Redis is asked ------------------------------------------------------------------------------------------


def _lua(name: str) -> str:
    return resources.files("gateway.stores").joinpath(name).read_text("utf-8")


_SCRIPT = "\n".join([_lua("script.lua"), _lua("limits.lua"), _lua("budgets.lua"), "return answers()"])
_SHA = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()  # the name that EVALSHA knows it by


class Operation:
    """One line of what the script is asked. Each is told once what became of it, and must not raise."""

    __slots__ = ()

    @property
    def payload(self) -> bytes | None:
        """Bytes that cannot be a word of a line."""
        return None

    def line(self) -> str:
        """The operation's name, a space, and its words; there is no white space in ids."""
        raise NotImplementedError

    def wanted(self) -> bool:
        """Asked just before it is sent, and now and then while Redis is gone; false: it is forgotten."""
        return True

    def answered(self, numbers: Sequence[int]) -> None:
        """What the script answered."""

    def lost(self) -> None:
        """Redis is gone, and may have done it or not. What it must hear of later is sent again, here."""


class _Probe(Operation):
    """A call of the script that asks nothing; it is refused by a replica and by a server that is out of memory."""

    def line(self) -> str:
        return "probe -"


_PROBE = _Probe()

# The first that fits; for MISCONF and all else redis-py has no class.
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


def _kind(error: BaseException) -> str:
    return next((kind for cls, kind in _KINDS if isinstance(error, cls)), "error")


class RedisScript:
    """One a process. `app.py` opens it, awaits `run` in a task of its own, and closes it before its client `redis`.

    What a process holds in Redis (a lease) lasts `lease` seconds without being renewed. `beats` are called when it is
    time to renew: three times a lease, when Redis is back, and when it has lost its memory. `on_error` hears the kind
    of every round trip that failed. Both are called on the loop and must not raise.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        lease: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        on_error: Callable[[str], None] = lambda kind: None,
    ) -> None:
        self._redis = redis
        self.lease = lease
        self.clock = clock  # seconds, monotonic
        self._on_error = on_error
        self.beats: list[Callable[[], None]] = []
        self.epoch = 0  # of Redis's memory: another number than before says that it was lost; 0: not known yet
        self._queue: deque[Operation] = deque()  # not sent yet; without Redis, what it is to hear once it is back
        self._due: deque[Operation] = deque()  # what can wait
        self._sender: asyncio.Task[None] | None = None  # lives while there is something to send; awaited by close
        self._lost = asyncio.Event()  # Redis is gone
        self._lost_at = 0.0  # seconds, by `clock`
        self._pause = FIRST_PAUSE

    @property
    def gone(self) -> bool:
        return self._lost.is_set()

    @property
    def gone_for(self) -> float:
        """Seconds since Redis was lost; 0 when it is there."""
        return self.clock() - self._lost_at if self.gone else 0.0

    @property
    def pause(self) -> float:
        """Seconds between two looks for a Redis that is gone."""
        return self._pause

    def send(self, operation: Operation) -> None:
        """With the next round trip; when Redis is gone, once it is back."""
        self._queue.append(operation)
        self._start()

    def send_later(self, operation: Operation) -> None:
        """With one of the next round trips, a few at a time: a thousand renewals hold up nobody. Lost with Redis."""
        if not self.gone:
            self._due.append(operation)
            self._start()

    async def run(self) -> None:
        """Keeps the beat, and looks for a Redis that is gone. Never returns.

        The first beat comes at once: it connects and loads the script before a request needs them.
        """
        while True:
            if self.gone:
                await asyncio.sleep(self._pause)
                await self._probe()
                continue
            self._beat()
            # Not `wait_for`: before Python 3.12 it swallows a cancellation that comes together with the event.
            with suppress(TimeoutError):
                async with asyncio.timeout(self.lease / 3):
                    await self._lost.wait()

    async def close(self) -> None:
        """Returns when Redis has heard all that was sent, if it is there."""
        while self._sender is not None:
            await asyncio.wait({self._sender})

    def _beat(self) -> None:
        """Also with nothing to renew: a gateway that idles sees that Redis is gone before a request does."""
        for beat in self.beats:
            beat()
        self.send(_PROBE)

    # --- with Redis ---

    def _start(self) -> None:
        if self._sender is None and not self.gone:
            # A task begins in the next turn of the loop; by then the queue has all that was asked in this one.
            self._sender = asyncio.get_running_loop().create_task(self._send_all())

    async def _send_all(self) -> None:
        try:
            while (self._queue or self._due) and not self.gone:
                await self._round_trip(self._next_batch())
        finally:
            self._sender = None

    def _next_batch(self) -> list[Operation]:
        batch = [self._queue.popleft() for _ in range(min(len(self._queue), MAX_OPERATIONS))]
        batch += [self._due.popleft() for _ in range(min(len(self._due), MAX_RENEWALS))]
        return [operation for operation in batch if operation.wanted()]

    async def _round_trip(self, batch: Sequence[Operation]) -> None:
        if not batch:
            return
        try:
            answers = await self._evaluate(batch)
        except BaseException as error:
            # Whatever the client library raises, and when the loop is shut down: nobody is left waiting. It is counted.
            self._lose(error, batch)
            if not isinstance(error, Exception):
                raise
        else:
            for operation, numbers in zip(batch, answers, strict=True):
                operation.answered(numbers)

    async def _evaluate(self, batch: Sequence[Operation]) -> list[list[int]]:
        """One round trip. Raises TimeoutError, ValueError for an answer that is not our script's, and whatever the
        client library does."""
        lines = "\n".join([operation.line() for operation in batch])
        payloads = [operation.payload for operation in batch if operation.payload is not None]
        async with asyncio.timeout(None) as deadline:
            timer = asyncio.get_running_loop().call_later(TIMEOUT, _expire, deadline)
            try:
                reply = await self._evalsha(lines, *payloads)
            finally:
                timer.cancel()
        return self._read(reply, len(batch))

    async def _evalsha(self, *arguments: str | bytes) -> Any:
        evalsha: Callable[..., Awaitable[Any]] = self._redis.evalsha  # redis-py's own type is that of both its clients
        try:
            return await evalsha(_SHA, 0, "", *arguments)
        except exceptions.NoScriptError:
            # A server that was restarted, or that we failed over to: what it remembers may be old. Or a script that is
            # new to it: then it is the server that it was.
            server = (await self._redis.info("server")).get("run_id") or "unknown"
            evaluate: Callable[..., Awaitable[Any]] = self._redis.eval
            return await evaluate(_SCRIPT, 0, server, *arguments)

    def _read(self, reply: Any, expected: int) -> list[list[int]]:
        first, *lines = reply.split(b"\n")
        epoch, answers = int(first), [[int(word) for word in line.split()] for line in lines]
        if len(answers) != expected:
            raise ValueError(f"{len(answers)} answers to {expected} operations")
        if epoch != self.epoch:
            known, self.epoch = self.epoch, epoch
            if known:
                log.warning("Redis has lost its memory, or may have")
                self._beat()
        return answers

    # --- without Redis ---

    def _lose(self, error: BaseException, sent: Sequence[Operation]) -> None:
        """Redis is gone. Those who wait are told now, what it must hear of waits for its return."""
        self._on_error(_kind(error))
        if not self.gone:
            self._lost_at, self._pause = self.clock(), FIRST_PAUSE
            self._lost.set()
            log.warning("Redis is gone (%s)", _kind(error))
        operations = [*sent, *self._queue]
        self._queue.clear()
        self._due.clear()
        for operation in operations:
            operation.lost()

    async def _probe(self) -> None:
        """Look for Redis on a new connection: an old one may lead to a server that is a replica now."""
        try:
            await self._redis.connection_pool.disconnect(inuse_connections=False)
            await self._evaluate([_PROBE])
        except Exception as error:  # as in a round trip; counted
            self._on_error(_kind(error))
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
            self._queue = deque(operation for operation in self._queue if operation.wanted())
        else:
            log.info("Redis is back after %.1f s", self.gone_for)
            self._lost.clear()  # `run` goes on with a beat


def _expire(deadline: asyncio.Timeout) -> None:
    """Ends it one turn later: a loop that was held up finds the time over and an unread answer, which comes first."""
    deadline.reschedule(asyncio.get_running_loop().time())

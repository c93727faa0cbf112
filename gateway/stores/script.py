"""What all gateways of a deployment keep in Redis: one Lua script, and the queue of what is asked of it.

One call is one round trip for any number of operations, which the script does in their order, each whole or not at all,
on Redis's own clock.

Rule 1: what is asked in one turn of the event loop, or while a round trip is under way, shares the next round trip.
There is only ever one, so operations reach Redis in the order in which they were made.
Rule 2: nobody waits for a Redis that does not answer longer than TIMEOUT, and only the first ones wait at all: then
each operation is told, and whoever asked goes on without Redis, until a probe in the background finds it back.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import resources
from time import monotonic
from typing import Any, Literal

from redis.asyncio import Redis
from redis.asyncio.connection import RedisSSLContext, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError

from gateway.stores.script_connection import ScriptConnection, kind_of, open_connection

log = logging.getLogger(__name__)

OnRedisDown = Literal["local", "open", "closed"]

TIMEOUT = 0.1  # seconds that Redis may take; the most that it can add to a request
MEETING = 1.0  # seconds that it may take while the process starts, is busy with that, and has no requests yet
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
    pool = client.connection_pool
    if issubclass(pool.connection_class, SSLConnection):
        pool.connection_class = _sharing(pool.make_connection().ssl_context)  # type: ignore[no-untyped-call]
    return client


def _sharing(context: RedisSSLContext) -> type[SSLConnection]:
    """By itself each connection reads the system's authorities anew: 40 ms of the loop, of the 100 that it may take."""
    context.get()

    class Sharing(SSLConnection):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.ssl_context = context

    return Sharing


# --- what Redis is asked ------------------------------------------------------------------------------------------


def _lua(name: str) -> str:
    return resources.files("gateway.stores").joinpath(name).read_text("utf-8")


_SCRIPT = "\n".join(
    [_lua("script.lua"), _lua("limits.lua"), "return answers(function()", _lua("budgets.lua"), "end)"]
).encode()


class Operation:
    """One line of what the script is asked. Each is told once what became of it, and must not raise."""

    __slots__ = ()

    def line(self) -> str:
        """The operation's name, a space, and its words; there is no white space in ids."""
        raise NotImplementedError

    def wanted(self) -> bool:
        """Asked just before it is sent, and now and then while Redis is gone; false: it is forgotten."""
        return True

    def answered(self, answer: str) -> None:
        """What the script answered: integers with a space between them, or nothing."""

    def lost(self) -> None:
        """Redis is gone, and may have done it or not. What it must hear of later is sent again, here."""


class _Probe(Operation):
    """A call of the script that asks nothing; it is refused by a replica and by a server that is out of memory."""

    __slots__ = ("over",)

    def __init__(self) -> None:
        self.over = asyncio.Event()

    def line(self) -> str:
        return "probe -"

    def answered(self, answer: str) -> None:
        self.over.set()

    def lost(self) -> None:
        self.over.set()


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
        self._quiet = asyncio.Event()  # no trip is under way, and none will be until something is asked
        self._quiet.set()
        self._trip: Sequence[Operation] = ()  # under way
        self._limit = TIMEOUT  # seconds that one may take
        self._ends = 0.0  # when its time is up, seconds, monotonic
        self._timer: asyncio.TimerHandle | None = None  # looks at that; one, however many trips are made
        self._connection: ScriptConnection | None = None  # closed by `close`
        self._opening: asyncio.Task[None] | None = None  # the connection for the trip; ends with it
        self.gone = False  # Redis is
        self._lost = asyncio.Event()  # the same, for `run` to wait for
        self._lost_at = 0.0  # seconds, by `clock`
        self._pause = FIRST_PAUSE

    @property
    def gone_for(self) -> float:
        """Seconds since Redis was lost; 0 when it is there."""
        return self.clock() - self._lost_at if self.gone else 0.0

    @property
    def clock_ahead(self) -> float:
        """Seconds that Redis's clock was ahead of ours when it was last connected to; limits go by Redis's alone."""
        return self._connection.ahead if self._connection is not None else 0.0

    @property
    def pause(self) -> float:
        """Seconds between two looks for a Redis that is gone."""
        return self._pause

    def send(self, operation: Operation) -> None:
        """With the next round trip; when Redis is gone, once it is back."""
        self._queue.append(operation)
        if not self._trip:  # after one that is under way the next begins by itself
            self._start()

    def send_later(self, operation: Operation) -> None:
        """With one of the next round trips, a few at a time: a thousand renewals hold up nobody. Lost with Redis."""
        if not self.gone:
            self._due.append(operation)
            self._start()

    async def meet(self) -> None:
        """Connects and loads the script before a request needs them. Returns when Redis has answered, or is gone.

        On a busy machine a start takes so much of the loop that TIMEOUT would find a Redis gone that is there; a budget
        that was never heard of is then refused.
        """
        self._limit = MEETING
        self.send(_Probe())
        await self.heard()
        self._limit = TIMEOUT
        if self._timer is not None:  # it would look too late at the next
            self._timer.cancel()
            self._timer = None

    async def run(self) -> None:
        """Keeps the beat, and looks for a Redis that is gone. Never returns."""
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

    async def heard(self) -> None:
        """Returns when Redis has heard all that was sent, if it is there."""
        await self._quiet.wait()

    async def close(self) -> None:
        """Likewise; then the connection is closed."""
        await self.heard()
        if self._opening is not None:
            await asyncio.wait({self._opening})
        if self._timer is not None:
            self._timer.cancel()
        if self._connection is not None:
            await self._connection.close()

    def _beat(self) -> None:
        """Also with nothing to renew: a gateway that idles sees that Redis is gone before a request does."""
        for beat in self.beats:
            beat()
        self.send(_Probe())

    # --- with Redis ---

    def _start(self) -> None:
        if self._quiet.is_set() and not self.gone:
            self._quiet.clear()
            # In the next turn of the loop: by then the queue has all that was asked in this one.
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        """With what is asked now; until there is nothing, or no Redis."""
        batch: list[Operation] = []
        while not batch and (self._queue or self._due):
            batch = self._next_batch()
        if batch:
            self._set_out(batch)
        else:
            self._quiet.set()

    def _next_batch(self) -> list[Operation]:
        batch = _taken(self._queue, MAX_OPERATIONS)
        if self._due:
            batch += _taken(self._due, MAX_RENEWALS)
        return [operation for operation in batch if operation.wanted()]

    def _set_out(self, batch: Sequence[Operation]) -> None:
        self._quiet.clear()
        self._trip = batch
        self._ends = monotonic() + self._limit
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TIMEOUT, self._look)
        if self._connection is not None and self._connection.is_open:
            self._connection.call(_lines(batch), self._told)
        else:
            self._open()

    def _told(self, answer: bytes | Exception) -> None:
        """What Redis says to the trip under way."""
        if isinstance(answer, NoScriptError):
            self._open()
            return
        try:
            lines = self._read(answer)
        except Exception as error:  # whatever kept Redis from it, and what is no answer of our script's; counted
            self._lose(error)
            return
        trip, self._trip = self._trip, ()
        if self.gone:
            log.info("Redis is back after %.1f s", self.gone_for)
            self.gone = False
            self._lost.clear()  # `run` goes on with a beat
        try:
            for operation, line in zip(trip, lines, strict=True):
                operation.answered(line)
        finally:
            # After all whom that woke: what they ask now shares the next trip.
            asyncio.get_running_loop().call_soon(self._go_on)

    def _read(self, answer: bytes | Exception) -> list[str]:
        """A line for each operation of the trip. Raises what Redis refused it with, and ValueError."""
        if isinstance(answer, Exception):
            raise answer
        first, *lines = answer.decode("ascii").split("\n")
        epoch = int(first)
        if len(lines) != len(self._trip):
            raise ValueError(f"{len(lines)} answers to {len(self._trip)} operations")
        if epoch != self.epoch:
            known, self.epoch = self.epoch, epoch
            if known:
                log.warning("Redis has lost its memory, or may have")
                if not self.gone:
                    self._beat()
        return lines

    # --- connections ---

    def _open(self) -> None:
        self._opening = asyncio.get_running_loop().create_task(self._open_and_ask(self._trip))

    async def _open_and_ask(self, trip: Sequence[Operation]) -> None:
        """On a new connection, to a server that may not know the script: one that was restarted, or that we failed over
        to. What it remembers may be old, which the script finds out by the server's run id."""
        try:
            if self._connection is not None:
                await self._connection.close()
            if self.gone:  # those of others may lead to a server that is a replica now
                await self._redis.connection_pool.disconnect(inuse_connections=False)
            connection = await open_connection(self._redis, _SCRIPT)
        except BaseException as error:
            # Whatever the client library raises, and when the loop is shut down: nobody is left waiting. It is counted.
            if trip is self._trip:
                self._lose(error)
            if not isinstance(error, Exception):
                raise
            return
        if trip is not self._trip:  # its time was up in the same moment
            await connection.close()
            return
        self._connection = connection
        connection.call(_lines(trip), self._told)

    # --- a Redis that does not answer ---

    def _look(self) -> None:
        """Whether the time of a trip is up; ends with the first look that finds none under way."""
        self._timer = None
        if not self._trip:
            return
        loop, left = asyncio.get_running_loop(), self._ends - monotonic()
        if left > 0:
            self._timer = loop.call_later(left, self._look)
        else:
            # A loop that was held up finds the time over and an unread answer, which comes first.
            self._timer = loop.call_later(0.001, self._expire, self._trip)

    def _expire(self, trip: Sequence[Operation]) -> None:
        if trip is self._trip:
            self._lose(TimeoutError())
        self._look()

    def _lose(self, error: BaseException) -> None:
        """Redis is gone. Those who wait are told now, what it must hear of waits for its return."""
        self._on_error(kind_of(error))
        if self._connection is not None:
            self._connection.abort()
        if self._opening is not None:
            self._opening.cancel()
        operations, self._trip = self._trip, ()
        if self.gone:
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
            self._queue = deque(operation for operation in self._queue if operation.wanted())
        else:
            self._lost_at, self._pause = self.clock(), FIRST_PAUSE
            self.gone = True
            self._lost.set()
            log.warning("Redis is gone (%s)", kind_of(error))
            operations = [*operations, *self._queue]
            self._queue.clear()
            self._due.clear()
        self._quiet.set()
        for operation in operations:
            operation.lost()

    async def _probe(self) -> None:
        """Look for Redis, on a new connection."""
        probe = _Probe()
        self._set_out([probe])
        await probe.over.wait()


def _taken(queue: deque[Operation], most: int) -> list[Operation]:
    if len(queue) > most:
        return [queue.popleft() for _ in range(most)]
    taken = list(queue)
    queue.clear()
    return taken


def _lines(batch: Sequence[Operation]) -> bytes:
    return "\n".join([operation.line() for operation in batch]).encode()

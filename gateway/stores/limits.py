"""The limiter: which request may go on now, exact over any number of processes.

One Lua script in one round trip, on Redis's own clock, checks a request against all of its limits and records it in
all or in none. Requests are kept one by one in sorted sets: that is exact, and costs Redis about 100 bytes for each
request in the window. A request in flight holds a lease, which is renewed while it lives and ends by itself when its
process was killed.

Rule 1: what asks in one turn of the event loop, or while a round trip is under way, shares the next round trip. There
is only ever one, so operations reach Redis in the order in which they were made.
Rule 2: nobody waits for a Redis that does not answer longer than TIMEOUT, and only the first ones wait at all: then
the limits are kept here, by what this process granted itself, until a probe in the background finds Redis back.
Rule 3: a slot is never lost. Whatever Redis may have recorded for a request that does not go on is given back.
"""

import asyncio
import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from importlib import resources
from typing import Any, Literal, NamedTuple

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from gateway.exchange import Principal
from gateway.stores.grants import UNLIMITED, Admission, Grants, Reason, refused

log = logging.getLogger(__name__)

OnRedisDown = Literal["local", "open", "closed"]
State = Literal["redis", "local", "open", "closed"]

TIMEOUT = 0.1  # seconds that Redis may take; the most that it can add to a request
FIRST_PAUSE = 1.0  # seconds between the loss of Redis and the first probe; doubles with each probe that fails
LONGEST_PAUSE = 5.0 - 2 * TIMEOUT  # seconds; a Redis that is back is used again within 5
MAX_OPERATIONS = 250  # in one call, which takes Redis about 20 µs each; meanwhile it answers nobody else
MAX_RENEWALS = 100  # of those


def connect_redis(url: str) -> Redis:
    """A client that never makes a request wait: redis-py's defaults retry for seconds and hang on a stalled server.

    RESP2, because RESP3 makes a new connection cost one more round trip and stops redis-py from looking whether an
    idle one is still open. The limiter's own time-out is shorter than the client's, and knows when the loop was held
    up. Whoever calls this closes it.
    """
    client: Redis = Redis.from_url(
        url, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=1.0, socket_connect_timeout=TIMEOUT
    )
    return client


# --- what Redis is asked ------------------------------------------------------------------------------------------

_SCRIPT = resources.files("gateway.stores").joinpath("limits.lua").read_text("utf-8")
_SHA = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()  # the name that EVALSHA knows it by
_REASONS: tuple[Reason, ...] = ("", "requests_per_minute", "concurrent_requests", "global_requests_per_minute")


class _Ask(NamedTuple):
    """Who waits for the answer to an "admit"."""

    who: Principal
    asked: float  # seconds, monotonic
    answer: asyncio.Future[Admission]


class _Operation(NamedTuple):
    """One line of what the script is given; there is no white space in ids."""

    name: Literal["admit", "renew", "release"]
    key_id: str
    exchange_id: str
    ask: _Ask | None = None

    def line(self) -> str:
        limits = f"{self.ask.who.requests_per_minute} {self.ask.who.concurrent_requests}" if self.ask else "0 0"
        return f"{self.name} {self.key_id} {self.exchange_id} {limits}"


# A probe writes: a replica, or a server out of memory, lets itself be read and must not pass for one that is back.
_PROBE = _Operation("renew", "(probe)", "probe")

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


class Limiter:
    """One a process. `app.py` opens it, awaits `run` in a task of its own, and closes it before its client `redis`.

    `nodes` is how many processes share the limits; `window` and `lease` are seconds. `on_error` hears the kind of every
    round trip that failed; it is called on the loop and must not raise.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        global_per_minute: int = 0,
        nodes: int = 1,
        on_redis_down: OnRedisDown = "local",
        window: float = 60.0,
        lease: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        on_error: Callable[[str], None] = lambda kind: None,
    ) -> None:
        self._redis = redis
        self._all_limit = global_per_minute
        self._nodes = nodes
        self._on_redis_down = on_redis_down
        self._constants = (round(window * 1e6), round(lease * 1e6), global_per_minute)  # what the script takes first
        self._lease = lease
        self._clock = clock
        self._on_error = on_error
        self._grants = Grants(window, global_per_minute)
        self._queue: deque[_Operation] = deque()  # not sent yet; without Redis, leases to release once it is back
        self._due: deque[str] = deque()  # exchange ids whose leases are to be renewed
        self._sender: asyncio.Task[None] | None = None  # lives while there is something to send; awaited by close
        self._lost = asyncio.Event()  # Redis is gone
        self._lost_at = 0.0  # seconds, monotonic
        self._pause = FIRST_PAUSE

    @property
    def state(self) -> State:
        """Where limits are kept now: "redis", or what the setting says for a Redis that is gone."""
        return self._on_redis_down if self._lost.is_set() else "redis"

    async def admit(self, principal: Principal, exchange_id: str) -> Admission:
        """Raises nothing but its own cancellation, after which no slot is held.

        What it granted is held until `release`.
        """
        if not (principal.requests_per_minute or principal.concurrent_requests or self._all_limit):
            return UNLIMITED
        now = self._clock()
        if self._lost.is_set():
            return self._decide(principal, exchange_id, now)
        # Redis learns of what we grant at most TIMEOUT later, so what is refused here it would refuse as well. A key
        # far over its limit costs no round trip, and a Redis that lost its data gives nobody a second helping.
        refusal = self._grants.refusal(principal, now, slack=TIMEOUT)
        if refusal is not None:
            return refusal
        return await self._ask(exchange_id, _Ask(principal, now, asyncio.get_running_loop().create_future()))

    def release(self, principal: Principal, exchange_id: str) -> None:
        """Gives back what `admit` granted. Never waits and never raises; after a refusal, or again, it does nothing."""
        if self._grants.give_back(exchange_id):
            self._release_lease(principal.key_id, exchange_id)

    async def run(self) -> None:
        """Renews leases, and looks for a Redis that is gone. Never returns.

        The first renewal comes at once: it connects and loads the script before a request needs them.
        """
        while True:
            if self._lost.is_set():
                await asyncio.sleep(self._pause)
                await self._probe()
                continue
            self._renew_leases()
            self._grants.forget_idle(self._clock())
            # Not `wait_for`: before Python 3.12 it swallows a cancellation that comes together with the event.
            with suppress(TimeoutError):
                async with asyncio.timeout(self._lease / 3):
                    await self._lost.wait()

    async def close(self) -> None:
        """Gives back all that is still held, and returns when Redis was told, if it is there."""
        for exchange_id, key_id in self._grants.leases():
            self._grants.give_back(exchange_id)
            self._release_lease(key_id, exchange_id)
        while self._sender is not None:
            await asyncio.wait({self._sender})

    # --- with Redis ---

    async def _ask(self, exchange_id: str, ask: _Ask) -> Admission:
        self._send(_Operation("admit", ask.who.key_id, exchange_id, ask))
        try:
            return await ask.answer
        except asyncio.CancelledError:
            # Between the answer and its reader. Cancelled earlier than that, and the answer will find nobody waiting.
            if not ask.answer.cancelled():
                self.release(ask.who, exchange_id)
            raise

    def _renew_leases(self) -> None:
        """Also with nothing to renew: a gateway that idles sees that Redis is gone before a request does."""
        self._due.extend(exchange_id for exchange_id, _ in self._grants.leases())
        self._send(_PROBE)

    def _release_lease(self, key_id: str, exchange_id: str) -> None:
        """A lease that Redis may hold; after an outage as long as a lease it holds none."""
        if not self._lost.is_set() or self._clock() - self._lost_at < self._lease:
            self._send(_Operation("release", key_id, exchange_id))

    def _send(self, operation: _Operation) -> None:
        self._queue.append(operation)
        if self._sender is None and not self._lost.is_set():
            # A task begins in the next turn of the loop; by then the queue has all that was asked in this one.
            self._sender = asyncio.get_running_loop().create_task(self._send_all())

    async def _send_all(self) -> None:
        try:
            while (self._queue or self._due) and not self._lost.is_set():
                await self._round_trip(self._next_batch())
        finally:
            self._sender = None

    def _next_batch(self) -> list[_Operation]:
        """What was asked, without those who left meanwhile, and a few renewals: a thousand of them hold up nobody."""
        operations = (self._queue.popleft() for _ in range(min(len(self._queue), MAX_OPERATIONS)))
        batch = [operation for operation in operations if not operation.ask or not operation.ask.answer.done()]
        for _ in range(min(len(self._due), MAX_RENEWALS)):
            exchange_id = self._due.popleft()
            key_id = self._grants.key_of(exchange_id)
            if key_id is not None:
                batch.append(_Operation("renew", key_id, exchange_id))
        return batch

    async def _round_trip(self, batch: Sequence[_Operation]) -> None:
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
            self._settle(batch, answers)

    def _settle(self, batch: Iterable[_Operation], answers: Iterable[Admission]) -> None:
        asked = [(operation, operation.ask) for operation in batch if operation.ask]
        for (operation, ask), admission in zip(asked, answers, strict=True):
            if ask.answer.done():
                self._abandon(operation)
                continue
            if admission.granted:
                self._grants.record(ask.who, operation.exchange_id, ask.asked)
            ask.answer.set_result(admission)

    def _abandon(self, operation: _Operation) -> None:
        """Nobody goes on with it here, whatever Redis recorded or will."""
        if operation.ask and operation.ask.who.concurrent_requests:
            self._release_lease(operation.key_id, operation.exchange_id)

    async def _evaluate(self, batch: Sequence[_Operation]) -> list[Admission]:
        """One round trip. Raises TimeoutError, and whatever the client library does."""
        lines = "\n".join([operation.line() for operation in batch])
        async with asyncio.timeout(None) as deadline:
            timer = asyncio.get_running_loop().call_later(TIMEOUT, _expire, deadline)
            try:
                reply = await self._evalsha(*self._constants, lines)
            finally:
                timer.cancel()
        return self._read(reply, [operation.ask.who for operation in batch if operation.ask])

    async def _evalsha(self, *arguments: int | str) -> Any:
        evalsha: Callable[..., Awaitable[Any]] = self._redis.evalsha  # redis-py's own type is that of both its clients
        try:
            return await evalsha(_SHA, 0, *arguments)
        except exceptions.NoScriptError:  # a server that was restarted, or that we failed over to
            await self._redis.script_load(_SCRIPT)
            return await evalsha(_SHA, 0, *arguments)

    def _read(self, reply: Any, asked: Sequence[Principal]) -> list[Admission]:
        """Raises ValueError for an answer that is not our script's."""
        numbers = [int(number) for number in reply.split()]
        columns = (numbers[column::4] for column in range(4))
        return [self._admission(*row) for row in zip(asked, *columns, strict=True)]

    def _admission(self, who: Principal, which: int, remaining: int, empty_after: int, room_after: int) -> Admission:
        """`which` limit refused it, by its number in the script; 0: none."""
        if not which:
            return Admission(True, "", who.requests_per_minute, remaining, empty_after / 1e6)
        limit = (who.requests_per_minute, who.concurrent_requests, self._all_limit)[which - 1]
        return refused(_REASONS[which], limit, empty_after / 1e6, room_after / 1e6)

    # --- without Redis ---

    def _decide(self, who: Principal, exchange_id: str, now: float) -> Admission:
        if self._on_redis_down == "closed":
            return Admission(False, "unavailable", retry_after=math.ceil(self._pause), local=True)
        if self._on_redis_down == "open":
            if who.concurrent_requests:
                self._grants.hold(who.key_id, exchange_id)
            return UNLIMITED._replace(local=True)
        refusal = self._grants.refusal(who, now, nodes=self._nodes)
        if refusal is not None:
            return refusal._replace(local=True)
        self._grants.record(who, exchange_id, now)
        return self._grants.granted(who, now, nodes=self._nodes)

    def _lose(self, error: BaseException, sent: Sequence[_Operation]) -> None:
        """Redis is gone. Those who wait are answered without it, now; leases to release wait for its return."""
        now = self._clock()
        self._on_error(_kind(error))
        if not self._lost.is_set():
            self._lost.set()
            self._lost_at, self._pause = now, FIRST_PAUSE
            log.warning("Redis is gone (%s), limits are %s", _kind(error), self.state)
        operations = [*sent, *self._queue]
        self._queue = deque(operation for operation in operations if operation.name == "release")
        self._due.clear()
        for operation in operations:
            if operation.ask:
                self._answer(operation, operation.ask, now)

    def _answer(self, operation: _Operation, ask: _Ask, now: float) -> None:
        admission = None if ask.answer.done() else self._decide(ask.who, operation.exchange_id, now)
        if admission is not None:
            ask.answer.set_result(admission)
        if admission is None or not admission.granted:
            self._abandon(operation)

    async def _probe(self) -> None:
        """Look for Redis on a new connection: an old one may lead to a server that is a replica now."""
        try:
            await self._redis.connection_pool.disconnect(inuse_connections=False)
            await self._evaluate([_PROBE])
        except Exception as error:  # as in a round trip; counted
            self._on_error(_kind(error))
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
            if self._clock() - self._lost_at >= self._lease:
                self._queue.clear()  # those leases have ended by themselves
        else:
            # A restart may have lost its memory: `run` goes on by renewing all leases.
            self._lost.clear()
            log.info("Redis is back after %.1f s", self._clock() - self._lost_at)


def _expire(deadline: asyncio.Timeout) -> None:
    """Ends it one turn later: a loop that was held up finds the time over and an unread answer, which comes first."""
    deadline.reschedule(asyncio.get_running_loop().time())

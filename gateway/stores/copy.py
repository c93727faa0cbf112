"""A second copy, in Redis, of the usage that is not in Postgres yet: for a host that dies and takes its disk along.

A hash a process: exchange id -> the record that its journal has of it (stores/records.py), of the end if there is one,
else of the begin. What is shipped is removed, so a hash holds what its host could lose, and no more. Other processes
read what a dead one left, and write it as they write its journal: each row once, whichever of the two comes first.

    aig:usage:DEPLOYMENT:PROCESS        the hash; its field `columns` is the heading of the journal's segments
    aig:usage:DEPLOYMENT:alive:PROCESS  ends by itself when the process no longer renews it
    aig:usage:DEPLOYMENT:claim:PROCESS  which process is reading what that one left
    aig:usage:DEPLOYMENT:processes      all of them

Rule 1: `_kept` is what Redis should have, `_due` where it may differ. One round trip at a time carries the newest of
that; it is about states, not steps, so a trip that failed is made again, and one that was done twice changes nothing.
Rule 2: nobody waits longer than the time-out, and only the first ones wait at all for a Redis that is gone.
Rule 3: after every trip Redis says how many fields it has. When it lost its memory, or somebody took us for dead, the
number is wrong, and we ask which there are.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from time import monotonic
from typing import Any, NamedTuple

from redis.asyncio import Redis

from gateway.stores import records
from gateway.stores.ledger import Given
from gateway.stores.script_connection import kind_of
from gateway.stores.usage import UsageRow

log = logging.getLogger("gateway.stores.copy")

MAX_ROWS = 50_000  # of one process, about 25 MB here and there; what is begun beyond that has no second copy
MAX_CHANGES = 500  # in one round trip, which Redis takes about a millisecond for
ALIVE = 60.0  # seconds without a renewal after which a process counts as dead
RENEW_EVERY = 10.0  # seconds
# Seconds that a dead one is watched before its rows are taken. When Redis was gone for longer than ALIVE all processes
# look dead, until each has found it back, LONGEST_PAUSE later.
GRACE = 15.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 5.0  # seconds between the loss of Redis and a probe; doubles with each that fails
PATIENCE = 1.0  # seconds for what nobody waits for
PAGE = 100  # rows that are read at once of a dead process; more would hold up the loop for over a millisecond

_Command = tuple[str | bytes | int, ...]
_Batch = dict[str, asyncio.Future[None] | None]  # exchange ids, and who waits until Redis was told of them


class Page(NamedTuple):
    """Some of what a dead process left."""

    process: str
    rows: list[UsageRow]
    damaged: list[bytes]  # what is no record
    last: bool


class UsageCopy:
    """One a process. `app.py` opens it, awaits `run` in a task of its own, and closes it after the shipper.

    `deployment` tells the database that the rows belong to from others whose gateways share this Redis; `process` is
    the name of the journal's folder. `timeout` is the most that a request waits, seconds. `on_error` hears the kind of
    every error of Redis's; `gone` says that somebody else has seen it go, so that nobody waits to see it again. Neither
    may raise. `redis` needs time-outs of its own: stores/script.py, `connect_redis`.
    """

    def __init__(
        self,
        redis: Redis,
        process: str,
        *,
        deployment: str,
        on_error: Callable[[str], None],
        timeout: float = 0.1,
        gone: Callable[[], bool] = lambda: False,
    ) -> None:
        self._redis = redis
        self._process = process
        self._prefix = f"aig:usage:{deployment}:"
        self._timeout = timeout
        self._on_error = on_error
        self._gone = gone
        self._heading = records.heading()
        self._kept: dict[str, bytes] = {}  # records by exchange id
        self._due: _Batch = {}  # where Redis may differ from that, oldest first
        self._renewal_due = True  # with the first record Redis learns that we live
        self._sender: asyncio.Task[None] | None = None  # lives while there is something to send; awaited by close
        self._lost = asyncio.Event()  # Redis is gone
        self._pause = FIRST_PAUSE
        self._full = False  # said once
        self._dead_since: dict[str, float] = {}  # processes that do not renew: when we saw it first, seconds, monotonic

    @property
    def rows(self) -> int:
        """Rows that are begun or ended and not shipped yet."""
        return len(self._kept)

    @property
    def behind(self) -> int:
        """Exchanges of which Redis does not have the last word yet."""
        return len(self._kept) if self._lost.is_set() else len(self._due)

    # --- one exchange

    def begun(self, row: UsageRow) -> Awaitable[None]:
        """Kept from now on; to be awaited until Redis has it. That raises nothing but its own cancellation."""
        return self._keep(row.request_id, records.begin(row))

    def ended(self, row: UsageRow) -> Awaitable[None]:
        """As `begun`; a client that left waits for nothing.

        Call it in the turn of the loop that calls the journal's `end`: in the next it may be shipped.
        """
        return self._keep(row.request_id, records.end(row))

    def forget(self, request_ids: Iterable[str]) -> None:
        """They are in the database, or void: no row is due."""
        for request_id in request_ids:
            if self._kept.pop(request_id, None) is not None:
                self._change(request_id, None)

    def _keep(self, request_id: str, record: bytes) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        told = loop.create_future()
        if self._put(request_id, record, told) and not (self._lost.is_set() or self._gone()):
            loop.call_later(self._timeout, _release, told)
        else:
            told.set_result(None)
        return told

    def _put(self, request_id: str, record: bytes, told: asyncio.Future[None] | None) -> bool:
        if len(self._kept) >= MAX_ROWS and request_id not in self._kept:
            if not self._full:
                log.warning("%d usage rows are not shipped yet; further ones have no second copy", MAX_ROWS)
            self._full = True
            return False
        self._full = self._full and len(self._kept) > MAX_ROWS // 2
        self._kept[request_id] = record
        self._change(request_id, told)
        return True

    # --- what Redis is told

    def _change(self, request_id: str, told: asyncio.Future[None] | None) -> None:
        if self._lost.is_set():
            return  # when it is back, all that is kept will be due
        # To the end, also when it was there: the newest is sent first, because somebody waits for it.
        self._due.pop(request_id, None)
        self._due[request_id] = told
        self._wake()

    def _wake(self) -> None:
        if self._sender is None:
            # A task begins in the next turn of the loop; by then `_due` has all that was asked in this one.
            self._sender = asyncio.get_running_loop().create_task(self._send_all())

    async def _send_all(self) -> None:
        try:
            while (self._due or self._renewal_due) and not self._lost.is_set():
                await self._round_trip(self._take())
        finally:
            self._sender = None

    def _take(self) -> _Batch:
        return dict(self._due.popitem() for _ in range(min(len(self._due), MAX_CHANGES)))

    async def _round_trip(self, batch: _Batch) -> None:
        expected = len(self._kept) + 1 if not self._due else None
        try:
            *_, fields = await self._execute(self._timeout, *self._commands(batch))
            _release_all(batch)
            if expected not in (None, fields):
                await self._start_over()
        except BaseException as error:
            # Whatever the client library raises, and when the loop is shut down: nobody is left waiting. It is counted.
            self._lose(error, batch)
            if not isinstance(error, Exception):
                raise

    def _commands(self, batch: Iterable[str]) -> list[_Command]:
        kept: list[str | bytes] = ["columns", self._heading]
        gone: list[str] = []
        for request_id in batch:
            record = self._kept.get(request_id)
            if record is None:
                gone.append(request_id)
            else:
                kept += request_id, record
        commands = self._renewal() if self._renewal_due else []
        self._renewal_due = False
        hash_key = self._key(self._process)
        commands.append(("HSET", hash_key, *kept))
        if gone:
            commands.append(("HDEL", hash_key, *gone))
        commands.append(("HLEN", hash_key))
        return commands

    def _renewal(self) -> list[_Command]:
        alive = "SET", self._key("alive", self._process), "1", "PX", round(ALIVE * 1000)
        return [("SADD", self._key("processes"), self._process), alive]

    async def _start_over(self) -> None:
        """All that is kept is due, and all that Redis should not have. Raises what the client library does."""
        *_, fields = await self._execute(PATIENCE, *self._renewal(), ("HKEYS", self._key(self._process)))
        there = {field.decode() for field in fields} - {"columns"}
        self._due = {**dict.fromkeys(there | self._kept.keys()), **self._due}

    async def _execute(self, seconds: float, *commands: _Command) -> list[Any]:
        """One round trip. Raises TimeoutError, and whatever the client library does."""
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        async with asyncio.timeout(None) as deadline:
            timer = asyncio.get_running_loop().call_later(seconds, _expire, deadline)
            try:
                return await pipeline.execute()
            finally:
                timer.cancel()

    def _key(self, *words: str) -> str:
        return self._prefix + ":".join(words)

    # --- a Redis that is gone

    async def run(self) -> None:
        """Says that we live, and looks for a Redis that is gone. Never returns."""
        while True:
            if self._lost.is_set():
                await asyncio.sleep(self._pause)
                await self._probe()
                continue
            self._renewal_due = True
            self._wake()
            # Not `wait_for`: before Python 3.12 it swallows a cancellation that comes together with the event.
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEW_EVERY):
                    await self._lost.wait()

    def _lose(self, error: BaseException, batch: _Batch) -> None:
        """Those who wait go on now."""
        self._on_error(kind_of(error))
        self._lost.set()
        self._pause = FIRST_PAUSE
        self._dead_since.clear()
        _release_all(batch)
        _release_all(self._due)
        self._due.clear()
        log.warning("Redis is gone (%s), usage has no second copy", kind_of(error))

    async def _probe(self) -> None:
        """Look for Redis on a new connection: an old one may lead to a server that is a replica now."""
        try:
            await self._redis.connection_pool.disconnect(inuse_connections=False)
            await self._start_over()
        except Exception as error:  # as in a round trip; counted
            self._on_error(kind_of(error))
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
        else:
            self._lost.clear()
            self._wake()
            log.info("Redis is back, %d changes of the copy of usage are due", self.behind)

    # --- what dead processes left

    async def orphans(self) -> AsyncGenerator[Page, None]:
        """The rows of dead processes, by pages; what never ended is `interrupted`. Ends early when Redis is gone.

        After the last page of a process, and when all are written, `remove` it. Two that read the same at once, which
        a claim makes rare, are harmless: the rows are counted once.
        """
        for process in await self._dead():
            last = not await self._claim(process)
            cursor = 0
            while not last:
                answers = await self._ask(
                    ("HGET", self._key(process), "columns"), ("HSCAN", self._key(process), cursor, "COUNT", PAGE)
                )
                if answers is None:
                    return
                heading, (cursor, found) = answers
                last = cursor == 0
                yield _page(process, heading or b"", found, last=last)

    async def remove(self, process: str) -> None:
        """All that it left is in the database."""
        names = self._key(process), self._key("alive", process), self._key("claim", process)
        await self._ask(("DEL", *names), ("SREM", self._key("processes"), process))

    async def _dead(self) -> list[str]:
        """Processes that did not renew for ALIVE seconds, and then while we watched them."""
        processes = await self._ask(("SMEMBERS", self._key("processes")))
        others = sorted({name.decode() for name in processes[0]} - {self._process}) if processes else []
        lives = await self._ask(("MGET", *[self._key("alive", name) for name in others])) if others else None
        now = monotonic()
        dead = [name for name, life in zip(others, lives[0], strict=True) if life is None] if lives else []
        self._dead_since = {name: self._dead_since.get(name, now) for name in dead}
        return [name for name, since in self._dead_since.items() if now - since >= GRACE]

    async def _claim(self, process: str) -> bool:
        """Ours for a while, or ours already."""
        key = self._key("claim", process)
        answers = await self._ask(("SET", key, self._process, "NX", "PX", round(ALIVE * 1000)), ("GET", key))
        return answers is not None and answers[1] == self._process.encode()

    async def _ask(self, *commands: _Command) -> list[Any] | None:
        """The answers; None when Redis is gone."""
        if self._lost.is_set():
            return None
        try:
            return await self._execute(PATIENCE, *commands)
        except Exception as error:  # as in a round trip; counted
            self._on_error(kind_of(error))
            self._dead_since.clear()
            return None

    # --- the end

    async def close(self) -> None:
        """Leave nothing in Redis if all is shipped, else what is not for the others, and at once."""
        while self._sender is not None:
            await asyncio.wait({self._sender})
        if self._kept:
            await self._ask(("DEL", self._key("alive", self._process)))
        else:
            await self.remove(self._process)


def _page(process: str, heading: bytes, found: dict[bytes, bytes], *, last: bool) -> Page:
    page = Page(process, [], [], last)
    columns = records.columns_of(heading.rstrip(b"\n"))
    for field, line in found.items():
        if field == b"columns":
            continue
        try:
            page.rows.append(_row(line.rstrip(b"\n"), columns))
        except records.Unreadable:
            page.damaged.append(line)
    return page


def _row(line: bytes, columns: Sequence[str]) -> UsageRow:
    """Raises Unreadable."""
    record = records.read(line, tuple(columns))
    if isinstance(record, records.Begin):
        return replace(record.row, outcome="interrupted", latency_ms=0)  # how long it ran nobody knows
    if isinstance(record, Given):
        return record.row
    raise records.Unreadable("neither a begin nor an end")


def _release(told: asyncio.Future[None] | None) -> None:
    if told is not None and not told.done():
        told.set_result(None)


def _release_all(batch: _Batch) -> None:
    for told in batch.values():
        _release(told)


def _expire(deadline: asyncio.Timeout) -> None:
    """Ends it one turn later: a loop that was held up finds the time over and an unread answer, which comes first."""
    deadline.reschedule(asyncio.get_running_loop().time())

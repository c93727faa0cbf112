"""Streams in Redis, for whoever continues one after its connection broke, on any node (streams.lua).

Rule 1: no stream waits for Redis. Redis is brought up to what its recording has, as often as that can be; what it has
is whole events, from the first byte on or from the oldest that is kept.
Rule 2: a stream's name is a digest of its key and its id: nobody else's can be asked for.
Rule 3: all that this process asks goes over one connection, one round trip at a time.
"""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import resources
from time import monotonic, time
from typing import Any, Literal, NamedTuple, Protocol

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from gateway.protocol.errors import Unavailable
from gateway.stores.script_connection import kind_of

FLUSH = 0.05  # seconds that pieces are gathered for, and that whoever reads waits for the next
TIMEOUT = 1.0  # seconds of a round trip
HELD_UP = 0.2  # seconds that a time-out comes too late when the loop was
BEGIN = 1.0  # seconds that a request waits to hear that its stream is held; a Redis that is known to be gone: none
PAUSE = 1.0  # seconds after a round trip that failed
LEASE = 10_000  # milliseconds without a word of its maker, after which a stream has none
BEAT = 3.0  # seconds between two renewals
READER = 10_000  # milliseconds that one who reads elsewhere counts as there
PATIENCE = 30.0  # seconds that Redis may be gone when a stream has ended
PART = 1 << 16  # bytes that are written at once, or one piece
ENTRIES = 32  # that are read at once
MOST_READ = 1 << 18  # bytes of them, or one entry
READS = 16  # that are asked in one round trip: 4 MiB
MOST = 50  # streams that are written in one round trip

_SCRIPT = resources.files("gateway.stores").joinpath("streams.lua").read_text("utf-8")
_SHA = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()  # the name that EVALSHA knows it by

_Command = tuple[str | bytes | int, ...]
_Asked = tuple[_Command, asyncio.Future[Any]]
Result = Literal["held", "refused", "failed", "lost"]


class Recorded(Protocol):
    """What a stream is written from: gateway/recording.py."""

    @property
    def first(self) -> int:
        """The number of the oldest piece that is kept."""

    def piece(self, number: int) -> bytes | None:
        """None: it is yet to come."""

    def locate(self, offset: int) -> tuple[int, int] | None:
        """The piece that a byte is in, and where in it; None: it is not kept, or beyond the end."""


class Part(NamedTuple):
    """Some of a stream."""

    size: int  # bytes that there are by now
    ended: str  # "": it goes on; `ended`; `interrupted`: whoever made it is gone
    made: bool  # whoever makes it lives
    pieces: list[tuple[int, bytes]]  # where each begins


class _Writing:
    """A stream of this process on its way to Redis."""

    __slots__ = ("held", "name", "next", "over_since", "read_at", "recording")

    def __init__(self, name: str, recording: Recorded) -> None:
        self.name = name
        self.recording = recording
        self.held = 0  # bytes that Redis has
        self.next = 0  # the first piece that it does not have
        self.read_at = 0.0  # when somebody elsewhere was seen to read it, seconds, monotonic
        self.over_since = 0.0  # likewise: there will be no more of it; 0: it goes on


class _Step(NamedTuple):
    """What one round trip writes of one stream."""

    writing: _Writing
    size: int  # bytes that Redis has then
    next: int
    last: bool


def name_of(key_id: str, stream_id: str) -> str:
    return "aig:stream:" + _digest(f"{key_id} {stream_id}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Streams:
    """One a process. `app.py` opens it, awaits `run` in a task of its own, and closes it.

    `max_bytes` of each stream, the newest, are kept for `ttl` seconds after its last; `max_streams` of a key.
    `on_result` counts what became of each, `on_error` hears the kind of every error of Redis's; `gone`: somebody else
    has seen it go.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        max_bytes: int,
        max_streams: int,
        ttl: float,
        on_result: Callable[[Result], None] = lambda result: None,
        on_error: Callable[[str], None] = lambda kind: None,
        gone: Callable[[], bool] = lambda: False,
    ) -> None:
        self._redis = redis
        self._max_bytes = max_bytes
        self._max_streams = max_streams
        self._ttl = round(ttl * 1000)  # milliseconds
        self._on_result = on_result
        self._on_error = on_error
        self._gone = gone
        self._open: dict[str, _Writing] = {}
        self._due: dict[_Writing, None] = {}  # to be written, oldest first
        self._asked: list[_Asked] = []
        self._reading: list[_Asked] = []  # likewise: after all others, READS at a time
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None  # sets it
        self._beat_at = 0.0  # seconds, monotonic
        self._lost = False  # the last round trip failed
        self._loaded = False  # Redis has the script

    # --- of those who make streams: nothing of this waits but `begin`

    async def begin(self, key_id: str, name: str) -> bool:
        """Redis holds its beginning. False: it does not say so, or the key has too many that run."""
        if self._lost or self._gone():
            self._on_result("failed")
            return False
        index, now = f"aig:streams:{_digest(key_id)}", round(time() * 1000)
        words = "begin", self._max_streams, now, LEASE, max(self._ttl, LEASE)
        asked = self._ask("EVALSHA", _SHA, 2, name, index, *words)
        await asyncio.wait({asked}, timeout=BEGIN)
        if asked.cancel() or asked.exception() is not None:
            self._on_result("failed")
            return False
        self._on_result("held" if asked.result() else "refused")
        return bool(asked.result())

    def write(self, name: str, recording: Recorded) -> None:
        """All that it has and will have, until `finish`; `changed` says that there is more."""
        self._open[name] = _Writing(name, recording)

    def changed(self, name: str) -> None:
        if (writing := self._open.get(name)) is not None:
            self._due[writing] = None
            self._soon()

    def finish(self, name: str, *, void: bool) -> None:
        """There will be no more of it; `void`: not a byte of it was sent."""
        writing = self._open.get(name)
        if writing is None:
            return
        if void:
            del self._open[name]
            self._due.pop(writing, None)
            self._ask("EVALSHA", _SHA, 1, name, "drop")
            return
        writing.over_since = monotonic()
        self._due[writing] = None
        self._now()

    def read_at(self, name: str) -> float:
        """When somebody elsewhere was seen to read it, seconds, monotonic; 0: never."""
        writing = self._open.get(name)
        return writing.read_at if writing is not None else 0.0

    # --- of those who read them

    async def read(self, name: str, after: int, *, at_once: bool) -> Part | None:
        """What comes after so many bytes, or a look; None: there is no such stream. Raises Unavailable."""
        answer = await self._ask("EVALSHA", _SHA, 1, name, "read", after, ENTRIES, MOST_READ, READER, at_once=at_once)
        if not answer:
            return None
        size, ended, made, entries = answer
        pieces = [(_end(entry) - len(fields[1]), fields[1]) for entry, fields in entries if fields[0] == b"bytes"]
        return Part(size, ended.decode(), bool(made), pieces)

    async def interrupt(self, name: str, size: int) -> None:
        """Nobody makes it any more: that is how it ended, if that is still so. Raises Unavailable."""
        await self._ask("EVALSHA", _SHA, 1, name, "append", size, b"", 0, LEASE, self._ttl, "interrupted")

    # --- the one who asks Redis

    def _ask(self, *command: str | bytes | int, at_once: bool = True) -> asyncio.Future[Any]:
        """Raises Unavailable when it is awaited, and Redis does not answer."""
        asked: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # Whoever asked may have left: its error is nobody's surprise.
        asked.add_done_callback(lambda asked: asked.cancelled() or asked.exception())
        if self._lost:
            _tell(asked, ConnectionError())
            return asked
        self._queue((command, asked))
        if at_once:
            self._now()
        else:
            self._soon()
        return asked

    def _queue(self, one: _Asked) -> None:
        (self._reading if one[0][4] == "read" else self._asked).append(one)

    def _soon(self) -> None:
        if self._timer is None and not self._wake.is_set():
            self._timer = asyncio.get_running_loop().call_later(FLUSH, self._now)

    def _now(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(self._beat_at - monotonic(), 0)):
                    await self._wake.wait()
            self._wake.clear()
            now = monotonic()
            if now >= self._beat_at:
                self._beat(now)
            await self._round_trip()

    def _beat(self, now: float) -> None:
        """Leases are renewed; what ended long ago is given up."""
        self._beat_at = now + BEAT
        for writing in list(self._open.values()):
            if writing.over_since and now - writing.over_since > PATIENCE:
                self._give_up(writing)
            else:
                self._due[writing] = None

    async def _round_trip(self) -> None:
        reading = [one for one in self._reading if not one[1].done()]
        asked = [*(one for one in self._asked if not one[1].done()), *reading[:READS]]
        self._asked, self._reading = [], reading[READS:]
        steps = self._steps()
        if not asked and not steps:
            return
        commands = [*(command for command, _ in asked), *(self._append(step) for step in steps)]
        begun = monotonic()
        try:
            answers = await self._execute(commands)
        except BaseException as error:
            if isinstance(error, TimeoutError | RedisTimeoutError) and monotonic() - begun > TIMEOUT + HELD_UP:
                self._once_more(asked, steps)
                return
            # Also of a bug, and when the loop is shut down: nobody is left waiting.
            for _, future in asked:
                _tell(future, error)
            if not isinstance(error, RedisError | OSError | TimeoutError):
                raise
            await self._lose(error, steps)
            return
        for (_, future), answer in zip(asked, answers, strict=False):
            _tell(future, answer)
        for step, answer in zip(steps, answers[len(asked) :], strict=True):
            if isinstance(answer, Exception):
                self._on_error(kind_of(answer))  # it is tried again with the next beat
            else:
                self._written(step, *answer)
        if self._reading:
            self._now()
        elif self._due:
            self._soon()

    async def _execute(self, commands: Sequence[_Command]) -> list[Any]:
        """Raises TimeoutError, and what the client library does when Redis is gone; other errors are answers."""
        load: list[_Command] = [] if self._loaded else [("SCRIPT", "LOAD", _SCRIPT)]
        async with asyncio.timeout(TIMEOUT), self._redis.pipeline(transaction=False) as pipeline:
            for command in (*load, *commands):
                pipeline.execute_command(*command)
            answers = (await pipeline.execute(raise_on_error=False))[len(load) :]
        for answer in answers:
            if isinstance(answer, RedisConnectionError | ReadOnlyError | NoScriptError):
                self._loaded = False
                if isinstance(answer, NoScriptError) and not load:
                    return await self._execute(commands)  # it was started anew, or another one has its place
                raise answer
        self._loaded = True
        return answers

    def _once_more(self, asked: Sequence[_Asked], steps: Sequence[_Step]) -> None:
        """The loop was held up, and the time over before anybody could read an answer: that says nothing of Redis."""
        self._loaded = False
        for one in asked:
            self._queue(one)
        self._write_again(steps)
        self._now()

    def _write_again(self, steps: Sequence[_Step]) -> None:
        self._due = {step.writing: None for step in steps if step.writing.name in self._open} | self._due

    async def _lose(self, error: Exception, steps: Sequence[_Step]) -> None:
        self._on_error(kind_of(error))
        self._lost, self._loaded = True, False
        for _, future in (*self._asked, *self._reading):
            _tell(future, error)
        self._asked.clear()
        self._reading.clear()
        self._write_again(steps)
        # An old connection may lead to a server that is a replica now.
        await self._redis.connection_pool.disconnect(inuse_connections=False)
        await asyncio.sleep(PAUSE)
        self._lost = False
        self._now()

    # --- what is written

    def _steps(self) -> list[_Step]:
        steps: list[_Step] = []
        while self._due and len(steps) < MOST:
            writing = next(iter(self._due))
            del self._due[writing]
            if writing.recording.first > writing.next:  # Redis was gone for too long
                self._give_up(writing)
            else:
                steps.append(_step(writing))
        return steps

    def _append(self, step: _Step) -> _Command:
        writing = step.writing
        pieces = [writing.recording.piece(number) or b"" for number in range(writing.next, step.next)]
        oldest, how = max(step.size - self._max_bytes, 0), "ended" if step.last else ""
        ttl = self._ttl if step.last else max(self._ttl, LEASE)
        words = "append", writing.held, b"".join(pieces), oldest, LEASE, ttl, how
        return ("EVALSHA", _SHA, 1, writing.name, *words)

    def _written(self, step: _Step, size: int, read: int) -> None:
        writing = step.writing
        if read:
            writing.read_at = monotonic()
        if size == step.size:
            writing.held, writing.next = size, step.next
            if step.last:
                self._open.pop(writing.name, None)
            elif writing.over_since or writing.recording.piece(writing.next) is not None:
                self._due[writing] = None
            return
        # It has what an unanswered round trip wrote, or has lost its memory, or somebody took us for dead.
        found = writing.recording.locate(size) if size >= 0 else None
        if found is None or found[1]:
            self._give_up(writing)
        else:
            writing.held, writing.next = size, found[0]
            self._due[writing] = None

    def _give_up(self, writing: _Writing) -> None:
        self._open.pop(writing.name, None)
        self._on_result("lost")

    async def close(self, seconds: float) -> None:
        """What has ended is written, as far as that is possible in so many seconds; `run` goes on until then."""
        deadline = monotonic() + seconds
        while self._open and monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def _step(writing: _Writing) -> _Step:
    """As many pieces as fit in PART, and one at least."""
    number, size = writing.next, writing.held
    while (piece := writing.recording.piece(number)) is not None:
        if number > writing.next and size + len(piece) > writing.held + PART:
            return _Step(writing, size, number, last=False)
        number += 1
        size += len(piece)
    return _Step(writing, size, number, last=bool(writing.over_since))


def _end(entry: bytes) -> int:
    """Bytes up to the end of the one with this id."""
    return int(entry.partition(b"-")[0])


def _tell(asked: asyncio.Future[Any], answer: object) -> None:
    """What Redis says; an error, whatever it is: that it does not."""
    if asked.done():
        return
    if isinstance(answer, BaseException):
        words = "streams cannot be resumed at the moment"
        asked.set_exception(Unavailable(words, code="streams_unavailable", retry_after=1))
    else:
        asked.set_result(answer)

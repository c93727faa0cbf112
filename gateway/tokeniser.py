"""Counts tokens in a process of its own: the vocabularies take 90 MB, and counting would hold up the event loop.

The process starts when it is first needed, and ends when nobody needs it, or we are gone. Texts pass through pipes
alone, one request at a time, so that a process that dies has died of the text it was given; the others wait their turn.
What cannot be counted, whatever the reason, is None, and the caller estimates.
"""

import asyncio
import logging
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from struct import unpack
from time import monotonic

from gateway import tokeniser_child
from gateway.protocol.vocabulary import Vocabulary
from gateway.tokeniser_child import LENGTH, REQUEST, VOCABULARIES

log = logging.getLogger("gateway.tokeniser")

IDLE = 60.0  # seconds without work after which the process ends
START = 10.0  # seconds that it may take to start
STUCK = 10.0  # seconds for one request: a megabyte takes a tenth of one
REST = 60.0  # seconds until the next try, when it cannot be started
TRIES = 2  # processes that a request may kill
MAX_QUEUED = 8 << 20  # characters that may wait
PIECE = 1 << 16  # characters that are encoded in one turn of the event loop
_OVERHEAD = 64  # characters that a text counts for, beside its own: a million empty ones are work too

# What an interpreter needs to find its modules. Of the rest, some is secret and none is its business.
_ENVIRONMENT = ("PATH", "HOME", "TMPDIR", "LD_", "DYLD_", "PYTHON", "VIRTUAL_ENV", "COVERAGE_")


@dataclass(eq=False, slots=True)
class _Request:
    texts: Sequence[str]
    vocabulary: Vocabulary
    size: int  # characters
    answer: asyncio.Future[list[int] | None] = field(default_factory=asyncio.Future)
    tries: int = 0


class Tokeniser:
    """Opened and closed by app.py; its process is started and ended by `_run`, the one task it has."""

    def __init__(self, *, idle: float = IDLE, program: str = tokeniser_child.__file__) -> None:
        self._idle = idle
        self._program = program
        self._requests: deque[_Request] = deque()
        self._queued = 0  # characters
        self._fresh = asyncio.Event()  # there is a request
        self._task: asyncio.Task[None] | None = None  # while there is a process
        self._resting_until = 0.0  # seconds, monotonic
        self._closed = False
        if find_spec("rs_bpe") is None:
            log.info("rs-bpe is not installed: tokens that a provider does not count are estimated")
            self._resting_until = float("inf")

    async def count(self, texts: Sequence[str], vocabulary: Vocabulary, seconds: float) -> list[int] | None:
        """Tokens of each text, within so many seconds; None when it cannot be had. Never raises."""
        size = sum(map(len, texts)) + _OVERHEAD * len(texts)
        if self._closed or monotonic() < self._resting_until or self._queued + size > MAX_QUEUED:
            return None
        request = _Request(texts, vocabulary, size)
        self._requests.append(request)
        self._queued += size
        self._fresh.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await request.answer  # cancelled by the time-out, and then left out by `_serve`
        return None

    async def close(self) -> None:
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # --- the process

    async def _run(self) -> None:
        try:
            while self._requests:
                async with self._process() as process:
                    await self._serve(process)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            log.warning("the tokeniser cannot be started, tokens are estimated: %s", error or type(error).__name__)
            self._resting_until = monotonic() + REST
        finally:
            while self._requests:
                self._finish(None)

    @asynccontextmanager
    async def _process(self) -> AsyncIterator[Process]:
        """One that has loaded what it needs. Raises OSError, TimeoutError or IncompleteReadError."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", self._program,
            stdin=PIPE, stdout=PIPE, stderr=DEVNULL,  # its tracebacks might quote a prompt
            env={name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)},
            start_new_session=True,  # Ctrl-C is for us; it ends with its standard input
        )  # fmt: skip
        try:
            assert process.stdout is not None
            async with asyncio.timeout(START):
                await process.stdout.readexactly(1)
            yield process
        finally:
            await _end(process)

    async def _serve(self, process: Process) -> None:
        """Returns when there was no work for a while, or the process died."""
        while await self._have_request():
            request = self._requests[0]
            if request.answer.done():  # nobody waits for it any more
                self._finish(None)
                continue
            request.tries += 1
            try:
                async with asyncio.timeout(STUCK):
                    counts = await _ask(process, request)
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                log.warning("the tokeniser died of %d characters of text", sum(map(len, request.texts)))
                if request.tries >= TRIES:
                    self._finish(None)
                return
            self._finish(counts)

    async def _have_request(self) -> bool:
        if not self._requests:
            self._fresh.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._idle):
                    await self._fresh.wait()
        return bool(self._requests)

    def _finish(self, counts: list[int] | None) -> None:
        request = self._requests.popleft()
        self._queued -= request.size
        if not request.answer.done():
            request.answer.set_result(counts)


async def _ask(process: Process, request: _Request) -> list[int]:
    assert process.stdin is not None
    assert process.stdout is not None
    data = bytearray(REQUEST.pack(VOCABULARIES.index(request.vocabulary), len(request.texts)))
    for text in request.texts:
        for at in range(0, len(text), PIECE):
            piece = text[at : at + PIECE].encode("utf-8", "surrogatepass")
            data += LENGTH.pack(len(piece)) + piece
            if len(data) >= PIECE:
                await _write(process.stdin, data)
                data = bytearray()
        data += LENGTH.pack(0)
    await _write(process.stdin, data)
    answer = await process.stdout.readexactly(LENGTH.size * len(request.texts))
    return list(unpack(f"!{len(request.texts)}I", answer))


async def _write(pipe: asyncio.StreamWriter, data: bytearray) -> None:
    if pipe.is_closing():
        raise BrokenPipeError  # uvloop's `write` would raise a RuntimeError, asyncio's nothing at all
    pipe.write(data)
    await pipe.drain()


async def _end(process: Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    with suppress(TimeoutError):
        async with asyncio.timeout(1):
            await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()

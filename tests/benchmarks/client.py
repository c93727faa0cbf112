"""One client of the load generator: it asks, reads the answer to its end, checks it, and asks again."""

import asyncio
import re
from array import array
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import cast

from tests.benchmarks.wire import STAMP

STALL = 10  # times the pace: a longer gap is a stall
_KEPT = 32  # bytes at the end of a read that may be the beginning of a stamp or a last word
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_END = b"0\r\n\r\n"


@dataclass
class Figures:
    """What all connections have seen in the time that counts; nanoseconds."""

    counting: bool = False
    answers: int = 0  # that ended, at any time
    requests: int = 0  # and in the time that counts
    chunks: int = 0
    stalls: int = 0
    errors: dict[str, int] = field(default_factory=dict)  # also those that came before
    latency: "array[int]" = field(default_factory=lambda: array("q"))
    first: "array[int]" = field(default_factory=lambda: array("q"))  # time to the first delta
    gap: "array[int]" = field(default_factory=lambda: array("q"))  # between two deltas
    transit: "array[int]" = field(default_factory=lambda: array("q"))  # from the provider's stamp to here


@dataclass(frozen=True, slots=True)
class Plan:
    request: bytes
    events: int
    pace: int  # milliseconds
    last_word: bytes


class Client(asyncio.Protocol):
    """One connection, which asks again and again until it is told to stop."""

    def __init__(self, plan: Plan, figures: Figures) -> None:
        self.plan = plan
        self._figures = figures
        self.stopping = False
        self.busy = False
        self.served = False  # it has read something of an answer
        self._reset()

    def _reset(self) -> None:
        self._rest = b""  # what may be half of something
        self._head = b""
        self._missing = -1  # bytes of a whole answer that are still to come; -1: unknown
        self._events = 0
        self._ended = False  # the last word was said
        self._at = 0  # when the last delta came, nanoseconds

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def ask(self) -> None:
        self._reset()
        self.busy = True
        self._asked = monotonic_ns()
        self._transport.write(self.plan.request)

    def connection_lost(self, error: Exception | None) -> None:
        if self.busy:
            self.fail("connection lost")

    def data_received(self, data: bytes) -> None:
        now = monotonic_ns()
        if not self._head:
            data = self._read_head(data)
            if not self._head or not self.busy:
                return
        if not self.plan.events:
            self._take_whole(data, now)
        else:
            self._take_events(data, now)

    def _read_head(self, data: bytes) -> bytes:
        """What follows the headers; they are kept once they are complete."""
        data, self._rest = self._rest + data, b""
        head, blank, body = data.partition(b"\r\n\r\n")
        if not blank:
            self._rest = data
            return b""
        self._head = head
        self.served = True
        if not head.startswith(b"HTTP/1.1 200 "):
            self.fail(head[9:12].decode("latin-1"))
        if length := _LENGTH.search(head):
            self._missing = int(length[1])
        return body

    def _take_whole(self, data: bytes, now: int) -> None:
        if self._missing >= 0:
            self._missing -= len(data)
            if self._missing < 0:
                self.fail("longer than its content-length")
                return
            whole = self._missing == 0
        else:
            whole = (self._rest + data).endswith(_END)
        self._rest = (self._rest + data)[-_KEPT:]
        if whole:
            self._finish(now)

    def _take_events(self, data: bytes, now: int) -> None:
        if self._rest:
            data = self._rest + data
        figures, end = self._figures, 0
        for match in STAMP.finditer(data):
            end = match.end()
            self._events += 1
            if figures.counting:
                self._count(now, int(match[1]))
            self._at = now
        if self._events >= self.plan.events:
            self._ended = self._ended or self.plan.last_word in data
            if data.endswith(_END):
                self._finish(now)
                return
        self._rest = data[max(end, len(data) - _KEPT) :]

    def _count(self, now: int, sent: int) -> None:
        figures = self._figures
        figures.chunks += 1
        figures.transit.append(now - sent)
        if not self._at:
            figures.first.append(now - self._asked)
            return
        gap = now - self._at
        figures.gap.append(gap)
        if gap > STALL * self.plan.pace * 1_000_000:
            figures.stalls += 1

    def _finish(self, now: int) -> None:
        if self.plan.events and (self._events != self.plan.events or not self._ended):
            self.fail(f"{self._events} deltas of {self.plan.events}, last word: {self._ended}")
            return
        self._figures.answers += 1
        if self._figures.counting:
            self._figures.requests += 1
            if not self.plan.events:
                self._figures.latency.append(now - self._asked)
        self.busy = False
        if not self.stopping:
            self.ask()

    def fail(self, words: str) -> None:
        errors = self._figures.errors
        errors[words] = errors.get(words, 0) + 1
        self.busy = False
        self.stopping = True
        self._transport.abort()

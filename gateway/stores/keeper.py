"""Writes answers after their clients have them, keeps claims alive, and sweeps.

Rule 1: no client waits for it. What does not fit into its queue is not kept, and counted.
Rule 2: the cache does without an answer that Postgres did not take at once. What an Idempotency-Key promised is tried
again for a while.
"""

import asyncio
import json
import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic

import asyncpg

from gateway.protocol.errors import Unavailable
from gateway.protocol.remembering import worth_keeping
from gateway.protocol.request import PARSE_HERE, Kind
from gateway.protocol.whole import Whole
from gateway.stores.answers import LEASE, ROW, Answers, Ended
from gateway.stores.postgres import kind_of

log = logging.getLogger("gateway.keeper")

MAX_QUEUED = 16 << 20  # bytes of answers that wait
MAX_ENTRIES = 1000  # of them
BATCH = 32  # answers that share a transaction
PAUSE = 1.0  # seconds after one that failed
PATIENCE = 30.0  # seconds that an idempotent answer is tried to be kept for
RENEW = LEASE / 4  # seconds
SWEEP = 60.0  # seconds between two sweeps, or sooner when a part of the bound was written meanwhile
PART = 32  # of the bound

RESULTS = ("kept", "unfit", "too_large", "full", "failed")


class Keeper:
    """Opened and closed by app.py, which has tasks for `run`, `renew` and `sweep`.

    `on_result` counts what became of each answer, one of RESULTS.
    """

    def __init__(
        self,
        answers: Answers,
        *,
        max_answer: int,
        max_bytes: int,
        on_result: Callable[[str], None] = lambda result: None,
        on_error: Callable[[str], None] = lambda kind: None,
    ) -> None:
        self.answers = answers
        self._max_answer = max_answer
        self._part = max_bytes // PART
        self._on_result = on_result
        self._on_error = on_error
        self._queue: deque[tuple[Ended, Kind]] = deque()
        self._freed: deque[tuple[bytes, str]] = deque()  # claims that come to nothing
        self._claims: dict[bytes, str] = {}  # ours, and whose
        self._bytes = 0  # in the queue
        self._written = 0  # bytes since the last sweep
        self._busy = False
        self._wake = asyncio.Event()

    # --- of the requests: nothing of this waits

    def keep(self, ended: Ended, kind: Kind) -> bool:
        """False: it is not kept. `kind`: of the request."""
        size = _size(ended)
        if size > self._max_answer:
            return self._refuse("too_large")
        if len(self._queue) >= MAX_ENTRIES or self._bytes + size > MAX_QUEUED:
            return self._refuse("full")
        self._bytes += size
        self._queue.append((ended, kind))
        self._wake.set()
        return True

    def _refuse(self, result: str) -> bool:
        self._on_result(result)
        return False

    def hold(self, digest: bytes, exchange_id: str) -> None:
        """A claim that was granted is renewed until it is kept or freed."""
        self._claims[digest] = exchange_id

    def free(self, digest: bytes, exchange_id: str) -> None:
        """Also one of which nobody knows whether it was granted."""
        self._let_go(digest, exchange_id)
        if len(self._freed) < MAX_ENTRIES:
            self._freed.append((digest, exchange_id))
            self._wake.set()

    def _let_go(self, digest: bytes, exchange_id: str) -> None:
        if self._claims.get(digest) == exchange_id:  # else it was lost, and is another's by now
            del self._claims[digest]

    # --- in the background

    async def run(self) -> None:
        """Writes. Until it is cancelled."""
        while True:
            self._busy = bool(self._queue or self._freed)
            if not self._busy:
                self._wake.clear()
                await self._wake.wait()
                continue
            if not await self._write():
                await asyncio.sleep(PAUSE)

    async def _write(self) -> bool:
        """False: Postgres is gone."""
        try:
            if self._freed:
                freed = list(self._freed)
                await self.answers.free(freed)
                for _ in freed:
                    self._freed.popleft()
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            self._bytes -= sum(_size(ended) for ended, _ in batch)
            await self._keep([one for one in batch if await self._fit(*one)])
        except Unavailable as error:
            self._on_error(kind_of(error))
            return False
        return True

    async def _fit(self, ended: Ended, kind: Kind) -> bool:
        """To be given to another request. What a client asks for by its own key is its own answer, whatever it is."""
        if ended.kind == "idempotency" or kind == "embedding":
            return True
        fit = await asyncio.to_thread(_fit, ended, kind) if _size(ended) > PARSE_HERE else _fit(ended, kind)
        if not fit:
            self._on_result("unfit")
        return fit

    async def _keep(self, batch: Sequence[tuple[Ended, Kind]]) -> None:
        """Raises Unavailable; then what an Idempotency-Key promised is in the queue again."""
        if not batch:
            return
        try:
            self._written += await self.answers.keep([ended for ended, _ in batch])
        except Unavailable:
            for ended, kind in batch:
                again = ended.kind == "idempotency" and monotonic() - ended.ended < PATIENCE
                if not again:
                    self._on_result("failed")
                if not (again and self.keep(ended, kind)) and ended.kind == "idempotency":
                    self.free(ended.digest, ended.kept.exchange_id)
            raise
        except asyncpg.PostgresError:
            if len(batch) > 1:  # which one was refused is found out one by one
                for one in batch:
                    with suppress(Unavailable):
                        await self._keep([one])
                return
            log.exception("an answer cannot be kept")
            self._on_result("failed")
            if batch[0][0].kind == "idempotency":
                self.free(batch[0][0].digest, batch[0][0].kept.exchange_id)
            return
        for ended, _ in batch:
            self._on_result("kept")
            if ended.kind == "idempotency":
                self._let_go(ended.digest, ended.kept.exchange_id)

    async def renew(self) -> None:
        """Renews claims, whatever a sweep takes its time for. Until it is cancelled."""
        while True:
            await asyncio.sleep(RENEW)
            try:
                if self._claims:
                    await self.answers.renew(list(self._claims.items()))
            except Unavailable as error:
                self._on_error(kind_of(error))

    async def sweep(self) -> None:
        """Deletes what nobody gets any more. Until it is cancelled."""
        sweep_at = monotonic() + random.uniform(0, SWEEP)  # noqa: S311 - so that not all processes come at once
        while True:
            await asyncio.sleep(RENEW)
            try:
                if monotonic() > sweep_at or self._written > self._part:
                    self._written, sweep_at = 0, monotonic() + SWEEP
                    await self.answers.sweep()
            except Unavailable as error:
                self._on_error(kind_of(error))

    async def close(self, seconds: float) -> None:
        """What waits is written, as far as that is possible in so many seconds; `run` goes on until then."""
        deadline = monotonic() + seconds
        while (self._busy or self._queue or self._freed) and monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def _size(ended: Ended) -> int:
    pieces = ended.kept.pieces
    return ROW + (len(ended.kept.whole or b"") if pieces is None else sum(len(events) for _, events in pieces))


def _fit(ended: Ended, kind: Kind) -> bool:
    body, pieces = ended.kept.whole, ended.kept.pieces
    try:
        if pieces is not None:
            whole = Whole(kind)
            for _, events in pieces:
                whole.add(events)
            body = whole.body()
        answer = json.loads(body or b"null")
        return isinstance(answer, dict) and worth_keeping(answer)
    except (ValueError, RecursionError):  # no JSON, or arguments of a call that are nested without end
        return False

"""Answers in Postgres that are given again: to the same request, and to the same Idempotency-Key.

Rule 1: a row belongs to one account, whose id is in its digest.
Rule 2: a row without a status is a claim: somebody is making that answer, and says so while it lives.
Rule 3: what an account has emptied does not come back: an answer that was begun before that is not kept.
Rule 4: all together keep to a number of bytes. Who has less than a fair share loses nothing of it.
"""

import asyncio
import struct
import zlib
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from time import monotonic
from typing import Any, Literal, NamedTuple

import asyncpg
import msgspec

from gateway.protocol.errors import Unavailable
from gateway.protocol.usage import Usage
from gateway.stores.postgres import (
    COMMAND_TIMEOUT,
    HOT_ACQUIRE_TIMEOUT,
    HOT_COMMAND_TIMEOUT,
    Connection,
    Pool,
    connection,
)

# A request waits for a look-up, and can do without: a silent Postgres costs it a quarter of a second in all, and the
# next ones nothing.
FIND_WAIT = 0.25  # seconds, for those before it
FIND_ACQUIRE = 0.1  # seconds
FIND_COMMAND = 0.15  # seconds
REST = 1.0  # seconds without look-ups after one that failed
MAX_LOOKUPS = 3  # at a time; a connection each
LEASE = 20.0  # seconds that a claim holds when nobody renews it
BATCH = 200  # rows that one statement deletes
SPARE = 16  # one part in so many is freed beyond the bound, so that the next answer does not cost a sweep
ROW = 256  # bytes that a row takes beside its answer
PACK_HERE = 1 << 16  # bytes of an answer; more are compressed in a thread: 64 KiB take a fifth of a millisecond
UNPACK_HERE = 1 << 14  # compressed bytes, which were half a megabyte, and take a millisecond

Kind = Literal["cache", "idempotency"]
_MARK = struct.Struct("<II")


class Kept(NamedTuple):
    """An answer that may be given again."""

    exchange_id: str  # who paid
    status: int
    provider: str
    model: str
    pieces: Sequence[tuple[int, bytes]] | None  # of a stream: when each came, milliseconds, and its events
    whole: bytes | None  # of an answer that is no stream
    usage: Usage | None
    age: float = 0.0  # seconds


class Ended(NamedTuple):
    """An answer that was made, and is to be kept for `ttl` seconds."""

    kind: Kind
    digest: bytes
    account_id: str
    kept: Kept
    ttl: float
    begun: float  # seconds, monotonic
    ended: float  # likewise
    asked: bytes | None = None


class Claimed(NamedTuple):
    """Whose an Idempotency-Key is already: of a request with such a body; None: its answer is being made."""

    asked: bytes  # empty: nobody knows before the answer is there
    kept: Kept | None


class Answers:
    """All of them. Whoever made `pool` closes it."""

    def __init__(self, pool: Pool, *, max_bytes: int) -> None:
        self._pool = pool
        self._max_bytes = max_bytes
        self._lookups = asyncio.Semaphore(MAX_LOOKUPS)
        self._rests_until = 0.0  # no look-ups, seconds, monotonic

    # --- the cache

    async def find(self, digest: bytes, max_age: float) -> Kept | None:
        """One that is kept in the cache, at most so many seconds old. Raises Unavailable, soon."""
        if self._lookups.locked():
            await self._wait()
        else:
            await self._lookups.acquire()
        try:  # who waited here while one failed does not wait for Postgres as well
            if monotonic() < self._rests_until:
                return None
            try:
                async with connection(self._pool, FIND_ACQUIRE) as borrowed:
                    row = await borrowed.fetchrow(_FIND, digest, timedelta(seconds=max_age), timeout=FIND_COMMAND)
            except Unavailable:
                self._rests_until = monotonic() + REST
                raise
        finally:
            self._lookups.release()
        return None if row is None else await _kept(row)

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(FIND_WAIT):
                await self._lookups.acquire()
        except TimeoutError as error:
            raise Unavailable("the look-ups before this one take too long") from error

    async def clear(self, account_id: str | None) -> int:
        """Empties the cache of an account, or of all: how many there were. Raises Unavailable."""
        async with connection(self._pool) as borrowed:
            async with borrowed.transaction():
                # Who keeps an answer meanwhile has done so before, and it goes; or sees that it may not.
                await borrowed.execute(_LOCK, _KEEPING, timeout=COMMAND_TIMEOUT)
                cleared = await borrowed.fetch(_CLEARED, account_id, timeout=COMMAND_TIMEOUT)
            return sum([await _empty(borrowed, str(row["id"]), row["answers_cleared_at"]) for row in cleared])

    # --- keys of clients' own

    async def claim(self, digest: bytes, account_id: str, asked: bytes, exchange_id: str) -> Claimed | None:
        """None: it is this exchange's from now on, until its answer is kept, or it is freed, or LEASE is over.

        `asked` may be empty where the body is yet to pass: whoever keeps the answer says it then. Raises Unavailable.
        """
        async with connection(self._pool, HOT_ACQUIRE_TIMEOUT) as borrowed:
            while True:
                ours = await borrowed.fetchval(
                    _CLAIM, digest, account_id, asked, exchange_id, _LEASE, timeout=HOT_COMMAND_TIMEOUT
                )
                if ours:
                    return None
                row = await borrowed.fetchrow(_CLAIMED, digest, timeout=HOT_COMMAND_TIMEOUT)
                if row is not None:  # else it was freed between the two
                    break
        return Claimed(row["asked"], None if row["status"] is None else await _kept(row))

    async def renew(self, claims: Collection[tuple[bytes, str]]) -> None:
        """Each the digest and the exchange of a claim. Raises Unavailable."""
        digests, exchange_ids = zip(*claims, strict=True) if claims else ((), ())
        async with connection(self._pool) as borrowed:
            await borrowed.execute(_RENEW, digests, exchange_ids, _LEASE, timeout=COMMAND_TIMEOUT)

    async def free(self, claims: Collection[tuple[bytes, str]]) -> None:
        """There will be no answer to these. Raises Unavailable."""
        digests, exchange_ids = zip(*claims, strict=True) if claims else ((), ())
        async with connection(self._pool) as borrowed:
            await borrowed.execute(_FREE, digests, exchange_ids, timeout=COMMAND_TIMEOUT)

    # --- both

    async def keep(self, ended: Sequence[Ended]) -> int:
        """In one transaction: bytes that it took. Raises Unavailable, and PostgresError for what no column holds."""
        # In one order, whoever writes: two that keep the same answers would else wait for each other.
        rows = [await _row(one) for one in sorted(ended, key=lambda one: (one.kind, one.digest))]
        async with connection(self._pool) as borrowed, borrowed.transaction():
            await borrowed.execute(_LOCK_SHARED, _KEEPING, timeout=COMMAND_TIMEOUT)
            await borrowed.executemany(_KEEP, rows, timeout=COMMAND_TIMEOUT)
        return sum(size for *_, size, _, _ in rows)

    async def sweep(self) -> bool:
        """Deletes what has expired, and the oldest beyond the bound. False: another process is at it.

        Raises Unavailable.
        """
        async with connection(self._pool) as borrowed:
            try:
                if not await borrowed.fetchval(_TRY_LOCK, _SWEEPING, timeout=COMMAND_TIMEOUT):
                    return False
                while await borrowed.fetchval(_EXPIRE, BATCH, timeout=COMMAND_TIMEOUT) == BATCH:
                    pass
                await self._shrink(borrowed)
                await borrowed.execute(_UNLOCK, _SWEEPING, timeout=COMMAND_TIMEOUT)
            except BaseException:  # cancelled, too: whether it has the lock is not known, and its pool does not ask
                with suppress(asyncpg.InterfaceError):  # it was lost meanwhile
                    borrowed.terminate()
                raise
            return True

    async def _shrink(self, borrowed: Connection) -> None:
        rows = await borrowed.fetch(_SIZES, timeout=COMMAND_TIMEOUT)
        sizes = {row["account_id"]: row["bytes"] for row in rows}
        if sum(sizes.values()) <= self._max_bytes:
            return
        share = fair_share(sizes.values(), self._max_bytes - self._max_bytes // SPARE)
        for account_id, size in sizes.items():
            excess = size - share
            while excess > 0:
                freed = await borrowed.fetchval(_TRIM, account_id, excess, BATCH, timeout=COMMAND_TIMEOUT)
                if not freed:
                    break
                excess -= freed


def fair_share(sizes: Iterable[int], room: int) -> int:
    """What each may have, so that all have `room` together and nobody gets less so that another has more.

    Max-min fairness: https://en.wikipedia.org/wiki/Max-min_fairness
    """
    waiting = sorted(sizes)
    share = room
    while waiting:
        share = room // len(waiting)
        if waiting[0] > share:
            break
        room -= waiting.pop(0)
    return share


# --- rows ---------------------------------------------------------------------------------------------------------

_LEASE = timedelta(seconds=LEASE)


async def _row(ended: Ended) -> tuple[Any, ...]:
    kept = ended.kept
    marks = None
    body = kept.whole or b""
    if kept.pieces is not None:
        marks = b"".join([_MARK.pack(at, len(events)) for at, events in kept.pieces])
        body = b"".join([events for _, events in kept.pieces])
    # Nine tenths of an event are as in the one before: at level 1 a stream shrinks to a thirtieth, 64 events in 70 µs.
    packed = zlib.compress(body, 1) if len(body) <= PACK_HERE else await asyncio.to_thread(zlib.compress, body, 1)
    usage = None if kept.usage is None else msgspec.json.encode(kept.usage).decode()
    size = len(packed) + len(marks or b"") + ROW
    ttl, since = timedelta(seconds=ended.ttl), timedelta(seconds=monotonic() - ended.begun)
    return (
        ended.kind, ended.digest, ended.account_id, ended.asked, kept.exchange_id, kept.status, kept.provider,
        kept.model, marks, packed, usage, size, ttl, since,
    )  # fmt: skip


async def _kept(row: asyncpg.Record) -> Kept:
    packed = row["body"]
    body = zlib.decompress(packed) if len(packed) <= UNPACK_HERE else await asyncio.to_thread(zlib.decompress, packed)
    usage = None if row["usage"] is None else msgspec.json.decode(row["usage"], type=Usage)
    pieces = None if row["marks"] is None else _pieces(row["marks"], body)
    return Kept(
        str(row["exchange_id"]),
        row["status"],
        row["provider"],
        row["model"],
        pieces,
        body if pieces is None else None,
        usage,
        max(0.0, row["age"]),
    )


def _pieces(marks: bytes, body: bytes) -> list[tuple[int, bytes]]:
    pieces, start = [], 0
    for at, size in _MARK.iter_unpack(marks):
        pieces.append((at, body[start : start + size]))
        start += size
    return pieces


# --- SQL ----------------------------------------------------------------------------------------------------------

# Advisory locks, by their names in ASCII: of who keeps answers (shared) or empties a cache, and of who sweeps.
_KEEPING = 0x6169675F6B656570  # "aig_keep"
_SWEEPING = 0x6169675F73776570  # "aig_swep"
_LOCK = "select pg_advisory_xact_lock($1)"
_LOCK_SHARED = "select pg_advisory_xact_lock_shared($1)"
_TRY_LOCK = "select pg_try_advisory_lock($1)"
_UNLOCK = "select pg_advisory_unlock($1)"

_FIND = """
select exchange_id, status, provider, model, marks, body, usage, extract(epoch from now() - kept_at)::float8 as age
from answers
where kind = 'cache' and digest = $1 and expires_at > now() and kept_at >= now() - $2::interval
"""

_CLAIM = """
insert into answers (kind, digest, account_id, asked, exchange_id, expires_at)
values ('idempotency', $1, $2, $3, $4, now() + $5::interval)
on conflict (kind, digest) do update set
    asked = excluded.asked, exchange_id = excluded.exchange_id, status = null, marks = null, body = null, usage = null,
    size = 0, kept_at = now(), expires_at = excluded.expires_at
where answers.expires_at <= now()
returning true
"""
_CLAIMED = """
select asked, exchange_id, status, provider, model, marks, body, usage,
    extract(epoch from now() - kept_at)::float8 as age
from answers
where kind = 'idempotency' and digest = $1 and expires_at > now()
"""
_RENEW = """
update answers set expires_at = now() + $3::interval
where kind = 'idempotency' and status is null
    and (digest, exchange_id) in (select * from unnest($1::bytea[], $2::uuid[]))
"""
_FREE = """
delete from answers
where kind = 'idempotency' and status is null
    and (digest, exchange_id) in (select * from unnest($1::bytea[], $2::uuid[]))
"""

# Of a claim that was lost meanwhile the answer is not kept: another makes it anew.
_KEEP = """
insert into answers (
    kind, digest, account_id, asked, exchange_id, status, provider, model, marks, body, usage, size, expires_at)
select $1, $2, a.id, $4, $5, $6, $7, $8, $9, $10, $11, $12, now() + $13::interval
from accounts a
where a.id = $3
    and ($1 = 'idempotency' or a.answers_cleared_at is null or a.answers_cleared_at <= now() - $14::interval)
on conflict (kind, digest) do update set
    asked = excluded.asked, exchange_id = excluded.exchange_id, status = excluded.status,
    provider = excluded.provider, model = excluded.model, marks = excluded.marks, body = excluded.body,
    usage = excluded.usage, size = excluded.size, kept_at = now(), expires_at = excluded.expires_at
where answers.kind = 'cache' or answers.exchange_id = excluded.exchange_id or answers.expires_at <= now()
"""

_CLEARED = """
update accounts set answers_cleared_at = clock_timestamp() where $1::uuid is null or id = $1
returning id, answers_cleared_at
"""
_EMPTY = """
with gone as (
    delete from answers where kind = 'cache' and digest in (
        select digest from answers where account_id = $1 and kind = 'cache' and kept_at <= $2 limit $3)
    returning 1)
select count(*) from gone
"""


async def _empty(borrowed: Connection, account_id: str, until: datetime) -> int:
    deleted = 0
    while count := await borrowed.fetchval(_EMPTY, account_id, until, BATCH, timeout=COMMAND_TIMEOUT):
        deleted += count
    return deleted


_EXPIRE = """
with gone as (
    delete from answers where (kind, digest) in (
        select kind, digest from answers where expires_at <= now() order by expires_at limit $1 for update skip locked)
    returning 1)
select count(*) from gone
"""
_SIZES = "select account_id, sum(size)::bigint as bytes from answers group by account_id"
# The oldest first; what a client's own key promised, after all else.
_TRIM = """
with oldest as (
    select kind, digest, sum(size) over (order by kind, kept_at, digest) - size as before
    from (
        select kind, digest, kept_at, size from answers
        where account_id = $1 and status is not null order by kind, kept_at, digest limit $3) as first
), gone as (
    delete from answers where (kind, digest) in (select kind, digest from oldest where before < $2)
    returning size)
select coalesce(sum(size), 0)::bigint from gone
"""

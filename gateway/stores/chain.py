"""The audit chain: what was written to table `usage`, sealed with a key that only the gateways have.

Every transaction that writes rows adds a link: which rows, a digest of each, and a head over all that and over the head
of the link before. Who alters, removes or adds a row or a link without the key is found out by `verify`. Who cuts off
the last links together with their rows is found out by an anchor: a head that was noted outside the database.

A digest and a head are HMAC-SHA256 (RFC 2104) over an array of values, as the database gives them back, in canonical
JSON (RFC 8785) after the word `row` or `link`.
"""

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from operator import itemgetter
from uuid import UUID

import asyncpg
import orjson

from gateway.stores.postgres import Connection, Pool, connection
from gateway.stores.secrets import kept_secret

DIGEST = 16  # bytes: enough that nobody finds another row with the same one
SLICE = 200  # rows that are sealed in one turn of the event loop: a third of a millisecond

PATIENCE = 30.0  # seconds for a statement of `verify`, of which each reads a few thousand rows
LINKS_AT_ONCE = 20
ROWS_AT_ONCE = 10_000


async def load_audit_key(pool: Pool, given: str) -> bytes:
    """The key of the chain, derived from the given secret, or from one made once and kept in the database.

    The latter convicts only those who cannot read table `secrets`.
    """
    secret = given.encode() if given else await kept_secret(pool, "audit_key")
    return hmac.digest(secret, b"usage chain", "sha256")  # by a label: the secret itself seals nothing else


def digest_of(key: bytes, row: Sequence[object]) -> bytes:
    return _seal(key, b"row", row)[:DIGEST]


def _seal(key: bytes, word: bytes, values: Sequence[object]) -> bytes:
    return hmac.digest(key, word + orjson.dumps(values, default=_text), "sha256")


def _sealing(key: bytes, word: bytes) -> Callable[[bytes], bytes]:
    """The same of many arrays that are JSON already. `hmac` begins with the key anew for each: twice the time."""
    block = key.ljust(sha256().block_size, b"\0")
    assert len(block) == sha256().block_size, "a longer key would have to be hashed"
    inner, outer = sha256(block.translate(hmac.trans_36) + word), sha256(block.translate(hmac.trans_5C))

    def seal(values: bytes) -> bytes:
        within, around = inner.copy(), outer.copy()
        within.update(values)
        around.update(within.digest())
        return around.digest()

    return seal


def _text(value: object) -> str:
    """Of what JSON has no form for: an id as its text, bytes as hexadecimal digits."""
    return value.hex() if isinstance(value, bytes) else str(value)


@asynccontextmanager
async def transaction(borrowed: Connection, begin: str, timeout: float) -> AsyncIterator[None]:
    """As asyncpg's own, with a time-out for BEGIN, COMMIT and ROLLBACK too: a pool may have been made without one.

    After a TimeoutError the connection is the caller's to terminate: its server does not answer.
    """
    await borrowed.execute(begin, timeout=timeout)
    try:
        yield
    except Exception as error:
        if not isinstance(error, TimeoutError):
            with suppress(asyncpg.InterfaceError, asyncpg.PostgresConnectionError, ConnectionError):  # so it is lost
                await borrowed.execute("rollback", timeout=timeout)
        raise
    await borrowed.execute("commit", timeout=timeout)


# --- links --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Link:
    """The columns of table `usage_chain` but the head, in their order (sql/migrations/0004_usage_chain.sql)."""

    seq: int
    at: datetime
    width: int
    request_ids: Sequence[UUID | str]
    started_ats: Sequence[datetime]
    digests: Sequence[bytes]
    replaces: bool
    covers_from: datetime | None

    def head(self, key: bytes, before: bytes) -> bytes:
        """`before`: the head of the link before, empty for the first."""
        return _seal(key, b"link", (before, *(getattr(self, name) for name in Link.__slots__)))


_LAST = "select * from last_usage_link()"
# Arrays as Postgres writes them: asyncpg asks of each value by itself what it is.
_ADD = """
insert into usage_chain
values ($1, $2, $3, $4::text::uuid[], $5::text::timestamptz[], $6::text::bytea[], $7, $8, $9)
"""


async def link_rows(
    borrowed: Connection,
    key: bytes,
    rows: Sequence[tuple[str, datetime, bytes]],
    *,
    replaces: bool,
    timeout: float,
) -> None:
    """Adds a link for rows that the transaction wrote: of each its id, its time, and all its values as a JSON array.
    The chain is locked to its end, so this is its last statement. `timeout`: seconds for each of two statements."""
    ordered = sorted(rows, key=itemgetter(1))
    digests = await _digests(key, ordered)
    seq, before, at, covers_from = await _last(borrowed, timeout)
    link = Link(
        seq=seq + 1,
        at=at,
        width=len(orjson.loads(ordered[0][2])),
        request_ids=[row[0] for row in ordered],
        started_ats=[row[1] for row in ordered],
        digests=digests,
        replaces=replaces,
        covers_from=covers_from,
    )
    await _add(borrowed, key, link, before, timeout)


async def link_drop(borrowed: Connection, key: bytes, covers_from: datetime, timeout: float) -> None:
    """Adds a link that says that what arrived before was dropped, unless one said so already."""
    seq, before, at, covered = await _last(borrowed, timeout)
    if covered is None or covered < covers_from:
        await _add(borrowed, key, Link(seq + 1, at, 0, [], [], [], False, covers_from), before, timeout)


async def _digests(key: bytes, rows: Sequence[tuple[str, datetime, bytes]]) -> list[bytes]:
    seal, digests = _sealing(key, b"row"), list[bytes]()
    for start in range(0, len(rows), SLICE):
        digests += [seal(values)[:DIGEST] for _, _, values in rows[start : start + SLICE]]
        await asyncio.sleep(0)
    return digests


async def _last(borrowed: Connection, timeout: float) -> tuple[int, bytes, datetime, datetime | None]:
    """Number and head of the last link, the time, and from when on the chain covers what arrives."""
    last = await borrowed.fetchrow(_LAST, timeout=timeout)
    assert last is not None
    # Somebody may have emptied the table. Usage goes on; `verify` misses the links of the rows that are there.
    return last["seq"] or 0, last["head"] or b"", last["at"], last["covers_from"]


async def _add(borrowed: Connection, key: bytes, link: Link, before: bytes, timeout: float) -> None:
    await borrowed.execute(
        _ADD,
        link.seq,
        link.at,
        link.width,
        _array(link.request_ids),
        _array(link.started_ats),
        _array([f"\\x{digest.hex()}" for digest in link.digests]),
        link.replaces,
        link.covers_from,
        link.head(key, before),
        timeout=timeout,
    )


def _array(values: Sequence[object]) -> str:
    """Quotes and backslashes in it are as in JSON."""
    return "{" + orjson.dumps(values).decode()[1:-1] + "}"


# --- verification -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LinkFault:
    what: str  # the end of a sentence: "was altered"
    link: int

    def __str__(self) -> str:
        return f"link {self.link} {self.what}"


@dataclass(frozen=True, slots=True)
class RowFault:
    what: str
    link: int | None  # that names the row last; None: none does
    request_id: str
    started_at: datetime

    def __str__(self) -> str:
        named = "" if self.link is None else f" (link {self.link})"
        return f"row {self.request_id} of {self.started_at.isoformat()} {self.what}{named}"


@dataclass(frozen=True, slots=True)
class Report:
    links: int  # that hold
    rows: int  # that are as their links say
    seq: int  # of the last link that holds; 0: there is none
    head: bytes
    covers_from: datetime | None  # rows that arrived before were not judged; None: there are none
    fault: LinkFault | RowFault | None

    @property
    def anchor(self) -> str:
        return anchor_of(self.seq, self.head)


def anchor_of(seq: int, head: bytes) -> str:
    return f"{seq}:{head.hex()}"


_HEAD = "select seq, head from usage_chain where seq > 0 order by seq desc limit 1"


async def read_head(pool: Pool) -> str | None:
    """The head of the chain as an anchor, unverified; None: it has no link yet. Raises Unavailable."""
    async with connection(pool) as borrowed:
        last = await borrowed.fetchrow(_HEAD, timeout=PATIENCE)
    return anchor_of(last["seq"], last["head"]) if last else None


async def verify(pool: Pool, key: bytes, anchors: Mapping[int, bytes] | None = None) -> Report:
    """Walks the whole chain, then all rows of `usage` by the time of their arrival, while others write to both.

    Stops at the first fault: of a link, else of a row. `anchors`: heads by the number of their link, noted earlier.
    Raises Unavailable.
    """
    async with connection(pool) as borrowed:
        walk, rows = _Walk(borrowed, key, anchors or {}), _Rows(borrowed, key)
        try:
            fault: LinkFault | RowFault | None = await walk.on() or walk.cut_off()
            if fault is None:
                fault = await rows.all_whole() or await walk.on()  # what was added meanwhile has named rows too
        except OverflowError:  # Python has no such date: asyncpg cannot read it, and no gateway wrote it
            fault = LinkFault(
                "is the last that can be read: of a later one, or of a row, the time is out of range", walk.seq
            )
    return Report(walk.links, rows.whole, walk.seq, walk.head, rows.covers_from, fault)


_LINKS = "select * from usage_chain where seq > $1 order by seq limit $2"


class _Walk:
    """The links in their order, each against the one before. One that holds moves `seq` and `head`."""

    def __init__(self, borrowed: Connection, key: bytes, anchors: Mapping[int, bytes]) -> None:
        self._borrowed = borrowed
        self._key = key
        self._anchors = anchors
        self.links = 0
        self.seq = 0
        self.head = b""

    async def on(self) -> LinkFault | None:
        """To the last link that there is now."""
        while links := await self._borrowed.fetch(_LINKS, self.seq, LINKS_AT_ONCE, timeout=PATIENCE):
            for *values, head in links:
                if fault := self._step(Link(*values), head):
                    return fault
        return None

    def _step(self, link: Link, head: bytes) -> LinkFault | None:
        if link.seq != self.seq + 1:
            return LinkFault("is missing", self.seq + 1)
        if not hmac.compare_digest(head, link.head(self._key, self.head)):
            return LinkFault(
                "was altered" if self.links else "was altered, or the key is not the one of this chain", link.seq
            )
        if not hmac.compare_digest(head, self._anchors.get(link.seq, head)):
            return LinkFault("is not the one that was anchored", link.seq)
        self.links, self.seq, self.head = self.links + 1, link.seq, head
        return None

    def cut_off(self) -> LinkFault | None:
        last = max(self._anchors, default=0)
        return LinkFault(f"is missing: an anchor names link {last}", self.seq + 1) if last > self.seq else None


# Rows and links of one moment: a link and what it names become visible together, and go together. The lock comes before
# the moment: a partition that is dropped in between would be missed by it.
_MOMENT = "begin isolation level repeatable read read only; lock table usage in access share mode"

# From `opens` to before `closes`; null: no bound. What retention has dropped since the last window is left out.
_WINDOW = """
select
    opens,
    (select covers_from from usage_chain order by seq desc limit 1) as covers_from,
    least(
        (select started_at from usage where started_at > coalesce(opens, '-infinity')
            order by started_at offset $2 limit 1),
        (select started_ats[1] from usage_chain where started_ats[1] > coalesce(opens, '-infinity')
            order by started_ats[1] offset $3 limit 1)
    ) as closes
from (select greatest($1::timestamptz, (select covers_from from usage_chain order by seq desc limit 1)) as opens) as x
"""

_NAMED = """
select link.seq, link.width, link.replaces, named.*
from
    (select coalesce($1::timestamptz, '-infinity') as opens, coalesce($2::timestamptz, 'infinity') as closes) as part,
    usage_chain as link,
    unnest(request_ids, started_ats, digests) as named (request_id, started_at, digest)
where started_ats[1] < closes and started_ats[cardinality(started_ats)] >= opens
    and named.started_at < closes and named.started_at >= opens
order by link.seq
"""

_STORED = """
select * from usage
where started_at >= coalesce($1::timestamptz, '-infinity') and ($2::timestamptz is null or started_at < $2)
order by started_at, request_id
"""


_Place = tuple[UUID, datetime]  # the primary key of a row


class _Rows:
    """The rows of `usage` against the links that name them, a few thousand at a time."""

    def __init__(self, borrowed: Connection, key: bytes) -> None:
        self._borrowed = borrowed
        self._key = key
        self.whole = 0
        self.covers_from: datetime | None = None

    async def all_whole(self) -> RowFault | None:
        opens: datetime | None = None
        while True:
            async with transaction(self._borrowed, _MOMENT, PATIENCE):
                window = await self._fetch(_WINDOW, opens, ROWS_AT_ONCE, LINKS_AT_ONCE)
                opens, self.covers_from, closes = window[0]
                named = await self._fetch(_NAMED, opens, closes)
                stored = await self._fetch(_STORED, opens, closes)
            if fault := self._judge(named, stored):
                return fault
            self.whole += len(stored)
            if closes is None:
                return None
            opens = closes

    async def _fetch(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        return await self._borrowed.fetch(query, *arguments, timeout=PATIENCE)

    def _judge(self, named: Sequence[asyncpg.Record], stored: Sequence[asyncpg.Record]) -> RowFault | None:
        """The first fault by time. Of links that name the same row the last one counts."""
        names, faults = dict[_Place, asyncpg.Record](), list[RowFault]()
        for name in named:
            place = name["request_id"], name["started_at"]
            if place in names and not name["replaces"]:
                faults.append(_fault("was removed, and written once more", name))
            names[place] = name
        for row in map(tuple, stored):
            if row[:2] not in names:
                faults.append(RowFault("was added: no link names it", None, str(row[0]), row[1]))
                continue
            name = names.pop(row[:2])
            if not hmac.compare_digest(name["digest"], digest_of(self._key, row[: name["width"]])):
                faults.append(_fault("was altered", name))
        removed = [_fault("was removed", name) for name in names.values()]
        return min(removed + faults, key=lambda fault: fault.started_at.replace(tzinfo=UTC), default=None)


def _fault(what: str, name: asyncpg.Record) -> RowFault:
    return RowFault(what, name["seq"], str(name["request_id"]), name["started_at"])

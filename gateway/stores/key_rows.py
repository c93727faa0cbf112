"""The rows of keys: what is stored of a key, and every statement that touches it.

`account_id` in a look-up is the tenant: with one, only that account's keys exist; None is for admins and sees all.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, NoReturn

import asyncpg

from gateway.exchange import Budget, Principal
from gateway.protocol.errors import InvalidRequest, NotFound, Unavailable
from gateway.stores.key_limits import NO_LIMITS, KeyLimits, budget_limits, burst_of
from gateway.stores.postgres import COMMAND_TIMEOUT, HOT_ACQUIRE_TIMEOUT, HOT_COMMAND_TIMEOUT, Pool, connection
from gateway.stores.stats import bound_of
from gateway.stores.tokens import prefix_of


@dataclass(frozen=True, slots=True)
class Key:
    """A key as its owner may see it."""

    id: str
    prefix: str
    name: str
    account_id: str
    email: str  # the owner's
    limits: KeyLimits  # all of them
    account_budget: Budget  # of all keys of the account together
    created_at: datetime
    expires_at: datetime | None  # None: never
    revoked_at: datetime | None


class KeyChanges(KeyLimits, total=False):
    """What to change; what is missing stays as it is."""

    name: str
    expires_at: datetime | None  # None: never


def parse_expiry(text: str) -> datetime:
    """The moment that `30d`, or an RFC 3339 time or date, says. Raises InvalidRequest when it is not to come."""
    now = datetime.now(UTC)
    try:
        bound = bound_of(text)
    except ValueError as error:
        raise InvalidRequest(f"invalid expires_at: {error}", param="expires_at") from None
    moment = now + bound if isinstance(bound, timedelta) else bound
    if moment <= now:
        raise InvalidRequest("invalid expires_at: it has passed", param="expires_at")
    return moment


class Proofs(NamedTuple):
    """What a token is checked against, and who it then is."""

    digest: bytes
    hash: str
    revoked: bool
    expires_in: float  # seconds, as the database's clock has it; infinity: never
    principal: Principal


# The budgets come as eight columns, and last: what an array of bigint is asyncpg would ask Postgres on each connection
# before its first look-up, which then takes 10 ms instead of 2.
_READ = """
select k.id, k.digest, k.hash, k.revoked_at is not null as revoked, k.name, k.account_id, a.role, k.expires_at,
       coalesce(extract(epoch from k.expires_at - now())::double precision, 'infinity') as expires_in,
       k.requests_per_minute, k.requests_per_second, k.burst, k.concurrent_requests, k.allowed_models,
       k.drain_seconds, k.cache_ttl,
       k.tokens_per_minute, k.tokens_per_day, k.cost_micros_per_day, k.cost_micros_per_month,
       a.tokens_per_minute, a.tokens_per_day, a.cost_micros_per_day, a.cost_micros_per_month
from keys k join accounts a on a.id = k.account_id
where k.id = any ($1::text[])
"""


async def read_proofs(pool: Pool, key_ids: Sequence[str]) -> dict[str, Proofs]:
    async with connection(pool, HOT_ACQUIRE_TIMEOUT) as borrowed:
        rows = await borrowed.fetch(_READ, key_ids, timeout=HOT_COMMAND_TIMEOUT)
    return {row["id"]: _proofs(row) for row in rows}


def _proofs(row: asyncpg.Record) -> Proofs:
    principal = Principal(
        key_id=row["id"],
        key_prefix=prefix_of(row["id"]),
        key_name=row["name"],
        account_id=str(row["account_id"]),
        role=row["role"],
        requests_per_minute=row["requests_per_minute"],
        requests_per_second=row["requests_per_second"],
        burst=burst_of(row["requests_per_second"], row["burst"]),
        concurrent_requests=row["concurrent_requests"],
        allowed_models=tuple(row["allowed_models"]),
        budget=Budget(*row[-8:-4]),
        account_budget=Budget(*row[-4:]),
        cache_ttl=row["cache_ttl"],
        drain_seconds=row["drain_seconds"],
        expires_at=row["expires_at"],
    )
    return Proofs(row["digest"], row["hash"], row["revoked"], row["expires_in"], principal)


class ProofReader:
    """Reads the rows of all keys that are asked for at the same time with one statement, on one connection.

    A connection for each was what a crowd of wrong keys used up: a good key behind 120 of them waited longer than
    HOT_ACQUIRE_TIMEOUT, and so did everybody else who wanted the database.

    `on_error()` hears of every statement that failed because Postgres is gone, once, however many wait for it.
    """

    def __init__(self, pool: Pool, *, on_error: Callable[[], None] = lambda: None) -> None:
        self._pool = pool
        self._on_error = on_error
        self._waiting: dict[str, list[asyncio.Future[Proofs | None]]] = {}
        self._work: asyncio.Task[None] | None = None  # ends by itself, within the time-outs, when nobody waits

    async def read(self, key_id: str) -> Proofs | None:
        """The row as it is after this call began. Raises Unavailable."""
        answer: asyncio.Future[Proofs | None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key_id, []).append(answer)
        if self._work is None:
            self._work = asyncio.create_task(self._run())
        return await answer

    async def _run(self) -> None:
        try:
            while self._waiting:
                asked, self._waiting = self._waiting, {}
                await self._answer(asked)
        finally:
            self._work = None

    async def _answer(self, asked: dict[str, list[asyncio.Future[Proofs | None]]]) -> None:
        try:
            found = await read_proofs(self._pool, list(asked))
        except Exception as error:  # whatever it is, it is for those who asked
            if isinstance(error, Unavailable):
                self._on_error()
            # Those who came meanwhile have waited as well: none of them waits for two time-outs.
            late, self._waiting = self._waiting, {}
            for answer in (answer for answers in (*asked.values(), *late.values()) for answer in answers):
                if not answer.done():
                    answer.set_exception(error)
            return
        for key_id, answers in asked.items():
            for answer in answers:
                if not answer.done():  # its client may have left
                    answer.set_result(found.get(key_id))


class NewRow(NamedTuple):
    """The first columns of _INSERT, in its order."""

    id: str
    account_id: str
    digest: bytes
    hash: str
    name: str
    expires_at: datetime | None


_LIMITS = tuple(NO_LIMITS)  # in the order of _INSERT and _UPDATE
_INSERT = """
insert into keys (id, account_id, digest, hash, name, expires_at, requests_per_minute, requests_per_second, burst,
                  concurrent_requests, allowed_models, tokens_per_minute, tokens_per_day, cost_micros_per_day,
                  cost_micros_per_month, drain_seconds, cache_ttl)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)
"""


async def insert_key(pool: Pool, row: NewRow, limits: KeyLimits) -> None:
    """Raises NotFound for an account that does not exist."""
    columns = {**NO_LIMITS, **limits}.values()
    try:
        async with connection(pool) as borrowed:
            await borrowed.execute(_INSERT, *row, *columns, timeout=COMMAND_TIMEOUT)
    except asyncpg.ForeignKeyViolationError:
        raise NotFound("there is no such account", code="account_not_found") from None


_UPDATE = """
update keys
set name = coalesce($3, name),
    requests_per_minute = coalesce($4, requests_per_minute),
    requests_per_second = coalesce($5, requests_per_second),
    burst = coalesce($6, burst),
    concurrent_requests = coalesce($7, concurrent_requests),
    allowed_models = coalesce($8, allowed_models),
    tokens_per_minute = coalesce($9, tokens_per_minute),
    tokens_per_day = coalesce($10, tokens_per_day),
    cost_micros_per_day = coalesce($11, cost_micros_per_day),
    cost_micros_per_month = coalesce($12, cost_micros_per_month),
    drain_seconds = coalesce($13, drain_seconds),
    cache_ttl = coalesce($14, cache_ttl),
    expires_at = case when $15 then $16 else expires_at end
where id = $1 and ($2::uuid is null or account_id = $2)
returning id
"""


async def update_key(pool: Pool, key_id: str, account_id: str | None, changes: KeyChanges) -> None:
    columns = [*map(changes.get, ("name", *_LIMITS)), "expires_at" in changes, changes.get("expires_at")]
    async with connection(pool) as borrowed:
        found = await borrowed.fetchval(_UPDATE, key_id, account_id, *columns, timeout=COMMAND_TIMEOUT)
    if found is None:
        _unknown(key_id)


_REVOKE = """
update keys set revoked_at = coalesce(revoked_at, now())
where id = $1 and ($2::uuid is null or account_id = $2)
returning id
"""


async def revoke_key(pool: Pool, key_id: str, account_id: str | None) -> None:
    async with connection(pool) as borrowed:
        found = await borrowed.fetchval(_REVOKE, key_id, account_id, timeout=COMMAND_TIMEOUT)
    if found is None:
        _unknown(key_id)


async def read_key(pool: Pool, key_id: str, account_id: str | None) -> Key:
    keys = await read_keys(pool, account_id, key_id)
    if not keys:
        _unknown(key_id)
    return keys[0]


_LIST = """
select k.id, k.name, k.account_id, a.email, k.created_at, k.expires_at, k.revoked_at,
       k.requests_per_minute, k.requests_per_second, k.burst, k.concurrent_requests, k.allowed_models,
       k.drain_seconds, k.cache_ttl,
       array[k.tokens_per_minute, k.tokens_per_day, k.cost_micros_per_day, k.cost_micros_per_month] as budget,
       array[a.tokens_per_minute, a.tokens_per_day, a.cost_micros_per_day, a.cost_micros_per_month] as account_budget
from keys k join accounts a on a.id = k.account_id
where ($1::uuid is null or k.account_id = $1) and ($2::text is null or k.id = $2)
order by k.created_at desc, k.id
"""


async def read_keys(pool: Pool, account_id: str | None, key_id: str | None = None) -> Sequence[Key]:
    async with connection(pool) as borrowed:
        rows = await borrowed.fetch(_LIST, account_id, key_id, timeout=COMMAND_TIMEOUT)
    return [_key(row) for row in rows]


def _key(row: asyncpg.Record) -> Key:
    return Key(
        id=row["id"],
        prefix=prefix_of(row["id"]),
        name=row["name"],
        account_id=str(row["account_id"]),
        email=row["email"],
        limits=_limits(row),
        account_budget=Budget(*row["account_budget"]),
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
    )


def _limits(row: asyncpg.Record) -> KeyLimits:
    return {
        "requests_per_minute": row["requests_per_minute"],
        "requests_per_second": row["requests_per_second"],
        "burst": burst_of(row["requests_per_second"], row["burst"]),
        "concurrent_requests": row["concurrent_requests"],
        "allowed_models": tuple(row["allowed_models"]),
        **budget_limits(Budget(*row["budget"])),
        "drain_seconds": row["drain_seconds"],
        "cache_ttl": row["cache_ttl"],
    }


_IDS = "select id from keys where account_id = $1 and revoked_at is null"


async def key_ids(pool: Pool, account_id: str) -> Sequence[str]:
    """Of the keys of an account that are not revoked."""
    async with connection(pool) as borrowed:
        return [row["id"] for row in await borrowed.fetch(_IDS, account_id, timeout=COMMAND_TIMEOUT)]


_ENDED = "select id from keys where id = any ($1::text[]) and (revoked_at is not null or expires_at <= now())"


async def ended_keys(pool: Pool, key_ids: Sequence[str]) -> Sequence[str]:
    """Those that are revoked or have expired."""
    async with connection(pool) as borrowed:
        return [row["id"] for row in await borrowed.fetch(_ENDED, key_ids, timeout=COMMAND_TIMEOUT)]


def _unknown(key_id: str) -> NoReturn:
    raise NotFound(f"there is no key {key_id[:64]!r} of yours", code="key_not_found")

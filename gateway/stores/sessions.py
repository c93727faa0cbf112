"""Who is signed in with a browser: a random token in a cookie, and the SHA-256 of it in the database.

A session lasts SESSION_SECONDS whatever is done with it, by the database's clock, and its row is read with every
request: signing out, or losing a role, is felt by the next one, in every process. Who watches /api/live is looked at
every few seconds.
"""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Literal, NamedTuple

from gateway.protocol.errors import NotFound, Unauthenticated, Unavailable
from gateway.stores.postgres import COMMAND_TIMEOUT, Pool, connection

SESSION_SECONDS = 12 * 3600  # a working day: https://pages.nist.gov/800-63-3/sp800-63b.html#aal2reauth
MAX_SESSIONS = 20  # of one account; with one more the oldest ends
MAX_SWEPT = 100  # expired rows that a sign-in deletes; it adds one
# Cookies cost nothing to make up. With a connection each, a crowd of them would keep keys from being looked up.
MAX_LOOKUPS = 2  # at a time; a connection each
LOOKUP_TIMEOUT = 2.0  # seconds to wait for one's turn

_TOKEN = re.compile(r"[\w-]{43}", re.ASCII)  # what token_urlsafe makes of 32 bytes


@dataclass(frozen=True, slots=True)
class Session:
    account_id: str
    email: str
    role: Literal["admin", "member"]
    expires_at: datetime


class NewSession(NamedTuple):
    """The only moment at which the token is known to us."""

    token: str
    session: Session


class SessionStore:
    """Sessions of all accounts. Whoever made `pool` closes it."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lookups = asyncio.Semaphore(MAX_LOOKUPS)

    async def open(self, account_id: str) -> NewSession:
        """For an account whose password was right. Raises NotFound when it is gone meanwhile, Unavailable."""
        token = secrets.token_urlsafe(32)
        return NewSession(token, await _insert(self._pool, account_id, _digest(token)))

    async def find(self, token: str) -> Session:
        """Whose it is. Raises Unauthenticated, the same for every kind of wrong token; Unavailable."""
        if not _TOKEN.fullmatch(token):
            raise _signed_out()
        async with self._turn():
            session = await _read(self._pool, _digest(token))
        if session is None:
            raise _signed_out()
        return session

    async def end(self, token: str) -> None:
        """For ever; what is no session, or none any more, is no error. Raises Unavailable."""
        if _TOKEN.fullmatch(token):
            async with self._turn():
                await _delete(self._pool, _digest(token))

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT):
                await self._lookups.acquire()
        except TimeoutError:
            raise Unavailable("sessions cannot be checked now", code="auth_unavailable", retry_after=1) from None
        try:
            yield
        finally:
            self._lookups.release()


def _digest(token: str) -> bytes:
    """Of 256 random bits: neither a slow hash nor a pepper would make it harder to guess."""
    return sha256(token.encode()).digest()


def _signed_out() -> Unauthenticated:
    return Unauthenticated("nobody is signed in: the session is unknown, ended or expired", code="invalid_session")


# --- SQL ----------------------------------------------------------------------------------------------------------

_SWEEP = """
delete from sessions where digest in (
    select digest from sessions where expires_at <= now() order by expires_at limit $1 for update skip locked)
"""
# Locked: two sign-ins at once would each count the sessions without the other's. New keys of the account may go on.
_OWNER = "select id, email, role from accounts where id = $1 for no key update"
_INSERT = """
insert into sessions (digest, account_id, created_at, expires_at)
select $1, $2, now, now + $3 from clock_timestamp() as now
returning expires_at
"""
_DELETE_OLDEST = """
delete from sessions where digest in (
    select digest from sessions where account_id = $1 order by created_at desc, digest offset $2)
"""


async def _insert(pool: Pool, account_id: str, digest: bytes) -> Session:
    lasts = timedelta(seconds=SESSION_SECONDS)
    async with connection(pool) as borrowed:
        # Before the transaction: it locks rows of others, and who waits for nothing while it does so makes no deadlock.
        await borrowed.execute(_SWEEP, MAX_SWEPT, timeout=COMMAND_TIMEOUT)
        async with borrowed.transaction():
            owner = await borrowed.fetchrow(_OWNER, account_id, timeout=COMMAND_TIMEOUT)
            if owner is None:
                raise NotFound("there is no such account", code="account_not_found")
            expires_at = await borrowed.fetchval(_INSERT, digest, account_id, lasts, timeout=COMMAND_TIMEOUT)
            await borrowed.execute(_DELETE_OLDEST, account_id, MAX_SESSIONS, timeout=COMMAND_TIMEOUT)
    return Session(str(owner["id"]), owner["email"], owner["role"], expires_at)


_READ = """
select a.id, a.email, a.role, s.expires_at
from sessions s join accounts a on a.id = s.account_id
where s.digest = $1 and s.expires_at > now()
"""


async def _read(pool: Pool, digest: bytes) -> Session | None:
    async with connection(pool) as borrowed:
        row = await borrowed.fetchrow(_READ, digest, timeout=COMMAND_TIMEOUT)
    return None if row is None else Session(str(row["id"]), row["email"], row["role"], row["expires_at"])


_DELETE = "delete from sessions where digest = $1"


async def _delete(pool: Pool, digest: bytes) -> None:
    async with connection(pool) as borrowed:
        await borrowed.execute(_DELETE, digest, timeout=COMMAND_TIMEOUT)

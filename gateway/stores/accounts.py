"""Accounts: people who own keys, and their passwords. The first one is the admin."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import asyncpg

from gateway.exchange import Budget, new_id
from gateway.protocol.errors import (
    Conflict,
    GatewayError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RateLimited,
    Unauthenticated,
)
from gateway.stores.attempts import Attempts
from gateway.stores.key_limits import BUDGET_NAMES, BudgetLimits
from gateway.stores.passwords import PASSWORD_HASHER, HashingPool, check_new_password, decoy, matches, normal_password
from gateway.stores.postgres import COMMAND_TIMEOUT, Pool, connection

Role = Literal["admin", "member"]

MAX_EMAIL = 254  # characters, RFC 5321 4.5.3.1.3 without the brackets
FAILURES_PER_MINUTE = 5  # of log-ins to one account: this is what stops guessing
# An address may be an office, and behind a load balancer it is the balancer's, so everybody's: a few wrong passwords
# must not lock all the others out. This only slows down who tries one password on many accounts.
FAILURES_PER_ADDRESS = 30  # of log-ins, a minute
# Whoever registers needs no account, and has us hash for a fifth of a second.
REGISTRATIONS_PER_ADDRESS = 30  # a minute, refused ones too

# What browsers take for an address: https://html.spec.whatwg.org/multipage/input.html#valid-e-mail-address
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_EMAIL = re.compile(rf"[a-z0-9.!#$%&'*+/=?^_`{{|}}~-]+@{_LABEL}(?:\.{_LABEL})*")


@dataclass(frozen=True, slots=True)
class Account:
    id: str
    email: str
    role: Role
    created_at: datetime
    budget: Budget  # of all its keys together


class AccountStore:
    def __init__(self, pool: Pool, *, hashing: HashingPool) -> None:
        self._pool = pool
        self._hashing = hashing
        self._decoy = decoy(PASSWORD_HASHER)
        self._failures = Attempts(FAILURES_PER_MINUTE)  # by email
        self._failures_from = Attempts(FAILURES_PER_ADDRESS)  # by address
        self._registrations_from = Attempts(REGISTRATIONS_PER_ADDRESS)  # by address

    async def register(self, email: str, password: str, *, registration: str, address: str = "") -> Account:
        """A new account. `address` is where its owner came from; an empty one is not limited.

        `registration` is GATEWAY_REGISTRATION. Raises PermissionDenied for who may not register, known or not; Conflict
        for a known email, after the work of a new one; RateLimited after thirty attempts from the address in a minute.
        """
        email = normal_email(email)
        check_new_password(password, email)
        admitted = _admits(registration, email)
        if not admitted and (registration != "closed" or await _any_account(self._pool)):
            raise _closed()  # before the hash: nobody makes us work for a no
        phc = await self._hash(normal_password(password), address)
        return await _insert(self._pool, email, phc, admitted)

    async def _hash(self, password: str, address: str) -> str:
        wait = self._registrations_from.wait(address)
        if wait:
            raise RateLimited(
                "too many registrations from this address; wait a minute",
                code="too_many_registrations",
                retry_after=wait,
            )
        work = self._hashing.submit(lambda: PASSWORD_HASHER.hash(password))
        if address:
            self._registrations_from.add(address)  # not before: whom a full queue sent away cost us nothing
        return await work

    async def login(self, email: str, password: str, *, address: str = "") -> Account:
        """Whose email and password these are. `address` is where they came from.

        Raises Unauthenticated (`invalid_credentials`), after the same time and work for a known and an unknown email;
        RateLimited after five failures of the account in a minute, or thirty from the address.
        """
        email = normal_email(email)
        password = normal_password(password)
        self._check_failures(email, address)
        found = await _read_by_email(self._pool, email)
        account, phc = found if found is not None else (None, self._decoy)
        right = await self._hashing.submit(lambda: matches(PASSWORD_HASHER, phc, password))
        # Again, since guesses may come all at once: after the last failure no answer says whether one was right.
        self._check_failures(email, address)
        if account is None or not right:
            self._failures.add(email)
            if address:
                self._failures_from.add(address)
            raise Unauthenticated("wrong email or password", code="invalid_credentials")
        return account

    def _check_failures(self, email: str, address: str) -> None:
        wait = max(self._failures.wait(email), self._failures_from.wait(address))
        if wait:
            raise RateLimited("too many failed log-ins; wait a minute", code="too_many_failures", retry_after=wait)

    async def find(self, email: str) -> Account:
        """The account of an email. Raises NotFound."""
        email = normal_email(email)
        found = await _read_by_email(self._pool, email)
        if found is None:
            raise NotFound(f"there is no account {email!r}", code="account_not_found", param="email")
        return found[0]

    async def get(self, account_id: str, tenant: str | None) -> Account:
        """`tenant` is the account that asks, None for an admin. Raises NotFound, for a foreign account too."""
        accounts = await _read_all(self._pool, tenant, account_id)
        if not accounts:
            raise _unknown(account_id)
        return accounts[0]

    async def list(self, tenant: str | None = None) -> Sequence[Account]:
        """All accounts that `tenant` may see, oldest first."""
        return await _read_all(self._pool, tenant)

    async def change(
        self, account_id: str, limits: BudgetLimits, announce: Callable[[str], Awaitable[None]]
    ) -> Account:
        """The account after it; what is missing in `limits` stays. Raises NotFound.

        `announce(account_id)` tells those who keep what they read of its keys (KeyStore.announce_account).
        """
        try:
            account = await _update(self._pool, account_id, limits)
        except asyncio.CancelledError:
            await announce(account_id)  # whoever asked has left, and it may be done all the same
            raise
        await announce(account_id)
        return account


def normal_email(email: str) -> str:
    """Lower case, without spaces around. ASCII only: two spellings of one address would be two accounts."""
    normal = email.strip().lower()
    # The Kelvin sign's lower case is a plain k: what is ASCII now must have been before.
    if len(normal) > MAX_EMAIL or not email.isascii() or not _EMAIL.fullmatch(normal):
        raise InvalidRequest(f"invalid email: an address of at most {MAX_EMAIL} ASCII characters", param="email")
    return normal


def _admits(registration: str, email: str) -> bool:
    """May this address register, whoever is there already? Whether it is its owner's nobody has proven."""
    if registration in ("open", "closed"):
        return registration == "open"
    return email.rpartition("@")[2] in {domain.strip().lower() for domain in registration.split(",")}


def _closed() -> GatewayError:
    words = "registration is closed here, or to addresses like this one: ask the admin for a key"
    return PermissionDenied(words, code="registration_closed")


def _unknown(account_id: str) -> GatewayError:
    return NotFound(f"there is no account {account_id[:64]!r}", code="account_not_found")


def _account(row: asyncpg.Record) -> Account:
    return Account(str(row["id"]), row["email"], row["role"], row["created_at"], Budget(*row["budget"]))


# --- SQL ----------------------------------------------------------------------------------------------------------

_ANY = "select exists (select from accounts)"


async def _any_account(pool: Pool) -> bool:
    async with connection(pool) as borrowed:
        return bool(await borrowed.fetchval(_ANY, timeout=COMMAND_TIMEOUT))


# Two that race to be first are told apart by this lock, held to the end of the transaction.
_ONE_AT_A_TIME = "select pg_advisory_xact_lock(hashtext('ai-gateway registration'))"
_INSERT = """
insert into accounts (id, email, password_hash, role)
select $1, $2, $3, case when exists (select from accounts) then 'member' else 'admin' end
where $4 or not exists (select from accounts)
returning id, email, role, created_at,
          array[tokens_per_minute, tokens_per_day, cost_micros_per_day, cost_micros_per_month] as budget
"""


async def _insert(pool: Pool, email: str, phc: str, admitted: bool) -> Account:
    """`admitted`: also when there are others."""
    try:
        async with connection(pool) as borrowed, borrowed.transaction():
            await borrowed.execute(_ONE_AT_A_TIME, timeout=COMMAND_TIMEOUT)
            columns = new_id(), email, phc, admitted
            row = await borrowed.fetchrow(_INSERT, *columns, timeout=COMMAND_TIMEOUT)
    except asyncpg.UniqueViolationError:
        raise Conflict("this email is registered", param="email", code="email_taken") from None
    if row is None:
        raise _closed()
    return _account(row)


_READ_BY_EMAIL = """
select id, email, role, created_at, password_hash,
       array[tokens_per_minute, tokens_per_day, cost_micros_per_day, cost_micros_per_month] as budget
from accounts where email = $1
"""


async def _read_by_email(pool: Pool, email: str) -> tuple[Account, str] | None:
    async with connection(pool) as borrowed:
        row = await borrowed.fetchrow(_READ_BY_EMAIL, email, timeout=COMMAND_TIMEOUT)
    return None if row is None else (_account(row), row["password_hash"])


_READ_ALL = """
select id, email, role, created_at,
       array[tokens_per_minute, tokens_per_day, cost_micros_per_day, cost_micros_per_month] as budget
from accounts
where ($1::uuid is null or id = $1) and ($2::uuid is null or id = $2)
order by created_at, id
"""


async def _read_all(pool: Pool, tenant: str | None, account_id: str | None = None) -> Sequence[Account]:
    async with connection(pool) as borrowed:
        rows = await borrowed.fetch(_READ_ALL, tenant, account_id, timeout=COMMAND_TIMEOUT)
    return [_account(row) for row in rows]


_UPDATE = """
update accounts
set tokens_per_minute = coalesce($2, tokens_per_minute),
    tokens_per_day = coalesce($3, tokens_per_day),
    cost_micros_per_day = coalesce($4, cost_micros_per_day),
    cost_micros_per_month = coalesce($5, cost_micros_per_month)
where id = $1
returning id, email, role, created_at,
          array[tokens_per_minute, tokens_per_day, cost_micros_per_day, cost_micros_per_month] as budget
"""


async def _update(pool: Pool, account_id: str, limits: BudgetLimits) -> Account:
    async with connection(pool) as borrowed:
        columns = map(limits.get, BUDGET_NAMES)
        row = await borrowed.fetchrow(_UPDATE, account_id, *columns, timeout=COMMAND_TIMEOUT)
    if row is None:
        raise _unknown(account_id)
    return _account(row)

"""Who a key belongs to, answered without a look-up nearly always.

A key is checked in this order, cheapest first, and whoever guesses never gets past the fourth:
1. verified before: found by the SHA-256 of the whole token, in a microsecond
2. refused before, or not a key by its form
3. its row, by id
4. HMAC-SHA256(pepper, secret), compared in constant time; an unknown id is compared with a digest of nothing
5. Argon2id of the whole token, once per key and process: 26 ms of a core, which is why a wrong secret must end at 4

A verified key is trusted for `cache_seconds`, or until it expires. Then a request reads its row again, without Argon2,
and those that arrive within the next second are served by what was known. While Postgres is gone it is trusted up to
`stale_seconds`. A change reaches the caches of all processes by Redis; without Redis, when their trust in the key runs
out.
"""

import asyncio
import hmac
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import Any, NoReturn, Unpack

from redis.asyncio import Redis
from redis.exceptions import RedisError

from gateway.exchange import Principal
from gateway.protocol.errors import PermissionDenied, Unauthenticated, Unavailable
from gateway.stores import key_rows
from gateway.stores.attempts import Attempts
from gateway.stores.channel import messages
from gateway.stores.key_limits import KeyLimits
from gateway.stores.key_rows import Key, KeyChanges, Proofs
from gateway.stores.passwords import KEY_HASHER, HashingPool, matches
from gateway.stores.postgres import Pool
from gateway.stores.tokens import TOKEN_LENGTH, make_token, parse_token, prefix_of

log = logging.getLogger(__name__)

CHANNEL = "aig:keys"  # Redis: the id of a key that was changed or revoked

MAX_VERIFIED = 50_000  # keys, about a kilobyte each
MAX_REFUSED = 10_000  # tokens
REFUSED_SECONDS = 30.0
RETRY_SECONDS = 1.0  # between two attempts to read a known key's row
FAILURES_PER_MINUTE = 20  # wrong keys from one address

PING_SECONDS = 2.0  # of silence on the channel, after which Redis is asked whether it is still there
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0  # seconds until the channel is opened again


@dataclass(frozen=True, slots=True)
class NewKey:
    """The only moment at which the whole key is known to us."""

    token: str = field(repr=False)
    id: str
    prefix: str


@dataclass(slots=True)
class _Verified:
    """A key that passed all checks. Changed by KeyStore alone; times in seconds of its clock."""

    principal: Principal
    digest: bytes
    fresh_until: float = 0.0  # trusted without a look-up
    stale_until: float = 0.0  # trusted when Postgres cannot be asked


class KeyStore:
    """Keys of all accounts. Whoever made `pool`, `redis` and `hashing` closes them.

    `on_read()` hears of every look-up of a row, for a key that the cache does not know or trusts no more, and
    `on_error()` of those that failed because Postgres is gone. They must not raise.
    """

    def __init__(
        self,
        pool: Pool,
        redis: Redis | None,
        *,
        pepper: bytes,
        cache_seconds: float,
        stale_seconds: float,
        hashing: HashingPool,
        clock: Callable[[], float] = time.monotonic,
        on_read: Callable[[], None] = lambda: None,
        on_error: Callable[[], None] = lambda: None,
    ) -> None:
        self._pool = pool
        self._on_read = on_read
        self._reader = key_rows.ProofReader(pool, on_error=on_error)
        self._redis = redis
        self._pepper = pepper
        self._cache_seconds = cache_seconds
        self._stale_seconds = max(stale_seconds, cache_seconds)
        self._hashing = hashing
        self._clock = clock
        self._nothing = secrets.token_bytes(32)  # the digest of unknown ids
        # By SHA-256 of the whole token: by a part of it, one key would answer for another.
        self._verified: OrderedDict[bytes, _Verified] = OrderedDict()  # the least used first
        self._refused: OrderedDict[bytes, float] = OrderedDict()  # until when; the oldest first
        self._proving: dict[bytes, asyncio.Future[bool]] = {}  # Argon2id in progress
        self._places: dict[str, bytes] = {}  # key id -> its place in _verified
        self._unread_until = 0.0  # Postgres could not be read a moment ago
        self._changes = 0  # heard of; a row that was asked for before the last one may be out of date
        self._changed = asyncio.Event()  # since `wait_for_change` was last called
        self.failures = Attempts(FAILURES_PER_MINUTE, clock=clock)  # by address; gateway.identity writes and reads it

    # --- who is it ------------------------------------------------------------------------------------------------

    async def verify(self, token: str) -> Principal:
        """Whose key this is. Raises Unauthenticated, the same for every kind of wrong key, or Unavailable."""
        if len(token) != TOKEN_LENGTH or not token.isascii():
            _refuse()
        place = sha256(token.encode()).digest()
        known = self._verified.get(place)
        if known is None:
            return await self._check(place, token)
        self._verified.move_to_end(place)
        if self._clock() >= known.fresh_until:
            await self._check_again(place, known)
        return known.principal

    async def _check(self, place: bytes, token: str) -> Principal:
        """All of it, for a key that is not in the cache."""
        parsed = parse_token(token)
        if parsed is None or self._refused.get(place, 0.0) > self._clock():
            _refuse()
        asked, changes = self._clock(), self._changes
        proofs = await self._read(parsed.id)
        digest = self._digest(parsed.secret)
        right = hmac.compare_digest(digest, self._nothing if proofs is None else proofs.digest)
        if proofs is None or not right or proofs.revoked:
            self._remember_refused(place)
            _refuse()
        if proofs.expires_in <= 0:
            _refuse()  # not remembered: it may be given more time
        if not await self._prove(place, proofs.hash, token):
            self._remember_refused(place)
            _refuse()
        known = self._remember(place, proofs)
        self._trust(known, asked, changes, proofs.expires_in)
        return known.principal

    async def lend(self, key_id: str, account_id: str) -> Principal:
        """A key as its account uses it without its secret, because it is signed in. Its row is read each time.

        Raises PermissionDenied (`key_not_usable`), the same for a key that is unknown, another account's, revoked or
        expired; Unavailable.
        """
        proofs = await self._read(key_id)
        if proofs is None or proofs.principal.account_id != account_id or proofs.revoked or proofs.expires_in <= 0:
            words = "there is no such key of this account, or it is revoked or expired"
            raise PermissionDenied(words, code="key_not_usable")
        return proofs.principal

    async def _prove(self, place: bytes, phc: str, token: str) -> bool:
        """Argon2id, once however many wait for it; that the first of them leaves does not end it."""
        proof = self._proving.get(place)
        if proof is None:
            proof = self._proving[place] = self._hashing.submit(lambda: matches(KEY_HASHER, phc, token))
            proof.add_done_callback(lambda _: self._proving.pop(place))
        return await asyncio.shield(proof)

    async def _check_again(self, place: bytes, known: _Verified) -> None:
        """Reads the row of a known key whose trust ran out. Raises when it is trusted no more."""
        asked, changes = self._clock(), self._changes
        if asked < self._unread_until and asked < known.stale_until:
            self._bear_with(known, asked)  # Postgres has just failed another: one a second finds out, all others go on
            return
        if asked < known.fresh_until + RETRY_SECONDS:
            # In steady use: one request asks, the others need not. A key that rested is not served unasked.
            self._bear_with(known, asked)
        try:
            proofs = await self._read(known.principal.key_id)
        except Unavailable:
            if self._clock() >= known.stale_until:
                raise
            self._bear_with(known, self._clock())
            return
        if proofs is None or proofs.revoked or not hmac.compare_digest(proofs.digest, known.digest):
            self._drop(place)
            self._remember_refused(place)
            _refuse()
        if proofs.expires_in <= 0:
            self._drop(place)
            _refuse()
        known.principal = proofs.principal
        self._trust(known, asked, changes, proofs.expires_in)

    async def _read(self, key_id: str) -> Proofs | None:
        self._on_read()
        try:
            return await self._reader.read(key_id)
        except Unavailable as error:
            self._unread_until = self._clock() + RETRY_SECONDS
            # Never a 401: a client would throw a good key away.
            raise Unavailable("keys cannot be checked now", code="auth_unavailable", retry_after=1) from error

    def _digest(self, secret: str) -> bytes:
        return hmac.digest(self._pepper, secret.encode(), "sha256")

    # --- what is remembered ---------------------------------------------------------------------------------------

    def _trust(self, known: _Verified, asked: float, changes: int, expires_in: float) -> None:
        """From the moment its row was asked for; not at all when a change was heard of since."""
        if changes == self._changes:
            known.fresh_until = asked + min(self._cache_seconds, expires_in)
            known.stale_until = asked + min(self._stale_seconds, expires_in)

    def _bear_with(self, known: _Verified, now: float) -> None:
        known.fresh_until = min(now + RETRY_SECONDS, known.stale_until)

    def _remember(self, place: bytes, proofs: Proofs) -> _Verified:
        known = self._verified[place] = _Verified(proofs.principal, proofs.digest)
        self._places[proofs.principal.key_id] = place
        if len(self._verified) > MAX_VERIFIED:
            self._drop(next(iter(self._verified)))
        return known

    def _drop(self, place: bytes) -> None:
        known = self._verified.pop(place, None)
        if known is not None:
            self._places.pop(known.principal.key_id, None)

    def _remember_refused(self, place: bytes) -> None:
        self._refused[place] = self._clock() + REFUSED_SECONDS
        self._refused.move_to_end(place)
        if len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)

    def _forget(self, key_id: str) -> None:
        """It was changed or revoked: its row is read before it is trusted again, and not while Postgres is gone."""
        self._changes += 1
        self._changed.set()
        known = self._verified.get(self._places.get(key_id, b""))
        if known is not None:
            known.fresh_until = known.stale_until = 0.0

    def _distrust_all(self) -> None:
        """What changed while nobody listened is not known: every row is read before its key is trusted again."""
        self._changes += 1
        self._changed.set()
        for known in self._verified.values():
            known.fresh_until = 0.0

    # --- changes --------------------------------------------------------------------------------------------------

    async def create(
        self, account_id: str, name: str, expires_at: datetime | None = None, **limits: Unpack[KeyLimits]
    ) -> NewKey:
        """A new key of an account. Raises NotFound for an account that does not exist."""
        token = make_token()
        parsed = parse_token(token)
        assert parsed is not None
        row = key_rows.NewRow(
            id=parsed.id,
            account_id=account_id,
            digest=self._digest(parsed.secret),
            hash=await self._hashing.submit(lambda: KEY_HASHER.hash(token)),
            name=name,
            expires_at=expires_at,
        )
        await key_rows.insert_key(self._pool, row, limits)
        return NewKey(token, parsed.id, prefix_of(parsed.id))

    async def change(self, key_id: str, account_id: str | None, changes: KeyChanges) -> Key:
        """The key after it. `account_id` is its owner, None for an admin. Raises NotFound, for a foreign key too."""
        try:
            await key_rows.update_key(self._pool, key_id, account_id, changes)
        except asyncio.CancelledError:
            await self._announce(key_id)  # whoever asked has left, and it may be done all the same
            raise
        await self._announce(key_id)
        return await key_rows.read_key(self._pool, key_id, account_id)

    async def revoke(self, key_id: str, account_id: str | None) -> None:
        """For ever; once more is no error. Raises NotFound, for a foreign key too."""
        try:
            await key_rows.revoke_key(self._pool, key_id, account_id)
        except asyncio.CancelledError:
            await self._announce(key_id)
            raise
        await self._announce(key_id)

    async def get(self, key_id: str, account_id: str | None) -> Key:
        """A key, revoked or not. Raises NotFound, for a foreign key too."""
        return await key_rows.read_key(self._pool, key_id, account_id)

    async def list(self, account_id: str | None) -> Sequence[Key]:
        """All keys of an account, or with None of all, newest first, revoked ones too."""
        return await key_rows.read_keys(self._pool, account_id)

    async def announce_account(self, account_id: str) -> None:
        """What all its keys share was changed; heard of like a change of each. Raises Unavailable."""
        await self._announce(*await key_rows.key_ids(self._pool, account_id))

    async def _announce(self, *key_ids: str) -> None:
        for key_id in key_ids:
            self._forget(key_id)
        if self._redis is None or not key_ids:
            return
        try:
            async with self._redis.pipeline(transaction=False) as channel:
                for key_id in key_ids:
                    channel.publish(CHANNEL, key_id)
                await channel.execute()
        except (RedisError, OSError) as error:
            # It is done: the other processes will see it when their trust in the keys runs out.
            log.warning("a change of %s was not announced: %s", prefix_of(key_ids[0]), type(error).__name__)

    async def ended(self, key_ids: Collection[str]) -> Sequence[str]:
        """Those of them that are revoked or have expired. Raises Unavailable."""
        return await key_rows.ended_keys(self._pool, list(key_ids))

    # --- hearing of changes ---------------------------------------------------------------------------------------

    async def listen(self) -> None:
        """Hears what any process changes, until it is cancelled. Comes back by itself when Redis does."""
        pause = FIRST_PAUSE
        while self._redis is not None:
            heard = self._changes
            try:
                async with self._redis.pubsub() as channel:
                    await channel.subscribe(CHANNEL)
                    async for message in messages(channel, PING_SECONDS):
                        self._hear(message)
            except (RedisError, OSError) as error:
                if self._changes != heard:  # it had been open
                    log.warning("the channel of key changes broke: %s", type(error).__name__)
                    pause = FIRST_PAUSE
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def wait_for_change(self, seconds: float) -> None:
        """Until a change is heard of that came after the last call, or `seconds` have passed. For one task only."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        self._changed.clear()

    def _hear(self, message: Mapping[str, Any]) -> None:
        if message["type"] == "subscribe":
            self._distrust_all()  # comes after a reconnect by the library, too
        elif message["type"] == "message":
            self._forget(message["data"].decode("ascii", "replace"))


def _refuse() -> NoReturn:
    """One message for all: which part of a key was wrong is nobody's business."""
    raise Unauthenticated("incorrect API key provided: it is unknown, mistyped, revoked or expired")

"""`Idempotency-Key`: what a client asks once more, with a key of its own, is answered as it was the first time.

https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/; what is kept is as Stripe keeps it
(https://docs.stripe.com/api/idempotent_requests): the first answer with its status, once a provider has begun. Unlike
there, a failure that another try may mend (5xx, 429) leaves the key free.

Rule 1: a key means something in its account and on its path.
Rule 2: nobody's provider is asked before Postgres holds the claim: a promise that cannot be kept is not made.
Rule 3: who comes while the answer is being made gets it as it comes in the same process, and waits for it in another.
Rule 4: what is passed on by its path is waited for, wherever it is; until then nobody reads the body of who waits, so
that it can still be sent when that answer is none.
"""

import asyncio
from functools import partial
from hashlib import sha256
from time import monotonic
from types import TracebackType
from typing import Self

from aiohttp import web
from multidict import istr

from gateway.appkeys import KEEPER, PULSE, SETTINGS
from gateway.exchange import Exchange
from gateway.protocol.errors import (
    GatewayError,
    IdempotencyInProgress,
    IdempotencyMismatch,
    InvalidRequest,
    Unavailable,
    UpstreamRejected,
)
from gateway.protocol.remembering import fingerprint
from gateway.protocol.request import PARSE_HERE
from gateway.replay import replay
from gateway.sharing import SHARING, Generation
from gateway.stores.answers import Claimed, Ended, Kept
from gateway.upload import Upload

IDEMPOTENCY_KEY = istr("Idempotency-Key")
MAX_KEY = 255  # characters, as many as Stripe takes
TTL = 86400.0  # seconds
WAIT = 30.0  # seconds that a request waits for an answer that another process makes
POLL = 0.05, 1.0  # seconds between two looks, at first and at most
# Of a provider, these depend on more than the request: on a credential, on the moment.
_PASSING = frozenset({401, 403, 408, 409, 425, 429})


async def idempotent(request: web.Request, exchange: Exchange) -> web.StreamResponse:
    """Answer it, for the first time or again. Raises GatewayError only while no byte was sent."""
    digest = _digest(request, exchange)
    asked = await _fingerprint(exchange)
    sharing, waiting = request.app[SHARING], _Waiting(request)
    while True:
        generation = sharing.find(digest)
        if generation is not None:
            _check_same(await _fingerprint(generation.exchange), asked)
            exchange.headers["Idempotency-Replayed"] = "true"
            return await generation.listen(request, exchange, "replay")
        claimed = await _claim(request, exchange, digest, asked)
        if claimed is None:
            break
        _check_same(claimed.asked, asked)
        if claimed.kept is not None:
            exchange.headers["Idempotency-Replayed"] = "true"
            return await replay(request, exchange, claimed.kept, "replay")
        await waiting.pause()
    generation = sharing.begin(
        digest,
        request,
        exchange,
        linger=request.app[SETTINGS].gateway_total_timeout,
        done=partial(_done, request, digest, asked),
    )
    return await generation.listen(request, exchange, "provider")


def _digest(request: web.Request, exchange: Exchange, query: str = "") -> bytes:
    """Of all that a key is one's own in. Raises InvalidRequest for a key that is none."""
    assert exchange.principal is not None
    key, account_id = _key(request), exchange.principal.account_id
    own = exchange.own_credential or ""  # what one paid for by itself is not another's
    path = f"{request.path}?{query}" if query else request.path
    return sha256(f"{account_id} {path} {own} {key}".encode()).digest()


def _key(request: web.Request) -> str:
    values = request.headers.getall(IDEMPOTENCY_KEY)
    key = values[0]
    if len(values) > 1 or not (1 <= len(key) <= MAX_KEY and key.isascii() and key.isprintable()):
        words = f"invalid {IDEMPOTENCY_KEY}: 1 to {MAX_KEY} printable ASCII characters are required, once"
        raise InvalidRequest(words, param=IDEMPOTENCY_KEY)
    return key


async def _fingerprint(exchange: Exchange) -> bytes:
    assert exchange.asked is not None
    return await _hash(exchange.asked.body)


async def _hash(body: bytes) -> bytes:
    return fingerprint(body) if len(body) <= PARSE_HERE else await asyncio.to_thread(fingerprint, body)


def _check_same(before: bytes, asked: bytes) -> None:
    if before != asked:
        raise IdempotencyMismatch("this Idempotency-Key was used for another request")


class _Waiting:
    """For an answer that is being made elsewhere."""

    def __init__(self, request: web.Request) -> None:
        self._pulse = request.app[PULSE]
        self._until = monotonic() + WAIT
        self._pause = POLL[0]

    async def pause(self) -> None:
        """Raises IdempotencyInProgress when it has been long enough."""
        if monotonic() > self._until or self._pulse.draining:
            raise IdempotencyInProgress("a request with this Idempotency-Key is still being answered", retry_after=2)
        await asyncio.sleep(self._pause)
        self._pause = min(2 * self._pause, POLL[1])


async def _claim(request: web.Request, exchange: Exchange, digest: bytes, asked: bytes) -> Claimed | None:
    """None: it is ours, and is renewed from now on."""
    assert exchange.principal is not None
    keeper = request.app[KEEPER]
    try:
        claimed = await keeper.answers.claim(digest, exchange.principal.account_id, asked, exchange.id)
    except asyncio.CancelledError:
        keeper.free(digest, exchange.id)  # Postgres may have granted it
        raise
    except Unavailable as error:
        keeper.free(digest, exchange.id)
        raise Unavailable(
            "the database cannot be reached, and without it an Idempotency-Key promises nothing",
            code="idempotency_unavailable",
            retry_after=1,
        ) from error
    if claimed is None:
        keeper.hold(digest, exchange.id)
    return claimed


def _keep(request: web.Request, exchange: Exchange, digest: bytes, asked: bytes, kept: Kept) -> bool:
    """False: it is not kept, and the key is to be freed."""
    assert exchange.asked is not None and exchange.principal is not None
    account_id, now = exchange.principal.account_id, monotonic()
    ended = Ended("idempotency", digest, account_id, kept, TTL, exchange.started, now, asked)
    return request.app[KEEPER].keep(ended, exchange.asked.kind)


def _done(request: web.Request, digest: bytes, asked: bytes, generation: Generation) -> None:
    exchange, kept = generation.exchange, _kept(generation)
    if kept is None or not _keep(request, exchange, digest, asked, kept):
        request.app[KEEPER].free(digest, exchange.id)


def _kept(generation: Generation) -> Kept | None:
    """What is given again; None: the next one with this key begins anew."""
    error = generation.recording.error
    if error is None:
        return generation.kept() if generation.whole else None
    return generation.kept(error) if _final(generation.exchange, error) else None


def _final(exchange: Exchange, error: GatewayError) -> bool:
    """It is the provider's last word on such a request."""
    status = error.http_status
    return exchange.outcome == "rejected" and 400 <= status < 500 and status not in _PASSING


# --- what is passed on by its path --------------------------------------------------------------------------------


class Promise:
    """That a request which is passed on gets one answer. Entered by whom the claim was granted: on its way out what was
    not kept is freed. Raises InvalidRequest for a key that is none.
    """

    def __init__(self, request: web.Request, exchange: Exchange, query: str) -> None:
        self._request = request
        self._exchange = exchange
        self._digest = _digest(request, exchange, query)
        self._body: bytes | Upload = b""
        self._said = b""  # by a body that is known from the beginning
        self._kept = False

    async def claim(self, body: bytes | Upload) -> Kept | None:
        """The answer that there is to this request, once there is one; None: it is ours to get. Raises GatewayError."""
        self._body = body
        if isinstance(body, bytes) and body:
            self._said = await _hash(body)
        waiting, asked = _Waiting(self._request), self._asked()
        while True:
            claimed = await _claim(self._request, self._exchange, self._digest, asked)
            if claimed is None:
                return None
            if claimed.kept is not None:
                if isinstance(body, Upload):
                    while await body.read():
                        pass
                _check_same(claimed.asked, self._asked())
                return claimed.kept
            if claimed.asked and asked:
                _check_same(claimed.asked, asked)
            await waiting.pause()

    async def replay(self, kept: Kept) -> web.StreamResponse:
        self._exchange.headers |= {"Idempotency-Replayed": "true", "Cache-Control": "no-store"}
        return await replay(self._request, self._exchange, kept, "replay")

    def keep(self, body: bytes, status: int = 200) -> None:
        """An answer that is whole; not when the provider gave it before it had the whole request."""
        exchange, asked = self._exchange, self._asked()
        if not asked or self._kept:
            return
        assert exchange.target is not None
        usage = exchange.meter.usage if exchange.meter is not None else None
        provider, model = exchange.target.provider.name, exchange.target.model
        kept = Kept(exchange.id, status, provider, model, None, body, usage)
        self._kept = _keep(self._request, exchange, self._digest, asked, kept)

    def _asked(self) -> bytes:
        """Of all that was said; empty while nobody knows."""
        said = self._said if isinstance(self._body, bytes) else self._body.digest()
        if said is None:
            return b""
        # Of a request without a model the header says who is asked, as much as a body does.
        who = "" if self._exchange.model else self._exchange.route[0][0].provider.name
        return sha256(who.encode() + b" " + said).digest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(error, UpstreamRejected) and _final(self._exchange, error):
            self.keep(error.body(), error.http_status)
        if not self._kept:
            self._request.app[KEEPER].free(self._digest, self._exchange.id)

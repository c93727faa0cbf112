"""From a client's request to its answer: one target after another, while nothing of an answer was used.

Rule 1: once anything was sent to the client, a heartbeat too, or a provider's text was seen, nobody else is asked.
Rule 2: another target is asked at once; the same provider again only after a pause, and within a budget of retries.
Rule 3: a provider that may bill what it did not say (a time-out, an answer that broke) is not asked again.
Rule 4: an exchange has one row, of the target that was asked last. What failed before it is not billed.
"""

import asyncio
import math
import random
from collections.abc import Mapping
from time import monotonic, time

from aiohttp import web

from gateway.appkeys import APP, Parts
from gateway.attempt import ASKED, Attempt
from gateway.balancer import Turn
from gateway.client import Client
from gateway.exchange import Exchange
from gateway.protocol.errors import (
    GatewayError,
    InternalError,
    InvalidRequest,
    PermissionDenied,
    QuotaExhausted,
    RateLimited,
    Unavailable,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamTooLong,
    UpstreamTruncated,
)
from gateway.protocol.meter import KEPT, Meter
from gateway.protocol.request import PARSE_HERE, Call, Kind, prompt_of
from gateway.protocol.routing import Target
from gateway.protocol.vocabulary import vocabulary_of
from gateway.reserve import reserve

ATTEMPTS = 3  # at most, of one exchange
LONGEST_WAIT = 1.0  # seconds that a provider may ask for, to be asked again for the same exchange
JITTER = 0.1  # seconds; doubled with each attempt, and a pause is anything up to it

# What an answer's id begins with, where it is of our making.
_IDS: Mapping[Kind, str] = {"chat": "chatcmpl-", "completion": "cmpl-", "embedding": ""}

# Providers by name, targets by their key. One for all: an empty set is a quarter of a kilobyte.
_NOBODY: frozenset[str | tuple[str, str]] = frozenset()

# After these the same provider says the same: its credential, its address, or what stands there, is wrong.
_LASTING = frozenset({"auth", "redirect", "bad_body", "tls"})


async def relay(request: web.Request, exchange: Exchange, client: Client | None = None) -> web.StreamResponse:
    """Answer a request to a model whose route is set. Raises GatewayError only while no byte was sent.

    `client`: in the place of the one that is connected.
    """
    assert exchange.asked is not None and exchange.principal is not None
    app = request[APP]
    pulse = app.pulse
    if client is None:
        outlived = exchange.principal.drain_seconds > 0
        client = Client(request, exchange, draining=lambda: pulse.closing, outlived=outlived)
    asking = _Asking(request, exchange, client, app)
    _name(exchange, exchange.route[0][0])  # until another is asked
    try:
        while True:
            turn = asking.begin()
            try:
                response = await (await asking.prepare(turn)).run()
                turn.ok(exchange.first_byte if exchange.asked.stream else 0.0)
                return response
            except GatewayError as error:
                await asking.go_on(turn, error)
            finally:
                turn.left()
    except (asyncio.CancelledError, ConnectionError):
        asking.note_left()
        raise
    except GatewayError:
        raise
    except Exception:
        asking.note_bug()
        raise
    finally:
        asking.end()
        pulse.forget(client)


class _Asking:
    """One exchange's way from target to target."""

    __slots__ = (
        "_attempt", "_balancer", "_client", "_exchange", "_excluded", "_failed", "_failure", "_lasting", "_metrics",
        "_pulse", "_recorder", "_request", "_retrying", "_said", "_sent", "_started",
    )  # fmt: skip

    def __init__(self, request: web.Request, exchange: Exchange, client: Client, app: Parts) -> None:
        self._request = request
        self._exchange = exchange
        self._client = client
        self._balancer = app.balancer
        self._metrics = app.metrics
        self._pulse = app.pulse
        self._recorder = app.recorder
        self._attempt: Attempt | None = None  # the one under way
        self._sent = 0  # attempts
        self._started = 0.0  # the first of them, seconds, monotonic
        self._said: list[str] = []  # of each who was passed over or asked in vain, why: `openai=http_503`
        self._failure: UpstreamError | PermissionDenied | None = None  # what the client is told when nobody answers
        # Whom not to ask: the next time, again at once, and ever again for this exchange.
        self._excluded = self._failed = self._lasting = _NOBODY
        self._retrying = False  # it counts against the budget of retries

    # --- an attempt

    def begin(self) -> Turn:
        """At the target to ask next. Raises what went wrong before, or that nobody can be asked."""
        try:
            turn = self._balancer.begin(self._exchange.route, self._excluded, self._said)
        except GatewayError as out:
            self._tell(self._said)
            raise self._failure or out from None
        turn.again = turn.target.provider.name in self._failed
        return turn

    async def prepare(self, turn: Turn) -> Attempt:
        """All that comes before anything is sent. Raises GatewayError: then nothing was, and nobody was named."""
        exchange, target = self._exchange, turn.target
        assert exchange.asked is not None
        self._attempt = None
        prompt = prompt_of(exchange.asked)
        kept = KEPT if vocabulary_of(target.model) is not None else 0
        meter = Meter(prompt.texts, prompt.tokens, framed=prompt.messages, kept=kept)
        asked = await reserve(self._request, exchange, target, meter)
        call = Call(asked, target, _IDS[asked.kind] + exchange.id.replace("-", ""), int(time()))
        attempt = Attempt(self._request, exchange, self._client, turn, call, meter)
        # Raises InvalidRequest for what the dialect cannot express.
        request_of = attempt.translator.request
        attempt.to_send = request_of() if len(asked.body) <= PARSE_HERE else await asyncio.to_thread(request_of)
        exchange.meter = meter
        if target is not exchange.target:
            _name(exchange, target)
        if not self._sent:
            # Raises JournalFull: what cannot be accounted is not sent.
            await self._recorder.begin(exchange)
            self._started = monotonic()
            self._pulse.watch(self._client)
        self._client.sent = monotonic()  # a heartbeat is due after an interval from here
        if self._sent or target not in exchange.route[0]:
            self._count(target)
        self._sent += 1
        self._tell([*self._said, f"{target.provider.name}={ASKED}"])
        exchange.outcome = "interrupted"  # until we know better
        self._attempt = attempt
        if self._client.interrupted is not None:  # while a budget was asked
            raise self._client.interrupted
        return attempt

    def _count(self, target: Target) -> None:
        """Another than it was meant for is asked, or one once more."""
        exchange, name = self._exchange, target.provider.name
        if self._sent:
            exchange.status, exchange.error_code = 0, ""
            exchange.headers.pop("X-Upstream-Request-Id", None)
        if self._sent and (name in self._failed or _key(target) in self._failed):
            self._metrics.retries.labels(name, getattr(self._failure, "kind", "")).inc()
        else:
            self._metrics.fallbacks.labels(name).inc()

    def _tell(self, said: list[str]) -> None:
        self._exchange.headers["X-Gateway-Attempts"] = ", ".join(said)

    # --- and when it failed

    async def go_on(self, turn: Turn, error: GatewayError) -> None:
        """Notes what went wrong, and returns when another is to be asked. Else raises what the client is told."""
        attempt = self._attempt
        if attempt is None:
            turn.left()
            self._pass_over(turn.target, error)
        else:
            self._fail(turn, error, attempt)
        self._client.sent = math.inf  # no heartbeat: it would be the beginning of an answer
        self._excluded = self._failed
        if self._sent and self._balancer.wait(self._exchange.route, self._failed) != 0:
            await self._pause()

    def _pass_over(self, target: Target, error: GatewayError) -> None:
        """A target that was not asked: its dialect cannot say it, or no budget pays for it."""
        if isinstance(error, InvalidRequest):
            first = self._exchange.route[0]
            others = {_key(other) for other in first} - {_key(target)} - self._lasting
            passed, word = self._sent or bool(others) or target not in first, "unsupported"
        elif isinstance(error, PermissionDenied):  # no price is known for it
            passed, word = True, "unpaid"
            self._failure = self._failure or error
        else:
            passed, word = self._sent and isinstance(error, QuotaExhausted | RateLimited | Unavailable), "unpaid"
        if not passed:
            raise error
        self._said.append(f"{target.provider.name}={word}")
        self._failed |= {_key(target)}
        self._lasting |= {_key(target)}

    def _fail(self, turn: Turn, error: GatewayError, attempt: Attempt) -> None:
        """An attempt that was made."""
        attempt.note(error)
        turn.left()
        word = error.kind if isinstance(error, UpstreamError) else "interrupted"
        self._said.append(f"{turn.target.provider.name}={word}")
        self._tell(self._said)
        if not isinstance(error, UpstreamError):
            raise error
        self._failure = error
        if not self._may_go_on(error, attempt):
            raise error
        self._exclude(turn.target, error, attempt)

    def _may_go_on(self, error: UpstreamError, attempt: Attempt) -> bool:
        if isinstance(error, UpstreamRejected | UpstreamTruncated | UpstreamTooLong):
            return False  # the client's to mend, or text that was paid for
        if isinstance(error, UpstreamTimeout) and error.kind != "timeout_connect":
            return False  # the provider may be at it still
        if error.kind in ("bad_event", "event_too_large"):
            return False  # an answer that broke
        # Of a recording the exchange alone says whether anything was sent.
        untouched = attempt.untouched and not self._exchange.prepared
        return self._sent < ATTEMPTS and untouched and not self._pulse.draining

    def _exclude(self, target: Target, error: UpstreamError, attempt: Attempt) -> None:
        limited = isinstance(error, UpstreamRateLimited)
        self._failed |= {_key(target)}
        if not limited:  # that is of the model alone
            self._failed |= {target.provider.name}
        patient = attempt.asked_for is not None and attempt.asked_for <= LONGEST_WAIT
        if error.kind in _LASTING or (limited and (target.own_credential or not patient)):
            self._lasting |= {_key(target)}

    async def _pause(self) -> None:
        """Before somebody is asked once more, if somebody may be."""
        balancer = self._balancer
        wait = balancer.wait(self._exchange.route, self._lasting)
        if wait is None or wait > LONGEST_WAIT or not (self._retrying or balancer.may_retry):
            return  # to find that nobody is left
        if not self._retrying:
            self._retrying = True
            balancer.retrying += 1
        # Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
        await asyncio.sleep(wait + random.uniform(0, min(JITTER * 2**self._sent, 1.0)))  # noqa: S311
        if (interrupted := self._client.interrupted) is not None:
            exchange = self._exchange
            exchange.outcome, exchange.status = "interrupted", interrupted.http_status
            exchange.error_code = interrupted.error_code or ""
            raise interrupted
        if not self._pulse.draining:
            self._excluded = self._lasting

    # --- the end

    def note_left(self) -> None:
        """The client is gone, or we are going; a client that leaves when it has everything leaves nothing to note."""
        if self._exchange.outcome not in ("", "ok", "budget_exhausted"):
            self._exchange.outcome = "interrupted" if self._pulse.draining else "client_abort"

    def note_bug(self) -> None:
        if self._sent:
            exchange, bug = self._exchange, InternalError("")
            exchange.outcome, exchange.status, exchange.error_code = (
                "gateway_error",
                bug.http_status,
                bug.error_code or "",
            )

    def end(self) -> None:
        if self._retrying:
            self._balancer.retrying -= 1
        if self._started:
            self._exchange.upstream_ms = (monotonic() - self._started) * 1000
        if self._exchange.prepared:
            self._exchange.status = 200
        if self._client.stalled:
            self._exchange.error_code = "client_stalled"


def _key(target: Target) -> tuple[str, str]:
    return target.provider.name, target.model


def _name(exchange: Exchange, target: Target) -> None:
    exchange.target = target
    exchange.headers["X-Gateway-Provider"] = target.provider.name
    # A model name may hold any printable character; a header only ASCII.
    exchange.headers["X-Gateway-Model"] = target.model.encode("ascii", "replace").decode()

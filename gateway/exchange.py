"""The record of one request and its answer. Each field names its one writer; everybody may read."""

import os
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

from gateway.protocol.meter import Meter
from gateway.protocol.request import ModelRequest
from gateway.protocol.routing import Route, Target
from gateway.protocol.usage import Usage

# Who made what the client got: a provider, for this request; the cache; another request's provider, shared with it or
# replayed to the same `Idempotency-Key`.
Source = Literal["provider", "cache", "shared", "replay"]

Outcome = Literal[
    "ok",
    "client_abort",  # the client left first
    "upstream_error",
    "upstream_timeout",
    "rejected",  # the provider answered with a 4xx
    "budget_exhausted",  # we ended the stream: nothing was left to pay for more of it
    "interrupted",  # we went down before it ended
    "gateway_error",  # a bug of ours
]


def new_id() -> str:
    """A UUIDv7 (RFC 9562 5.7): sorts by time, and the usage row and the logs know the exchange by it."""
    text = ((time.time_ns() // 1_000_000).to_bytes(6, "big") + os.urandom(9)).hex()
    # The version is 7. The variant is the upper half of the digit `a`; its lower half might be random, too.
    return f"{text[:8]}-{text[8:12]}-7{text[12:15]}-a{text[15:18]}-{text[18:]}"


@dataclass(frozen=True, slots=True)
class Budget:
    """What one payer (a key, an account, the deployment) may use; 0: no limit. Days and months are UTC's."""

    tokens_per_minute: int = 0  # prompt and completion; a limit: a stream that runs is not cut for it
    tokens_per_day: int = 0
    cost_per_day: int = 0  # micro-dollars
    cost_per_month: int = 0  # micro-dollars

    def __bool__(self) -> bool:
        return bool(self.tokens_per_minute or self.tokens_per_day or self.cost_per_day or self.cost_per_month)


NO_BUDGET = Budget()


class Reservation(Protocol):
    """What an exchange may use of its payers' budgets (stores/budgets.py)."""

    def used(self, tokens: int) -> bool:
        """So many tokens of output passed. False: that is all that was granted."""
        ...

    async def more(self, tokens: int) -> bool:
        """Asks for more, and waits for the answer. False: nothing is left."""
        ...

    def settle(self, tokens: int, micros: int) -> None:
        """What it used in the end, in all; the rest goes back. Never waits and never raises; once more is nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Principal:
    """Who pays: a verified key, its owner and its limits. Frozen, cached, shared between requests."""

    key_id: str
    key_prefix: str  # what logs and stats show of the key: `aig_` and its id
    key_name: str
    account_id: str
    role: Literal["admin", "member"]
    requests_per_minute: int = 0  # 0: no limit
    requests_per_second: float = 0.0  # a token bucket, beside the window above; 0: none
    burst: int = 0  # requests that the bucket holds
    concurrent_requests: int = 0
    allowed_models: tuple[str, ...] = ()  # empty: all; patterns as `gpt-*`
    budget: Budget = NO_BUDGET
    account_budget: Budget = NO_BUDGET  # of all keys of the account together
    cache_ttl: int = 0  # seconds that answers are kept, and shared, where a request says nothing of it; 0: not at all
    drain_seconds: int = 0  # how long a provider is read on for a client that left; 0: its connection is closed
    expires_at: datetime | None = None  # None: never


@dataclass(slots=True)
class Exchange:
    id: str = field(default_factory=new_id)
    started: float = field(default_factory=time.monotonic)  # seconds
    started_at: float = field(default_factory=time.time)  # seconds since the epoch
    headers: dict[str, str] = field(default_factory=dict)  # for the client's response; any of the below adds to it
    client_request_id: str = ""  # middlewares.errors
    prepared: bool = False  # middlewares.on_prepare, or client: the status line is out

    principal: Principal | None = None  # middlewares.authenticate
    user_id: str = ""  # middlewares.authenticate: X-User-Id
    app_id: str = ""  # middlewares.authenticate: X-App-Id
    own_credential: str | None = field(default=None, repr=False)  # middlewares.authenticate

    asked: ModelRequest | None = None  # handlers.chat, or handlers.passthrough
    upload_ms: float = 0.0  # handlers.chat: until the client had sent its body

    route: Route = ()  # handlers: who may answer
    target: Target | None = None  # relay: who is asked, or answered; replay: who once answered
    model: str = ""  # handlers.chat: the model the client asked for

    reservation: Reservation | None = None  # relay: when a budget covers the exchange; settled by stores.recorder
    meter: Meter | None = None  # relay, just before the provider is called
    connected: bool = False  # relay: there is a connection to the provider, so a usage row is due
    row: object = None  # stores.usage: its row, as far as it is known; None: nobody has asked for it
    ticked: float = 0.0  # stores.recorder: when its last tick was written, seconds, monotonic
    held: bool = False  # attempt: its row is to wait for its client; sharing: not any more
    recorded: bool = False  # stores.recorder: its end is in the journal
    cost_micros: int | None = None  # stores.recorder: micro-dollars; None: no price is known
    outcome: Outcome | Literal[""] = ""  # relay; "": no provider was called
    status: int = 0  # relay, or middlewares.errors: the HTTP status the client saw; 0: it saw none
    error_code: str = ""  # relay, or middlewares.errors: code of the error that ended it, also in mid-stream
    delegated: bool = False  # sharing: another record, with its id, says how it ended
    source: Source = "provider"  # sharing, or replay
    source_id: str = ""  # sharing, or replay: of the exchange that paid, where that is another
    saved: Usage | None = None  # sharing, or replay: what that one used
    saved_micros: int | None = None  # stores.recorder: what that would have cost; None: nothing, or no price is known
    first_byte: float = 0.0  # stream.Tally: when the model's first text passed, seconds, monotonic; 0: never
    counted_live: int = 0  # stream.Tally: completion tokens that the metrics have already
    upstream_ms: float = 0.0  # relay: from the call to the provider's last byte
    ended: float = 0.0  # stores.recorder, or middlewares.errors when no row was due: seconds, monotonic

    def response_headers(self) -> dict[str, str]:
        """All of ours that stand on its answer."""
        ids = {"X-Request-Id": self.id}
        if self.client_request_id:
            ids["X-Client-Request-Id"] = self.client_request_id
        return {**ids, **self.headers}

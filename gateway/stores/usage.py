"""The usage row: one for every request that reached a provider or was answered without one, with nothing in it that
Postgres would refuse."""

from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic

from gateway.exchange import Exchange
from gateway.protocol.usage import Usage

MAX_TEXT = 256  # characters of any text column; the gateway's own checks stop at this or earlier
# Far beyond any exchange, and nine million of them still add up within bigint: a provider's nonsense cannot make the
# sums of everybody else fail.
MAX_TOKENS = 10**12
MAX_MS = 2**31 - 1  # Postgres integer


@dataclass(slots=True)  # not frozen: a frozen one takes 3 µs more to make, and every exchange makes two
class UsageRow:
    """The columns of table `usage`, in their order (sql/migrations/0002_usage_by_month.sql, 0009_savings.sql).

    Who makes one may still put its cost on it, or what it saved; from then on nothing of it changes.
    """

    request_id: str
    started_at: datetime
    key_id: str
    account_id: str
    user_id: str
    app_id: str
    client_request_id: str
    provider: str
    model: str
    upstream_model: str
    stream: bool
    status: int
    outcome: str
    error_code: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    reasoning_tokens: int
    usage_source: str
    latency_ms: int
    ttft_ms: int | None
    cost_micros: int | None = None  # micro-dollars; None: no price is known
    source: str = "provider"  # exchange.Source
    source_id: str | None = None  # the exchange that paid, where that is another
    saved_tokens: int = 0  # of prompt and completion: what it would have used
    saved_micros: int | None = None  # micro-dollars that these would have cost; None: no price is known

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


NOTHING = Usage()


def row_of(exchange: Exchange) -> UsageRow:
    """The row of an exchange whose target is known; of one that a provider was called for, with what that used."""
    principal, chat, target, meter = exchange.principal, exchange.asked, exchange.target, exchange.meter
    assert principal is not None and chat is not None and target is not None
    if exchange.source == "provider":
        assert meter is not None
        (usage, source), finish_reason = meter.result(), meter.finish_reason or ""
    else:
        usage, source, finish_reason = NOTHING, "none", ""
    prompt_tokens = _clamp(usage.prompt_tokens or 0, MAX_TOKENS)
    completion_tokens = _clamp(usage.completion_tokens or 0, MAX_TOKENS)
    cached_tokens = _clamp(usage.cached_tokens, prompt_tokens)  # a part is never more than its whole, whoever says so
    started, first_byte = exchange.started, exchange.first_byte
    # By position, in the order of the columns: by name it takes half as long again.
    return UsageRow(
        exchange.id,
        datetime.fromtimestamp(exchange.started_at, UTC),
        principal.key_id,
        principal.account_id,
        storable(exchange.user_id),
        storable(exchange.app_id),
        storable(exchange.client_request_id),
        storable(target.provider.name),
        storable(exchange.model),
        storable(target.model),
        chat.stream,
        _clamp(exchange.status, 999),
        exchange.outcome,
        storable(exchange.error_code),
        storable(finish_reason),
        prompt_tokens,
        completion_tokens,
        cached_tokens,
        _clamp(usage.cache_write_tokens, prompt_tokens - cached_tokens),
        _clamp(usage.reasoning_tokens, completion_tokens),
        source,
        _milliseconds((exchange.ended or monotonic()) - started),
        _milliseconds(first_byte - started) if first_byte else None,
    )


def remembered_row_of(exchange: Exchange) -> UsageRow:
    """The row of an exchange that was answered without a provider: it used nothing, and says what it saved."""
    row, saved = row_of(exchange), exchange.saved or NOTHING
    # Who failed before a byte may not have been told how.
    row.outcome = row.outcome or ("ok" if exchange.prepared else "gateway_error")
    row.cost_micros = 0
    row.source, row.source_id = exchange.source, exchange.source_id or None
    row.saved_tokens = _clamp(saved.total_tokens, MAX_TOKENS)
    return row


def storable(text: str) -> str:
    """`text` as Postgres takes it: no NUL, no lone surrogate, at most MAX_TEXT characters.

    Postgres refuses both (https://www.postgresql.org/docs/current/datatype-character.html), and with them the whole
    INSERT they are in.
    """
    if len(text) > MAX_TEXT:
        text = text[:MAX_TEXT]
    if not text.isascii() or "\0" in text:
        text = text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
    return text


def _clamp(number: int, most: int) -> int:
    if 0 <= number <= most:
        return number
    return most if number > 0 else 0


def _milliseconds(seconds: float) -> int:
    return _clamp(round(seconds * 1000), MAX_MS)

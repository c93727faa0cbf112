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


@dataclass(slots=True)
class UsageRow:
    """The columns of table `usage`, in their order (sql/migrations/0002_usage_by_month.sql, 0009_savings.sql).

    That of an exchange says how far it is; from its end on nothing of it changes.
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
_LATER = "", False, 0, "", "", "", 0, 0, 0, 0, 0, "", 0, None  # columns from upstream_model to ttft_ms: see `row_of`


def row_of(exchange: Exchange) -> UsageRow:
    """The row of an exchange whose target is known; of one that a provider was called for, with what that used.

    The same one each time, as it is by then: most of it does not change, and every exchange asks for it twice.
    """
    chat, target, meter, row = exchange.asked, exchange.target, exchange.meter, exchange.row
    assert chat is not None and target is not None
    if not isinstance(row, UsageRow):
        row = exchange.row = _new_row(exchange)
    if exchange.source == "provider":
        assert meter is not None
        (usage, row.usage_source), finish_reason = meter.result(), meter.finish_reason or ""
    else:
        usage, row.usage_source, finish_reason = NOTHING, "none", ""
    # It fails over to other targets. What is equal was made storable before.
    if target.provider.name != row.provider:
        row.provider = storable(target.provider.name)
    if target.model != row.upstream_model:
        row.upstream_model = storable(target.model)
    if exchange.error_code != row.error_code:
        row.error_code = storable(exchange.error_code)
    if finish_reason != row.finish_reason:
        row.finish_reason = storable(finish_reason)
    row.stream = chat.stream  # of what is passed on, its answer says it
    row.status = _clamp(exchange.status, 999)
    row.outcome = exchange.outcome
    _count(row, usage)
    started, first_byte = exchange.started, exchange.first_byte
    row.latency_ms = _milliseconds((exchange.ended or monotonic()) - started)
    row.ttft_ms = _milliseconds(first_byte - started) if first_byte else None
    row.cost_micros = None
    return row


def _new_row(exchange: Exchange) -> UsageRow:
    """With what is known of it from the beginning."""
    principal = exchange.principal
    assert principal is not None
    # By position, in the order of the columns: by name it takes half as long again.
    return UsageRow(
        exchange.id,
        datetime.fromtimestamp(exchange.started_at, UTC),
        principal.key_id,
        principal.account_id,
        storable(exchange.user_id),
        storable(exchange.app_id),
        storable(exchange.client_request_id),
        "",
        storable(exchange.model),
        *_LATER,
    )


def _count(row: UsageRow, usage: Usage) -> None:
    prompt, completion = usage.prompt_tokens or 0, usage.completion_tokens or 0
    cached, written, reasoned = usage.cached_tokens, usage.cache_write_tokens, usage.reasoning_tokens
    if not (
        0 <= cached <= cached + written <= prompt <= MAX_TOKENS  # so `written` is not negative
        and 0 <= reasoned <= completion <= MAX_TOKENS
    ):
        prompt, completion = _clamp(prompt, MAX_TOKENS), _clamp(completion, MAX_TOKENS)
        cached = _clamp(cached, prompt)  # a part is never more than its whole, whoever says so
        written, reasoned = _clamp(written, prompt - cached), _clamp(reasoned, completion)
    row.prompt_tokens, row.completion_tokens = prompt, completion
    row.cached_tokens, row.cache_write_tokens, row.reasoning_tokens = cached, written, reasoned


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
    milliseconds = round(seconds * 1000)
    return milliseconds if 0 <= milliseconds <= MAX_MS else _clamp(milliseconds, MAX_MS)

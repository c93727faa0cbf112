"""A day of usage that was, so that the page has something to show; the same one each time."""

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from random import Random

from gateway import appkeys
from gateway.stores.ledger import make_partitions, write_rows
from gateway.stores.usage import UsageRow
from tests.support.gateway import Gateway

HISTORY = 900  # requests

# model, provider, milliseconds to the first token, tokens a second, micro-dollars of a token in and out, share
_MODELS = [
    ("gpt-4o", "openai", 420, 80, (2.5, 10), 8),
    ("gpt-4o-mini", "openai", 260, 140, (0.15, 0.6), 14),
    ("claude-sonnet-4-5", "anthropic", 610, 70, (3, 15), 10),
    ("llama3.2", "ollama", 180, 45, (0, 0), 5),
]
_APPS = ["support-chat", "code-review", "search", ""]
_USERS = ["ada", "grace", "linus", "margaret", ""]


async def write_history(gateway: Gateway, *key_ids: str) -> None:
    """Of the gateway's account and these keys; to the tables that `/api/stats` reads, with their sums."""
    rows = list(_rows(Random(6), datetime.now(UTC), gateway.account_id, key_ids))
    pool = gateway.app[appkeys.POOL]
    await make_partitions(pool)  # or the gateway, which has just started, does so in the midst of it
    await write_rows(pool, rows)


def _rows(random: Random, until: datetime, account_id: str, key_ids: Sequence[str]) -> Iterator[UsageRow]:
    for _ in range(HISTORY):
        model, provider, ttft, pace, prices, _share = random.choices(_MODELS, [one[-1] for one in _MODELS])[0]
        started = until - timedelta(hours=_ago(random))
        prompt, completion = int(random.lognormvariate(6.5, 0.8)), int(random.lognormvariate(5.2, 0.7))
        first = int(random.lognormvariate(math.log(ttft), 0.35))
        failed = random.random() < 0.006
        cached = prompt // 2 if random.random() < 0.4 else 0
        yield UsageRow(
            request_id=_id(random, started),
            started_at=started,
            key_id=random.choice(key_ids),
            account_id=account_id,
            user_id=random.choice(_USERS),
            app_id=random.choices(_APPS, [8, 5, 4, 1])[0],
            client_request_id="",
            provider=provider,
            model=model,
            upstream_model=model,
            stream=random.random() < 0.85,
            status=502 if failed else 200,
            outcome="upstream_error" if failed else "ok" if random.random() < 0.96 else "client_abort",
            error_code="upstream_error" if failed else "",
            finish_reason="" if failed else "stop",
            prompt_tokens=prompt,
            completion_tokens=0 if failed else completion,
            cached_tokens=cached,
            cache_write_tokens=0,
            reasoning_tokens=0,
            usage_source="provider",
            latency_ms=first + (0 if failed else 1000 * completion // pace),
            ttft_ms=None if failed else first,
            cost_micros=int(prompt * prices[0] + (0 if failed else completion * prices[1])),
        )


def _ago(random: Random) -> float:
    """Hours, of the last 24: most of them in the working day."""
    while True:
        ago = random.random() * 24
        if random.random() < 0.25 + 0.75 * math.sin(math.pi * ago / 24) ** 2:
            return ago


def _id(random: Random, at: datetime) -> str:
    """A UUIDv7 of that moment, as `exchange.new_id` makes them of now."""
    text = f"{int(at.timestamp() * 1000):012x}7{random.getrandbits(12):03x}a{random.getrandbits(60):015x}"
    return "-".join([text[:8], text[8:12], text[12:16], text[16:20], text[20:]])

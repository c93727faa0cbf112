"""The line of a request that is over, for people: its parts, and the colour of each.

12:03:44.120  200       1.24 s  POST /v1/chat/completions  mock-gpt → mock-openai  first 210 ms  12→345 tokens  …
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

Parts = Iterator[tuple[str, str]]  # words, and the code of their colour

DIM, GREEN, CYAN, YELLOW, RED, PLAIN = (f"\x1b[{number}m" for number in (2, 32, 36, 33, 31, 0))
WORD = 7  # characters of a level, the longest of which is `warning`
_ROUTE = 25  # characters of `POST /v1/chat/completions`


def exchange_parts(fields: Mapping[str, Any]) -> Parts:
    """A request that is over: what has a fixed width first, then what there is to say of it, its id last."""
    verdict = _verdict(fields)
    yield f"{fields['status'] or '-':<{WORD}}", verdict
    yield f"{_duration(fields['latency_ms']):>7}", ""
    yield f"{fields['method']} {fields['path']}".ljust(_ROUTE), ""
    if fields["model"]:
        yield _quoted(fields["model"]) + (f" → {fields['provider']}" if fields["provider"] else ""), ""
    wrong = [fields["outcome"] if fields["outcome"] != "ok" else None, fields["error_code"]]
    if any(wrong):
        yield ": ".join(filter(None, wrong)), verdict
    if fields["stream"] and fields["ttft_ms"] is not None:
        yield f"first {_duration(fields['ttft_ms'])}", ""
    if fields["prompt_tokens"] is not None:
        source = fields["usage_source"]
        guessed = f" ({source})" if source not in (None, "provider") else ""
        yield f"{fields['prompt_tokens']}→{fields['completion_tokens']} tokens{guessed}", ""
    if fields["cost_micros"] is not None:
        yield _dollars(fields["cost_micros"]), ""
    for word, name in _LABELS.items():
        if value := fields.get(name):
            yield f"{word} {_quoted(value)}", DIM


# The word before a value that identifies the request, and its field.
_LABELS = {
    "tried": "attempts",
    "key": "key",
    "user": "user_id",
    "app": "app_id",
    "client id": "client_request_id",
    "id": "request_id",
}


def _verdict(fields: Mapping[str, Any]) -> str:
    """The colour of how it ended. A stream that broke has the status 200 that it began with."""
    status, outcome = fields["status"], fields["outcome"]
    if status >= 500 or outcome in ("upstream_error", "upstream_timeout", "interrupted", "gateway_error"):
        return RED
    if status >= 400 or status == 0 or outcome not in (None, "ok") or fields["error_code"]:
        return YELLOW
    return GREEN if status < 300 else CYAN


def _duration(milliseconds: int) -> str:
    return f"{milliseconds} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f} s"


def _dollars(micros: int) -> str:
    """All of its digits, at least two after the point."""
    dollars, rest = divmod(micros, 1_000_000)
    return f"${dollars}.{f'{rest:06d}'.rstrip('0').ljust(2, '0')}"


def _quoted(text: str) -> str:
    """Words that a client chose, so that they are not taken for ours."""
    return json.dumps(text, ensure_ascii=False) if re.search(r'[\s"→]', text) else text

"""Which answers may be remembered, for how long, and what two requests must have in common to have the same one.

`Cache-Control` means what RFC 9111 5.2.1 says of requests: `no-store` neither reads nor keeps, `no-cache` asks anew and
keeps, `max-age` is how old an answer may be, `only-if-cached` asks nobody. `X-Gateway-Cache` is ours: `ttl=3600` turns
remembering on for so many seconds, `pace=recorded` replays a stream as fast as it once came, `bypass` is `no-store`,
`refresh` is `no-cache`.
"""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from gateway.protocol.errors import InvalidRequest
from gateway.protocol.request import ModelRequest
from gateway.protocol.routing import Target

MAX_TTL = 30 * 86400  # seconds

# What says who asks, and shapes no answer (https://platform.openai.com/docs/api-reference/chat/create).
_LABELS = frozenset({"user", "safety_identifier", "metadata", "prompt_cache_key", "prompt_cache_retention", "store"})

_LONE = "\ud800"
_DIGITS = {digit: _LONE + digit for digit in "0123456789"}


class Wish(NamedTuple):
    """What a request wants of the cache."""

    ttl: int  # seconds that the answer is kept; 0: it is neither kept nor shared
    max_age: int  # seconds that a kept one may be old
    read: bool = True
    only_cached: bool = False
    paced: bool = False  # a kept stream comes as fast as it once came


def wish_of(cache: str, control: str, default_ttl: int) -> Wish | None:
    """From the two headers and the key's own setting. None: nothing is said of a cache at all.

    Raises InvalidRequest for a word of ours that is not understood; words of others are not ours to refuse.
    """
    ours, standard = _words(cache), _words(control)
    if not (ours or default_ttl or "max-age" in standard or "only-if-cached" in standard):
        return None
    if unknown := ours.keys() - {"ttl", "pace", "bypass", "refresh"}:
        raise _refused(f"{min(unknown)[:32]!r} is none of ttl, pace, bypass, refresh")
    if "bypass" in ours or "no-store" in standard:
        return Wish(0, 0, read=False, only_cached="only-if-cached" in standard)
    ttl = _seconds(ours["ttl"]) if "ttl" in ours else default_ttl or _lenient(standard.get("max-age"))
    if "only-if-cached" in standard:
        ttl = ttl or MAX_TTL  # nothing will be kept: whatever is will do
    if ours.get("pace", "recorded") != "recorded":
        raise _refused("pace is `recorded`, or not given")
    return Wish(
        ttl,
        min(ttl, _lenient(standard["max-age"])) if "max-age" in standard else ttl,
        read="refresh" not in ours and "no-cache" not in standard,
        only_cached="only-if-cached" in standard,
        paced="pace" in ours,
    )


def _words(value: str) -> dict[str, str]:
    """RFC 9111 5.2: names in any case, each perhaps with a value."""
    pairs = (part.strip().partition("=") for part in value.split(",") if part.strip())
    return {name.strip().lower(): given.strip().strip('"').lower() for name, _, given in pairs}


def _seconds(value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= 12 and 1 <= int(value) <= MAX_TTL):
        raise _refused(f"ttl is 1 to {MAX_TTL} seconds")
    return int(value)


def _lenient(value: str | None) -> int:
    """0 for what is no number."""
    return min(int(value[:12]), MAX_TTL) if value and value.isascii() and value.isdigit() else 0


def _refused(problem: str) -> InvalidRequest:
    return InvalidRequest(f"invalid X-Gateway-Cache: {problem}", param="X-Gateway-Cache")


def digest(account_id: str, targets: Sequence[Target], asked: ModelRequest) -> bytes:
    """Of everything that shapes the answer, and of whom it is for. Two requests with one digest get one answer.

    `targets`: all that may be asked first, and how. Numbers are compared as they were written: what a parser would
    round, 2**53 + 1 or 0.1 with more digits, stays apart.
    """
    shaping = {name: value for name, value in _read(asked.body).items() if name[1:] not in _LABELS}
    return _digest([account_id, [_way(target) for target in targets], asked.kind, sorted(shaping.items())])


def _way(target: Target) -> list[Any]:
    """All of what an operator writes that a provider is told beside the request: it may choose another answer."""
    of = target.provider
    return [of.name, of.base_url, of.query, sorted(of.headers.items()), target.model]


def fingerprint(body: bytes) -> bytes:
    """Of all that a request's body says, however it is written."""
    return _digest(sorted(_read(body).items()))


def _digest(value: Any) -> bytes:
    # Inside of a parameter the order of an object's members says something, too: a structured output has that of its
    # schema (https://platform.openai.com/docs/guides/structured-outputs).
    return sha256(json.dumps(value, separators=(",", ":")).encode()).digest()


def _read(body: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(body, parse_int=_number, parse_float=_number, object_pairs_hook=_object)
    return fields


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {f".{name}": value for name, value in pairs}


def _number(text: str) -> str:
    """What no text of a client's can be mistaken for: `parse_object` takes no lone surrogates.

    As small as it can be: a body of nothing but numbers has one for every two bytes.
    """
    return _LONE + text if len(text) > 1 else _DIGITS[text]


def worth_keeping(answer: Mapping[str, Any]) -> bool:
    """Of a whole answer: it ended by itself, and the calls in it can be made."""
    choices = answer.get("choices")
    return isinstance(choices, list) and bool(choices) and all(_ended_well(choice) for choice in choices)


def _ended_well(choice: Any) -> bool:
    if not isinstance(choice, dict) or choice.get("finish_reason") not in ("stop", "tool_calls", "function_call"):
        return False
    message = choice.get("message")
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    legacy = message.get("function_call") if isinstance(message, dict) else None
    return all(_callable(call) for call in [*(calls or ()), {"function": legacy}])


def _callable(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    try:
        return not isinstance(function, dict) or isinstance(json.loads(function.get("arguments") or "{}"), dict)
    except (TypeError, ValueError):
        return False

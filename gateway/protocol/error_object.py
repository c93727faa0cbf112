"""OpenAI's error object, read from what any vendor sends instead.

`{"error": {…}}` is OpenAI's. Gemini puts it in a list, xAI makes `error` a string beside `code`, Mistral and FastAPI
say `detail`, vLLM and Mistral put the fields at the top, Cloudflare has `errors`, Azure and OpenRouter give the HTTP
status for a code, and OpenRouter keeps the text of the server behind it in `metadata.raw`.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

MAX_MESSAGE = 2000  # characters of a provider's message that we pass on
MAX_WORD = 128  # characters of its type, code and param
MAX_NESTING = 4  # of an error inside an error; OpenRouter's is three deep


class ErrorObject(NamedTuple):
    """Safe to print and to store; empty where the provider says nothing."""

    message: str = ""
    type: str = ""
    param: str = ""
    code: str = ""

    @property
    def word(self) -> str | None:
        """The code, unless it is a number: that repeats the HTTP status, theirs or that of a server behind it."""
        return self.code if self.code and not self.code.isdigit() else None

    @property
    def refuses_credential(self) -> bool:
        return bool({self.code.lower(), self.type.lower()} & _REFUSALS)

    def without(self, credential: str | None) -> "ErrorObject":
        """Without a word that holds the credential; whether the message does `quotes_key` says."""
        if not credential:
            return self
        return self._replace(**{name: "" for name in ("type", "param", "code") if credential in getattr(self, name)})

    def quotes_key(self, credential: str | None) -> bool:
        """May the message hold a key, or part of one? "Incorrect API key provided: sk-…" does."""
        return bool(_KEY.search(self.message)) or bool(credential and credential in self.message)


_REFUSALS = frozenset({"401", "403", "invalid_api_key", "authentication_error", "permission_error"})
# Words about a key, and anything in the shape of one. A tool called `get_api_key` is neither.
_KEY = re.compile(
    r"(?i:\b(?:incorrect|invalid|missing|expired|wrong|unknown|revoked)\s+(?:\w+\s+)?api[ _-]?key)"
    r"|(?i:\bapi[ _-]?key\b.{0,60}\b(?:invalid|not valid|incorrect|expired|revoked|provided))"
    r"|\b(?:sk|rk|gsk|xai|pplx|hf|nvapi)[-_][\w*.-]{2,}|\bAIza[\w-]{8,}",
    re.DOTALL,
)


def read_error_object(parsed: Any, depth: int = MAX_NESTING) -> ErrorObject:
    """What the parsed JSON, or the bare text, of an error says. Never raises."""
    if isinstance(parsed, list) and parsed:
        parsed = parsed[0]
    if isinstance(parsed, str):
        return ErrorObject(_clean(parsed, MAX_MESSAGE))
    if not isinstance(parsed, dict) or depth == 0:
        return ErrorObject()
    inner = next((parsed[name] for name in ("error", "errors", "detail") if parsed.get(name)), None)
    said = read_error_object(inner, depth - 1)
    return ErrorObject(
        message=said.message or _message(parsed, depth),
        type=said.type or _clean(parsed.get("type"), MAX_WORD),
        param=said.param or _clean(parsed.get("param"), MAX_WORD) or _location(parsed.get("loc")),
        code=said.code or _code(parsed),
    )


def _message(parsed: Mapping[str, Any], depth: int) -> str:
    message = read_error_object(parsed.get("message") or parsed.get("msg"), depth - 1).message
    metadata = parsed.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    if not isinstance(raw, str) or not raw:
        return message
    try:
        upstream = read_error_object(orjson.loads(raw), depth - 1).message
    except orjson.JSONDecodeError:
        upstream = raw
    return _clean(f"{message}: {upstream}", MAX_MESSAGE)


def _code(parsed: Mapping[str, Any]) -> str:
    """Google's `code` is a number, and the word stands in `status`; Anthropic's is in `details`."""
    details = parsed.get("details")
    given = parsed.get("code") or (details.get("error_code") if isinstance(details, dict) else None)
    code, status = _clean(given, MAX_WORD), parsed.get("status")
    return _clean(status, MAX_WORD) if isinstance(status, str) and (not code or code.isdigit()) else code


def _location(loc: Any) -> str:
    """FastAPI's path to a field: `["body", "messages", 0, "role"]`."""
    if not isinstance(loc, list):
        return ""
    return _clean(".".join(str(step) for step in loc if isinstance(step, str | int) and step != "body"), MAX_WORD)


def _clean(value: Any, limit: int) -> str:
    """Text that every JSON writer, log and database takes: no lone surrogates, no control characters but line ends."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    text = str(value)[:limit].encode("utf-8", "replace").decode("utf-8")
    return "".join(char for char in text if char.isprintable() or char in "\n\t").strip()

"""The query in a model's name: what the mock does with this one request."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

CASES = (
    "text",
    "tools",
    "parallel_tools",
    "thinking",
    "refusal",
    "json",
    "multibyte",
    "long",
    "empty",
    "content_filter",
    "length",
)
FAULTS = (
    "close_before_headers",
    "reset_before_headers",
    "garbage",
    "redirect",
    "html",
    "empty",
    "broken_json",
    "reset",
    "truncate",
    "cut",
    "stall",
    "error_event",
    "endless",
    "bad_json",
    "bad_json_3",
    "event_256k",
    "huge_event",
    "no_done",
    "no_usage",
    "hang_open",
    "gzip",
    "reset_after_reply",
    "reset_on_reuse",
)
NEWLINES = ("lf", "crlf", "cr")


class ProviderError(Exception):
    """An error that a provider answers with; each wire format gives it its own body.

    `kind` is the error's type in that format; without it the status decides. `param` and `code` are OpenAI's.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code


@dataclass(frozen=True, slots=True)
class Script:
    """Every parameter, at its default when the query does not name it."""

    case: str = ""  # the request decides
    tokens: int | None = None  # deltas; the length of the text decides
    pace_ms: float | None = None  # the server's own pace
    headers_ms: float = 0
    ttft_ms: float = 0
    prompt_tokens: int | None = None  # the request's length decides
    cached_tokens: int = 0
    newline: str = "lf"
    split: int = 0  # bytes; 0: each delta whole
    status: int = 0  # no error
    retry_after: float | None = None  # seconds
    fault: str = ""
    after: int = 3  # deltas
    times: int = 0  # always


def parse_model(model: str) -> tuple[str, Script]:
    """The bare name and the script. Raises ProviderError, naming the parameter or the value that does not exist."""
    name, _, query = model.partition("?")
    values: dict[str, Any] = {}
    for parameter, text in parse_qsl(query, keep_blank_values=True):
        read = _PARAMETERS.get(parameter)
        if read is None:
            raise ProviderError(
                f"mock: unknown parameter {parameter!r}; there are {', '.join(_PARAMETERS)}", param="model"
            )
        if parameter in values:
            raise ProviderError(f"mock: parameter {parameter!r} is given twice", param="model")
        try:
            values[parameter] = read(text)
        except ValueError as error:
            raise ProviderError(f"mock: {parameter}={text}: {error}", param="model") from None
    return name, Script(**values)


def _integer(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10) or not low <= int(text) <= high:
            raise ValueError(f"an integer from {low} to {high} is required")
        return int(text)

    return read


def _number(high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1
        if not 0 <= value <= high:
            raise ValueError(f"a number from 0 to {high:g} is required")
        return value

    return read


def _one_of(names: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(names)} is required")
        return text

    return read


_HOUR = 3_600_000  # milliseconds
_PARAMETERS: dict[str, Callable[[str], Any]] = {
    "case": _one_of(CASES),
    "tokens": _integer(0, 100_000),
    "pace_ms": _number(_HOUR),
    "headers_ms": _number(_HOUR),
    "ttft_ms": _number(_HOUR),
    "prompt_tokens": _integer(0, 10_000_000),
    "cached_tokens": _integer(0, 10_000_000),
    "newline": _one_of(NEWLINES),
    "split": _integer(1, 1 << 20),
    "status": _integer(400, 599),
    "retry_after": _number(86_400),
    "fault": _one_of(FAULTS),
    "after": _integer(0, 100_000),
    "times": _integer(1, 1_000_000),
}

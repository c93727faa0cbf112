"""Log lines on stderr: JSON in production, readable in development.

Rule 1: a record is one line. What could break it, or move a terminal's cursor, is escaped. (In development the place of
an exception follows on lines of its own, indented.)
Rule 2: no prompt and no key. An exception's text may quote what was being read, so production logs its type and where
it was raised; text in the shape of a credential is masked, whoever logs it.
Rule 3: logging never raises, and a record that cannot be rendered still leaves a line.
"""

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from time import monotonic
from traceback import walk_tb
from typing import Any, TextIO

import orjson

from gateway.exchange import Exchange
from gateway.protocol.usage import Usage

Render = Callable[[logging.LogRecord], str]

MAX_CAUSES = 5  # exceptions of one chain that are logged

# aiohttp's parser quotes the request's lines in its exceptions. asyncio's messages go on with the reprs of tasks and
# their exceptions, those of warnings with the line of source.
_QUOTING = ("aiohttp", "asyncio", "py.warnings")
# Controls, line ends in Unicode's sense, text direction (it makes a line read as another), lone surrogates.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Credentials by a mark that is searched first: nearly every line is without one, and one pattern for all is 40 µs.
_CREDENTIALS = {
    "aig_": re.compile(r"(aig_[0-9A-Za-z]{12}_)[\w-]+"),
    **{
        mark: re.compile(rf"\b({mark})[\w-]{{8,}}")
        for mark in ("sk-", "rk-", "gsk_", "xai-", "pplx-", "hf_", "nvapi-", "AIza")
    },
    "earer ": re.compile(r"([Bb]earer +)(?=\S*\d)[\w.~+/=-]{8,}"),
    # "basic authentication" has no digit and no capital inside, Base64 of a name and a password nearly always.
    "asic ": re.compile(r"([Bb]asic +)(?=\S*(?:[\d=]|[a-z][A-Z]))[\w.~+/=-]{8,}"),
    # Up to the last `@` of the word: a password may hold any character, and one that was not escaped often does.
    "://": re.compile(r"(://[^\s/:\"]*:)(?:[^\s\"\\]|\\.){1,500}(?=@)"),
    **{
        mark: re.compile(r"((?i:api-key)(?:\\?[\"'])?\s*[:=]\s*(?:b?\\?[\"'])?)[^\s\"'\\,}]{8,}")
        for mark in ("pi-key", "pi-Key", "PI-Key", "PI-KEY")
    },
}
_COLOURS = {"debug": "\x1b[2m", "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[31m"}
_PLAIN = "\x1b[0m"


def setup(level: str, environment: str) -> None:
    """Send the log of the whole process to stderr. May be called again; the last call counts."""
    stream = sys.stderr
    render = json_line if environment == "production" else readable_line(colour=stream.isatty())
    root = logging.getLogger()
    for handler in list(root.handlers):
        # Ours of an earlier call, and the one that a stray `logging.info()` puts there: it would double every line.
        if isinstance(handler, LineHandler) or type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
    root.addHandler(LineHandler(stream, render))
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    logging.getLogger("aiohttp.access").disabled = True  # the line of an exchange says all that it says, and more
    # Nobody reads these, and every record pays for them: https://docs.python.org/3/howto/logging.html#optimization
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def exchange_fields(exchange: Exchange, usage: Usage | None, source: str) -> dict[str, Any]:
    """What the log line of a request says, in this order. `source` says who counted; without usage nobody did."""
    principal, target, chat = exchange.principal, exchange.target, exchange.chat
    client = {"client_request_id": exchange.client_request_id} if exchange.client_request_id else {}
    return {
        "request_id": exchange.id,
        **client,
        "model": exchange.model or None,
        "provider": target.provider.name if target else None,
        "status": exchange.status,
        "latency_ms": _milliseconds((exchange.ended or monotonic()) - exchange.started),
        "ttft_ms": _milliseconds(exchange.first_byte - exchange.started) if exchange.first_byte else None,
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "completion_tokens": usage.completion_tokens if usage else None,
        "total_tokens": usage.total_tokens if usage else None,
        "usage_source": source or None,
        "cost_micros": exchange.cost_micros,
        "key": principal.key_prefix if principal else None,
        "user_id": exchange.user_id or None,
        "app_id": exchange.app_id or None,
        "outcome": exchange.outcome or None,
        "error_code": exchange.error_code or None,
        "stream": chat.stream if chat else None,
    }


def _milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))


class LineHandler(logging.Handler):
    """Writes each record as `render` puts it, at once: a line that waits in a buffer is lost with the process."""

    def __init__(self, stream: TextIO, render: Render) -> None:
        super().__init__()
        self._stream = stream
        self._render = render

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._render(record)
        except Exception as error:
            # Whatever an argument's __str__ raises must not reach the caller, and there is no one else to tell it.
            line = f"a log record of {record.name} cannot be rendered: {type(error).__name__}, line {record.lineno}"
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            pass  # stderr is closed


# --- JSON ---------------------------------------------------------------------------------------------------------


def json_line(record: logging.LogRecord) -> str:
    parts: dict[str, Any] = {
        "timestamp": _timestamp(record),
        "level": record.levelname.lower(),
        "message": _message(record),
    }
    parts.update((str(name), value) for name, value in _fields(record).items() if name not in parts)
    if not record.name.startswith("gateway"):
        parts["logger"] = record.name
    if error := _error(record):
        parts["exception"] = "\n".join(_chain(error, quoted=False))
    return _safe(_json(parts))


def _json(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # lone surrogates, integers over 64 bit, objects
        return json.dumps(value, default=str, skipkeys=True)


def _timestamp(record: logging.LogRecord) -> str:
    """RFC 3339, UTC, milliseconds."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --- for people ---------------------------------------------------------------------------------------------------


def readable_line(*, colour: bool) -> Render:
    def render(record: logging.LogRecord) -> str:
        level = record.levelname.lower()
        shown = f"{_COLOURS.get(level, '')}{level:<7}{_PLAIN}" if colour else f"{level:<7}"
        clock = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")[11:23]
        name = record.name.removeprefix("gateway.")
        fields = [f"{field}={_shown(value)}" for field, value in _fields(record).items() if value not in (None, "")]
        line = f"{clock} {shown} {_safe('  '.join([name, _message(record), *fields]))}"
        error = _error(record)
        chain = _chain(error, quoted=not record.name.startswith(_QUOTING)) if error else ()
        return "\n    ".join([line, *map(_safe, chain)])

    return render


def _shown(value: Any) -> str:
    text = str(value)
    return text if text and not re.search(r'[\s"=]', text) else _json(text)


# --- both ---------------------------------------------------------------------------------------------------------


def _message(record: logging.LogRecord) -> str:
    try:
        message = record.getMessage()
    except (TypeError, ValueError, KeyError):
        message = str(record.msg)  # arguments that do not fit: the words alone
    return message.partition("\n")[0] if record.name.startswith(_QUOTING) else message


def _fields(record: logging.LogRecord) -> Mapping[Any, Any]:
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, Mapping) else {}


def _error(record: logging.LogRecord) -> BaseException | None:
    return record.exc_info[1] if record.exc_info else None


def _chain(error: BaseException, *, quoted: bool) -> Iterator[str]:
    """An exception, where it was raised, and the ones that caused it; with the text of all if `quoted`."""
    cause: BaseException | None = error
    for number in range(MAX_CAUSES):
        if cause is None:
            return
        text = f": {cause}" if quoted or isinstance(cause, OSError) else ""  # the system's names addresses and files
        yield f"{'caused by ' if number else ''}{type(cause).__qualname__}{text}"
        for frame, line in walk_tb(cause.__traceback__):
            yield f"  {frame.f_code.co_filename}:{line} {frame.f_code.co_qualname}"
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _safe(text: str) -> str:
    for mark, credential in _CREDENTIALS.items():
        if mark in text:
            text = credential.sub(r"\1***", text)
    return text if text.isprintable() else _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)

"""Log lines on stderr: JSON in production, readable in development.

Rule 1: a record is one line. What could break it, or move a terminal's cursor, is escaped. (In development the place of
an exception follows on lines of its own, indented.)
Rule 2: no prompt and no key. An exception's text may quote what was being read, so production logs its type and where
it was raised; text in the shape of a credential is masked, whoever logs it.
Rule 3: logging never raises, and a record that cannot be rendered still leaves a line.
Rule 4: logging never waits for who reads it (gateway/lines.py); warnings and errors are on their way at once, and all
lines are written before the process ends, by whatever but a kill -9.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import lru_cache, partial
from time import monotonic, time
from traceback import walk_tb
from types import TracebackType
from typing import Any, TextIO

import orjson

from gateway.exchange import Exchange
from gateway.lines import Line, LineWriter
from gateway.masking import harmless, safe
from gateway.protocol.usage import Usage
from gateway.readable import DIM, GREEN, PLAIN, RED, WORD, YELLOW, Parts, exchange_parts

Render = Callable[[logging.LogRecord], str]

_access = logging.getLogger("gateway.access")

MAX_CAUSES = 5  # exceptions of one chain that are logged

# aiohttp's parser quotes the request's lines in its exceptions. asyncio's messages go on with the reprs of tasks and
# their exceptions, those of warnings with the line of source.
_QUOTING = ("aiohttp", "asyncio", "py.warnings")
_EXCHANGE = {"method", "path", "latency_ms"}  # fields of the line of an exchange, and of no other
_COLOURS = {"debug": DIM, "info": GREEN, "warning": YELLOW, "error": RED, "critical": RED}


def setup(level: str, environment: str) -> None:
    """Send the log of the whole process to stderr. May be called again; the last call counts."""
    stream = sys.stderr
    render = json_line if environment == "production" else readable_line(colour=wants_colour(stream, os.environ))
    root = logging.getLogger()
    for handler in list(root.handlers):
        # Ours of an earlier call, and the one that a stray `logging.info()` puts there: it would double every line.
        if isinstance(handler, LineHandler) or type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
        if isinstance(handler, LineHandler):
            handler.flush()
            handler.close()
    root.addHandler(LineHandler(stream, render))
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    sys.excepthook = _lines_first
    logging.getLogger("aiohttp.access").disabled = True  # the line of an exchange says all that it says, and more
    # Nobody reads these, and every record pays for them: https://docs.python.org/3/howto/logging.html#optimization
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


class LineHandler(logging.Handler):
    """Writes each record as `render` puts it."""

    def __init__(self, stream: TextIO, render: Render) -> None:
        super().__init__()
        self._render = render
        self.writes_json = render is json_line
        self._writer = LineWriter(stream, self._dropped)

    def emit(self, record: logging.LogRecord) -> None:
        self._writer.add(self._line(record), hurry=record.levelno >= logging.WARNING)

    def write(self, line: Line) -> None:
        """One that is no warning."""
        assert self.lock is not None  # `Handler` made it
        with self.lock:
            self._writer.add(line)

    def _line(self, record: logging.LogRecord) -> str:
        try:
            return self._render(record)
        except Exception as error:
            # Whatever an argument's __str__ raises must not reach the caller, and there is no one else to tell it.
            return f"a log record of {record.name} cannot be rendered: {type(error).__name__}, line {record.lineno}"

    def _dropped(self, count: int) -> str:
        words = "%d log lines were dropped: nobody read them"
        return self._line(logging.LogRecord(__name__, logging.WARNING, __file__, 0, words, (count,), None))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
        super().close()


def _lines_first(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """A crash's traceback comes after the lines that led to it."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    sys.__excepthook__(kind, error, traceback)


# --- the line of an exchange --------------------------------------------------------------------------------------


def log_exchange(method: str, path: str, exchange: Exchange, usage: Usage | None, source: str) -> None:
    """The line of a request that is over. `path` is a route's, not the client's.

    It is the line that `logging` would write of these fields, without a record that nobody else looks at: every
    request pays for it.
    """
    fields = exchange_fields(exchange, usage, source)
    handlers = logging.root.handlers
    handler = handlers[0] if len(handlers) == 1 else None
    if isinstance(handler, LineHandler) and handler.writes_json and _access.isEnabledFor(logging.INFO):
        handler.write(partial(_exchange_line, time(), method, path, fields))
        return
    fields = {"method": method, "path": path, **fields}
    _access.info("%s %s %s", method, path, exchange.status or "-", extra={"fields": fields})


def _exchange_line(at: float, method: str, path: str, fields: Mapping[str, Any]) -> str:
    """In the thread that writes it. `at` in seconds since the epoch."""
    message = f"{method} {path} {fields['status'] or '-'}"
    line = _json(
        {"timestamp": _timestamp(at), "level": "info", "message": message, "method": method, "path": path, **fields}
    )
    # All in it that is not ours to choose.
    said = (
        f"{message} {fields.get('client_request_id')} {fields['model']} {fields['user_id']} {fields['app_id']}"
        f" {fields['error_code']} {fields['provider']}"
    )
    return line if harmless(said) else safe(line)


def exchange_fields(exchange: Exchange, usage: Usage | None, source: str) -> dict[str, Any]:
    """What the log line of a request says, in this order. `source` says who counted; without usage nobody did.

    Plain values: they may wait to be written, and the exchange holds a prompt.
    """
    principal, target, chat = exchange.principal, exchange.target, exchange.asked
    started, first_byte = exchange.started, exchange.first_byte
    fields: dict[str, Any] = {"request_id": exchange.id}
    if exchange.client_request_id:
        fields["client_request_id"] = exchange.client_request_id
    fields["model"] = exchange.model or None
    fields["provider"] = target.provider.name if target else None
    fields["status"] = exchange.status
    fields["latency_ms"] = _milliseconds((exchange.ended or monotonic()) - started)
    fields["ttft_ms"] = _milliseconds(first_byte - started) if first_byte else None
    fields["prompt_tokens"] = usage.prompt_tokens if usage else None
    fields["completion_tokens"] = usage.completion_tokens if usage else None
    fields["total_tokens"] = usage.total_tokens if usage else None
    fields["usage_source"] = source or None
    fields["cost_micros"] = exchange.cost_micros
    fields["key"] = principal.key_prefix if principal else None
    fields["user_id"] = exchange.user_id or None
    fields["app_id"] = exchange.app_id or None
    fields["outcome"] = exchange.outcome or None
    fields["error_code"] = exchange.error_code or None
    fields["stream"] = chat.stream if chat else None
    attempts = exchange.headers.get("X-Gateway-Attempts", "")
    if "," in attempts:  # else it says no more than the provider above
        fields["attempts"] = attempts
    return fields


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000) if seconds > 0 else 0


# --- JSON ---------------------------------------------------------------------------------------------------------


def json_line(record: logging.LogRecord) -> str:
    parts: dict[str, Any] = {
        "timestamp": _timestamp(record.created),
        "level": record.levelname.lower(),
        "message": _message(record),
    }
    parts.update((str(name), value) for name, value in _fields(record).items() if name not in parts)
    if not record.name.startswith("gateway"):
        parts["logger"] = record.name
    if error := _error(record):
        parts["exception"] = "\n".join(_chain(error, quoted=False))
    return safe(_json(parts))


def _json(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # lone surrogates, integers over 64 bit, objects
        return json.dumps(value, default=str, skipkeys=True)


def _timestamp(at: float) -> str:
    """RFC 3339, UTC, milliseconds; `at` in seconds since the epoch."""
    microseconds = round(at * 1e6)
    return f"{_second(microseconds // 10**6)}.{microseconds // 1000 % 1000:03d}Z"


@lru_cache(1)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


# --- for people ---------------------------------------------------------------------------------------------------


def wants_colour(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """As Python itself decides since 3.13: https://docs.python.org/3/using/cmdline.html#controlling-color

    NO_COLOR (https://no-color.org) wins over FORCE_COLOR (https://force-color.org); empty is as if it were not there.
    """
    if environ.get("NO_COLOR"):
        return False
    return bool(environ.get("FORCE_COLOR")) or (environ.get("TERM") != "dumb" and stream.isatty())


def readable_line(*, colour: bool) -> Render:
    def paint(text: str, code: str) -> str:
        return f"{code}{text}{PLAIN}" if colour and code else text

    def render(record: logging.LogRecord) -> str:
        clock = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")[11:23]
        fields = _fields(record)
        parts = exchange_parts(fields) if fields.keys() >= _EXCHANGE else _parts(record, fields)
        line = "  ".join(paint(safe(text), code) for text, code in ((clock, DIM), *parts))
        error = _error(record)
        chain = _chain(error, quoted=not record.name.startswith(_QUOTING)) if error else ()
        return "\n    ".join([line, *map(safe, chain)])

    return render


def _parts(record: logging.LogRecord, fields: Mapping[Any, Any]) -> Parts:
    level = record.levelname.lower()
    yield f"{level:<{WORD}}", _COLOURS.get(level, "")
    said = [f"{field}={_shown(value)}" for field, value in fields.items() if value not in (None, "")]
    # Masked as one: a credential may begin in one value and go on in the next.
    yield "  ".join([record.name.removeprefix("gateway."), _message(record), *said]), ""


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

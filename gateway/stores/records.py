"""Records of the usage journal: one line each, `crc32 length json`, each readable without the others.

A segment begins with a heading that names the columns of its rows, so that a row is two hundred bytes shorter than
with its names, and a release with other columns still reads it.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple
from zlib import crc32

import orjson

from gateway.stores.ledger import COLUMNS, Given, given_of, values_of
from gateway.stores.usage import UsageRow

_STARTED_AT = COLUMNS.index("started_at")
_FRAME = 9  # bytes of the checksum and the blank after it


class Begin(NamedTuple):
    """The provider is about to be called. The row is made when it is asked for: most are followed by their end."""

    request_id: str
    payload: bytes
    columns: tuple[str, ...]

    @property
    def row(self) -> UsageRow:
        """What was known by then. Raises Unreadable."""
        return _row(_values(self.payload)[1:], self.columns)


class Tick(NamedTuple):
    """How far a running exchange is."""

    request_id: str
    prompt_tokens: int
    completion_tokens: int
    latency_ms: int


class Void(NamedTuple):
    """The provider was not reached after all: no row is due."""

    request_id: str


Record = Begin | Tick | Given | Void  # `Given`: it ended, and this is the row as it is to be stored


class Unreadable(Exception):
    """A line that is no record of ours: damaged, or of a release that we know nothing of."""


# --- writing ------------------------------------------------------------------------------------------------------


def heading() -> bytes:
    return _framed(["columns", *COLUMNS])


def begin(row: UsageRow) -> bytes:
    return _framed(("begin", *values_of(row)))


def tick(request_id: str, prompt_tokens: int, completion_tokens: int, latency_ms: int) -> bytes:
    return _framed(("tick", request_id, prompt_tokens, completion_tokens, latency_ms))


def end(row: UsageRow) -> bytes:
    return _framed(("end", *values_of(row)))


def void(request_id: str) -> bytes:
    return _framed(("void", request_id))


def _framed(values: Sequence[object]) -> bytes:
    payload = orjson.dumps(values)
    return b"%08x %d %b\n" % (crc32(payload), len(payload), payload)


# --- reading ------------------------------------------------------------------------------------------------------


def columns_of(line: bytes) -> tuple[str, ...]:
    """The columns that a segment's first line names; ours, when it cannot be read."""
    try:
        kind, *columns = _values(_payload(line))
    except Unreadable:
        return COLUMNS
    return COLUMNS if kind != "columns" or tuple(columns) == COLUMNS else tuple(columns)


_BEGIN = re.compile(rb'\["begin","([^"\\]*)",')  # by the columns of this release


def read(line: bytes, columns: tuple[str, ...]) -> Record | None:
    """The record in a line without its end; None for a heading. Raises Unreadable."""
    payload = _payload(line)
    if columns is COLUMNS and (begin := _BEGIN.match(payload)):
        return Begin(begin[1].decode(), payload, columns)
    values = _values(payload)
    try:
        match values[0]:
            case "end":
                return _end(payload, values, columns)
            case "begin":
                return Begin(str(values[1 + columns.index("request_id")]), payload, columns)
            case "tick":
                return Tick(*values[1:])
            case "void":
                return Void(*values[1:])
            case "columns":
                return None
    except (IndexError, TypeError, ValueError) as error:
        raise Unreadable(str(error)) from None
    raise Unreadable(f"a record of kind {values[0]!r}")


def _end(payload: bytes, values: list[Any], columns: tuple[str, ...]) -> Given:
    """Its bytes go on as they are, unless another release wrote them."""
    if columns is COLUMNS and len(values) == 1 + len(COLUMNS):
        started_at = datetime.fromisoformat(values[1 + _STARTED_AT])  # exact: it is a part of the row's key
        if started_at.tzinfo is UTC:
            return Given(values[1], started_at, b"[" + payload[len(b'["end",') :])
    return given_of(_row(values[1:], columns))


def _payload(line: bytes) -> bytes:
    payload = line[line.find(b" ", _FRAME) + 1 :]
    if not line.startswith(b"%08x %d " % (crc32(payload), len(payload))):
        raise Unreadable("damaged")
    return payload


def _values(payload: bytes) -> list[Any]:
    try:
        values: list[Any] = orjson.loads(payload)
    except orjson.JSONDecodeError:
        raise Unreadable("no JSON") from None
    if not isinstance(values, list) or not values:
        raise Unreadable("no record")
    return values


def _row(values: list[Any], columns: tuple[str, ...]) -> UsageRow:
    try:
        if columns != COLUMNS:
            known = dict(zip(columns, values, strict=True))
            known["started_at"] = datetime.fromisoformat(known["started_at"])
            return UsageRow(**{name: value for name, value in known.items() if name in COLUMNS})
        values[_STARTED_AT] = datetime.fromisoformat(values[_STARTED_AT])
        return UsageRow(*values)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise Unreadable(str(error)) from None

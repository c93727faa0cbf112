"""Records of the usage journal: one line each, `crc32 length json`, each readable without the others.

A segment begins with a heading that names the columns of its rows, so that a row is two hundred bytes shorter than
with its names, and a release with other columns still reads it.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple
from zlib import crc32

import orjson

from gateway.stores.ledger import COLUMNS, values_of
from gateway.stores.usage import UsageRow

_STARTED_AT = COLUMNS.index("started_at")
_FRAME = 9  # bytes of the checksum and the blank after it


class Begin(NamedTuple):
    """The provider is about to be called. The row is made when it is asked for: most are followed by their end."""

    request_id: str
    values: list[Any]
    columns: tuple[str, ...]

    @property
    def row(self) -> UsageRow:
        """What was known by then. Raises Unreadable."""
        return _row(self.values, self.columns)


class Tick(NamedTuple):
    """How far a running exchange is."""

    request_id: str
    prompt_tokens: int
    completion_tokens: int
    latency_ms: int


class End(NamedTuple):
    """The row as it is to be stored."""

    row: UsageRow


class Void(NamedTuple):
    """The provider was not reached after all: no row is due."""

    request_id: str


Record = Begin | Tick | End | Void


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
        kind, *columns = _unframed(line)
    except Unreadable:
        return COLUMNS
    return tuple(columns) if kind == "columns" else COLUMNS


def read(line: bytes, columns: tuple[str, ...]) -> Record | None:
    """The record in a line without its end; None for a heading. Raises Unreadable."""
    kind, *values = _unframed(line)
    try:
        match kind:
            case "end":
                return End(_row(values, columns))
            case "begin":
                return Begin(str(values[columns.index("request_id")]), values, columns)
            case "tick":
                return Tick(*values)
            case "void":
                return Void(*values)
            case "columns":
                return None
    except (IndexError, TypeError, ValueError) as error:
        raise Unreadable(str(error)) from None
    raise Unreadable(f"a record of kind {kind!r}")


def _unframed(line: bytes) -> list[Any]:
    length, _, payload = line[_FRAME:].partition(b" ")
    if line[:_FRAME] != b"%08x " % crc32(payload) or length != b"%d" % len(payload):
        raise Unreadable("damaged")
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
        values = list(values)
        values[_STARTED_AT] = datetime.fromisoformat(values[_STARTED_AT])  # exact: it is a part of the row's key
        return UsageRow(*values)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise Unreadable(str(error)) from None

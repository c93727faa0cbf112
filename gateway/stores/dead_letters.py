"""Rows that the database refuses and records that cannot be read: kept in a file, so that somebody can look at them."""

import errno
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import orjson

from gateway.stores.ledger import RowError
from gateway.stores.usage import UsageRow

DEAD_LETTERS = "dead-letter.jsonl"  # in the journals' folder: a line for each row or record


def bury_rows(path: Path, refused: Sequence[tuple[UsageRow, RowError]]) -> None:
    """Raises OSError when they could not all be written and synced."""
    _bury(path, [{"error": str(error), "row": asdict(row)} for row, error in refused])


def bury_lines(path: Path, lines: Sequence[bytes]) -> None:
    """As `bury_rows`."""
    _bury(path, [{"error": "damaged record", "record": line.decode("latin-1")} for line in lines])


def _bury(path: Path, letters: Sequence[dict[str, object]]) -> None:
    at = datetime.now(UTC)
    lines = b"".join(orjson.dumps({"at": at, **letter}) + b"\n" for letter in letters)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        if os.write(file, lines) < len(lines):
            raise OSError(errno.ENOSPC, "no space left on device")
        os.fsync(file)
    finally:
        os.close(file)

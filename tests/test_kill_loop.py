"""The short form of `make prove-usage`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.prove.kill_loop import run

pytestmark = pytest.mark.integration


async def test_no_usage_is_lost_and_none_is_doubled_through_kills_and_stops_of_postgres(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    ledger = await run(tmp_path, kills=14, stops=1)
    figure(str(ledger))
    assert ledger.kills >= 12 and len(ledger.ended) > 1000 and ledger.interrupted > 0
    assert ledger.holds, str(ledger)

"""The short form of `make prove-usage`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.prove import journal_kills, kill_loop

pytestmark = pytest.mark.integration


async def test_no_usage_is_lost_and_none_is_doubled_through_kills_of_the_gateway_and_a_stop_of_postgres(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    ledger = await kill_loop.run(tmp_path, kills=6, stops=1)
    figure(str(ledger))
    assert (ledger.kills >= 6, ledger.stops, ledger.cut > 0) == (True, 1, True)
    assert ledger.ended > 200
    assert ledger.outcomes.keys() == {"ok", "client_abort", "interrupted", "upstream_error", "rejected"}
    assert ledger.holds, str(ledger)


async def test_no_usage_is_lost_and_none_is_doubled_through_kills_of_busy_journals_and_a_stop_of_postgres(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    ledger = await journal_kills.run(tmp_path, kills=6, stops=1)
    figure(str(ledger))
    assert ledger.kills == 6 and len(ledger.ended) > 500 and ledger.interrupted > 0
    assert ledger.holds, str(ledger)

"""The table of `make chaos`."""

from pathlib import Path

import pytest

from tests.prove.chaos import _ABOUT, FILES, LONG, PROMISES, read_report, table, verdict
from tests.prove.long_faults import Shown

pytestmark = pytest.mark.unit

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_one" name="test_a"><properties>
  <property name="figure" value="P3 P4 both"/><property name="figure" value="no promise: 1"/></properties></testcase>
<testcase classname="tests.test_nth_await" name="test_b"><failure message="m"/></testcase>
<testcase classname="tests.test_one" name="test_c"><properties><property name="figure" value="P12 late: 9 s"/></properties>
  <failure message="m"/></testcase>
</testsuite></testsuites>"""


def test_figures_are_those_that_begin_with_a_promise_and_a_failed_test_breaks_its_own_or_its_file_s(
    tmp_path: Path,
) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert list(read_report(report)) == [
        Shown("P3", "both", True),
        Shown("P4", "both", True),
        *(Shown(promise, "FAILED: test_b", False) for promise in FILES["tests/test_nth_await.py"]),
        Shown("P12", "late: 9 s", False),
        Shown("P12", "FAILED: test_c", False),
    ]


def test_a_promise_that_nobody_shows_is_not_held() -> None:
    assert verdict([]) == "no figure"
    assert verdict([Shown("P1", "", True)]) == "held"
    assert verdict([Shown("P1", "", True), Shown("P1", "", False)]) == "NOT"


def test_the_table_has_every_promise_once_and_marks_what_broke_it() -> None:
    lines = list(table([Shown("P2", "12 s", True), Shown("P2", "99 s", False)]))
    assert [line.split()[0] for line in lines if line.startswith("P")] == [promise.name for promise in PROMISES]
    assert [line.split() for line in lines if line.startswith(" ")] == [["!", "99", "s"], ["12", "s"]]


def test_of_many_figures_the_last_are_printed_and_all_that_broke_a_promise() -> None:
    shown = [*(Shown("P2", f"{number} s", True) for number in range(9)), *[Shown("P2", "99 s", False)] * 9]
    lines = [line.strip() for line in table(shown, 2) if line.startswith(" ")]
    assert lines == [*["! 99 s"] * 9, "7 s", "8 s", "and 7 more"]


def test_every_promise_has_a_file_or_a_scenario_that_is_to_show_it() -> None:
    shown = {promise for promises in (*FILES.values(), *_ABOUT.values()) for promise in promises}
    assert shown == {promise.name for promise in PROMISES}
    assert {scenario.__name__ for scenario in LONG} <= _ABOUT.keys()

import pytest

from gateway.stores.failures import Failures

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_nobody_waits_before_the_limit() -> None:
    failures = Failures(3, clock=Clock())
    for _ in range(2):
        failures.add("a")
    assert failures.wait("a") == 0.0


def test_at_the_limit_one_waits_until_the_oldest_failure_is_a_minute_old() -> None:
    clock = Clock()
    failures = Failures(2, clock=clock)
    failures.add("a")
    clock.now += 20
    failures.add("a")
    assert failures.wait("a") == 40.0
    clock.now += 40
    assert failures.wait("a") == 0.0


def test_the_window_slides() -> None:
    clock = Clock()
    failures = Failures(2, clock=clock)
    for _ in range(2):
        failures.add("a")
        clock.now += 50
    failures.add("a")
    assert failures.wait("a") == 10.0


def test_others_do_not_wait() -> None:
    failures = Failures(1, clock=Clock())
    failures.add("a")
    assert failures.wait("b") == 0.0


def test_the_table_is_bounded_and_forgets_the_quietest() -> None:
    failures = Failures(1, names=2, clock=Clock())
    for name in ("quiet", "loud", "loud", "new"):
        failures.add(name)
    assert [name for name in ("quiet", "loud", "new") if failures.wait(name)] == ["loud", "new"]

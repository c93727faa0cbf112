import pytest

from gateway.stores.attempts import Attempts
from tests.support.clock import Clock

pytestmark = pytest.mark.unit


def test_nobody_waits_before_the_limit() -> None:
    attempts = Attempts(3, clock=Clock())
    for _ in range(2):
        attempts.add("a")
    assert attempts.wait("a") == 0.0


def test_at_the_limit_one_waits_until_the_oldest_attempt_is_a_minute_old() -> None:
    clock = Clock()
    attempts = Attempts(2, clock=clock)
    attempts.add("a")
    clock.now += 20
    attempts.add("a")
    assert attempts.wait("a") == 40.0
    clock.now += 40
    assert attempts.wait("a") == 0.0


def test_the_window_slides() -> None:
    clock = Clock()
    attempts = Attempts(2, clock=clock)
    for _ in range(2):
        attempts.add("a")
        clock.now += 50
    attempts.add("a")
    assert attempts.wait("a") == 10.0


def test_others_do_not_wait() -> None:
    attempts = Attempts(1, clock=Clock())
    attempts.add("a")
    assert attempts.wait("b") == 0.0


def test_the_table_is_bounded_and_forgets_the_quietest() -> None:
    attempts = Attempts(1, names=2, clock=Clock())
    for name in ("quiet", "loud", "loud", "new"):
        attempts.add(name)
    assert [name for name in ("quiet", "loud", "new") if attempts.wait(name)] == ["loud", "new"]

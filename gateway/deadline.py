"""A time limit on a coarse clock: what `asyncio.timeout` does at a tenth of its price, because it sets no timer."""

import asyncio
from time import monotonic
from types import TracebackType


class Deadline:
    """Around awaits of one task. Raises TimeoutError in it after `expire`, which the pulse calls when `at` is over."""

    __slots__ = ("_cancelling", "_expired", "_task", "at")

    def __init__(self, seconds: float) -> None:
        self.at = monotonic() + seconds
        self._expired = False

    def __enter__(self) -> "Deadline":
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        return self

    def expire(self) -> None:
        if not self._expired:
            self._expired = True
            self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A cancellation that is not ours goes on (https://docs.python.org/3/library/asyncio-task.html#asyncio.Task.uncancel).
        if self._expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

"""Argon2id off the event loop: the pools that all hashing goes through, and the rules for passwords.

One hash takes 20 to 200 ms of a core and up to 64 MiB. A pool bounds both: as many threads as cores, a short queue,
and beyond it a 503 at once, so that a flood of log-ins costs neither memory nor the latency of the streams. Keys and
passwords have a pool each: anybody may send passwords, and a queue full of them must not be in a good key's way.
"""

import asyncio
import base64
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError

from gateway.protocol.errors import InvalidRequest, Unavailable

T = TypeVar("T")

# Keys have 256 random bits, so OWASP's minimum is plenty:
# https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html
KEY_HASHER = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
# People's passwords get the library's recommendation, RFC 9106's second choice: 64 MiB, three passes.
PASSWORD_HASHER = PasswordHasher()

MAX_THREADS = 4  # 64 MiB each, also on a machine with a hundred cores
MAX_WAITING = 32
PASSWORD_BYTES = range(8, 129)  # in UTF-8; the upper end bounds what a log-in can make us hash


class HashingPool:
    """Threads that hash. Whoever made it closes it."""

    def __init__(self, threads: int = min(os.cpu_count() or 1, MAX_THREADS), waiting: int = MAX_WAITING) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="argon2")
        self._room = threading.BoundedSemaphore(threads + waiting)

    def submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Starts `work` in a thread, or queues it. Raises Unavailable when the queue is full."""
        if not self._room.acquire(blocking=False):
            raise Unavailable("too many secrets are being checked now", code="hashing_busy", retry_after=1)
        job = self._executor.submit(work)
        # Counted until the thread is done with it: a client that leaves cancels its wait, not the work.
        job.add_done_callback(lambda _: self._room.release())
        return asyncio.wrap_future(job)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


def matches(hasher: PasswordHasher, phc: str, secret: str) -> bool:
    """Is `secret` what `phc` was made from? Takes as long for a no as for a yes."""
    try:
        return hasher.verify(phc, secret)
    except VerifyMismatchError:
        return False


def decoy(hasher: PasswordHasher) -> str:
    """A PHC string that nothing matches and that costs as much to check as a real one."""
    salt, tag = (base64.b64encode(os.urandom(size)).rstrip(b"=").decode() for size in (16, hasher.hash_len))
    return f"$argon2id$v=19$m={hasher.memory_cost},t={hasher.time_cost},p={hasher.parallelism}${salt}${tag}"


def check_password(password: str) -> None:
    """Raises InvalidRequest for a password that cannot be one."""
    try:
        size = len(password.encode())
    except UnicodeEncodeError:
        size = 0  # a lone surrogate: no keyboard writes it
    if size not in PASSWORD_BYTES or "\0" in password:
        low, high = PASSWORD_BYTES[0], PASSWORD_BYTES[-1]
        raise InvalidRequest(f"invalid password: {low} to {high} bytes of text are required", param="password")

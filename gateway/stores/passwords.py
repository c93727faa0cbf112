"""Argon2id off the event loop: the pools that all hashing goes through, and the rules for passwords.

One hash takes 20 to 200 ms of a core and up to 64 MiB. A pool bounds both: as many threads as cores, a short queue,
and beyond it a 503 at once, so that a flood of log-ins costs neither memory nor the latency of the streams. Keys and
passwords have a pool each: anybody may send passwords, and a queue full of them must not be in a good key's way.
"""

import asyncio
import base64
import os
import threading
import unicodedata
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
PASSWORD_BYTES = range(8, 129)  # in UTF-8, normalised; the upper end bounds what a log-in can make us hash


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


def normal_password(password: str) -> str:
    """What is hashed of it, however a keyboard writes its characters. Raises InvalidRequest for what cannot be one."""
    normal = unicodedata.normalize("NFKC", password[: PASSWORD_BYTES[-1] + 1])  # which of a megabyte would take a while
    try:
        size = len(normal.encode())
    except UnicodeEncodeError:
        size = 0  # a lone surrogate: no keyboard writes it
    if size not in PASSWORD_BYTES or "\0" in normal:
        low, high = PASSWORD_BYTES[0], PASSWORD_BYTES[-1]
        raise InvalidRequest(f"invalid password: {low} to {high} bytes of text are required", param="password")
    return normal


def check_new_password(password: str, email: str) -> None:
    """Raises InvalidRequest for one that is among the first to be tried. No rule says what must be in one: such rules
    make passwords worse, https://pages.nist.gov/800-63-4/sp800-63b.html#passwordver."""
    tried = normal_password(password).lower()
    if tried in (email, email.partition("@")[0]):
        raise InvalidRequest("invalid password: it is the email", param="password", code="weak_password")
    if tried in COMMON_PASSWORDS:
        words = "invalid password: it is one of those that are tried first"
        raise InvalidRequest(words, param="password", code="weak_password")


# Of eight characters and more: the shorter ones are refused by their length. From the lists of breached passwords that
# are published, https://github.com/danielmiessler/SecLists/tree/master/Passwords/Common-Credentials.
COMMON_PASSWORDS = frozenset(
    """
    password password1 password2 password12 password123 password1234 password! password1! passw0rd p@ssw0rd p@ssword
    p@ssw0rd1 pa$$word pa55word passwort motdepasse contrasena 12345678 123456789 1234567890 0123456789 0987654321
    987654321 87654321 12344321 11223344 12341234 123123123 123321123 147258369 159357456 11111111 111111111
    22222222 88888888 99999999 00000000 000000000 12121212 69696969 66666666 55555555 77777777 aaaaaaaa abcd1234
    1234abcd abc12345 abc123456 a1234567 a12345678 1234qwer qwer1234 qwerty12 qwerty123 qwerty1234 qwertyuiop
    qwertyui qwerty123456 1qaz2wsx 1q2w3e4r 1q2w3e4r5t 1qazxsw2 zaq12wsx zaq1zaq1 q1w2e3r4 q1w2e3r4t5 asdfghjkl
    asdfghjk asdf1234 zxcvbnm1 zxcvbnm123 qazwsxedc qazwsx123 iloveyou iloveyou1 iloveyou2 ilovegod sunshine
    sunshine1 princess princess1 football football1 baseball baseball1 basketball superman superman1 starwars
    starwars1 trustno1 whatever letmein1 letmein123 welcome1 welcome123 welcome2024 welcome2025 welcome2026 changeme
    changeme1 changeme123 changeit administrator admin123 admin1234 admin12345 administrator1 adminadmin rootroot
    root1234 test1234 testtest testing123 testtest1 michelle jennifer charlie1 computer internet corvette mercedes
    maverick midnight midnight1 mustang1 jordan23 liverpool liverpool1 chocolate butterfly butterfly1 elephant
    dolphins danielle christian samantha victoria alexander jonathan nicholas benjamin patricia veronica cocacola
    blink182 marlboro snowball hello123 hello1234 helloworld dragon123 monkey123 master123 shadow123 secret123
    secret1234 default1 default123 access14 passpass
    """.split()  # noqa: SIM905 - a list of literals is five times as long
)

import asyncio
import base64
import threading

import pytest
from argon2 import PasswordHasher, extract_parameters

from gateway.protocol.errors import InvalidRequest, Unavailable
from gateway.stores.passwords import (
    COMMON_PASSWORDS,
    KEY_HASHER,
    PASSWORD_BYTES,
    PASSWORD_HASHER,
    HashingPool,
    check_new_password,
    decoy,
    matches,
    normal_password,
)

pytestmark = pytest.mark.unit


async def test_the_queue_is_bounded_and_beyond_it_the_answer_is_503_at_once() -> None:
    pool, gate = HashingPool(threads=1, waiting=2), threading.Event()
    try:
        work = [pool.submit(gate.wait) for _ in range(3)]
        with pytest.raises(Unavailable) as caught:
            pool.submit(gate.wait)
        assert (caught.value.http_status, caught.value.retry_after) == (503, 1)
        gate.set()
        assert await asyncio.gather(*work) == [True, True, True]
        assert await pool.submit(lambda: "room again") == "room again"
    finally:
        gate.set()
        pool.close()


async def test_a_client_that_leaves_keeps_its_thread_counted_until_it_is_done() -> None:
    pool, gate, started = HashingPool(threads=1, waiting=0), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        gate.wait()

    try:
        left = pool.submit(work)
        started.wait()
        left.cancel()
        with pytest.raises(Unavailable):
            pool.submit(work)
    finally:
        gate.set()
        pool.close()


async def test_a_client_that_leaves_while_it_waits_frees_its_place() -> None:
    pool, gate = HashingPool(threads=1, waiting=1), threading.Event()
    try:
        first, second = pool.submit(gate.wait), pool.submit(gate.wait)
        second.cancel()
        await asyncio.sleep(0)
        third = pool.submit(gate.wait)
        gate.set()
        assert [await first, await third] == [True, True]
    finally:
        gate.set()
        pool.close()


def test_keys_are_hashed_with_the_minimum_of_owasp_and_passwords_with_the_librarys_default() -> None:
    key, password, default = (hasher.hash("x") for hasher in (KEY_HASHER, PASSWORD_HASHER, PasswordHasher()))
    assert key.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert extract_parameters(password) == extract_parameters(default)


def test_a_hash_matches_its_own_secret_and_no_other() -> None:
    phc = KEY_HASHER.hash("right")
    assert matches(KEY_HASHER, phc, "right")
    assert not matches(KEY_HASHER, phc, "wrong")


def test_the_decoy_costs_what_a_real_hash_costs_and_matches_nothing() -> None:
    real, fake = PASSWORD_HASHER.hash("secret123"), decoy(PASSWORD_HASHER)
    assert extract_parameters(fake) == extract_parameters(real)
    assert not matches(PASSWORD_HASHER, fake, "secret123")
    assert len(base64.b64decode(fake.rpartition("$")[2] + "==")) == PASSWORD_HASHER.hash_len


@pytest.mark.parametrize("password", ["12345678", "x" * 128, "ü" * 4, "日本語", " spaces are kept "])
def test_a_password_has_8_to_128_bytes(password: str) -> None:
    assert normal_password(password) == password


@pytest.mark.parametrize(
    "password", ["", "1234567", "x" * 129, "x" * 1_000_000, "ü" * 65, "ﷺ" * 20, "nul\0inside", "\ud800 surrogate"]
)
def test_what_cannot_be_a_password_is_refused_without_repeating_it(password: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        normal_password(password)
    assert caught.value.param == "password"
    assert password == "" or password not in caught.value.message


def test_a_password_is_the_same_however_its_characters_are_written() -> None:
    """One keyboard sends an é, another an e and an accent; full-width digits are digits."""
    assert normal_password("caf\u00e9 noir") == normal_password("cafe\u0301 noir") == "caf\u00e9 noir"
    assert normal_password("\uff11\uff12\uff13\uff14 garden") == "1234 garden"


@pytest.mark.parametrize(
    "password", ["password", "PassWord123", "12345678", "ada.lovelace@example.com", "Ada.Lovelace", "ｐａｓｓｗｏｒｄ"]
)
def test_what_is_tried_first_is_no_new_password(password: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_new_password(password, "ada.lovelace@example.com")
    assert (caught.value.error_code, caught.value.param) == ("weak_password", "password")


def test_any_other_password_is_taken_without_a_rule_of_what_must_be_in_it() -> None:
    for password in ("correct horse", "aaaaaaab", "passwords", "example.com", "ada@other.org"):
        check_new_password(password, "ada@example.com")


def test_the_list_of_common_passwords_holds_none_that_its_length_refuses() -> None:
    assert len(COMMON_PASSWORDS) > 100
    assert all(len(password) in PASSWORD_BYTES and password == password.lower() for password in COMMON_PASSWORDS)

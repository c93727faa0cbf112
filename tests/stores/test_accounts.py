import asyncio
import statistics
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import asyncpg
import pytest
from argon2 import PasswordHasher

from gateway.exchange import NO_BUDGET, Budget, new_id
from gateway.protocol.errors import GatewayError, InvalidRequest, Unauthenticated
from gateway.stores import accounts as accounts_module
from gateway.stores.accounts import REGISTRATIONS_PER_ADDRESS, AccountStore, normal_email
from gateway.stores.passwords import PASSWORD_HASHER, HashingPool, matches

pytestmark = pytest.mark.integration

EMAIL, PASSWORD = "ada@example.com", "correct horse"


@pytest.fixture(autouse=True)
def fast_hashes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a hash costs is the business of test_passwords; here the library's default would only take time."""
    if "real_hashes" not in request.fixturenames:
        monkeypatch.setattr("gateway.stores.accounts.PASSWORD_HASHER", PasswordHasher(1, 8, 1))


@pytest.fixture
def real_hashes() -> None:
    """For a test that needs the library's default."""


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The PHC strings that Argon2id was asked about."""
    phcs: list[str] = []

    def counting(hasher: Any, phc: str, secret: str) -> bool:
        phcs.append(phc)
        return matches(hasher, phc, secret)

    monkeypatch.setattr("gateway.stores.accounts.matches", counting)
    return phcs


@pytest.fixture
def hashing() -> Iterator[HashingPool]:
    pool = HashingPool()
    yield pool
    pool.close()


@pytest.fixture
def store(pool: asyncpg.Pool, hashing: HashingPool) -> AccountStore:
    return AccountStore(pool, hashing=hashing)


async def refusal(answer: Awaitable[object]) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        await answer
    return caught.value


# --- registration -------------------------------------------------------------------------------------------------


async def test_the_first_account_is_the_admin_and_the_next_are_members(store: AccountStore) -> None:
    accounts = [await store.register(f"{name}@example.com", PASSWORD, registration="open") for name in "abc"]
    assert [account.role for account in accounts] == ["admin", "member", "member"]
    assert list(await store.list()) == accounts


async def test_of_many_that_race_to_be_first_one_becomes_admin(store: AccountStore) -> None:
    registering = (store.register(f"user{n}@example.com", PASSWORD, registration="open") for n in range(20))
    accounts = await asyncio.gather(*registering)
    assert sorted(account.role for account in accounts) == ["admin"] + ["member"] * 19


async def test_of_many_that_race_on_a_closed_gateway_only_the_first_gets_in(store: AccountStore) -> None:
    registering = (store.register(f"user{n}@example.com", PASSWORD, registration="closed") for n in range(20))
    answers = await asyncio.gather(*registering, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, GatewayError)]
    assert {(error.http_status, error.error_code) for error in refused} == {(403, "registration_closed")}
    assert len(refused) == 19
    assert [account.role for account in await store.list()] == ["admin"]


async def test_a_closed_gateway_hashes_nothing_for_a_stranger(
    store: AccountStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.register(EMAIL, PASSWORD, registration="closed")
    monkeypatch.setattr("gateway.stores.accounts.PASSWORD_HASHER", None)
    error = await refusal(store.register("stranger@example.com", PASSWORD, registration="closed"))
    assert error.error_code == "registration_closed"


DOMAINS = "example.com, Example.org"


async def test_a_gateway_for_some_domains_registers_their_addresses_and_no_others(store: AccountStore) -> None:
    for email in (EMAIL, "Bob@EXAMPLE.org"):
        await store.register(email, PASSWORD, registration=DOMAINS)
    foreign = ["x@example.net", "x@sub.example.com", "x@notexample.com", "x@example.com.evil.io", "example.com@evil.io"]
    for email in foreign:
        error = await refusal(store.register(email, PASSWORD, registration=DOMAINS))
        assert (error.http_status, error.error_code) == (403, "registration_closed")


async def test_not_even_the_first_account_is_of_a_foreign_domain(store: AccountStore) -> None:
    """It would be the admin's."""
    assert (await refusal(store.register("x@evil.io", PASSWORD, registration=DOMAINS))).http_status == 403
    assert (await store.register(EMAIL, PASSWORD, registration=DOMAINS)).role == "admin"


@pytest.mark.parametrize("registration", ["closed", "example.org"])
async def test_a_door_that_is_closed_says_the_same_to_a_known_email_and_does_no_work(
    store: AccountStore, monkeypatch: pytest.MonkeyPatch, registration: str
) -> None:
    await store.register(EMAIL, PASSWORD, registration="open")
    monkeypatch.setattr(accounts_module, "PASSWORD_HASHER", None)
    known = await refusal(store.register(EMAIL, PASSWORD, registration=registration))
    unknown = await refusal(store.register("nobody@example.com", PASSWORD, registration=registration))
    assert known.http_status == 403
    assert known.object() == unknown.object()


async def test_the_commonest_passwords_and_the_email_itself_are_no_new_passwords(store: AccountStore) -> None:
    for password in ("Password1", "qwertyuiop", EMAIL.upper()):
        error = await refusal(store.register(EMAIL, password, registration="open"))
        assert (error.http_status, error.error_code, error.param) == (400, "weak_password", "password")


async def test_who_registered_with_a_weak_password_before_still_logs_in(
    store: AccountStore, pool: asyncpg.Pool
) -> None:
    account = await store.register(EMAIL, PASSWORD, registration="open")
    await pool.execute("update accounts set password_hash = $1", PasswordHasher(1, 8, 1).hash("password1"))
    assert await store.login(EMAIL, "password1") == account


async def test_a_password_may_be_typed_on_another_keyboard(store: AccountStore) -> None:
    account = await store.register(EMAIL, "caf\u00e9 noir", registration="open")
    assert await store.login(EMAIL, "cafe\u0301 noir") == account


async def test_an_email_is_registered_once_however_it_is_written(store: AccountStore) -> None:
    await store.register(EMAIL, PASSWORD, registration="open")
    for email in (EMAIL, " ADA@Example.COM\n"):
        error = await refusal(store.register(email, "another password", registration="open"))
        assert (error.http_status, error.error_code, error.param) == (409, "email_taken", "email")
    assert (await store.login(EMAIL, PASSWORD)).email == EMAIL


async def test_of_many_that_race_for_one_email_one_gets_it(store: AccountStore) -> None:
    registering = (store.register(EMAIL, PASSWORD, registration="open") for _ in range(10))
    answers = await asyncio.gather(*registering, return_exceptions=True)
    assert sorted(getattr(answer, "http_status", 201) for answer in answers) == [201] + [409] * 9


async def test_a_password_is_stored_as_argon2id_of_the_librarys_default(
    store: AccountStore, pool: asyncpg.Pool, real_hashes: None
) -> None:
    await store.register(EMAIL, PASSWORD, registration="open")
    [row] = await pool.fetch("select * from accounts")
    assert not PASSWORD_HASHER.check_needs_rehash(row["password_hash"])
    assert PASSWORD not in " ".join(str(value) for value in row.values())


async def test_an_address_registers_so_many_times_a_minute_and_is_then_told_to_wait(store: AccountStore) -> None:
    for number in range(REGISTRATIONS_PER_ADDRESS):
        await store.register(f"user{number}@example.com", PASSWORD, registration="open", address="10.0.0.1")
    error = await refusal(store.register(EMAIL, PASSWORD, registration="open", address="10.0.0.1"))
    assert (error.http_status, error.error_code) == (429, "too_many_registrations")
    assert error.retry_after is not None
    assert 55 < error.retry_after <= 60
    assert (await store.register(EMAIL, PASSWORD, registration="open", address="10.0.0.2")).email == EMAIL


async def test_a_registration_that_is_refused_after_its_hash_counts_too(store: AccountStore) -> None:
    await store.register(EMAIL, PASSWORD, registration="open")
    again = [store.register(EMAIL, PASSWORD, registration="open", address="10.0.0.1") for _ in range(40)]
    answers = await asyncio.gather(*again, return_exceptions=True)
    refused = 40 - REGISTRATIONS_PER_ADDRESS
    statuses = sorted(getattr(answer, "http_status", 201) for answer in answers)
    assert statuses == [409] * REGISTRATIONS_PER_ADDRESS + [429] * refused


async def test_a_registration_that_costs_no_hash_does_not_count(pool: asyncpg.Pool) -> None:
    hashing, gate = HashingPool(threads=1, waiting=0), threading.Event()
    store = AccountStore(pool, hashing=hashing)
    busy = hashing.submit(gate.wait)
    for _ in range(20):
        for email in ("no email", EMAIL):
            error = await refusal(store.register(email, PASSWORD, registration="open", address="10.0.0.1"))
            assert error.http_status == (503 if email == EMAIL else 400)
    gate.set()
    await busy
    assert (await store.register(EMAIL, PASSWORD, registration="open", address="10.0.0.1")).email == EMAIL
    hashing.close()


NO_EMAILS = [
    "",
    "@",
    "ada",
    "ada@",
    "@example.com",
    "a b@example.com",
    "ada@example..com",
    "ada@-example.com",
    "ada@exam_ple.com",
    "two@at@example.com",
    "nul\0@example.com",
    "\ud800@example.com",
    "ada@example.com\nBcc: all@example.com",
    "ad\u00e4@example.com",
    "ada@ex\u0430mple.com",  # a Cyrillic a
    "\u212a@example.com",  # the Kelvin sign, whose lower case is a plain k
    "a" * 243 + "@example.com",
]


async def test_what_is_no_email_is_refused_before_anything_else(store: AccountStore, pool: asyncpg.Pool) -> None:
    await pool.close()
    refused = []
    for email in NO_EMAILS:
        refused.append(await refusal(store.register(email, PASSWORD, registration="open")))
        refused.append(await refusal(store.login(email, PASSWORD)))
    assert {(type(error), error.param) for error in refused} == {(InvalidRequest, "email")}


@pytest.mark.parametrize(
    "email", ["a" * 242 + "@example.com", "x+y.z@sub.example.co", "root@localhost", "o'neill@a-b.ie"]
)
def test_what_is_an_email_is_taken(email: str) -> None:
    assert normal_email(f" {email.upper()} ") == email


# --- log-in -------------------------------------------------------------------------------------------------------


async def test_email_and_password_name_the_account(store: AccountStore) -> None:
    account = await store.register(EMAIL, PASSWORD, registration="open")
    assert await store.login("Ada@Example.com", PASSWORD) == account


async def test_a_wrong_password_and_an_unknown_email_get_the_same_answer_for_the_same_work(
    store: AccountStore, checked: list[str]
) -> None:
    await store.register(EMAIL, PASSWORD, registration="open")
    known = await refusal(store.login(EMAIL, "wrong password"))
    unknown = await refusal(store.login("nobody@example.com", "wrong password"))
    assert (known.http_status, known.error_code) == (401, "invalid_credentials")
    assert known.object() == unknown.object()
    assert len(checked) == 2
    assert checked[0].split("$")[:4] == checked[1].split("$")[:4]


async def test_a_password_is_compared_byte_for_byte(store: AccountStore) -> None:
    await store.register(EMAIL, PASSWORD, registration="open")
    for wrong in (PASSWORD.upper(), PASSWORD + " ", " " + PASSWORD, PASSWORD[:-1]):
        assert isinstance(await refusal(store.login(EMAIL, wrong)), Unauthenticated)


async def test_after_five_failures_an_account_waits_a_minute_even_with_the_right_password(
    store: AccountStore, checked: list[str]
) -> None:
    await store.register(EMAIL, PASSWORD, registration="open")
    for number in range(5):
        assert (await refusal(store.login(EMAIL, "wrong password", address=f"10.0.0.{number}"))).http_status == 401
    error = await refusal(store.login(EMAIL, PASSWORD, address="10.0.0.9"))
    assert error.http_status == 429
    assert error.retry_after is not None
    assert 55 < error.retry_after <= 60
    assert len(checked) == 5


async def test_five_failures_from_an_address_are_no_reason_to_lock_out_its_neighbours(store: AccountStore) -> None:
    """Behind a load balancer all clients have one address."""
    await store.register(EMAIL, PASSWORD, registration="open")
    for _ in range(5):
        guess = store.login("nobody@example.com", "wrong password", address="10.0.0.1")
        assert (await refusal(guess)).http_status == 401
    assert (await store.login(EMAIL, PASSWORD, address="10.0.0.1")).email == EMAIL


async def test_after_thirty_failures_an_address_waits_whatever_the_account(store: AccountStore) -> None:
    await store.register(EMAIL, PASSWORD, registration="open")
    for number in range(30):
        guess = store.login(f"user{number}@example.com", "wrong password", address="10.0.0.1")
        assert (await refusal(guess)).http_status == 401
    assert (await refusal(store.login(EMAIL, PASSWORD, address="10.0.0.1"))).http_status == 429
    assert (await store.login(EMAIL, PASSWORD, address="10.0.0.2")).email == EMAIL


async def test_neither_log_in_nor_registration_takes_longer_for_a_known_email(
    real_hashes: None, store: AccountStore, pool: asyncpg.Pool, figure: Callable[[str], None]
) -> None:
    known = [f"known{number}@example.com" for number in range(4)]
    phc = PASSWORD_HASHER.hash(PASSWORD)
    for email in known:
        sql = "insert into accounts (id, email, password_hash, role) values ($1, $2, $3, 'member')"
        await pool.execute(sql, new_id(), email, phc)

    async def seconds(work: Awaitable[object]) -> float:
        started = time.perf_counter()
        with suppress(GatewayError):
            await work
        return time.perf_counter() - started

    times: dict[str, list[float]] = {}
    for email in known:
        for who, name in (("known", email), ("unknown", f"un{email}")):
            log_in, register = f"log-in, {who}", f"registration, {who}"
            times.setdefault(log_in, []).append(await seconds(store.login(name, "wrong password")))
            times.setdefault(register, []).append(await seconds(store.register(name, PASSWORD, registration="open")))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    ratios = {what: medians[f"{what}, known"] / medians[f"{what}, unknown"] for what in ("log-in", "registration")}
    figure(
        "P8 a known email beside an unknown one: "
        + ", ".join(f"{what} {ratio:.2f} of its time" for what, ratio in ratios.items())
    )
    assert all(0.25 < ratio < 4 for ratio in ratios.values())  # without the decoy it is more than fifty


async def test_guesses_at_many_accounts_that_come_all_at_once_from_an_address_learn_no_more_than_thirty(
    pool: asyncpg.Pool,
) -> None:
    hashing = HashingPool(waiting=100)
    store = AccountStore(pool, hashing=hashing)
    guesses = [store.login(f"user{n}@example.com", "wrong password", address="10.0.0.1") for n in range(60)]
    answers = await asyncio.gather(*guesses, return_exceptions=True)
    hashing.close()
    assert sorted(getattr(answer, "http_status", 200) for answer in answers) == [401] * 30 + [429] * 30


async def test_guesses_that_come_all_at_once_learn_no_more_than_five(store: AccountStore) -> None:
    await store.register(EMAIL, PASSWORD, registration="open")
    guesses = [store.login(EMAIL, f"wrong password {number}") for number in range(30)]
    answers = await asyncio.gather(*guesses, return_exceptions=True)
    assert sorted(getattr(answer, "http_status", 200) for answer in answers) == [401] * 5 + [429] * 25


async def test_many_good_log_ins_at_once_all_pass(store: AccountStore) -> None:
    account = await store.register(EMAIL, PASSWORD, registration="open")
    logins = [store.login(EMAIL, PASSWORD, address="10.0.0.1") for _ in range(20)]
    assert await asyncio.gather(*logins) == [account] * 20


async def test_a_full_queue_is_503_and_no_failure(pool: asyncpg.Pool) -> None:
    hashing, gate = HashingPool(threads=1, waiting=0), threading.Event()
    store = AccountStore(pool, hashing=hashing)
    await store.register(EMAIL, PASSWORD, registration="open")
    busy = hashing.submit(gate.wait)
    for _ in range(10):
        assert (await refusal(store.login(EMAIL, PASSWORD))).http_status == 503
    gate.set()
    await busy
    assert (await store.login(EMAIL, PASSWORD)).email == EMAIL
    hashing.close()


async def test_an_account_is_found_by_its_email(store: AccountStore) -> None:
    account = await store.register(EMAIL, PASSWORD, registration="open")
    assert await store.find("ADA@example.com") == account
    error = await refusal(store.find("nobody@example.com"))
    assert (error.http_status, error.error_code) == (404, "account_not_found")


# --- budgets ------------------------------------------------------------------------------------------------------


async def ignore(account_id: str) -> None:
    """Nobody keeps what it read of this account's keys."""


async def test_a_new_account_has_no_budget(store: AccountStore) -> None:
    account = await store.register(EMAIL, PASSWORD, registration="open")
    assert account.budget == NO_BUDGET


async def test_only_what_is_given_is_changed_and_everybody_sees_it(store: AccountStore) -> None:
    account = await store.register(EMAIL, PASSWORD, registration="open")
    other = await store.register("other@example.com", PASSWORD, registration="open")
    await store.change(account.id, {"tokens_per_minute": 1, "tokens_per_day": 10**12}, ignore)
    changed = await store.change(
        account.id, {"cost_per_day": 3, "cost_per_month": 10**15, "tokens_per_minute": 0}, ignore
    )
    assert changed.budget == Budget(0, 10**12, 3, 10**15)
    assert list(await store.list()) == [changed, other]
    assert await store.find(EMAIL) == await store.login(EMAIL, PASSWORD) == await store.get(account.id, None) == changed


async def test_a_change_is_announced_also_when_whoever_asked_has_left(
    store: AccountStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request is cancelled just after the commit."""
    account = await store.register(EMAIL, PASSWORD, registration="open")
    announced: list[str] = []

    async def announce(account_id: str) -> None:
        announced.append(account_id)

    await store.change(account.id, {"tokens_per_day": 1}, announce)
    update = accounts_module._update

    async def left(*arguments: Any) -> None:
        await update(*arguments)
        raise asyncio.CancelledError

    monkeypatch.setattr(accounts_module, "_update", left)
    with pytest.raises(asyncio.CancelledError):
        await store.change(account.id, {"tokens_per_day": 2}, announce)
    assert announced == [account.id, account.id]
    assert (await store.get(account.id, None)).budget.tokens_per_day == 2


async def test_a_foreign_account_does_not_exist(store: AccountStore) -> None:
    ada = await store.register(EMAIL, PASSWORD, registration="open")
    bob = await store.register("bob@example.com", PASSWORD, registration="open")
    assert await store.get(ada.id, ada.id) == ada
    assert list(await store.list(ada.id)) == [ada]
    announced: list[str] = []

    async def announce(account_id: str) -> None:
        announced.append(account_id)

    nobody = new_id()
    for answer in (store.get(bob.id, ada.id), store.get(nobody, None), store.change(nobody, {}, announce)):
        error = await refusal(answer)
        assert (error.http_status, error.error_code) == (404, "account_not_found")
    assert announced == []


@pytest.mark.parametrize(
    "column", ["tokens_per_minute", "tokens_per_day", "cost_micros_per_day", "cost_micros_per_month"]
)
async def test_the_database_keeps_no_budget_below_nothing(store: AccountStore, pool: asyncpg.Pool, column: str) -> None:
    await store.register(EMAIL, PASSWORD, registration="open")
    with pytest.raises(asyncpg.CheckViolationError):
        await pool.execute(f"update accounts set {column} = -1")


async def test_without_postgres_everything_is_503(store: AccountStore, pool: asyncpg.Pool) -> None:
    await pool.close()
    for answer in (
        store.register(EMAIL, PASSWORD, registration="open"),
        store.register(EMAIL, PASSWORD, registration="closed"),
        store.login(EMAIL, PASSWORD),
        store.list(),
        store.get(new_id(), None),
        store.change(new_id(), {"tokens_per_day": 1}, ignore),
    ):
        assert (await refusal(answer)).error_code == "database_unavailable"

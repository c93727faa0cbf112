"""Keys that somebody guesses, floods with, or makes up: what it costs us, what they learn, and who notices."""

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from threading import Event
from typing import Any

import aiohttp
import pytest
from argon2 import PasswordHasher

from gateway import appkeys
from gateway.protocol.errors import Unauthenticated
from gateway.stores import passwords
from gateway.stores.keys import FAILURES_PER_MINUTE
from gateway.stores.tokens import TOKEN_LENGTH, join_token, make_token, parse_token
from tests.support.gateway import Gateway, running_gateway

pytestmark = pytest.mark.integration

Figure = Callable[[str], None]
ANY_NUMBER = 10**9  # failures a minute: where the brake on failures is not what is looked at


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(database_url, redis_url) as gateway:
        yield gateway


@pytest.fixture
def no_brake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.stores.keys.FAILURES_PER_MINUTE", ANY_NUMBER)


@pytest.fixture
def argon2(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The tokens that Argon2id was asked about."""
    asked: list[str] = []

    def counting(hasher: PasswordHasher, phc: str, token: str) -> bool:
        asked.append(token)
        return passwords.matches(hasher, phc, token)

    monkeypatch.setattr("gateway.stores.keys.matches", counting)
    yield asked


def mistyped(token: str) -> str:
    return token[:-1] + ("a" if token[-1] != "a" else "b")


def other_secret(token: str) -> str:
    """A key with the same id and a secret of its own."""
    mine, other = parse_token(token), parse_token(make_token())
    assert mine is not None
    assert other is not None
    return join_token(mine.id, other.secret)


WRONG: dict[str, Callable[[str], str]] = {
    "mistyped": mistyped,
    "unknown id": lambda good: make_token(),
    "wrong secret": other_secret,
}


async def ask(client: aiohttp.ClientSession, gateway: Gateway, token: str) -> tuple[int, float, Any]:
    """Status, seconds, body."""
    started = time.perf_counter()
    async with client.get(f"{gateway.base_url}/models", headers={"Authorization": f"Bearer {token}"}) as response:
        body = await response.json()
        return response.status, time.perf_counter() - started, body


# --- a crowd ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_brake")
async def test_a_hundred_and_twenty_bad_keys_at_once_leave_a_good_one_its_pace(
    gateway: Gateway, argon2: list[str], figure: Figure
) -> None:
    good = gateway.api_key
    kinds = list(WRONG.values())
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        await ask(client, gateway, good)
        argon2.clear()

        async def p95_among(token_of: Callable[[int], str], expected: int) -> float:
            """Of a good key while 120 others ask all the time, each on a connection of its own."""

            async def other(number: int) -> list[int]:
                return [(await ask(client, gateway, token_of(number + turn)))[0] for turn in range(10)]

            crowd = asyncio.gather(*map(other, range(120)))
            waits = []
            while not crowd.done():
                status, seconds, _ = await ask(client, gateway, good)
                assert status == 200
                waits.append(seconds)
            assert {status for statuses in await crowd for status in statuses} == {expected}
            return statistics.quantiles(waits, n=20)[-1] if len(waits) > 1 else waits[0]

        among_good = await p95_among(lambda number: good, 200)
        among_bad = await p95_among(lambda number: kinds[number % 3](good), 401)
    figure(
        f"P8 120 bad keys at once: a good key's p95 {among_bad * 1e3:.0f} ms, clients in the same process"
        f" ({among_good * 1e3:.0f} ms among 120 good ones); Argon2id ran {len(argon2)} times"
    )
    assert argon2 == []
    assert among_bad < max(1, 4 * among_good)


async def test_a_bad_key_costs_microseconds(gateway: Gateway, argon2: list[str], figure: Figure) -> None:
    """CPU of this process, beside that of Argon2id: a known key's is a difference of two figures as large as itself."""
    keys, good = gateway.app[appkeys.KEYS], gateway.api_key
    await keys.verify(good)
    argon2.clear()
    known = await cpu_each([good] * 3000, keys.verify)
    kinds = {name: await cpu_each([make(good) for _ in range(3000)], keys.verify) for name, make in WRONG.items()}
    assert argon2 == []
    phc, costs = passwords.KEY_HASHER.hash("x"), []
    for _ in range(5):
        started = time.process_time()
        passwords.matches(passwords.KEY_HASHER, phc, "y")
        costs.append(time.process_time() - started)
    hashed = statistics.median(costs)
    words = ", ".join(f"{name} {seconds * 1e6:.0f} µs" for name, seconds in kinds.items())
    figure(f"P8 CPU of a bad key: {words}; of a known key {known * 1e6:.1f} µs, of Argon2id {hashed * 1e3:.0f} ms")
    assert kinds["mistyped"] < hashed / 400
    assert max(kinds.values()) < hashed / 200


async def cpu_each(tokens: list[str], verify: Callable[[str], Awaitable[object]]) -> float:
    """Seconds that one takes, when 120 come at once, without what it takes to ask."""

    async def nothing(token: str) -> None:
        pass

    async def all_of(verify: Callable[[str], Awaitable[object]]) -> float:
        async def one(token: str) -> None:
            with suppress(Unauthenticated):
                await verify(token)

        part, costs = len(tokens) // 5, []
        for start in range(0, len(tokens), part):
            started = time.process_time()
            for first in range(start, start + part, 120):
                await asyncio.gather(*map(one, tokens[first : min(first + 120, start + part)]))
            costs.append((time.process_time() - started) / part)
        return min(costs)  # of five parts the one that others on this machine disturbed least

    return await all_of(verify) - await all_of(nothing)


@pytest.mark.usefixtures("no_brake")
async def test_a_known_and_an_unknown_id_are_refused_alike_and_in_the_same_time(
    gateway: Gateway, figure: Figure
) -> None:
    revoked = await gateway.new_key()
    parsed = parse_token(revoked)
    assert parsed is not None
    await gateway.app[appkeys.KEYS].revoke(parsed.id, None)
    makers: dict[str, Callable[[str], str]] = {**WRONG, "wrong secret, revoked": lambda _: other_secret(revoked)}
    del makers["mistyped"]  # whoever knows the form of a key knows that much
    times: dict[str, list[float]] = {name: [] for name in makers}
    answers = []
    async with aiohttp.ClientSession() as client:
        for _ in range(40):
            for name, make in makers.items():
                status, seconds, body = await ask(client, gateway, make(gateway.api_key))
                times[name].append(seconds)
                answers.append((status, str(body)))
        answers += [(status, str(body)) for status, _, body in [await ask(client, gateway, revoked)]]
    assert len(set(answers)) == 1
    assert answers[0][0] == 401
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    figure("P8 refused after " + ", ".join(f"{seconds * 1e3:.1f} ms ({name})" for name, seconds in medians.items()))
    # 20 ms, or on a machine that has no time for anything half of what each takes.
    assert max(medians.values()) - min(medians.values()) < max(0.02, min(medians.values()) / 2)


# --- the brake ----------------------------------------------------------------------------------------------------


async def test_after_twenty_failures_an_address_gets_429_for_failures_alone(gateway: Gateway) -> None:
    """A good key of the same office still passes, one that was never seen before too; on every route."""
    fresh = await gateway.new_key()
    async with aiohttp.ClientSession() as client:
        wrong = [await ask(client, gateway, make_token()) for _ in range(FAILURES_PER_MINUTE + 5)]
        assert Counter(status for status, _, _ in wrong) == {401: FAILURES_PER_MINUTE, 429: 5}
        assert wrong[-1][2]["error"]["code"] == "too_many_failures"
        for path in ("/v1/models", "/auth/keys", "/api/stats"):
            headers = {"Authorization": f"Bearer {make_token()}"}
            async with client.get(f"{gateway.root_url}{path}", headers=headers) as response:
                assert response.status == 429
                assert 0 < int(response.headers["Retry-After"]) <= 60
        assert [(await ask(client, gateway, token))[0] for token in (gateway.api_key, fresh)] == [200, 200]
        async with client.get(f"{gateway.base_url}/models") as response:
            assert response.status == 401  # nothing was guessed


async def test_keys_first_seen_beyond_the_queue_are_503_and_never_401(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 401 would have a client throw a good key away."""
    gate = Event()
    monkeypatch.setattr("gateway.stores.keys.KEY_HASHER", PasswordHasher(1, 8, 1))  # sixty are made first

    def slow(hasher: PasswordHasher, phc: str, token: str) -> bool:
        return gate.wait(60) and passwords.matches(hasher, phc, token)

    monkeypatch.setattr("gateway.stores.keys.matches", slow)
    async with running_gateway(database_url, redis_url) as gateway:
        tokens = [await gateway.new_key() for _ in range(60)]
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:

            async def status_of(token: str) -> tuple[int, str, str]:
                headers = {"Authorization": f"Bearer {token}"}
                async with client.get(f"{gateway.base_url}/models", headers=headers) as response:
                    code = "" if response.status == 200 else (await response.json())["error"]["code"]
                    return response.status, code, response.headers.get("Retry-After", "")

            first = [asyncio.create_task(status_of(token)) for token in tokens]
            room = passwords.MAX_WAITING + passwords.MAX_THREADS  # or fewer, where there are fewer cores
            refused: list[asyncio.Task[tuple[int, str, str]]] = []
            async with asyncio.timeout(30):
                while len(refused) < len(tokens) - room:
                    await asyncio.sleep(0.01)
                    refused = [task for task in first if task.done()]
            gate.set()
            answers = Counter(await asyncio.gather(*first))
            assert answers.keys() == {(200, "", ""), (503, "hashing_busy", "1")}
            assert answers[200, "", ""] <= room
            assert {await status_of(token) for token in tokens} == {(200, "", "")}


# --- who one is taken for -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_brake")
async def test_a_key_that_shares_all_but_one_character_with_a_known_one_is_nobodys(gateway: Gateway) -> None:
    """What is known is found by a digest of the whole key: by a part of it, one key would answer for another."""
    parsed = parse_token(gateway.api_key)
    assert parsed is not None
    others = []
    for at in (0, 20, 42):
        secret = parsed.secret[:at] + ("A" if parsed.secret[at] != "A" else "B") + parsed.secret[at + 1 :]
        others.append(join_token(parsed.id, secret))
    for at in (0, 11):
        key_id = parsed.id[:at] + ("A" if parsed.id[at] != "A" else "B") + parsed.id[at + 1 :]
        others.append(join_token(key_id, parsed.secret))
    others += [gateway.api_key + "x", gateway.api_key[:-1], gateway.api_key.swapcase()]
    async with aiohttp.ClientSession() as client:
        for token in (gateway.api_key, *others, gateway.api_key):
            status, _, _ = await ask(client, gateway, token)
            assert status == (200 if token == gateway.api_key else 401), token


# --- what is no key -----------------------------------------------------------------------------------------------

SHAPES = [
    b"aig_' OR '1'='1",
    b"aig_'; drop table keys; --",
    b'aig_") or sleep(9)#',
    b"aig_${jndi:ldap://x}{{7*7}}",
    b"aig_%00%27",
    b"aig_\xff\xfe\x80",
    "aig_é".encode() * 20,
    b"aig_" + b"_" * (TOKEN_LENGTH - 4),
    # With a checksum that fits, so that they get as far as they can.
    *(
        join_token(key_id, "x" * 43).encode()
        for key_id in ("' or 1=1 --", "'or'1'='1'--", "0' or 'a'='a", "$1::text[]  ", "\\x00\\x27\\x2", "%%%%%%%%%%%%")
    ),
    *(join_token("0" * 12, secret).encode() for secret in ("'" * 43, "') union select 1 from accounts where true ")),
    b"aig_" + b"a" * 5_000,
    b"aig_" + b"a" * 100_000,
    b"aig_" + b"a" * (1 << 20),
]


@pytest.mark.usefixtures("no_brake")
async def test_no_shape_of_a_key_is_more_than_a_wrong_one(gateway: Gateway) -> None:
    """No injection, no oversized token gets a 5xx, an answer that differs, or a change of the database."""
    pool = gateway.app[appkeys.POOL]
    before = await pool.fetch("select * from keys order by id"), await pool.fetch("select * from accounts")
    seen: Counter[str] = Counter()
    for shape in SHAPES:
        for header in (b"Authorization: Bearer ", b"X-API-Key: ", b"Authorization: "):
            seen[await raw_status(gateway, header + shape)] += 1
    assert seen.keys() <= {"400", "401", "431", "closed"}, seen
    assert seen["401"] >= 3 * (len(SHAPES) - 4)
    assert seen["closed"] <= 6  # what is read no further than its first kilobytes may be reset before it is answered
    after = await pool.fetch("select * from keys order by id"), await pool.fetch("select * from accounts")
    assert before == after
    async with aiohttp.ClientSession() as client:
        async with client.get(f"{gateway.root_url}/metrics") as response:
            bugs = [line for line in (await response.text()).splitlines() if line.startswith("gateway_internal_errors")]
        assert bugs
        assert all(line.endswith(" 0") for line in bugs), bugs
        assert (await ask(client, gateway, gateway.api_key))[0] == 200


async def raw_status(gateway: Gateway, header: bytes) -> str:
    """The status of a request whose header is sent as it is; `closed` when none came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.root_url.rsplit(":", 1)[1]))
    line = b""
    try:
        async with asyncio.timeout(20):
            with suppress(ConnectionError):
                writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + header + b"\r\n\r\n")
                line = await reader.readline()
    finally:
        writer.close()
    return line.split()[1].decode() if line else "closed"

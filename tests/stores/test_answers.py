"""Answers that are kept in Postgres, and the claims of clients' own keys."""

import asyncio
from collections.abc import Awaitable, Callable
from hashlib import sha256
from time import monotonic
from typing import Any, cast

import asyncpg
import orjson
import pytest

from gateway.exchange import new_id
from gateway.protocol.errors import Unavailable
from gateway.protocol.usage import Usage
from gateway.stores import answers as module
from gateway.stores.answers import ROW, Answers, Ended, Kept, fair_share
from gateway.stores.keeper import Keeper
from gateway.stores.postgres import Pool

pytestmark = pytest.mark.integration

AddAccount = Callable[[str], Awaitable[str]]
USAGE = Usage(12, 34, cached_tokens=5)


@pytest.fixture
def answers(pool: asyncpg.Pool) -> Answers:
    return Answers(pool, max_bytes=1 << 20)


@pytest.fixture
async def add_account(pool: asyncpg.Pool) -> AddAccount:
    async def add(name: str) -> str:
        account_id = new_id()
        insert = "insert into accounts (id, email, password_hash, role) values ($1, $2, 'x', 'member')"
        await pool.execute(insert, account_id, f"{name}@example.com")
        return account_id

    return add


@pytest.fixture
async def ada(add_account: AddAccount) -> str:
    return await add_account("ada")


def key(name: object) -> bytes:
    return sha256(str(name).encode()).digest()


def whole(name: object = "hello", *, finish: str = "stop") -> bytes:
    return orjson.dumps({"choices": [{"message": {"content": str(name)}, "finish_reason": finish}]})


def ended(account_id: str, name: object, **more: Any) -> Ended:
    """An answer to be kept. Of the arguments those that Kept has are Kept's."""
    kept: dict[str, Any] = {
        "exchange_id": new_id(),
        "status": 200,
        "provider": "openai",
        "model": "gpt-4o",
        "pieces": None,
    }
    kept |= {"whole": whole(name), "usage": USAGE}
    kept |= {name: more.pop(name) for name in list(more) if name in Kept._fields}
    now = monotonic()
    given: dict[str, Any] = {"kind": "cache", "ttl": 60, "begun": now, "ended": now, **more}
    return Ended(digest=key(name), account_id=account_id, kept=Kept(**kept), **given)


async def names(pool: asyncpg.Pool) -> set[bytes]:
    return {row["digest"] for row in await pool.fetch("select digest from answers")}


# --- the cache ----------------------------------------------------------------------------------------------------


async def test_a_whole_answer_comes_back_as_it_was_with_its_age(answers: Answers, ada: str) -> None:
    one = ended(ada, "a")
    await answers.keep([one])
    await asyncio.sleep(0.05)
    found = await answers.find(key("a"), 60)
    assert found is not None
    assert found._replace(age=0.0) == one.kept
    assert 0.05 <= found.age < 5
    assert await answers.find(key("b"), 60) is None


@pytest.mark.parametrize("size", [0, 1, 64, 3000])
async def test_a_stream_comes_back_piece_by_piece(answers: Answers, ada: str, size: int) -> None:
    pieces = [(number * 20, b"data: %d\n\n" % number * 40) for number in range(size)]
    await answers.keep([ended(ada, "a", pieces=pieces, whole=None, usage=None)])
    found = await answers.find(key("a"), 60)
    assert found is not None
    assert (found.pieces, found.whole, found.usage) == (pieces, None, None)


async def test_what_expired_or_is_too_old_is_not_found(answers: Answers, pool: asyncpg.Pool, ada: str) -> None:
    await answers.keep([ended(ada, "expired", ttl=0.01), ended(ada, "old")])
    await pool.execute("update answers set kept_at = now() - interval '30 s' where digest = $1", key("old"))
    await asyncio.sleep(0.02)
    assert await answers.find(key("expired"), 60) is None
    assert await answers.find(key("old"), 29) is None
    assert await answers.find(key("old"), 31) is not None


async def test_the_newest_of_two_answers_is_kept(answers: Answers, ada: str) -> None:
    await answers.keep([ended(ada, "a", whole=whole("first"))])
    await answers.keep([ended(ada, "a", whole=whole("second"))])
    found = await answers.find(key("a"), 60)
    assert found is not None
    assert found.whole == whole("second")


async def test_a_database_that_does_not_answer_costs_a_quarter_of_a_second_once(
    answers: Answers, pool: asyncpg.Pool, ada: str
) -> None:
    await answers.keep([ended(ada, "a")])
    async with pool.acquire() as other, other.transaction():
        await other.execute("lock table answers in access exclusive mode")
        began = monotonic()
        with pytest.raises(Unavailable):
            await answers.find(key("a"), 60)
        assert await answers.find(key("a"), 60) is None, "it is not asked again so soon"
        assert monotonic() - began < 2 * (module.FIND_ACQUIRE + module.FIND_COMMAND)


async def test_look_ups_wait_for_one_another_and_when_one_fails_no_more_for_postgres(pool: asyncpg.Pool) -> None:
    class Slow:
        def __init__(self) -> None:
            self.open = self.most = 0

        async def acquire(self, timeout: float) -> Any:
            self.open += 1
            self.most = max(self.most, self.open)
            await asyncio.sleep(timeout)
            self.open -= 1
            raise TimeoutError

    slow = Slow()
    answers = Answers(cast(Pool, slow), max_bytes=1)
    found = await asyncio.gather(*(answers.find(key(n), 60) for n in range(20)), return_exceptions=True)
    assert [type(one) for one in found if one is not None] == [Unavailable] * module.MAX_LOOKUPS
    assert slow.most == module.MAX_LOOKUPS


async def test_what_an_account_has_emptied_does_not_come_back(
    answers: Answers, pool: asyncpg.Pool, ada: str, add_account: AddAccount
) -> None:
    bob = await add_account("bob")
    begun = monotonic()
    await answers.keep([ended(ada, f"a{n}") for n in range(3)] + [ended(bob, "b")])
    await answers.keep([ended(ada, "promised", kind="idempotency")])
    assert await answers.clear(ada) == 3
    assert await names(pool) == {key("b"), key("promised")}
    await answers.keep([ended(ada, "begun before", begun=begun), ended(bob, "begun before, too", begun=begun)])
    assert await answers.find(key("begun before"), 60) is None
    assert await answers.find(key("begun before, too"), 60) is not None
    await answers.keep([ended(ada, "begun after")])
    assert await answers.find(key("begun after"), 60) is not None
    assert await answers.clear(None) == 3


async def test_emptying_waits_for_who_is_keeping(
    answers: Answers, pool: asyncpg.Pool, ada: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer whose transaction is open when the cache is emptied is gone when that is done."""
    slowly = module._KEEP.replace("from accounts a", "from accounts a, pg_sleep(0.3)")
    monkeypatch.setattr(module, "_KEEP", slowly)
    keeping = asyncio.create_task(answers.keep([ended(ada, "a")]))
    await asyncio.sleep(0.1)
    assert await answers.clear(ada) == 1
    await keeping
    assert await names(pool) == set()


async def test_two_who_keep_the_same_answers_at_once_do_not_meet(
    answers: Answers, pool: asyncpg.Pool, ada: str
) -> None:
    batches = [[ended(ada, n) for n in order] for order in (range(30), reversed(range(30)))]
    await asyncio.gather(*(answers.keep(batch) for batch in batches for _ in range(5)))
    assert await names(pool) == {key(n) for n in range(30)}


async def test_an_account_that_is_gone_keeps_nothing(answers: Answers, pool: asyncpg.Pool) -> None:
    await answers.keep([ended(new_id(), "a")])
    assert await names(pool) == set()


# --- bounds -------------------------------------------------------------------------------------------------------


async def test_a_sweep_deletes_what_expired_batch_by_batch(answers: Answers, pool: asyncpg.Pool, ada: str) -> None:
    many = module.BATCH * 2 + 3
    await answers.keep([ended(ada, n, ttl=0.01) for n in range(many)] + [ended(ada, "stays")])
    await asyncio.sleep(0.02)
    assert await answers.sweep()
    assert await names(pool) == {key("stays")}


async def test_one_process_sweeps_at_a_time(answers: Answers, pool: asyncpg.Pool) -> None:
    async with pool.acquire() as other:
        await other.execute(module._LOCK.replace("_xact", ""), module._SWEEPING)
        assert not await answers.sweep()
    assert await answers.sweep()
    assert await answers.sweep(), "the lock is given back"


async def test_beyond_the_bound_the_oldest_go_first_and_a_small_account_loses_nothing(
    pool: asyncpg.Pool, ada: str, add_account: AddAccount
) -> None:
    bob, eve = await add_account("bob"), await add_account("eve")
    of = {name: await add_account(name) for name in ("small",)} | {"ada": ada, "bob": bob, "eve": eve}
    counts = {"small": 3, "ada": 20, "bob": 200, "eve": 500}
    for name, count in counts.items():
        for n in range(count):
            await pool.execute(
                """insert into answers (kind, digest, account_id, exchange_id, status, size, kept_at, expires_at)
                values ('cache', $1, $2, $3, 200, 1000, now() - make_interval(secs => $4), now() + interval '1 day')""",
                key((name, n)), of[name], new_id(), 1000.0 - n,
            )  # fmt: skip
    answers = Answers(pool, max_bytes=160_000)
    await answers.sweep()
    left = {name: [n for n in range(count) if key((name, n)) in await names(pool)] for name, count in counts.items()}
    assert [len(left[name]) for name in ("small", "ada")] == [3, 20]
    assert sum(map(len, left.values())) <= 150
    assert abs(len(left["bob"]) - len(left["eve"])) <= 1, "who has more than a fair share has as much as the next"
    assert left["eve"] == list(range(500 - len(left["eve"]), 500)), "the oldest have gone"
    before = await names(pool)
    await answers.sweep()
    assert await names(pool) == before


async def test_sweeps_come_by_themselves_and_sooner_when_much_was_written(
    answers: Answers, pool: asyncpg.Pool, ada: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.stores.keeper.RENEW", 0.02)
    async with Written(answers, max_bytes=32 * ROW) as written:
        sweeping = asyncio.create_task(written.keeper.sweep())
        await answers.keep([ended(ada, "expired", ttl=0.01)])
        await asyncio.sleep(0.2)
        assert await names(pool) == {key("expired")}
        for n in range(5):
            written.keeper.keep(ended(ada, n), "chat")
        async with asyncio.timeout(5):
            while key("expired") in await names(pool):
                await asyncio.sleep(0.02)
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)


async def test_a_promise_goes_after_all_that_is_only_a_saving(pool: asyncpg.Pool, ada: str) -> None:
    answers = Answers(pool, max_bytes=10 * (ROW + 100))
    await answers.keep([ended(ada, f"promised {n}", kind="idempotency") for n in range(5)])
    await asyncio.sleep(0.01)
    await answers.keep([ended(ada, n) for n in range(20)])
    await answers.sweep()
    left = await names(pool)
    assert {key(f"promised {n}") for n in range(5)} <= left
    assert len(left) < 12


@pytest.mark.parametrize(
    ("sizes", "room", "share"),
    [([5, 5], 100, 95), ([100], 60, 60), ([1, 100, 100], 61, 30), ([10, 20, 300, 400], 130, 50), ([0, 0, 9], 3, 3)],
)
def test_nobody_gets_less_so_that_another_has_more(sizes: list[int], room: int, share: int) -> None:
    assert fair_share(sizes, room) == share


# --- claims -------------------------------------------------------------------------------------------------------


async def test_of_many_who_claim_a_key_one_gets_it(answers: Answers, ada: str) -> None:
    claims = [answers.claim(key("k"), ada, b"body", new_id()) for _ in range(8)]
    found = await asyncio.gather(*claims)
    assert sorted(one is None for one in found) == [False] * 7 + [True]
    assert all(one.asked == b"body" and one.kept is None for one in found if one is not None)


async def test_a_claim_is_free_when_its_lease_is_over_unless_it_is_renewed(
    answers: Answers, pool: asyncpg.Pool, ada: str
) -> None:
    mine = new_id()
    assert await answers.claim(key("k"), ada, b"1", mine) is None
    await pool.execute("update answers set expires_at = now() + interval '0.2 s'")
    await answers.renew([(key("k"), mine), (key("other"), mine)])
    await asyncio.sleep(0.25)
    assert await answers.claim(key("k"), ada, b"2", new_id()) is not None
    await pool.execute("update answers set expires_at = now()")
    assert await answers.claim(key("k"), ada, b"2", new_id()) is None
    await answers.renew([(key("k"), mine)])
    await answers.free([(key("k"), mine)])
    again = await answers.claim(key("k"), ada, b"3", new_id())
    assert again is not None, "who lost it does not free it"
    assert again.asked == b"2"


async def test_a_kept_answer_takes_its_claims_place_and_no_others(
    answers: Answers, pool: asyncpg.Pool, ada: str
) -> None:
    mine, other = new_id(), new_id()
    assert await answers.claim(key("k"), ada, b"1", mine) is None
    late = ended(ada, "k", kind="idempotency", exchange_id=other, asked=b"1")
    await answers.keep([late])
    held = await answers.claim(key("k"), ada, b"1", other)
    assert held is not None
    assert held.kept is None, "another's answer is not this claim's"
    await answers.keep([ended(ada, "k", kind="idempotency", exchange_id=mine, asked=b"1", status=400, ttl=60)])
    held = await answers.claim(key("k"), ada, b"1", other)
    assert held is not None
    assert held.kept is not None
    assert (held.kept.status, held.kept.exchange_id) == (400, mine)
    await answers.free([(key("k"), mine)])
    assert await names(pool) == {key("k")}, "what is kept is no claim any more"


# --- the writer ---------------------------------------------------------------------------------------------------


class Written:
    """A keeper that runs, and what it counts."""

    def __init__(self, answers: Answers, **bounds: int) -> None:
        self.results: list[str] = []
        given: dict[str, Any] = {"max_answer": 10_000, "max_bytes": 1 << 20, **bounds}
        self.keeper = Keeper(answers, on_result=self.results.append, **given)

    async def __aenter__(self) -> "Written":
        self._task = asyncio.create_task(self.keeper.run())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.keeper.close(5)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def test_the_writer_keeps_what_is_worth_it_and_counts_the_rest(
    answers: Answers, pool: asyncpg.Pool, ada: str
) -> None:
    chunk = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":%s}]}\n\n'
    async with Written(answers) as written:
        keep = written.keeper.keep
        assert keep(ended(ada, "good"), "chat")
        assert keep(ended(ada, "cut", whole=whole(finish="length")), "chat")
        assert keep(ended(ada, "vector", whole=b'{"data":[]}'), "embedding")
        streamed = [(0, chunk % b"null"), (5, chunk % b'"stop"'), (6, b"data: [DONE]\n\n")]
        assert keep(ended(ada, "streamed", pieces=streamed, whole=None), "chat")
        assert keep(ended(ada, "cut stream", pieces=streamed[:1], whole=None), "chat")
        assert keep(ended(ada, "promised", kind="idempotency", whole=whole(finish="length")), "chat")
        assert not keep(ended(ada, "large", whole=b"x" * 10_001), "chat")
    assert await names(pool) == {key(name) for name in ("good", "vector", "streamed", "promised")}
    assert sorted(written.results) == ["kept"] * 4 + ["too_large"] + ["unfit"] * 2


async def test_a_full_queue_keeps_no_more_and_nobody_waits(
    answers: Answers, ada: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.stores.keeper.MAX_ENTRIES", 3)
    monkeypatch.setattr("gateway.stores.keeper.MAX_QUEUED", 5 * ROW)
    written = Written(answers)
    assert [written.keeper.keep(ended(ada, n), "chat") for n in range(4)] == [True, True, True, False]
    large = Written(answers)
    assert [large.keeper.keep(ended(ada, n, whole=b"x" * 3 * ROW), "chat") for n in range(2)] == [True, False]
    assert written.results == large.results == ["full"]


async def test_an_answer_that_no_column_holds_takes_no_other_along(
    answers: Answers, pool: asyncpg.Pool, ada: str
) -> None:
    async with Written(answers) as written:
        for name, model in (("a", "m"), ("b", "no\0model"), ("c", "m")):
            written.keeper.keep(ended(ada, name, model=model), "chat")
    assert await names(pool) == {key("a"), key("c")}
    assert sorted(written.results) == ["failed", "kept", "kept"]


async def test_while_postgres_is_gone_the_cache_does_without_and_a_promise_is_tried_again(
    answers: Answers, pool: asyncpg.Pool, ada: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.stores.keeper.PAUSE", 0.05)
    keep, gone = answers.keep, [True]

    async def failing(ended: Any) -> int:
        if gone[0]:
            raise Unavailable("gone")
        return await keep(ended)

    monkeypatch.setattr(answers, "keep", failing)
    async with Written(answers) as written:
        written.keeper.keep(ended(ada, "a"), "chat")
        written.keeper.keep(ended(ada, "promised", kind="idempotency"), "chat")
        await asyncio.sleep(0.2)
        gone[0] = False
    assert await names(pool) == {key("promised")}
    assert written.results == ["failed", "kept"]

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from gateway.exchange import Principal, new_id
from gateway.stores import grants as grants_module
from gateway.stores import script
from gateway.stores.grants import UNLIMITED, Admission, Buckets, Grants, SlidingWindow
from gateway.stores.limits import Limiter
from gateway.stores.script import Operation, RedisScript, connect_redis
from tests.support.valkey import Valkey, valkey

pytestmark = pytest.mark.integration

REQUESTS, LEASES, ALL = "aig:limits:requests:key", "aig:limits:leases:key", "aig:limits:requests"
ROOT = Path(__file__).parents[2]


def principal(
    requests_per_minute: int = 0, concurrent_requests: int = 0, key_id: str = "key", **limits: Any
) -> Principal:
    return Principal(
        key_id,
        "aig_key",
        "name",
        "account",
        "member",
        requests_per_minute=requests_per_minute,
        concurrent_requests=concurrent_requests,
        **limits,
    )


@asynccontextmanager
async def limiter(url: str, *, loses_redis: bool = False, **options: Any) -> AsyncIterator[Limiter]:
    """A limiter as the gateway runs it. One that went on without Redis unnoticed would prove nothing."""
    failures: list[str] = []
    of_script = {name: options.pop(name) for name in ("lease", "clock", "on_error") if name in options}
    async with connect_redis(url) as client:
        script = RedisScript(client, **{"on_error": failures.append, **of_script})
        limiter = Limiter(script, **options)
        task = asyncio.create_task(script.run())
        try:
            yield limiter
            assert not task.done(), task
            assert loses_redis or not failures, failures
        finally:
            await limiter.close()
            await script.close()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def admit(limiter: Limiter, who: Principal, times: int) -> list[Admission]:
    return [await limiter.admit(who, new_id()) for _ in range(times)]


def granted(admissions: list[Admission]) -> int:
    return sum(admission.granted for admission in admissions)


async def until(claim: Callable[[], Awaitable[bool] | bool], seconds: float = 10.0) -> float:
    """How long it took to become true."""
    started = time.monotonic()
    while True:
        answer = claim()
        if answer is True or (not isinstance(answer, bool) and await answer):
            return time.monotonic() - started
        assert time.monotonic() - started < seconds, f"not true after {seconds} s"
        await asyncio.sleep(0.005)


async def command(redis: Any, words: str) -> Any:
    """For what redis-py types loosely, or not at all."""
    return await redis.execute_command(*words.split())


async def members(redis: Redis, name: str) -> list[str]:
    return [member.decode() for member in await command(redis, f"ZRANGE {name} 0 -1")]


@pytest.fixture
def server() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what happens after Redis is back, not of when."""
    monkeypatch.setattr(script, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(script, "LONGEST_PAUSE", 0.05)


# --- requests per minute ------------------------------------------------------------------------------------------


async def test_at_the_limit_exactly_the_limit_passes_through_two_limiters(redis_url: str) -> None:
    who = principal(requests_per_minute=50)
    async with limiter(redis_url) as one, limiter(redis_url) as other:
        racing = [limiter.admit(who, new_id()) for _ in range(100) for limiter in (one, other)]
        assert granted(await asyncio.gather(*racing)) == 50


async def test_nodes_whose_clocks_are_hours_apart_share_one_window_because_it_is_that_of_redis(redis_url: str) -> None:
    """The hour is that of each node alone: Redis reads its own clock, in the script (TIME)."""
    who = principal(requests_per_minute=50, concurrent_requests=100, requests_per_second=100, burst=60)
    clocks = [lambda: time.monotonic() + 3600, lambda: time.monotonic() - 3600]
    async with limiter(redis_url, clock=clocks[0]) as ahead, limiter(redis_url, clock=clocks[1]) as behind:
        racing = [limiter.admit(who, new_id()) for _ in range(100) for limiter in (ahead, behind)]
        assert granted(await asyncio.gather(*racing)) == 50
        assert not (await behind.admit(who, new_id())).granted


PROCESS = """
import asyncio, sys
from gateway.exchange import Principal, new_id
from gateway.stores.limits import Limiter
from gateway.stores.script import RedisScript, connect_redis

async def race(limiter, who):
    total = 0
    for _ in range(25):
        total += sum([a.granted for a in await asyncio.gather(*(limiter.admit(who, new_id()) for _ in range(4)))])
    return total

async def hold(limiter, who, redis):
    most = 0
    async def request():
        nonlocal most
        for _ in range(25):
            id = new_id()
            if (await limiter.admit(who, id)).granted:
                most = max(most, await redis.incr("in flight"))
                await redis.decr("in flight")
                limiter.release(who, id)
    await asyncio.gather(*(request() for _ in range(8)))
    return most

async def main(url, what, limit):
    async with connect_redis(url) as redis:
        script = RedisScript(redis, lease=1.0)
        limiter = Limiter(script)
        task = asyncio.create_task(script.run())
        rate = Principal("key", "", "", "", "member", requests_per_minute=limit)
        slots = Principal("key", "", "", "", "member", concurrent_requests=limit)
        await redis.ping()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        if what == "race":
            print(await race(limiter, rate))
        elif what == "hold":
            print(await hold(limiter, slots, redis))
        else:
            print([(await limiter.admit(slots, new_id())).granted for _ in range(limit)], flush=True)
            await asyncio.Event().wait()
        assert limiter.state == "redis"
        await limiter.close()
        await script.close()
        task.cancel()

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


@asynccontextmanager
async def processes(url: str, what: str, limit: int, number: int) -> AsyncIterator[list[asyncio.subprocess.Process]]:
    """Gateways' limiters in processes of their own, all let go in the same moment."""
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-c", PROCESS, url, what, str(limit)]
    running = [await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=pipe, stdout=pipe) for _ in range(number)]
    try:
        assert [b"ready\n"] * number == [await line(process) for process in running]
        for process in running:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
        yield running
    finally:
        for process in running:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def line(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    return await asyncio.wait_for(process.stdout.readline(), 20)


async def test_at_the_limit_exactly_the_limit_passes_through_two_processes(redis_url: str) -> None:
    async with processes(redis_url, "race", 50, 2) as running:
        assert sum([int(await line(process)) for process in running]) == 50


async def test_the_window_slides(redis_url: str, redis: Redis) -> None:
    """A fixed window would begin again as a whole, and let the limit pass twice around its edge."""
    who = principal(requests_per_minute=3)
    async with limiter(redis_url) as first:
        assert granted(await admit(first, who, 3)) == 3
    old, middle, _ = await members(redis, REQUESTS)
    await redis.zincrby(REQUESTS, -60e6, old)
    await redis.zincrby(REQUESTS, -40e6, middle)
    async with limiter(redis_url) as second:
        assert [admission.granted for admission in await admit(second, who, 3)] == [True, False, False]
    async with limiter(redis_url) as third:
        refusal = await third.admit(who, new_id())
    assert refusal.retry_after == 20  # then the middle one leaves
    assert 59 < refusal.reset_after <= 60  # then the last one does


async def test_a_request_leaves_the_window_after_its_length_and_not_before(redis_url: str) -> None:
    who = principal(requests_per_minute=1)
    async with limiter(redis_url, window=0.5) as limiter_:
        started = time.monotonic()
        assert granted(await admit(limiter_, who, 1)) == 1
        answered = time.monotonic()

        async def passes() -> bool:
            return (await limiter_.admit(who, new_id())).granted

        await until(passes)
        assert time.monotonic() - started >= 0.5
        assert time.monotonic() - answered < 1.5


async def test_a_refused_request_records_nothing(redis_url: str, redis: Redis) -> None:
    who = principal(requests_per_minute=10, concurrent_requests=1)
    async with limiter(redis_url, global_per_minute=10) as one, limiter(redis_url, global_per_minute=10) as other:
        assert granted(await admit(one, who, 1)) == 1
        assert granted(await admit(other, who, 5)) == 0
        assert [await redis.zcard(name) for name in (REQUESTS, LEASES, ALL)] == [1, 1, 1]


async def test_an_answer_says_how_much_is_left_and_when_to_come_back(redis_url: str) -> None:
    who = principal(requests_per_minute=2)
    async with limiter(redis_url) as one, limiter(redis_url) as other:
        first, second = await one.admit(who, new_id()), await other.admit(who, new_id())
        assert (first.granted, first.reason, first.limit, first.remaining, first.retry_after) == (True, "", 2, 1, 0)
        assert (second.granted, second.reason, 2, second.remaining, second.reset_after) == (True, "", 2, 0, 60.0)
        for limiter_ in (one, other):
            third = await limiter_.admit(who, new_id())
            assert (*third[:4], third.local) == (False, "requests_per_minute", 2, 0, False)
            assert 59 <= third.retry_after <= 60
            assert 59 < third.reset_after <= 60


async def test_a_limit_that_was_lowered_counts_what_passed_before(redis_url: str) -> None:
    async with limiter(redis_url) as one, limiter(redis_url) as other:
        assert granted(await admit(one, principal(requests_per_minute=5), 5)) == 5
        assert granted(await admit(one, principal(requests_per_minute=3), 1)) == 0
        assert granted(await admit(other, principal(requests_per_minute=3), 1)) == 0
        assert granted(await admit(other, principal(requests_per_minute=6), 2)) == 1


async def test_keys_do_not_share_their_limits(redis_url: str) -> None:
    async with limiter(redis_url) as limiter_:
        for key_id in ("a", "b"):
            assert granted(await admit(limiter_, principal(requests_per_minute=2, key_id=key_id), 3)) == 2


async def test_a_key_far_over_its_limit_costs_no_round_trip(server: Valkey) -> None:
    who = principal(requests_per_minute=2)
    async with limiter(server.url) as limiter_, connect_redis(server.url) as redis:
        await admit(limiter_, who, 3)
        await redis.config_resetstat()
        assert granted(await admit(limiter_, who, 100)) == 0
        assert await calls(redis) == 0


@pytest.mark.haste
async def test_where_our_clock_and_that_of_redis_may_disagree_redis_decides(redis_url: str, redis: Redis) -> None:
    """We count a request from when it was asked, Redis from when it was granted."""
    now = 1000.0
    who = principal(requests_per_minute=1)
    async with limiter(redis_url, clock=lambda: now) as limiter_:
        assert granted(await admit(limiter_, who, 1)) == 1
        await redis.delete(REQUESTS)
        now += 60 - 2 * script.TIMEOUT
        assert not (await limiter_.admit(who, new_id())).granted
        now += 1.5 * script.TIMEOUT
        assert (await limiter_.admit(who, new_id())).granted


async def test_what_redis_keeps_ends_by_itself(redis_url: str, redis: Redis) -> None:
    async with limiter(redis_url, global_per_minute=10) as limiter_:
        await limiter_.admit(principal(10, 10), new_id())
        for name, seconds in ((REQUESTS, 60), (ALL, 60), (LEASES, 30)):
            assert (seconds - 10) * 1000 < await redis.pttl(name) <= seconds * 1000


async def test_a_redis_whose_clock_was_set_back_locks_nobody_out(redis_url: str, redis: Redis) -> None:
    who = principal(requests_per_minute=1, concurrent_requests=1)
    an_hour_ahead = int((time.time() + 3600) * 1e6)
    await redis.zadd(REQUESTS, {"earlier": an_hour_ahead})
    await redis.zadd(LEASES, {"earlier": an_hour_ahead})
    async with limiter(redis_url) as limiter_:
        assert granted(await admit(limiter_, who, 1)) == 1


# --- all keys together, and none ----------------------------------------------------------------------------------


async def test_the_global_limit_counts_all_keys(redis_url: str) -> None:
    keys = [principal(key_id=key_id) for key_id in "abc"]
    async with limiter(redis_url, global_per_minute=5) as one, limiter(redis_url, global_per_minute=5) as other:
        racing = [limiter.admit(who, new_id()) for who in keys for _ in range(4) for limiter in (one, other)]
        answers = await asyncio.gather(*racing)
    assert granted(answers) == 5
    refusals = [answer for answer in answers if not answer.granted]
    assert {("global_requests_per_minute", 5)} == {(refusal.reason, refusal.limit) for refusal in refusals}
    assert {60} == {refusal.retry_after for refusal in refusals}


async def test_a_limit_of_zero_is_no_limit_and_asks_nobody(server: Valkey) -> None:
    server.signal(signal.SIGSTOP)
    async with connect_redis(server.url) as redis:
        limiter_ = Limiter(RedisScript(redis), on_redis_down="closed")
        assert await admit(limiter_, principal(), 200) == [UNLIMITED] * 200
        limiter_.release(principal(), new_id())
        assert limiter_.state == "redis"


async def test_one_limit_of_zero_leaves_the_other_in_force(redis_url: str) -> None:
    async with limiter(redis_url) as limiter_:
        slots = await admit(limiter_, principal(concurrent_requests=2, key_id="slots"), 3)
        assert [admission.reason for admission in slots] == ["", "", "concurrent_requests"]
        rates = await admit(limiter_, principal(requests_per_minute=2, key_id="rates"), 3)
        assert [admission.reason for admission in rates] == ["", "", "requests_per_minute"]


# --- requests per second ------------------------------------------------------------------------------------------

RATE, ROUTE_RATE = "aig:limits:rate:k:key", "aig:limits:rate:r:/v1/x"


async def test_a_bucket_grants_its_burst_at_once_and_then_its_rate(redis_url: str) -> None:
    who = principal(requests_per_second=4.0, burst=3)
    async with limiter(redis_url) as limiter_:
        started = time.monotonic()
        answers = [await limiter_.admit(who, new_id()) for _ in range(4)]
        assert [answer.granted for answer in answers] == [True] * 3 + [False]
        refusal = answers[-1]
        assert (refusal.reason, refusal.limit, refusal.remaining, refusal.retry_after) == (
            "requests_per_second",
            3,
            0,
            1,
        )
        assert 0.5 < refusal.reset_after <= 0.75  # then it is full again

        passed = 3

        async def six_have_passed() -> bool:
            nonlocal passed
            passed += (await limiter_.admit(who, new_id())).granted
            return passed == 6

        await until(six_have_passed)
        assert 0.75 <= time.monotonic() - started < 1.75


async def test_a_burst_passes_exactly_through_two_limiters(redis_url: str) -> None:
    who = principal(requests_per_second=0.01, burst=50)
    async with limiter(redis_url) as one, limiter(redis_url) as other:
        racing = [limiter.admit(who, new_id()) for _ in range(100) for limiter in (one, other)]
        assert granted(await asyncio.gather(*racing)) == 50
        assert 95 < (await one.admit(who, new_id())).retry_after <= 100


async def test_a_rate_without_a_burst_lets_one_pass(redis_url: str) -> None:
    async with limiter(redis_url) as limiter_:
        assert granted(await admit(limiter_, principal(requests_per_second=0.1), 3)) == 1


async def test_a_route_has_a_bucket_of_all_keys(redis_url: str) -> None:
    rates = {"/v1/x": (0.01, 5)}
    keys = [principal(key_id=key_id) for key_id in "abc"]
    async with limiter(redis_url, rates=rates) as one, limiter(redis_url, rates=rates) as other:
        racing = [limiter.admit(who, new_id(), "/v1/x") for who in keys for _ in range(4) for limiter in (one, other)]
        answers = await asyncio.gather(*racing)
        assert granted(answers) == 5
        refusals = [answer for answer in answers if not answer.granted]
        assert {("route_requests_per_second", 5)} == {(refusal.reason, refusal.limit) for refusal in refusals}
        assert await one.admit(keys[0], new_id(), "/v1/y") == UNLIMITED


async def test_a_refusal_by_one_limit_takes_nothing_from_the_others(redis_url: str, redis: Redis) -> None:
    key = principal(requests_per_minute=2, concurrent_requests=9, requests_per_second=0.01, burst=3)
    async with limiter(redis_url, rates={"/v1/x": (0.01, 2)}) as one:
        answers = [await one.admit(key, new_id(), "/v1/x") for _ in range(2)]
        assert granted(answers) == 2
    taken = [await redis.get(name) for name in (RATE, ROUTE_RATE)]
    async with limiter(redis_url, rates={"/v1/x": (0.01, 2)}) as other:
        wider = principal(requests_per_minute=9, concurrent_requests=9, requests_per_second=0.01, burst=3)
        assert (await other.admit(wider, new_id(), "/v1/x")).reason == "route_requests_per_second"
        assert (await other.admit(key, new_id(), "/v1/y")).reason == "requests_per_minute"
        assert [await redis.get(name) for name in (RATE, ROUTE_RATE)] == taken
        assert await redis.zcard(REQUESTS) == 2
        assert (await other.admit(wider, new_id(), "/v1/y")).granted
        assert (await other.admit(wider, new_id(), "/v1/y")).reason == "requests_per_second"
        assert await redis.zcard(REQUESTS) == 3


async def test_a_bucket_ends_when_it_is_full_and_survives_a_clock_that_was_set_back(
    redis_url: str, redis: Redis
) -> None:
    who = principal(requests_per_second=0.1, burst=5)
    await redis.set(RATE, str(int((time.time() + 3600) * 1e6)))
    async with limiter(redis_url) as limiter_:
        assert granted(await admit(limiter_, who, 2)) == 2
        assert 19_000 < await redis.pttl(RATE) <= 20_000


async def test_without_redis_each_node_grants_its_share_of_a_bucket(server: Valkey) -> None:
    server.kill()
    now = 1000.0
    key = principal(requests_per_second=2.0, burst=8)
    async with limiter(server.url, loses_redis=True, nodes=2, rates={"/v1/x": (0.1, 4)}, clock=lambda: now) as limiter_:
        await until(lambda: limiter_.state == "local")
        assert granted(await admit(limiter_, key, 10)) == 4
        now += 1
        refusals = [answer for answer in await admit(limiter_, key, 2) if not answer.granted]
        assert [(refusal.reason, refusal.retry_after, refusal.local) for refusal in refusals] == [
            ("requests_per_second", 1, True)
        ]
        answers = [await limiter_.admit(principal(key_id="other"), new_id(), "/v1/x") for _ in range(4)]
        assert [answer.reason for answer in answers] == ["", "", *["route_requests_per_second"] * 2]
        assert answers[-1].retry_after == 20


# --- concurrent requests ------------------------------------------------------------------------------------------


async def test_all_of_one_round_trip_is_counted_and_expires_as_if_it_came_alone(redis_url: str, redis: Redis) -> None:
    class Asked(Operation):
        def __init__(self, text: str) -> None:
            self.text, self.answer = text, ""

        def line(self) -> str:
            return self.text

        def answered(self, answer: str) -> None:
            self.answer = answer

    limits = "key 60000000 30000000 4 1 0 0 1 - 0 1"
    operations = [
        Asked(text)
        for text in (
            f"admit a {limits}",
            f"admit b {limits}",
            "release key a",  # the key of the leases is gone
            "release key a",
            f"admit c other{limits.removeprefix('key')}",
            f"admit d {limits}",
            "renew key d 30000000",
            f"admit e {limits}",
            "release key d",
            "settle f 1 1",  # of budgets.lua
            f"admit g {limits}",
            "release key g",
            f"admit h {limits}",
            "release key h",
            f"admit i {limits}",
        )
    ]
    async with connect_redis(redis_url) as client:
        script = RedisScript(client)
        for operation in operations:
            script.send(operation)
        await script.heard()
        await script.close()
    assert [o.answer.split()[:2] for o in operations if o.text.startswith("admit") and " key " in o.text] == [
        ["0", "3"], ["2", "0"], ["0", "2"], ["2", "0"], ["0", "1"], ["0", "0"], ["1", "60000000"],
    ]  # fmt: skip
    assert operations[4].answer == "0 3"
    assert await redis.zcard(REQUESTS) == 4 and await redis.exists(LEASES) == 0
    assert 59_000 < await redis.pttl(REQUESTS) <= 60_000


async def test_leases_that_were_all_released_and_granted_anew_in_one_round_trip_expire(
    redis_url: str, redis: Redis
) -> None:
    async with limiter(redis_url) as one:
        who = principal(concurrent_requests=1)
        assert (await one.admit(who, "first")).granted
        one.release(who, "first")
        assert (await one.admit(who, "second")).granted  # shares the round trip
        assert await redis.zrange(LEASES, 0, -1) == [b"second"]
        assert 29_000 < await redis.pttl(LEASES) <= 30_000


async def test_a_slot_is_free_again_when_it_is_released(redis_url: str) -> None:
    who = principal(concurrent_requests=2)
    async with limiter(redis_url) as one, limiter(redis_url) as other:
        assert (await one.admit(who, "a")).granted
        assert (await other.admit(who, "b")).granted
        refusals = [await one.admit(who, "c"), await other.admit(who, "c")]
        assert {(False, "concurrent_requests", 2, 0, 1, 1, False)} == set(refusals)
        one.release(who, "a")
        assert (await one.admit(who, "c")).granted  # what one process releases and then asks arrives in that order
        assert not (await other.admit(who, "d")).granted


async def test_a_release_counts_once_and_only_for_what_was_granted(redis_url: str, redis: Redis) -> None:
    who = principal(concurrent_requests=1)
    async with limiter(redis_url) as one, limiter(redis_url) as other:
        assert (await one.admit(who, "a")).granted
        assert not (await other.admit(who, "b")).granted
        other.release(who, "b")
        other.release(who, "a")  # not its own
        assert not (await other.admit(who, "c")).granted
        one.release(who, "a")
        assert (await one.admit(who, "d")).granted
        one.release(who, "a")
        assert not (await one.admit(who, "e")).granted


async def test_two_processes_never_hold_more_slots_than_there_are(redis_url: str) -> None:
    async with processes(redis_url, "hold", 5, 2) as running:
        most = [int(await line(process)) for process in running]
    assert 1 <= max(most) <= 5


async def test_a_killed_process_frees_its_slots_when_its_leases_end(redis_url: str, redis: Redis) -> None:
    who = principal(concurrent_requests=3)
    async with processes(redis_url, "die", 3, 1) as running, limiter(redis_url) as survivor:
        assert await line(running[0]) == b"[True, True, True]\n"
        running[0].kill()
        await running[0].wait()
        assert not (await survivor.admit(who, new_id())).granted

        passed = 0

        async def all_pass() -> bool:
            nonlocal passed
            passed += granted(await admit(survivor, who, 1))
            return passed == 3

        assert await until(all_pass) < 2  # a lease of 1 s
        assert not (await survivor.admit(who, new_id())).granted


async def test_a_lease_is_renewed_while_its_request_lives(redis_url: str, redis: Redis) -> None:
    """More of them than one round trip renews."""
    who = principal(concurrent_requests=250)
    async with limiter(redis_url, lease=2.0) as holder, limiter(redis_url) as other:
        assert granted(await asyncio.gather(*(holder.admit(who, new_id()) for _ in range(250)))) == 250
        ends = await redis.zscore(LEASES, (await members(redis, LEASES))[-1])

        async def all_were_renewed() -> bool:
            return await redis.zcount(LEASES, f"({ends}", "+inf") == 250

        assert await until(all_were_renewed) < 2
        assert not (await other.admit(who, new_id())).granted


async def test_closing_gives_back_what_is_held(redis_url: str, redis: Redis) -> None:
    async with limiter(redis_url) as limiter_:
        await admit(limiter_, principal(concurrent_requests=3), 3)
        assert await redis.zcard(LEASES) == 3
        await limiter_.close()
        await limiter_._script.heard()
        assert await redis.zcard(LEASES) == 0


# --- clients that leave -------------------------------------------------------------------------------------------


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def test_a_client_that_leaves_before_it_was_asked_for_is_not_recorded(redis_url: str, redis: Redis) -> None:
    who = principal(requests_per_minute=5, concurrent_requests=1)
    async with limiter(redis_url) as limiter_:
        await limiter_.admit(principal(requests_per_minute=1, key_id="other"), new_id())
        leaver = asyncio.create_task(limiter_.admit(who, new_id()))
        asyncio.get_running_loop().call_soon(leaver.cancel)
        await asyncio.gather(leaver, return_exceptions=True)
        assert leaver.cancelled()
        assert (await limiter_.admit(who, new_id())).granted
        assert await redis.zcard(REQUESTS) == 1


async def test_a_client_that_leaves_while_redis_is_asked_leaks_no_slot(server: Valkey) -> None:
    who = principal(requests_per_minute=5, concurrent_requests=1)
    async with connect_redis(server.url) as redis, limiter(server.url) as limiter_:
        await limiter_.admit(principal(requests_per_minute=1, key_id="other"), new_id())
        server.signal(signal.SIGSTOP)
        leaver = asyncio.create_task(limiter_.admit(who, new_id()))
        await turns(10)  # now it was sent
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        server.signal(signal.SIGCONT)
        assert leaver.cancelled()

        async def was_granted_and_released() -> bool:
            return await redis.zcard(REQUESTS) == 1 and await redis.zcard(LEASES) == 0

        await until(was_granted_and_released)
        assert limiter_.state == "redis"
        assert (await limiter_.admit(who, new_id())).granted


async def test_a_client_that_leaves_between_the_answer_and_its_reader_leaks_no_slot(
    redis_url: str, redis: Redis
) -> None:
    who = principal(concurrent_requests=2)
    async with limiter(redis_url) as limiter_:

        async def first() -> None:
            await limiter_.admit(who, "first")
            leaver.cancel()  # both answers came together; the other one is not read yet

        task = asyncio.create_task(first())
        leaver = asyncio.create_task(limiter_.admit(who, "leaver"))
        await asyncio.gather(task, leaver, return_exceptions=True)
        assert leaver.cancelled()
        assert (await limiter_.admit(who, "next")).granted
        assert {"first", "next"} == set(await members(redis, LEASES))


async def test_what_redis_grants_after_we_gave_up_holds_no_slot(server: Valkey, quick_probes: None) -> None:
    who = principal(requests_per_minute=5, concurrent_requests=1)
    async with (
        connect_redis(server.url) as redis,
        limiter(server.url, loses_redis=True, on_redis_down="closed") as limiter_,
    ):
        await limiter_.admit(principal(requests_per_minute=1, key_id="other"), new_id())
        server.signal(signal.SIGSTOP)
        assert (await limiter_.admit(who, new_id())).reason == "unavailable"
        server.signal(signal.SIGCONT)

        async def was_recorded() -> bool:
            return await redis.zcard(REQUESTS) == 1

        await until(was_recorded)
        await until(lambda: limiter_.state == "redis")
        assert (await limiter_.admit(who, new_id())).granted


async def test_a_shutdown_while_redis_is_asked_leaves_nobody_waiting(server: Valkey) -> None:
    server.signal(signal.SIGSTOP)
    async with limiter(server.url, loses_redis=True) as limiter_:
        waiting = asyncio.create_task(limiter_.admit(principal(requests_per_minute=1), new_id()))
        await turns(10)  # now a connection is opened
        assert limiter_._script._opening is not None
        limiter_._script._opening.cancel()  # as asyncio.run does with every task that is left
        assert (await waiting).local


# --- one round trip -----------------------------------------------------------------------------------------------


async def calls(redis: Redis) -> int:
    statistics = await redis.info("commandstats")
    return int(statistics.get("cmdstat_evalsha", {}).get("calls", 0))


async def test_what_one_turn_of_the_loop_asks_is_one_round_trip(server: Valkey) -> None:
    who = principal(requests_per_minute=60, concurrent_requests=100)
    async with limiter(server.url) as limiter_, connect_redis(server.url) as redis:
        await limiter_.admit(principal(requests_per_minute=1, key_id="other"), new_id())
        await redis.config_resetstat()
        ids = [new_id() for _ in range(100)]
        answers = await asyncio.gather(*(limiter_.admit(who, exchange_id) for exchange_id in ids))
        assert await calls(redis) == 1
        # In the order in which they were asked.
        assert [answer.granted for answer in answers] == [True] * 60 + [False] * 40
        assert list(range(59, -1, -1)) == [answer.remaining for answer in answers[:60]]

        for exchange_id in ids:
            limiter_.release(who, exchange_id)

        async def all_are_released() -> bool:
            return await redis.zcard(LEASES) == 0

        await until(all_are_released)
        assert await calls(redis) == 2


async def test_an_admission_among_many_costs_a_few_microseconds(redis_url: str, figure: Callable[[str], None]) -> None:
    who = principal(requests_per_minute=10**7, concurrent_requests=10**5)
    async with limiter(redis_url) as limiter_:

        async def client(requests: int) -> None:
            for _ in range(requests):
                exchange_id = new_id()
                assert (await limiter_.admit(who, exchange_id)).granted
                limiter_.release(who, exchange_id)

        async def microseconds(clients: int, requests: int) -> float:
            started = time.process_time()
            await asyncio.gather(*(client(requests) for _ in range(clients)))
            return (time.process_time() - started) * 1e6 / (clients * requests)

        await microseconds(1, 10)
        alone = min([await microseconds(1, 100) for _ in range(5)])
        among_many = min([await microseconds(64, 10) for _ in range(10)])
    figure(f"limiter: {alone:.0f} µs of CPU to admit and release, {among_many:.0f} among 64 at once")
    assert among_many < 0.8 * alone  # 15 and 30 where nothing else runs; both grow with what does


async def test_a_crowd_larger_than_one_round_trip_is_answered_whole(redis_url: str) -> None:
    who = principal(requests_per_minute=1200)
    async with limiter(redis_url) as limiter_:
        answers = await asyncio.gather(*(limiter_.admit(who, new_id()) for _ in range(1300)))
    assert [answer.granted for answer in answers] == [True] * 1200 + [False] * 100


async def test_a_script_that_redis_forgot_is_loaded_again(redis_url: str, redis: Redis) -> None:
    who = principal(requests_per_minute=3)
    async with limiter(redis_url) as limiter_:
        assert granted(await admit(limiter_, who, 2)) == 2
        await redis.script_flush()
        assert [admission.granted for admission in await admit(limiter_, who, 2)] == [True, False]
        assert limiter_.state == "redis"


@pytest.mark.haste
async def test_a_loop_that_was_held_up_is_not_a_redis_that_is_gone(server: Valkey) -> None:
    who = principal(requests_per_minute=3)
    async with limiter(server.url) as limiter_:
        await limiter_.admit(who, new_id())
        server.signal(signal.SIGSTOP)
        waiting = asyncio.create_task(limiter_.admit(who, new_id()))
        await turns(10)  # now it was sent
        server.signal(signal.SIGCONT)
        time.sleep(script.TIMEOUT * 3)  # the loop finds both: an answer, and a time that is up
        assert not (await waiting).local
        assert limiter_.state == "redis"


# --- without Redis ------------------------------------------------------------------------------------------------


@pytest.mark.haste
async def test_a_redis_that_stalls_adds_a_tenth_of_a_second_once(server: Valkey) -> None:
    who = principal(requests_per_minute=1000)
    async with limiter(server.url, loses_redis=True) as limiter_:
        assert not (await limiter_.admit(who, new_id())).local
        server.signal(signal.SIGSTOP)
        started = time.monotonic()
        answers = await asyncio.gather(*(limiter_.admit(who, new_id()) for _ in range(20)))
        waited = time.monotonic() - started
        assert sum(answer.local and answer.granted for answer in answers) == 20
        assert 0.09 < waited < 0.25  # the rest is this machine's
        assert limiter_.state == "local"

        slowest = 0.0
        while time.monotonic() - started < 1.5:  # the first probe comes after one second, and fails after 1.1
            asked = time.monotonic()
            assert (await limiter_.admit(who, new_id())).local
            slowest = max(slowest, time.monotonic() - asked)
            await asyncio.sleep(0.01)
        assert slowest < script.TIMEOUT / 2

        server.signal(signal.SIGCONT)
        assert await until(lambda: limiter_.state == "redis") < 5
        assert not (await limiter_.admit(who, new_id())).local


@pytest.mark.haste
async def test_the_pause_between_probes_grows_and_then_stays(server: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long Redis was gone, it is used again within five seconds."""
    assert script.LONGEST_PAUSE + script.TIMEOUT < 5
    monkeypatch.setattr(script, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(script, "LONGEST_PAUSE", 0.05)
    failed_at: list[float] = []
    server.kill()
    async with limiter(server.url, loses_redis=True, on_error=lambda kind: failed_at.append(time.monotonic())):
        await until(lambda: len(failed_at) == 12)
    pauses = [later - earlier for earlier, later in pairwise(failed_at)]
    for pause, least in zip(pauses, [0.01, 0.02, 0.04, *[0.05] * 8], strict=True):
        assert pause > least - 0.002  # what the loop rounds
    assert sum(pauses) < 5  # without an end they would add up to 20


async def test_what_is_released_in_a_long_outage_is_not_kept(server: Valkey, quick_probes: None) -> None:
    """A lease that has ended by itself needs nobody to tell Redis."""
    who = principal(concurrent_requests=10)
    async with limiter(server.url, loses_redis=True, lease=0.5) as limiter_:
        ids = [new_id() for _ in range(10)]
        assert granted([await limiter_.admit(who, exchange_id) for exchange_id in ids]) == 10
        server.kill()
        await until(lambda: limiter_.state == "local")
        for exchange_id in ids[:5]:
            limiter_.release(who, exchange_id)
        assert len(limiter_._script._queue) == 5
        await until(lambda: not limiter_._script._queue)
        for exchange_id in ids[5:]:
            limiter_.release(who, exchange_id)
        assert not limiter_._script._queue


async def test_without_redis_the_limit_holds_together_with_what_redis_granted(server: Valkey) -> None:
    who = principal(requests_per_minute=10)
    async with limiter(server.url, loses_redis=True) as limiter_:
        assert granted(await admit(limiter_, who, 6)) == 6
        server.kill()
        answers = await admit(limiter_, who, 10)
        assert [answer.granted for answer in answers] == [True] * 4 + [False] * 6
        assert all(answer.local for answer in answers[:4])
        assert [answer.remaining for answer in answers[:4]] == [3, 2, 1, 0]
        assert (answers[-1].reason, answers[-1].retry_after) == ("requests_per_minute", 60)


async def test_without_redis_each_node_grants_its_share(server: Valkey) -> None:
    server.kill()
    async with limiter(server.url, loses_redis=True, nodes=4, global_per_minute=40) as limiter_:
        await until(lambda: limiter_.state == "local")
        assert granted(await admit(limiter_, principal(requests_per_minute=20, key_id="a"), 10)) == 5
        assert granted(await admit(limiter_, principal(requests_per_minute=3, key_id="b"), 10)) == 1
        assert granted(await admit(limiter_, principal(concurrent_requests=8, key_id="c"), 10)) == 2
        answers = await admit(limiter_, principal(requests_per_minute=400, key_id="d"), 10)
        assert [answer.reason for answer in answers] == [""] * 2 + ["global_requests_per_minute"] * 8


async def test_without_redis_the_window_slides_too(server: Valkey) -> None:
    server.kill()
    now = 1000.0
    who = principal(requests_per_minute=3)
    async with limiter(server.url, loses_redis=True, clock=lambda: now) as limiter_:
        await until(lambda: limiter_.state == "local")
        assert granted(await admit(limiter_, who, 2)) == 2
        now += 20
        assert granted(await admit(limiter_, who, 2)) == 1
        now += 39
        refusal = await limiter_.admit(who, new_id())
        assert (refusal.granted, refusal.retry_after, refusal.reset_after) == (False, 1, 21.0)
        now += 1
        assert granted(await admit(limiter_, who, 3)) == 2


async def test_without_redis_slots_are_counted_and_released(server: Valkey, quick_probes: None) -> None:
    who = principal(concurrent_requests=2)
    failures: list[str] = []
    async with limiter(server.url, loses_redis=True, on_error=failures.append) as limiter_:
        assert (await limiter_.admit(who, "with-redis")).granted
        server.kill()
        assert [(await limiter_.admit(who, name)).granted for name in ("a", "b")] == [True, False]
        limiter_.release(who, "with-redis")
        assert (await limiter_.admit(who, "c")).granted
        limiter_.release(who, "a")
        limiter_.release(who, "c")
        server.start()
        await until(lambda: limiter_.state == "redis")
        assert granted(await admit(limiter_, who, 3)) == 2
        assert {"connection"} == set(failures)


@pytest.mark.parametrize(("policy", "reason"), [("open", ""), ("closed", "unavailable")])
async def test_without_redis_a_setting_lets_all_pass_or_none(server: Valkey, policy: Any, reason: str) -> None:
    who = principal(requests_per_minute=1, concurrent_requests=1)
    server.kill()
    heard: list[str] = []
    async with limiter(server.url, loses_redis=True, on_redis_down=policy, on_local=heard.append) as limiter_:
        answers = await asyncio.gather(*(limiter_.admit(who, new_id()) for _ in range(5)))
        answers += await admit(limiter_, who, 5)
        assert {(not reason, reason, True)} == {(answer.granted, answer.reason, answer.local) for answer in answers}
        assert all(answer.granted or answer.retry_after >= 1 for answer in answers)
        assert policy == limiter_.state
        assert heard == [policy] * 10


async def test_a_redis_that_lost_its_memory_gives_no_second_helping(server: Valkey, quick_probes: None) -> None:
    who = principal(requests_per_minute=5, concurrent_requests=5)
    async with limiter(server.url, loses_redis=True) as limiter_:
        assert granted(await admit(limiter_, who, 3)) == 3
        server.kill()
        assert granted(await admit(limiter_, who, 1)) == 1
        assert limiter_.state == "local"
        server.start()
        await until(lambda: limiter_.state == "redis")
        assert [admission.granted for admission in await admit(limiter_, who, 2)] == [True, False]


async def test_a_redis_that_lost_its_memory_is_told_what_runs(server: Valkey, quick_probes: None) -> None:
    """All of it: more than one round trip renews."""
    who = principal(concurrent_requests=201)
    async with limiter(server.url, loses_redis=True) as one:
        assert granted(await admit(one, who, 199)) == 199
        server.kill()
        assert granted(await admit(one, who, 1)) == 1
        server.start()
        async with connect_redis(server.url) as redis, limiter(server.url) as other:

            async def was_told() -> bool:
                return await redis.zcard(LEASES) == 200

            await until(was_told)
            assert [admission.granted for admission in await admit(other, who, 2)] == [True, False]


async def test_a_fail_over_is_followed_to_the_new_server(server: Valkey, quick_probes: None) -> None:
    """The old one lives on, and the open connection leads to it."""
    who = principal(requests_per_minute=10)
    successor = Valkey(server.folder)
    async with connect_redis(server.url) as redis, limiter(server.url, loses_redis=True) as limiter_:
        await limiter_.admit(who, new_id())
        await command(redis, "REPLICAOF 127.0.0.1 1")
        assert (await limiter_.admit(who, new_id())).local
        successor.start()
        try:
            await until(lambda: limiter_.state == "redis")
            assert not (await limiter_.admit(who, new_id())).local
        finally:
            successor.kill()


async def test_a_redis_that_restarts_between_two_requests_is_not_missed(server: Valkey) -> None:
    """The idle connection is found closed before anything is sent on it."""
    who = principal(requests_per_minute=5)
    async with limiter(server.url) as limiter_:
        assert not (await limiter_.admit(who, new_id())).local
        await turns(2)
        server.kill()
        server.start()
        assert not (await limiter_.admit(who, new_id())).local


async def test_an_idle_gateway_sees_that_redis_is_gone(server: Valkey) -> None:
    async with limiter(server.url, loses_redis=True, lease=0.3) as limiter_:
        await limiter_.admit(principal(requests_per_minute=1), new_id())
        server.kill()
        await until(lambda: limiter_.state == "local")


@pytest.mark.parametrize(
    ("fail", "recover", "kind"),
    [
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE", "readonly"),
        ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0", "oom"),
    ],
)
async def test_a_redis_that_cannot_write_is_a_redis_that_is_gone(
    server: Valkey, quick_probes: None, fail: str, recover: str, kind: str
) -> None:
    who = principal(requests_per_minute=10, concurrent_requests=10)
    failures: list[str] = []
    async with (
        connect_redis(server.url) as redis,
        limiter(server.url, loses_redis=True, on_error=failures.append) as limiter_,
    ):
        assert not (await limiter_.admit(who, new_id())).local
        await command(redis, fail)
        assert (await limiter_.admit(who, new_id())).local
        await until(lambda: len(failures) > 2)  # probes that could read
        assert {kind} == set(failures)
        await command(redis, recover)
        await until(lambda: limiter_.state == "redis")
        assert not (await limiter_.admit(who, new_id())).local


async def test_an_answer_that_is_not_ours_is_a_redis_that_is_gone() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            writer.write(b"+OK\r\n" * 3)

    listener = await asyncio.start_server(babble, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with listener, connect_redis(f"redis://127.0.0.1:{port}") as redis:
        limiter_ = Limiter(RedisScript(redis))
        answer = await asyncio.wait_for(limiter_.admit(principal(requests_per_minute=1), new_id()), 5)
        assert (answer.granted, answer.local) == (True, True)


# --- the window of this process -----------------------------------------------------------------------------------

STEPS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), max_size=60)


@given(STEPS)
def test_the_local_window_grants_what_a_list_of_all_times_would(steps: list[tuple[int, int]]) -> None:
    """Each step: eighths of a second that pass, and the limit as it is then."""
    window, granted_at, now = SlidingWindow(10.0), list[float](), 0.0
    for eighths, limit in steps:
        now += eighths / 8
        inside = [at for at in granted_at if now - at < 10.0]
        assert (len(inside) < limit) == window.has_room(limit, now)
        assert len(inside) == window.count(now)
        assert (inside[-1] + 10.0 - now if inside else 0.0) == window.empty_after(now)
        if len(inside) < limit:
            assert window.room_after(limit, now) == 0.0
            window.add(now)
            granted_at.append(now)
        else:
            free = now + window.room_after(limit, now)
            assert window.has_room(limit, free)
            assert not window.has_room(limit, free - 1 / 16)


@given(STEPS)
def test_a_local_bucket_holds_what_one_that_is_filled_all_the_time_would(steps: list[tuple[int, int]]) -> None:
    """Each step: eighths of a second that pass, and tokens that are wanted. Five a second, ten at most."""
    buckets, held, now = Buckets(), 10.0, 0.0
    for eighths, tokens in steps:
        now += eighths / 8
        held = min(held + 5 * eighths / 8, 10.0)
        wait = buckets.room_after("name", 5.0, 10, now, tokens)
        assert (held >= tokens) == (wait <= 0)
        assert abs(max(tokens - held, 0) / 5 - max(wait, 0)) < 1e-5
        assert abs((10 - held) / 5 - buckets.full_after("name", now)) < 1e-5
        if wait <= 0:
            buckets.take("name", 5.0, now, tokens)
            held -= tokens


def test_only_so_many_buckets_are_remembered_and_full_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grants_module, "MAX_KEYS", 2)
    buckets = Buckets()
    for name in "abc":
        buckets.take(name, 1.0, 0.0)
    assert [buckets.full_after(name, 0.0) for name in "abc"] == [0.0, 1.0, 1.0]
    buckets.take("c", 1.0, 0.0)
    buckets.forget_full(1.0)
    assert list(buckets._full_at) == ["c"]


def test_the_requests_of_only_so_many_keys_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grants_module, "MAX_KEYS", 2)
    grants = Grants(window=60.0, all_limit=0, rates={})
    a, b, c = (principal(requests_per_minute=1, key_id=key_id) for key_id in "abc")
    for who in (a, b):
        grants.record(who, "", new_id(), 0.0)
    assert grants.refusal(a, "", 1.0)  # used later than b
    grants.record(c, "", new_id(), 2.0)
    assert [grants.refusal(who, "", 3.0) is not None for who in (a, c, b)] == [True, True, False]


def test_keys_that_were_idle_for_a_window_are_forgotten() -> None:
    grants = Grants(window=60.0, all_limit=0, rates={})
    who = principal(requests_per_minute=1)
    grants.record(who, "", new_id(), 0.0)
    grants.forget_idle(59.0)
    assert grants.refusal(who, "", 59.0)
    grants.forget_idle(60.0)
    assert not grants._windows

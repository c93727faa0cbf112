"""Streams in Redis, over a real one."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from redis.asyncio import Redis

from gateway.protocol.errors import Unavailable
from gateway.stores import streams as module
from gateway.stores.script import connect_redis
from gateway.stores.streams import Part, Streams, name_of
from tests.support.proxy import proxied_redis
from tests.support.valkey import valkey

pytestmark = pytest.mark.integration

KEY = "key-of-mine"


class Recording:
    """Pieces, of which the oldest may be gone."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)
        self.first = 0

    def piece(self, number: int) -> bytes | None:
        return self.pieces[number] if number < len(self.pieces) else None

    def locate(self, offset: int) -> tuple[int, int] | None:
        at = 0
        for number, piece in enumerate(self.pieces):
            if offset < at + len(piece):
                return (number, offset - at) if number >= self.first else None
            at += len(piece)
        return (len(self.pieces), 0) if offset == at else None


class Node:
    """One process's."""

    def __init__(self, redis: Redis, **more: Any) -> None:
        self.results: list[str] = []
        self.errors: list[str] = []
        given: dict[str, Any] = {"max_bytes": 1 << 20, "max_streams": 4, "ttl": 60.0, **more}
        self.streams = Streams(redis, on_result=self.results.append, on_error=self.errors.append, **given)

    async def begin(self, stream: str, *pieces: bytes) -> Recording:
        assert await self.streams.begin(KEY, name_of(KEY, stream))
        recording = Recording(*pieces)
        self.streams.write(name_of(KEY, stream), recording)
        self.streams.changed(name_of(KEY, stream))
        return recording

    def finish(self, stream: str) -> None:
        self.streams.finish(name_of(KEY, stream), void=False)

    async def read(self, stream: str, after: int = 0) -> Part | None:
        return await self.streams.read(name_of(KEY, stream), after, at_once=True)

    async def until(self, stream: str, size: int, ended: str = "") -> Part:
        async with asyncio.timeout(20):
            while True:
                with suppress(Unavailable):
                    part = await self.read(stream)
                    if part is not None and (part.size, part.ended) == (size, ended):
                        return part
                await asyncio.sleep(0.01)


@asynccontextmanager
async def node(redis_url: str, **more: Any) -> AsyncIterator[Node]:
    redis = connect_redis(redis_url)
    made = Node(redis, **more)
    task = asyncio.create_task(made.streams.run())
    try:
        yield made
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await redis.aclose()


def bytes_of(part: Part | None) -> bytes:
    assert part is not None
    return b"".join(events for _, events in part.pieces)


async def test_what_is_written_here_is_read_there_from_any_byte_on(redis_url: str) -> None:
    async with node(redis_url) as one, node(redis_url) as other:
        recording = await one.begin("s", b"one ", b"two ")
        assert bytes_of(await other.until("s", 8)) == b"one two "
        recording.pieces.append(b"three")
        one.streams.changed(name_of(KEY, "s"))
        part = await other.until("s", 13)
        assert part.made
        one.finish("s")
        part = await other.until("s", 13, "ended")
        assert not part.made
        later = await other.read("s", 9)
        assert later is not None and later.pieces == [(8, b"three")]
        assert bytes_of(await other.read("s", 13)) == b""
        assert await other.read("t") is None
        assert one.results == ["held"]


async def test_what_comes_in_a_moment_is_one_command(redis_url: str, redis: Redis) -> None:
    async with node(redis_url) as one:
        recordings = [await one.begin(f"s{number}") for number in range(4)]
        before = (await redis.info("commandstats"))["cmdstat_evalsha"]["calls"]
        for _ in range(100):
            for number, recording in enumerate(recordings):
                recording.pieces.append(b"x" * 100)
                one.streams.changed(name_of(KEY, f"s{number}"))
        for number in range(4):
            await one.until(f"s{number}", 10_000)
        assert (await redis.info("commandstats"))["cmdstat_evalsha"]["calls"] - before < 40


async def test_all_that_read_share_one_connection(redis_url: str, redis: Redis) -> None:
    async with node(redis_url) as one:
        await one.begin("s", b"x")
        before = len(await redis.client_list())
        await asyncio.gather(*(one.streams.read(name_of(KEY, "s"), 0, at_once=False) for _ in range(200)))
        assert len(await redis.client_list()) == before


async def test_a_stream_is_longer_than_what_is_written_or_read_at_once(redis_url: str) -> None:
    async with node(redis_url, max_bytes=16 << 20) as one:
        pieces = [b"%06d" % number * 5000 for number in range(200)]  # 30 KB each
        await one.begin("s", *pieces)
        one.finish("s")
        whole = b"".join(pieces)
        await one.until("s", len(whole), "ended")
        had = b""
        while part := await one.read("s", len(had)):
            if not part.pieces:
                break
            assert all(len(events) <= module.PART for _, events in part.pieces) and len(part.pieces) <= module.ENTRIES
            had += bytes_of(part)
        assert had == whole


async def test_however_many_read_a_long_stream_a_round_trip_is_small_and_nobody_waits_for_all_of_them(
    redis_url: str, figure: Callable[[str], None]
) -> None:
    """300 MiB at once would be more than a round trip has time for."""
    async with node(redis_url, max_bytes=8 << 20) as one:
        await one.begin("s", *(b"x" * 32_768 for _ in range(128)))
        one.finish("s")
        await one.until("s", 4 << 20, "ended")
        left: set[asyncio.Task[Any]] = {asyncio.create_task(one.read("s")) for _ in range(150)}
        begun: asyncio.Task[Any] = asyncio.create_task(one.streams.begin(KEY, name_of(KEY, "t")))
        left.add(begun)
        sizes: list[int] = []  # bytes that came together
        while left:
            done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            sizes.append(sum(len(bytes_of(task.result())) for task in done - {begun}))
            if begun in done:
                assert begun.result() and len(left) > 75
        figure(f"150 readers of a long stream: {len(sizes)} round trips of at most {max(sizes) / 2**20:.1f} MiB")
        assert max(sizes) <= 4 << 20
        assert one.errors == []


async def test_a_piece_that_is_larger_than_what_is_read_at_once_is_read_by_itself(redis_url: str) -> None:
    async with node(redis_url, max_bytes=8 << 20) as one:
        sizes = [10, 3 * module.MOST_READ, 10]
        await one.begin("s", *(b"x" * size for size in sizes))
        had: list[int] = []
        async with asyncio.timeout(20):
            while sum(had) < sum(sizes):
                part = await one.read("s", sum(had))
                had += [len(events) for _, events in part.pieces] if part is not None else []
        assert had == sizes


async def test_a_redis_that_is_full_is_read_and_takes_no_maker_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.1)
    monkeypatch.setattr(module, "LEASE", 500)
    with valkey() as server:
        async with node(server.url) as one, node(server.url) as other, Redis.from_url(server.url) as redis:
            recording = await one.begin("s", b"one ")
            await one.begin("t", b"two")
            one.finish("t")
            await one.until("s", 4)
            await one.until("t", 3, "ended")
            await redis.config_set("maxmemory-policy", "noeviction")
            await redis.config_set("maxmemory", 1)
            async with asyncio.timeout(10):
                while await redis.exists(f"{name_of(KEY, 's')}:lease"):
                    await asyncio.sleep(0.01)
            recording.pieces.append(b"three")
            one.streams.changed(name_of(KEY, "s"))
            for _ in range(3):
                assert bytes_of(await other.read("t")) == b"two"
                part = await other.read("s")
                assert bytes_of(part) == b"one " and part is not None and part.made
            assert other.errors == []
            await redis.config_set("maxmemory", 0)
            assert bytes_of(await other.until("s", 9)) == b"one three"


async def test_only_the_end_of_a_long_one_is_kept(redis_url: str, redis: Redis) -> None:
    async with node(redis_url, max_bytes=1000) as one:
        recording = await one.begin("s")
        for number in range(50):
            recording.pieces.append(b"%02d" % number * 50)
            one.streams.changed(name_of(KEY, "s"))
            part = await one.until("s", 100 * (number + 1))
            kept = sum(len(events) for _, events in part.pieces)
            assert min(1000, part.size) <= kept <= 1100
        assert part.pieces[-1] == (4900, b"49" * 50)


@pytest.mark.parametrize("fault", ["answer lost", "not done"])
async def test_a_round_trip_that_failed_is_made_again_and_nothing_is_doubled_or_missing(
    redis_url: str, fault: str
) -> None:
    async with proxied_redis(redis_url) as (proxy, url), node(url) as one, node(redis_url) as other:
        recording = await one.begin("s", b"one ")
        await other.until("s", 4)
        recording.pieces.append(b"two ")
        if fault == "answer lost":
            proxy.delay = 0.7  # each way: it is done before the answer is too late
        else:
            await proxy.cut()
        one.streams.changed(name_of(KEY, "s"))
        if fault == "answer lost":
            await other.until("s", 8)
        async with asyncio.timeout(10):
            while not one.errors:
                await asyncio.sleep(0.01)
        recording.pieces.append(b"three")
        await proxy.mend()
        one.finish("s")
        assert bytes_of(await other.until("s", 13, "ended")) == b"one two three"


async def test_while_redis_is_gone_nobody_waits_for_it(redis_url: str) -> None:
    async with proxied_redis(redis_url) as (proxy, url), node(url) as one:
        await one.begin("s", b"one")
        await one.until("s", 3)
        await proxy.cut()
        assert not await one.streams.begin(KEY, name_of(KEY, "t"))
        with pytest.raises(Unavailable):
            await one.read("s")
        assert one.results == ["held", "failed"]
        assert not await one.streams.begin(KEY, name_of(KEY, "t"))
        await proxy.mend()
        await one.until("s", 3)


async def test_a_loop_that_was_held_up_takes_no_redis_for_gone(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.1)
    async with node(redis_url) as one:
        await one.begin("s", b"one")
        await one.until("s", 3)
        execute, tries = one.streams._execute, list[None]()

        async def held_up(commands: Any) -> list[Any]:
            tries.append(None)
            if len(tries) == 1:
                time.sleep(0.4)
                raise TimeoutError
            return await execute(commands)

        monkeypatch.setattr(one.streams, "_execute", held_up)
        assert bytes_of(await one.read("s")) == b"one"


async def test_nobody_waits_for_a_redis_that_somebody_else_has_seen_go(redis_url: str) -> None:
    async with node(redis_url, gone=lambda: True) as one:
        assert not await one.streams.begin(KEY, name_of(KEY, "s"))
        assert one.errors == []


async def test_a_server_that_forgot_the_script_or_all_is_told_again(redis_url: str, redis: Redis) -> None:
    async with node(redis_url) as one:
        recording = await one.begin("s", b"one ")
        await one.until("s", 4)
        await redis.script_flush()
        recording.pieces.append(b"two ")
        one.streams.changed(name_of(KEY, "s"))
        assert bytes_of(await one.until("s", 8)) == b"one two "
        await redis.flushdb()
        recording.pieces.append(b"three")
        one.streams.changed(name_of(KEY, "s"))
        assert bytes_of(await one.until("s", 13)) == b"one two three"
        assert one.errors == []


async def test_what_was_lost_for_good_is_not_made_to_look_whole(redis_url: str, redis: Redis) -> None:
    async with node(redis_url) as one:
        recording = await one.begin("s", b"one ")
        await one.until("s", 4)
        await redis.flushdb()
        recording.pieces.append(b"two ")
        recording.first = 1  # its beginning is not kept here either
        one.finish("s")
        async with asyncio.timeout(5):
            while "lost" not in one.results:
                await asyncio.sleep(0.01)
        assert await one.read("s") is None


async def test_a_stream_whose_maker_is_gone_is_ended_by_who_reads_it_and_by_nobody_else(
    redis_url: str, redis: Redis
) -> None:
    async with node(redis_url) as one, node(redis_url) as other:
        name = name_of(KEY, "s")
        recording = await one.begin("s", b"one ")
        await other.until("s", 4)
        await other.streams.interrupt(name, 4)
        assert (await other.until("s", 4)).made, "it lives"
        await redis.delete(f"{name}:lease")
        await other.streams.interrupt(name, 3)
        await other.until("s", 4)  # it wrote meanwhile
        await redis.delete(f"{name}:lease")
        await other.streams.interrupt(name, 4)
        await other.until("s", 4, "interrupted")
        recording.pieces.append(b"two")  # it was only asleep
        one.finish("s")
        async with asyncio.timeout(5):
            while "lost" not in one.results:
                await asyncio.sleep(0.01)
        assert bytes_of(await other.until("s", 4, "interrupted")) == b"one "


async def test_a_maker_that_has_nothing_to_say_still_says_that_it_lives(
    redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT", 0.5)
    monkeypatch.setattr(module, "LEASE", 3000)
    async with node(redis_url, ttl=0.2) as one:
        await one.begin("s", b"x")
        await asyncio.sleep(4)
        part = await one.read("s")
        assert part is not None and part.made
        one.finish("s")
        await asyncio.sleep(1)
        assert await one.read("s") is None
        assert await redis.exists(f"{name_of(KEY, 's')}:lease") == 0


async def test_whoever_reads_elsewhere_is_seen(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.1)
    async with node(redis_url) as one, node(redis_url) as other:
        await one.begin("s", b"x")
        await asyncio.sleep(0.3)
        assert one.streams.read_at(name_of(KEY, "s")) == 0
        await other.read("s")
        async with asyncio.timeout(5):
            while not one.streams.read_at(name_of(KEY, "s")):
                await asyncio.sleep(0.01)


async def test_a_key_has_so_many_expired_ones_make_room_first_then_the_oldest_that_ended(
    redis_url: str, redis: Redis
) -> None:
    async with node(redis_url, max_streams=3) as one:
        for stream in ("a", "b", "c"):
            await one.begin(stream, b"x")
        assert not await one.streams.begin(KEY, name_of(KEY, "d"))
        assert await one.streams.begin("another", name_of("another", "d"))
        for stream in ("a", "b"):
            one.finish(stream)
            await one.until(stream, 1, "ended")
        await redis.delete(name_of(KEY, "b"))
        await one.begin("d", b"x")
        assert await one.read("a") is not None
        await one.begin("e", b"x")
        assert await one.read("a") is None
        assert not await one.streams.begin(KEY, name_of(KEY, "f"))
        assert one.results.count("refused") == 2


async def test_nothing_is_left_of_a_void_one_and_nothing_lasts_for_ever(redis_url: str, redis: Redis) -> None:
    async with node(redis_url) as one:
        await one.begin("s")
        await one.begin("t", b"x")
        one.streams.finish(name_of(KEY, "s"), void=True)
        one.finish("t")
        await one.until("t", 1, "ended")
        await one.streams.close(1)
        assert await one.read("s") is None
        names = await redis.keys("*")
        assert all([await redis.pttl(name) > 0 for name in names]) and len(names) == 3
        assert not any(KEY.encode() in name for name in names)


async def test_a_stream_ends_while_redis_is_gone_and_is_given_up_after_a_while(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None]
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.5)
    monkeypatch.setattr(module, "BEAT", 0.1)
    async with proxied_redis(redis_url) as (proxy, url), node(url) as one:
        await one.begin("s", b"one")
        await one.until("s", 3)
        await proxy.cut()
        one.finish("s")
        async with asyncio.timeout(10):
            while "lost" not in one.results:
                await asyncio.sleep(0.01)
        await one.streams.close(1)

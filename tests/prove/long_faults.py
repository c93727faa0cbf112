"""The faults that take long to show: what `make chaos` does beside the tests. Each says what it found, by promise."""

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from time import monotonic
from typing import NamedTuple

import aiohttp

from gateway.mock import Mock, Received
from tests.prove.kill_loop import environment, running_valkey
from tests.prove.postgres import running_postgres
from tests.support.gateway import chat_body
from tests.support.process import Served, new_key, serving, until
from tests.support.proxy import Proxy, proxied_redis

MIB = 1 << 20


class Shown(NamedTuple):
    """One figure of a promise, and whether it is within the promise."""

    promise: str
    figure: str
    held: bool


@dataclass
class Stage:
    """What gateways stand on, and the environment that says so to them."""

    environ: Mapping[str, str]
    log: Path  # what the gateways said
    redis: Proxy
    mock: Mock
    quick: bool

    @asynccontextmanager
    async def gateway(self, **environ: str) -> AsyncIterator[Served]:
        async with serving({**self.environ, **environ}, coverage=False, log=self.log) as served:
            yield served

    @property
    def calls(self) -> list[Received]:
        """What the provider was asked to generate."""
        return [call for call in self.mock.received if call.method == "POST"]

    def forget_calls(self) -> None:
        self.mock.received.clear()


@asynccontextmanager
async def staged(data: Path, *, quick: bool) -> AsyncIterator[Stage]:
    mock = Mock()
    address = await mock.start()
    try:
        async with (
            running_postgres(data / "postgres") as postgres,
            running_valkey(data / "valkey") as redis_url,
            proxied_redis(redis_url) as (redis, proxied_url),
        ):
            environ = environment(data, postgres.url, proxied_url, address)
            yield Stage(environ, data / "gateway.log", redis, mock, quick)
    finally:
        await mock.stop()


def session(key: str) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    return aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}, connector=connector, timeout=timeout)


# --- clients that do not read, and clients that leave -------------------------------------------------------------


async def stopped_readers(stage: Stage) -> list[Shown]:
    """Streams without an end whose clients read nothing, while others go on."""
    limit = 5.0 if stage.quick else 30.0  # seconds that a client may not read
    async with stage.gateway(GATEWAY_WRITE_TIMEOUT=f"{limit:g}") as served:
        key = await new_key(served)
        usual = await _latencies(served, key, 2.0)
        memory = served.rss_mb()
        wires = [await _ask_and_read_nothing(served, key) for _ in range(20)]
        started = monotonic()
        await until(lambda: len(_endless(stage)) == len(wires))
        calls = _endless(stage)  # now: the mock forgets them for newer ones
        beside = await _latencies(served, key, limit)
        grown = served.rss_mb() - memory
        await until(lambda: all(call.client_gone_at for call in calls), limit + 30)
        slowest = max(call.client_gone_at or 0 for call in calls) - started
        for wire in wires:
            wire.close()
    # What the provider's own kernel keeps has not been sent yet: tcp(7), tcp_wmem.
    kept = int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2]) / MIB
    sent = max(call.sent for call in calls) / MIB
    stage.forget_calls()
    return [
        Shown(
            "P5", f"20 readers that stopped: a provider wrote {sent:.1f} MiB, kept {kept:.0f} itself", sent <= 8 + kept
        ),
        Shown("P5", f"all dropped {slowest:.0f} s after they stopped, of {limit:.0f} s", slowest <= limit + 10),
        Shown("P5", f"{grown:.0f} MiB more memory", grown <= 64),
        Shown("P5", f"p95 of others {beside * 1000:.0f} ms (usual: {usual * 1000:.0f} ms)", beside < 1),
    ]


def _endless(stage: Stage) -> list[Received]:
    return [call for call in stage.calls if "endless" in call.model]


async def _latencies(served: Served, key: str, seconds: float) -> float:
    """p95 of whole answers, seconds, that four clients get one after the other."""
    took: list[float] = []

    async def ask(client: aiohttp.ClientSession) -> None:
        end = monotonic() + seconds
        while monotonic() < end:
            started = monotonic()
            async with client.post(f"{served.base_url}/chat/completions", json=chat_body("openai/mock-gpt")) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()
            took.append(monotonic() - started)
            await asyncio.sleep(0.02)

    async with session(key) as client:
        await asyncio.gather(*(ask(client) for _ in range(4)))
    return quantiles(took, n=20)[-1]


async def _ask_and_read_nothing(served: Served, key: str) -> socket.socket:
    wire = socket.create_connection(_address(served))
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    await asyncio.to_thread(wire.sendall, _request(served, key, "openai/mock-gpt?fault=endless"))
    return wire


def _address(served: Served) -> tuple[str, int]:
    host, _, port = served.root_url.removeprefix("http://").partition(":")
    return host, int(port)


def _request(served: Served, key: str, model: str) -> bytes:
    body = b'{"model":"%b","stream":true,"messages":[{"role":"user","content":"Go on."}]}' % model.encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def abandoned_streams(stage: Stage) -> list[Shown]:
    """150 streams at once; then 120 of their clients are gone."""
    tokens = 100 if stage.quick else 600  # of 50 ms
    async with stage.gateway() as served, session(await new_key(served)) as client:
        await asyncio.gather(*(_stream(client, served, 0.1) for _ in range(150)))  # so that the pools are warm
        await until(lambda: all(call.finished for call in stage.calls))
        stage.forget_calls()
        files, memory = _files(served), served.rss_mb()
        body = chat_body(f"openai/mock-gpt?pace_ms=50&tokens={tokens}", stream=True)
        answers = [client.post(f"{served.base_url}/chat/completions", json=body) for _ in range(150)]
        responses = await asyncio.gather(*answers)
        at_once = sum(call.phase == "stream" for call in stage.calls)
        left = monotonic()
        for response in responses[:120]:
            response.close()
        await until(lambda: sum(bool(call.client_gone_at) for call in stage.calls) >= 120, 10)
        gone = max(call.client_gone_at or 0 for call in stage.calls) - left
        rest = [await response.read() for response in responses[120:]]
        whole = sum(body.endswith(b"data: [DONE]\n\n") for body in rest)
        await until(lambda: all(call.finished or call.client_gone_at for call in stage.calls))
        await asyncio.sleep(1)
        more_files, more_memory = _files(served) - files, served.rss_mb() - memory
    stage.forget_calls()
    return [
        Shown("P15", f"{at_once} of 150 streams ran at once", at_once == 150),
        Shown(
            "P15",
            f"120 abandoned: {more_files:+d} files and {more_memory:+.0f} MiB beside 150 connections that rested",
            more_files <= 20 and more_memory <= 50,
        ),
        Shown("P4", f"120 abandoned at once: the last provider was closed after {gone * 1000:.0f} ms", gone <= 3),
        Shown("P4", f"{whole} of the 30 others came whole", whole == 30),
    ]


async def _stream(client: aiohttp.ClientSession, served: Served, seconds: float) -> bool:
    """Whether all of it came."""
    pace = 100  # ms
    body = chat_body(f"openai/mock-gpt?pace_ms={pace}&tokens={max(int(seconds * 1000 / pace), 1)}", stream=True)
    try:
        async with client.post(f"{served.base_url}/chat/completions", json=body) as response:
            return (await response.read()).endswith(b"data: [DONE]\n\n")
    except aiohttp.ClientError:
        return False


def _files(served: Served) -> int:
    return len(list(Path(f"/proc/{served.process.pid}/fd").iterdir()))


# --- revocation ---------------------------------------------------------------------------------------------------


async def revocation(stage: Stage) -> list[Shown]:
    """A key is revoked at one gateway, and asked with at another, with Redis and without."""
    trust = 6.0 if stage.quick else 60.0  # seconds without a look; 60 is the default
    shown = []
    async with (
        stage.gateway(GATEWAY_KEY_CACHE=f"{trust:g}") as one,
        stage.gateway(GATEWAY_KEY_CACHE=f"{trust:g}") as other,
    ):
        for redis_is, limit in (("there", 5.0), ("gone", trust)):
            key = await new_key(one)
            assert await _status(other, key) == 200
            if redis_is == "gone":
                await stage.redis.cut()
                await asyncio.sleep(0.5)
                assert await _status(other, key) == 200
            started = monotonic()
            await _revoke(one, key)
            while await _status(other, key) != 401:
                assert monotonic() - started < limit + 30
                await asyncio.sleep(0.05)
            took = monotonic() - started
            words = f"revoked at one gateway, dead at another after {took:.1f} s, Redis {redis_is} (trust: {trust:g} s)"
            shown.append(Shown("P9", words, took <= limit + 1))
        await stage.redis.mend()
    return shown


async def _status(served: Served, key: str) -> int:
    async with session(key) as client:
        async with client.post(f"{served.base_url}/chat/completions", json=chat_body("openai/mock-gpt")) as response:
            return response.status


async def _revoke(served: Served, key: str) -> None:
    url = f"{served.root_url}/auth/keys/{key.split('_')[1]}"
    async with session(key) as client, client.delete(url) as response:
        assert response.status in (200, 204), await response.text()

"""A provider on a real socket that answers with given bytes, and the client under test in front of it."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway.protocol.request import UpstreamRequest
from gateway.protocol.routing import Provider, Target
from gateway.settings import load_settings
from gateway.upstream import Answer, Upstream

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
HELLO = OK + b"Content-Length: 5\r\n\r\nhello"
CLOSE = b""  # among the pieces of an answer: the connection is closed
HANG = b"..."  # nothing more is sent

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Far:
    """A provider that answers each request with the next of its answers, the last one again and again."""

    def __init__(self, answers: list[list[bytes]]) -> None:
        self.address = ""
        self.requests: list[bytes] = []
        self.ports: list[int] = []  # of the client's side, for each request
        self.accepted = 0
        self.writers: list[asyncio.StreamWriter] = []  # of the open connections
        self._answers = answers

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self.writers.append(writer)
        try:
            while True:
                self.requests.append(await read_request(reader))
                self.ports.append(writer.get_extra_info("peername")[1])
                for piece in self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]:
                    if piece == HANG:
                        await reader.read()
                        return
                    if piece == CLOSE:
                        return
                    writer.write(piece)
                    await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.writers.remove(writer)
            writer.close()

    async def emptied(self) -> None:
        """Waits until nobody is connected."""
        async with asyncio.timeout(3):
            while self.writers:
                await asyncio.sleep(0.005)


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    _, found, rest = head.lower().partition(b"\r\ncontent-length: ")
    return head + await reader.readexactly(int(rest.partition(b"\r\n")[0]) if found else 0)


@asynccontextmanager
async def listening(script: Script, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    tasks: set[asyncio.Task[Any] | None] = set()

    async def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(task := asyncio.current_task())
        try:
            await script(reader, writer)
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            tasks.discard(task)

    server = await asyncio.start_server(tracked, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        running = [task for task in tasks if task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@asynccontextmanager
async def provider(*answers: list[bytes], context: ssl.SSLContext | None = None) -> AsyncIterator[Far]:
    far = Far(list(answers))
    async with listening(far.serve, context) as port:
        far.address = f"{'https' if context else 'http'}://localhost:{port}/v1"
        yield far


@asynccontextmanager
async def client(**settings: str) -> AsyncIterator[Upstream]:
    upstream = Upstream(load_settings(settings))
    try:
        yield upstream
    finally:
        await upstream.close()


def target(address: str, credential: str | None = "sk-1", **more: Any) -> Target:
    return Target(Provider("acme", "openai", address, api_key=credential, **more), "m", credential)


async def ask(upstream: Upstream, address: str, body: bytes = b"{}", **more: Any) -> Answer:
    return await upstream.post(target(address, **more), UpstreamRequest("/chat", body), {}, lambda: None)


async def exchange(upstream: Upstream, address: str, **more: Any) -> bytes:
    answer = await ask(upstream, address, **more)
    body = await answer.body(1 << 26)
    answer.finish()
    return body


def idle(upstream: Upstream) -> int:
    return sum(map(len, upstream._pool._idle.values()))


async def free_port() -> int:
    """Nobody listens there any more."""
    async with listening(lambda reader, writer: asyncio.sleep(0)) as port:
        return port


async def cancelled(work: Awaitable[Any], ready: Callable[[], bool]) -> None:
    """Cancel `work` as soon as it has come so far."""
    task = asyncio.ensure_future(work)
    async with asyncio.timeout(3):
        while not ready():
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def on_asyncio(scenario: Coroutine[Any, Any, None]) -> None:
    """The tests of this file run on uvloop, as `gateway serve` does where there is one."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(scenario)

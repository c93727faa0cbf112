"""A provider by hand behind a gateway, and what tests send through it to the endpoints that are passed on."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from copy import copy
from typing import Any

import aiohttp
import asyncpg

from tests.support.gateway import Gateway, running_gateway

BOUNDARY = "boundary-of-the-test"
UPLOAD = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 25\r\n\r\n" + b'{"id":"file-1","a":"bcd"}'


class Far:
    """A provider by hand: `script` is run for each request, once its head was read.

    A script has a copy that keeps to the connection of its request; the test's own has the newest.
    """

    def __init__(self, script: Callable[["Far"], Awaitable[None]]) -> None:
        self._script = script
        self._whole = self
        self.address = ""
        self.heads: list[bytes] = []
        self.head = b""
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter
        self.gone = 0  # connections that the gateway closed
        self.sent = 0  # bytes

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if head.startswith(b"GET /v1/models"):
                    writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"data":[]}')
                    continue
                self.reader, self.writer, self.head = reader, writer, head
                self.heads.append(head)
                await self._script(copy(self))
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone += 1
        finally:
            writer.close()

    async def read_body(self) -> bytes:
        length = int(self.head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return await self.reader.readexactly(length)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()
        self._whole.sent += len(data)

    async def hang(self) -> None:
        """Until the gateway closes the connection."""
        await self.reader.read()
        self.writer.transport.abort()
        raise ConnectionResetError


@asynccontextmanager
async def far_away(script: Callable[[Far], Awaitable[None]]) -> AsyncIterator[Far]:
    far = Far(script)
    server = await asyncio.start_server(far.serve, "127.0.0.1", 0)
    far.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield far
    finally:
        server.close()


@asynccontextmanager
async def in_front(
    database_url: str, redis_url: str, script: Callable[[Far], Awaitable[None]], **environ: str
) -> AsyncIterator[tuple[Gateway, Far, aiohttp.ClientSession]]:
    """A gateway in front of it, and a client of an admin's."""
    async with far_away(script) as far:
        async with running_gateway(database_url, redis_url, {"OPENAI_BASE_URL": far.address, **environ}) as gateway:
            async with aiohttp.ClientSession(headers=gateway.headers) as client:
                yield gateway, far, client
                await client.close()


def part(name: str, value: str, more: str = "") -> bytes:
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'.encode()


def form(*parts: bytes) -> dict[str, Any]:
    """Arguments of a POST."""
    data = b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()
    return {"data": data, "headers": {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}}


FILE = part("file", "x" * 10, '; filename="a.mp3"')


async def post(
    client: aiohttp.ClientSession, gateway: Gateway, path: str, **arguments: Any
) -> tuple[int, dict[str, Any]]:
    async with client.post(f"{gateway.base_url}{path}", **arguments) as response:
        return response.status, await response.json()


async def send_head(gateway: Gateway, length: int, more: str = "") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Of an upload, on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.root_url.rsplit(":", 1)[1]))
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.api_key}\r\nContent-Length: {length}\r\n"
    )
    writer.write(f"{head}Content-Type: {UPLOAD['Content-Type']}\r\n{more}\r\n".encode())
    return reader, writer


async def trickle(writer: asyncio.StreamWriter) -> None:
    """A byte now and then, for ever."""
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.1)


async def the_row(gateway: Gateway) -> asyncpg.Record:
    [row] = await gateway.rows()
    return row


def error_code(answer: Mapping[str, Any]) -> Any:
    return answer["error"]["code"]


async def answer_all(far: Far) -> None:
    await far.read_body()
    await far.send(OK)

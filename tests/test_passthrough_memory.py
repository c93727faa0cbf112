"""Bodies of 100 MB through a gateway that is a process of its own: what it holds of them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic

import aiohttp
import pytest

from tests.support.process import Served, new_key, serving

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SIZE = 100 << 20  # bytes
PIECE = bytes(1 << 16)
MOST = 16.0  # MiB by which the process may grow
BOUNDARY = "boundary-of-the-test"
FORM = (
    f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="model"\r\n\r\nopenai/mock-gpt\r\n'
    f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
    f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n\r\n'
).encode()
END = f"\r\n--{BOUNDARY}--\r\n".encode()


class Provider:
    """Reads what comes and forgets it; answers a file, or 100 MB."""

    def __init__(self) -> None:
        self.read = 0  # bytes of the last request's body
        self.address = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            await self._take(reader, head.lower())
            if b"/content" in head or b"/speech" in head or b"/generations" in head:
                kind = "application/json" if b"/generations" in head else "audio/mpeg"
                writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {SIZE}\r\n\r\n".encode())
                for _ in range(SIZE // len(PIECE)):
                    writer.write(PIECE)
                    await writer.drain()
            else:
                body = b'{"id":"file-1","object":"file","text":"heard"}'
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
                writer.write(head + body)

    async def _take(self, reader: asyncio.StreamReader, head: bytes) -> None:
        self.read = 0
        if b"content-length: " in head:
            left = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            while left:
                data = await reader.read(min(left, 1 << 16))
                left -= len(data)
                self.read += len(data)
        elif b"transfer-encoding: chunked" in head:
            while size := int(await reader.readuntil(b"\r\n"), 16):
                await reader.readexactly(size + 2)
                self.read += size
            await reader.readexactly(2)


@asynccontextmanager
async def provider() -> AsyncIterator[Provider]:
    far = Provider()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await far.answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    far.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield far
    finally:
        server.close()


async def form(size: int) -> AsyncIterator[bytes]:
    yield FORM
    for _ in range(size // len(PIECE)):
        yield PIECE
    yield END


class Watched:
    """How much a process grows while it is looked at."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self.most = self.before = served.rss_mb()

    async def look(self) -> None:
        while True:
            self.most = max(self.most, self._served.rss_mb())
            await asyncio.sleep(0.01)

    @property
    def grown(self) -> float:
        return self.most - self.before


@asynccontextmanager
async def watched(served: Served) -> AsyncIterator[Watched]:
    seen = Watched(served)
    looking = asyncio.create_task(seen.look())
    try:
        yield seen
    finally:
        looking.cancel()


async def upload(client: aiohttp.ClientSession, url: str, size: int, *, chunked: bool = False, key: str = "") -> None:
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    if key:
        headers["Idempotency-Key"] = key
    if not chunked:
        headers["Content-Length"] = str(len(FORM) + size + len(END))
    async with client.post(url, data=form(size), headers=headers) as response:
        assert response.status == 200, await response.text()


async def download(client: aiohttp.ClientSession, url: str, size: int) -> None:
    headers = {"Idempotency-Key": "order-1"} if url.endswith("/generations") else {}
    body = {"model": "openai/tts-1"}
    asking = client.get(url) if url.endswith("/content") else client.post(url, json=body, headers=headers)
    async with asking as response:
        assert response.status == 200, await response.text()
        received = 0
        async for data in response.content.iter_any():
            received += len(data)
            if received >= size:
                break
    assert received >= size


async def upload_twice(
    client: aiohttp.ClientSession, served: Served, far: Provider, figure: Callable[[str], None]
) -> None:
    """With an `Idempotency-Key`: the provider hears of the first one alone."""
    for sent in (len(FORM) + SIZE + len(END), 0):
        far.read, began = 0, monotonic()
        async with watched(served) as seen:
            await upload(client, f"{served.base_url}/files", SIZE, key="order-1")
        assert far.read == sent
        words = "with an Idempotency-Key" if sent else "once more, which is read and compared"
        figure(f"100 MiB by POST /v1/files {words}: RSS +{seen.grown:.1f} MiB, {monotonic() - began:.1f} s")
        assert seen.grown < MOST


async def test_a_hundred_megabytes_each_way_are_never_held(
    database_url: str, redis_url: str, figure: Callable[[str], None]
) -> None:
    async with provider() as far:
        environ = {
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "OPENAI_BASE_URL": far.address,
            "OPENAI_API_KEY": "sk-operator",
            "GATEWAY_MOCK": "off",
        }
        async with serving(environ, coverage=False) as served:
            headers = {"Authorization": f"Bearer {await new_key(served)}"}
            async with aiohttp.ClientSession(headers=headers) as client:
                files, transcriptions = f"{served.base_url}/files", f"{served.base_url}/audio/transcriptions"
                content, speech = f"{served.base_url}/files/file-1/content", f"{served.base_url}/audio/speech"
                for url in (files, transcriptions):  # what is made once is there
                    await upload(client, url, 1 << 20)
                await download(client, content, 1 << 20)
                for url, chunked in ((files, False), (transcriptions, False), (transcriptions, True)):
                    began = monotonic()
                    async with watched(served) as seen:
                        await upload(client, url, SIZE, chunked=chunked)
                    renamed = len("openai/") if url == transcriptions else 0
                    assert far.read == len(FORM) + SIZE + len(END) - renamed
                    words = f"POST {url.removeprefix(served.root_url)}{', chunked' if chunked else ''}"
                    figure(f"100 MiB by {words}: RSS +{seen.grown:.1f} MiB, {monotonic() - began:.1f} s")
                    assert seen.grown < MOST
                await upload_twice(client, served, far, figure)
                for url in (content, speech, f"{served.base_url}/images/generations"):
                    began = monotonic()
                    async with watched(served) as seen:
                        await download(client, url, SIZE)
                    words = url.removeprefix(served.root_url)
                    figure(f"100 MiB from {words}: RSS +{seen.grown:.1f} MiB, {monotonic() - began:.1f} s")
                    assert seen.grown < MOST

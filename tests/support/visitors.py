"""Clients on connections of their own that forgive nothing: what was refused, cut or failed is a fault, by its name.

A connection is used again until an answer says `Connection: close`; one that ends without that word was cut.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tests.support.gateway import chat_body
from tests.support.process import Served

PATIENCE = 60.0  # seconds that an answer may take

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Fault(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Visitors:
    served: Served
    key: str
    ended: set[str] = field(default_factory=set)  # request ids of whole answers
    cut: set[str] = field(default_factory=set)  # of those that broke off
    faults: Counter[str] = field(default_factory=Counter)

    @asynccontextmanager
    async def at_work(self, *, whole: int, streams: int) -> AsyncIterator[None]:
        """So many of each kind, until the block ends; what is open then is read to its end."""
        self._over = asyncio.Event()
        asking = chat_body("mock-gpt?tokens=5&headers_ms=10")
        streaming = chat_body("mock-claude?tokens=20&pace_ms=20", stream=True)
        tasks = [asyncio.create_task(self._visit(body)) for body in [asking] * whole + [streaming] * streams]
        try:
            yield
            self._over.set()
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _visit(self, body: Mapping[str, Any]) -> None:
        """One request after the other, with a pause in which the connection is idle."""
        connection: Connection | None = None
        while not self._over.is_set():
            try:
                connection = connection or await connect(self.served)
                async with asyncio.timeout(PATIENCE):
                    connection = await self._ask(connection, body)
            except (Fault, TimeoutError) as fault:
                self.faults[str(fault) or "silent"] += 1
                connection = None
            with suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), 0.05)

    async def _ask(self, connection: Connection, body: Mapping[str, Any]) -> Connection | None:
        """The connection, when it may be used again. Raises Fault."""
        reader, writer = connection
        writer.write(request(self.key, body))
        head = await read_head(reader)
        identity = head.headers["x-request-id"]
        try:
            text = await read_body(reader, head)
            if head.status != 200:
                raise Fault(f"status {head.status}")
            if body.get("stream") and not text.endswith(b"data: [DONE]\n\n"):
                raise Fault("cut in a stream")
        except Fault:
            self.cut.add(identity)
            raise
        self.ended.add(identity)
        if head.headers.get("connection") != "close":
            return connection
        writer.close()
        return None


async def connect(served: Served) -> Connection:
    host, _, port = served.root_url.removeprefix("http://").partition(":")
    try:
        return await asyncio.open_connection(host, int(port))
    except OSError as error:
        raise Fault(f"refused: {error.strerror}") from None


def request(key: str, body: Mapping[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def read_head(reader: asyncio.StreamReader) -> Answer:
    """Without its body. Raises Fault."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except (asyncio.IncompleteReadError, ConnectionError):
        raise Fault("cut before an answer") from None
    status, *lines = head.rstrip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Answer(int(status.split()[1]), headers, b"")


async def read_body(reader: asyncio.StreamReader, head: Answer) -> bytes:
    """Raises Fault when it is shorter than its headers say."""
    try:
        if "content-length" in head.headers:
            return await reader.readexactly(int(head.headers["content-length"]))
        if head.headers.get("transfer-encoding") != "chunked":
            return await reader.read()
        text = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            text += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
        return text
    except (asyncio.IncompleteReadError, ConnectionError):
        raise Fault("cut in a body") from None

"""A proxy between the gateway and one of its stores, for faults without touching the store: it can refuse, cut, stall,
delay, close one half, answer in the store's place, and lead to another one.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import parse_qs, urlsplit


class Proxy:
    def __init__(self, target: str) -> None:
        self._target = target  # path of a unix socket, or host:port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._near: set[asyncio.StreamWriter] = set()  # those of them that lead to the gateway
        self._flow = asyncio.Event()
        self._flow.set()
        self.port = 0
        self.delay = 0.0  # seconds that each read waits, either way
        self.answer = b""  # what is answered in the store's place; b"": nothing
        self.answered = b""  # to reads that have this in them

    @property
    def refuses(self) -> bool:
        return self._server is None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Refuse new connections and reset the open ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self._flow.set()
        for writer in list(self._writers):
            writer.transport.abort()

    async def lead_to(self, target: str) -> None:
        """From now on to another server, as an address does after a fail-over; open connections are reset."""
        self._target = target
        await self.cut()
        await self.start()

    def half_close(self) -> None:
        """Say goodbye to the gateway on every open connection, and read on."""
        for writer in list(self._near):
            with suppress(OSError):  # the gateway was faster, and is gone
                writer.write_eof()

    async def mend(self) -> None:
        """As if nothing had been."""
        self.delay, self.answer = 0.0, b""
        self._flow.set()
        if self.refuses:
            await self.start()

    def stall(self) -> None:
        """Keep connections open and pass nothing on."""
        self._flow.clear()

    def resume(self) -> None:
        self._flow.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._target.startswith("/"):
                far_reader, far_writer = await asyncio.open_unix_connection(self._target)
            else:
                host, _, port = self._target.rpartition(":")
                far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        self._near.add(writer)
        try:
            await asyncio.gather(self._copy(reader, far_writer, writer), self._copy(far_reader, writer))
        finally:
            self._writers -= {writer, far_writer}
            self._near.discard(writer)

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, back: asyncio.StreamWriter | None = None
    ) -> None:
        """`back`: to whom the bytes come from, when that is the gateway."""
        with suppress(OSError, RuntimeError):  # a half that is closed takes no more
            while data := await reader.read(1 << 16):
                await self._flow.wait()
                if self.delay:
                    await asyncio.sleep(self.delay)
                answers = back is not None and self.answer and self.answered in data
                target = back if answers and back is not None else writer
                target.write(self.answer if answers else data)
                await target.drain()
        writer.close()


@asynccontextmanager
async def proxied_postgres(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """The proxy, and the address of the same database behind it."""
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    folder = query.get("host", [""])[0]
    target = (
        f"{folder}/.s.PGSQL.{query.get('port', ['5432'])[0]}" if folder else f"{parts.hostname}:{parts.port or 5432}"
    )
    proxy = Proxy(target)
    await proxy.start()
    user = parts.username or "postgres"
    password = f":{parts.password}" if parts.password else ""
    try:
        yield proxy, f"postgresql://{user}{password}@127.0.0.1:{proxy.port}{parts.path}?sslmode=disable"
    finally:
        await proxy.cut()


@asynccontextmanager
async def proxied_redis(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    parts = urlsplit(url)
    number = parse_qs(parts.query).get("db", ["0"])[0]
    proxy = Proxy(parts.path if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}")
    await proxy.start()
    try:
        yield proxy, f"redis://127.0.0.1:{proxy.port}/{number}"
    finally:
        await proxy.cut()

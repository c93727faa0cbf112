"""A Postgres that is stopped in the middle of its work."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from gateway.embedded import Embedded
from tests.support.proxy import Proxy


class Postgres:
    """A server of our own, at an address that stays while it is stopped and started again."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self.proxy = Proxy("")
        self.url = ""

    async def start(self) -> None:
        self._server = Embedded(self._data, postgres=True, redis=False)
        await asyncio.to_thread(self._server.start)
        folder = parse_qs(urlsplit(self._server.database_url).query)["host"][0]
        port = self.proxy.port
        self.proxy = Proxy(f"{folder}/.s.PGSQL.5432")
        self.proxy.port = port
        await self.proxy.start()
        self.url = f"postgresql://postgres@127.0.0.1:{self.proxy.port}/postgres?sslmode=disable"

    async def stop_at_once(self) -> None:
        """As `pg_ctl stop -m immediate` does: no checkpoint, no word to those who are connected."""
        pid = (self._data / "postgres" / "postmaster.pid").read_text().partition("\n")[0]
        os.kill(int(pid), signal.SIGQUIT)
        await self.stop()

    async def stop(self) -> None:
        await self.proxy.cut()
        await asyncio.to_thread(self._server.stop)


@asynccontextmanager
async def running_postgres(data: Path) -> AsyncIterator[Postgres]:
    postgres = Postgres(data)
    await postgres.start()
    try:
        yield postgres
    finally:
        await postgres.stop()

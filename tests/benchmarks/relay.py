"""The least that a proxy in Python can do: bytes from one socket to another, and nothing known of them.

    python -m tests.benchmarks.relay PORT    of the provider; it prints its own

A yardstick for machines without nginx, which costs about as much.
"""

import asyncio
import sys
from typing import cast

import uvloop


class Side(asyncio.Protocol):
    """Writes all that it reads to the other side."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: Side | None = None
        self._early = b""  # what came before there was another side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.other is None or self.other.transport is None:
            self._early += data
        else:
            self.other.transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()

    def join(self, other: "Side") -> None:
        self.other, other.other = other, self
        if self._early and other.transport is not None:
            other.transport.write(self._early)
            self._early = b""


class Front(Side):
    """The client's side, which opens the provider's."""

    def __init__(self, provider: int, tasks: set["asyncio.Task[None]"]) -> None:
        super().__init__()
        self._provider = provider
        self._tasks = tasks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        task = asyncio.create_task(self._open())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        _, back = await loop.create_connection(Side, "127.0.0.1", self._provider)
        self.join(back)


async def serve(provider: int) -> None:
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()
    server = await loop.create_server(lambda: Front(provider, tasks), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(int(sys.argv[1])))

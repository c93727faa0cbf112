"""A provider under the test's own hand: it sends the pieces it is given, when it is told, and notes the time of each."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic

from aiohttp import web


@dataclass
class StandIn:
    pieces: Sequence[bytes]
    pause: float  # seconds before each piece
    content_type: str
    address: str = ""
    sent: list[float] = field(default_factory=list)  # monotonic time at which each piece was written
    bodies: list[bytes] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.read())
        response = web.StreamResponse(headers={"Content-Type": self.content_type})
        await response.prepare(request)
        for piece in self.pieces:
            await asyncio.sleep(self.pause)
            self.sent.append(monotonic())
            await response.write(piece)
        await response.write_eof()
        return response


@asynccontextmanager
async def standing_in(
    pieces: Sequence[bytes], pause: float = 0, content_type: str = "text/event-stream"
) -> AsyncIterator[StandIn]:
    provider = StandIn(pieces, pause, content_type)
    app = web.Application()
    app.router.add_post("/{path:.*}", provider.answer)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    provider.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield provider
    finally:
        await runner.cleanup()

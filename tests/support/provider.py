"""The mock provider as a process of its own that notes every call: `python -m tests.support.provider FILE`.

It prints its address, and writes the X-Request-Id of each request for an answer to FILE, a line each, before it answers.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from gateway.mock import Mock


class NotingMock(Mock):
    def __init__(self, calls: Path) -> None:
        super().__init__()
        self._calls = calls.open("a", buffering=1)  # a line is with the kernel when it is written

    def make_app(self) -> web.Application:
        app = super().make_app()
        app.middlewares.append(self._note)
        return app

    @web.middleware
    async def _note(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method == "POST":
            self._calls.write(f"{request.headers['X-Request-Id']}\n")
        return await handler(request)


@asynccontextmanager
async def noting_provider(calls: Path) -> AsyncIterator[str]:
    """Its address; it lives until the block ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.provider", str(calls),
        stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2], env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()
    finally:
        process.terminate()
        await process.wait()


async def _serve(calls: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    mock = NotingMock(calls)
    print(await mock.start(), flush=True)
    await stop.wait()
    await mock.stop()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))

"""Two gateways behind nginx, each with a folder of its own, on one Postgres and one Valkey; and clients of nginx.

The clients retry nothing and note all that they saw, so that it can be compared with the rows and with the provider's
own notes.
"""

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg

from gateway.mock.answers import DEMO
from tests.benchmarks.subjects import free_port
from tests.prove.kill_loop import Stage, environment, verify
from tests.prove.ledger import Ledger
from tests.prove.soak import LIMITS, Soak, healthy, look_at_limits
from tests.support.gateway import MODELS, chat_body
from tests.support.load import Call, Play
from tests.support.nginx import SERVED_BY, Nginx, running_nginx
from tests.support.process import Served, new_key, serving, until
from tests.support.provider import noting_provider

PROMPT = 11  # tokens, as the provider says
DRAIN_DELAY = 1  # seconds; what nginx has sent on its way when a gateway is taken out arrives within them
LONGEST_DRAIN = 140  # seconds


@dataclass(slots=True)
class Seen(Call):
    node: str = ""  # name of the gateway that answered
    tries: int = 0  # gateways that nginx asked for it
    whole: bool = False  # every word of it came, in order, with the provider's usage and the last word

    @property
    def failed(self) -> str:
        """What its client saw instead of a whole answer; "": nothing."""
        return "" if self.whole else f"{self.status or ''} {self.error or self.end}".strip()


class Node:
    """One gateway, with a port and a folder that stay when its process goes."""

    def __init__(self, name: str, environ: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.port = free_port()
        self.environ = {**environ, "GATEWAY_DATA_DIR": f"{environ['GATEWAY_DATA_DIR']}-{name}"}
        self._log = log
        self._process = AsyncExitStack()

    async def start(self) -> None:
        opening = serving(self.environ, port=self.port, coverage=False, log=self._log)
        self.served: Served = await self._process.enter_async_context(opening)

    async def stop(self) -> None:
        """SIGTERM; returns when it has let all end that it had begun."""
        assert await self.served.terminate(LONGEST_DRAIN) == 0
        await self._process.aclose()

    async def kill(self) -> None:
        self.served.process.kill()
        await self.served.process.wait()
        await self._process.aclose()

    async def close(self) -> None:
        await self._process.aclose()

    def journals(self) -> list[Path]:
        """Its own, and those that it has yet to adopt."""
        return list(Path(self.environ["GATEWAY_DATA_DIR"]).glob("journal/*/*/lock"))


@dataclass
class Fleet:
    nodes: Sequence[Node]
    nginx: Nginx
    client: aiohttp.ClientSession
    pool: asyncpg.Pool
    redis_url: str
    notes: Path  # ids that the provider was asked with, a line each
    key: str  # has every kind of limit, and reaches none
    seen: list[Seen] = field(default_factory=list)  # all that were asked, but those that a limit refused
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    async def restart(self, node: Node, *, announced: bool = True) -> None:
        """As nginx/gateway.conf says; not `announced`: nginx is not told."""
        if announced:
            self.nginx.take_out(node.name)
        await node.stop()
        await node.start()
        self.nginx.put_back(node.name)

    async def new_key(self, **limits: Any) -> str:
        return await new_key(self.nodes[0].served, **limits)

    async def ask(self, play: Play, key: str = "") -> Seen:
        """Through nginx, to its end. Raises nothing for what happens to it."""
        seen = Seen(f"call-{next(self._numbers)}", play)
        self.seen.append(seen)
        headers = {"Authorization": f"Bearer {key or self.key}", "X-Request-Id": seen.label}
        url = f"{self.nginx.base_url}/chat/completions"
        try:
            async with self.client.post(url, json=play.body, headers=headers) as response:
                self._look(response, seen)
                _read(await response.read(), response.content_type, seen)
        except aiohttp.ClientError as error:
            seen.end, seen.error = "cut", type(error).__name__
        return seen

    def _look(self, response: aiohttp.ClientResponse, seen: Seen) -> None:
        seen.status, seen.id = response.status, response.headers.get("X-Request-Id", "")
        tried = response.headers.get(SERVED_BY, "").split(", ")
        seen.tries = len(tried)
        seen.node = next((node.name for node in self.nodes if tried[-1].endswith(f":{node.port}")), "")

    async def count_that_pass(self, key: str, play: Play, count: int) -> int:
        """Of so many at once; the others were refused by a limit, and leave no row."""
        asked = await asyncio.gather(*(self.ask(play, key) for _ in range(count)))
        refused = [one for one in asked if one.status == 429]
        assert all(one.whole for one in asked if one not in refused), {one.failed for one in asked}
        self.seen = [one for one in self.seen if one not in refused]
        return count - len(refused)

    async def shipped(self) -> None:
        """Returns when all rows are in Postgres, those of the dead as well."""
        await until(lambda: all(len(node.journals()) == 1 for node in self.nodes))
        await healthy([node.served for node in self.nodes], settled=True)

    async def compare(self) -> Ledger:
        """What is in the database, beside what was seen here and at the provider."""
        await self.shipped()
        ledger = Ledger()
        await ledger.compare(self.pool, self.seen, set(self.notes.read_text().split()))
        ledger.chain = await verify(Stage(self.nodes[0].environ, self.notes, ledger))
        return ledger

    async def look_at_limits(self) -> Soak:
        """What is left in Redis; the slots of the dead are, for 30 s."""
        soak = Soak()
        await look_at_limits(self.nodes[0].served, self.redis_url, self.pool, self.key, soak)
        return soak


@asynccontextmanager
async def running_fleet(database_url: str, redis_url: str, data: Path) -> AsyncIterator[Fleet]:
    """Everything it needs is made in `data`."""
    async with AsyncExitStack() as opened:
        provider = await opened.enter_async_context(noting_provider(data / "calls"))
        environ = {
            **environment(data, database_url, redis_url, provider),
            "GATEWAY_TRUSTED_PROXIES": "1",
            "GATEWAY_NODES": "2",
            "GATEWAY_DRAIN_DELAY": str(DRAIN_DELAY),
        }
        nodes = [Node(name, environ, data / "gateway.log") for name in "ab"]
        opened.push_async_callback(_all, *(node.close for node in nodes))
        await _all(*(node.start for node in nodes))
        nginx = await opened.enter_async_context(running_nginx([node.port for node in nodes], data / "nginx"))
        connector = aiohttp.TCPConnector(limit=0)
        client = await opened.enter_async_context(
            aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120))
        )
        pool = await opened.enter_async_context(asyncpg.create_pool(database_url, min_size=1, max_size=2))
        key = await new_key(nodes[0].served, **LIMITS)
        yield Fleet(nodes, nginx, client, pool, redis_url, data / "calls", key)


async def _all(*works: Callable[[], Awaitable[None]]) -> None:
    await asyncio.gather(*(work() for work in works))


# --- clients ------------------------------------------------------------------------------------------------------


class Traffic:
    """So many streams and whole answers at a time, each followed by another until `stop`."""

    def __init__(self, fleet: Fleet, streams: int, answers: int, seconds: tuple[float, float]) -> None:
        """`seconds`: of the shortest and the longest stream."""
        self._fleet = fleet
        self._first = len(fleet.seen)
        self._streams = streams
        self._seconds = seconds
        self._stopping = False
        makers: list[Callable[[], Play]] = [*[self._stream] * streams, *[whole_answer] * answers]
        self._clients = [asyncio.create_task(self._run(make)) for make in makers]

    @property
    def seen(self) -> list[Seen]:
        return self._fleet.seen[self._first :]

    def open_streams(self, node: str = "") -> list[Seen]:
        """Those of which something has come by now, or all at one gateway."""
        found = [one for one in self.seen if one.end == "open" and one.status == 200 and one.play.kind == "stream"]
        return [one for one in found if node in ("", one.node)]

    async def flows(self) -> None:
        """Returns when all streams are open, or as many as can be while others end and begin."""
        await until(lambda: len(self.open_streams()) > 0.9 * self._streams)

    async def stop(self) -> None:
        """Returns when all that was begun has ended."""
        self._stopping = True
        await asyncio.gather(*self._clients)

    async def _run(self, make: Callable[[], Play]) -> None:
        while not self._stopping:
            seen = await self._fleet.ask(make())
            if not seen.whole:
                await asyncio.sleep(1)  # as Retry-After says

    def _stream(self) -> Play:
        pace = random.uniform(0.02, 0.05)  # seconds
        return stream(round(random.uniform(*self._seconds) / pace), pace)


def stream(tokens: int, pace: float) -> Play:
    """`pace`: seconds from one token to the next."""
    model = f"{random.choice([*MODELS.values()])}?tokens={tokens}&pace_ms={pace * 1000:.0f}&prompt_tokens={PROMPT}"
    body = chat_body(model, stream=True, stream_options={"include_usage": True})
    return Play("stream", body, "ok", (PROMPT, tokens))


def whole_answer() -> Play:
    model = f"{random.choice([*MODELS.values()])}?tokens=25&headers_ms=200&prompt_tokens={PROMPT}"
    return Play("whole", chat_body(model), "ok", (PROMPT, 25))


def _read(body: bytes, content_type: str, seen: Seen) -> None:
    if content_type not in ("text/event-stream", "application/json"):
        seen.end, seen.error = "cut", "by nginx"  # the gateway's part is not known
        return
    streamed = content_type == "text/event-stream"
    lines = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")] if streamed else [body]
    seen.end = "ended"
    events = [json.loads(line) for line in lines if line != b"[DONE]"]
    texts = [_text(choice) for event in events for choice in event.get("choices", ())]
    for event in events:
        seen.error = seen.error or (event.get("error") or {}).get("code", "")
        if usage := event.get("usage"):
            seen.tokens = usage["prompt_tokens"], usage["completion_tokens"]
    _, tokens = seen.play.tokens or (0, 0)
    said, pieces = "".join(texts), sum(1 for text in texts if text)
    in_order = bool(said) and said == (DEMO * (len(said) // len(DEMO) + 1))[: len(said)]
    complete = seen.tokens == seen.play.tokens and pieces == (tokens if streamed else 1)
    seen.whole = in_order and complete and not seen.error and (lines[-1] == b"[DONE]" or not streamed)


def _text(choice: dict[str, Any]) -> str:
    return (choice.get("delta") or choice.get("message") or {}).get("content") or ""

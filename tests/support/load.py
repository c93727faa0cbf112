"""Clients of every kind, for as long as they are let: each asks, reads or leaves, and notes what it saw."""

import asyncio
import json
import random
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from tests.support.gateway import MODELS, chat_body

TOO_LONG = 60.0  # seconds that no call of these takes
PAUSE = 0.02  # seconds before a client whose gateway is gone asks again

End = Literal[
    "open",
    "ended",  # it read `[DONE]`, an error event, or the whole body
    "left",  # it left, as it had meant to
    "cut",  # the gateway was gone first
]


@dataclass(frozen=True, slots=True)
class Play:
    """What a client asks for and does, and the row that is due when nobody is killed meanwhile."""

    kind: str
    body: dict[str, Any]
    outcome: str  # "": none
    tokens: tuple[int, int] | None = None  # prompt and completion, as the provider says them; None: it does not
    leaves_after: int | None = None  # events of a stream; 0: before its headers


@dataclass(slots=True)
class Call:
    label: str  # its own X-Request-Id: client_request_id of the row
    play: Play
    id: str = ""  # the gateway's X-Request-Id; "": no headers came
    status: int = 0
    end: End = "open"
    error: str = ""  # code of an error object or event
    tokens: tuple[int, int] | None = None  # of the usage that it read


@dataclass(slots=True)
class Door:
    """One gateway, as its clients know it."""

    url: str = ""  # "": nobody is there
    open_calls: int = 0
    answers: int = 0  # calls that ended, since it was last opened


def plays() -> list[tuple[Play, int]]:
    """Of each kind some, with how often it is played."""
    found: list[tuple[Play, int]] = []
    for model in MODELS.values():
        found += [(play, weight) for weight, play in _plays_of(model)]
    nowhere = Play("nowhere", chat_body("nowhere/none", stream=True), "")
    return [*found, (nowhere, 2)]


def _plays_of(model: str) -> Iterable[tuple[int, Play]]:
    def body(script: str, **more: Any) -> dict[str, Any]:
        return chat_body(f"{model}?{script}", **more)

    asking = {"stream": True, "stream_options": {"include_usage": True}}
    yield 8, Play("stream", body("tokens=20&pace_ms=5&prompt_tokens=11", **asking), "ok", (11, 20))
    yield 4, Play("stream", body("tokens=60&pace_ms=5&prompt_tokens=300", stream=True), "ok", (300, 60))
    yield 1, Play("long stream", body("tokens=350&pace_ms=20&prompt_tokens=70", stream=True), "ok", (70, 350))
    yield 3, Play("uncounted", body("tokens=20&pace_ms=5&fault=no_usage", stream=True), "ok")
    yield 6, Play("whole", body("tokens=25&prompt_tokens=17&headers_ms=50"), "ok", (17, 25))
    yield 4, Play("leaver", body("tokens=200&pace_ms=10", stream=True), "client_abort", leaves_after=10)
    yield 2, Play("early leaver", body("headers_ms=3000", stream=True), "client_abort", leaves_after=0)
    yield 1, Play("rejected", body("status=400", stream=True), "rejected", (0, 0))
    yield 1, Play("broken", body("tokens=20&pace_ms=5&fault=cut&after=5", stream=True), "upstream_error")


class Load:
    """`clients` that call at `doors` until `stop`, each at any door that is open. All calls are kept."""

    def __init__(self, doors: Sequence[Door], key: str, clients: int) -> None:
        self.calls: list[Call] = []
        self._doors = doors
        self._headers = {"Authorization": f"Bearer {key}"}
        self._plays, self._weights = zip(*plays(), strict=True)
        self._stopping = False
        self._clients = [asyncio.create_task(self._run(number)) for number in range(clients)]

    async def stop(self) -> None:
        """Every client ends the call it is at. Raises what a client did not expect."""
        self._stopping = True
        await asyncio.gather(*self._clients)

    async def _run(self, number: int) -> None:
        user = {"X-User-Id": f"user-{number % 5}"}
        async with aiohttp.ClientSession(headers={**self._headers, **user}) as session:
            while not self._stopping:
                open_doors = [door for door in self._doors if door.url]
                if not open_doors:
                    await asyncio.sleep(PAUSE)
                    continue
                await self._call(session, random.choice(open_doors))

    async def _call(self, session: aiohttp.ClientSession, door: Door) -> None:
        play = random.choices(self._plays, self._weights)[0]
        call = Call(f"call-{len(self.calls)}", play)
        self.calls.append(call)
        door.open_calls += 1
        try:
            async with asyncio.timeout(TOO_LONG):
                await make(session, door.url, call)
        except aiohttp.ClientError:
            if call.end == "open":
                call.end = "cut"
            await asyncio.sleep(PAUSE)
        finally:
            door.open_calls -= 1
        door.answers += call.end != "cut"


async def make(session: aiohttp.ClientSession, base_url: str, call: Call) -> None:
    """One call, to its end. Raises aiohttp.ClientError when the gateway is gone before that."""
    headers = {"X-Request-Id": call.label, "X-App-Id": call.play.kind}
    asking = session.post(f"{base_url}/chat/completions", json=call.play.body, headers=headers)
    if call.play.leaves_after == 0:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.3), asking as response:
                await _read(response, call)
                return
        call.end = "left"
        return
    async with asking as response:
        await _read(response, call)
        if call.end == "left":
            response.close()


async def _read(response: aiohttp.ClientResponse, call: Call) -> None:
    call.id, call.status = response.headers.get("X-Request-Id", ""), response.status
    if response.content_type != "text/event-stream":
        answer = json.loads(await response.read())
        call.error = answer.get("error", {}).get("code") or ""
        call.tokens = _tokens(answer)
        call.end = "ended"
        return
    events = 0
    async for line in response.content:
        if line.startswith(b"data: "):
            events += 1
            _hear(line[6:].strip(), call)
        if events == call.play.leaves_after:
            call.end = "left"
            return
    if call.end != "ended":
        raise aiohttp.ClientPayloadError("the stream ended without its last word")


def _hear(data: bytes, call: Call) -> None:
    if data == b"[DONE]":
        call.end = "ended"
    elif b'"usage":{' in data:
        call.tokens = _tokens(json.loads(data))
    elif data.startswith(b'{"error"'):
        call.error, call.end = json.loads(data)["error"]["code"] or "error", "ended"


def _tokens(answer: dict[str, Any]) -> tuple[int, int] | None:
    usage = answer.get("usage")
    return (usage["prompt_tokens"], usage["completion_tokens"]) if usage else None

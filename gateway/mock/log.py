"""What the mock received, for tests to look at: in this process as objects, over HTTP as JSON."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson

LOGGED = 2_000  # requests kept, at most
LOGGED_BODIES = 64 << 20  # bytes of their bodies
CREDENTIALS = frozenset({"authorization", "proxy-authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie"})

Phase = Literal[
    "body",  # the request is arriving
    "headers",  # silence before the response's headers
    "first_token",  # silence after them
    "stream",
    "stall",  # silence for ever
    "ended",
]


@dataclass(slots=True)
class Received:
    """One request and what became of it. One writer: the handler of that request."""

    time: float  # seconds, monotonic
    method: str
    path: str
    headers: Mapping[str, str]  # names in lower case
    body: bytes = b""
    model: str = ""  # with its query
    phase: Phase = "body"  # where the answer is, or was when the client left
    sent: int = 0  # bytes of the body handed to the connection
    finished: bool = False  # the answer, its fault included, was played to the end
    client_gone_at: float | None = None  # seconds, monotonic: the client left before that

    def to_json(self) -> dict[str, Any]:
        return {
            "time": self.time,
            "method": self.method,
            "path": self.path,
            "headers": {name: _hide(name, value) for name, value in self.headers.items()},
            "body": _readable(self.body),
            "model": self.model,
            "phase": self.phase,
            "sent": self.sent,
            "finished": self.finished,
            "client_gone_at": self.client_gone_at,
        }


class Log:
    """The last requests, oldest first, within a bound of memory."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self._bytes = 0  # of their bodies, at most: counted again when it is too much

    def open(self, method: str, path: str, headers: Mapping[str, str]) -> Received:
        lower = {name.lower(): value for name, value in headers.items()}
        received = Received(time.monotonic(), method, path, lower)
        self.received.append(received)
        return received

    def keep(self, received: Received, body: bytes) -> None:
        """Note the body, and forget what is too old to have room beside it."""
        received.body = body
        received.phase = "headers"
        if len(self.received) > LOGGED:
            del self.received[: LOGGED // 2]
        self._bytes += len(body)
        if self._bytes > LOGGED_BODIES:
            self._forget_bodies()

    def _forget_bodies(self) -> None:
        sizes = [len(received.body) for received in self.received]
        self._bytes = sum(sizes)
        drop = 0
        while self._bytes > LOGGED_BODIES // 2 and drop < len(sizes) - 1:
            self._bytes -= sizes[drop]
            drop += 1
        del self.received[:drop]

    def clear(self) -> None:
        self.received.clear()
        self._bytes = 0


def _hide(name: str, value: str) -> str:
    return f"…{value[-4:]}" if name in CREDENTIALS else value


def _readable(body: bytes) -> Any:
    """The JSON value of a body, or its text when it is none."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode("utf-8", "replace")

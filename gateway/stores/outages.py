"""What one process met at a provider, told to the others by Redis, so that each need not meet it itself.

A message that is lost costs one failed request, so nothing waits for Redis and nothing is sent twice.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any, Literal

import msgspec
from msgspec.structs import replace
from redis.asyncio import Redis
from redis.exceptions import RedisError

from gateway.exchange import new_id
from gateway.stores.channel import messages

log = logging.getLogger(__name__)

CHANNEL = "aig:outages"
MAX_WAITING = 256  # messages that are not sent yet; more are dropped
MAX_MESSAGE = 4096  # bytes; a longer one is not ours
PING_SECONDS = 5.0  # of silence on the channel, after which Redis is asked whether it is still there
PAUSE = 1.0  # seconds until the channel is opened again

Cause = Literal[
    "refused",  # the operator's credential
    "limited",  # a limit of the provider's is used up
    "busy",  # the provider has too much to do
]


class Outage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mark: str  # of the provider, see `mark_of`
    model: str  # the provider's own name for it; "": all
    cause: Cause
    seconds: float
    sender: str = ""  # written by Outages


_READER = msgspec.json.Decoder(Outage)


def mark_of(name: str, base_url: str, credential: str) -> str:
    """Who the same provider is, for processes that share a Redis: name, address and credential, none to be read off."""
    return sha256("\0".join((name, base_url, credential)).encode("utf-8", "surrogatepass")).hexdigest()


class Outages:
    """One a process. Whoever made `redis` closes it; `send` and `listen` end by being cancelled."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._id = new_id()  # this process's
        self._waiting: asyncio.Queue[bytes] = asyncio.Queue(MAX_WAITING)

    def tell(self, outage: Outage) -> None:
        """The others. Never waits and never raises."""
        if not self._waiting.full():
            self._waiting.put_nowait(msgspec.json.encode(replace(outage, sender=self._id)))

    async def send(self) -> None:
        """What is told. Until it is cancelled."""
        while True:
            message = await self._waiting.get()
            try:
                await self._redis.publish(CHANNEL, message)
            except (RedisError, OSError) as error:
                log.debug("an outage was not told: %s", type(error).__name__)

    async def listen(self, hear: Callable[[Outage], None]) -> None:
        """Gives `hear` what others tell. Comes back when Redis does, until it is cancelled."""
        while True:
            try:
                async with self._redis.pubsub() as channel:
                    await channel.subscribe(CHANNEL)
                    async for message in messages(channel, PING_SECONDS):
                        self._hear(message, hear)
            except (RedisError, OSError) as error:
                log.debug("the channel of outages broke: %s", type(error).__name__)
            await asyncio.sleep(PAUSE)

    def _hear(self, message: Mapping[str, Any], hear: Callable[[Outage], None]) -> None:
        if message["type"] == "message":
            outage = _read(message["data"])
            if outage is not None and outage.sender != self._id:
                hear(outage)


def _read(data: bytes) -> Outage | None:
    """None for what is no message of ours."""
    if len(data) > MAX_MESSAGE:
        return None
    try:
        outage = _READER.decode(data)
    except (msgspec.DecodeError, ValueError):
        return None
    return outage if 0 < outage.seconds < float("inf") else None

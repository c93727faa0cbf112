"""What is said on a channel of Redis (https://redis.io/docs/latest/develop/pubsub/)."""

from collections.abc import AsyncIterator
from typing import Any


async def messages(channel: Any, patience: float) -> AsyncIterator[dict[str, Any]]:
    """Each message, until the connection breaks: RedisError or OSError.

    After `patience` seconds of silence Redis is asked whether it is there; as many more, and that is a TimeoutError.
    """
    asked = False
    while True:
        message = await channel.get_message(timeout=patience)
        if message is not None:
            yield message
        elif asked:
            raise TimeoutError
        else:
            await channel.ping()
        asked = message is None

"""Secrets that all processes on a database share: given by a setting, or made once and kept beside the data."""

import secrets

from gateway.stores.postgres import COMMAND_TIMEOUT, Pool, connection

_KEEP = "insert into secrets (name, value) values ($1, $2) on conflict (name) do nothing"
_READ = "select value from secrets where name = $1"


async def load_pepper(pool: Pool, given: str) -> bytes:
    """The secret of all keys' digests."""
    return given.encode() if given else await kept_secret(pool, "key_pepper")


async def deployment_id(pool: Pool) -> str:
    """What tells this database from any other, so that one folder can hold the journals of several."""
    return (await kept_secret(pool, "deployment"))[:8].hex()


async def kept_secret(pool: Pool, name: str) -> bytes:
    """Random bytes; whoever asks first makes them. Raises Unavailable."""
    async with connection(pool) as borrowed:
        await borrowed.execute(_KEEP, name, secrets.token_bytes(32), timeout=COMMAND_TIMEOUT)
        value: bytes = await borrowed.fetchval(_READ, name, timeout=COMMAND_TIMEOUT)
    return value

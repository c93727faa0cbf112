"""Whose the files and batches are that lie in the operator's one account at a provider.

An object belongs to the account whose key made it, for good: who comes second does not take it over.
"""

from collections.abc import Collection

from gateway.protocol.endpoints import Kind
from gateway.stores.postgres import COMMAND_TIMEOUT, Pool, connection


class Belongings:
    """Of all accounts. Whoever made `pool` closes it. Every method raises Unavailable."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def check(self) -> None:
        """That Postgres is there: asked before a body is sent whose answer will have to be added."""
        async with connection(self._pool) as borrowed:
            await borrowed.execute(_CHECK, timeout=COMMAND_TIMEOUT)

    async def add(self, provider: str, kind: Kind, ids: Collection[str], account_id: str) -> None:
        """They are this account's, unless they are somebody's."""
        if ids:
            async with connection(self._pool) as borrowed:
                await borrowed.execute(_ADD, provider, kind, list(ids), account_id, timeout=COMMAND_TIMEOUT)

    async def owned(self, provider: str, kind: Kind, ids: Collection[str], account_id: str) -> set[str]:
        """Those of them that are this account's."""
        if not ids:
            return set()
        async with connection(self._pool) as borrowed:
            rows = await borrowed.fetch(_OWNED, provider, kind, list(ids), account_id, timeout=COMMAND_TIMEOUT)
        return {row["id"] for row in rows}

    async def has_others(self, provider: str, kind: Kind, ids: Collection[str], account_id: str) -> bool:
        """Whether there are any of this account's beside them."""
        async with connection(self._pool) as borrowed:
            found = await borrowed.fetchval(_HAS_OTHERS, provider, kind, list(ids), account_id, timeout=COMMAND_TIMEOUT)
        return bool(found)

    async def forget(self, provider: str, kind: Kind, object_id: str) -> None:
        """The provider has it no more."""
        async with connection(self._pool) as borrowed:
            await borrowed.execute(_FORGET, provider, kind, object_id, timeout=COMMAND_TIMEOUT)


_CHECK = "select from belongings limit 0"
_ADD = """
insert into belongings (provider, kind, id, account_id)
select $1, $2, id, $4 from unnest($3::text[]) as id
on conflict do nothing
"""
_OWNED = """
select id from belongings where provider = $1 and kind = $2 and id = any($3::text[]) and account_id = $4
"""
# Not as an anti-join: a plan for any array takes it for ten ids, and compares each row with each of ten thousand.
_HAS_OTHERS = """
select exists (
    select id from belongings where provider = $1 and kind = $2 and account_id = $4
    except select unnest($3::text[])
)
"""
_FORGET = "delete from belongings where provider = $1 and kind = $2 and id = $3"

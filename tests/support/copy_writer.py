"""As tests/support/journal_writer.py, with a second copy in Redis: `python -m tests.support.copy_writer`.

Ended rows wait a second before they are shipped, so that whoever kills it finds some that are not.
"""

import asyncio
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg

from gateway.stores import copy as copy_module
from gateway.stores.copy import UsageCopy
from gateway.stores.journal import Journal
from gateway.stores.script import connect_redis
from gateway.stores.shipper import Shipper
from tests.support.journal_writer import begun

LINGER = 1.0  # seconds


def tell(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def exchange(journal: Journal, copy: UsageCopy) -> None:
    first = begun()
    tell("about", first.request_id)
    journal.begin(first)
    await copy.begun(first)
    tell("begun", first.request_id)
    await asyncio.sleep(random.random() * 0.3)
    if random.random() < 0.05:
        tell("voiding", first.request_id)
        journal.void(first.request_id)
        copy.forget([first.request_id])
        return
    figures = first.request_id, random.randrange(1000), random.randrange(1000)
    last = replace(first, outcome="ok", prompt_tokens=figures[1], completion_tokens=figures[2], cost_micros=1)
    tell("ending", *figures)
    journal.end(last)
    copied = copy.ended(last)
    await journal.synced()
    await copied
    tell("ended", *figures)


async def work(root: Path, database_url: str, redis_url: str, rate: float) -> None:
    journal = Journal(root)
    redis = connect_redis(redis_url)
    # A time-out that no busy machine exceeds: without a copy nothing would be proved.
    copy = UsageCopy(redis, journal.folder.name, deployment="test", on_error=lambda _: os._exit(1), timeout=5.0)
    async with asyncpg.create_pool(database_url, min_size=0, max_size=2) as pool:
        shipper = Shipper(pool, journal, copy=copy, linger=LINGER)
        background: set[asyncio.Task[Any]] = {asyncio.create_task(copy.run()), asyncio.create_task(shipper.run())}
        while True:
            task = asyncio.create_task(exchange(journal, copy))
            background.add(task)
            task.add_done_callback(background.discard)
            await asyncio.sleep(1 / rate)


if __name__ == "__main__":
    copy_module.ALIVE, copy_module.RENEW_EVERY = 2.0, 0.3
    asyncio.run(work(Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])))

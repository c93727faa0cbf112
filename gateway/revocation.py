"""Ends what is still being answered for a key that was revoked or has expired. A new request does not get that far.

A change that is heard of is looked at within a second. Since Redis may be gone, and an expiry is announced by nobody,
the keys of all open exchanges are looked at every few seconds as well, with one statement.
"""

import asyncio
import logging

from gateway.protocol.errors import Unavailable
from gateway.pulse import Pulse
from gateway.stores.keys import KeyStore

log = logging.getLogger("gateway.revocation")

LOOK = 5.0  # seconds between two looks when no change is heard of
REST = 1.0  # seconds between two looks at least


async def end_revoked(keys: KeyStore, pulse: Pulse) -> None:
    """Until it is cancelled. While Postgres is gone nothing is ended, as nothing is refused to a key that is known."""
    while True:
        await keys.wait_for_change(LOOK)
        try:
            if pulse.open_keys:
                pulse.end_keys(await keys.ended(pulse.open_keys))
        except Unavailable:
            pass
        except Exception:  # a table that is being restored, a right that was taken: the next look may do better
            log.exception("the keys of what is being answered cannot be looked at")
        await asyncio.sleep(REST)

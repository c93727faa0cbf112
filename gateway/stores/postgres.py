"""How every store borrows a connection, and the one place where an outage of Postgres becomes an error of ours.

What a constraint refuses is no outage: it is read beside the statement that it refused, which knows what it means.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING

import asyncpg
from asyncpg import exceptions as pg

from gateway.protocol.errors import Unavailable

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Pool = asyncpg.Pool[asyncpg.Record]
    Connection = PoolConnectionProxy[asyncpg.Record]
else:
    Pool = Connection = object  # generic for mypy only: asyncpg's own classes take no parameters

ACQUIRE_TIMEOUT = 1.0  # seconds to wait for a free connection
COMMAND_TIMEOUT = 2.0  # seconds for one statement that reads or writes a few rows, a wait for a lock included
# While a completion waits for it: a silent Postgres must not be felt for longer than half a second, which is both.
HOT_ACQUIRE_TIMEOUT = 0.1  # seconds
HOT_COMMAND_TIMEOUT = 0.35  # seconds

# SQLSTATE classes: https://www.postgresql.org/docs/current/errcodes-appendix.html
_GONE = (
    OSError,  # refused, reset, no such host, no socket file; TimeoutError is one of them
    pg.PostgresConnectionError,  # class 08
    pg.InvalidAuthorizationSpecificationError,  # class 28: our credential was changed under us
    pg.InvalidCatalogNameError,  # class 3D: no such database, so none that is ours
    pg.TransactionRollbackError,  # class 40: serialization, deadlock
    pg.InsufficientResourcesError,  # class 53: disk full, out of memory, too many connections
    pg.ObjectNotInPrerequisiteStateError,  # class 55: the database takes no connections now, a lock was not to be had
    pg.OperatorInterventionError,  # class 57: shutting down, starting up, statement_timeout
    pg.PostgresIOError,  # class 58
    pg.ReadOnlySQLTransactionError,  # a primary that has just become a standby
    # No primary among the hosts, in the middle of a fail-over; and what asyncpg says of itself when a connection was
    # ended between two of its steps (https://github.com/MagicStack/asyncpg/issues/1069).
    asyncpg.InternalClientError,
)

# What kept Postgres from answering, in a word; the first that fits.
_KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (TimeoutError, "timeout"),
    (pg.TransactionRollbackError, "conflict"),
    (pg.InsufficientResourcesError, "resources"),
    (pg.OperatorInterventionError, "shutdown"),
    (pg.ReadOnlySQLTransactionError, "readonly"),
    (OSError, "connection"),
    (pg.PostgresConnectionError, "connection"),
    (asyncpg.InterfaceError, "connection"),
    (asyncpg.InternalClientError, "connection"),
)
KINDS = ("timeout", "connection", "shutdown", "readonly", "resources", "conflict", "error")


def kind_of(error: BaseException) -> str:
    """One of KINDS; of an Unavailable, of what it was raised from."""
    if isinstance(error, Unavailable) and error.__cause__ is not None:
        error = error.__cause__
    return next((kind for cls, kind in _KINDS if isinstance(error, cls)), "error")


@contextmanager
def database_errors() -> Iterator[None]:
    """Raises Unavailable (`database_unavailable`) for every error that means "Postgres is gone"; all others pass.

    Put it around awaits on Postgres alone: an OSError of somebody else's must not be blamed on it.
    """
    try:
        yield
    except _GONE as error:
        raise _unavailable() from error
    except asyncpg.InterfaceError as error:
        # Also the class of asyncpg's complaints about our own mistakes: only a closed pool or connection is an outage.
        if "clos" not in str(error):
            raise
        raise _unavailable() from error


def _unavailable() -> Unavailable:
    return Unavailable("the database cannot be reached", code="database_unavailable", retry_after=1)


@asynccontextmanager
async def connection(pool: Pool, wait: float = ACQUIRE_TIMEOUT) -> AsyncIterator[Connection]:
    """A connection for one statement or transaction, after `wait` seconds at most. Raises as `database_errors` does.

    A statement needs a `timeout` of its own: `asyncio.wait_for` around asyncpg waits for the cancelled statement, which
    on a stalled server takes a minute.
    """
    with database_errors():
        borrowed = await pool.acquire(timeout=wait)
        try:
            yield borrowed
        except TimeoutError:
            with suppress(asyncpg.InterfaceError):  # it was lost meanwhile, and its pool has it back
                borrowed.terminate()  # its server does not answer: asking it to cancel would wait again
            raise
        finally:
            # A connection that cannot be reset is closed by its pool; the answer that we have stays good.
            with suppress(*_GONE, asyncpg.InterfaceError):
                await pool.release(borrowed, timeout=HOT_COMMAND_TIMEOUT)

"""Connections to all providers: kept while they are idle, made when there is none.

Whoever takes a connection owns it until its answer's end, when it comes back by itself, or until it is cut (see http1).
The one that came back last is taken first, so that those that are too many grow old.
"""

import asyncio
import re
import socket
import ssl
from base64 import b64encode
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple, cast
from urllib.parse import unquote, urlsplit

import aiohappyeyeballs
from aiohappyeyeballs import AddrInfoType

from gateway.http1 import MAX_HEAD, Connection

IDLE = 30.0  # seconds that an idle connection is kept, and up to SWEEP more; nginx closes it after 75, node after 5
SWEEP = 5.0  # seconds between two looks at the idle connections
FRESH = 60.0  # seconds that addresses are used without asking again
STALE = 600.0  # seconds that they are used when asking fails
ATTEMPT_DELAY = 0.25  # seconds until the next address is tried beside the one before (RFC 8305 5)


class Origin(NamedTuple):
    """RFC 6454 4. Its connections are alike: any of them will do."""

    secure: bool
    host: str  # an IPv6 address without its brackets
    port: int


class Unreachable(Exception):
    """There is no connection, and nothing was sent. `words` has a place, `{}`, for who was to be reached."""

    def __init__(self, kind: Literal["dns", "tls", "connect", "timeout_connect"], words: str) -> None:
        super().__init__(words)
        self.kind = kind
        self.words = words


@dataclass(frozen=True, slots=True)
class Proxy:
    """Through which https providers are reached, by CONNECT (RFC 9110 9.3.6)."""

    origin: Origin
    authorization: str = field(default="", repr=False)


def parse_proxy(url: str) -> Proxy | None:
    """Of `http://[user:password@]host[:port]`, which was checked; None for none."""
    if not url:
        return None
    parts = urlsplit(url)
    origin = Origin(False, parts.hostname or "", parts.port or 80)
    if parts.username is None:
        return Proxy(origin)
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return Proxy(origin, f"Basic {b64encode(pair.encode()).decode()}")


class Pool:
    """All connections of an Upstream, which closes it. Their number has no limit here: the gateway's own bound it."""

    def __init__(self, connect_timeout: float, proxy: Proxy | None) -> None:
        self._connect_timeout = connect_timeout  # seconds: names, TCP, the proxy and TLS
        self._proxy = proxy
        self._open: set[Connection] = set()
        # Since when, seconds, monotonic; the last one came last.
        self._idle: defaultdict[Origin, dict[Connection, float]] = defaultdict(dict)
        self._sweeper: asyncio.TimerHandle | None = None
        self._addresses = _Addresses()
        self._context: asyncio.Task[ssl.SSLContext] | None = None

    # --- idle ones

    def take(self, origin: Origin) -> Connection | None:
        """An idle connection that is still good as far as the kernel knows."""
        idle = self._idle[origin]
        while idle:
            connection, _ = idle.popitem()
            if connection.is_silent:
                return connection
            connection.cut()
        return None

    def _keep(self, origin: Origin, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        self._idle[origin][connection] = loop.time()
        if self._sweeper is None:
            self._sweeper = loop.call_later(SWEEP, self._sweep)

    def _forget(self, origin: Origin, connection: Connection) -> None:
        self._open.discard(connection)
        self._idle[origin].pop(connection, None)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        oldest = loop.time() - IDLE
        for idle in self._idle.values():
            for connection in [connection for connection, since in idle.items() if since < oldest]:
                del idle[connection]
                connection.cut()
        self._sweeper = loop.call_later(SWEEP, self._sweep) if any(self._idle.values()) else None

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._idle.clear()
        for connection in list(self._open):
            connection.cut()
        self._addresses.close()
        if self._context is not None:
            self._context.cancel()
        await asyncio.sleep(0)  # the loop closes their sockets in its next turn

    # --- new ones

    async def connect(self, origin: Origin) -> Connection:
        """A fresh connection. Raises Unreachable; a cancellation leaves nothing open."""
        connection = Connection(partial(self._keep, origin), partial(self._forget, origin))
        proxy = self._proxy if origin.secure else None
        try:
            async with asyncio.timeout(self._connect_timeout):
                await (self._dial(origin, connection) if proxy is None else self._tunnel(origin, proxy, connection))
        except TimeoutError:
            raise Unreachable("timeout_connect", "{} could not be connected to in time") from None
        except ssl.SSLError:
            raise Unreachable("tls", "TLS with {} failed") from None
        except OSError:
            raise Unreachable("connect", "{} cannot be reached") from None
        if connection.is_open:
            self._open.add(connection)
        return connection

    async def _dial(self, origin: Origin, connection: Connection) -> None:
        context = await self._tls() if origin.secure else None
        name = origin.host if origin.secure else None
        wire = await _connected(await self._addresses.of(origin))
        await asyncio.get_running_loop().create_connection(
            lambda: connection, sock=wire, ssl=context, server_hostname=name
        )

    async def _tunnel(self, origin: Origin, proxy: Proxy, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        context = await self._tls()
        try:
            wire = await _connected(await self._addresses.of(proxy.origin))
        except Unreachable:
            raise Unreachable("dns", "the address of the proxy to {} cannot be resolved") from None
        except OSError:
            raise Unreachable("connect", "the proxy to {} cannot be reached") from None
        transport, asked = await loop.create_connection(partial(_Asked, origin, proxy), sock=wire)
        try:
            await asked.answer
            secured = await loop.start_tls(transport, connection, context, server_hostname=origin.host)
        except BaseException:
            transport.abort()
            raise
        connection.connection_made(cast(asyncio.Transport, secured))

    async def _tls(self) -> ssl.SSLContext:
        """Made in a thread when it is first needed: it reads a few hundred certificates, which takes 40 ms."""
        failed = self._context is not None and self._context.done() and self._context.exception() is not None
        if self._context is None or failed:
            self._context = asyncio.create_task(asyncio.to_thread(_verifying))
        return await asyncio.shield(self._context)


def _verifying() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


async def _connected(addresses: Sequence[AddrInfoType]) -> socket.socket:
    """A socket to the first address that answers. Raises OSError."""
    loop = asyncio.get_running_loop()
    try:
        wire = await aiohappyeyeballs.start_connection(
            addresses, happy_eyeballs_delay=ATTEMPT_DELAY, interleave=1, loop=loop
        )
    except RuntimeError as error:  # uvloop's word for some of them
        raise OSError(str(error)) from None
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return wire


class _Addresses:
    """Of hosts, asked of the system's resolver; all who wait for the same one ask once."""

    def __init__(self) -> None:
        self._found: dict[Origin, tuple[float, list[AddrInfoType]]] = {}  # when, seconds, monotonic
        self._asking: dict[Origin, asyncio.Task[list[AddrInfoType]]] = {}

    async def of(self, origin: Origin) -> list[AddrInfoType]:
        """Another one first each time, as aiohttp does. Raises Unreachable."""
        found = self._known(origin, FRESH)
        if not found:
            if origin not in self._asking:
                self._asking[origin] = asyncio.create_task(self._ask(origin))
            found = await asyncio.shield(self._asking[origin])
        if not found:
            raise Unreachable("dns", "the address of {} cannot be resolved")
        addresses = list(found)
        found.append(found.pop(0))
        return addresses

    def _known(self, origin: Origin, limit: float) -> list[AddrInfoType]:
        when, found = self._found.get(origin, (0.0, []))
        return found if found and asyncio.get_running_loop().time() - when < limit else []

    async def _ask(self, origin: Origin) -> list[AddrInfoType]:
        """Never raises; empty when there is none."""
        loop = asyncio.get_running_loop()
        # An address that is given as one is used as it is, also on a machine without a network.
        given = ":" in origin.host or origin.host.replace(".", "").isdecimal()
        try:
            found = await loop.getaddrinfo(
                origin.host, origin.port, type=socket.SOCK_STREAM, flags=0 if given else socket.AI_ADDRCONFIG
            )
            self._found[origin] = loop.time(), list(found)
            return self._found[origin][1]
        except (OSError, UnicodeError):
            return self._known(origin, STALE)
        finally:
            del self._asking[origin]

    def close(self) -> None:
        for task in self._asking.values():
            task.cancel()


class _Asked(asyncio.Protocol):
    """A proxy that was asked for a tunnel, until it has answered."""

    def __init__(self, origin: Origin, proxy: Proxy) -> None:
        authority = f"[{origin.host}]" if ":" in origin.host else origin.host
        lines = [f"CONNECT {authority}:{origin.port} HTTP/1.1", f"Host: {authority}:{origin.port}"]
        if proxy.authorization:
            lines.append(f"Proxy-Authorization: {proxy.authorization}")
        self._request = "\r\n".join([*lines, "", ""]).encode()
        self._head = b""
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # raises Unreachable

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self._head += data
        head, end, rest = self._head.partition(b"\r\n\r\n")
        if self.answer.done() or not (end or len(head) > MAX_HEAD):
            return
        status = re.match(rb"HTTP/1\.[01] ([1-9]\d\d)[ \r\n]", self._head)
        # A server speaks second in TLS: what follows the head would be the proxy's own.
        if status is None or not end or rest:
            self._refuse("the proxy to {} did not answer in HTTP")
        elif status[1].startswith(b"2"):
            self.answer.set_result(None)
        else:
            self._refuse(f"the proxy to {{}} answered {status[1].decode()}")

    def connection_lost(self, error: Exception | None) -> None:
        self._refuse("the proxy to {} closed the connection")

    def _refuse(self, words: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(Unreachable("connect", words))

"""Connections to all providers: kept while they are idle, made when there is none.

Whoever takes a connection owns it until its answer's end, when it comes back by itself, or until it is cut (see http1).
The one that came back last is taken first, so that those that are too many grow old.
"""

import asyncio
import errno
import ipaddress
import re
import socket
import ssl
from base64 import b64encode
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Literal, NamedTuple, cast
from urllib.parse import unquote, urlsplit

import aiohappyeyeballs
from aiohappyeyeballs import AddrInfoType

from gateway.http1 import MAX_HEAD, Connection

IDLE = 30.0  # seconds that an idle connection is kept, and up to SWEEP more; nginx closes it after 75, node after 5
SWEEP = 5.0  # seconds between two looks at the idle connections
# Bytes that the kernel takes of a provider while its client does not read. Left to itself it goes up to tens of
# megabytes; this, which it doubles, is 80 Mbit/s over 100 ms for each stream.
RECEIVED = 1 << 19
FRESH = 60.0  # seconds that addresses are used without asking again
STALE = 600.0  # seconds that they are used when asking fails, or takes longer than PATIENCE
PATIENCE = 1.0  # seconds; a resolver that is gone takes ten or more to say so (resolv.conf(5): attempts, timeout)
ATTEMPT_DELAY = 0.25  # seconds until the next address is tried beside the one before (RFC 8305 5)

# Where clouds hand credentials to whoever asks from their machine: 169.254.169.254, 169.254.170.2 and fd00:ec2::254
# (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html), Google's fd20:ce::254 and
# Alibaba's 100.100.100.200. No provider is there. Other private addresses and loopback are allowed: local models have
# them, and addresses come from the operator alone.
_FORBIDDEN = tuple(
    map(
        ipaddress.ip_network,
        ("169.254.0.0/16", "fe80::/10", "fd00:ec2::/32", "fd20:ce::254/128", "100.100.100.200/32"),
    )
)
_FORBIDDEN_WORDS = "{} is at an address that is never connected to"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: its last 32 bits are an IPv4 address


class Origin(NamedTuple):
    """RFC 6454 4. Its connections are alike: any of them will do."""

    secure: bool
    host: str  # an IPv6 address without its brackets
    port: int


# What is short here, and not at the provider: descriptors, of this process or of the machine, and memory.
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Unreachable(Exception):
    """There is no connection, and nothing was sent. `words` has a place, `{}`, for who was to be reached."""

    def __init__(self, kind: Literal["dns", "tls", "connect", "timeout_connect", "exhausted"], words: str) -> None:
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
        self._owners: dict[Origin, tuple[Callable[[Connection], None], Callable[[Connection], None]]] = {}
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

    def _owner(self, origin: Origin) -> tuple[Callable[[Connection], None], Callable[[Connection], None]]:
        """What its connections call. They share it: one of its own is half a kilobyte of each."""
        if origin not in self._owners:
            self._owners[origin] = partial(self._keep, origin), partial(self._forget, origin)
        return self._owners[origin]

    def _keep(self, origin: Origin, connection: Connection) -> None:
        self._idle[origin][connection] = monotonic()
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(SWEEP, self._sweep)

    def _forget(self, origin: Origin, connection: Connection) -> None:
        self._open.discard(connection)
        self._idle[origin].pop(connection, None)

    def _sweep(self) -> None:
        oldest = monotonic() - IDLE
        for idle in self._idle.values():
            for connection in [connection for connection, since in idle.items() if since < oldest]:
                del idle[connection]
                connection.cut()
        kept = any(self._idle.values())
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP, self._sweep) if kept else None

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
        connection = Connection(*self._owner(origin))
        proxy = self._proxy if origin.secure else None
        try:
            async with asyncio.timeout(self._connect_timeout):
                await (self._dial(origin, connection) if proxy is None else self._tunnel(origin, proxy, connection))
        except TimeoutError:
            raise Unreachable("timeout_connect", "{} could not be connected to in time") from None
        except ssl.SSLError:
            raise Unreachable("tls", "TLS with {} failed") from None
        except OSError as error:
            if error.errno in _OURS:
                raise Unreachable("exhausted", "the gateway has no room for a connection to {}") from None
            raise Unreachable("connect", "{} cannot be reached") from None
        if connection.is_open:
            self._open.add(connection)
        return connection

    async def _dial(self, origin: Origin, connection: Connection) -> None:
        context = await self._tls() if origin.secure else None
        name = origin.host if origin.secure else None
        wire = await self._reach(origin)
        await asyncio.get_running_loop().create_connection(
            lambda: connection, sock=wire, ssl=context, server_hostname=name
        )

    async def _tunnel(self, origin: Origin, proxy: Proxy, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        context = await self._tls()
        if _is_forbidden(origin.host):  # a name is the proxy's to resolve
            raise Unreachable("connect", _FORBIDDEN_WORDS)
        try:
            wire = await self._reach(proxy.origin)
        except Unreachable as error:
            raise Unreachable(error.kind, error.words.format("the proxy to {}")) from None
        except OSError as error:
            if error.errno in _OURS:
                raise
            raise Unreachable("connect", "the proxy to {} cannot be reached") from None
        transport, asked = await loop.create_connection(partial(_Asked, origin, proxy), sock=wire)
        try:
            await asked.answer
            secured = await loop.start_tls(transport, connection, context, server_hostname=origin.host)
        except BaseException:
            transport.abort()
            raise
        connection.connection_made(cast(asyncio.Transport, secured))

    async def _reach(self, origin: Origin) -> socket.socket:
        """Raises OSError and Unreachable."""
        addresses = await self._addresses.of(origin)
        try:
            return await _connected(addresses)
        except BaseException:  # nobody answers there, or not in time: it may have moved
            self._addresses.doubt(origin)
            raise

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
    """A socket to the first address that answers. Raises OSError, and Unreachable when none may be connected to."""
    loop = asyncio.get_running_loop()
    addresses = [address for address in addresses if not _is_forbidden(address[4][0])]
    if not addresses:
        raise Unreachable("connect", _FORBIDDEN_WORDS)
    try:
        wire = await aiohappyeyeballs.start_connection(
            addresses, happy_eyeballs_delay=ATTEMPT_DELAY, interleave=1, loop=loop
        )
    except RuntimeError as error:  # uvloop's word for some of them
        raise OSError(str(error)) from None
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVED)
    return wire


def _is_forbidden(host: str | int) -> bool:
    """Whether it is the text of an address that nobody may connect to; looked at after the name was resolved, so that
    no name can hide one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in _NAT64:
            address = ipaddress.IPv4Address(address.packed[-4:])
    return any(address in network for network in _FORBIDDEN)


class _Addresses:
    """Of hosts, asked of the system's resolver; all who wait for the same one ask once."""

    def __init__(self) -> None:
        self._found: dict[Origin, tuple[float, list[AddrInfoType]]] = {}  # when, seconds, monotonic
        self._asking: dict[Origin, asyncio.Task[None]] = {}

    async def of(self, origin: Origin) -> list[AddrInfoType]:
        """Another one first each time, as aiohttp does. Raises Unreachable."""
        found = self._known(origin, FRESH)
        if not found:
            if origin not in self._asking:
                self._asking[origin] = asyncio.create_task(self._ask(origin))
            await asyncio.wait({self._asking[origin]}, timeout=PATIENCE if self._known(origin, STALE) else None)
            found = self._known(origin, STALE)
        if not found:
            raise Unreachable("dns", "the address of {} cannot be resolved")
        addresses = list(found)
        found.append(found.pop(0))
        return addresses

    def doubt(self, origin: Origin) -> None:
        """The next who wants them asks again."""
        when, found = self._found[origin]
        self._found[origin] = min(when, asyncio.get_running_loop().time() - FRESH), found

    def _known(self, origin: Origin, limit: float) -> list[AddrInfoType]:
        when, found = self._found.get(origin, (0.0, []))
        return found if found and asyncio.get_running_loop().time() - when < limit else []

    async def _ask(self, origin: Origin) -> None:
        """Never raises."""
        loop = asyncio.get_running_loop()
        # An address that is given as one is used as it is, also on a machine without a network.
        given = ":" in origin.host or origin.host.replace(".", "").isdecimal()
        try:
            found = await loop.getaddrinfo(
                origin.host, origin.port, type=socket.SOCK_STREAM, flags=0 if given else socket.AI_ADDRCONFIG
            )
            self._found[origin] = loop.time(), list(found)
        except (OSError, UnicodeError):
            pass  # what was known before is used
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

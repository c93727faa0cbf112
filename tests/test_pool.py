"""Which connections are used, how new ones are made, and through whom."""

import asyncio
import os
import socket
import ssl
import subprocess
from base64 import b64encode
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from gateway import pool
from gateway.protocol.errors import UpstreamError, UpstreamTruncated
from tests.support.far import (
    CLOSE,
    HELLO,
    OK,
    Far,
    ask,
    cancelled,
    client,
    exchange,
    free_port,
    idle,
    listening,
    on_asyncio,
    provider,
    read_request,
)

pytestmark = pytest.mark.mock

# --- idle ones


async def test_connections_are_used_again_the_last_one_first() -> None:
    async with provider([HELLO]) as far, client() as upstream:
        answers = await asyncio.gather(*[ask(upstream, far.address) for _ in range(3)])
        for answer in answers:
            await answer.body(10)
        assert (far.accepted, idle(upstream)) == (3, 3)
        for _ in range(5):
            await exchange(upstream, far.address)
        assert (far.accepted, idle(upstream)) == (3, 3)
        assert len(set(far.ports[-5:])) == 1, "the others may grow old"


async def test_origins_do_not_share_connections() -> None:
    async with provider([HELLO]) as far, provider([HELLO]) as other, client() as upstream:
        for address in (far.address, other.address, far.address.replace("localhost", "127.0.0.1"), far.address):
            await exchange(upstream, address)
        assert (far.accepted, other.accepted) == (2, 1)


@pytest.mark.parametrize("how", ["goodbye", "reset", "talk"])
async def test_an_idle_connection_that_ends_or_talks_is_dropped_at_once(how: str) -> None:
    async with provider([HELLO]) as far, client() as upstream:
        await exchange(upstream, far.address)
        assert idle(upstream) == 1
        [writer] = far.writers
        if how == "goodbye":
            writer.write_eof()
        elif how == "reset":
            writer.transport.abort()
        else:
            writer.write(HELLO)
        async with asyncio.timeout(2):
            while idle(upstream):
                await asyncio.sleep(0.001)
        assert await exchange(upstream, far.address) == b"hello"
        assert far.accepted == 2


async def test_what_a_provider_sends_unasked_is_never_read_as_an_answer() -> None:
    """Also when the loop has not read it yet at the time the next request wants a connection."""
    evil = HELLO.replace(b"hello", b"wrong")
    async with provider([HELLO]) as far, client() as upstream:
        for _ in range(20):
            await exchange(upstream, far.address)
            [writer] = far.writers
            os.write(writer.get_extra_info("socket").fileno(), evil)  # at once, without a turn of the loop
            assert await exchange(upstream, far.address) == b"hello"
            async with asyncio.timeout(2):
                while len(far.writers) > 1:
                    await asyncio.sleep(0.001)


async def test_idle_connections_grow_old_under_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "IDLE", 0.1)
    monkeypatch.setattr(pool, "SWEEP", 0.02)
    async with provider([HELLO]) as far, client() as upstream:
        await exchange(upstream, far.address)
        await far.emptied()
        assert idle(upstream) == 0
        async with asyncio.timeout(2):
            while upstream._pool._sweeper is not None:
                await asyncio.sleep(0.01)
        await exchange(upstream, far.address)
        assert upstream._pool._sweeper is not None
        assert far.accepted == 2


# --- new ones


async def test_addresses_are_asked_for_once_and_kept_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    ask_system = pool._Addresses._ask

    async def count(self: pool._Addresses, origin: pool.Origin) -> Any:
        nonlocal asked
        asked += 1
        return await ask_system(self, origin)

    monkeypatch.setattr(pool._Addresses, "_ask", count)
    async with provider([HELLO]) as far, client() as upstream:
        answers = await asyncio.gather(*[ask(upstream, far.address) for _ in range(10)])
        for answer in answers:
            answer.close()
        await exchange(upstream, far.address)
        assert asked == 1
        monkeypatch.setattr(pool, "FRESH", 0)
        await asyncio.gather(*[ask(upstream, far.address) for _ in range(20)])  # more than are idle
        assert asked == 2


Resolve = Callable[[str], Coroutine[Any, Any, list[str]]]


def resolving(monkeypatch: pytest.MonkeyPatch, resolve: Resolve) -> None:
    """Names are what `resolve` says, on asyncio's own loop: uvloop's methods cannot be replaced."""

    async def getaddrinfo(host: str, port: int, **more: Any) -> list[Any]:
        families = {False: socket.AF_INET, True: socket.AF_INET6}
        found = await resolve(host)
        return [
            (
                families[":" in text],
                socket.SOCK_STREAM,
                socket.IPPROTO_TCP,
                "",
                (text, port, 0, 0)[: 4 if ":" in text else 2],
            )
            for text in found
        ]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)


async def down(host: str) -> list[str]:
    raise socket.gaierror(socket.EAI_AGAIN, "the resolver is down")


async def silent(host: str) -> list[str]:
    await asyncio.sleep(60)
    raise AssertionError("nobody waits for that")


@pytest.mark.parametrize("resolver", [down, silent])
def test_addresses_that_are_known_are_used_while_they_cannot_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, resolver: Resolve
) -> None:
    monkeypatch.setattr(pool, "FRESH", 0)
    monkeypatch.setattr(pool, "PATIENCE", 0.05)

    async def scenario() -> None:
        async with provider([HELLO]) as far, client(GATEWAY_CONNECT_TIMEOUT="1") as upstream:
            await exchange(upstream, far.address)
            resolving(monkeypatch, resolver)
            await asyncio.gather(*[exchange(upstream, far.address) for _ in range(2)])
            assert far.accepted == 2
            monkeypatch.setattr(pool, "STALE", 0)
            with pytest.raises(UpstreamError) as raised:
                await asyncio.gather(*[exchange(upstream, far.address) for _ in range(3)])
            assert raised.value.kind == ("dns" if resolver is down else "timeout_connect")

    on_asyncio(scenario())


def test_a_name_is_asked_for_again_when_nobody_answers_at_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [["127.0.0.2"], ["127.0.0.1"]]

    async def moved(host: str) -> list[str]:
        return answers.pop(0)

    async def scenario() -> None:
        async with provider([HELLO]) as far, client() as upstream:
            resolving(monkeypatch, moved)
            with pytest.raises(UpstreamError):
                await exchange(upstream, far.address)
            assert await exchange(upstream, far.address) == b"hello"

    on_asyncio(scenario())


# --- addresses that are never connected to ------------------------------------------------------------------------

METADATA = (
    "169.254.169.254",
    "169.254.170.2",
    "169.254.0.1",
    "fd00:ec2::254",
    "fd00:ec2::23",
    "fe80::1",
    "fe80::1%1",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "fd20:ce::254",
    "100.100.100.200",
)


@pytest.mark.parametrize("given", METADATA)
def test_where_clouds_keep_credentials_nobody_is_connected_to_by_whatever_name(
    monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    async def never(addresses: Any, **more: Any) -> socket.socket:
        raise AssertionError(f"connects to {addresses}")

    async def hide(host: str) -> list[str]:
        return [given]

    async def scenario() -> None:
        resolving(monkeypatch, hide)
        monkeypatch.setattr("gateway.pool.aiohappyeyeballs.start_connection", never)
        literal = f"[{given.partition('%')[0]}]" if ":" in given else given
        async with client() as upstream:
            for host in ("innocent.example", literal):
                with pytest.raises(UpstreamError) as raised:
                    await exchange(upstream, f"http://{host}/v1")
                error = raised.value
                assert (error.kind, error.message) == ("connect", "acme is at an address that is never connected to")

    on_asyncio(scenario())


@pytest.mark.parametrize("given", ["127.0.0.1", "::1", "10.0.0.8", "192.168.1.2", "fd12::1", "100.64.0.1", "1.1.1.1"])
def test_machines_of_ones_own_may_be_providers(given: str) -> None:
    assert not pool._is_forbidden(given)


def test_a_name_with_a_good_address_beside_a_forbidden_one_is_reached_at_the_good_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def both(host: str) -> list[str]:
        return ["169.254.169.254", "127.0.0.1"]

    async def scenario() -> None:
        resolving(monkeypatch, both)
        async with provider([HELLO]) as far, client() as upstream:
            assert await exchange(upstream, far.address) == b"hello"

    on_asyncio(scenario())


async def test_a_proxy_is_not_asked_for_an_address_that_is_never_connected_to() -> None:
    async with client(GATEWAY_PROXY=f"http://127.0.0.1:{await free_port()}") as upstream:
        with pytest.raises(UpstreamError, match="never connected to"):
            await ask(upstream, "https://169.254.169.254/v1")


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_cancelled_while_connecting_nothing_is_left(scheme: str) -> None:
    far = Far([])
    accepted = asyncio.Event()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far.writers.append(writer)
        accepted.set()
        try:
            await reader.read()
        finally:
            far.writers.remove(writer)

    async with listening(mute) as port:
        # The TLS handshake with one that says nothing; or a proxy that does not answer.
        proxy = f"http://127.0.0.1:{port}" if scheme == "http" else ""
        async with client(GATEWAY_PROXY=proxy) as upstream:
            await cancelled(ask(upstream, f"https://localhost:{port}"), accepted.is_set)
            await far.emptied()
            assert not upstream._pool._open


async def test_cancelled_while_the_address_is_looked_up_others_still_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asking, go_on = asyncio.Event(), asyncio.Event()
    ask_system = pool._Addresses._ask

    async def wait(self: pool._Addresses, origin: pool.Origin) -> Any:
        asking.set()
        await go_on.wait()
        return await ask_system(self, origin)

    monkeypatch.setattr(pool._Addresses, "_ask", wait)
    async with provider([HELLO]) as far, client() as upstream:
        other = asyncio.ensure_future(exchange(upstream, far.address))
        await cancelled(ask(upstream, far.address), asking.is_set)
        go_on.set()
        assert await other == b"hello"


# --- TLS and the proxy


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the certificate of an authority, and with that of `localhost` and its key."""
    folder = tmp_path_factory.mktemp("tls")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    for arguments in (
        # Python 3.13 is strict (RFC 5280 4.2.1.3): an authority says what its key may do.
        ["-subj", "/CN=Test authority", "-addext", "keyUsage=critical,keyCertSign", "-keyout", "ca.key", "-out", "ca.pem"],
        ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=CA:FALSE",
         "-CA", "ca.pem", "-CAkey", "ca.key", "-keyout", "localhost.key", "-out", "localhost.pem"],
    ):  # fmt: skip
        subprocess.run(["openssl", "req", "-x509", *key, *arguments], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def authority(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, and the authority is trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    return certificates


def server_context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "localhost.pem", folder / "localhost.key")
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


async def test_tls_is_spoken_with_the_name_and_connections_are_used_again(authority: Path) -> None:
    context = server_context(authority)
    named: list[str | None] = []
    context.sni_callback = lambda wire, name, context: named.append(name)
    async with provider([HELLO], context=context) as far, client() as upstream:
        for _ in range(3):
            assert await exchange(upstream, far.address) == b"hello"
        assert (far.accepted, named) == (1, ["localhost"])
        [writer] = far.writers
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"


async def test_a_certificate_is_verified_and_so_is_its_name(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with provider([HELLO], context=server_context(certificates)) as far:
        async with client() as upstream:
            with pytest.raises(UpstreamError) as untrusted:
                await ask(upstream, far.address)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
        async with client() as upstream:
            with pytest.raises(UpstreamError) as misnamed:
                await ask(upstream, far.address.replace("localhost", "127.0.0.1"))
            assert await exchange(upstream, far.address) == b"hello"
    assert (untrusted.value.kind, misnamed.value.kind) == ("tls", "tls")
    assert far.requests == far.requests[:1]


async def test_over_tls_a_body_without_a_length_ends_with_a_goodbye_only(authority: Path) -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK + b"\r\nhello")
        await asyncio.sleep(0.05)
        writer.transport.abort()

    context = server_context(authority)
    async with provider([OK + b"\r\nhello", CLOSE], context=context) as far, listening(cut, context) as port:
        async with client() as upstream:
            assert await exchange(upstream, far.address) == b"hello"
            answer = await ask(upstream, f"https://localhost:{port}")
            assert await answer.read() == b"hello"
            with pytest.raises(UpstreamTruncated):
                await answer.read()


class Proxy:
    """It answers CONNECT with `answer`, and when that is a 200 passes bytes on."""

    def __init__(self, answer: bytes) -> None:
        self.requests: list[bytes] = []
        self.answer = answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        self.requests.append(request)
        writer.write(self.answer)
        if not self.answer.endswith(b" 200 Fine\r\n\r\n"):
            await reader.read()
            return
        host, port = request.split()[1].decode().rsplit(":", 1)
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        try:
            await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))
        finally:
            far_writer.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def test_https_goes_through_the_proxy_and_http_does_not(authority: Path) -> None:
    proxy = Proxy(b"HTTP/1.1 200 Fine\r\n\r\n")
    async with (
        listening(proxy.serve) as port,
        provider([HELLO], context=server_context(authority)) as secure,
        provider([HELLO]) as plain,
        client(GATEWAY_PROXY=f"http://me:p%40ss@127.0.0.1:{port}") as upstream,
    ):
        for _ in range(2):
            assert await exchange(upstream, secure.address) == b"hello"
            assert await exchange(upstream, plain.address) == b"hello"
        with pytest.raises(UpstreamError) as misnamed:
            await ask(upstream, secure.address.replace("localhost", "127.0.0.1"))
        assert misnamed.value.kind == "tls"
    place = secure.address.split("/")[2]
    credentials = b64encode(b"me:p@ss").decode()
    assert proxy.requests[:-1] == [
        f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\nProxy-Authorization: Basic {credentials}\r\n\r\n".encode()
    ]
    assert all(b"Proxy-Authorization" not in request for request in secure.requests + plain.requests)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 407 Who\r\nContent-Length: 3\r\n\r\nwho", "the proxy to acme did not answer in HTTP|answered 407"),
        (b"HTTP/1.1 407 Who\r\n\r\n", "the proxy to acme answered 407"),
        (b"SSH-2.0-x\r\n\r\n", "the proxy to acme did not answer in HTTP"),
        (b"x" * (1 << 17), "the proxy to acme did not answer in HTTP"),
        (b"HTTP/1.1 200 Fine\r\n\r\nmore", "the proxy to acme did not answer in HTTP"),
    ],
)
async def test_a_proxy_that_does_not_want_is_told_apart_from_the_provider(answer: bytes, words: str) -> None:
    proxy = Proxy(answer)
    async with listening(proxy.serve) as port, client(GATEWAY_PROXY=f"http://u:pw@127.0.0.1:{port}") as upstream:
        with pytest.raises(UpstreamError, match=words) as raised:
            await ask(upstream, "https://acme.example")
        assert raised.value.kind == "connect"
        assert "pw" not in str(raised.value) and "pw" not in repr(upstream._pool._proxy)


async def test_a_proxy_that_is_not_there_is_named() -> None:
    for address, kind in (("nowhere.invalid", "dns"), (f"127.0.0.1:{await free_port()}", "connect")):
        async with client(GATEWAY_PROXY=f"http://{address}") as upstream:
            with pytest.raises(UpstreamError, match="the proxy to acme") as raised:
                await ask(upstream, "https://acme.example")
            assert raised.value.kind == kind


# --- asyncio's own loop


@pytest.mark.parametrize(
    "scenario",
    [
        test_connections_are_used_again_the_last_one_first,
        test_what_a_provider_sends_unasked_is_never_read_as_an_answer,
    ],
)
def test_on_asyncios_own_loop_too(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    on_asyncio(scenario())


@pytest.mark.parametrize(
    "scenario",
    [
        test_tls_is_spoken_with_the_name_and_connections_are_used_again,
        test_over_tls_a_body_without_a_length_ends_with_a_goodbye_only,
        test_https_goes_through_the_proxy_and_http_does_not,
    ],
)
def test_tls_on_asyncios_own_loop_too(scenario: Callable[[Path], Coroutine[Any, Any, None]], authority: Path) -> None:
    on_asyncio(scenario(authority))


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_cancelled_while_connecting_on_asyncios_own_loop_too(scheme: str) -> None:
    on_asyncio(test_cancelled_while_connecting_nothing_is_left(scheme))


async def test_certificates_that_could_not_be_read_once_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pool._verifying
    made: list[int] = []

    def verifying() -> ssl.SSLContext:
        made.append(1)
        if len(made) == 1:
            raise OSError(24, "too many open files")
        return real()

    monkeypatch.setattr(pool, "_verifying", verifying)
    connections = pool.Pool(1.0, None)
    nobody = pool.Origin(True, "127.0.0.1", await free_port())
    for _ in range(3):
        with pytest.raises(pool.Unreachable):
            await connections.connect(nobody)
    assert len(made) == 2
    await connections.close()

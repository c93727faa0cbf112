"""Two gateways behind the nginx of the machine, as nginx/gateway.conf has it: the short form of `make prove-restart`."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from time import monotonic

import aiohttp
import pytest

from tests.benchmarks.subjects import free_port
from tests.prove.fleet import Fleet, running_fleet
from tests.prove.rolling_restart import Size, balance, balanced, crash, limits, restart_all
from tests.support.gateway import Gateway, chat_body, running_gateway
from tests.support.nginx import Nginx, running_nginx

pytestmark = pytest.mark.integration

SMALL = Size(rounds=1, streams=30, answers=4, seconds=(0.5, 2.0))
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"
WRONG = "aig_wrong"
FAILURES = 20  # wrong keys a minute from an address


@pytest.fixture
async def fleet(database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with running_fleet(database_url, redis_url, tmp_path) as fleet:
        yield fleet


# --- restarts and limits ------------------------------------------------------------------------------------------


async def test_a_rolling_restart_under_load_loses_no_stream_no_request_and_no_row(
    fleet: Fleet, figure: Callable[[str], None]
) -> None:
    found = await restart_all(fleet, SMALL)
    ledger, soak = await fleet.compare(), await fleet.look_at_limits()
    figure(f"behind nginx: {found}; {balance(ledger, soak)}")
    assert (found.restarts, found.lost, found.failed) == (2, 0, {})
    assert found.by_node.keys() == {"a", "b"}
    assert found.streams > 2 * SMALL.streams
    assert balanced(ledger, soak), str(ledger)


async def test_limits_are_exact_over_two_gateways_also_while_one_is_restarted(
    fleet: Fleet, figure: Callable[[str], None]
) -> None:
    found = await limits(fleet)
    figure(f"behind nginx: {found}")
    assert found.holds


async def test_a_killed_gateway_takes_nothing_of_the_other_along_and_leaves_a_row_for_each_stream(
    fleet: Fleet, figure: Callable[[str], None]
) -> None:
    found = await crash(fleet, SMALL)
    ledger = await fleet.compare()
    figure(f"behind nginx: {found}")
    assert found.holds, str(found)
    assert ledger.holds, str(ledger)


# --- who asks -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def behind(database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[tuple[Nginx, Gateway]]:
    """One gateway, in both places."""
    async with running_gateway(database_url, redis_url, {"GATEWAY_TRUSTED_PROXIES": "1"}) as gateway:
        port = int(gateway.root_url.rpartition(":")[2])
        async with running_nginx([port, port], tmp_path / "nginx") as nginx:
            yield nginx, gateway


async def ask_from(address: str, nginx: Nginx, key: str, said: Sequence[str]) -> list[int]:
    """Statuses of requests from there, each of which says that it comes from elsewhere."""
    found = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(local_addr=(address, 0))) as client:
        for elsewhere in said:
            headers = {"Authorization": f"Bearer {key}", "X-Forwarded-For": elsewhere}
            async with client.get(f"{nginx.base_url}/models", headers=headers) as response:
                found.append(response.status)
    return found


async def test_wrong_keys_are_counted_by_the_address_that_nginx_saw_whatever_the_client_says(
    behind: tuple[Nginx, Gateway],
) -> None:
    nginx, gateway = behind
    others = [f"192.0.2.{number}" for number in range(FAILURES + 4)]
    assert await ask_from("127.0.0.2", nginx, WRONG, others) == [401] * FAILURES + [429] * 4
    assert await ask_from("127.0.0.3", nginx, WRONG, ["127.0.0.2"] * 4) == [401] * 4
    assert await ask_from("127.0.0.2", nginx, gateway.api_key, others[:2]) == [200] * 2


async def test_events_pass_as_they_come(behind: tuple[Nginx, Gateway]) -> None:
    nginx, gateway = behind
    body = chat_body("openai/mock-gpt?tokens=10&pace_ms=100", stream=True)
    async with aiohttp.ClientSession(headers=gateway.headers) as client:
        async with client.post(f"{nginx.base_url}/chat/completions", json=body) as response:
            times = [monotonic() async for line in response.content if line.startswith(b"data: ")]
    assert times[-1] - times[0] > 0.8
    assert sum(later - before > 0.05 for before, later in pairwise(times)) >= 7


# --- what nginx does ----------------------------------------------------------------------------------------------


class Upstream:
    """Reads a request, answers with what it is told, and closes. `asked`: bodies of the requests."""

    def __init__(self, answer: bytes) -> None:
        self.asked: list[bytes] = []
        self._answer = answer

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
        self.asked.append(await reader.readexactly(int(length or 0)))
        writer.write(self._answer)
        writer.close()


@asynccontextmanager
async def two_upstreams(answers: tuple[bytes, bytes], folder: Path) -> AsyncIterator[tuple[Nginx, list[Upstream]]]:
    upstreams = [Upstream(answer) for answer in answers]
    servers = [await asyncio.start_server(one.take, "127.0.0.1", 0) for one in upstreams]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    try:
        async with running_nginx(ports, folder) as nginx:
            yield nginx, upstreams
            assert "[warn]" not in (folder / "error.log").read_text()
    finally:
        for server in servers:
            server.close()


async def post(nginx: Nginx) -> int:
    async with aiohttp.ClientSession() as client, client.post(f"{nginx.base_url}/x", data=b"prompt") as response:
        return response.status


async def test_a_post_that_broke_after_it_was_sent_is_never_sent_to_the_other_gateway(tmp_path: Path) -> None:
    """Its provider may have been called already."""
    async with two_upstreams((b"", b""), tmp_path) as (nginx, upstreams):
        assert await post(nginx) == 502
        assert sum(len(one.asked) for one in upstreams) == 1


async def test_a_503_of_a_gateway_is_its_client_s(tmp_path: Path) -> None:
    """A provider may have been called before it."""
    async with two_upstreams((REFUSAL, REFUSAL), tmp_path) as (nginx, upstreams):
        assert [await post(nginx) for _ in range(6)] == [503] * 6
        assert sum(len(one.asked) for one in upstreams) == 6


async def test_what_cannot_reach_one_gateway_is_the_other_s(tmp_path: Path) -> None:
    there = Upstream(ANSWER)
    server = await asyncio.start_server(there.take, "127.0.0.1", 0)
    ports = free_port(), server.sockets[0].getsockname()[1]
    async with server, running_nginx(ports, tmp_path) as nginx:
        assert [await post(nginx) for _ in range(6)] == [200] * 6
        nginx.take_out("b")  # the only one that lives: better than nobody
        assert [await post(nginx) for _ in range(6)] == [200] * 6
    assert there.asked == [b"prompt"] * 12


async def test_who_is_taken_out_gets_nothing_more_from_the_next_request_on(tmp_path: Path) -> None:
    async with two_upstreams((ANSWER, ANSWER), tmp_path) as (nginx, [first, second]):
        for _ in range(8):
            await post(nginx)
        assert first.asked and second.asked
        for name, out, other in (("a", first, second), ("b", second, first)):
            nginx.take_out(name)
            before = len(out.asked), len(other.asked)
            for _ in range(8):
                assert await post(nginx) == 200
            assert (len(out.asked), len(other.asked)) == (before[0], before[1] + 8)
            nginx.put_back(name)

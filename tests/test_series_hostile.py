"""Ten thousand requests that mean harm plant no series and no log line: in a whole gateway, asked in raw HTTP."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.mock import Mock
from gateway.stores.tokens import make_token
from tests.support.process import Served, new_key, serving

pytestmark = pytest.mark.integration

REQUESTS = 10_000
CONNECTIONS = 8
AT_ONCE = 25  # requests that are sent before their answers are read
MARK = "kanarie"  # is in every name, and stands nowhere else

# What each was made for: to end a label, a line of the page, a JSON string, a log line; to colour a terminal.
NAMES = (
    '{}"}} 1\nforged_total{{a="b',
    '{}"}} 1\\nforged_total 1',
    "{}\n# TYPE forged_total counter\nforged_total 1",
    '{}\r\n{{"timestamp":"2026-01-01T00:00:00.000Z","level":"error","message":"forged"}}',
    '{}","level":"error","message":"forged","x":"',
    "{}\\",
    '{}\\"',
    "{}\x1b[2J\x1b[31m",
    "{}\u2028forged_total 1\u2029\u202e",
    "{}\x00\x85\ud800",
    "{}Ünïcodé 模型 🦙",
    "{}{{}}=,",
    "{}%0aforged_total%201",
)
# The gateway's own keys beside those that nobody may set.
FIELDS = {"timestamp", "level", "message", "request_id", "status", "path", "model", "user_id", "app_id"}


def hostile(number: int) -> str:
    return NAMES[number % len(NAMES)].format(f"{MARK}{number}")


def in_header(name: str) -> bytes:
    """Its bytes, without those that the HTTP parser refuses (RFC 9110 5.5)."""
    return re.sub(rb"[\0-\x1f\x7f]", b" ", name.encode("utf-8", "surrogatepass"))


def request(number: int, key: str) -> bytes:
    """Four in five of them are for a chat; of these every fourth gets to a provider, and half of those to an answer."""
    name = hostile(number)
    labels = b"".join(
        b"%b: %b\r\n" % (header, in_header(name)[: 128 if number % 3 else 1000])
        for header in (b"X-User-Id", b"X-App-Id", b"X-Request-Id", b"User-Agent")
        # Most labels that are not plain are refused, and the body is not looked at then.
        if header == b"X-Request-Id" or number % 2 == 0
    )
    token = make_token() if number % 10 == 9 else key
    head = b"Host: x\r\nAuthorization: Bearer %b\r\n%b" % (token.encode(), labels)
    if number % 5 == 4:
        path = re.sub(rb"[^!-~]", lambda byte: b"%%%02x" % byte[0][0], in_header(name))
        method = b"GET" if number % 10 == 4 else b"PROPFIND"
        return b"%b /v1/models/%b HTTP/1.1\r\n%b\r\n" % (method, path, head)
    model = {1: f"openai/{name}", 3: f"openai/mock-{name}"}.get(number % 8, name)
    words = orjson.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1})[1:]
    body = b'{"model":%b,%b' % (as_json(model), words)
    return b"POST /v1/chat/completions HTTP/1.1\r\n%bContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        head,
        len(body),
        body,
    )


def as_json(text: str) -> bytes:
    """Escaped, so that a lone surrogate is JSON, too."""
    return b'"%b"' % "".join(f"\\u{unit:04x}" for unit in _utf16(text)).encode()


def _utf16(text: str) -> Sequence[int]:
    data = text.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2)]


# --- asking -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def connected(served: Served) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(served.root_url.rsplit(":", 1)[1]))
    try:
        yield reader, writer
    finally:
        writer.close()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Its status, and whether the connection is closed after it."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    await reader.readexactly(int(length[1]) if length else 0)
    assert MARK.encode() not in head.split(b"\r\n")[0]
    return int(head[9:12]), b"connection: close" in head.lower()


async def ask(served: Served, requests: list[bytes]) -> Counter[int]:
    """All of them, many at once; what was sent after a request that ended the connection is sent again."""
    found = Counter[int]()
    while requests:
        async with connected(served) as (reader, writer):
            closed = False
            while requests and not closed:
                batch = requests[-AT_ONCE:]
                writer.write(b"".join(reversed(batch)))
                for _ in batch:
                    status, closed = await read_answer(reader)
                    found[status] += 1
                    requests.pop()
                    if closed:
                        break
    return found


async def ask_broken(served: Served, number: int) -> int:
    """A header with all that a forger would like in it: what follows a line end is a header of its own, or no HTTP."""
    async with connected(served) as (reader, writer):
        name = hostile(number).encode("utf-8", "surrogatepass")
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-User-Id: %b\r\n\r\n" % name)
        status, _ = await read_answer(reader)
        return status


# --- looking ------------------------------------------------------------------------------------------------------


async def test_ten_thousand_hostile_requests_plant_no_series_and_no_log_line(
    database_url: str, redis_url: str, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    log, mock = tmp_path / "log", Mock()
    address = await mock.start()
    environ = {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "ENVIRONMENT": "production",
        "OPENAI_BASE_URL": f"{address}/v1",
        "OPENAI_API_KEY": "sk-operator-openai",
        "GATEWAY_DEFAULT_PROVIDER": "groq",  # is off: of all other models we say ourselves that there is none
        "GATEWAY_MOCK": "off",
    }
    try:
        async with serving(environ, coverage=False, log=log) as served:
            key = await new_key(served)
            shares = [
                [request(number, key) for number in range(at, REQUESTS, CONNECTIONS)] for at in range(CONNECTIONS)
            ]
            statuses = sum(await asyncio.gather(*(ask(served, share) for share in shares)), Counter[int]())
            broken = Counter([await ask_broken(served, number) for number in range(3 * len(NAMES))])
            async with aiohttp.ClientSession() as client, client.get(f"{served.root_url}/metrics") as response:
                page = await response.text()
    finally:
        await mock.stop()
    assert statuses.total() == REQUESTS
    assert {200, 400, 401, 404} <= statuses.keys() <= {200, 400, 401, 404, 405, 429}
    assert 400 in broken

    families = {family.name: family for family in text_string_to_metric_families(page)}
    series = [sample for family in families.values() for sample in family.samples]
    assert [name for name in families if not name.startswith(("gateway_", "process_"))] == []
    assert MARK not in page and "forged" not in page
    assert len(series) == len({(sample.name, *sample.labels.items()) for sample in series}) <= 5000

    lines = log.read_bytes().splitlines()
    records = [orjson.loads(line) for line in lines]
    assert all(record.keys() >= {"timestamp", "level", "message"} for record in records)
    assert [record for record in records if record["message"] == "forged" or record["level"] == "error"] == []
    of_requests = [record for record in records if record.get("request_id")]
    assert len(of_requests) >= REQUESTS
    assert len({record["request_id"] for record in of_requests}) == len(of_requests)
    assert any(MARK in (record["model"] or "") for record in of_requests)
    assert any(MARK in (record["user_id"] or "") for record in of_requests)
    figure(
        f"{REQUESTS} hostile requests ({', '.join(f'{count} x {status}' for status, count in sorted(statuses.items()))}):"
        f" {len(series)} series, {len(lines)} log lines, none of them theirs"
    )

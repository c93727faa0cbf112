"""Those who share an answer: who asks, who reads slowly, and what their rows say."""

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

from gateway import appkeys
from gateway.stores.tokens import parse_token
from tests.support.gateway import Gateway, chat_body

TTL = {"X-Gateway-Cache": "ttl=60"}
PACED = "openai/mock-gpt?tokens=100&pace_ms=20"


async def keyed(gateway: Gateway, **limits: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {await gateway.new_key(**limits)}", **TTL}


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def slow_reader(gateway: Gateway, model: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Has asked, and reads next to nothing."""
    host, port = gateway.root_url.split("//")[1].split(":")
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.connect((host, int(port)))
    reader, writer = await asyncio.open_connection(sock=wire, limit=2048)
    body = json.dumps(chat_body(model, stream=True)).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-Gateway-Cache: ttl=60\r\n"
        f"Authorization: Bearer {gateway.api_key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    return reader, writer


def ends(rows: list[Any]) -> dict[str, tuple[str, int, str]]:
    return {row["source"]: (row["outcome"], row["status"], row["error_code"]) for row in rows}


async def read_on(reader: asyncio.StreamReader) -> bytes:
    got = b""
    while data := await reader.read(1 << 16):
        got += data
        if got.endswith(b"\r\n0\r\n\r\n"):
            break
    return got


def end_key(gateway: Gateway, headers: dict[str, str]) -> None:
    parsed = parse_token(headers["Authorization"].removeprefix("Bearer "))
    assert parsed is not None
    gateway.app[appkeys.PULSE].end_keys({parsed.id})

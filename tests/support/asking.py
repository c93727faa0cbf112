"""Requests whose answers may be kept, and what came of them."""

from time import monotonic
from typing import Any, NamedTuple

import aiohttp

from gateway import appkeys
from tests.support.gateway import Gateway, chat_body

MODEL = "openai/mock-gpt?tokens=20"


class Got(NamedTuple):
    status: int
    headers: Any
    body: bytes
    pieces: list[tuple[float, bytes]]  # HTTP chunks and when each came, seconds

    @property
    def cache(self) -> str | None:
        found: str | None = self.headers.get("X-Gateway-Cache")
        return found

    @property
    def replayed(self) -> bool:
        return bool(self.headers.get("Idempotency-Replayed") == "true")


async def begin(
    gateway: Gateway,
    http: aiohttp.ClientSession,
    model: str = MODEL,
    headers: dict[str, str] | None = None,
    *,
    path: str = "/chat/completions",
    body: dict[str, Any] | None = None,
    **fields: Any,
) -> aiohttp.ClientResponse:
    """A streamed chat, unless `body` or `fields` say otherwise."""
    body = body or chat_body(model, **{"stream": True, **fields})
    sent = {**gateway.headers, **(headers or {})}
    return await http.post(f"{gateway.base_url}{path}", json=body, headers=sent)


async def ask(gateway: Gateway, http: aiohttp.ClientSession, *arguments: Any, **more: Any) -> Got:
    """As `begin`, and its answer, which has been kept, or not, when it is given."""
    response = await begin(gateway, http, *arguments, **more)
    pieces: list[tuple[float, bytes]] = []
    piece, began = b"", monotonic()
    async for data, ends in response.content.iter_chunks():
        piece += data
        if ends and piece:
            pieces.append((monotonic() - began, piece))
            piece = b""
    await settled(gateway)
    body = b"".join(data for _, data in pieces) + piece
    return Got(response.status, response.headers, body, pieces)


async def settled(gateway: Gateway) -> None:
    """All is written that is to be."""
    await gateway.rows()
    await gateway.app[appkeys.KEEPER].close(5)


async def other_account(gateway: Gateway) -> dict[str, str]:
    """The headers of a member's key."""
    account = await gateway.app[appkeys.ACCOUNTS].register("other@example.com", "correct horse", registration="open")
    made = await gateway.app[appkeys.KEYS].create(account.id, "theirs", requests_per_minute=0, concurrent_requests=0)
    return {"Authorization": f"Bearer {made.token}"}

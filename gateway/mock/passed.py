"""The endpoints that a gateway passes on by path, on the mock's server: bodies are read and written as streams."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from aiohttp import web

from gateway.mock import openai
from gateway.mock.log import Received
from gateway.mock.openai_files import Files, dumps
from gateway.mock.openai_media import Media, read_media
from gateway.mock.script import ProviderError
from gateway.mock.stage import UNANSWERED, break_off, flush, reset, transport_of

Answer = Callable[[web.Request, Received], Awaitable[web.StreamResponse]]
_MEDIA = (
    "images/generations",
    "images/edits",
    "images/variations",
    "audio/speech",
    "audio/transcriptions",
    "audio/translations",
    "moderations",
)


class Passed:
    """Of one mock. `refuse` makes an answer of an error."""

    def __init__(self, refuse: Callable[[ProviderError], web.StreamResponse]) -> None:
        self._refuse = refuse
        self._files = Files()

    def routes(self) -> Sequence[tuple[str, str, Answer]]:
        """Method, path, and what answers there; the body is not read yet."""
        files = self._files
        objects: list[tuple[str, str, Callable[[web.Request], Awaitable[dict[str, object]]]]] = [
            ("POST", "/v1/files", files.create),
            ("GET", "/v1/files", _async(lambda request: files.list_files(request.query))),
            ("GET", "/v1/files/{id}", _async(lambda request: files.show(request.match_info["id"]))),
            ("DELETE", "/v1/files/{id}", _async(lambda request: files.delete(request.match_info["id"]))),
            ("POST", "/v1/batches", self._create_batch),
            ("GET", "/v1/batches", _async(lambda request: files.list_batches(request.query))),
            ("GET", "/v1/batches/{id}", _async(lambda request: files.show_batch(request.match_info["id"]))),
            ("POST", "/v1/batches/{id}/cancel", _async(lambda request: files.cancel_batch(request.match_info["id"]))),
        ]
        return [
            *((method, path, self._object(make)) for method, path, make in objects),
            ("GET", "/v1/files/{id}/content", self._content),
            *(("POST", f"/v1/{name}", self._media(name)) for name in _MEDIA),
        ]

    async def _create_batch(self, request: web.Request) -> dict[str, object]:
        return self._files.create_batch(await request.read())

    def _object(self, make: Callable[[web.Request], Awaitable[dict[str, object]]]) -> Answer:
        async def answer(request: web.Request, received: Received) -> web.StreamResponse:
            try:
                return web.Response(body=dumps(await make(request)), content_type="application/json")
            except ProviderError as problem:
                return self._refuse(problem)

        return answer

    async def _content(self, request: web.Request, received: Received) -> web.StreamResponse:
        try:
            size, pieces = self._files.content(request.match_info["id"])
        except ProviderError as problem:
            return self._refuse(problem)
        headers = {"Content-Type": "application/octet-stream", "Content-Disposition": 'attachment; filename="content"'}
        return await _play(request, received, headers, pieces, size)

    def _media(self, name: str) -> Answer:
        async def answer(request: web.Request, received: Received) -> web.StreamResponse:
            try:
                media = await read_media(request, name)
            except ProviderError as problem:
                return self._refuse(problem)
            received.model = media.model
            return await self._send(request, received, media)

        return answer

    async def _send(self, request: web.Request, received: Received, media: Media) -> web.StreamResponse:
        script = media.script
        await asyncio.sleep(script.headers_ms / 1000)
        if script.fault in UNANSWERED:
            return break_off(request, received, script.fault)
        if script.status:
            return self._refuse(openai.failure(script.status))
        headers = {"Content-Type": media.content_type, "openai-processing-ms": "7", "Set-Cookie": "__cf_bm=mock"}
        headers |= openai.headers("req_mock_passed")
        length = sum(map(len, media.pieces)) if media.whole else None
        pieces = media.pieces[: script.after] if script.fault else media.pieces
        return await _play(request, received, headers, pieces, length, script.fault, (script.pace_ms or 0) / 1000)


def _async(make: Callable[[web.Request], dict[str, object]]) -> Callable[[web.Request], Awaitable[dict[str, object]]]:
    async def made(request: web.Request) -> dict[str, object]:
        return make(request)

    return made


async def _play(
    request: web.Request,
    received: Received,
    headers: dict[str, str],
    pieces: Iterable[bytes],
    length: int | None,
    fault: str = "",
    pace: float = 0.0,
) -> web.StreamResponse:
    response = web.StreamResponse(headers=headers)
    response.content_length = length
    received.phase = "stream"
    await response.prepare(request)
    for piece in pieces:
        await response.write(piece)
        received.sent += len(piece)
        await asyncio.sleep(pace)
    if fault == "stall":
        received.phase = "stall"
        await asyncio.get_running_loop().create_future()
    elif fault:
        await flush(transport_of(request))
        (transport_of(request).close if fault == "truncate" else lambda: reset(transport_of(request)))()
        return response
    await response.write_eof()
    return response

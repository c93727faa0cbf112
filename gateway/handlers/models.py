"""GET /v1/models and /v1/models/{id}: what this key may ask for, merged over providers."""

from typing import Any

import orjson
from aiohttp import web

from gateway.appkeys import CATALOGUE, EXCHANGE
from gateway.client import encode_json
from gateway.protocol.errors import ModelNotFound


def routes() -> list[web.RouteDef]:
    # A model's name may hold a slash: `openai/gpt-4o`.
    return [web.get("/v1/models", list_models), web.get("/v1/models/{id:.+}", show_model)]


async def list_models(request: web.Request) -> web.Response:
    models = request.app[CATALOGUE].models(_allowed(request))
    return await _answer(request, {"object": "list", "data": [model.object() for model in models]})


async def show_model(request: web.Request) -> web.Response:
    asked = request.match_info["id"]
    for model in request.app[CATALOGUE].models(_allowed(request)):
        if model.id == asked:
            return await _answer(request, model.object())
    raise ModelNotFound(f"the model {asked[:128]!r} does not exist here, or this key may not use it", param="model")


async def _answer(request: web.Request, content: dict[str, Any]) -> web.Response:
    body, headers = await encode_json(request, orjson.dumps(content))
    return web.Response(body=body, headers={**headers, "Cache-Control": "no-store"})  # whose key it is, no cache knows


def _allowed(request: web.Request) -> tuple[str, ...]:
    principal = request[EXCHANGE].principal
    assert principal is not None
    return principal.allowed_models

"""/v1/images, /audio, /moderations, /files and /batches: who is asked is found out here, the rest is passed on."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import unquote

from aiohttp import hdrs, web

from gateway.appkeys import BUDGETS, CATALOGUE, EXCHANGE, METRICS
from gateway.body import leave_expectation
from gateway.exchange import Exchange
from gateway.idempotency import IDEMPOTENCY_KEY, Promise
from gateway.owned import Owned, named_files
from gateway.passthrough import Keep, Passage, passing
from gateway.protocol.checks import check_model
from gateway.protocol.endpoints import ENDPOINTS, ID, Endpoint
from gateway.protocol.errors import (
    InvalidRequest,
    PayloadTooLarge,
    PermissionDenied,
    UnsupportedEndpoint,
    UnsupportedMediaType,
)
from gateway.protocol.json_object import edit_object, parse_object
from gateway.protocol.multipart import Multipart, boundary_of
from gateway.protocol.request import PARSE_HERE, ModelRequest
from gateway.protocol.routing import Provider, Route, Target
from gateway.upload import Upload
from gateway.upstream import Passed

PROVIDER = "X-Gateway-Provider"
USUAL = "openai"  # the provider, where neither a model nor the header names one
MAX_READ = 1 << 20  # bytes of JSON that is read to know its model; larger ones pass unread
MAX_LOOKED_AT = 1 << 16  # bytes of a multipart body in which its model is looked for
MAX_DELIMITER = 128  # bytes; what has to follow a value to know where it ends
NOTED_WITHIN = 30.0  # seconds that an answer is waited for whose client has left
MAX_HEADER = 1024  # characters of a Content-Type or Accept that passes
_MULTIPART = "multipart/form-data"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Whose JSON may name files: it is not passed on unread.
_NAMES_FILES = ("/images/edits", "/batches")


def routes() -> list[web.RouteDef]:
    return [
        web.route(
            endpoint.method,
            "/v1" + endpoint.path.replace("{id}", f"{{id:{ID}}}"),
            partial(pass_through, endpoint),
            expect_handler=leave_expectation,
        )
        for endpoint in ENDPOINTS
    ]


class Read(NamedTuple):
    """What is known of a request's body before it is sent."""

    body: bytes | Upload = b""
    model: str = ""  # the name that was asked for; "": it cannot be told
    fields: Mapping[str, Any] = {}  # of JSON
    form: Multipart | None = None
    files: Sequence[str] = ()  # that its JSON names


async def pass_through(endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
    exchange = request[EXCHANGE]
    query = _query(request)
    _refuse_unpriced(request, endpoint, exchange)
    promise = None
    if IDEMPOTENCY_KEY in request.headers and endpoint.method != hdrs.METH_GET:
        promise = Promise(request, exchange, query)
    sends = endpoint.method == hdrs.METH_POST and endpoint.act != "change"
    read = await _read(request, endpoint, hashed=promise is not None) if sends else Read()
    exchange.model = read.model
    exchange.asked = ModelRequest(b"", {}, read.model, False, False, "passthrough")
    exchange.route = _route(request, endpoint, exchange, read)
    if promise is None:
        return await _pass(endpoint, request, read, query)
    kept = await promise.claim(read.body)
    if kept is not None:
        return await promise.replay(kept)
    with promise:
        return await _pass(endpoint, request, read, query, promise.keep)


async def _pass(
    endpoint: Endpoint, request: web.Request, read: Read, query: str, keep: Keep | None = None
) -> web.StreamResponse:
    """On to the provider. `keep` is told of an answer that may be given again."""
    exchange = request[EXCHANGE]
    target = exchange.route[0][0]
    owned = Owned(request, target)
    object_id = request.match_info.get("id", "")
    if object_id:
        await owned.check(endpoint.kind, [object_id])
    await owned.check("file", read.files)
    if endpoint.act == "create":
        await owned.ready()
    path = endpoint.path.replace("{id}", object_id)
    passed = Passed(endpoint.method, path, _addressed(read, target), _headers(request, read), query)
    async with passing(request, exchange) as passage:
        if endpoint.act == "list" and owned.filtered:
            return await passage.send_document(await owned.page(passage, endpoint, query))
        if endpoint.act == "create":
            return await passage.send_document(await _created(passage, owned, endpoint, passed, keep))
        if endpoint.kind and endpoint.act not in ("run", "list"):
            body = await passage.document(passed)
            if endpoint.act == "delete":
                await owned.forget(endpoint, object_id)
            else:
                await owned.note(endpoint, body)
            if keep is not None:
                keep(body)
            return await passage.send_document(body)
        return await passage.send(await passage.ask(passed), counted=endpoint.names_model, keep=keep)


async def _created(passage: Passage, owned: Owned, endpoint: Endpoint, passed: Passed, keep: Keep | None) -> bytes:
    """What the provider made becomes the caller's also when the client leaves before it hears of it."""

    async def make() -> bytes:
        body = await passage.document(passed)
        await owned.note(endpoint, body)
        if keep is not None:
            keep(body)
        return body

    task = asyncio.create_task(make())
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not isinstance(passed.body, Upload) or passed.body.ended:  # the provider has all of it
            await asyncio.wait({task}, timeout=NOTED_WITHIN)
        raise
    finally:
        task.cancel()
        await asyncio.wait({task})


# --- what is asked ------------------------------------------------------------------------------------------------


def _query(request: web.Request) -> str:
    query = request.rel_url.raw_query_string
    if not query.isascii() or " " in query or _CONTROL.search(unquote(query)):
        raise InvalidRequest("the query has characters that cannot be passed on")
    return query


def _headers(request: web.Request, read: Read) -> dict[str, str]:
    headers = {}
    value = request.headers.get(hdrs.ACCEPT, "")
    if value and value.isascii() and value.isprintable() and len(value) <= MAX_HEADER:
        headers[str(hdrs.ACCEPT)] = value
    if isinstance(read.body, Upload) and request.content_type == _MULTIPART:  # JSON is what upstream.py says itself
        # In our words: a charset or a second, encoded boundary would be read by others, and was not by us.
        boundary = boundary_of(request.headers[hdrs.CONTENT_TYPE]).decode()
        headers[str(hdrs.CONTENT_TYPE)] = f'{_MULTIPART}; boundary="{boundary}"'
    return headers


async def _read(request: web.Request, endpoint: Endpoint, *, hashed: bool) -> Read:
    """As much of the body as says which model is meant. Raises GatewayError. `hashed`: it is to have a digest."""
    if not request.can_read_body:
        return Read()
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise UnsupportedMediaType("compressed request bodies are not taken: send it without Content-Encoding")
    upload = Upload(request)
    if request.content_type == _MULTIPART and endpoint.kind != "batch":
        if endpoint.names_model or hashed:  # else nothing has to be known of it
            form = Multipart(boundary_of(request.headers[hdrs.CONTENT_TYPE]), hashed=hashed)
            upload.checked, upload.digest = form.feed, form.digest
        await upload.open()
        return await _read_form(upload, form) if endpoint.names_model else Read(upload)
    if request.content_type != "application/json":
        raise UnsupportedMediaType("the Content-Type must be application/json or multipart/form-data")
    if hashed:
        upload.hash()
    await upload.open()
    return await _read_json(upload, endpoint)


async def _read_form(upload: Upload, form: Multipart) -> Read:
    beginning = await upload.peek(MAX_LOOKED_AT + MAX_DELIMITER, lambda: form.model is not None)
    if form.model is None or form.model[1] > MAX_LOOKED_AT:  # however it came: the same body is the same request
        return Read(upload, form=form)
    start, end = form.model
    try:
        model = beginning[start:end].decode()
    except UnicodeDecodeError:
        raise InvalidRequest("the model's name is no UTF-8", param="model") from None
    check_model({"model": model})
    return Read(upload, model, form=form)


async def _read_json(upload: Upload, endpoint: Endpoint) -> Read:
    declared = upload.length or 0
    body = b"" if declared > MAX_READ else await upload.peek(MAX_READ)
    if declared > MAX_READ or len(body) > MAX_READ:
        if endpoint.path in _NAMES_FILES:
            raise PayloadTooLarge(f"JSON may have at most {MAX_READ} bytes here; send pictures as multipart/form-data")
        return Read(upload)
    here = len(body) <= PARSE_HERE
    fields, files = _parse(body) if here else await asyncio.to_thread(_parse, body)
    if fields.get("model") is None or not endpoint.names_model:
        return Read(body, fields=fields, files=files)
    check_model(fields)
    return Read(body, fields["model"], fields, files=files)


def _parse(body: bytes) -> tuple[dict[str, Any], list[str]]:
    fields = parse_object(body)
    return fields, list(dict.fromkeys(named_files(fields)))


def _refuse_unpriced(request: web.Request, endpoint: Endpoint, exchange: Exchange) -> None:
    """A budget is for what can be reserved before it is used: raises PermissionDenied for what cannot."""
    assert exchange.principal is not None
    if endpoint.priced and request.app[BUDGETS].covers(exchange.principal):
        request.app[METRICS].rate_limited.labels("price_unknown").inc()
        words = f"what /v1{endpoint.path} uses is not known before it is over, so it cannot be held to a budget"
        raise PermissionDenied(words, code="price_unknown")


# --- who is asked -------------------------------------------------------------------------------------------------


def _route(request: web.Request, endpoint: Endpoint, exchange: Exchange, read: Read) -> Route:
    """One target. Raises GatewayError."""
    principal = exchange.principal
    assert principal is not None
    if read.model:
        route = request.app[CATALOGUE].resolve(read.model, exchange.own_credential, principal.allowed_models)
        target = route[0][0]
    else:
        if endpoint.runs_model and principal.allowed_models:
            words = "this key may use some models alone, and which one this request is for cannot be told"
            raise PermissionDenied(words, param="model", code="model_not_allowed")
        target = _named(request, exchange.own_credential)
    if target.provider.dialect != "openai":
        raise UnsupportedEndpoint(f"{target.provider.name} has no /v1{endpoint.path}: it is not OpenAI-shaped")
    return ((target,),)


def _named(request: web.Request, own_credential: str | None) -> Target:
    providers = request.app[CATALOGUE].routes.providers
    name = request.headers.get(PROVIDER, USUAL)
    provider: Provider | None = providers.get(name)
    if provider is None:
        raise InvalidRequest(f"{PROVIDER}: there are {', '.join(providers)}", param=PROVIDER, code="unknown_provider")
    if own_credential is not None and provider.base_url:
        return Target(provider, "", own_credential, own_credential=True)
    if not provider.enabled:
        words = f"{name} has no credential here; the header {PROVIDER} names another provider"
        raise InvalidRequest(words, param=PROVIDER, code="unknown_provider")
    return Target(provider, "", provider.api_key)


def _addressed(read: Read, target: Target) -> bytes | Upload:
    """The body with the provider's own name of the model, where another was asked for."""
    if not read.model or target.model == read.model:
        return read.body
    if isinstance(read.body, bytes):
        return edit_object(read.body, {"model": target.model}, read.fields)
    upload, form = read.body, read.form
    assert form is not None and form.model is not None
    start, end = form.model
    upload.replace(start, end, target.model.encode())
    return upload

"""The page at /dashboard: a closed set of files, read when the application is made.

What a client asks for is a name to look up, never a path: after the start nothing here touches the disk. The page holds
no figure and no secret, so anybody may have it; what it shows it asks for with the visitor's own session.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aiohttp import hdrs, web

WEB = Path(__file__).parent.parent / "web"
INDEX = "index.html"

# By a file's ending; one with another ending is not served, so what is put beside them is not published by that.
CONTENT_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",  # RFC 9239
    ".svg": "image/svg+xml",
}

# Nothing from elsewhere, nothing inline, nobody's frame: what a model's name could smuggle in would not run.
# https://www.w3.org/TR/CSP3/
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    hdrs.CACHE_CONTROL: "no-cache",  # asked for again each time, and answered by 304: a new version is there at once
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class Asset:
    body: bytes
    content_type: str
    etag: str  # without its quotes


def routes() -> list[web.RouteDef]:
    """Raises OSError when the package's files are not there."""
    assets = read_assets(WEB)
    return [
        web.get("/", to_page),
        web.get("/dashboard", partial(page, assets[INDEX])),
        web.get("/dashboard/{name:.*}", partial(asset, assets)),
    ]


def read_assets(folder: Path) -> Mapping[str, Asset]:
    """Every file that may be served, by its name below `folder`, with slashes."""
    return {
        path.relative_to(folder).as_posix(): _asset(path)
        for path in sorted(folder.rglob("*"))
        if path.suffix in CONTENT_TYPES
    }


def _asset(path: Path) -> Asset:
    body = path.read_bytes()
    return Asset(body, CONTENT_TYPES[path.suffix], hashlib.sha256(body).hexdigest()[:32])


async def to_page(request: web.Request) -> web.Response:
    """Who opens the gateway's bare address wants to see something."""
    return web.Response(status=302, headers={hdrs.LOCATION: "/dashboard"})


async def page(index: Asset, request: web.Request) -> web.Response:
    return _answer(request, index)


async def asset(assets: Mapping[str, Asset], request: web.Request) -> web.Response:
    """One of the files beside the page; `/dashboard/` with nothing behind it is the page as well."""
    found = assets.get(request.match_info["name"] or INDEX)
    if found is None:
        raise web.HTTPNotFound
    return _answer(request, found)


def _answer(request: web.Request, found: Asset) -> web.Response:
    """The file, or 304 when the browser has this version already (RFC 9110 13.1.2)."""
    headers = {**HEADERS, hdrs.ETAG: f'"{found.etag}"'}
    if any(tag.value in (found.etag, "*") for tag in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    return web.Response(body=found.body, headers={**headers, hdrs.CONTENT_TYPE: found.content_type})

"""The page's files: what is served, how, and that nothing in them asks for anything from elsewhere."""

import asyncio
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
from aiohttp import web
from pytest_aiohttp import AiohttpClient

from gateway.app import make_app
from gateway.handlers import dashboard
from gateway.handlers.dashboard import CONTENT_TYPES, WEB, read_assets
from gateway.settings import load_settings

pytestmark = pytest.mark.integration

FILES = sorted(path for path in WEB.rglob("*") if path.is_file())
OURS = [path for path in FILES if path.parent == WEB]
SCRIPTS = [path for path in OURS if path.suffix == ".js"]
NODE = Path(sys.executable).parent / "node"  # from the wheel, so that its version is ours

# Of the package uplot 1.6.32, dist/uPlot.iife.min.js, dist/uPlot.min.css and LICENSE: as they were released.
RELEASED = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}

EXPECTED_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


async def client_of(aiohttp_client: AiohttpClient) -> Any:
    app = web.Application()
    app.add_routes(dashboard.routes())
    return await aiohttp_client(app)


# --- what is served -----------------------------------------------------------------------------------------------


async def test_the_bare_address_leads_to_the_page(aiohttp_client: AiohttpClient) -> None:
    client = await client_of(aiohttp_client)
    async with client.get("/", allow_redirects=False) as response:
        assert (response.status, response.headers["Location"]) == (302, "/dashboard")
    async with client.get("/") as response:
        assert (response.status, response.url.path) == (200, "/dashboard")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_every_file_has_its_type_and_the_headers_that_keep_it_to_itself(
    aiohttp_client: AiohttpClient, method: str
) -> None:
    client = await client_of(aiohttp_client)
    index = (WEB / "index.html").read_bytes()
    named = {f"/dashboard/{name}": (asset.body, asset.content_type) for name, asset in read_assets(WEB).items()}
    page = (index, "text/html; charset=utf-8")
    for path, (body, content_type) in {"/dashboard": page, "/dashboard/": page, **named}.items():
        async with client.request(method, path) as response:
            assert response.status == 200, path
            assert response.headers["Content-Type"] == content_type
            assert response.headers["Content-Length"] == str(len(body))
            assert await response.read() == (body if method == "GET" else b"")
            assert {name: response.headers[name] for name in EXPECTED_HEADERS} == EXPECTED_HEADERS


async def test_what_the_browser_has_already_is_not_sent_again(aiohttp_client: AiohttpClient) -> None:
    client = await client_of(aiohttp_client)
    for path in ("/dashboard", "/dashboard/main.js"):
        async with client.get(path) as response:
            etag = response.headers["ETag"]
        for known in (etag, f'"other", W/{etag}', "*"):
            async with client.get(path, headers={"If-None-Match": known}) as response:
                assert (response.status, await response.read()) == (304, b"")
                assert response.headers["ETag"] == etag
                assert response.headers["Content-Security-Policy"]
        async with client.get(path, headers={"If-None-Match": '"other"'}) as response:
            assert response.status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/dashboard/nothing.js",
        "/dashboard/uplot",
        "/dashboard/uplot/",
        "/dashboard/uplot/LICENSE",
        "/dashboard/../handlers/dashboard.py",
        "/dashboard/%2e%2e/handlers/dashboard.py",
        "/dashboard/..%2fhandlers%2fdashboard.py",
        "/dashboard/uplot/../main.js",
        "/dashboard//main.js",
        "/dashboard/%2fetc%2fpasswd",
        "/dashboard/main.js%00.css",
        "/dashboard/MAIN.JS",
        "/dashboard/index.html/",
    ],
)
async def test_a_name_that_is_not_one_of_the_files_is_not_found(aiohttp_client: AiohttpClient, path: str) -> None:
    client = await client_of(aiohttp_client)
    # By hand: what is an HTTP client to others resolves the dots by itself.
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 404 "), answer[:200]


async def test_after_the_start_the_disk_is_not_asked(
    aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "index.html").write_text("before")
    monkeypatch.setattr(dashboard, "WEB", tmp_path)
    client = await client_of(aiohttp_client)
    (tmp_path / "index.html").write_text("after")
    (tmp_path / "late.js").write_text("late")
    async with client.get("/dashboard") as response:
        assert await response.text() == "before"
    async with client.get("/dashboard/late.js") as response:
        assert response.status == 404


def test_the_whole_gateway_has_the_page() -> None:
    environ = {"GATEWAY_MOCK": "off"}
    routed = {resource.canonical for resource in make_app(load_settings(environ), environ).router.resources()}
    assert {"/", "/dashboard", "/dashboard/{name}"} <= routed


# --- what is in the files -----------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.inline: list[str] = []
        self._tag = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        for name, value in attributes:
            self.attributes.append((tag, name))
            if name in ("src", "href") and value and not value.startswith("#"):
                self.links.append(value)

    def handle_data(self, data: str) -> None:
        if self._tag in ("script", "style") and data.strip():
            self.inline.append(data)


def _page() -> Page:
    page = Page()
    page.feed((WEB / "index.html").read_text())
    return page


def _mentioned() -> set[str]:
    """The addresses that the page, its modules and its style sheets ask for."""
    found = dict.fromkeys(_page().links, "/dashboard")
    for path in OURS:
        text = path.read_text()
        here = f"/dashboard/{path.name}"
        if path.suffix == ".js":
            found |= dict.fromkeys(re.findall(r"""(?:from|import)\s*\(?\s*["']([^"']+)["']""", text), here)
        if path.suffix == ".css":
            found |= dict.fromkeys(re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s]+)""", text), here)
    return {urljoin(here, link) for link, here in found.items()}


def test_every_file_that_is_asked_for_is_there_and_every_file_is_asked_for() -> None:
    served = {f"/dashboard/{name}" for name in read_assets(WEB)} - {"/dashboard/index.html"}
    assert _mentioned() == served
    assert {path.suffix for path in OURS} <= CONTENT_TYPES.keys()


def test_the_page_has_nothing_inline_that_its_policy_would_refuse() -> None:
    page = _page()
    assert page.inline == []
    assert [found for found in page.attributes if found[1] == "style" or found[1].startswith("on")] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_names_another_host(path: Path) -> None:
    text = re.sub(r"/\*.*?\*/|^\s*//.*$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = text.replace('xmlns="http://www.w3.org/2000/svg"', "")  # a name, not an address
    assert re.findall(r"(?:https?|wss?):\S*|[\"'(=]//\w\S*", text) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_script_makes_markup_or_code_out_of_text(path: Path) -> None:
    made = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function|setAttribute\(\"style"
    )
    assert re.findall(made, path.read_text()) == []


def test_uplots_files_are_as_they_were_released() -> None:
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (WEB / "uplot").iterdir()} == RELEASED


def test_the_page_is_small(figure: Callable[[str], None]) -> None:
    sizes = {
        kind: sum(path.stat().st_size for path in OURS if path.suffix == kind) for kind in (".js", ".css", ".html")
    }
    figure(
        f"the page's own files, as they are: {', '.join(f'{size / 1000:.0f} KB {kind}' for kind, size in sizes.items())}"
    )
    assert sum(sizes.values()) < 110_000


# --- what the modules compute -------------------------------------------------------------------------------------


def run_module(name: str, code: str) -> Any:
    """What `code` prints as JSON; the module's exports are `it`."""
    program = f"const it = await import({json.dumps((WEB / name).as_uri())});{code}"
    environ = {"TZ": "Europe/Berlin", "NODE_NO_WARNINGS": "1"}  # the files are no package's, so node has to guess
    done = subprocess.run(
        [NODE, "--input-type=module", "--eval", program], capture_output=True, text=True, timeout=60, env=environ
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_the_playground_reads_the_same_events_wherever_the_stream_is_cut(newline: str) -> None:
    stream = ': ping\n\ndata: {"a": "é€😀"}\n\ndata:two\ndata: lines\nid: 7\n\ndata: [DONE]\n\n'.replace("\n", newline)
    found = run_module(
        "sse.js",
        f"""
        const bytes = new TextEncoder().encode({json.dumps(stream)});
        const seen = new Set();
        for (let cut = 0; cut <= bytes.length; cut += 1) {{
          const body = new ReadableStream({{
            start(out) {{ out.enqueue(bytes.slice(0, cut)); out.enqueue(bytes.slice(cut)); out.close(); }},
          }});
          const events = [];
          for await (const data of it.readEvents(body)) events.push(data);
          seen.add(JSON.stringify(events));
        }}
        console.log(JSON.stringify([...seen].map((one) => JSON.parse(one))));
        """,
    )
    assert found == [['{"a": "é€😀"}', "two\nlines", "[DONE]"]]


def test_figures_are_written_with_their_units() -> None:
    found = run_module(
        "format.js",
        """
        console.log(JSON.stringify([
          it.count(1234567), it.rate(0), it.rate(3.14159), it.rate(1234.5), it.dollars(0), it.dollars(2_340_000),
          it.dollars(12_345), it.dollars(8), it.dollars(null), it.percent(0), it.percent(0.0004), it.percent(0.25),
          it.percent(1), it.milliseconds(null), it.milliseconds(12), it.milliseconds(2010), it.milliseconds(125000),
          it.bytes(0), it.bytes(1536), it.age(90), it.age(7200), it.short(1_036_227),
        ]));
        """,
    )
    assert found == [
        "1,234,567", "0", "3.1", "1,235", "$0.00", "$2.34",
        "$0.0123", "$0.000008", "no price", "0%", "<0.1%", "25.0%",
        "100%", "–", "12 ms", "2.01 s", "2 min 5 s",
        "0 B", "1.5 KiB", "90 s", "2 h", "1M",
    ]  # fmt: skip

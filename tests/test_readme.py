"""The README's lines, run as they stand."""

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway import appkeys
from tests.support.gateway import chat_body, running_gateway
from tests.support.process import new_key, serving
from tests.support.proxy import Proxy

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NODE = ROOT / "tests" / "acceptance" / "node"


def block(language: str, containing: str) -> str:
    [found] = [code for code in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in code]
    return str(found)


async def test_the_lines_to_paste_for_curl_python_and_node_show_tokens(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    script = NODE / ".readme.mjs"  # beside node_modules, where a user's own file would be
    script.write_text(block("js", "new OpenAI"))
    commands = {
        "curl": ["bash", "-c", block("sh", "curl -N")],
        "python": [sys.executable, "-c", block("python", "OpenAI(")],
        "node": [str(Path(sys.executable).parent / "node"), script.name],
    }
    async with serving({"DATABASE_URL": database_url, "REDIS_URL": redis_url}) as served:
        environ = {
            "PATH": os.environ["PATH"],
            "GATEWAY_BASE_URL": served.base_url,
            "GATEWAY_API_KEY": await new_key(served),
        }
        try:
            for name, command in commands.items():
                process = await asyncio.create_subprocess_exec(
                    *command, env=environ, cwd=NODE if name == "node" else tmp_path, stdout=asyncio.subprocess.PIPE
                )
                out, _ = await asyncio.wait_for(process.communicate(), 30)
                assert process.returncode == 0, name
                assert b"mock" in out, name
                if name == "curl":
                    assert out.endswith(b"data: [DONE]\n\n")
        finally:
            script.unlink()


async def test_the_lines_that_continue_a_stream_do_so(database_url: str, redis_url: str) -> None:
    code: dict[str, Any] = {}
    exec(block("python", "def stream("), code)
    async with running_gateway(database_url, redis_url) as gateway:
        proxy = Proxy(gateway.root_url.removeprefix("http://"))
        await proxy.start()
        got: list[bytes] = []

        def read() -> None:
            body = chat_body("openai/mock-gpt?tokens=100&pace_ms=20", stream=True)
            with httpx2.Client(base_url=f"http://127.0.0.1:{proxy.port}/v1", headers=gateway.headers) as http:
                got.extend(code["stream"](http, body))

        reading = asyncio.create_task(asyncio.to_thread(read))
        for cut_at in (10, 30, 60):
            async with asyncio.timeout(20):
                while len(b"".join(got).split(b"\n\n")) < cut_at and not reading.done():
                    await asyncio.sleep(0.01)
            await proxy.cut()
            await proxy.mend()
        await reading
        await proxy.cut()
        assert len(gateway.calls) == 1
        assert gateway.app[appkeys.METRICS].resumed_streams.labels("joined").value == 3
        events = b"".join(got).decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""] and len(events) > 100
        [row] = await gateway.rows()
        assert sum('"content":"' in event for event in events) >= row["completion_tokens"]
        assert all(event.startswith("data: {") and event.endswith("}") for event in events[:-2])


def test_every_endpoint_is_in_the_readme_and_every_one_in_the_readme_is_there() -> None:
    from gateway.app import make_app
    from gateway.settings import load_settings

    app = make_app(load_settings({}), {})
    routes = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    table = README.split("## Endpoints")[1].split("\n\n")[1]
    assert {path for _, path in routes} == set(
        re.findall(r"`(?:[A-Z, `]+ )?(/[a-z0-9_/{}.:+]*)`", _first_column(table))
    )


def _first_column(table: str) -> str:
    return "\n".join(line.split("|")[1] for line in table.splitlines()[2:])

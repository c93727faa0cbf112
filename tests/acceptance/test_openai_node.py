"""The official npm SDK against every dialect."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.gateway import MODELS, running_gateway

pytestmark = pytest.mark.integration

HERE = Path(__file__).parent / "node"
NODE = Path(sys.executable).parent / "node"  # from the wheel, so that its version is ours

EXPECTED = {
    "stream": {"same_text": True, "finish": ["stop"], "same_usage": True, "many_chunks": True},
    "tools": {"finish_reason": "tool_calls", "calls": 1, "name": "get_weather", "city": "string", "used": True},
    "parallel_tools": {"names": ["get_weather", "get_time"], "ids": 2},
    "structured_output": {"name": "string", "count": True},
    "image": {"seen": True},
    "early_break": {"seen": 5},
    "broken_stream": {"raised": True, "code": "upstream_truncated"},
    "errors": {
        "400": "BadRequestError 400",
        "401": "AuthenticationError 401",
        "404": "NotFoundError 404",
        "429": "RateLimitError 429",
        "500": "InternalServerError 502",
        "503": "InternalServerError 503",
    },
}


@pytest.mark.parametrize("dialect", MODELS)
async def test_the_npm_sdk_sees_the_same_whoever_answers(database_url: str, redis_url: str, dialect: str) -> None:
    assert (HERE / "node_modules" / "openai").is_dir(), "`make test` installs it: npm ci in tests/acceptance/node"
    async with running_gateway(database_url, redis_url) as gateway:
        process = await asyncio.create_subprocess_exec(
            NODE,
            "sdk.mjs",
            cwd=HERE,
            stdout=asyncio.subprocess.PIPE,
            env={
                "PATH": os.environ["PATH"],
                "GATEWAY_BASE_URL": gateway.base_url,
                "GATEWAY_API_KEY": gateway.api_key,
                "MODEL": MODELS[dialect],
            },
        )
        out, _ = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0
        results = {}
        for line in out.splitlines():
            result = json.loads(line)
            results[result.pop("check")] = result
        assert results == EXPECTED
        outcomes = [row["outcome"] for row in await gateway.rows()]
        assert outcomes.count("client_abort") == 1

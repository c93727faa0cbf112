"""P1: whatever OpenAI's specification allows in a chat request, and all that is next to it, never makes a server error.

schemathesis (https://schemathesis.readthedocs.io) makes the requests, valid and broken ones: first field by field, then
at random. The document it makes them from is written here, of the types of the official SDK, which is made from
OpenAI's specification (https://github.com/openai/openai-openapi, `CreateChatCompletionRequest`); the ranges of numbers
are that specification's. FUZZ_EXAMPLES says how many are made at random for each provider, and no two runs make the
same: `FUZZ_EXAMPLES=5000 pytest tests/test_fuzz_chat.py`. Without it a few are made, the same each time.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from pydantic import TypeAdapter

from gateway import appkeys
from tests.support.gateway import MODELS, Gateway, running_gateway

pytestmark = pytest.mark.integration

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
)
# What the types call a number and the specification bounds.
RANGES = {
    "max_tokens": (1, 64),
    "max_completion_tokens": (1, 64),
    "temperature": (0, 2),
    "top_p": (0, 1),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "n": (1, 4),
    "seed": (-(2**63), 2**63 - 1),
    "top_logprobs": (0, 20),
}
# What a provider has no word for: one of these in a request hides all the others.
LEFT_OUT = {
    "openai": (),
    "anthropic": ("audio", "functions", "modalities", "moderation", "web_search_options"),
    "ollama": ("audio", "functions", "modalities", "parallel_tool_calls", "tool_choice", "web_search_options"),
}
WORD = {"type": ["string", "null"]}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": WORD, "code": WORD},
            "additionalProperties": False,
        }
    },
}
# A chunk or the end; an error in the middle of a stream is neither.
EVENT = {"type": "object", "properties": {"data": {"pattern": r'^(\{"id":"chatcmpl-|\[DONE\]$)'}}, "required": ["data"]}


def document(provider: str) -> dict[str, Any]:
    """The chat part of OpenAI's specification, of the provider's model and fields, as OpenAPI 3.1."""
    schemas, definitions = TypeAdapter.json_schemas(
        [
            ("request", "validation", TypeAdapter(CompletionCreateParamsNonStreaming)),
            ("answer", "validation", TypeAdapter(ChatCompletion)),
        ],
        ref_template="#/components/schemas/{model}",
    )
    components = definitions["$defs"]
    fields = components["CompletionCreateParamsNonStreaming"]["properties"]
    fields["model"] = {"enum": [MODELS[provider]]}
    fields["stream"] = {"type": ["boolean", "null"]}  # the SDK has a second type for those that do
    fields["messages"]["minItems"] = 1
    for name, (low, high) in RANGES.items():
        fields[name] = {"type": [fields[name]["anyOf"][0]["type"], "null"], "minimum": low, "maximum": high}
    for name in LEFT_OUT[provider]:
        del fields[name]
    served = {
        "application/json": {"schema": schemas["answer", "validation"]},
        "text/event-stream": {"schema": EVENT},
    }
    chat = {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schemas["request", "validation"]}},
        },
        "responses": {
            "200": {"description": "The answer.", "content": served},
            "4XX": {"description": "A refusal.", "content": {"application/json": {"schema": ERROR}}},
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Chat", "version": "1"},
        "paths": {"/chat/completions": {"post": chat}},
        "components": {"schemas": components},
    }


async def schemathesis(gateway: Gateway, folder: Path, provider: str) -> dict[str, Any]:
    """Its report; fails with all that it found, and with the requests that show it."""
    (folder / "chat.json").write_text(json.dumps(document(provider)))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COV")}  # nothing of ours runs
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("schemathesis"),
        *("run", "chat.json", "--url", gateway.base_url, "--header", f"Authorization: Bearer {gateway.api_key}"),
        *("--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing", "--max-examples", str(EXAMPLES or 30)),
        *(() if EXAMPLES else ("--generation-deterministic",)),
        *("--suppress-health-check", "all", "--continue-on-failure", "--no-color", "--output-sanitize", "false"),
        *("--report", "json", "--report-json-path", "report.json"),
        cwd=folder,
        env=environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, said.decode()
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


@pytest.mark.timeout(240 + EXAMPLES)
@pytest.mark.parametrize("provider", MODELS)
async def test_no_chat_request_makes_a_server_error(
    database_url: str, redis_url: str, tmp_path: Path, figure: Callable[[str], None], provider: str
) -> None:
    async with running_gateway(database_url, redis_url) as gateway:
        report = await schemathesis(gateway, tmp_path, provider)
        errors = gateway.app[appkeys.METRICS].internal_errors
        assert [errors.labels(where).value for where in ("request", "stream", "task")] == [0, 0, 0]
        asked = len(gateway.calls)
    assert [report["phases"][name]["status"] for name in ("coverage", "fuzzing")] == ["success", "success"]
    made = report["test_cases"]["generated"]
    figure(f"P1 chat requests of schemathesis, {provider}: {made}, passed on {asked}, server errors 0")
    assert asked > 0

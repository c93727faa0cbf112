"""P1: whatever OpenAI's own types allow in a chat request, and all that is next to it, never makes a server error.

The types are those of the official SDK, which is made from OpenAI's public specification
(https://github.com/openai/openai-openapi, `CreateChatCompletionRequest`); the ranges of numbers are that document's.
FUZZ_EXAMPLES says how many requests of each kind are made, and no two runs make the same: `FUZZ_EXAMPLES=5000 pytest
tests/test_fuzz_chat.py`. Without it a few are made, the same each time.
"""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessageParam
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming

from gateway import appkeys
from tests.support.gateway import MODELS, Gateway, chat_body, running_gateway

pytestmark = pytest.mark.integration

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
FUZZ = settings(
    max_examples=EXAMPLES or 150,
    derandomize=not EXAMPLES,
    deadline=None,  # others run on these cores, too
    suppress_health_check=list(
        HealthCheck
    ),  # the gateway is a fixture of all examples; large requests are slow to make
)
# What the types call a number and the specification bounds.
RANGES: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(1, 64),
    "max_completion_tokens": st.integers(1, 64),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "n": st.integers(1, 4),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "top_logprobs": st.integers(0, 20),
}
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
# The types' word for any JSON, as in a tool's schema; any object at all might be endless.
st.register_type_strategy(object, ANYTHING)


def plain(value: Any) -> Any:
    """As JSON holds it: the types say Iterable, and the SDK takes a set or a generator for one."""
    return json.loads(json.dumps(value, default=list))


@st.composite
def allowed(draw: st.DrawFn) -> dict[str, Any]:
    """A request that the types allow."""
    fields: dict[str, Any] = plain(draw(st.from_type(CompletionCreateParamsNonStreaming)))
    fields["model"] = draw(st.sampled_from(list(MODELS.values())))
    messages: st.SearchStrategy[Any] = st.from_type(ChatCompletionMessageParam)  # type: ignore[arg-type]
    fields["messages"] = plain(draw(st.lists(messages, min_size=1, max_size=4)))
    for name, numbers in RANGES.items():
        if fields.get(name) is not None:
            fields[name] = draw(numbers)
    fields["stream"] = draw(st.booleans())
    if not fields["stream"]:
        fields.pop("stream_options", None)
    return fields


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a request, with each key or index in it."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@st.composite
def near(draw: st.DrawFn) -> dict[str, Any]:
    """A request that is allowed but for one place or two, which hold anything or nothing."""
    fields = draw(allowed())
    for _ in range(draw(st.integers(1, 2))):
        container, key = draw(st.sampled_from(places(fields)))
        if draw(st.booleans()):
            container[key] = draw(ANYTHING)
        else:
            del container[key]
    return fields


@st.composite
def wild(draw: st.DrawFn) -> dict[str, Any]:
    """The fields' names, and anything in them."""
    names = st.sampled_from(sorted(CompletionCreateParamsNonStreaming.__annotations__) + list(RANGES) + ["stream"])
    fields: dict[str, Any] = draw(st.dictionaries(names, ANYTHING, max_size=6))
    return {**chat_body(draw(st.sampled_from(list(MODELS.values())))), **fields}


def made(strategy: st.SearchStrategy[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requests of the kind."""
    requests: list[dict[str, Any]] = []

    @FUZZ
    @given(strategy)
    def make(fields: dict[str, Any]) -> None:
        requests.append(fields)

    make()
    return requests


async def ask(gateway: Gateway, client: aiohttp.ClientSession, fields: dict[str, Any]) -> int:
    """The status, once all else about the answer is as it must be."""
    data = json.dumps(fields)
    async with client.post(f"{gateway.base_url}/chat/completions", data=data) as response:
        body = await response.read()
    assert response.status < 500, (body, data)
    if response.status != 200:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}, (body, data)
    elif response.content_type == "text/event-stream":
        assert body.endswith(b"data: [DONE]\n\n"), (body[-300:], data)
    else:
        assert json.loads(body)["object"] == "chat.completion", (body, data)
    return response.status


@pytest.mark.timeout(120 + EXAMPLES)
@pytest.mark.parametrize("kind", [allowed, near, wild])
async def test_no_chat_request_makes_a_server_error(
    database_url: str,
    redis_url: str,
    figure: Callable[[str], None],
    kind: Callable[[], st.SearchStrategy[dict[str, Any]]],
) -> None:
    requests = await asyncio.to_thread(made, kind())
    turns = asyncio.Semaphore(8)
    async with running_gateway(database_url, redis_url) as gateway:
        headers = {**gateway.headers, "Content-Type": "application/json"}
        async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=60)) as client:

            async def one(fields: dict[str, Any]) -> int:
                async with turns:
                    return await ask(gateway, client, fields)

            statuses = Counter(await asyncio.gather(*(one(fields) for fields in requests)))
        assert gateway.app[appkeys.METRICS].internal_errors.labels("request").value == 0
    served = statuses[200]
    figure(f"P1 fuzzed chat requests, {kind.__name__}: {len(requests)}, of them served {served}, server errors 0")
    assert served > 0

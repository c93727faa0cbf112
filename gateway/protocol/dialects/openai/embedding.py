"""OpenAI's embeddings, and every server that speaks them: both bodies pass as they are.

Source: https://platform.openai.com/docs/api-reference/embeddings
"""

from typing import Any

from gateway.protocol.dialects.openai.reading import error_in
from gateway.protocol.dialects.openai.request import request
from gateway.protocol.errors import GatewayError, UpstreamBadBody
from gateway.protocol.json_object import read_json
from gateway.protocol.refusals import refusal, reported
from gateway.protocol.request import Call, Chunk, Reply, UpstreamRequest
from gateway.protocol.usage import Usage


class EmbeddingTranslator:
    """One upstream attempt; of the protocol's stream nothing is ever asked."""

    done = True

    def __init__(self, call: Call) -> None:
        self._call = call

    def request(self) -> UpstreamRequest:
        return request(self._call, "/embeddings")

    def reply(self, body: bytes) -> Reply:
        parsed = read_json(body)
        if (error := error_in(parsed)) is not None:
            raise reported(error, self._call.target)
        if not isinstance(parsed, dict) or not isinstance(parsed.get("data"), list):
            raise UpstreamBadBody("the provider's answer is no list of embeddings")
        return Reply(body, usage=embedding_usage(parsed.get("usage")))

    def error(self, status: int, body: bytes, retry_after: float | None = None) -> GatewayError:
        return refusal(status, read_json(body), self._call.target, retry_after)

    def feed(self, data: bytes) -> list[Chunk]:
        return []

    def flush(self) -> list[Chunk]:
        raise UpstreamBadBody("embeddings are not streamed")

    def cut(self, usage: Usage) -> bytes:
        return b""


def embedding_usage(usage: Any) -> Usage | None:
    """An embedding has no completion; some servers give the total alone."""
    if not isinstance(usage, dict):
        return None
    prompt = usage.get("prompt_tokens")
    counted = {"prompt_tokens": usage.get("total_tokens") if prompt is None else prompt, "completion_tokens": 0}
    return Usage.from_openai(counted) if counted["prompt_tokens"] is not None else None

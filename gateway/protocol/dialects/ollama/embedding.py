"""OpenAI's embeddings in the words of Ollama's /api/embed.

Source: https://github.com/ollama/ollama/blob/main/docs/api.md#generate-embeddings. The vectors are Ollama's; a client
that asks for base64, as the official SDKs do, gets little-endian 32-bit floats.
"""

import sys
from array import array
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import orjson

from gateway.protocol.dialects.ollama.lines import UNREADABLE, dumps, loads
from gateway.protocol.errors import GatewayError, UnsupportedParameter, UpstreamBadBody
from gateway.protocol.refusals import refusal, reported
from gateway.protocol.request import Call, Chunk, Reply, UpstreamRequest
from gateway.protocol.usage import Usage


class EmbeddingTranslator:
    """One upstream attempt; of the protocol's stream nothing is ever asked."""

    done = True

    def __init__(self, call: Call) -> None:
        self._call = call

    def request(self) -> UpstreamRequest:
        fields = self._call.asked.fields
        asked = fields["input"]
        if isinstance(asked, list) and not all(isinstance(item, str) for item in asked):
            _refuse("input", "Ollama takes text, and no tokens")
        body = {
            "model": self._call.target.model,
            "input": asked,
            "dimensions": fields.get("dimensions"),
            "keep_alive": fields.get("keep_alive"),
            "truncate": fields.get("truncate"),
        }
        kept = {name: value for name, value in body.items() if value is not None}
        return UpstreamRequest("/api/embed", orjson.dumps(kept))

    def reply(self, body: bytes) -> Reply:
        try:
            answer = loads(body)
        except UNREADABLE:
            raise UpstreamBadBody("the provider's answer is not Ollama's JSON") from None
        if answer.get("error") is not None:
            raise reported(answer, self._call.target)
        vectors = answer.get("embeddings")
        if not isinstance(vectors, list) or len(vectors) != _inputs(self._call.asked.fields):
            raise UpstreamBadBody("the provider's answer has not one embedding for each input")
        packed = self._call.asked.fields.get("encoding_format") == "base64"
        usage = Usage.from_openai({"prompt_tokens": answer.get("prompt_eval_count"), "completion_tokens": 0})
        return Reply(self._list(vectors, usage, packed=packed), usage=usage)

    def _list(self, vectors: Sequence[Any], usage: Usage | None, *, packed: bool) -> bytes:
        rows = [
            {"object": "embedding", "index": index, "embedding": _pack(vector) if packed else vector}
            for index, vector in enumerate(vectors)
        ]
        tokens = (usage.prompt_tokens or 0) if usage is not None else 0
        return dumps(
            {
                "object": "list",
                "data": rows,
                "model": self._call.target.model,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    def error(self, status: int, body: bytes, retry_after: float | None = None) -> GatewayError:
        try:
            said: Mapping[str, Any] | None = loads(body)
        except UNREADABLE:
            said = None
        return refusal(status, said, self._call.target, retry_after)

    def feed(self, data: bytes) -> list[Chunk]:
        return []

    def flush(self) -> list[Chunk]:
        raise UpstreamBadBody("embeddings are not streamed")

    def cut(self, usage: Usage) -> bytes:
        return b""


def _refuse(param: str, words: str) -> NoReturn:
    raise UnsupportedParameter(f"unsupported {param}: {words}", param=param)


def _inputs(fields: Mapping[str, Any]) -> int:
    return len(fields["input"]) if isinstance(fields["input"], list) else 1


def _pack(vector: Any) -> str:
    try:
        floats = array("f", vector)
    except (TypeError, OverflowError):
        raise UpstreamBadBody("the provider's answer has an embedding that is no array of numbers") from None
    if sys.byteorder == "big":
        floats.byteswap()
    return b64encode(floats.tobytes()).decode()

"""Embeddings of both kinds: the same text gets the same vector, of unit length.

https://platform.openai.com/docs/api-reference/embeddings, https://github.com/ollama/ollama/blob/main/docs/api.md
"""

from array import array
from base64 import b64encode
from hashlib import shake_128
from math import sqrt
from typing import Any

import orjson

from gateway.mock.formats import count_prompt, read_object
from gateway.mock.openai_completion import count_inputs, prompts_of
from gateway.mock.script import ProviderError, Script, parse_model

DIMENSIONS = 256


def script_of(body: bytes) -> Script:
    """Raises ProviderError."""
    model = read_object(body, "We could not parse the JSON body of your request.").get("model")
    if not isinstance(model, str) or not model:
        raise ProviderError("you must provide a model parameter")
    return parse_model(model)[1]


def openai(body: bytes) -> bytes:
    """Raises ProviderError."""
    fields = read_object(body, "We could not parse the JSON body of your request.")
    packed = fields.get("encoding_format") == "base64"
    size = fields.get("dimensions") or DIMENSIONS
    vectors = [vector(text, size) for text in prompts_of(fields.get("input"))]
    rows = [
        {"object": "embedding", "index": index, "embedding": _pack(values) if packed else values}
        for index, values in enumerate(vectors)
    ]
    tokens = count_inputs(fields["input"])
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return orjson.dumps({"object": "list", "data": rows, "model": fields["model"], "usage": usage})


def ollama(body: bytes, models: frozenset[str]) -> bytes:
    """Raises ProviderError."""
    fields = read_object(body, "invalid character at the beginning of value")
    name = parse_model(fields["model"])[0]
    if not name.startswith("mock-") and name.removesuffix(":latest") not in models:
        raise ProviderError(f"model '{name}' not found", status=404)
    asked: Any = fields.get("input")
    texts = [asked] if isinstance(asked, str) else asked
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ProviderError("invalid input type")
    answer = {
        "model": fields["model"],
        "embeddings": [vector(text, fields.get("dimensions") or DIMENSIONS) for text in texts],
        "total_duration": 14_143_917,
        "load_duration": 1_019_500,
        "prompt_eval_count": sum(max(1, count_prompt(text)) for text in texts),
    }
    return orjson.dumps(answer)


def vector(text: str, dimensions: int) -> list[float]:
    raw = shake_128(text.encode("utf-8", "surrogatepass")).digest(2 * dimensions)
    values = [int.from_bytes(raw[at : at + 2], "little") / 32768 - 1 for at in range(0, len(raw), 2)]
    length = sqrt(sum(value * value for value in values))
    return array("f", [value / length for value in values]).tolist()  # as exact as base64 can say it


def _pack(values: list[float]) -> str:
    return b64encode(array("f", values).tobytes()).decode()

"""What a completion and an embedding request may hold, beside what they share with chat.

Source: the OpenAI API's `CreateCompletionRequest` and `CreateEmbeddingRequest`
(https://github.com/openai/openai-openapi). A field that is not named here passes to OpenAI-shaped providers as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gateway.protocol.checks import (
    Check,
    check_fields,
    check_model,
    check_stream_options,
    integer,
    is_a,
    number,
    refuse,
    stop,
    stream_options,
    user,
)

MAX_INPUTS = 2048  # of one request, https://platform.openai.com/docs/api-reference/embeddings/create
# That come as such in one request: three times what OpenAI embeds at once, and more than any model's window. A larger
# array is work for us and for nobody else.
MAX_TOKENS = 1 << 20

_WORDS = "a non-empty string, an array of strings, an array of tokens or an array of such arrays is required"


def check_completion(fields: Mapping[str, Any]) -> None:
    """Raises InvalidRequest, naming the parameter."""
    check_model(fields)
    check_fields(fields, _COMPLETION)
    _check_input("prompt", fields.get("prompt"), may_be_empty=True)
    if (fields.get("best_of") or 1) > 1 and fields.get("stream"):
        refuse("best_of", "its results cannot be streamed")
    check_stream_options(fields)


def check_embedding(fields: Mapping[str, Any]) -> None:
    """Raises InvalidRequest, naming the parameter."""
    check_model(fields)
    check_fields(fields, _EMBEDDING)
    _check_input("input", fields.get("input"))


def _format(name: str, value: Any) -> None:
    if value not in ("float", "base64"):
        refuse(name, "float or base64 is required")


_COMPLETION: Mapping[str, Check] = {
    "stream": is_a(bool, "a boolean"),
    "stream_options": stream_options,
    "max_tokens": integer(0),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "n": integer(1, 128),
    "best_of": integer(0, 20),
    "logprobs": integer(0, 5),
    "echo": is_a(bool, "a boolean"),
    "suffix": is_a(str, "a string"),
    "seed": integer(-(2**63), 2**63),
    "stop": stop,
    "logit_bias": is_a(dict, "an object"),
    "user": user,
}

_EMBEDDING: Mapping[str, Check] = {
    "dimensions": integer(1),
    "encoding_format": _format,
    "user": user,
}


# --- a prompt, or what is embedded ----------------------------------------------------------------------------------


def _check_input(name: str, value: Any, *, may_be_empty: bool = False) -> None:
    if isinstance(value, str):
        if not value and not may_be_empty:
            refuse(name, _WORDS)
        return
    if not isinstance(value, list) or not value:
        refuse(name, _WORDS)
    if isinstance(value[0], int):
        _check_tokens(name, [value])
        return
    if len(value) > MAX_INPUTS:
        refuse(name, f"at most {MAX_INPUTS} inputs")
    kinds = set(map(type, value))
    if kinds == {list}:
        _check_tokens(name, value)
    elif kinds != {str} or ("" in value and not may_be_empty):
        refuse(name, _WORDS)


def _check_tokens(name: str, inputs: Sequence[Sequence[Any]]) -> None:
    """Counted before they are looked at, and looked at by C, in a fifth of the time that Python takes."""
    if sum(map(len, inputs)) > MAX_TOKENS:
        refuse(name, f"at most {MAX_TOKENS} tokens")
    if not all(set(map(type, tokens)) == {int} and min(tokens) >= 0 for tokens in inputs):
        refuse(name, _WORDS)


def texts_and_tokens(value: Any) -> tuple[Iterator[str], int]:
    """What of a checked input is text, and how many tokens the rest of it is."""
    if isinstance(value, str):
        return iter((value,)), 0
    if isinstance(value[0], str):  # all are of one kind
        return iter(value), 0
    return iter(()), sum(map(len, value)) if isinstance(value[0], list) else len(value)

"""What the errors of vendors mean, in the words that clients look for."""

from dataclasses import replace
from typing import Any

import pytest

from gateway.protocol.refusals import HIDDEN, refusal
from gateway.protocol.routing import Provider, Target

pytestmark = pytest.mark.unit

CREDENTIAL = "sk-0123456789"
TARGET = Target(Provider("acme", "openai", "https://acme.example/v1", api_key=CREDENTIAL), "m", CREDENTIAL)

# Shortened from what the vendors answer.
VENDORS = {
    "openai, no such model": (404, {"error": {"message": "The model `x` does not exist", "code": "model_not_found"}}),
    "anthropic, no such model": (404, {"type": "error", "error": {"type": "not_found_error", "message": "model: x"}}),
    "azure, no such model": (404, {"error": {"code": "DeploymentNotFound", "message": "The API deployment …"}}),
    "gemini, no such model": (404, [{"error": {"code": 404, "message": "models/x is not found", "status": "NOT_FOUND"}}]),
    "ollama, no such model": (404, {"error": "model 'x' not found"}),
    "openai, too long": (
        400,
        {"error": {"message": "Your input exceeds the context window", "code": "context_length_exceeded"}},
    ),
    "anthropic, too long": (
        400,
        {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: 9 tokens > 8"}},
    ),
    "deepseek, too long": (
        400,
        {
            "error": {
                "message": "This model's maximum context length is 8 tokens.",
                "type": "invalid_request_error",
                "code": "invalid_request_error",
            }
        },
    ),
    "gemini, too long": (
        400,
        [{"error": {"message": "The input token count (9) exceeds the maximum number of tokens allowed (8).",
                    "code": 400, "status": "INVALID_ARGUMENT"}}],
    ),
    "perplexity, too long": (
        400,
        {"error": {"message": "The total length of all messages is too long.", "type": "too_many_prompt_tokens",
                   "code": 400}},
    ),
    "vllm, too long": (
        400,
        {"object": "error", "message": "This model's maximum context length is 8 tokens.", "code": 400},
    ),
    "ollama, too long": (400, {"error": "prompt too long; exceeded max context length by 1 tokens"}),
}  # fmt: skip


@pytest.mark.parametrize("name", VENDORS)
def test_vendors_say_the_same_in_different_words(name: str) -> None:
    error = refusal(*VENDORS[name], TARGET)
    expected = ("model_not_found", "model") if "model" in name else ("context_length_exceeded", "messages")
    assert (error.error_code, error.param, error.kind) == (*expected, "http_4xx")
    assert error.http_status == VENDORS[name][0]
    assert error.message not in ("", HIDDEN)


def test_a_code_that_says_more_is_passed_on() -> None:
    said = {"error": {"message": "Error while downloading", "code": "invalid_image_url", "param": "url"}}
    error = refusal(400, said, TARGET)
    assert (error.error_code, error.param) == ("invalid_image_url", "url")


def test_an_account_that_is_to_be_paid_is_no_refusal_of_the_request() -> None:
    """DeepSeek's words: https://api-docs.deepseek.com/quick_start/error_codes"""
    said = {"error": {"message": "Insufficient Balance", "type": "unknown_error", "code": "invalid_request_error"}}
    error = refusal(402, said, TARGET)
    assert (error.http_status, error.error_code, error.kind) == (429, "insufficient_quota", "http_429")
    assert refusal(402, said, replace(TARGET, own_credential=True)).http_status == 402


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, {"detail": "Invalid API Key"}),
        (403, {"error": {"message": "no"}}),
        (400, [{"error": {"code": 400, "message": "API key not valid. Please pass a valid API key.",
                          "status": "INVALID_ARGUMENT"}}]),
        (400, {"code": "Client specified an invalid argument", "error": f"Incorrect API key provided: {CREDENTIAL}."}),
        (400, {"error": {"message": "x", "code": "invalid_api_key"}}),
    ],
)  # fmt: skip
def test_a_refused_credential_is_the_operators_affair_whatever_its_status(status: int, said: Any) -> None:
    error = refusal(status, said, TARGET)
    assert (error.http_status, error.error_code, error.kind) == (502, "provider_auth", "auth")
    assert CREDENTIAL not in error.message
    own = refusal(status, said, replace(TARGET, own_credential=True))
    assert (own.http_status, own.kind) == (403 if status == 403 else 401, "http_4xx")
    assert CREDENTIAL not in own.message

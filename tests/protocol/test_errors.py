import inspect
from collections.abc import Callable

import httpx2
import openai
import orjson
import pytest

from gateway.protocol import errors
from gateway.protocol.errors import UPSTREAM_ERROR_KINDS, GatewayError, UpstreamError, UpstreamRejected

pytestmark = pytest.mark.unit

CLASSES = [
    each
    for _, each in inspect.getmembers(errors, inspect.isclass)
    if issubclass(each, GatewayError) and each is not UpstreamRejected
]
every_class = pytest.mark.parametrize("kind", CLASSES, ids=lambda each: each.__name__)

# What the official SDK makes of a status, https://github.com/openai/openai-python#handling-errors.
EXPECTED = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
}


def client(answer: Callable[[httpx2.Request], httpx2.Response]) -> openai.OpenAI:
    transport = httpx2.MockTransport(answer)
    return openai.OpenAI(
        api_key="k",
        base_url="https://gateway.example/v1",
        max_retries=0,
        http_client=httpx2.Client(transport=transport),
    )


def ask(sdk: openai.OpenAI, *, stream: bool) -> list[object]:
    return list(sdk.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], stream=stream))


@every_class
def test_an_error_is_an_openai_error_object(kind: type[GatewayError]) -> None:
    assert orjson.loads(kind("it failed").body()) == {
        "error": {"message": "it failed", "type": kind.type, "param": None, "code": kind.code}
    }


@every_class
def test_the_sdk_raises_the_exception_that_a_reader_expects(kind: type[GatewayError]) -> None:
    error = kind("it failed")
    sdk = client(lambda _: httpx2.Response(error.http_status, content=error.body()))
    by_default = openai.InternalServerError if error.http_status >= 500 else openai.APIStatusError
    with pytest.raises(EXPECTED.get(error.http_status, by_default), match="it failed") as caught:
        ask(sdk, stream=False)
    assert (caught.value.code, caught.value.type) == (error.error_code, error.error_type)


@every_class
def test_the_sdk_raises_on_the_event_that_ends_a_broken_stream(kind: type[GatewayError]) -> None:
    body = b'data: {"id":"1","object":"chat.completion.chunk","choices":[]}\n\n' + kind("it failed").event()
    headers = {"content-type": "text/event-stream"}
    with pytest.raises(openai.APIError, match="it failed"):
        ask(client(lambda _: httpx2.Response(200, content=body, headers=headers)), stream=True)


def test_code_param_and_retry_after_are_the_instances_own() -> None:
    error = errors.RateLimited("slower", code="tokens", param="model", retry_after=2.5)
    assert error.object()["error"]["code"] == "tokens"
    assert error.object()["error"]["param"] == "model"
    assert error.retry_after == 2.5
    assert errors.RateLimited("slower").error_code == "rate_limit_exceeded"


def test_a_rejection_keeps_the_providers_status_and_type() -> None:
    error = UpstreamRejected("no such field", status=422, type="invalid_field", param="x", code="bad")
    assert error.http_status == 422
    assert error.object()["error"] == {
        "message": "no such field",
        "type": "invalid_field",
        "param": "x",
        "code": "bad",
    }


@pytest.mark.parametrize("kind", [each for each in CLASSES if issubclass(each, UpstreamError)])
def test_every_upstream_error_has_a_kind_that_the_metric_knows(kind: type[UpstreamError]) -> None:
    assert kind("x").kind in UPSTREAM_ERROR_KINDS
    assert kind("x", kind="reset").kind == "reset"
    assert kind("x").kind != "reset"


def test_a_rejection_is_counted_as_the_clients() -> None:
    assert UpstreamRejected("x", status=400).kind == "http_4xx"

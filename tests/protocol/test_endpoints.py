"""Which endpoints are passed on, and what may stand for an id in their paths."""

import pytest

from gateway.protocol.endpoints import ENDPOINTS, is_id, not_found

pytestmark = pytest.mark.unit


def test_what_runs_a_model_and_cannot_be_priced_before_is_so_marked() -> None:
    priced = {endpoint.path for endpoint in ENDPOINTS if endpoint.priced}
    assert priced == {path for path in (e.path for e in ENDPOINTS if e.runs_model) if path != "/moderations"}
    assert all(endpoint.method == "POST" for endpoint in ENDPOINTS if endpoint.runs_model)
    assert len({(endpoint.method, endpoint.path) for endpoint in ENDPOINTS}) == len(ENDPOINTS)


@pytest.mark.parametrize("text", ["", ".", "..", "a/b", "a%2fb", "a?b", "a b", "é", "a" * 129, "a\n", None, 7, ["a"]])
def test_what_means_something_in_a_path_is_no_id(text: object) -> None:
    assert not is_id(text)


def test_an_id_is_what_providers_give() -> None:
    assert is_id("file-AbC123_x")
    assert not_found("file", "file-1")["error"]["message"] == "No such File object: file-1"  # type: ignore[index]

"""The endpoints of OpenAI's that are passed on by path: a closed list, so that nothing else of a provider is reached.

Source: https://platform.openai.com/docs/api-reference (images, audio, moderations, files, batches)
"""

import re
from typing import Literal, NamedTuple

Kind = Literal["", "file", "batch"]  # of what stays with the provider
Act = Literal["run", "create", "list", "show", "change", "delete"]

ID = "[A-Za-z0-9_-]{1,128}"  # of a file or a batch: nothing in it has a meaning in a path


class Endpoint(NamedTuple):
    method: str
    path: str  # behind /v1 here, and behind a provider's base URL; `{id}` is one of its objects
    act: Act = "run"
    kind: Kind = ""
    runs_model: bool = False  # one that the caller chooses
    priced: bool = False  # what it costs is known when it is over

    @property
    def names_model(self) -> bool:
        """Its body does; those of a batch stand in its file, which is not looked at."""
        return self.runs_model and not self.kind


ENDPOINTS = (
    Endpoint("POST", "/images/generations", runs_model=True, priced=True),
    Endpoint("POST", "/images/edits", runs_model=True, priced=True),
    Endpoint("POST", "/images/variations", runs_model=True, priced=True),
    Endpoint("POST", "/audio/speech", runs_model=True, priced=True),
    Endpoint("POST", "/audio/transcriptions", runs_model=True, priced=True),
    Endpoint("POST", "/audio/translations", runs_model=True, priced=True),
    Endpoint("POST", "/moderations", runs_model=True),
    Endpoint("POST", "/files", "create", "file"),
    Endpoint("GET", "/files", "list", "file"),
    Endpoint("GET", "/files/{id}", "show", "file"),
    Endpoint("GET", "/files/{id}/content", "run", "file"),
    Endpoint("DELETE", "/files/{id}", "delete", "file"),
    Endpoint("POST", "/batches", "create", "batch", runs_model=True, priced=True),
    Endpoint("GET", "/batches", "list", "batch"),
    Endpoint("GET", "/batches/{id}", "show", "batch"),
    Endpoint("POST", "/batches/{id}/cancel", "change", "batch"),
)

_IS_ID = re.compile(ID)


def is_id(text: object) -> bool:
    return isinstance(text, str) and _IS_ID.fullmatch(text) is not None


def not_found(kind: Kind, object_id: str) -> dict[str, object]:
    """OpenAI's own error object, word for word: who may not know of an object cannot tell that it is there."""
    words = f"No such File object: {object_id}" if kind == "file" else f"No batch found with id '{object_id}'."
    param = "id" if kind == "file" else None
    return {"error": {"message": words, "type": "invalid_request_error", "param": param, "code": None}}

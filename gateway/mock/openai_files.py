"""OpenAI's files and batches (https://platform.openai.com/docs/api-reference/files): known by size and digest.

A small file is kept. Of a large one the content is a pattern of its size, made when it is asked for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import orjson
from aiohttp import BodyPartReader, web

from gateway.mock.formats import CREATED, read_object
from gateway.mock.script import ProviderError

KEPT = 1 << 16  # bytes of a file
PIECE = 1 << 16  # bytes
PATTERN = bytes(range(256)) * (PIECE // 256)
BAD_JSON = "We could not parse the JSON body of your request."


@dataclass(slots=True)
class Part:
    """A part of a form whose content is a file: read, and forgotten."""

    filename: str
    size: int = 0
    digest: str = ""
    kept: bytes = b""  # all of a small one


@dataclass(slots=True)
class Form:
    values: dict[str, str] = field(default_factory=dict)
    files: list[Part] = field(default_factory=list)


async def read_form(request: web.Request) -> Form:
    """Raises ProviderError for what is no form."""
    form = Form()
    try:
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader):
                raise ProviderError("Could not parse multipart form")
            if part.filename is None:
                form.values[part.name or ""] = (await part.read()).decode()
            else:
                form.files.append(await _read_file(part))
    except (ValueError, AssertionError):
        raise ProviderError("Could not parse multipart form") from None
    return form


async def _read_file(part: BodyPartReader) -> Part:
    file, digest = Part(part.filename or ""), sha256()
    while data := await part.read_chunk(PIECE):
        digest.update(data)
        file.size += len(data)
        file.kept = file.kept + data if file.size <= KEPT else b""
    file.digest = digest.hexdigest()
    return file


def pattern(size: int) -> Iterator[bytes]:
    for at in range(0, size, PIECE):
        yield PATTERN[: min(PIECE, size - at)]


class Files:
    """Of one mock, all accounts' in one: as with an operator's one key."""

    def __init__(self) -> None:
        self._files: dict[str, dict[str, Any]] = {}
        self._contents: dict[str, bytes] = {}
        self._batches: dict[str, dict[str, Any]] = {}

    async def create(self, request: web.Request) -> dict[str, Any]:
        form = await read_form(request)
        if len(form.files) != 1 or "purpose" not in form.values:
            raise ProviderError("Missing required parameter: 'purpose' or 'file'.", param="file")
        return self._add(form.files[0], form.values["purpose"])

    def _add(self, part: Part, purpose: str) -> dict[str, Any]:
        file_id = f"file-mock{len(self._files) + 1:06d}"
        self._contents[file_id] = part.kept
        made = {
            "id": file_id,
            "object": "file",
            "bytes": part.size,
            "created_at": CREATED,
            "filename": part.filename,
            "purpose": purpose,
            "status": "processed",
            "sha256": part.digest,
        }
        self._files[file_id] = made
        return made

    def show(self, file_id: str) -> dict[str, Any]:
        if file_id not in self._files:
            raise ProviderError(f"No such File object: {file_id}", status=404, param="id")
        return self._files[file_id]

    def content(self, file_id: str) -> tuple[int, Iterator[bytes]]:
        """Its size and its pieces."""
        size = self.show(file_id)["bytes"]
        kept = self._contents[file_id]
        return size, iter([kept]) if kept or not size else pattern(size)

    def delete(self, file_id: str) -> dict[str, Any]:
        self.show(file_id)
        self._files[file_id] = {}  # its number is not given again
        del self._contents[file_id]
        return {"id": file_id, "object": "file", "deleted": True}

    def list_files(self, query: Mapping[str, str]) -> dict[str, Any]:
        purpose = query.get("purpose")
        files = [file for file in self._files.values() if file and purpose in (None, file["purpose"])]
        return _page(files, query, 10_000)

    # --- batches

    def create_batch(self, body: bytes) -> dict[str, Any]:
        fields = read_object(body, BAD_JSON)
        self.show(str(fields.get("input_file_id")))
        batch_id = f"batch_mock{len(self._batches) + 1:06d}"
        self._batches[batch_id] = {
            "id": batch_id,
            "object": "batch",
            "endpoint": fields.get("endpoint"),
            "input_file_id": fields["input_file_id"],
            "completion_window": fields.get("completion_window"),
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": CREATED,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "usage": {"input_tokens": 7, "output_tokens": 9, "total_tokens": 16},
        }
        return self._batches[batch_id]

    def show_batch(self, batch_id: str) -> dict[str, Any]:
        """Done by the time that somebody looks."""
        batch = self._batch(batch_id)
        if batch["status"] == "validating":
            content = b'{"custom_id":"1","response":{"status_code":200}}\n'
            part = Part("output.jsonl", len(content), sha256(content).hexdigest(), content)
            batch["status"], batch["output_file_id"] = "completed", self._add(part, "batch_output")["id"]
        return batch

    def cancel_batch(self, batch_id: str) -> dict[str, Any]:
        batch = self._batch(batch_id)
        batch["status"] = "cancelling"
        return batch

    def list_batches(self, query: Mapping[str, str]) -> dict[str, Any]:
        return _page(list(self._batches.values()), query, 20)

    def _batch(self, batch_id: str) -> dict[str, Any]:
        if batch_id not in self._batches:
            raise ProviderError(f"No batch found with id '{batch_id}'.", status=404)
        return self._batches[batch_id]


def _page(made: list[dict[str, Any]], query: Mapping[str, str], usual: int) -> dict[str, Any]:
    """The newest first."""
    rows = made if query.get("order") == "asc" else made[::-1]
    after, limit = query.get("after"), int(query.get("limit", usual))
    ids = [row["id"] for row in rows]
    start = ids.index(after) + 1 if after in ids else 0
    data = rows[start : start + limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(rows) > start + limit,
    }


def dumps(value: dict[str, Any]) -> bytes:
    return orjson.dumps(value)

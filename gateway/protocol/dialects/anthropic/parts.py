"""The parts of one message as Anthropic's blocks: texts, images, files."""

import base64
import binascii
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from gateway.protocol.dialects.anthropic.errors import unsupported
from gateway.protocol.dialects.anthropic.objects import Json
from gateway.protocol.errors import InvalidRequest


def message_blocks(where: str, message: Json, parts: "Parts") -> list[Json]:
    blocks = content_blocks(where, message.get("content"), parts)
    if blocks and isinstance(message.get("cache_control"), dict):
        blocks[-1] |= cache_control(message)
    return blocks


def content_blocks(where: str, content: Any, parts: "Parts") -> list[Json]:
    if not isinstance(content, list):
        return text_blocks(content or "")
    blocks: list[Json] = []
    for index, part in enumerate(content):
        path = f"{where}.content[{index}]"
        convert = parts.get(part["type"])
        if convert is None:
            raise unsupported(path, f"no {part['type']} here")
        blocks += [block | cache_control(part) for block in convert(path, part)]
    return blocks


def text_blocks(text: str) -> list[Json]:
    return [{"type": "text", "text": text}] if text.strip() else []


def cache_control(*holders: Json) -> Json:
    """Anthropic's `cache_control` where the client put it, or what OpenAI calls a cache breakpoint."""
    for holder in holders:
        if isinstance(holder.get("cache_control"), dict):
            return {"cache_control": holder["cache_control"]}
        if isinstance(holder.get("prompt_cache_breakpoint"), dict):
            ttl = holder["prompt_cache_breakpoint"].get("ttl")
            return {"cache_control": {"type": "ephemeral"} | ({"ttl": ttl} if ttl in ("5m", "1h") else {})}
    return {}


def _text_part(where: str, part: Json) -> Iterable[Json]:
    return text_blocks(part["text"])


def _refusal_part(where: str, part: Json) -> Iterable[Json]:
    refusal = part.get("refusal")
    return text_blocks(refusal) if isinstance(refusal, str) else []


_IMAGE_TYPES = {f"image/{name}": f"image/{name}" for name in ("jpeg", "png", "gif", "webp")}
_IMAGE_TYPES["image/jpg"] = "image/jpeg"  # not registered, and common


def _image_part(where: str, part: Json) -> Iterator[Json]:
    url: str = part["image_url"]["url"]
    if url[:8].lower().startswith(("http://", "https://")):
        yield {"type": "image", "source": {"type": "url", "url": url}}
        return
    media_type, data = _data_url(f"{where}.image_url.url", url)
    if media_type not in _IMAGE_TYPES:
        raise InvalidRequest(
            f"invalid {where}.image_url.url: a JPEG, PNG, GIF or WebP image is required",
            param=f"{where}.image_url.url",
        )
    source = {"type": "base64", "media_type": _IMAGE_TYPES[media_type], "data": data}
    yield {"type": "image", "source": source}


def _data_url(param: str, url: str) -> tuple[str, str]:
    """Media type and base64 text of a `data:` URL (RFC 2397); parameters of the type are dropped."""
    head, comma, data = url.partition(",")
    if not comma or not head[:5].lower() == "data:" or not head.lower().endswith(";base64"):
        raise InvalidRequest(f"invalid {param}: an http or a base64 data URL is required", param=param)
    return head[5:].partition(";")[0].strip().lower(), data


def _file_part(where: str, part: Json) -> Iterator[Json]:
    file = part.get("file")
    if not isinstance(file, dict):
        raise InvalidRequest(f"invalid {where}.file: an object is required", param=f"{where}.file")
    if not isinstance(file.get("file_data"), str):
        raise unsupported(f"{where}.file.file_id", "send the file itself in file_data")
    filename = file.get("filename")
    name = filename if isinstance(filename, str) else ""
    document = {
        "type": "document",
        "source": _document_source(f"{where}.file.file_data", file["file_data"], name),
    }
    yield document | ({"title": name} if name else {})


def _document_source(param: str, data: str, name: str) -> Json:
    media_type = "application/pdf" if name.lower().endswith(".pdf") else ""
    if data[:5].lower() == "data:":
        media_type, data = _data_url(param, data)
    if media_type == "application/pdf":
        return {"type": "base64", "media_type": media_type, "data": data}
    if not media_type.startswith("text/") and media_type != "application/json":
        raise InvalidRequest(f"invalid {param}: a PDF or a text file is required", param=param)
    try:
        text = base64.b64decode(data, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        raise InvalidRequest(f"invalid {param}: base64 of UTF-8 text is required", param=param) from None
    return {"type": "text", "media_type": "text/plain", "data": text}


Parts = Mapping[str, Callable[[str, Json], Iterable[Json]]]

TEXT_ONLY: Parts = {"text": _text_part}
ASSISTANT_PARTS: Parts = {"text": _text_part, "refusal": _refusal_part}
USER_PARTS: Parts = {"text": _text_part, "image_url": _image_part, "file": _file_part}

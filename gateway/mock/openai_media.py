"""OpenAI's images, audio and moderations: written in advance, as everything here.

https://platform.openai.com/docs/api-reference/images, …/audio, …/moderations
"""

from base64 import b64encode
from typing import Any, NamedTuple

import orjson
from aiohttp import web

from gateway.mock.formats import CREATED, count_prompt, read_object
from gateway.mock.openai_files import BAD_JSON, PATTERN, Form, read_form
from gateway.mock.script import ProviderError, Script, parse_model

SMALL, LARGE = 1 << 10, 2 << 20  # bytes of a picture; of a large one there is more base64 than anybody should hold
SPOKEN = 1 << 10  # bytes of sound for a character
_USUAL = {"moderations": "omni-moderation-latest"}


class Media(NamedTuple):
    """An answer: what it is, and its pieces."""

    script: Script
    model: str
    content_type: str
    pieces: list[bytes]
    whole: bool  # its length is told


async def read_media(request: web.Request, name: str) -> Media:
    """Raises ProviderError. `name` is the endpoint's path, without /v1/."""
    if request.content_type == "multipart/form-data":
        form = await read_form(request)
        fields: dict[str, Any] = dict(form.values)
        fields["stream"] = fields.get("stream") == "true"
    else:
        form = Form()
        fields = read_object(await request.read(), BAD_JSON)
    model = fields.get("model") or _USUAL.get(name)
    if not isinstance(model, str):
        raise ProviderError("you must provide a model parameter")
    script = parse_model(model)[1]
    if name == "moderations":
        return Media(script, model, "application/json", [_moderation(model, fields.get("input"))], True)
    if name == "audio/speech":
        return _speech(script, model, fields)
    if name.startswith("audio/"):
        return _transcript(script, model, fields, form)
    return _image(script, model, fields, form)


def _usage(prompt: Any, output: int) -> dict[str, Any]:
    given = count_prompt(str(prompt or ""))
    return {"input_tokens": given, "output_tokens": output, "total_tokens": given + output}


def _image(script: Script, model: str, fields: dict[str, Any], form: Form) -> Media:
    picture = b64encode((PATTERN * 32)[: LARGE if fields.get("quality") == "high" else SMALL]).decode()
    usage = _usage(fields.get("prompt"), 272)
    if fields.get("stream"):
        done = {"type": "image_generation.completed", "b64_json": picture, "usage": usage}
        part = {"type": "image_generation.partial_image", "b64_json": picture[:64], "partial_image_index": 0}
        return Media(script, model, "text/event-stream", [_event(part), _event(done)], False)
    seen = [{"bytes": file.size, "sha256": file.digest} for file in form.files]
    row = {"b64_json": picture, "revised_prompt": str(fields.get("prompt", "")), "seen": seen}
    answer = {"created": CREATED, "data": [row] * int(fields.get("n") or 1), "usage": usage}
    return Media(script, model, "application/json", [orjson.dumps(answer)], True)


def _speech(script: Script, model: str, fields: dict[str, Any]) -> Media:
    spoken = [(PATTERN)[:SPOKEN]] * len(str(fields.get("input", "")))
    if fields.get("stream_format") == "sse":
        events = [_event({"type": "speech.audio.delta", "audio": b64encode(piece).decode()}) for piece in spoken]
        done = {"type": "speech.audio.done", "usage": _usage(fields.get("input"), len(spoken))}
        return Media(script, model, "text/event-stream", [*events, _event(done)], False)
    return Media(script, model, "audio/mpeg", spoken, False)


def _transcript(script: Script, model: str, fields: dict[str, Any], form: Form) -> Media:
    if len(form.files) != 1:
        raise ProviderError("Missing required parameter: 'file'.", param="file")
    file = form.files[0]
    text = f"{file.size} bytes, {file.digest}"
    usage = {"type": "tokens", **_usage(text, 5)}
    if fields.get("stream"):
        delta, done = {"type": "transcript.text.delta", "delta": text}, {"type": "transcript.text.done", "text": text}
        return Media(script, model, "text/event-stream", [_event(delta), _event({**done, "usage": usage})], False)
    if fields.get("response_format") == "text":
        return Media(script, model, "text/plain; charset=utf-8", [f"{text}\n".encode()], True)
    return Media(script, model, "application/json", [orjson.dumps({"text": text, "usage": usage})], True)


def _moderation(model: str, asked: Any) -> bytes:
    texts = asked if isinstance(asked, list) else [asked]
    rows = [{"flagged": "kill" in str(text), "categories": {}, "category_scores": {}} for text in texts]
    return orjson.dumps({"id": "modr-mock", "model": model, "results": rows})


def _event(said: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (str(said["type"]).encode(), orjson.dumps(said))

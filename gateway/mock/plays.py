"""One answer as bytes, with the fault that the script wants worked into it."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from gateway.mock.answers import Answer, Ask, answer
from gateway.mock.formats import Format, Wire

EVENT_256K = 256 << 10  # bytes
HUGE_EVENT = 2 << 20
HTML = b"<!DOCTYPE html>\n<html><head><title>Welcome</title></head><body><h1>It works!</h1></body></html>\n"
_NEWLINES = {"lf": b"\n", "crlf": b"\r\n", "cr": b"\r"}

Ending = Literal["keep", "reset_after_reply", "reset_on_reuse", "truncate", "reset", "stall", "endless"]


@dataclass(frozen=True, slots=True)
class Play:
    """What is written after the headers, frame by frame; `chunks` are the same frames as HTTP chunks."""

    content_type: str
    frames: tuple[bytes, ...]
    ending: Ending = "keep"
    status: int = 200
    length: int | None = None  # the Content-Length that is declared; None: chunked
    repeated: bytes = b""  # what an endless one goes on with
    encoding: str = ""
    location: str = ""
    chunks: tuple[bytes, ...] = ()


def prepare(form: Format, ask: Ask) -> Play:
    """The whole answer to a request. Raises ProviderError when the script's fault is one."""
    match ask.script.fault:
        case "html":
            return _page("text/html; charset=utf-8", HTML)
        case "empty":
            return _page(form.STREAM_TYPE if ask.stream else form.JSON_TYPE, b"")
        case "redirect":
            return replace(_page("text/plain", b""), status=307, location="/elsewhere")
        case "broken_json":
            return _page(form.JSON_TYPE, _half(form.reply(ask, answer(ask))))
    said = answer(ask)
    play = _stream(form, ask, said) if ask.stream else _reply(form, ask, said)
    if ask.script.fault == "gzip":
        play = _compress(play)
    if play.length is not None:
        return play
    return replace(play, chunks=tuple(b"%x\r\n%s\r\n" % (len(frame), frame) for frame in play.frames))


def _page(content_type: str, body: bytes) -> Play:
    return Play(content_type, (body,), length=len(body))


def _half(body: bytes) -> bytes:
    return body[: len(body) // 2]


# --- streams ------------------------------------------------------------------------------------------------------

_ENDINGS: dict[str, Ending] = {
    "truncate": "truncate",
    "reset": "reset",
    "stall": "stall",
    "hang_open": "stall",
    "endless": "endless",
    "reset_after_reply": "reset_after_reply",
    "reset_on_reuse": "reset_on_reuse",
}


def _stream(form: Format, ask: Ask, said: Answer) -> Play:
    wire = form.stream(ask, said)
    steps = [step for step in _steps(form, ask, said, wire) if step]
    first = wire.head + (steps[0] if steps else b"")
    frames = tuple(frame for frame in (first, *steps[1:]) if frame)
    repeated = form.delta(ask, said, " and on")
    newline = _NEWLINES[ask.script.newline]
    if newline != b"\n":
        frames = tuple(frame.replace(b"\n", newline) for frame in frames)
        repeated = repeated.replace(b"\n", newline)
    ending = _ENDINGS.get(ask.script.fault, "keep")
    return Play(form.STREAM_TYPE, frames, ending, repeated=repeated if ending == "endless" else b"")


def _steps(form: Format, ask: Ask, said: Answer, wire: Wire) -> Iterator[bytes]:
    """What is sent after the head, one item a beat."""
    fault = ask.script.fault
    before, rest = wire.deltas[: ask.script.after], wire.deltas[ask.script.after :]
    yield from before
    match fault:
        case "reset" | "truncate" | "cut" | "stall" | "endless":
            return
        case "error_event":
            yield form.ERROR_EVENT
            return
        case "bad_json":
            yield form.BAD_EVENT
        case "bad_json_3":
            yield from [form.BAD_EVENT] * 3
        case "event_256k":
            yield form.delta(ask, said, "x" * (EVENT_256K - 1024))
        case "huge_event":
            yield form.delta(ask, said, "x" * HUGE_EVENT)
    yield from rest
    yield wire.tail if fault == "no_done" else wire.tail + wire.done


# --- whole answers ------------------------------------------------------------------------------------------------


def _reply(form: Format, ask: Ask, said: Answer) -> Play:
    fault = ask.script.fault
    if fault == "error_event":
        raise form.failure(500)
    if fault in ("event_256k", "huge_event"):
        said = replace(said, text=("x" * (EVENT_256K - 1024 if fault == "event_256k" else HUGE_EVENT),))
    body = form.reply(ask, said)
    match fault:
        case "reset" | "truncate" | "stall":
            return Play(form.JSON_TYPE, (_half(body),), _ENDINGS[fault], length=len(body))
        case "cut":
            return Play(form.JSON_TYPE, (_half(body),), "truncate", length=len(body))
        case "bad_json" | "bad_json_3":
            return _page(form.JSON_TYPE, _half(body))
        case "endless":
            return Play(form.JSON_TYPE, (_half(body),), "endless", repeated=b" " * 1024)
        case "hang_open":
            return Play(form.JSON_TYPE, (body,), "stall")
    return Play(form.JSON_TYPE, (body,), _ENDINGS.get(fault, "keep"), length=len(body))


def _compress(play: Play) -> Play:
    gzip = zlib.compressobj(wbits=31)
    frames = [gzip.compress(frame) + gzip.flush(zlib.Z_SYNC_FLUSH) for frame in play.frames]
    frames[-1] += gzip.flush()
    length = sum(map(len, frames)) if play.length is not None else None
    return replace(play, frames=tuple(frames), encoding="gzip", length=length)

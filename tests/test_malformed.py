"""P1: what is malformed gets a 4xx, or a closed connection; never a 5xx, never a hang, and no provider hears of it.

Each case is written to a socket of its own, byte for byte. After each a good request is served, and the provider was
called for the good ones alone: what an attempt at smuggling hides in its body is a good request, too.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from gateway import appkeys
from tests.support.gateway import MODELS, Gateway, chat_body, running_gateway

pytestmark = pytest.mark.integration

PATIENCE = 20.0  # seconds for an answer: the gateway's own time-outs are one second here
AT_ONCE = 16  # cases
KEY = b"KEY"  # stands for the gateway's key in the tables below

LINE = b"POST /v1/chat/completions HTTP/1.1\r\n"
HOST = b"Host: gateway\r\n"
AUTH = b"Authorization: Bearer " + KEY + b"\r\n"
JSON = b"Content-Type: application/json\r\n"
HEAD = LINE + HOST + AUTH + JSON
GOOD = json.dumps(chat_body(MODELS["openai"])).encode()
HIDDEN = HEAD + b"Content-Length: %d\r\n\r\n" % len(GOOD) + GOOD
CHUNKED = b"Transfer-Encoding: chunked\r\n"


@dataclass(frozen=True)
class Case:
    name: str
    request: bytes
    statuses: tuple[int, ...] = (400,)
    closes: bool = False  # the connection must end with the answer: nobody knows where the next request begins
    may_vanish: bool = False  # the connection may end without an answer
    leaves: bool = False  # the client sends no more, and says so


def framed(body: bytes = GOOD, extra: bytes = b"", head: bytes = HEAD) -> bytes:
    return head + extra + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


# --- the head -----------------------------------------------------------------------------------------------------


def request_lines() -> Iterator[Case]:
    end = HOST + b"\r\n"
    lines = {
        "empty line and nothing": b"\r\n\r\n\r\n",
        "no version": b"GET /v1/models\r\n",
        "HTTP/0.9": b"GET /health\r\n\r\n",
        "HTTP/9.9": b"GET /health HTTP/9.9\r\n",
        "HTTP/2.0": b"GET /health HTTP/2.0\r\n",
        "HTTP/1.2": b"GET /health HTTP/1.2\r\n",
        "HTTP/0.9 by name": b"GET /health HTTP/0.9\r\n",
        "HTTP/1": b"GET /health HTTP/1\r\n",
        "HTTP/1.1.1": b"GET /health HTTP/1.1.1\r\n",
        "HTTP/+1.1": b"GET /health HTTP/+1.1\r\n",
        "http in small letters": b"GET /health http/1.1\r\n",
        "ICE": b"SOURCE /health ICE/1.0\r\n",
        "no spaces": b"GET/healthHTTP/1.1\r\n",
        "tab for a space": b"GET\t/health\tHTTP/1.1\r\n",
        "space before the line": b" GET /health HTTP/1.1\r\n",
        "words after the version": b"GET /health HTTP/1.1 now\r\n",
        "no target": b"GET  HTTP/1.1\r\n",
        "small letters": b"get /health HTTP/1.1\r\n",
        "unknown method": b"BREW /health HTTP/1.1\r\n",
        "method with a brace": b"GE{T /health HTTP/1.1\r\n",
        "NUL in the target": b"GET /hea\x00lth HTTP/1.1\r\n",
        "control character in the target": b"GET /hea\x07lth HTTP/1.1\r\n",
        "newline alone in the line": b"GET /heal\nth HTTP/1.1\r\n",
        "CR alone in the line": b"GET /heal\rth HTTP/1.1\r\n",
        "CR alone at its end": b"GET /health HTTP/1.1\r",
        "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)),
        "an answer": b"HTTP/1.1 200 OK\r\n",
        "binary": bytes(range(128, 256)),
        "JSON": b'{"model":"gpt-4o"}\r\n',
        "a Redis command": b"*1\r\n$4\r\nPING\r\n",
        "SMTP": b"EHLO example.com\r\n",
        "SSH": b"SSH-2.0-OpenSSH_9.7\r\n",
        "a port that is none": b"GET http://a:b/ HTTP/1.1\r\n",
    }
    for name, line in lines.items():
        yield Case(f"line: {name}", line + end, (400, 404, 405, 505), closes=True, may_vanish=True)
    for size in (8191, 9000, 20_000, 70_000, 300_000):
        yield Case(f"line of {size}", b"GET /" + b"a" * size + b" HTTP/1.1\r\n" + end, (414,), closes=True)
    yield Case("query of 9000", b"GET /v1/models?" + b"q" * 9000 + b" HTTP/1.1\r\n" + end, (414,), closes=True)


def targets() -> Iterator[Case]:
    for name, line in {
        "absolute form": b"GET http://example.com/v1/models HTTP/1.1\r\n",
        "absolute form, our own host": b"GET http://gateway/health HTTP/1.1\r\n",
        "absolute form of https": b"POST https://api.openai.com/v1/chat/completions HTTP/1.1\r\n",
        "absolute form with a password": b"GET http://user:pass@example.com/ HTTP/1.1\r\n",
        "file": b"GET file:///etc/passwd HTTP/1.1\r\n",
        "CONNECT": b"CONNECT example.com:443 HTTP/1.1\r\n",
        "CONNECT metadata": b"CONNECT 169.254.169.254:80 HTTP/1.1\r\n",
        "OPTIONS *": b"OPTIONS * HTTP/1.1\r\n",
        "GET *": b"GET * HTTP/1.1\r\n",
        "no slash": b"GET v1/models HTTP/1.1\r\n",
        "two slashes": b"GET //v1/models HTTP/1.1\r\n",
        "dots": b"GET /v1/../../etc/passwd HTTP/1.1\r\n",
        "encoded dots": b"GET /v1/%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\n",
        "backslash": b"GET /v1\\models HTTP/1.1\r\n",
        "half an escape": b"GET /v1/models%2 HTTP/1.1\r\n",
        "escaped NUL": b"GET /v1/models/%00 HTTP/1.1\r\n",
        "escaped line end": b"GET /v1/%0d%0aX:1 HTTP/1.1\r\n",
        "invalid UTF-8": b"GET /v1/%ff%fe HTTP/1.1\r\n",
        "raw bytes": b"GET /v1/\xff\xfe HTTP/1.1\r\n",
        "fragment": b"GET /v1/nothing#there HTTP/1.1\r\n",
    }.items():
        yield Case(f"target: {name}", line + HOST + AUTH + b"\r\n", (400, 404, 405))
    head = b"HEAD /v1/chat/completions HTTP/1.1\r\nConnection: close\r\n"
    yield Case("method HEAD", head + HOST + AUTH + b"\r\n", (405,), closes=True)
    for method in (b"GET", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"PROPFIND"):
        line = method + b" /v1/chat/completions HTTP/1.1\r\n"
        yield Case(f"method {method.decode()}", line + HOST + AUTH + b"\r\n", (405,))
    for method in (b"OPTIONS", b"TRACE", b"POST"):
        yield Case(f"{method.decode()} /health", method + b" /health HTTP/1.1\r\n" + HOST + b"\r\n", (405,))


def headers() -> Iterator[Case]:
    bad = {
        "missing Host": b"",
        "two Hosts": HOST + HOST,
        "two other Hosts": HOST + b"Host: other\r\n",
        "folded": HOST + b"X-Fold: a\r\n b\r\n",
        "folded with a tab": HOST + b"X-Fold: a\r\n\tb\r\n",
        "folded Host": b"Host:\r\n gateway\r\nX: y\r\n folded\r\n",
        "space before the colon": HOST + b"X-Space : a\r\n",
        "tab before the colon": HOST + b"X-Space\t: a\r\n",
        "space before the first name": b" Host: gateway\r\n" + HOST,
        "no colon": HOST + b"nothing\r\n",
        "no name": HOST + b": value\r\n",
        "space in the name": HOST + b"X Y: a\r\n",
        "brace in the name": HOST + b"X{Y: a\r\n",
        "brackets in the name": HOST + b"(X): a\r\n",
        "NUL in the name": HOST + b"X\x00Y: a\r\n",
        "NUL in the value": HOST + b"X-Nul: a\x00b\r\n",
        "control character in the value": HOST + b"X-Ctl: a\x01b\r\n",
        "DEL in the value": HOST + b"X-Del: a\x7fb\r\n",
        "CR alone in the value": HOST + b"X-Cr: a\rb\r\n",
        "CR alone at the end": HOST + b"X-Cr: a\r\r\n",
        "newline alone": HOST + b"X-Lf: a\nX-Next: b\r\n",
        "newlines alone at the end": HOST + b"X-Lf: a\n\n",
        "name of bytes above 127": HOST + b"X-\xe4: a\r\n",
        "two lengths": HOST + b"Content-Length: 5\r\nContent-Length: 6\r\n",
        "two equal lengths": HOST + b"Content-Length: 5\r\nContent-Length: 5\r\n",
        "two content types": HOST + JSON + JSON,
    }
    for name, lines in bad.items():
        yield Case(f"header: {name}", b"GET /v1/models HTTP/1.1\r\n" + lines + b"\r\n", closes=True)
    get = b"GET /v1/models HTTP/1.1\r\n" + HOST
    for size in (8191, 20_000, 70_000, 300_000):
        yield Case(f"header of {size}", get + b"X-Long: " + b"a" * size + b"\r\n\r\n", (431,), closes=True)
        yield Case(f"header name of {size}", get + b"X" * size + b": a\r\n\r\n", (431,), closes=True)
    for count in (129, 1000, 20_000):
        yield Case(f"{count} headers", get + b"X-Many: a\r\n" * count + b"\r\n", (431,), closes=True)
    yield Case("a Cookie of 9000", get + b"Cookie: " + b"c=d; " * 1800 + b"\r\n\r\n", (431,), closes=True)
    for name, value in {"long": b"u" * 129, "not ASCII": "é".encode(), "tab": b"a\tb", "DEL'd": b"\xc2\x80"}.items():
        for header in (b"X-User-Id", b"X-App-Id"):
            yield Case(f"{header.decode()} {name}", framed(extra=header + b": " + value + b"\r\n"))
    for name, lines in {
        "none": b"",
        "empty": b"Authorization:\r\n",
        "basic": b"Authorization: Basic YTpi\r\n",
        "of another make": b"Authorization: Bearer sk-123\r\n",
        "cut": AUTH[:-6] + b"\r\n",
        "with more at its end": AUTH[:-2] + b"x\r\n",
        "in capitals": b"Authorization: Bearer AIG_AAAAAAAAAAAA_x\r\n",
        "the prefix alone": b"Authorization: Bearer aig_\r\n",
        "bytes": b"Authorization: Bearer aig_\xff\xfe\xfd\r\n",
        "long": b"Authorization: Bearer aig_" + b"a" * 8000 + b"\r\n",
        "SQL": b"X-API-Key: aig_' or 1=1 --_x\r\n",
        "two": AUTH + b"X-API-Key: aig_AAAAAAAAAAAA_x\r\n",
        "twice, not the same": AUTH + b"Authorization: Bearer aig_AAAAAAAAAAAA_x\r\n",
    }.items():
        yield Case(f"key: {name}", framed(head=LINE + HOST + JSON + lines), (400, 401, 429))


# --- where the body ends ------------------------------------------------------------------------------------------


def lengths() -> Iterator[Case]:
    for value in (
        b"-1", b"+5", b"0x10", b"1e3", b"5.0", b"5,5", b"5, 6", b"abc", b"", b" ", b"5 5", b"'5'", b"5;",
        b"\xd9\xa5", b"9" * 40, b"18446744073709551616", b"-0", b"0b1", b"5_0",
    ):  # fmt: skip
        request = HEAD + b"Content-Length: " + value + b"\r\n\r\n" + GOOD
        yield Case(f"Content-Length: {value!r}", request, (400, 413), closes=True)
    for value in (b"99999999999", b"33554433", b"9223372036854775807"):
        yield Case(f"length {value.decode()}", HEAD + b"Content-Length: " + value + b"\r\n\r\n{", (413,), closes=True)
    yield Case("longer than what comes", HEAD + b"Content-Length: 500\r\n\r\n" + GOOD[:40], (408,), closes=True)
    yield Case("shorter than what comes", HEAD + b"Content-Length: 10\r\n\r\n" + GOOD, (400,), closes=True)
    yield Case("no length at all", HEAD + b"\r\n" + GOOD, (400,), closes=True)
    yield Case("no length and nothing", HEAD + b"\r\n", (400,))
    yield Case("length 0", HEAD + b"Content-Length: 0\r\n\r\n", (400,))


def encodings() -> Iterator[Case]:
    """Names of transfer codings: all but one `chunked` at the end are refused, however they are written."""
    for value in (
        b"identity", b"gzip", b"chunked, identity", b"chunked, chunked", b"xchunked", b"chunkedx", b"\x0bchunked",
        b"chunked\x00", b'"chunked"', b"chunked;q=1", b"cow", b"chunk", b"", b"chunked, gzip", b"\xefchunked", b"chunked,",
    ):  # fmt: skip
        request = HEAD + b"Transfer-Encoding: " + value + b"\r\n\r\n" + chunk(GOOD) + b"0\r\n\r\n"
        yield Case(f"Transfer-Encoding: {value!r}", request, (400, 411, 415, 501), closes=True)
    for name, lines in {
        "space before the colon": b"Transfer-Encoding : chunked\r\n",
        "folded": b"Transfer-Encoding:\r\n chunked\r\n",
        "twice": CHUNKED + CHUNKED,
        "two lines": CHUNKED + b"Transfer-Encoding: identity\r\n",
        "two lines the other way": b"Transfer-Encoding: identity\r\n" + CHUNKED,
        "behind a newline": b"X: y\nTransfer-Encoding: chunked\r\n",
        "behind a CR": b"X: y\rTransfer-Encoding: chunked\r\n",
    }.items():
        yield Case(f"coding: {name}", HEAD + lines + b"\r\n" + chunk(GOOD) + b"0\r\n\r\n", (400, 501), closes=True)


def chunks() -> Iterator[Case]:
    bad = {
        "not a number": b"zz\r\n",
        "negative": b"-5\r\nhello\r\n",
        "with a sign": b"+5\r\nhello\r\n",
        "0x": b"0x5\r\nhello\r\n",
        "empty size": b"\r\nhello\r\n",
        "space in front": b" 5\r\nhello\r\n",
        "space behind": b"5 \r\nhello\r\n",
        "too large": b"f" * 17 + b"\r\nhello\r\n",
        "overflow": b"1" + b"0" * 16 + b"\r\nhello\r\n",
        "underscore": b"1_0\r\n0123456789abcdef\r\n",
        "newline alone after the size": b"5\nhello\r\n",
        "CR alone after the size": b"5\rhello\r\n",
        "newline alone after the data": b"5\r\nhello\n0\r\n\r\n",
        "longer than its size": b"3\r\nhello\r\n",
        "shorter than its size": b"9\r\nhello\r\n0\r\n\r\n",
        "NUL in the extension": b"5;a=\x00\r\nhello\r\n",
        "CR in the extension": b"5;a=\rb\r\nhello\r\n",
        "newline in the extension": b"5;a=\nb\r\nhello\r\n",
        "no data": b"",
        "trailer without a colon": b"0\r\nnothing\r\n\r\n",
        "trailer with NUL": b"0\r\nX: \x00\r\n\r\n",
        "trailer that folds": b"0\r\nX: a\r\n b\r\n\r\n",
        "end without a line": b"0\r\n",
        "end with words": b"0\r\nhello",
        "unicode digits": "٥\r\nhello\r\n".encode(),
    }
    for name, body in bad.items():
        yield Case(f"chunk: {name}", HEAD + CHUNKED + b"\r\n" + body, (400, 408), closes=True, may_vanish=True)
    one_by_one = b"".join(b"1\r\n%c\r\n" % byte for byte in b"[" * 3000)
    yield Case("3000 chunks of a byte", HEAD + CHUNKED + b"\r\n" + one_by_one + b"0\r\n\r\n")
    yield Case("a long extension", HEAD + CHUNKED + b"\r\n5;" + b"a" * 100_000 + b"\r\nhello\r\n0\r\n\r\n")
    trailers = b"X-T: a\r\n" * 5000
    yield Case("5000 trailers", HEAD + CHUNKED + b"\r\n5\r\nhello\r\n0\r\n" + trailers + b"\r\n", (400, 431))
    large = chunk(b" " * 200_000) * 3
    yield Case("chunks over the limit", HEAD + CHUNKED + b"\r\n" + large + b"0\r\n\r\n", (413,))


def smuggling() -> Iterator[Case]:
    """A second request, hidden from one of two servers that read the first one's length in two ways."""
    both = {
        "CL.TE": b"Content-Length: %d\r\n" % (5 + len(HIDDEN)) + CHUNKED,
        "TE.CL": CHUNKED + b"Content-Length: 4\r\n",
        "CL.TE, TE in capitals": b"Content-Length: %d\r\nTRANSFER-ENCODING: CHUNKED\r\n" % (5 + len(HIDDEN)),
        "CL.TE, tab": b"Content-Length: %d\r\nTransfer-Encoding:\tchunked\r\n" % (5 + len(HIDDEN)),
        "CL.TE, spaces behind": b"Content-Length: %d\r\nTransfer-Encoding: chunked  \r\n" % (5 + len(HIDDEN)),
        "CL.CL": b"Content-Length: 5\r\nContent-Length: %d\r\n" % (5 + len(HIDDEN)),
        "CL list": b"Content-Length: 5, %d\r\n" % (5 + len(HIDDEN)),
        "CL0 and TE": b"Content-Length: 0\r\n" + CHUNKED,
        "CL behind a fold": b"X: a\r\n Content-Length: 5\r\nContent-Length: %d\r\n" % (5 + len(HIDDEN)),
        "CL behind NUL": b"Content-Length: 5\x00\r\n",
        "CL and Content_Length with a bad chunk": b"Content_Length: 5\r\nTransfer-Encoding: xchunked\r\n",
    }
    for name, lines in both.items():
        yield Case(f"smuggling: {name}", HEAD + lines + b"\r\n0\r\n\r\n" + HIDDEN, (400, 501), closes=True)
    yield Case("smuggling: behind a bad chunk", HEAD + CHUNKED + b"\r\nzz\r\n" + HIDDEN, closes=True)
    yield Case("smuggling: in a chunk's extension", HEAD + CHUNKED + b"\r\n0;\n" + HIDDEN, closes=True)
    yield Case("smuggling: behind a newline", HEAD + CHUNKED + b"\r\n0\n\n" + HIDDEN, closes=True)
    yield Case(
        "smuggling: HTTP/1.0 with chunks",
        HEAD.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n0\r\n\r\n" + HIDDEN,
        closes=True,
    )
    for protocol in (b"h2c", b"websocket", b"TLS/1.0"):
        upgrade = b"Connection: Upgrade\r\nUpgrade: " + protocol + b"\r\nContent-Length: %d\r\n\r\n"
        yield Case(f"upgrade to {protocol.decode()}", HEAD + upgrade % 2 + b"{}", (400, 426))
    expect = b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    too_large = HEAD + expect % 99_000_000
    yield Case("Expect and too large", too_large, (413,), closes=True)
    yield Case("Expect without a key", LINE + HOST + JSON + expect % 10, (401, 429), closes=True)
    for value in (b"banana", b"100-continue, banana", b"200-ok", b"100-continue;q=1"):
        yield Case(f"Expect: {value!r}", framed(extra=b"Expect: " + value + b"\r\n"), (417,))


def cut_short() -> Iterator[Case]:
    """The client says no more, or nothing at all: it is answered, or the connection ends."""
    whole = framed()
    for size in (0, 1, 4, 20, len(LINE), len(LINE) + 3, len(HEAD) - 1, len(whole) - len(GOOD), len(whole) - 1):
        for leaves in (False, True):
            name = f"cut after {size} bytes" + (", half closed" if leaves else "")
            yield Case(name, whole[:size], (400, 408), closes=True, may_vanish=True, leaves=leaves)
    for size in (len(HEAD + CHUNKED) + 2, len(HEAD + CHUNKED) + 10):
        request = (HEAD + CHUNKED + b"\r\n" + chunk(GOOD) + b"0\r\n\r\n")[:size]
        yield Case(f"chunked, cut after {size} bytes", request, (400, 408), closes=True, may_vanish=True, leaves=True)


# --- the body -----------------------------------------------------------------------------------------------------


def content_types() -> Iterator[Case]:
    for kind in (
        b"text/plain", b"text/xml", b"application/xml", b"application/x-www-form-urlencoded", b"application/octet-stream",
        b"multipart/form-data; boundary=x", b"application/json; charset=utf-16", b"application/json; charset=zzz",
        b"application/jsonp", b"json", b"*/*", b"application/json; charset=latin1",
    ):  # fmt: skip
        yield Case(
            f"Content-Type: {kind.decode()}",
            framed(head=LINE + HOST + AUTH + b"Content-Type: " + kind + b"\r\n"),
            (415,),
        )
    for coding in (b"gzip", b"br", b"deflate", b"zstd", b"gzip, gzip", b"GZIP", b"identity, gzip", b"x", b"compress"):
        yield Case(
            f"Content-Encoding: {coding.decode()}", framed(extra=b"Content-Encoding: " + coding + b"\r\n"), (415,)
        )


def not_json() -> Iterator[Case]:
    bodies = {
        "space": b"   ",
        "a word": b"hello",
        "half": GOOD[:-3],
        "twice": GOOD + GOOD,
        "a comma at the end": GOOD[:-1] + b",}",
        "a comment": b"/* x */" + GOOD,
        "single quotes": GOOD.replace(b'"', b"'"),
        "a byte order mark": b"\xef\xbb\xbf" + GOOD,
        "UTF-16": GOOD.decode().encode("utf-16"),
        "UTF-32": GOOD.decode().encode("utf-32"),
        "invalid UTF-8": GOOD.replace(b"hello", b"\xff\xfe"),
        "a surrogate in UTF-8": GOOD.replace(b"hello", b"\xed\xa0\x80"),
        "overlong UTF-8": GOOD.replace(b"hello", b"\xc0\xaf"),
        "a raw newline in a string": GOOD.replace(b"hello", b"he\nllo"),
        "a raw NUL in a string": GOOD.replace(b"hello", b"he\x00llo"),
        "a NUL at the end": GOOD + b"\x00",
        "an unknown escape": GOOD.replace(b"hello", b"\\x41"),
        "half an escape": GOOD.replace(b"hello", b"\\u12"),
        "a lone surrogate": GOOD.replace(b"hello", b"\\ud800"),
        "the wrong half of a pair": GOOD.replace(b"hello", b"\\udc00x"),
        "array": b"[" + GOOD + b"]",
        "string": b'"x"',
        "number": b"17",
        "null": b"null",
        "true": b"true",
        "depth 65": b'{"a":' * 65 + b"1" + b"}" * 65,
        "depth 10,000": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        "brackets alone": b"[" * 50_000,
        "a duplicate key": GOOD[:-1] + b',"model":"gpt-4o"}',
        "a duplicate key in a message": GOOD.replace(b'"role"', b'"role":"system","role"'),
        "a duplicate key by an escape": GOOD[:-1] + b',"\\u006dodel":"gpt-4o"}',
        "a form": b"model=gpt-4o&messages=hello",
        "XML": b"<model>gpt-4o</model>",
        "an event": b"data: " + GOOD,
        "YAML": b"model: gpt-4o\nmessages: []\n",
    }
    for number in (
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"01",
        b"1.",
        b".5",
        b"+1",
        b"1e",
        b"0x1",
        b"1_0",
        b"1" * 5000,
        b"--1",
    ):
        bodies[f"the number {number[:9].decode()}"] = GOOD[:-1] + b',"seed":' + number + b"}"
    for name, body in bodies.items():
        yield Case(f"body: {name}", framed(body))


WRONG: dict[str, list[Any]] = {
    "model": [None, 1, 1.5, True, [], {}, "", "a\u0000b", "a\nb", "a\u202eb", "m" * 257, ["gpt-4o"]],
    "messages": [None, 1, "hello", True, {}, [], [1], ["x"], [None], [[]], [{}], [{"role": "user"}], [{"content": "x"}]],
    "stream": [1, "true", [], {}],
    "stream_options": [1, "x", [], {"include_usage": 1}],
    "max_tokens": ["1", 0, -1, 1.5, True, [], {}, 2**70, 1e300],
    "max_completion_tokens": ["1", 0, -1, 1.5, True, [], 2**70],
    "temperature": ["1", -0.1, 2.1, True, [], {}, 1e300],
    "top_p": ["1", -0.1, 1.1, True, []],
    "frequency_penalty": ["1", -2.1, 2.1, False],
    "presence_penalty": ["1", -2.1, 2.1, {}],
    "n": ["1", 0, -1, 129, 1.5, True, []],
    "seed": ["1", 1.5, True, 2**70, -(2**70)],
    "stop": [1, True, {}, [1], [None], [[]]],
    "tools": [1, "x", {}, [1], ["x"], [{}], [{"type": 1}], [{"type": "function"}], [{"type": "function", "function": []}]],
    "tool_choice": [1, True, [], {}, {"type": 1}, {"type": "function"}, {"type": "function", "function": 1}],
    "parallel_tool_calls": [1, "no", [], {}],
    "response_format": [1, "json", [], {}, {"type": 1}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": []}],
    "reasoning_effort": [1, True, [], {}],
    "logprobs": [1, "yes", []],
    "top_logprobs": ["1", -1, 21, 1.5, True],
    "logit_bias": [1, "x", []],
    "user": [1, True, [], {}, "a\u0000b"],
    "metadata": [1, "x", []],
    "service_tier": [1, True, []],
}  # fmt: skip

WRONG_MESSAGES: list[Any] = [
    {"role": "wizard", "content": "x"},
    {"role": None, "content": "x"},
    {"role": ["user"], "content": "x"},
    {"role": "user", "content": 1},
    {"role": "user", "content": None},
    {"role": "user", "content": {}},
    {"role": "user", "content": ["x"]},
    {"role": "user", "content": [None]},
    {"role": "user", "content": [{"text": "x"}]},
    {"role": "user", "content": [{"type": "text"}]},
    {"role": "user", "content": [{"type": "text", "text": 1}]},
    {"role": "user", "content": [{"type": 1, "text": "x"}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": 1}}]},
    {"role": "tool", "content": "x"},
    {"role": "tool", "content": "x", "tool_call_id": 1},
    {"role": "assistant", "tool_calls": 1},
    {"role": "assistant", "tool_calls": [1]},
    {"role": "assistant", "tool_calls": [{"type": "function"}]},
    {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": 1}]},
    {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": 1, "arguments": ""}}]},
    {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": {}}}]},
]


def wrong_types() -> Iterator[Case]:
    for field, values in WRONG.items():
        for number, value in enumerate(values):
            body = {**chat_body(MODELS["openai"]), field: value}
            yield Case(f"{field}: wrong value {number}", framed(json.dumps(body).encode()))
    for number, message in enumerate(WRONG_MESSAGES):
        body = {**chat_body(MODELS["openai"]), "messages": [message]}
        yield Case(f"wrong message {number}", framed(json.dumps(body).encode()))
    options = {**chat_body(MODELS["openai"]), "stream_options": {"include_usage": True}}
    yield Case("stream_options without a stream", framed(json.dumps(options).encode()))


FAMILIES = (
    request_lines, targets, headers, lengths, encodings, chunks, smuggling, cut_short, content_types, not_json, wrong_types,
)  # fmt: skip


# --- asking -------------------------------------------------------------------------------------------------------


@pytest.fixture
async def gateway(database_url: str, redis_url: str) -> AsyncIterator[Gateway]:
    environ = {"GATEWAY_MAX_BODY": "500000", "GATEWAY_HEADER_TIMEOUT": "1", "GATEWAY_BODY_TIMEOUT": "1"}
    async with running_gateway(database_url, redis_url, environ) as gateway:
        yield gateway


async def ask(gateway: Gateway, request: bytes, *, leaves: bool = False, to_end: bool = False) -> bytes:
    """All that came back: one whole answer, or to the end of the connection. Fails when that takes too long."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.root_url.rsplit(":", 1)[1]))
    received = b""
    try:
        async with asyncio.timeout(PATIENCE):
            writer.write(request.replace(KEY, gateway.api_key.encode()))
            if leaves:
                writer.write_eof()
            while not (_is_whole(received) and not to_end) and (data := await reader.read(1 << 16)):
                received += data
    except ConnectionError:  # it closed with something of ours unread: what it said before, it said
        pass
    finally:
        writer.close()
    return received


def _is_whole(received: bytes) -> bool:
    head, found, body = received.partition(b"\r\n\r\n")
    lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    return bool(found and lengths) and len(body) >= int(lengths[0].split(b":")[1])


def problem(case: Case, received: bytes) -> str:
    """What is wrong with the answer; nothing if it is as it must be."""
    if not received:
        return "" if case.may_vanish else "no answer"
    head, _, body = received.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if status not in case.statuses:
        return f"{status} instead of {case.statuses}: {body[:200]!r}"
    if len(re.findall(rb"HTTP/1\.[01] \d", received)) != 1:
        return "more than one answer"
    for name in (b"\r\nContent-Type: application/json", b"\r\nCache-Control: no-store", b"\r\nX-Request-Id: "):
        if name not in head:
            return f"no {name.strip().decode()}"
    if case.request.startswith(b"HEAD "):
        return ""
    error = json.loads(body)["error"]
    if set(error) != {"message", "type", "param", "code"} or not error["message"]:
        return f"not an error object: {error}"
    return ""


async def check(gateway: Gateway, case: Case) -> str:
    try:
        received = await ask(gateway, case.request, leaves=case.leaves, to_end=case.closes)
    except TimeoutError:
        return f"{case.name}: it hangs"
    wrong = problem(case, received)
    return f"{case.name}: {wrong}" if wrong else ""


@pytest.mark.parametrize("family", FAMILIES)
async def test_what_is_malformed_is_refused_and_a_good_request_is_served_right_after(
    gateway: Gateway,
    figure: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    family: Callable[[], Iterator[Case]],
) -> None:
    cases = list(family())
    turns = asyncio.Semaphore(AT_ONCE)
    # Wrong keys are many here, and from one address.
    monkeypatch.setattr(gateway.app[appkeys.KEYS].failures, "wait", lambda address: 0.0)

    async def one(case: Case) -> str:
        async with turns:
            wrong = await check(gateway, case)
            good = await ask(gateway, HIDDEN)
            return wrong or ("" if good.startswith(b"HTTP/1.1 200 OK") else f"after {case.name}: {good[:300]!r}")

    wrong = [words for words in await asyncio.gather(*(one(case) for case in cases)) if words]
    assert not wrong, "\n".join(wrong)
    assert len(gateway.calls) == len(cases)  # for the good ones
    figure(f"P1 malformed, {family.__name__}: 0 of {len(cases)} with a 5xx, a hang or a call of a provider")


# --- what is unusual, and good ------------------------------------------------------------------------------------


async def test_pipelined_requests_are_answered_in_their_order(gateway: Gateway) -> None:
    paths = ["/health/live", "/v1/models/nothing", "/health/ready", "/nowhere", "/health/live"]
    requests = [f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer KEY\r\n\r\n" for path in paths]
    requests[-1] = requests[-1].replace("Host: x", "Host: x\r\nConnection: close")
    received = await ask(gateway, "".join(requests).encode(), to_end=True)
    assert re.findall(rb"HTTP/1\.1 (\d+)", received) == [b"200", b"404", b"200", b"404", b"200"]


async def test_what_stands_before_a_malformed_request_is_not_answered_by_another_one(gateway: Gateway) -> None:
    """The parser gives up the whole of what it was fed: one 400 then stands for it, and the connection ends."""
    received = await ask(gateway, HIDDEN + b"nonsense\r\n\r\n" + HIDDEN, to_end=True)
    assert re.findall(rb"HTTP/1\.[01] (\d+)", received) in ([b"200", b"400"], [b"400"])
    assert len(gateway.calls) <= 1


async def test_http_1_0_is_served_to_the_end_of_its_connection(gateway: Gateway) -> None:
    received = await ask(gateway, HIDDEN.replace(b"HTTP/1.1", b"HTTP/1.0"), to_end=True)
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"Transfer-Encoding" not in head
    assert json.loads(body)["object"] == "chat.completion"


async def test_what_the_parser_refuses_is_counted(gateway: Gateway) -> None:
    await ask(gateway, b"nonsense\r\n\r\n", to_end=True)
    assert gateway.app[appkeys.METRICS].http_parse_errors.value == 1

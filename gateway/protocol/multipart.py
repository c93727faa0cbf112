"""A multipart body that passes: which model it names, and that it names no other one further on.

RFC 7578 and RFC 2046 5.1.1, strictly: where two parsers could read two things, the body is refused. Who was let through
for one model must not be answered by another.
"""

import re
from hashlib import sha256

from gateway.protocol.errors import InvalidRequest

MAX_PART_HEAD = 8 << 10  # bytes; python-multipart takes 4 KiB a header, werkzeug 8
MAX_VALUE = 256  # bytes of a model's name
MAX_PARTS = 1000  # as werkzeug and Starlette take; each costs the loop some 10 µs
_BOUNDARY = re.compile(
    r"boundary=(?:\"([\w'()+,./:=? -]{0,69}[\w'()+,./:=?-])\"|([\w'+.-]{1,70})(?![^;\s]))", re.IGNORECASE | re.ASCII
)
_LINE = re.compile(r"[!#$%&'*+.^_`|~\w-]+:[^\r\n\0]*", re.ASCII)
_PARAMETER = re.compile(r";\s*([\w*-]+)\s*=\s*(?:\"((?:[^\"\\\r\n]|\\.)*)\"|([!#$%&'+.^_`|~\w-]+))\s*", re.ASCII)


def boundary_of(content_type: str) -> bytes:
    """The boundary in a Content-Type. Raises InvalidRequest."""
    found: list[tuple[str, str]] = _BOUNDARY.findall(content_type)
    if len(found) != 1 or not (found[0][0] or found[0][1]).isascii():
        raise _wrong("its Content-Type must have one boundary")
    return (found[0][0] or found[0][1]).encode()


class Multipart:
    """Fed every byte of a body, in any pieces, before it is sent on. Raises InvalidRequest from `feed` alone."""

    def __init__(self, boundary: bytes, *, hashed: bool = False) -> None:
        self._delimiter = b"--" + boundary
        # A client that sends it again takes another boundary: what is between two is hashed, and then those hashes.
        self._hash = sha256() if hashed else None
        self._part_hash = sha256()
        # Not looked at yet; the first delimiter needs no line end before it. A bytearray loses its front uncopied.
        self._held = bytearray(b"\r\n")
        self._at = -2  # where in the body it begins
        self._in_head = False
        self._over = False  # the last delimiter has passed
        self._parts = 0
        self._value_from = -1  # where the model's value begins, while its end is awaited
        self.model: tuple[int, int] | None = None  # where in the body it stands
        self.named = False  # a part with the model has begun

    def feed(self, data: bytes) -> None:
        if self._over:
            return
        self._held += data
        while self._step():
            pass
        self._trim()

    def digest(self) -> bytes | None:
        """Of all that it says, whatever its boundary is; None: its end has not passed, or it is not `hashed`."""
        return self._hash.digest() if self._hash is not None and self._over else None

    def _step(self) -> bool:
        return self._read_head() if self._in_head else self._find_delimiter()

    def _find_delimiter(self) -> bool:
        """To the line after the next one. False: more is needed."""
        held, delimiter = self._held, self._delimiter
        found = held.find(delimiter)
        end = found + len(delimiter)
        if found < 0 or len(held) < end + 2:
            return False
        if held[found - 2 : found] != b"\r\n" or bytes(held[end : end + 2]) not in (b"\r\n", b"--"):
            raise _wrong("its boundary stands where no part begins")
        if self._value_from >= 0:
            self.model = self._value_from, self._at + found - 2
            self._value_from = -1
        self._over = held[end : end + 2] == b"--"
        self._in_head = not self._over
        self._end_part(found)
        self._drop(end)  # with the line end, which is the beginning of a head without fields, too
        return not self._over

    def _read_head(self) -> bool:
        end = self._held.find(b"\r\n\r\n")
        if (len(self._held) if end < 0 else end) > MAX_PART_HEAD:
            raise _wrong(f"a part's headers are longer than {MAX_PART_HEAD} bytes")
        if end < 0:
            return False
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _wrong(f"it has more than {MAX_PARTS} parts")
        if self._is_model(bytes(self._held[2:end])):
            if self.named:
                raise _wrong("it names two models")
            self.named, self._value_from = True, self._at + end + 4
        self._in_head = False
        self._hear(end + 4)
        self._drop(end + 4)
        return True

    def _hear(self, count: int) -> None:
        if self._hash is not None:
            self._part_hash.update(self._held[:count])

    def _end_part(self, count: int) -> None:
        self._hear(count)
        if self._hash is not None:
            self._hash.update(self._part_hash.digest())
            self._part_hash = sha256()

    def _drop(self, count: int) -> None:
        del self._held[:count]
        self._at += count

    def _trim(self) -> None:
        """What can be no part of a delimiter any more."""
        if self._in_head or self._over:
            return
        if self._value_from >= 0 and self._at + len(self._held) - self._value_from > MAX_VALUE + len(self._delimiter):
            raise _wrong(f"the field model has more than {MAX_VALUE} bytes")
        passed = max(len(self._held) - len(self._delimiter) - 4, 0)
        self._hear(passed)
        self._drop(passed)

    def _is_model(self, head: bytes) -> bool:
        """Whether a part with these headers is the field `model`."""
        lines = head.decode("latin-1").split("\r\n")
        dispositions = [line for line in lines if line.lower().startswith("content-disposition:")]
        if len(dispositions) != 1 or not all(map(_LINE.fullmatch, lines)):
            raise _wrong("a part's headers cannot be read")
        names = _names(dispositions[0].partition(":")[2].strip())
        if names["name"].rstrip("]").endswith("file_id"):  # whose it is was not asked
            raise _wrong("files are sent in it, and not named")
        if names["name"] != "model":
            return False
        coded = any(line.lower().startswith("content-transfer-encoding:") for line in lines)
        if coded or "filename" in names or "filename*" in names:
            raise _wrong("the field model must be plain text")
        return True


def _names(disposition: str) -> dict[str, str]:
    kind, semicolon, rest = disposition.partition(";")
    said: dict[str, str] = {}
    at, text = 0, semicolon + rest
    while at < len(text):
        found = _PARAMETER.match(text, at)
        if found is None or found[1].lower() in said or ("*" in found[1] and found[1].lower() != "filename*"):
            raise _wrong("a part's headers cannot be read")
        said[found[1].lower()] = found[2] if found[2] is not None else found[3]
        at = found.end()
    if kind.strip().lower() != "form-data" or "name" not in said or "\\" in said["name"]:
        raise _wrong("a part's headers cannot be read")
    return said


def _wrong(what: str) -> InvalidRequest:
    return InvalidRequest(f"the multipart body cannot be passed on: {what}", code="invalid_multipart")

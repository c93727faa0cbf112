"""Which model a form names, however it is cut, and which forms two parsers could read in two ways."""

import pytest

from gateway.protocol.errors import InvalidRequest
from gateway.protocol.multipart import MAX_PART_HEAD, MAX_VALUE, Multipart, boundary_of

pytestmark = pytest.mark.unit

NAME = b'Content-Disposition: form-data; name="model"'
FILE = b'Content-Disposition: form-data; name="file"; filename="a.mp3"\r\nContent-Type: audio/mpeg'


def part(head: bytes, value: bytes) -> bytes:
    return b"--b\r\n" + head + b"\r\n\r\n" + value + b"\r\n"


def named(body: bytes, size: int = 0) -> bytes | None:
    """The model that it names, fed in pieces of `size`."""
    form = Multipart(b"b")
    for at in range(0, len(body), size or len(body) or 1):
        form.feed(body[at : at + (size or len(body))])
    return None if form.model is None else body[slice(*form.model)]


GOOD = {
    "first": part(NAME, b"whisper-1") + part(FILE, b"x" * 300) + b"--b--\r\n",
    "last": part(FILE, b"x" * 300) + part(NAME, b"whisper-1") + b"--b--\r\n",
    "with a preamble": b"hello\r\n" + part(NAME, b"whisper-1") + b"--b--\r\n",
    "with an epilogue": part(NAME, b"whisper-1") + b"--b--\r\nhello --b",
    "in another order": part(b"content-type: text/plain\r\nContent-Disposition:form-data ;name=model", b"whisper-1") + b"--b--",
    "beside a file whose name says otherwise": part(FILE.replace(b"a.mp3", b'a; name=\\"model\\"'), b"x")
    + part(NAME, b"whisper-1") + b"--b--",
    "beside an empty part": part(b'Content-Disposition: form-data; name="x"', b"") + part(NAME, b"whisper-1") + b"--b--",
    "beside something like a boundary": part(FILE, b"\r\n-\r\n--a\r\n--") + part(NAME, b"whisper-1") + b"--b--",
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_a_model_is_found_however_the_bytes_are_cut(case: str) -> None:
    assert {named(GOOD[case], size) for size in range(len(GOOD[case]) + 1)} == {b"whisper-1"}


def test_a_form_without_a_model_names_none() -> None:
    assert named(part(FILE, b"x" * 70_000) + b"--b--\r\n", 1000) is None
    assert named(b"") is None
    assert named(part(NAME, b"whisper-1")) is None  # its end is not there
    assert named(part(b'Content-Disposition: form-data; name="Model"', b"whisper-1") + b"--b--") is None


def digest(body: bytes, size: int = 0, boundary: bytes = b"b") -> bytes | None:
    form = Multipart(boundary, hashed=True)
    for at in range(0, len(body), size or len(body) or 1):
        form.feed(body[at : at + (size or len(body))])
    return form.digest()


@pytest.mark.parametrize("case", [case for case in GOOD if case != "with an epilogue"])
def test_a_form_has_one_digest_however_it_is_cut_and_whatever_its_boundary(case: str) -> None:
    """https://www.rfc-editor.org/rfc/rfc2046#section-5.1.1: what two boundaries have between them is a part."""
    expected = digest(GOOD[case])
    assert expected is not None
    assert {digest(GOOD[case], size) for size in range(1, len(GOOD[case]) + 1)} == {expected}
    other = GOOD[case].replace(b"--b\r\n", b"--0123456789\r\n").replace(b"--b--", b"--0123456789--")
    assert digest(other, boundary=b"0123456789") == expected


def test_whatever_a_form_says_is_in_its_digest() -> None:
    end = b"--b--\r\n"
    forms = [
        part(FILE, b"xy") + end,
        part(FILE, b"xz") + end,
        part(FILE, b"xy\r\n") + end,
        part(FILE.replace(b"a.mp3", b"b.mp3"), b"xy") + end,
        part(FILE, b"xy") + part(NAME, b"m") + end,
        part(NAME, b"m") + part(FILE, b"xy") + end,
        part(FILE, b"x") + part(FILE, b"y") + end,
        part(FILE, b"x\r\n--a\r\n" + FILE + b"\r\n\r\ny") + end,
        end,
        b"hello\r\n" + end,
    ]
    assert len({digest(form) for form in forms}) == len(forms)


def test_a_form_that_has_not_ended_has_no_digest() -> None:
    whole = part(FILE, b"xy") + b"--b--"
    assert [digest(whole[:at]) for at in range(len(whole))] == [None] * len(whole)
    assert digest(whole) is not None
    unasked = Multipart(b"b")
    unasked.feed(whole)
    assert unasked.digest() is None


BAD = {
    "two models": part(NAME, b"a") + part(FILE, b"x") + part(NAME, b"b") + b"--b--",
    "two models that are the same": part(NAME, b"a") + part(NAME, b"a") + b"--b--",
    "a boundary after a bare line feed": part(NAME, b"a") + part(FILE, b"x\n" + part(NAME, b"b")) + b"--b--",
    "a boundary in a line": part(FILE, b"x--b\r\n"),
    "blanks after a boundary": b"--b \r\n" + NAME + b"\r\n\r\na\r\n--b--",
    "a line feed after a boundary": b"--b\n" + NAME + b"\n\na\n--b--",
    "a line feed between headers": part(b"X: y\n" + NAME, b"a"),
    "a folded header": part(NAME[:-12] + b"\r\n " + NAME[-12:], b"a"),
    "no disposition": part(b"X: y", b"a"),
    "no headers": b"--b\r\n\r\n\r\na\r\n--b--",
    "two dispositions": part(NAME + b"\r\n" + FILE, b"a"),
    "two names": part(NAME + b"; name=file", b"a"),
    "a name in another coding": part(b"Content-Disposition: form-data; name*=utf-8''model", b"a"),
    "both names": part(b"Content-Disposition: form-data; name=x; name*=utf-8''model", b"a"),
    "a name with a backslash": part(b'Content-Disposition: form-data; name="mo\\del"', b"a"),
    "a name that does not end": part(b'Content-Disposition: form-data; name="model', b"a"),
    "another disposition": part(b'Content-Disposition: attachment; name="model"', b"a"),
    "a model in a file": part(NAME + b'; filename="a"', b"a"),
    "a model in base64": part(NAME + b"\r\nContent-Transfer-Encoding: base64", b"YQ=="),
    "a long model": part(NAME, b"a" * (MAX_VALUE + 100)),
    "long headers": part(b"X: " + b"y" * MAX_PART_HEAD + b"\r\n" + NAME, b"a"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_could_be_read_in_two_ways_is_refused_however_it_is_cut(case: str) -> None:
    for size in (0, 1, 2, 3, 7, 64):
        with pytest.raises(InvalidRequest):
            named(BAD[case], size)


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/form-data; boundary=abc", b"abc"),
        ('multipart/form-data; charset=utf-8; BOUNDARY="a b:c"', b"a b:c"),
        ("multipart/form-data; boundary=abc; x=y", b"abc"),
    ],
)
def test_a_boundary_is_read(content_type: str, boundary: bytes) -> None:
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize(
    "content_type",
    ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=a; boundary=b"],
)
def test_a_form_has_one_boundary(content_type: str) -> None:
    with pytest.raises(InvalidRequest):
        boundary_of(content_type)

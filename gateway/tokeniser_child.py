"""The tokeniser's process; run as a script, never imported by the gateway. It ends with its standard input.

    request   vocabulary (1 byte), number of texts (4), then each text: its pieces, each with its length (4), and a 0
    answer    tokens of each text (4 bytes)

A newline comes first, when rs-bpe is loaded; without rs-bpe the process ends at once. Numbers are big-endian. Texts are
UTF-8, but halves of surrogate pairs may be in them, as in what clients and models send.
"""

import contextlib
import os
import struct
import sys
from collections.abc import Iterator
from functools import cache
from typing import BinaryIO

VOCABULARIES = ("o200k_base", "cl100k_base")
REQUEST = struct.Struct("!BI")
LENGTH = struct.Struct("!I")


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    from rs_bpe.bpe import openai  # here, so that the gateway has the numbers above without the vocabularies

    load = cache(lambda number: getattr(openai, VOCABULARIES[number])())  # 65 MB each
    answers.write(b"\n")
    answers.flush()
    while head := requests.read(REQUEST.size):
        number, texts = REQUEST.unpack(head)
        # All of them are read before an answer is written: nobody waits for the other.
        sizes = [load(number).count(text) for text in list(_texts(requests, texts))]
        answers.write(struct.pack(f"!{texts}I", *sizes))
        answers.flush()


def _texts(requests: BinaryIO, number: int) -> Iterator[str]:
    for _ in range(number):
        yield _readable(b"".join(_pieces(requests)))


def _pieces(requests: BinaryIO) -> Iterator[bytes]:
    while length := LENGTH.unpack(requests.read(LENGTH.size))[0]:
        yield requests.read(length)


def _readable(text: bytes) -> str:
    """Halves that belong together become one character, any other half the replacement character."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("utf-8", "surrogatepass").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


if __name__ == "__main__":
    os.nice(5)  # streams are served first
    # The gateway was killed in the middle of a request, or does not wait for its answer any more.
    with contextlib.suppress(struct.error, BrokenPipeError):
        serve(sys.stdin.buffer, sys.stdout.buffer)

"""Undoes gzip and deflate, a step at a time. Providers are asked not to compress; some do all the same."""

import zlib

MAX_STEP = 1 << 18  # bytes; a kilobyte of input may be a megabyte of output


class Inflater:
    """RFC 9110 8.4.1, a step at a time. Raises zlib.error."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._zlib = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self._packed = b""
        self._begun = False

    def inflate(self, packed: bytes) -> bytes:
        """At most MAX_STEP bytes of what `packed`, and all given before, holds; b"" when more is needed."""
        packed = self._packed + packed
        if packed and not self._begun:
            self._begin(packed[0])
        while True:
            data = self._zlib.decompress(packed, MAX_STEP)
            packed = self._zlib.unconsumed_tail
            if self._zlib.unused_data:
                packed = self._begin_another()
            if data or not packed:
                self._packed = packed
                return data

    def _begin_another(self) -> bytes:
        """What is left of what was given: gzip is a series of members, RFC 1952 2.2."""
        if self._coding == "deflate":
            raise zlib.error("bytes after the end")
        left, self._zlib = self._zlib.unused_data, zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        return left

    def _begin(self, first: int) -> None:
        self._begun = True
        if self._coding == "deflate":
            # It means zlib's format, but some send the bare stream, which cannot begin like one.
            self._zlib = zlib.decompressobj(wbits=zlib.MAX_WBITS if first & 0x0F == 8 else -zlib.MAX_WBITS)

    def check_whole(self) -> None:
        if self._begun and not self._zlib.eof:
            raise zlib.error("bytes are missing")

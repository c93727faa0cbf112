"""The form of an API key, `aig_<id 12>_<secret 43>_<crc 6>`: three numbers in base62.

The id finds the row, the secret has 256 bits, the CRC-32 of all that stands before it refuses a slip of the hand
without a look-up, and the prefix lets secret scanners find a key that was committed somewhere.
"""

import secrets
import string
import zlib
from typing import NamedTuple

PREFIX = "aig_"
_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_ID, _SECRET, _CRC = 12, 43, 6  # base62 digits; 62**43 is just above 2**256, 62**6 above 2**32
TOKEN_LENGTH = len(PREFIX) + _ID + 1 + _SECRET + 1 + _CRC


class Token(NamedTuple):
    """The parts of a key that has the form of one."""

    id: str
    secret: str


def make_token() -> str:
    """A new key: 71 random bits of id, 256 of secret."""
    return join_token(_base62(secrets.randbelow(62**_ID), _ID), _base62(secrets.randbits(256), _SECRET))


def join_token(key_id: str, secret: str) -> str:
    """The key that has these parts."""
    body = f"{PREFIX}{key_id}_{secret}"
    return f"{body}_{_checksum(body)}"


def parse_token(token: str) -> Token | None:
    """The parts of a key; None when it cannot be one, whatever the database says."""
    if len(token) != TOKEN_LENGTH or not token.isascii() or not token.startswith(PREFIX):
        return None
    body, _, checksum = token.rpartition("_")
    key_id, _, secret = body.removeprefix(PREFIX).partition("_")
    if len(key_id) != _ID or not key_id.isalnum() or not secret.isalnum() or checksum != _checksum(body):
        return None
    return Token(key_id, secret)


def prefix_of(key_id: str) -> str:
    """What may be shown of a key, in logs and statistics as well."""
    return PREFIX + key_id


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), _CRC)


def _base62(number: int, digits: int) -> str:
    text = []
    for _ in range(digits):
        number, digit = divmod(number, 62)
        text.append(_ALPHABET[digit])
    return "".join(reversed(text))

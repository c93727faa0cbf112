"""The end of an answer that passes: its `usage`, without the answer being held.

A picture is megabytes of base64 before it, and the last event of a stream has it, too: what has passed is enough to
know it from its last bytes. A quote inside a text has a backslash before it, so `"usage"` is a name.
"""

import json
import re
from typing import Any

from gateway.protocol.usage import Usage

_NAME = re.compile(r'"usage"\s*:\s*')  # and not a text that is the word
KEPT = 1 << 14  # bytes; most answers are held in it whole


class Tail:
    def __init__(self) -> None:
        self._kept = bytearray()

    def add(self, data: bytes) -> None:
        self._kept += data[-KEPT:]
        if len(self._kept) > 2 * KEPT:
            del self._kept[:-KEPT]

    def usage(self) -> Usage | None:
        """The last that was said; None when none is, or when it is not of tokens (`{"type": "duration", …}`)."""
        text = self._kept.decode("utf-8", "replace")
        ends = [named.end() for named in _NAME.finditer(text)]
        if not ends:
            return None
        try:
            said, _ = json.JSONDecoder().raw_decode(text, ends[-1])
        except (ValueError, RecursionError):
            return None
        return _tokens(said)


def _tokens(said: Any) -> Usage | None:
    """Images and audio say it in the words of https://platform.openai.com/docs/api-reference/responses."""
    if not isinstance(said, dict):
        return None
    words = {"input_tokens": "prompt_tokens", "output_tokens": "completion_tokens"}
    words |= {f"{name}_details": f"{chat}_details" for name, chat in words.items()}
    return Usage.from_openai({words.get(name, name): value for name, value in said.items()})

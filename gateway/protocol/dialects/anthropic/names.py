"""Names and ids that Anthropic takes."""

import hashlib
import re

_BAD_NAME = re.compile(r"[^a-zA-Z0-9_-]")
MAX_NAME = 128  # characters


def legal_name(name: str) -> str:
    """The name or id under which Anthropic gets a tool or a call: itself when it is legal, else one with a digest, so
    that no two names become one."""
    if len(name) <= MAX_NAME and not _BAD_NAME.search(name):
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{_BAD_NAME.sub('_', name)[: MAX_NAME - 9]}_{digest}"

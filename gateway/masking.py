"""Text that may be shown: what has the shape of a credential is masked, what moves a terminal's cursor is escaped."""

import re
from functools import lru_cache

# Controls, line ends in Unicode's sense, text direction (it makes a line read as another), lone surrogates.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Credentials by a mark that is searched first: nearly every line is without one, and one pattern for all is 40 µs.
_CREDENTIALS = {
    "aig_": re.compile(r"(aig_[0-9A-Za-z]{12}_|aig_session=)[\w-]+"),
    **{
        mark: re.compile(rf"\b({mark})[\w-]{{8,}}")
        for mark in ("sk-", "rk-", "gsk_", "xai-", "pplx-", "hf_", "nvapi-", "AIza")
    },
    "earer ": re.compile(r"([Bb]earer +)(?=\S*\d)[\w.~+/=-]{8,}"),
    # "basic authentication" has no digit and no capital inside, Base64 of a name and a password nearly always.
    "asic ": re.compile(r"([Bb]asic +)(?=\S*(?:[\d=]|[a-z][A-Z]))[\w.~+/=-]{8,}"),
    # Up to the last `@` of the word: a password may hold any character, and one that was not escaped often does.
    "://": re.compile(r"(://[^\s/:\"]*:)(?:[^\s\"\\]|\\.){1,500}(?=@)"),
    **{
        mark: re.compile(r"((?i:api-key)(?:\\?[\"'])?\s*[:=]\s*(?:b?\\?[\"'])?)[^\s\"'\\,}]{8,}")
        for mark in ("pi-key", "pi-Key", "PI-Key", "PI-KEY")
    },
}
_MARKED = re.compile("|".join(map(re.escape, _CREDENTIALS)))


@lru_cache(1024)  # most requests say what the one before said
def harmless(text: str) -> bool:
    """`safe` would leave it as it is."""
    return text.isprintable() and not _MARKED.search(text)


def safe(text: str) -> str:
    """The text on one line, without its credentials."""
    for mark, credential in _CREDENTIALS.items():
        if mark in text:
            text = credential.sub(r"\1***", text)
    return text if text.isprintable() else _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)

"""Which of OpenAI's vocabularies a model reads and writes in; other makers' models are not counted, but estimated.

By the names of https://github.com/openai/tiktoken/blob/main/tiktoken/model.py, and of models that are newer than it.
"""

import re
from typing import Literal

Vocabulary = Literal["o200k_base", "cl100k_base"]

# With OpenRouter's maker before it, and `ft:` before a model of one's own. The name may go on with a date or a variant.
_MAKER = r"(?:ft:)?(?:openai/)?"
_OPENAI = re.compile(_MAKER + r"(?:gpt-|chatgpt-|o[134](?![\w.])|codex)", re.IGNORECASE)
_CL100K = re.compile(_MAKER + r"gpt-(?:4(?![\w.])|3\.5|35)", re.IGNORECASE)  # Azure writes gpt-35-turbo


def vocabulary_of(upstream_model: str) -> Vocabulary | None:
    """None: a model that is not OpenAI's."""
    if not _OPENAI.match(upstream_model):
        return None
    return "cl100k_base" if _CL100K.match(upstream_model) else "o200k_base"

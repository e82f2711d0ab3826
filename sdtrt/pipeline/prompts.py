"""What a prompt holds that no text encoder gets from it: web UIs' syntax. Knows nothing of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What stable-diffusion-webui, its relatives and ComfyUI take for more than text. A number behind a colon is a weight,
# unless digits stand before it: (16:9) and (at 10:30) are text to most who write them.
_SYNTAX = re.compile(
    r"""
    \([^()]*:\s*\d*\.\d+\s*\)            # (word:1.3)
    | \([^()]*[^()\d\s]\s*:\s*\d\s*\)    # (word:2)
    | \(\([^()]+\)\)                     # ((word))
    | \bBREAK\b
    | <(?:lora|lyco|hypernet):[^<>]+>    # <lora:name:0.8>
    | \[[^\[\]:]*:[^\[\]:]*:\s*\d*\.?\d+\s*\]  # [from:to:0.5]
    | \[[^\[\]|]*\|[^\[\]]*\]            # [one|other]
    """,
    re.VERBOSE,
)
SHOWN = 40  # characters of an example


def web_ui_syntax(texts: Iterable[str]) -> str | None:
    """The first thing in some prompts that web UIs would not take literally; None where there is none."""
    found = next((match[0] for text in texts if (match := _SYNTAX.search(text))), None)
    return found if found is None or len(found) <= SHOWN else f"{found[: SHOWN - 1]}…"

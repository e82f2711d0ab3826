"""Finds what of a prompt no text encoder gets: web UIs' syntax, and the end of a long one. Changes no prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from sdtrt.common.console import Console
from sdtrt.specs import GenerateSpec

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
SHOWN_TOKENS = 100  # of a prompt that is too long


def web_ui_syntax(texts: Iterable[str]) -> str | None:
    """The first thing in some prompts that web UIs would not take literally; None where there is none."""
    found = next((match[0] for text in texts if (match := _SYNTAX.search(text))), None)
    return found if found is None or len(found) <= SHOWN else f"{found[: SHOWN - 1]}…"


def warn_literal(spec: GenerateSpec, console: Console) -> None:
    """Say that web UIs' syntax is text here, and how it is read."""
    if found := web_ui_syntax((*spec.prompts, spec.negative_prompt)):
        console.warn(
            f"web UIs' prompt syntax is taken literally: {found!r} (--prompt-syntax webui reads weights and BREAK;"
            " --lora takes a LoRA)"
        )


def warn_truncated(pipe: Any, spec: GenerateSpec, console: Console) -> None:
    """Say which ends of a request's prompts the text encoder won't see."""
    for text, name in _named(spec).items():
        _warn_truncated(pipe, text, name, console)


def _named(spec: GenerateSpec) -> dict[str, str]:
    """Each different text of a request, and what it is called."""
    texts = dict.fromkeys(spec.prompts)
    names = {text: f"prompt {number} of {len(texts)}" for number, text in enumerate(texts, 1)}
    if len(names) == 1:
        names = dict.fromkeys(names, "the prompt")
    if spec.uses_guidance:  # without, nobody reads it
        both = f"{names[spec.negative_prompt]} and the negative prompt" if spec.negative_prompt in names else None
        names[spec.negative_prompt] = both or "the negative prompt"
    return names


def _warn_truncated(pipe: Any, text: str, name: str, console: Console) -> None:
    """Say which end of a prompt the text encoder won't see."""
    tokenizer = pipe.tokenizer or pipe.tokenizer_2
    convert = getattr(pipe, "maybe_convert_prompt", None)  # SD's pipeline for T2I-Adapters takes texts as they are
    ids = tokenizer(text if convert is None else convert(text, tokenizer), truncation=False).input_ids
    limit = tokenizer.model_max_length
    if len(ids) > limit:
        dropped = tokenizer.decode(ids[limit - 1 : limit - 1 + SHOWN_TOKENS][: len(ids) - limit]).strip()
        more = " …" if len(ids) - limit > SHOWN_TOKENS else ""
        console.warn(
            f"{name} is longer than {limit} tokens (--prompt-syntax webui takes it all, in chunks);"
            f" this part of it is ignored: {dropped!r}{more}"
        )

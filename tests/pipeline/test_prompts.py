"""Web UIs' syntax in a prompt, which is taken literally, is found; text with brackets is none."""

from __future__ import annotations

import time

import pytest

from sdtrt.pipeline.inputs.prompts import SHOWN, web_ui_syntax


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a (red:1.3) blue", "(red:1.3)"),
        ("a (1girl, smile :.9)", "(1girl, smile :.9)"),
        ("a (red:2)", "(red:2)"),
        ("((masterpiece)), a dog", "((masterpiece))"),
        ("a red BREAK blue", "BREAK"),
        ("a red <lora:some:0.8>", "<lora:some:0.8>"),
        ("<hypernet:a>", "<hypernet:a>"),
        ("a [cat:dog:0.5]", "[cat:dog:0.5]"),
        ("a [cat|dog]", "[cat|dog]"),
    ],
)
def test_syntax_is_found(text, found):
    assert web_ui_syntax(["plain", text]) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(a dog)",
        "a (small) dog, (16:9)",
        "(at 10:30)",
        "breakfast, Break, BREAKING",
        "[a sign]",
        "a < b > c",
        "time: 1.3",
    ],
)
def test_plain_text_is_none(text):
    assert web_ui_syntax([text]) is None


def test_a_long_find_is_cut():
    assert len(web_ui_syntax([f"({'word ' * 99}:1.3)"])) == SHOWN


def test_a_hostile_prompt_takes_no_time():
    many = 100_000
    start = time.process_time()
    for text in ("(", "[", "(a", "<lora:", "[:", "[|"):
        assert web_ui_syntax([text * many]) is None
        assert web_ui_syntax([text + text[-1] * many + ": 1" * many]) is None
    assert time.process_time() - start < 3

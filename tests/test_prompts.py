"""Web UIs' syntax in a prompt, which is taken literally, is found; text with brackets is none."""

from __future__ import annotations

import pytest

from sdtrt.prompts import SHOWN, web_ui_syntax


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
    assert web_ui_syntax(["(" * 20_000, "[" * 20_000, "(a" * 10_000, "<lora:" * 10_000]) is None

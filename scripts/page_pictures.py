"""Makes the pictures of the page that the documentation shows: a real browser, a real server, the built-in model.

    python scripts/page_pictures.py

It needs Debian's chromium and `pip install playwright`. It writes `docs/pictures/page-*.png`, with few colours, so that
they are small.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from served import serving

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
PATIENCE_MS = 300_000
COLOURS = 256
MOST_BYTES = 150_000
DESK = {"width": 1280, "height": 800}
# Prompts and seeds that the built-in model draws well.
SHOWN = (
    ("a small green square to the left of a large white ring on a black background", 5),
    ("a red circle on a blue background", 1),
    ("a large purple triangle on a white background", 3),
    ("a large yellow star on a purple background", 4),
)


def opened(browser: Browser, url: str, **options: Any) -> Page:
    """The page in a profile of its own."""
    page = browser.new_context(**options).new_page()
    page.goto(url)
    page.wait_for_selector("html[data-ready]")
    return page


def make(page: Page, prompt: str, seed: int, steps: int = 50) -> None:
    """Make one picture."""
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.fill("#steps", str(steps))
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#cancel")).to_be_visible()
    expect(page.locator("#cancel")).to_be_hidden()


def write(page: Page, name: str) -> None:
    """Keep what is seen, as a small file."""
    page.evaluate("document.activeElement.blur()")
    with Image.open(io.BytesIO(page.screenshot())) as image:
        small = image.convert("RGB").quantize(COLOURS, kmeans=1, dither=Image.Dither.NONE)
    path = FOLDER / f"page-{name}.png"
    small.save(path, optimize=True)
    if path.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{path} has {path.stat().st_size} bytes, more than {MOST_BYTES}")
    print(path)


def draw(browser: Browser, url: str) -> None:
    """All pictures."""
    page = opened(browser, url, viewport=DESK, color_scheme="light")
    for prompt, seed in SHOWN:
        make(page, prompt, seed)
    write(page, "light")
    page.emulate_media(color_scheme="dark")
    page.click("#use-mask")
    expect(page.locator("#mask-canvas")).to_be_focused()
    page.keyboard.down("Space")
    for _ in range(9):
        page.keyboard.press("ArrowRight")
    page.keyboard.up("Space")
    write(page, "mask")


def main() -> None:
    """Start the server and the browser, and draw."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    FOLDER.mkdir(exist_ok=True)
    expect.set_options(timeout=PATIENCE_MS)
    words = ("--backend", "torch", "--preview", "own", "--warm", "128x128", "--quiet")  # nothing is to be built
    one_thread = {"OMP_NUM_THREADS": "1"}  # more wait for each other where the cores have other work
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(*words, "--engine-dir", folder, environment=one_thread) as (_, url),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        draw(browser, url)
        browser.close()


if __name__ == "__main__":
    main()

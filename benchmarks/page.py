"""How soon the page of `sdtrt serve` is there, and how soon a picture after the click: a real browser, a real server.

    python benchmarks/page.py --output page-cpu.json

It needs Debian's chromium and `pip install playwright`. The server runs the built-in model in ONNX Runtime, warm.
`first_paint_ms` are the browser's own paint entries, each of a fresh profile, from the start of the navigation;
`one_word_paint_ms` is the same of a document of one word of that server: the browser's own time, and the machine's;
`ready_ms` is until the page has the server's capabilities and its gallery. `picture_ms` is from the click on Generate
until the finished picture is decoded on the stage, by the page's own clock, for each number of steps. `load_average`
says how busy the machine was: on one that is busy with other work all figures are too high.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

import sdtrt
from sdtrt.serve import page_files

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from served import serving

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
PROMPT = "a red circle on a blue background"
PAINTED = """() => new Promise((resolve) => {
    const look = () => {
        const found = performance.getEntriesByType("paint").map((one) => [one.name, one.startTime]);
        found.length > 1 ? resolve(Object.fromEntries(found)) : setTimeout(look, 5);
    };
    look();
})"""
MADE = """() => new Promise((resolve) => {
    const actions = document.querySelector("#actions");
    const began = performance.now();
    let wasHidden = actions.hidden;
    new MutationObserver(async (_, observer) => {
        if (wasHidden && !actions.hidden) {
            observer.disconnect();
            await document.querySelector("#shown").decode();
            resolve(performance.now() - began);
        }
        wasHidden ||= actions.hidden;
    }).observe(actions, { attributes: true });
    document.querySelector("#generate").click();
})"""


def painted(browser: Browser, url: str, *, is_page: bool = True) -> dict[str, float]:
    """One first visit: when something was painted, and when the page was ready, in ms."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    page.goto(url, wait_until="commit")
    paints = page.evaluate(PAINTED)
    if is_page:
        page.wait_for_selector("html[data-ready]")
    ready = page.evaluate("performance.now()")
    context.close()
    return {"first_paint": paints["first-paint"], "contentful": paints["first-contentful-paint"], "ready": ready}


def pictures(page: Page, steps: int, repeats: int) -> list[float]:
    """Milliseconds from the click to the picture, the first of them left out."""
    page.fill("#prompt", PROMPT)
    page.fill("#steps", str(steps))
    return [round(page.evaluate(MADE), 1) for _ in range(repeats + 1)][1:]


def measure(arguments: argparse.Namespace, engines: str) -> dict[str, Any]:
    """All figures."""
    words = ("--backend", "onnxruntime", "--engine-dir", engines, "--warm", "128x128", "--quiet")
    with serving(*words) as (_, url), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        painted(browser, url)
        visits = [painted(browser, url) for _ in range(arguments.repeats)]
        floor = [painted(browser, f"{url}/healthz", is_page=False) for _ in range(arguments.repeats)]
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(url)
        page.wait_for_selector("html[data-ready]")
        made = {steps: pictures(page, steps, arguments.repeats) for steps in arguments.steps}
        version = browser.version
        browser.close()
    return {
        "first_paint_ms": summary([one["first_paint"] for one in visits]),
        "first_contentful_paint_ms": summary([one["contentful"] for one in visits]),
        "one_word_paint_ms": summary([one["first_paint"] for one in floor]),
        "ready_ms": summary([one["ready"] for one in visits]),
        "picture_ms": {str(steps): summary(found) for steps, found in made.items()},
        "page_bytes": sum(
            len((page_files.FOLDER / name).read_bytes()) for name in (page_files.FIRST, *page_files.PARTS)
        ),
        "size": "128x128",
        "model": "tiny",
        "backend": "onnxruntime",
        "chromium": version,
        "sdtrt": sdtrt.__version__,
        "cores": os.cpu_count(),
        "load_average": [round(one, 2) for one in os.getloadavg()],
    }


def summary(values: list[float]) -> dict[str, Any]:
    """The median, the largest, and all."""
    rounded = [round(one, 1) for one in values]
    return {"median": median(rounded), "largest": max(rounded), "all": rounded}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--engine-dir", help="where the engines are; by default a new one, in which they are built")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(arguments, arguments.engine_dir or folder)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    floor = report["one_word_paint_ms"]["median"]
    paint, ready = (report[name]["median"] for name in ("first_paint_ms", "ready_ms"))
    print(f"first paint {paint} ms (of one word {floor}), ready {ready} ms")
    for steps, found in report["picture_ms"].items():
        print(f"a picture of {steps} steps {found['median']} ms after the click")


if __name__ == "__main__":
    main()

"""Write the tables of README.md and docs/ from what they are about, so that no figure and no message is typed by hand.

    python scripts/doc_tables.py            # rewrite the marked blocks
    python scripts/doc_tables.py --check    # exit 1 where a block and its source disagree

A block is what lies between `<!-- table: NAME -->` and `<!-- /table -->`. Two names are special:

- `front` is the README's short comparison. `FRONT` says from which reports its rows are.
- `failures` is the table of errors. Its source is SECURITY.md's table, which a test makes true.

The source of every other block is the report `benchmarks/NAME.json`, as `benchmarks/founding.py` and
`sdtrt bench --output` write it. A block without a report says that nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
NAMES = {"torch": "PyTorch", "tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX", "onnxruntime": "ONNX Runtime"}
UNMEASURED = "Not measured yet.\n"
# The rows of the README's comparison: title, report, and the baseline there; None is what sdtrt itself ran.
FRONT = (
    ("PyTorch fp16, channels last, in a CUDA graph", "bench-inductor-h200", "torch-graph"),
    ("`torch.compile` at its strongest", "bench-inductor-h200", "torch-compile"),
    ("**sdtrt**, backend `inductor`, fp16", "bench-inductor-h200", None),
    ("**sdtrt**, TensorRT 8.6, fp16 (another run)", "bench-h200", None),
)
FAILURE = re.compile(r"\| ([^|]+) \| \d+ \| (`.+?`) \| (`.+?`) \|")

Row = Mapping[str, Any]
Request = tuple[Any, ...]
Runner = tuple[str, str, str]


def request_of(row: Row) -> Request:
    """What a row was asked for: rows of one request stand in one line of the table."""
    return row["task"], row["width"], row["height"], row["steps"], row["batch"]


def runner_of(row: Row) -> Runner:
    """What ran it: rows of one runner stand in one column. TF32 off is what PyTorch fp32 means unless it says more."""
    variant = row.get("variant") or ""
    return row["backend"], row["precision"], "" if variant == "TF32 off" else variant


def title(runner: Runner) -> str:
    """A runner's name in the head of the table."""
    backend, precision, variant = runner
    return " ".join(word for word in (NAMES.get(backend, backend), precision, variant) if word)


def milliseconds(step: float | Mapping[str, float] | None) -> str:
    """A UNet step's median, which a report has alone or with its samples."""
    median = step["median"] if isinstance(step, Mapping) else step
    return "–" if median is None else f"{median:.2f}"


def seconds(row: Row | None) -> str:
    """A row's median, or that it has none."""
    if row is None:
        return "–"
    return f"{row['latency_s']['median']:.3f}" if row.get("latency_s") else "failed"


def table(rows: Sequence[Row]) -> str:
    """The Markdown table of a report: one line a request, one column of seconds a runner.

    Speed-up and UNet step are of the runner that was asked for: the one that is no baseline, or where the report does
    not say so the last one that is not PyTorch. Without PyTorch fp32 there is no speed-up.
    """
    runners = list(dict.fromkeys(runner_of(row) for row in rows))
    asked = [runner_of(row) for row in rows if row.get("baseline", ...) is None]
    others = [runner for runner in reversed(runners) if runner[0] != "torch"]
    subject = (asked or others or runners[-1:])[0]
    runners.sort(key=subject.__eq__)  # it comes last
    batched = any(row["batch"] != 1 for row in rows)
    head = ["task", "size", "steps", *(["batch"] if batched else []), *(f"{title(runner)}, s" for runner in runners)]
    compared = any(row.get("speedup") is not None for row in rows)
    lines = [[*head, *(["speed-up"] if compared else []), "UNet step, ms"]]
    for request in dict.fromkeys(request_of(row) for row in rows):
        found = {runner_of(row): row for row in rows if request_of(row) == request}
        task, width, height, steps, batch = request
        speedup = found.get(subject, {}).get("speedup")
        lines.append(
            [task, f"{width}×{height}", str(steps), *([str(batch)] if batched else [])]
            + [seconds(found.get(runner)) for runner in runners]
            + (["–" if speedup is None else f"{speedup:.1f}×"] if compared else [])
            + [milliseconds(found.get(subject, {}).get("unet_step_ms"))]
        )
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def origin(report: Mapping[str, Any], path: str) -> str:
    """Where the figures are from: machine, versions, command, file."""
    host, versions = report["host"], report["versions"]
    machine = ", ".join(gpu["name"] for gpu in host.get("gpus", ())) or host["processor"]
    driver = [f"driver {versions['driver']}"] if versions.get("driver") else []
    used = [*dict.fromkeys([*(row["backend"] for row in report["rows"]), "torch"]), "diffusers"]
    shown = [f"{name} {versions[name]}" for name in used if versions.get(name)]
    return f"Medians. {', '.join([machine, *driver, *shown])}; `{report['command']}`; [raw figures]({path}).\n"


def front_comparison(root: Path) -> str:
    """The README's short comparison, of the rows that `FRONT` names."""
    lines = [["one picture, 512×512, 50 steps", "whole call, s", "UNet step, ms"], ["---"] * 3]
    reports = {}
    for name in dict.fromkeys(name for _, name, _ in FRONT):
        reports[name] = json.loads((root / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))
    for label, name, baseline in FRONT:
        row = next(row for row in reports[name]["rows"] if row["baseline"] == baseline)
        lines.append([label, seconds(row), milliseconds(row["unet_step_ms"])])
    first = next(iter(reports.values()))
    gpus = ", ".join(gpu["name"] for gpu in first["host"]["gpus"])
    known = {name: version for report in reports.values() for name, version in report["versions"].items()}
    versions = ", ".join(f"{name} {known[name]}" for name in ("driver", "torch", "tensorrt") if name in known)
    raw = " and ".join(f"[{name}](benchmarks/{name}.json)" for name in reports)
    shown = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    weights = "**Random weights** of Stable Diffusion 1.5's size"
    return f"\n{shown}\n{gpus}, {versions}. {weights}. Medians; raw: {raw}.\n\n"


def failures_listed(root: Path) -> str:
    """Every error with its mend, as SECURITY.md has them."""
    found = FAILURE.findall((root / "SECURITY.md").read_text(encoding="utf-8"))
    lines = [["what is wrong", "`error:`", "`hint:`"], ["---"] * 3, *([name, *said] for name, *said in found)]
    return "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n"


def table_of(name: str, page: Path, root: Path) -> str:
    """The table of a report in `benchmarks/`, and where its figures are from."""
    path = root / "benchmarks" / f"{name}.json"
    if not path.exists():
        return UNMEASURED
    report = json.loads(path.read_text(encoding="utf-8"))
    link = os.path.relpath(path, page.parent)
    return f"\n{table(report['rows'])}\n{origin(report, link)}\n"


def block(name: str, page: Path, root: Path) -> str:
    """What a block of a page must hold."""
    if name == "front":
        return front_comparison(root)
    if name == "failures":
        return failures_listed(root)
    return table_of(name, page, root)


def rewritten(text: str, page: Path, root: Path) -> str:
    """A page with every block made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{block(match['name'], page, root)}{match[4]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a table is not its source's")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder with README.md, docs/ and benchmarks/")
    args = parser.parse_args(arguments)
    texts = {page: page.read_text(encoding="utf-8") for page in pages(args.root)}
    if not any(map(BLOCK.search, texts.values())):
        print("error: there is no table block\nhint: <!-- table: founding --> … <!-- /table -->", file=sys.stderr)
        return 1
    for page, text in texts.items():
        wanted = rewritten(text, page, args.root)
        if args.check and wanted != text:
            print(f"error: {page.name} disagrees with its source\nhint: python scripts/doc_tables.py", file=sys.stderr)
            return 1
        if wanted != text:
            page.write_text(wanted, encoding="utf-8")
    return 0


def pages(root: Path) -> list[Path]:
    """README.md and the pages of docs/."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


if __name__ == "__main__":
    sys.exit(main())

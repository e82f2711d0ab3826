"""Write the README's tables of speeds from the reports in `benchmarks/`, so that no figure is typed by hand.

    python scripts/readme_tables.py            # rewrite the marked blocks
    python scripts/readme_tables.py --check    # exit 1 where a block and its report disagree

A block is what lies between `<!-- table: NAME -->` and `<!-- /table -->`; its report is `benchmarks/NAME.json`, as
`benchmarks/founding.py` and `sdtrt bench --output` write it. A block without a report says that nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
NAMES = {"torch": "PyTorch", "tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX", "onnxruntime": "ONNX Runtime"}
UNMEASURED = "Not measured yet.\n"

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


def block(name: str, root: Path) -> str:
    """What a block must hold."""
    path = root / "benchmarks" / f"{name}.json"
    if not path.exists():
        return UNMEASURED
    report = json.loads(path.read_text(encoding="utf-8"))
    return f"\n{table(report['rows'])}\n{origin(report, path.relative_to(root).as_posix())}\n"


def rewritten(text: str, root: Path) -> str:
    """The README with every block made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{block(match['name'], root)}{match[4]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a table is not its report's")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder with README.md and benchmarks/")
    args = parser.parse_args(arguments)
    readme = args.root / "README.md"
    text = readme.read_text(encoding="utf-8")
    if BLOCK.search(text) is None:
        print(f"error: {readme} has no table block\nhint: <!-- table: founding --> … <!-- /table -->", file=sys.stderr)
        return 1
    wanted = rewritten(text, args.root)
    if args.check and wanted != text:
        print("error: README.md disagrees with benchmarks/\nhint: python scripts/readme_tables.py", file=sys.stderr)
        return 1
    if wanted != text:
        readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

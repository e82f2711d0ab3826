"""Write the tables of README.md and docs/ from what they are about, so that no figure and no message is typed by hand.

    python scripts/doc_tables.py            # rewrite the marked blocks
    python scripts/doc_tables.py --check    # exit 1 where a block and its source disagree

A block is what lies between `<!-- KIND: NAME -->` and `<!-- /table -->`. Its sources are reports
`benchmarks/NAME.json`; a block without any says that nothing was measured. The kinds are:

- `table`: whole calls, one line a request, as `benchmarks/founding.py` and `sdtrt bench --output` write them. Two names
  are special. `front` is the README's short comparison; `FRONT` says from which reports its rows are. `failures` is the
  table of errors; its source is SECURITY.md's table, which a test makes true.
- `rows`: such reports, several where several names are given; one line for all that is known of a row.
- `engine`: what `benchmarks/packages.py` writes: figures of an engine, and the steps of several.
- `recipe`: what `benchmarks/inductor_recipe.py` writes: variants of one engine.
- `quality`: what `benchmarks/quality_curve.py` and `sdtrt bench --quality` write: choices of savings, and their losses.
- `presets`: what `--quality` means; its source is `sdtrt/specs/presets.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = "table|rows|engine|recipe|quality|presets"
BLOCK = re.compile(rf"(<!-- (?P<kind>{KINDS}): (?P<name>[\w -]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
NAMES = {
    "torch": "PyTorch",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT for RTX",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
UNMEASURED = "Not measured yet.\n"
# The rows of the README's comparison: title, report, and the baseline there; None is what sdtrt itself ran.
FRONT = (
    ("PyTorch fp16, channels last, in a CUDA graph", "bench-inductor-h200", "torch-graph"),
    ("`torch.compile` at its strongest", "bench-inductor-h200", "torch-compile"),
    ("**sdtrt**, backend `inductor`, fp16", "bench-inductor-h200", None),
    ("**sdtrt**, TensorRT 8.6, fp16 (another run)", "bench-h200", None),
)
RECIPE_COLUMNS = {"step_ms": ".2f", "of_pytorch": ".2f", "build_s": ".0f"}
# Figures of a loss: their names in a report, in a table, and how they are written.
LOSSES = (
    ("relative_l2", "latents' rel. L2", ".3f"),
    ("psnr_db", "PSNR, dB", ".1f"),
    ("ssim", "SSIM", ".3f"),
    ("lpips", "LPIPS", ".3f"),
    ("clip_loss", "CLIP lost", "+.2f"),
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


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table, of which the first line is the head."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def number(value: float | None, form: str, factor: float = 1) -> str:
    """A figure in another unit, or that there is none."""
    return "–" if value is None else format(value * factor, form)


def all_rows(rows: Sequence[Row]) -> str:
    """One line a row: with what a call costs, and of what was asked for, how long it takes beside the best baseline."""
    head = ["task", "size", "steps", "batch", "what", "call, s", "images/s", "UNet step, ms", "J/image", "peak, GB"]
    lines = [[*head, "beside the fastest baseline"]]
    for row in rows:
        task, width, height, steps, batch = request_of(row)
        asked = row.get("baseline", ...) is None
        name = f"**{title(runner_of(row))}**" if asked else title(runner_of(row))
        times = [seconds(row), number(row.get("images_per_s"), ".2f"), milliseconds(row.get("unet_step_ms"))]
        costs = [number(joules(row), ".1f"), number(row.get("peak_bytes"), ".1f", 1e-9)]
        beside = number(beside_baselines(row, rows), ".2f") if asked else ""
        lines.append([task, f"{width}×{height}", str(steps), str(batch), name, *times, *costs, beside])
    return markdown(lines)


def joules(row: Row) -> float | None:
    """Of one image; older reports have those of a call alone."""
    of_call = row.get("energy_j")
    image: float | None = row.get("energy_per_image_j") or (of_call and of_call / row["batch"])
    return image


def beside_baselines(row: Row, rows: Sequence[Row]) -> float | None:
    """How long a call takes, as a multiple of the fastest baseline's at the same request; None without such."""
    same = [one for one in rows if request_of(one) == request_of(row) and one.get("latency_s") and one.get("baseline")]
    if not same or not row.get("latency_s"):
        return None
    return float(row["latency_s"]["median"] / min(one["latency_s"]["median"] for one in same))


def engine_figures(report: Mapping[str, Any]) -> list[list[str]]:
    """What one engine costs and keeps, of the parts that were measured."""
    lines = []
    if build := report.get("build"):
        lines += [["built in, s", number(build["build_s"], ".0f")]]
        lines += [["package, MB", number(build["package_bytes"], ".1f", 1e-6)]]
    if opened := report.get("open"):
        lines += [["opened with its weights, s", number(opened["open_s"]["median"], ".2f")]]
        lines += [["opened without, s", number(opened["without_weights_s"]["median"], ".2f")]]
        lines += [["first run, s", number(opened["first_run_s"]["median"], ".2f")]]
    for row in (report.get("checkpoints") or {}).get("checkpoints", ()):
        engine, own = row["engine"]["relative_l2"], row["eager"]["relative_l2"]
        name = f"error with {row['checkpoint']}; PyTorch's own"
        lines += [[name, f"{engine:.1e}; {own:.1e} (cosine {row['engine']['cosine']:.6f})"]]
    if changes := report.get("changes"):
        lines += change_figures(changes)
    if "parameters" in (each := report.get("parameters") or {}):
        followed = each["parameters"] - len(each["not_followed"])
        lines += [["parameters followed, each changed alone", f"{followed} of {each['parameters']}"]]
    return lines


def change_figures(changes: Mapping[str, Any]) -> list[list[str]]:
    """What a change of weights costs, and what many of them leave behind."""
    file, memory = changes["from_file_s"], changes["from_memory_s"]
    grown = [f"{name} {one['growth']:.2%}" for name, one in changes["memory"].items() if one["growth"] is not None]
    back = "equal to the last bit" if changes["a_is_back_to_the_last_bit"] else "**another one**"
    return [
        ["weights changed from a file, s: median, most", f"{file['median']:.2f}, {max(file['samples']):.2f}"],
        ["weights changed from the device's memory, s", f"{memory['median']:.4f}"],
        [f"first output after {changes['changes']} changes", back],
        ["growth of memory after the first tenth of them", ", ".join(grown)],
    ]


def engine_steps(rows: Sequence[Row]) -> str:
    """Milliseconds of a step: a line an engine, a column a size."""
    sizes = list(dict.fromkeys((row["batch"], row["width"], row["height"]) for row in rows if "batch" in row))
    lines = [["engine for", *(f"{batch} rows, {width}×{height}, ms" for batch, width, height in sizes)]]
    for profile in dict.fromkeys(row["profile"] for row in rows):
        own = [row for row in rows if row["profile"] == profile and not row.get("error")]
        found = {(row["batch"], row["width"], row["height"]): row["step_ms"] for row in own}
        lines.append([profile, *(milliseconds(found.get(size)) for size in sizes)])
    return markdown(lines)


def origin(report: Mapping[str, Any], path: str) -> str:
    """Where the figures are from: machine, versions, command, file."""
    host, versions = report["host"], report["versions"]
    machine = ", ".join(gpu["name"] for gpu in host.get("gpus", ())) or host["processor"]
    driver = [f"driver {versions['driver']}"] if versions.get("driver") else []
    used = [*dict.fromkeys([*(row.get("backend", "torch") for row in report.get("rows", ())), "torch"]), "diffusers"]
    shown = [f"{name} {versions[name]}" for name in used if versions.get(name)]
    how = f"`{report['command']}`" if report["command"] else report["note"]
    return f"Medians. {', '.join([machine, *driver, *shown])}; {how}; [raw figures]({path}).\n"


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


def table_of(report: Mapping[str, Any]) -> str:
    """The table of whole calls."""
    return table(report["rows"])


def rows_of(names: Sequence[str], page: Path, root: Path) -> str:
    """The rows of several reports in one table, and where each is from; those that there are."""
    paths = [path for name in names if (path := root / "benchmarks" / f"{name}.json").exists()]
    if not paths:
        return UNMEASURED
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    pairs = zip(reports, paths, strict=True)
    sources = "\n".join(origin(report, os.path.relpath(path, page.parent)) for report, path in pairs)
    return f"\n{all_rows([row for report in reports for row in report['rows']])}\n{sources}\n"


def engine_of(report: Mapping[str, Any]) -> str:
    """The tables of a report of `benchmarks/packages.py`."""
    head = [f"{report['model']}: {report['component']}, {report['precision']}", ""]
    steps = f"\n{engine_steps(report['rows'])}" if report.get("rows") else ""
    return f"{markdown([head, *engine_figures(report)])}{steps}"


def recipe_of(report: Mapping[str, Any]) -> str:
    """The variants of a report of `benchmarks/inductor_recipe.py`, the fastest first; those that failed last."""
    what = f"{report['component']}, {report['precision']}, {report['sizes']}"
    rows = sorted(report["rows"], key=lambda row: row.get("step_ms", float("inf")))
    lines = [
        [row["variant"], row["error"], "", ""]
        if "error" in row
        else [row["variant"], *(number(row[key], form) for key, form in RECIPE_COLUMNS.items())]
        for row in rows
    ]
    return markdown([[what, "step, ms", "error / PyTorch's", "built, s"], *lines])


def quality_of(report: Mapping[str, Any]) -> str:
    """Choices of savings: what each saves, how much faster it is, and what it loses in figures and in scores."""
    rows = report["rows"]
    figures = [
        (key, title, form) for key, title, form in LOSSES if any(row["mean"].get(key) is not None for row in rows)
    ]
    known = list(rows[0].get("scores", {}))
    scores = [name for name in known if any(row["scores_lost"][name] for row in rows)]
    by_cpu = not report["host"].get("gpus") and "cpu_speedup" in rows[0]
    speed = "speed-up, in CPU seconds" if by_cpu else "speed-up"
    timed = "latency_s" in rows[0] and not by_cpu  # where others ran, too, the time of a call says nothing
    call = ["call, s"] if timed else []
    head = ["choice", *call, speed, *(title for _, title, _ in figures)]
    lines = [[*head, *(f"{name.replace('_', ' ').replace('all right', 'all')}, points lost" for name in scores)]]
    for row in rows:
        lost = [f"{row['scores_lost'][name]:.1f}" for name in scores]
        faster = number(row["cpu_speedup" if by_cpu else "speedup"], ".2f")
        losses = [number(row["mean"][key], form) for key, _, form in figures]
        time = [number((row["latency_s"] or {}).get("median"), ".3f") for _ in call]
        lines.append([f"`{row['choice']}`", *time, faster, *losses, *lost])
    size = f"{report['width']}×{report['height']}"
    what = f"{report['model']}, {report['backend']} {report['precision']}, {size}, {report['steps']} steps"
    count = report["prompts"] if known else len(rows[0]["prompts"])
    exact = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in rows[0].get("scores", {}).items())
    said = f" Right in the exact pictures, in percent: {exact}." if exact else ""
    kept = [name.replace("_", " ") for name in known if name not in scores]
    said += f" No choice lost anything of {', '.join(kept)}." if kept else ""
    return f"{markdown(lines)}\n{what}, {count} prompt{'s' * (count != 1)}.{said}\n"


def presets_listed() -> str:
    """What each preset saves, and why."""
    from sdtrt.specs.presets import PRESETS, describe

    lines = [["`--quality`", "what it saves", "why"]]
    more = "; 8 bits, where builds have measured them to be faster"
    lines += [[f"`{name}`", describe(one.savings) + more * one.eight_bits, one.why] for name, one in PRESETS.items()]
    return f"\n{markdown(lines)}\n"


def single(name: str, page: Path, root: Path, tables: Callable[[Mapping[str, Any]], str]) -> str:
    """What a report in `benchmarks/` says, and where its figures are from."""
    path = root / "benchmarks" / f"{name}.json"
    if not path.exists():
        return UNMEASURED
    report = json.loads(path.read_text(encoding="utf-8"))
    return f"\n{tables(report)}\n{origin(report, os.path.relpath(path, page.parent))}\n"


SINGLE = {"table": table_of, "engine": engine_of, "recipe": recipe_of, "quality": quality_of}


def block(kind: str, name: str, page: Path, root: Path) -> str:
    """What a block of a page must hold."""
    if kind == "rows":
        return rows_of(name.split(), page, root)
    if kind == "presets":
        return presets_listed()
    if name == "front":
        return front_comparison(root)
    if name == "failures":
        return failures_listed(root)
    return single(name, page, root, SINGLE[kind])


def rewritten(text: str, page: Path, root: Path) -> str:
    """A page with every block made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{block(match['kind'], match['name'], page, root)}{match[4]}", text)


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

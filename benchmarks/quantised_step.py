"""A UNet's step in 8 bits beside 16, on this machine: time and error for each list of layers that stay in 16 bits.

    python benchmarks/quantised_step.py --model sd15 --folder OUT --output sd15-8-bits.json
    python benchmarks/quantised_step.py --model sdxl --folder OUT --output sdxl-8-bits.json --budget-s 1500
    python benchmarks/quantised_step.py --model tiny --small --folder OUT --output tiny.json       # tries it, on a CPU

`sd15` and `sdxl` are models with random weights (`scripts/make_random_model.py`), made in the folder where they are
missing; so is any other model's name or folder taken. An engine of each row is built by the very code that `sdtrt
build` uses, which times its step and holds it against fp32; engines go when they have been measured. Rows are written
as they come, what matters most first; once the budget is spent, no further build begins. At the end it prints for each
batch the fastest list whose error is within `--max-error`, and whether it is faster than 16 bits at all.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdtrt.backends import registry
from sdtrt.backends.inductor.build import KEPT, OPTIONS, Request, build_package, recipe_of
from sdtrt.common import host
from sdtrt.common.console import Console, print_table
from sdtrt.common.errors import SdtrtError, UsageError
from sdtrt.models.components import contract_of
from sdtrt.models.resolve import Model, resolve_model
from sdtrt.specs import QUANTISED, ExportSpec, ModelSpec, Precision, Profile, Sizes

MADE = {"sd15": 512, "sdxl": 1024}  # models that are made here, and their pixels
LISTS: dict[str, tuple[str, ...]] = {  # of layers that stay in 16 bits
    "default": KEPT["fp8"],
    "none": (),
    "attention": ("*.attn1.*", "*.attn2.*", "*.proj_in", "*.proj_out"),
}
# What torchao has Inductor do with int8: the scale of a row within the product's own kernel.
FUSED = {"force_fuse_int_mm_with_mul": True}


@dataclass(frozen=True)
class Row:
    """One engine that is measured."""

    rows: int
    precision: Precision
    kept: str = ""  # the list's name
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What tells it from others of its batch."""
        return " ".join(filter(None, (self.precision, self.kept and f"kept: {self.kept}", *self.options)))


def rows_of(batches: list[int], device: str) -> Iterator[Row]:
    """What is measured, what matters most first: the usual lists at each batch, then the others."""
    bases: tuple[Precision, ...] = ("fp16", "bf16") if device == "cuda" else ("bf16",)
    for rows in batches:
        yield from (Row(rows, precision) for precision in bases)
        yield from (Row(rows, precision, "default") for precision in reversed(QUANTISED))
    for rows in batches:
        yield from (Row(rows, "fp8", kept) for kept in LISTS if kept != "default")
        yield from (Row(rows, "int8", "default", FUSED) for _ in range(device == "cuda"))
        yield from (Row(rows, "int8", kept) for kept in LISTS if kept != "default")


def measure(row: Row, model: Model, pixels: int, device: str, console: Console) -> dict[str, Any]:
    """Build one engine; its figures, or why it has none."""
    export = ExportSpec(model.spec, "unet", row.precision)
    recipe = recipe_of(export)
    if row.kept:
        recipe["kept"] = list(LISTS[row.kept])
    known = {"rows": row.rows, "title": row.title, "precision": row.precision, "kept": recipe.get("kept")}
    profile = Profile.of(Sizes(row.rows, pixels, pixels))
    contract = contract_of(model, "unet", row.precision)
    with tempfile.TemporaryDirectory(prefix="sdtrt-8-bits-") as folder:
        request = Request(
            export, profile, contract, Path(folder), device, options={**OPTIONS, **row.options}, recipe=recipe
        )
        try:
            registry.get("inductor").check_precision(row.precision)
            info = build_package(request, console)
        except SdtrtError as error:
            return {**known, "error": error.message}
    named = ("step_ms", "torch_step_ms", "compile_seconds", "plan_bytes", "scratch_bytes")
    return {**known, "relative_l2": info["parity"][0]["relative_l2"], **{one: info.get(one) for one in named}}


def choices(rows: list[dict[str, Any]], most: float) -> list[str]:
    """Which list to take for each batch."""
    found = []
    for batch in dict.fromkeys(row["rows"] for row in rows):
        ran = [row for row in rows if row["rows"] == batch and "step_ms" in row]
        whole = [row for row in ran if row["precision"] not in QUANTISED]
        fitting = [row for row in ran if row["precision"] in QUANTISED and row["relative_l2"] <= most]
        if not whole or not fitting:
            found.append(f"{batch} rows: nothing to choose from")
            continue
        base, best = (min(some, key=lambda row: row["step_ms"]) for some in (whole, fitting))
        gain = base["step_ms"] / best["step_ms"]
        words = f"{best['title']}, {gain:.2f} times as fast as {base['title']}, error {best['relative_l2']:.3f}"
        found.append(f"{batch} rows: take {words}" if gain > 1 else f"{batch} rows: stay in 16 bits ({words})")
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """Print what was measured."""
    cells = [
        (str(row["rows"]), row["title"], row["error"], "")
        if "error" in row
        else (str(row["rows"]), row["title"], f"{row['step_ms']:.3f}", f"{row['relative_l2']:.2e}")
        for row in rows
    ]
    print_table(("rows", "engine", "step, ms", "error"), cells)


def model_of(name: str, folder: Path, console: Console) -> Model:
    """The model, made where it is one that is made and missing."""
    if name not in MADE:
        return resolve_model(ModelSpec(name), console)
    path = folder / name
    if not path.exists():
        script = Path(__file__).resolve().parents[1] / "scripts" / "make_random_model.py"
        subprocess.run([sys.executable, str(script), str(path), "--architecture", name], check=True)
    return resolve_model(ModelSpec(str(path)), console)


def arguments() -> argparse.Namespace:
    """Those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", help=f"{' or '.join(MADE)}, or any model")
    parser.add_argument("--rows", default="2,8,16", metavar="N,N", help="of the UNet: guidance makes two an image")
    parser.add_argument("--pixels", type=int, help="a side; by default the model's own")
    parser.add_argument("--max-error", type=float, default=0.05, help="relative L2, against fp32")
    parser.add_argument("--budget-s", type=float, default=3000, help="after which no further build begins")
    parser.add_argument("--small", action="store_true", help="two rows, 64 pixels, one list: to try it")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> int:
    """Measure until all is done or the budget is spent; 1 where an engine of 16 bits was not to be had."""
    args, console, begin = arguments(), Console(), time.perf_counter()
    if problem := registry.get("inductor").why_not():
        raise UsageError(problem.message, hint=problem.hint)
    args.folder.mkdir(parents=True, exist_ok=True)
    model, device = model_of(args.model, args.folder, console), registry.get("inductor").device()
    pixels = 64 if args.small else args.pixels or MADE.get(args.model) or model.default_size()[0]
    batches = [2] if args.small else [int(one) for one in args.rows.split(",")]
    wanted = [one for one in rows_of(batches, device) if not args.small or one.kept in ("", "default")]
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "host": host.facts(),
        "versions": host.library_versions(),
        "model": args.model,
        "pixels": pixels,
        "rows": [],
        "left_out": [],
    }
    for row in wanted:
        if time.perf_counter() - begin > args.budget_s:
            report["left_out"].append(f"{row.rows} rows: {row.title}")
            continue
        report["rows"].append(measure(row, model, pixels, device, console))
        report["choices"] = choices(report["rows"], args.max_error)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    show(report["rows"])
    print("\n".join([*report.get("choices", ()), *(f"left out: {one}" for one in report["left_out"])]))
    return int(any("error" in row for row in report["rows"] if row["precision"] not in QUANTISED))


if __name__ == "__main__":
    sys.exit(main())

"""How far a UNet's output is off when its linear layers compute in 8 bits: each kind alone, each layer alone, and all.

    python benchmarks/quantised_layers.py --each --output layers.json                          # the built-in model
    python benchmarks/quantised_layers.py --model FOLDER --height 512 --width 512 --output layers.json

The inputs are those of a real denoising run in fp32, and all else is computed in fp32: what is left is the error of 8
bits alone. No compiler runs, so that a CPU will do. A kind is a layer's name within its block (attn2.to_kv), spelled
as engines spell it, with projections fused. `work` is a kind's share of the products of a step's candidates: what it
could save at most. `kept` names the kinds that are the first to be kept in 16 bits: those with the most error for their
work, one more in each row, beside the error of all the others together.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sdtrt.common import host
from sdtrt.common.console import Console, print_table
from sdtrt.common.metrics import relative_l2
from sdtrt.engines.directory import EngineDirectory
from sdtrt.exports.program import fuse_projections
from sdtrt.exports.quantised import layers_to_quantise, quantise
from sdtrt.models.components import load_component
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.opening.request import resolve_request
from sdtrt.reports.meters import tf32
from sdtrt.reports.verify_runs import RecordedCall, Shown, run_reference
from sdtrt.specs import QUANTISED, SAMPLE_PROMPT, GenerateSpec, ModelSpec, VerifySpec

BLOCK = re.compile(r".*\.transformer_blocks\.\d+\.")  # what a layer's name begins with, in a block


def kind_of(layer: str) -> str:
    """A layer's name within its block: attn2.to_kv, whichever block it is in."""
    return BLOCK.sub("", layer) if BLOCK.match(layer) else layer.rpartition(".")[2]


@dataclass(frozen=True)
class Subject:
    """A UNet in fp32, and calls of it whose outputs are known."""

    unet: torch.nn.Module
    calls: Sequence[RecordedCall]
    device: torch.device

    @cached_property
    def layers(self) -> list[str]:
        """The candidates."""
        return layers_to_quantise(self.unet)

    def error(self, layers: Sequence[str], precision: str) -> float:
        """The largest relative L2 error of any call with these layers in 8 bits."""
        with in_8_bits(self.unet, layers, precision):
            return max(relative_l2(self.output(call), call.output) for call in self.calls)

    def output(self, call: RecordedCall) -> Any:
        """What the UNet gives for a call's inputs."""
        with torch.inference_mode(), tf32(False):
            found = self.unet(**call.inputs(self.device, torch.float32), return_dict=False)[0]
        return found.cpu().numpy()

    @cached_property
    def work(self) -> dict[str, int]:
        """The multiplications of each candidate in the first call."""
        counts: dict[str, int] = {}

        def counter(name: str) -> Any:
            def count(layer: Any, inputs: Any, _: Any) -> None:
                counts[name] = inputs[0].numel() * layer.out_features

            return count

        hooks = [self.unet.get_submodule(name).register_forward_hook(counter(name)) for name in self.layers]
        self.output(self.calls[0])
        for hook in hooks:
            hook.remove()
        return counts


@contextmanager
def in_8_bits(unet: torch.nn.Module, layers: Sequence[str], precision: str) -> Iterator[None]:
    """Within, these layers compute in 8 bits."""
    own = {name: unet.get_submodule(name) for name in layers}
    quantise(unet, layers, precision)
    try:
        yield
    finally:
        for name, layer in own.items():
            parent, _, last = name.rpartition(".")
            setattr(unet.get_submodule(parent), last, layer)


def subject_of(args: argparse.Namespace, console: Console) -> Subject:
    """The model's UNet with what a denoising run gave it."""
    image = GenerateSpec(
        (args.prompt,),
        model=ModelSpec(args.model),
        backend="torch",
        precision="fp32",
        steps=args.steps,
        height=args.height,
        width=args.width,
        seed=0,
    )
    model = resolve_model(image.model, console)
    request = resolve_request(image, model, console)
    with tempfile.TemporaryDirectory(prefix="sdtrt-layers-") as folder:
        reference = run_reference(
            VerifySpec(image, timesteps=args.timesteps), request, Shown(), EngineDirectory(Path(folder)), console
        )
    unet = load_component(model, "unet", torch.float32).eval()
    fuse_projections(unet)
    return Subject(unet.to(request.device), reference.calls, request.device)


def measure(subject: Subject, precision: str, *, each: bool, console: Console) -> dict[str, Any]:
    """All figures of a precision."""
    kinds: dict[str, list[str]] = {}
    for name in subject.layers:
        kinds.setdefault(kind_of(name), []).append(name)
    total = sum(subject.work.values())
    found: dict[str, Any] = {"all": subject.error(subject.layers, precision)}
    rows: list[dict[str, Any]] = []
    for kind, names in kinds.items():
        console.note(f"{precision}: {kind}")
        work = sum(subject.work[name] for name in names) / total
        rows.append(
            {"kind": kind, "layers": len(names), "work": round(work, 4), "error": subject.error(names, precision)}
        )
    rows.sort(key=lambda row: -(row["error"] ** 2) / row["work"])
    found["kinds"] = rows
    found["kept"] = [_without(subject, kinds, rows[:count], precision) for count in range(1, len(rows))]
    if each:
        found["each"] = {name: subject.error([name], precision) for name in subject.layers}
    return found


def _without(
    subject: Subject, kinds: dict[str, list[str]], kept: Sequence[dict[str, Any]], precision: str
) -> dict[str, Any]:
    """The error of all kinds but some, and the share of the work that is left in 8 bits."""
    names = [row["kind"] for row in kept]
    rest = [name for kind, layers in kinds.items() if kind not in names for name in layers]
    work = sum(subject.work[name] for name in rest) / sum(subject.work.values())
    return {"kept": names, "work": round(work, 4), "error": subject.error(rest, precision)}


def show(precision: str, found: dict[str, Any]) -> None:
    """Print the tables of a precision."""
    print(f"\n{precision}: all layers {found['all']:.2e}")
    cells = [(row["kind"], str(row["layers"]), f"{row['work']:.1%}", f"{row['error']:.2e}") for row in found["kinds"]]
    print_table(("kind", "layers", "work", "error alone"), cells)
    rows = [(", ".join(row["kept"]), f"{row['work']:.1%}", f"{row['error']:.2e}") for row in found["kept"]]
    print_table(("kept in 16 bits", "work in 8", "error"), rows)


def arguments() -> argparse.Namespace:
    """Those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--precisions", default=",".join(QUANTISED), metavar="NAME,NAME")
    parser.add_argument("--prompt", default=SAMPLE_PROMPT)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--timesteps", type=int, default=4, help="so many of the steps are looked at")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--each", action="store_true", help="each layer alone, too")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Measure, print the tables, write the JSON."""
    args, console = arguments(), Console()
    subject = subject_of(args, console)
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "host": host.facts(),
        "versions": host.library_versions(),
        "timesteps": [float(call.timestep) for call in subject.calls],
    }
    for precision in args.precisions.split(","):
        report[precision] = measure(subject, precision, each=args.each, console=console)
        show(precision, report[precision])
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

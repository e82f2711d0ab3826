"""What stays fp32 in an fp16 UNet, and what that costs: the ablation behind `tracing.WIDE_LEVELS`.

    python scripts/make_random_model.py sd15
    python benchmarks/fidelity.py levels --model sd15 --levels 0 1 2 4 --output benchmarks/fidelity/levels-sd15.json
    python benchmarks/fidelity.py convolutions --output benchmarks/fidelity/convolutions.json

`levels` exports the UNet once for each number of resolutions whose convolutions compute in fp32, builds all of them
side by side (`--backend tensorrt`, or `onnxruntime` without a GPU), and holds each against PyTorch in fp32 (TF32 off),
with PyTorch's own fp16 beside it: relative L2 error and cosine at timesteps over the whole range, and the time of a
step. `convolutions` does so for single 3x3 convolutions of Stable Diffusion's widths, where the builder may choose.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdtrt import host, onnx_graph
from sdtrt.build.onnxruntime import optimize
from sdtrt.build.tensorrt import build_plan
from sdtrt.components import Contract, TensorSpec, unet_contract
from sdtrt.console import Console
from sdtrt.export import write_onnx
from sdtrt.meters import time_queued_calls
from sdtrt.metrics import cosine, relative_l2
from sdtrt.models import load_unet, resolve_model
from sdtrt.parity import seeded_feeds
from sdtrt.runtime.onnxruntime import OnnxRuntimeSession
from sdtrt.runtime.session import Session
from sdtrt.specs import Backend, BuildSpec, ExportSpec, ModelSpec, Profile, Sizes
from sdtrt.tracing import UNetCall

TIMESTEPS = (981.0, 701.0, 421.0, 141.0, 1.0)
CHANNELS = ((320, 320, 64), (640, 640, 32), (1280, 1280, 16), (2560, 1280, 8))  # in, out, side in latents
Feeds = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """One export: where its files lie, and how many resolutions of it compute their convolutions in fp32."""

    levels: int
    folder: Path

    @property
    def onnx(self) -> Path:
        """Its graph."""
        return self.folder / "model.onnx"


def device_of(backend: Backend) -> torch.device:
    """Where a backend runs."""
    return torch.device("cpu" if backend == "onnxruntime" else "cuda")


def build(variant: Variant, contract: Contract, args: argparse.Namespace) -> dict[str, Any]:
    """Build a variant's engine; what the build measured, or why there is none."""
    console = Console()
    if args.backend == "onnxruntime":
        return optimize(variant.onnx, variant.folder, contract, console)
    profiles = (Profile.of(Sizes(2, args.height, args.width)),)
    spec = BuildSpec(ExportSpec(ModelSpec("ablation")), args.backend, profiles, args.optimization_level)
    return build_plan(variant.onnx, variant.folder, contract, spec, timing_cache=None, console=console)


@contextmanager
def opened(variant: Variant, contract: Contract, backend: Backend) -> Iterator[Session[torch.Tensor]]:
    """A variant's engine, running."""
    if backend == "onnxruntime":
        with OnnxRuntimeSession(variant.folder / "engine.onnx", contract) as session:
            yield session
        return
    from sdtrt.runtime.tensorrt import TensorRTSession

    plan = variant.folder / "engine.plan"
    with TensorRTSession(plan, contract, backend=backend, device=device_of(backend)) as on_gpu:
        yield on_gpu


def feeds_of(contract: Contract, sizes: Sizes, device: torch.device) -> list[Feeds]:
    """Inputs at timesteps over the whole range, other noise for each."""
    made = []
    for number, timestep in enumerate(TIMESTEPS):
        feeds = seeded_feeds(contract, sizes, seed=number)
        feeds["timestep"] = torch.full_like(feeds["timestep"], timestep)
        made.append({name: tensor.to(device) for name, tensor in feeds.items()})
    return made


def outputs_of(unet: torch.nn.Module, dtype: torch.dtype, feeds: Sequence[Feeds]) -> list[torch.Tensor]:
    """What PyTorch computes in a dtype."""
    call = UNetCall(torch.nn.Module.to(unet, dtype))
    with torch.inference_mode():
        return [call(*(_as(name, tensor, dtype) for name, tensor in one.items())).float() for one in feeds]


def _as(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if name in ("timestep", "time_ids") else tensor.to(dtype)


def errors(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> dict[str, list[float]]:
    """How far results are from fp32's, one figure a timestep."""
    pairs = [(one.float().cpu().numpy(), other.cpu().numpy()) for one, other in zip(actual, expected, strict=True)]
    return {"relative_l2": [relative_l2(*pair) for pair in pairs], "cosine": [cosine(*pair) for pair in pairs]}


def row_of(variant: Variant, contract: Contract, built: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Run one variant."""
    backend, feeds = state["backend"], state["feeds"]
    with opened(variant, contract, backend) as session:
        outputs = [session.run(one)[contract.outputs[0].name] for one in feeds]
        for _ in range(5):
            session.run(feeds[0])
        step = time_queued_calls(lambda: session.run(feeds[0]), state["repeats"], device_of(backend)).scaled(1000)
    found = errors(outputs, state["expected"])
    ratios = [mine / own for mine, own in zip(found["relative_l2"], state["floor"]["relative_l2"], strict=True)]
    return {
        "levels": variant.levels,
        "fp32_operators": len(onnx_graph.float32_nodes(variant.onnx)),
        **found,
        "worst_ratio_to_pytorch_fp16": max(ratios),
        "step_ms": step.to_json(),
        "build": {key: built[key] for key in ("build_seconds", "plan_bytes", "precision") if key in built},
    }


def measure_levels(args: argparse.Namespace) -> dict[str, Any]:
    """The rows of `levels`."""
    model = resolve_model(ModelSpec(args.model))
    unet = load_unet(model, torch.float16)
    contract = unet_contract(model.config("unet"), "fp16")
    device, sizes = device_of(args.backend), Sizes(2, args.height, args.width)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        variants = [Variant(levels, Path(folder) / str(levels)) for levels in args.levels]
        for variant in variants:
            variant.folder.mkdir()
            write_onnx(unet, contract, variant.onnx, wide_levels=variant.levels, console=Console())
        with ThreadPoolExecutor(len(variants)) as pool:  # each builds in a process of its own
            built = list(pool.map(lambda variant: build(variant, contract, args), variants))
        feeds = feeds_of(contract, sizes, device)
        half = outputs_of(unet.to(device), torch.float16, feeds)
        expected = outputs_of(unet, torch.float32, feeds)
        unet.to("cpu")
        floor = errors(half, expected)
        state = {"backend": args.backend, "feeds": feeds, "expected": expected, "floor": floor, "repeats": args.repeats}
        rows = [row_of(variant, contract, one, state) for variant, one in zip(variants, built, strict=True)]
    return {"model": args.model, "sizes": str(sizes), "timesteps": TIMESTEPS, "pytorch_fp16": floor, "rows": rows}


class Convolution(torch.nn.Module):
    """One 3x3 convolution with the inputs and output of an engine."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """sample [2,C,S,S] → out_sample [2,C',S,S]."""
        result: torch.Tensor = self.layer(sample)
        return result


def measure_convolution(channels: int, out_channels: int, side: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row of `convolutions`: default initialisation, noise as input, fp16 weights and input."""
    torch.manual_seed(0)
    device = device_of(args.backend)
    module = Convolution(channels, out_channels).half()
    sample = torch.randn(2, channels, side, side).half()
    contract = Contract(
        "unet",
        "fp16",
        (TensorSpec("sample", "float16", (2, channels, side, side)),),
        (TensorSpec("out_sample", "float16", (2, out_channels, side, side)),),
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, torch.inference_mode():
        variant = Variant(0, Path(folder))
        names = {"input_names": ["sample"], "output_names": ["out_sample"]}
        torch.onnx.export(module, (sample,), str(variant.onnx), dynamo=False, opset_version=17, **names)
        build(variant, contract, args)
        given = sample.to(device)
        half = module.to(device)(given)
        expected = module.float()(given.float())
        with opened(variant, contract, args.backend) as session:
            output = session.run({"sample": given})["out_sample"]
            step = time_queued_calls(lambda: session.run({"sample": given}), args.repeats, device).scaled(1e6)
    return {
        "channels": channels,
        "out_channels": out_channels,
        "side": side,
        "relative_l2": errors([output], [expected])["relative_l2"][0],
        "pytorch_fp16_relative_l2": errors([half], [expected])["relative_l2"][0],
        "step_us": step.to_json(),
    }


def main() -> None:
    """Measure, and write the JSON; nothing is written if anything fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["levels", "convolutions"])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--levels", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--backend", choices=["tensorrt", "onnxruntime"], default="tensorrt")
    parser.add_argument("--optimization-level", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="where the graphs and engines lie meanwhile: gigabytes")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if args.what == "levels":
        figures = measure_levels(args)
    else:
        figures = {"rows": [measure_convolution(*sizes, args) for sizes in CHANNELS]}
    command = shlex.join(["python", *sys.argv])
    report = {"command": command, "host": host.facts(), "versions": host.library_versions(), **figures}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

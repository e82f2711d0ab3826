"""SDXL's VAE in fp16, whose activations leave fp16, beside fp32: time, memory and error of each half.

    python benchmarks/sdxl_vae.py --output benchmarks/sdxl-vae-h200.json [--size 1024] [--engine-dir ENGINES]

The VAE has SDXL's architecture and random weights; what is added to its residual stream is multiplied by `--gain`, so
that the stream leaves fp16 (65504) as that of a trained one does, and further. `stream_max` is how far it goes in fp32.
Rows are PyTorch's own VAE, channels last, in fp32 (as it is, and without TF32), bf16 and fp16, and this project's
engines of it in fp32 and fp16. The reference is the VAE in fp32 without TF32, with the weights rounded to fp16. `ms` is
a call's median; memory grows from before the weights are there. Engines are built where the directory has none. The
exit code is 1 where an fp16 engine is not finite, or is below four nines. `--small` is for a try on a CPU.
"""

from __future__ import annotations

import sdtrt  # noqa: F401  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import argparse
import copy
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D

from sdtrt.backends import registry
from sdtrt.backends.build import build_engine
from sdtrt.backends.checking import compare
from sdtrt.backends.open import open_session
from sdtrt.common import host
from sdtrt.common.console import Console
from sdtrt.engines.directory import EngineDirectory
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.tracing import reference
from sdtrt.models.components import VAE_HALVES, profile_of
from sdtrt.models.live import LiveModel, component_tensors
from sdtrt.reports.bench_parts import time_component
from sdtrt.reports.meters import MemoryMeter, release_memory, tf32
from sdtrt.specs import BuildSpec, Component, ExportSpec, ModelSpec, Precision, Profile, Sizes
from sdtrt.specs.contract import vae_contract

FOUR_NINES = 0.9999
STREAM_ENDS = ("conv_in", "conv2", "to_out.0")  # what gives that which is added to the residual stream
Tensors = dict[str, torch.Tensor]
Call = Callable[[], torch.Tensor]


def make_vae(gain: float, *, small: bool) -> AutoencoderKL:
    """SDXL's architecture, 84 M parameters, with random weights that fp16 has; a small one for a try."""
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "layers_per_block": 1}
    large = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    scaling = {"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True, "sample_size": 1024}
    vae = AutoencoderKL(**(sizes if small else large), **blocks, **scaling).eval().requires_grad_(False)
    for name, module in vae.named_modules():
        if name.endswith(STREAM_ENDS):
            for parameter in module.parameters():
                parameter.mul_(gain)
    rounded: AutoencoderKL = vae.half().float()
    return rounded


@contextmanager
def watched_stream(vae: AutoencoderKL) -> Iterator[list[float]]:
    """Collect how large the residual stream is, at its largest, after each block."""
    found: list[float] = []
    hooks = [
        block.register_forward_hook(lambda _block, _inputs, result: found.append(float(result.abs().max())))
        for block in vae.modules()
        if isinstance(block, ResnetBlock2D)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def measure(call: Call, wanted: torch.Tensor, device: torch.device, meter: MemoryMeter) -> dict[str, Any]:
    """Time, memory and error of a call."""
    with torch.inference_mode(), meter.watching():
        found = call().float().cpu()
    timing = time_component(call, device)
    figures = compare({"it": found}, {"it": wanted}) if bool(found.isfinite().all()) else {"finite": False}
    memory = {"peak_bytes": meter.peak_bytes}
    return {"ms": round(1000 * timing.median, 3), "samples": len(timing.samples), **memory, **figures}


def of_pytorch(
    vae: AutoencoderKL, component: Component, precision: Precision, feed: torch.Tensor, wanted: torch.Tensor
) -> dict[str, Any]:
    """PyTorch's own VAE, not compiled."""
    contract = vae_contract(dict(vae.config), precision, component)
    dtype, device = getattr(torch, contract.outputs[0].dtype), feed.device
    meter = MemoryMeter(device)
    own: Any = copy.deepcopy(vae)
    torch.nn.Module.to(own, device, dtype).to(memory_format=torch.channels_last)  # diffusers' own warns of fp16
    given, compute = feed.to(dtype), reference(own, contract)
    return measure(lambda: compute(given), wanted, device, meter)  # type: ignore[arg-type,return-value]


def of_engine(
    vae: AutoencoderKL, spec: BuildSpec, feed: torch.Tensor, wanted: torch.Tensor, directory: EngineDirectory
) -> dict[str, Any]:
    """This project's engine, built where it is missing."""
    model = LiveModel(spec.export.model, {"vae": vae})
    entry = build_engine(model, spec, directory, Console())
    release_memory(feed.device)
    meter = MemoryMeter(feed.device)
    with open_session(entry, feed.device, None) as session:
        tensors = component_tensors(vae, spec.export.component)
        session.follow(tensors)  # type: ignore[attr-defined]  # of an engine without weights
        (taken,) = session.inputs
        given = feed.to(getattr(torch, taken.dtype))

        def call() -> torch.Tensor:
            (result,) = session.run({taken.name: given}).values()
            return result

        built = {name: entry.info[name] for name in ("seconds", "parity", "step_ms", "plan_bytes")}
        scratch = {"scratch_bytes": entry.info.get("scratch_bytes")}
        return measure(call, wanted, feed.device, meter) | {"built": built | scratch}


def half(
    vae: AutoencoderKL, component: Component, size: int, directory: EngineDirectory, device: torch.device
) -> dict[str, Any]:
    """All rows of one half."""
    contract = vae_contract(dict(vae.config), "fp32", component)
    sizes = Sizes(1, size, size)
    (feed,) = (tensor.half().float().to(device) for tensor in seeded_feeds(contract, sizes).values())
    with tf32(False), torch.inference_mode(), watched_stream(vae.to(device)) as stream:
        wanted = reference(vae, contract)(feed).cpu()  # type: ignore[union-attr]  # a VAE's half has one output
    vae.cpu()
    release_memory(device)
    rows: dict[str, Any] = {}
    with tf32(False):
        rows["pytorch fp32, no TF32"] = of_pytorch(vae, component, "fp32", feed, wanted)
    precisions: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
    for precision in precisions:
        rows[f"pytorch {precision}"] = of_pytorch(vae, component, precision, feed, wanted)
        release_memory(device)
    profile = profile_of(component, Profile.of(Sizes(2, size, size)))
    for precision in ("fp32", "fp16"):
        spec = BuildSpec(ExportSpec(ModelSpec("sdxl-vae"), component, precision), "inductor", (profile,))
        rows[f"inductor {precision}"] = of_engine(vae, spec, feed, wanted, directory)
        release_memory(device)
    return {"size": size, "stream_max": max(stream), "rows": rows}


def main() -> None:
    """Measure both halves, and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--engine-dir", type=Path, default=Path("engines"))
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--gain", type=float, default=1e5)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    device, vae = torch.device(registry.get("inductor").device()), make_vae(args.gain, small=args.small)
    report = {"command": shlex.join(["python", *sys.argv]), "host": host.facts(), "versions": host.library_versions()}
    halves: dict[str, Any] = {}
    sound = True
    for component in VAE_HALVES:
        halves[component] = half(vae, component, args.size, EngineDirectory(args.engine_dir), device)
        sound &= halves[component]["rows"]["inductor fp16"].get("cosine", 0.0) >= FOUR_NINES
        args.output.write_text(json.dumps(report | {"gain": args.gain, "halves": halves}, indent=1) + "\n")
        for name, row in halves[component]["rows"].items():
            print(component, name, {key: value for key, value in row.items() if key != "built"})
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()

"""What stays fp32 in an fp16 UNet, and what that costs: the ablation behind `fp16_recipe.WIDE_LAYERS`.

    python scripts/make_random_model.py sd15
    python benchmarks/fidelity.py layers --model sd15 --variants 0 2 5-native --output benchmarks/fidelity/layers.json
    python benchmarks/fidelity.py convolutions --output benchmarks/fidelity/convolutions.json
    python benchmarks/fidelity.py noise --model sd15 --height 128 --width 128 --output benchmarks/fidelity/noise.json

`layers` exports the UNet once for each number of layers whose convolutions compute in fp32, builds all of them side by
side (`--backend tensorrt`, or `onnxruntime` without a GPU), and holds each against PyTorch in fp32 (TF32 off), with
PyTorch's own fp16 beside it: relative L2 error and cosine at timesteps over the whole range, the time of a step, and
the GPU time of each kernel in it (PyTorch's profiler). `-native` is without TensorRT 8.6's plugin for group
normalisation; `-whole` leaves no self-attention to PyTorch, and `-1024` those over 1024 tokens and more; `-last` has
what the engine's pieces give to each other lie channels last. `convolutions` does so for single 3x3 convolutions of
Stable Diffusion's widths, where the builder may choose. `noise` needs no GPU: it adds noise of the size of fp16's
additions to one convolution at a time of an fp32 UNet, and tells what of it arrives at the output; the same for all
convolutions, matrix products and self-attentions of a resolution together (as many tokens as in an image of the model's
own size, whatever the size that is computed).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from sdtrt.backends import registry
from sdtrt.backends.onnxruntime.build import optimize
from sdtrt.backends.onnxruntime.session import OnnxRuntimeSession
from sdtrt.backends.session import Session
from sdtrt.backends.tensorrt86 import precision
from sdtrt.backends.tensorrt86.build import build_plan
from sdtrt.common import host
from sdtrt.common.console import Console
from sdtrt.common.metrics import cosine, relative_l2
from sdtrt.engines import keys
from sdtrt.exports import fp16_recipe
from sdtrt.exports.component import write_onnx
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.fp16_recipe import wide_convolutions
from sdtrt.exports.tracing import UNetCall
from sdtrt.models.loading import load_unet
from sdtrt.models.resolve import resolve_model
from sdtrt.reports.meters import time_queued_calls
from sdtrt.specs import AUTO, BackendName, BuildSpec, ExportSpec, ModelSpec, Profile, Sizes
from sdtrt.specs.contract import Contract, TensorSpec, unet_contract

TIMESTEPS = (981.0, 701.0, 421.0, 141.0, 1.0)
# What a 3x3 convolution of 1280 channels loses by adding up in fp16 (measured, `convolutions`). It grows with the
# square root of the number of additions.
MEASURED_NOISE, MEASURED_ADDITIONS = 0.0038, 9 * 1280
MAX_LAYERS = 8
CHANNELS = ((320, 320, 64), (640, 640, 32), (1280, 1280, 16), (2560, 1280, 8))  # in, out, side in latents
Feeds = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """One engine: its folder, its fp32 layers, whether norms are by the plugin, from how many tokens on self-attentions
    are PyTorch's (None for the product's own choice), and whether its pieces give each other channels last.
    """

    folder: Path
    layers: int
    plugins: bool
    split: int | None
    channels_last: bool

    @classmethod
    def of(cls, name: str, folder: Path) -> Variant:
        """`5`, `5-native`, `5-whole`, `5-1024` or `5-last`."""
        layers, *words = name.split("-")
        tokens = next((int(word) for word in words if word.isdecimal()), None)
        split = 0 if "whole" in words else tokens
        return cls(folder / name, int(layers), "native" not in words, split, "last" in words)

    @property
    def onnx(self) -> Path:
        """Its graph."""
        return self.folder / "model.onnx"

    @property
    def facts(self) -> Path:
        """What the build measured, for a later run with the same folder."""
        return self.folder / "build.json"


def device_of(backend: BackendName) -> torch.device:
    """Where a backend runs."""
    return torch.device("cpu" if backend == "onnxruntime" else "cuda")


def build(variant: Variant, contract: Contract, args: argparse.Namespace) -> dict[str, Any]:
    """Build a variant's engine; what the build measured, or why there is none."""
    console = Console()
    if args.backend == "onnxruntime":
        return optimize(variant.onnx, variant.folder, contract, console)
    profiles = (Profile.of(Sizes(2, args.height, args.width)),)
    export = ExportSpec(ModelSpec("ablation"))
    spec = BuildSpec(
        export,
        args.backend,
        profiles,
        args.optimization_level,
        norm_plugins=variant.plugins,
        split_attention=variant.split,
        channels_last=variant.channels_last,
    )
    return build_plan(variant.onnx, variant.folder, contract, spec, timing_cache=None, console=console)


@contextmanager
def opened(variant: Variant, contract: Contract, backend: BackendName) -> Iterator[Session[torch.Tensor]]:
    """A variant's engine, running."""
    if backend == "onnxruntime":
        with OnnxRuntimeSession(variant.folder / "engine.onnx", contract) as session:
            yield session
        return
    from sdtrt.backends.tensorrt86.session import open_plans

    plan = variant.folder / "engine.plan"
    with open_plans(plan, contract, backend=backend, device=device_of(backend)) as on_gpu:
        yield on_gpu


def feeds_of(
    contract: Contract, sizes: Sizes, device: torch.device, timesteps: Sequence[float] = TIMESTEPS
) -> list[Feeds]:
    """Inputs at timesteps over the whole range, other noise for each."""
    made = []
    for number, timestep in enumerate(timesteps):
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


def kernels(call: Callable[[], Any], repeats: int = 10) -> list[dict[str, Any]]:
    """The GPU's work in one call, longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    found = [event for event in profile.key_averages() if event.self_device_time_total]
    rows = [
        {"kernel": one.key, "launches": one.count / repeats, "us": one.self_device_time_total / repeats}
        for one in found
    ]
    return sorted(rows, key=lambda row: -row["us"])


def check_folder(folder: Path) -> None:
    """Refuse a folder with engines that another sdtrt has built: of the same name, they would be taken for today's."""
    file, formats = (
        folder / "formats.json",
        {"export": keys.FORMAT, "build": {one.name: one.format for one in registry.candidates(AUTO) if one.source}},
    )
    known = json.loads(file.read_text()) if file.exists() else None
    if known != formats and (known is not None or any(folder.glob("*/build.json"))):
        sys.exit(f"{folder} has engines of another sdtrt: name another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(formats))


def prepare(variants: Sequence[Variant], unet: torch.nn.Module, contract: Contract, args: argparse.Namespace) -> None:
    """Export and build those variants that no earlier run with the same folder has left there."""
    missing = [variant for variant in variants if not variant.facts.exists()]
    for variant in missing:
        variant.folder.mkdir(exist_ok=True)
        write_onnx(unet, contract, variant.onnx, wide_layers=variant.layers, console=Console())

    def make(variant: Variant) -> None:
        operators = len(precision.float32_nodes(variant.onnx))
        variant.facts.write_text(json.dumps(build(variant, contract, args) | {"fp32_operators": operators}))

    with ThreadPoolExecutor(max(len(missing), 1)) as pool:  # each builds in a process of its own
        list(pool.map(make, missing))


def row_of(variant: Variant, contract: Contract, state: Mapping[str, Any]) -> dict[str, Any]:
    """Run one variant."""
    backend, feeds, built = state["backend"], state["feeds"], json.loads(variant.facts.read_text())
    with opened(variant, contract, backend) as session:
        outputs = [session.run(one)[contract.outputs[0].name] for one in feeds]
        for _ in range(5):
            session.run(feeds[0])
        step = time_queued_calls(lambda: session.run(feeds[0]), state["repeats"], device_of(backend)).scaled(1000)
        work = [] if backend == "onnxruntime" else kernels(lambda: session.run(feeds[0]))
    found = errors(outputs, state["expected"])
    ratios = [mine / own for mine, own in zip(found["relative_l2"], state["floor"]["relative_l2"], strict=True)]
    return {
        "layers": variant.layers,
        "norm_plugins": variant.plugins,
        "split_attention": variant.split,
        "channels_last": variant.channels_last,
        "fp32_operators": built.get("fp32_operators"),
        **found,
        "worst_ratio_to_pytorch_fp16": max(ratios),
        "step_ms": step.to_json(),
        "build": {key: built[key] for key in ("build_seconds", "plan_bytes", "pieces", "precision") if key in built},
        "kernels": work,
    }


def measure_layers(args: argparse.Namespace) -> dict[str, Any]:
    """The rows of `layers`."""
    model = resolve_model(ModelSpec(args.model))
    unet = load_unet(model, torch.float16)
    contract = unet_contract(model.config("unet"), "fp16")
    device, sizes = device_of(args.backend), Sizes(2, args.height, args.width)
    variants = [Variant.of(name, args.folder) for name in args.variants]
    check_folder(args.folder)
    prepare(variants, unet, contract, args)
    if args.build_only:
        return {}
    feeds = feeds_of(contract, sizes, device)
    half = outputs_of(unet.to(device), torch.float16, feeds)
    expected = outputs_of(unet, torch.float32, feeds)
    unet.to("cpu")
    floor = errors(half, expected)
    state = {"backend": args.backend, "feeds": feeds, "expected": expected, "floor": floor, "repeats": args.repeats}
    rows = [row_of(variant, contract, state) for variant in variants]
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
        variant = Variant(Path(folder), layers=0, plugins=False, split=0, channels_last=False)
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


def additions(module: torch.nn.Conv2d | torch.nn.Linear) -> int:
    """How many products a result is the sum of."""
    if isinstance(module, torch.nn.Linear):
        return module.in_features
    return module.weight[0].numel()


def noisy(tensor: torch.Tensor, additions: int) -> torch.Tensor:
    """A result with the noise of so many additions in fp16."""
    share = MEASURED_NOISE * (additions / MEASURED_ADDITIONS) ** 0.5
    result: torch.Tensor = tensor + share * tensor.std() * torch.randn_like(tensor)
    return result


@contextmanager
def noise_in(modules: Iterable[torch.nn.Conv2d | torch.nn.Linear]) -> Iterator[None]:
    """Convolutions and matrix products that add up in fp16, for the time of a `with`."""
    torch.manual_seed(1)
    with ExitStack() as stack:
        for module in modules:

            def add(made_by: torch.nn.Module, given: Any, made: torch.Tensor, count: int = additions(module)) -> Any:
                return noisy(made, count)

            stack.callback(module.register_forward_hook(add).remove)
        yield


@contextmanager
def noise_in_attention(unet: torch.nn.Module, tokens: Mapping[str, int]) -> Iterator[None]:
    """Self-attention that adds up in fp16 over so many tokens (by the start of its name), for the time of a `with`."""
    torch.manual_seed(1)
    with ExitStack() as stack:
        for name, module in unet.named_modules():
            count = next((tokens[start] for start in tokens if name.startswith(start)), 0)
            if count and name.endswith("attn1.to_out.0"):  # what it takes is what attention gives

                def add(taken_by: torch.nn.Module, given: Any, count: int = count) -> Any:
                    return (noisy(given[0], count),)

                stack.callback(module.register_forward_pre_hook(add).remove)
        yield


def self_attention_tokens(unet: Any) -> list[dict[str, int]]:
    """For each resolution: start of a block's name → the tokens of an image of the model's own size."""
    last = len(unet.up_blocks) - 1
    return [
        {f"{side}_blocks.{index}.": unet.config.sample_size**2 // 4**level for side, index in both}
        for level in range(last + 1)
        for both in [(("down", level), ("up", last - level))]
    ]


def measure_noise(args: argparse.Namespace) -> dict[str, Any]:
    """The report of `noise`; on the CPU, with the latents of one image."""
    model = resolve_model(ModelSpec(args.model))
    unet = load_unet(model, torch.float32)
    contract = unet_contract(model.config("unet"), "fp32")
    feeds = seeded_feeds(contract, Sizes(1, args.height, args.width))
    feeds["timestep"] = torch.full_like(feeds["timestep"], 421.0)
    convolutions = {name: part for name, part in unet.named_modules() if isinstance(part, torch.nn.Conv2d)}
    unet.half()
    default = wide_convolutions(unet)
    with patch.object(fp16_recipe, "NARROW_CHANNELS", 0):  # what layers do by themselves
        wide = [wide_convolutions(unet, layers) for layers in range(MAX_LAYERS + 1)]
    unet.float()  # the weights stay rounded, as an fp16 engine has them
    products = [part for part in unet.modules() if isinstance(part, torch.nn.Linear)]
    with torch.inference_mode():
        expected = UNetCall(unet)(*feeds.values())

        def error_of(noise: AbstractContextManager[None]) -> float:
            with noise:
                return errors([UNetCall(unet)(*feeds.values())], [expected])["relative_l2"][0]

        found = {name: error_of(noise_in([part])) for name, part in convolutions.items()}
        left_over = [part for name, part in convolutions.items() if name not in default]
        together = {
            "convolutions": error_of(noise_in(convolutions.values())),
            "convolutions that are fp16 by default": error_of(noise_in(left_over)),
            "matrix products": error_of(noise_in(products)),
        }
        for tokens in self_attention_tokens(unet):
            name = f"self-attention over {max(tokens.values())} tokens"
            together[name] = error_of(noise_in_attention(unet, tokens))
    total = sum(error**2 for error in found.values())
    return {
        "model": args.model,
        "size": f"{args.width}x{args.height}",
        "share_left_by_layers": [1 - sum(found[name] ** 2 for name in names) / total for names in wide],
        "together": together,
        "rows": noise_rows(found, convolutions, default),
    }


def noise_rows(
    found: Mapping[str, float], convolutions: Mapping[str, torch.nn.Conv2d], default: Collection[str]
) -> list[dict[str, Any]]:
    """What noise in each convolution gives at the output, the largest part of the error first."""
    total = sum(error**2 for error in found.values())
    return [
        {
            "convolution": name,
            "kernel": convolutions[name].kernel_size[0],
            "additions": additions(convolutions[name]),
            "relative_l2": error,
            "share": error**2 / total,
            "fp32_by_default": name in default,
        }
        for name, error in sorted(found.items(), key=lambda item: -item[1])
    ]


def measure_convolutions(args: argparse.Namespace) -> dict[str, Any]:
    """The rows of `convolutions`."""
    return {"rows": [measure_convolution(*sizes, args) for sizes in CHANNELS]}


MEASURES = {"layers": measure_layers, "convolutions": measure_convolutions, "noise": measure_noise}


def main() -> None:
    """Measure, and write the JSON; nothing is written if anything fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(MEASURES))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--variants", nargs="+", default=["0", "2", "5"], metavar="N[-native][-whole|-TOKENS][-last]")
    parser.add_argument("--build-only", action="store_true", help="measure in a later run with the same --folder")
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--backend", choices=["tensorrt", "onnxruntime"], default="tensorrt")
    parser.add_argument("--optimization-level", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="where the graphs and engines lie: gigabytes; kept if it is named")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        args.folder.mkdir(parents=True, exist_ok=True)
        figures = MEASURES[args.what](args)
    if not figures:
        return
    command = shlex.join(["python", *sys.argv])
    report = {"command": command, "host": host.facts(), "versions": host.library_versions(), **figures}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

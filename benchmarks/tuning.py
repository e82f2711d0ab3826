"""What else was tried to make an engine of the UNet faster: one choice at a time, on its largest resolution.

    python benchmarks/tuning.py --folder /tmp/tuning --variants product level-2 fused-qkv --output tuning.json

The module is Stable Diffusion 1.5's UNet cut down to its two upper levels, attention on the first only, with random
weights: 64x64 latents, batch 2. That is where most of a step's time goes, and it builds in two minutes, not seven.
Variants are built two at a time and then run one after the other: error against PyTorch in fp32, milliseconds from a
CUDA graph, and the GPU time of each kernel (PyTorch's profiler). Results and what follows from them: `tuning.md`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from fidelity import check_folder, errors, feeds_of, kernels
from torch import Tensor, nn

from sdtrt import host
from sdtrt.build.tensorrt import build_plan
from sdtrt.components import Contract, unet_contract
from sdtrt.console import Console
from sdtrt.export import write_onnx
from sdtrt.meters import time_queued_calls
from sdtrt.runtime.tensorrt import TensorRTSession
from sdtrt.specs import BuildSpec, ExportSpec, ModelSpec, Profile, Range, Sizes
from sdtrt.tracing import WIDE_LAYERS, UNetCall

SIZES = Sizes(2, 512, 512)
TIMESTEPS = (981.0, 421.0, 1.0)
CUDA = torch.device("cuda")
PADDED_HEAD = 64  # the width that fused attention kernels like best; Stable Diffusion 1.5's is 40 here


@dataclass(frozen=True)
class Choice:
    """One variant.

    Args:
        layers: how many layers have fp32 convolutions (`tracing.wide_convolutions`).
        level: TensorRT's optimization level.
        plugins: group normalisation by 8.6's plugin.
        change: what is done to the module before its export.
        dynamic: a profile of batch 1 to 4 and 256 to 768 pixels instead of one size.
        split: from how many tokens on self-attentions are PyTorch's, 0 for none; None for the product's choice.
    """

    layers: int = WIDE_LAYERS
    level: int = 1
    plugins: bool = True
    change: Callable[[nn.Module], None] | None = None
    dynamic: bool = False
    split: int | None = None


def attend(module: nn.Module, processor: Callable[[Attention], Any]) -> None:
    """Give every attention another processor."""
    for part in list(module.modules()):
        if isinstance(part, Attention):
            part.processor = processor(part)


def split_heads(states: Tensor, heads: int) -> Tensor:
    """[B,S,C] → [B,heads,S,C/heads]."""
    return states.view(states.shape[0], -1, heads, states.shape[2] // heads).transpose(1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[B,heads,S,D] each → [B,S,heads*D]; the queries alone are scaled."""
    states = ((query * scale) @ key.transpose(-1, -2)).softmax(-1) @ value
    return states.transpose(1, 2).reshape(states.shape[0], -1, states.shape[1] * states.shape[3])


class ScaledQueries:
    """Scales the queries only, where PyTorch's export scales queries and keys by the root."""

    def __init__(self, module: Attention) -> None:
        self.heads, self.scale = module.heads, module.scale

    def __call__(self, module: Any, states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        """hidden_states [B,S,C] → the same."""
        query, key, value = self.project(
            module, states, states if encoder_hidden_states is None else encoder_hidden_states
        )
        output: Tensor = module.to_out[0](attention(query, key, value, self.scale))
        return output

    def project(self, module: Any, states: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, by heads."""
        pairs = ((module.to_q, states), (module.to_k, context), (module.to_v, context))
        return tuple(split_heads(projection(given), self.heads) for projection, given in pairs)


class FusedProjections(ScaledQueries):
    """One product for queries, keys and values (keys and values, where the context is the text)."""

    def __init__(self, module: Attention) -> None:
        super().__init__(module)
        self.own = module.to_k.in_features == module.to_q.in_features
        parts = [module.to_q, module.to_k, module.to_v][0 if self.own else 1 :]
        module.fused = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts), bias=False).half()
        module.fused.weight.data = torch.cat([part.weight.data for part in parts])

    def project(self, module: Any, states: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, by heads."""
        made = module.fused(states if self.own else context).chunk(3 if self.own else 2, dim=-1)
        return tuple(split_heads(part, self.heads) for part in ((*made,) if self.own else (module.to_q(states), *made)))


class PaddedHeads(ScaledQueries):
    """Heads widened by zeros to a width that kernels like: more arithmetic, the same result."""

    def __init__(self, module: Attention) -> None:
        super().__init__(module)
        for name in ("to_q", "to_k", "to_v"):
            setattr(module, name, self._widened(getattr(module, name)))
        out = module.to_out[0]
        wide = nn.Linear(self.heads * PADDED_HEAD, out.out_features).half()
        columns = out.weight.data.view(out.out_features, self.heads, -1)
        wide.weight.data = nn.functional.pad(columns, (0, PADDED_HEAD - columns.shape[2])).reshape(out.out_features, -1)
        wide.bias.data = out.bias.data
        module.to_out[0] = wide

    def _widened(self, projection: nn.Linear) -> nn.Linear:
        rows = projection.weight.data.view(self.heads, -1, projection.in_features)
        wide = nn.Linear(projection.in_features, self.heads * PADDED_HEAD, bias=False).half()
        wide.weight.data = nn.functional.pad(rows, (0, 0, 0, PADDED_HEAD - rows.shape[1])).flatten(0, 1)
        return wide


def linear_projections(module: nn.Module) -> None:
    """The 1x1 convolutions around a transformer as matrix products, as Stable Diffusion 2 has them."""
    for part in list(module.modules()):
        if isinstance(part, Transformer2DModel) and not part.use_linear_projection:
            for name in ("proj_in", "proj_out"):
                convolution = getattr(part, name)
                linear = nn.Linear(convolution.in_channels, convolution.out_channels).half()
                linear.weight.data, linear.bias.data = (
                    convolution.weight.data[:, :, 0, 0].clone(),
                    convolution.bias.data,
                )
                setattr(part, name, linear)
            part.use_linear_projection = True


class SharedContext(ScaledQueries):
    """Cross-attention whose keys and values come from one product for all layers (`merge_context`)."""

    def __init__(self, module: Attention, made: list[Tensor]) -> None:
        super().__init__(module)
        self.made = made

    def project(self, module: Any, states: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, by heads."""
        key, value = self.made.pop(0), self.made.pop(0)
        return tuple(split_heads(part, self.heads) for part in (module.to_q(states), key, value))


def merge_context(module: nn.Module) -> None:
    """All keys and values of the text in one product at the start, instead of two small ones a layer."""
    layers = [part for name, part in module.named_modules() if name.endswith("attn2")]
    projections = [projection for part in layers for projection in (part.to_k, part.to_v)]
    widths = [projection.out_features for projection in projections]
    module.context = nn.Linear(projections[0].in_features, sum(widths), bias=False).half()
    module.context.weight.data = torch.cat([projection.weight.data for projection in projections])
    made: list[Tensor] = []

    def project(unet: nn.Module, given: Any, named: dict[str, Any]) -> None:
        context = named["encoder_hidden_states"] if "encoder_hidden_states" in named else given[2]
        made[:] = unet.context(context).split(widths, dim=-1)

    module.register_forward_pre_hook(project, with_kwargs=True)
    for part in layers:  # they run in the order in which they are registered, but of the middle, which is not there
        part.processor = SharedContext(part, made)


def one_pass_norms(module: nn.Module) -> None:
    """Group norms spelled out: mean and mean square of each channel in one pass, then of its group, all in fp32."""

    def forward(norm: nn.GroupNorm, states: Tensor) -> Tensor:
        batch, channels = states.shape[:2]
        wide, groups = states.float(), (batch, norm.num_groups, channels // norm.num_groups)
        mean = wide.mean((2, 3)).view(groups).mean(-1, keepdim=True)
        variance = (wide * wide).mean((2, 3)).view(groups).mean(-1, keepdim=True) - mean * mean
        scale = torch.rsqrt(variance + norm.eps) * norm.weight.float().view(groups[1:])
        shift = norm.bias.float().view(groups[1:]) - mean * scale
        return (wide * scale.reshape(batch, channels, 1, 1) + shift.reshape(batch, channels, 1, 1)).to(states.dtype)

    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            part.forward = forward.__get__(part)


PRODUCT = Choice()
VARIANTS: dict[str, Choice] = {
    "product": PRODUCT,
    "all-fp16": replace(PRODUCT, layers=0),
    "native-norms": replace(PRODUCT, plugins=False),
    "whole": replace(PRODUCT, split=0),
    "split-1024": replace(PRODUCT, split=1024),
    "one-pass-norms": replace(PRODUCT, plugins=False, change=one_pass_norms),
    "linear-projections": replace(PRODUCT, change=linear_projections),
    "scaled-queries": replace(PRODUCT, change=lambda module: attend(module, ScaledQueries)),
    "fused-qkv": replace(PRODUCT, change=lambda module: attend(module, FusedProjections)),
    "padded-heads": replace(PRODUCT, change=lambda module: attend(module, PaddedHeads)),
    "merged-context": replace(PRODUCT, change=merge_context),
    "dynamic": replace(PRODUCT, dynamic=True),
    **{f"level-{level}": replace(PRODUCT, level=level) for level in (0, 2, 3, 4, 5)},
}


def make_unet() -> UNet2DConditionModel:
    """The two upper levels of Stable Diffusion 1.5's UNet, seeded."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    return unet.half().eval()


def export(name: str, folder: Path) -> Contract:
    """Write a variant's ONNX into its folder."""
    unet, choice = make_unet(), VARIANTS[name]
    contract = unet_contract(dict(unet.config), "fp16")
    if choice.change is not None:
        choice.change(unet)
    folder.mkdir(parents=True, exist_ok=True)
    write_onnx(unet, contract, folder / "model.onnx", wide_layers=choice.layers, console=Console())
    return contract


def build(name: str, folder: Path, contract: Contract) -> None:
    """Build a variant's engine, unless it is there; what the build measured goes beside it."""
    facts, choice = folder / "build.json", VARIANTS[name]
    if facts.exists():
        return
    side = Range(256, 512, 768)
    profile = Profile(Range(1, 2, 4), side, side) if choice.dynamic else Profile.of(SIZES)
    spec = BuildSpec(
        ExportSpec(ModelSpec("tuning")),
        "tensorrt",
        (profile,),
        choice.level,
        norm_plugins=choice.plugins,
        split_attention=choice.split,
    )
    measured = build_plan(folder / "model.onnx", folder, contract, spec, timing_cache=None, console=Console())
    facts.write_text(json.dumps(measured))


def measure(name: str, folder: Path, contract: Contract, expected: list[Tensor], floor: list[float]) -> dict[str, Any]:
    """One row."""
    feeds = feeds_of(contract, SIZES, CUDA, TIMESTEPS)
    with TensorRTSession(folder / "engine.plan", contract, device=CUDA) as session:
        found = errors([session.run(one)["out_sample"] for one in feeds], expected)["relative_l2"]

        def call() -> Any:
            return session.run(feeds[0])

        for _ in range(5):
            call()
        samples = [time_queued_calls(call, 100, CUDA).scaled(1000).median for _ in range(3)]
        work = kernels(call)
    built = json.loads((folder / "build.json").read_text())
    return {
        "variant": name,
        "step_ms": samples,
        "relative_l2": found,
        "worst_ratio_to_pytorch_fp16": max(one / own for one, own in zip(found, floor, strict=True)),
        "build": {key: built[key] for key in ("build_seconds", "plan_bytes", "scratch_bytes", "precision")},
        "kernels": work,
    }


def main() -> None:
    """Build, measure, write the JSON; a variant that fails is a row with its error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--folder", type=Path, required=True, help="where graphs and engines go; kept")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    check_folder(args.folder)
    contracts = {name: export(name, args.folder / name) for name in args.variants}  # one by one: traces don't mix
    failures: dict[str, str] = {}

    def attempt(name: str) -> None:
        try:
            build(name, args.folder / name, contracts[name])
        except Exception as error:
            failures[name] = str(error)

    with ThreadPoolExecutor(2) as pool:  # each builds in a process of its own; more only wait for the GPU
        list(pool.map(attempt, args.variants))
    unet, feeds = make_unet().to(CUDA), feeds_of(contracts[args.variants[0]], SIZES, CUDA, TIMESTEPS)
    with torch.inference_mode():
        half = [UNetCall(unet)(*one.values()) for one in feeds]
        expected = [UNetCall(unet.float())(*(tensor.float() for tensor in one.values())) for one in feeds]
    floor = errors(half, expected)["relative_l2"]
    rows = [
        {"variant": name, "error": failures[name]}
        if name in failures
        else measure(name, args.folder / name, contracts[name], expected, floor)
        for name in args.variants
    ]
    command = shlex.join(["python", *sys.argv])
    report = {"command": command, "host": host.facts(), "versions": host.library_versions()}
    args.output.write_text(json.dumps(report | {"pytorch_fp16": floor, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

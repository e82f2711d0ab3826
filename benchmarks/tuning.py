"""What else was tried to make an engine of the UNet faster: one choice at a time, on its largest resolution.

    python benchmarks/tuning.py --folder /tmp/tuning --variants product level-2 fused-qkv --output tuning.json

The module is Stable Diffusion 1.5's UNet cut down to its two upper levels, attention on the first only, with random
weights: 64x64 latents, batch 2. That is where most of a step's time goes, and it builds in two to four minutes.
Variants are built a few at a time (`--builders`) and then run one after the other: error against PyTorch in fp32,
milliseconds from a CUDA graph, and the GPU time of each kernel (PyTorch's profiler). Results and what follows from
them: `tuning.md`.

Engines of several sizes are in one piece, and so are those whose attentions have a form that is not cut: `dynamic`,
`dynamic-width`, `two-profiles`, `dynamo` and `fused-qkv` are to be compared with `whole`, not with `product` (whose
pieces make queries, keys and values by one product anyway). Rows say in how many `pieces` they are.

A variant that can't be exported, built or run is a row with its error. What was built, and what failed in that, stays
in the folder: `--build-only` leaves the measuring to a later run, `--no-build` measures what is there, as where the
time for building is limited from outside. `--check` needs no GPU: it holds each export against PyTorch on the CPU, and
says what 8.6 would be given of it.
"""

from __future__ import annotations

import sdtrt  # noqa: F401  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from fidelity import check_folder, errors, feeds_of, kernels
from lowering import lower_opset
from torch import Tensor, nn

from sdtrt.backends.tensorrt86 import cut as cutting
from sdtrt.backends.tensorrt86 import norm_plugin, precision
from sdtrt.backends.tensorrt86.build import build_plan
from sdtrt.backends.tensorrt86.pieces import Piece
from sdtrt.backends.tensorrt86.policy import SPLIT_TOKENS
from sdtrt.backends.tensorrt86.session import open_plans
from sdtrt.common import host
from sdtrt.common.console import Console
from sdtrt.common.errors import SdtrtError
from sdtrt.exports import onnx_file
from sdtrt.exports.attention import find_attentions
from sdtrt.exports.component import write_onnx
from sdtrt.exports.fp16_recipe import WIDE_LAYERS
from sdtrt.exports.onnx_index import GraphIndex
from sdtrt.exports.parity import check_onnx
from sdtrt.exports.tracing import UNetCall
from sdtrt.reports.meters import time_queued_calls
from sdtrt.specs import DEFAULT_OPSETS, BuildSpec, Exporter, ExportSpec, ModelSpec, Profile, Range, Sizes
from sdtrt.specs.contract import CONDITIONING, Contract, unet_contract

SIZES = Sizes(2, 512, 512)
CHECKED_SIZES = (Sizes(2, 128, 128), Sizes(1, 64, 96))  # on the CPU
TIMESTEPS = (981.0, 421.0, 1.0)
CUDA = torch.device("cuda")
KEPT = ("build_seconds", "piece_seconds", "plan_bytes", "scratch_bytes", "precision", "pieces", "channels_last")
PADDED_HEAD = 64  # the width that fused attention kernels like best; Stable Diffusion 1.5's is 40 here


@dataclass(frozen=True)
class Choice:
    """One variant.

    Args:
        layers: how many layers have fp32 convolutions (`fp16_recipe.wide_convolutions`).
        level: TensorRT's optimization level.
        plugins: group normalisation by 8.6's plugin.
        change: what is done to the module before its export.
        profiles: the sizes that the engine accepts; with more than one it is in one piece.
        split: from how many tokens on self-attentions are PyTorch's, 0 for none; None for the product's choice.
        channels_last: what its pieces give to each other lies channels last.
        exporter, opset: that write the graph; None for the exporter's default. What the dynamo exporter writes is
            lowered to one that 8.6 reads (`lowering.py`).
    """

    layers: int = WIDE_LAYERS
    level: int = 1
    plugins: bool = True
    change: Callable[[nn.Module], None] | None = None
    profiles: tuple[Profile, ...] = (Profile.of(SIZES),)
    split: int | None = None
    channels_last: bool = False
    exporter: Exporter = "torchscript"
    opset: int | None = None


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


def merge_context(module: UNet2DConditionModel) -> None:
    """All keys and values of the text in one product at the start, instead of two small ones a layer."""
    layers = [part for name, part in module.named_modules() if name.endswith("attn2")]
    projections = [projection for part in layers for projection in (part.to_k, part.to_v)]
    widths = [projection.out_features for projection in projections]
    module.context = nn.Linear(projections[0].in_features, sum(widths), bias=False).half()
    module.context.weight.data = torch.cat([projection.weight.data for projection in projections])
    made: list[Tensor] = []

    def project(unet: UNet2DConditionModel, given: Any, named: dict[str, Any]) -> None:
        context = named["encoder_hidden_states"] if "encoder_hidden_states" in named else given[2]
        made[:] = unet.context(context).split(widths, dim=-1)

    module.register_forward_pre_hook(project, with_kwargs=True)
    for part in layers:  # they run in the order in which they are registered, but of the middle, which is not there
        part.processor = SharedContext(part, made)


class Given(nn.Module):
    """A projection that was made elsewhere: gives what lies next in a list."""

    def __init__(self, made: list[Tensor]) -> None:
        super().__init__()
        self.made = made

    def forward(self, _: Tensor) -> Tensor:
        """[B,T] → [B,C], what was made for this place."""
        return self.made.pop(0)


def merge_timestep(module: UNet2DConditionModel) -> None:
    """The timestep's projections of all resnets in one product, and its SiLU once, instead of one each a resnet."""
    resnets = [part for part in module.modules() if isinstance(part, ResnetBlock2D)]
    projections = [part.time_emb_proj for part in resnets]
    widths = [projection.out_features for projection in projections]
    merged = nn.Linear(projections[0].in_features, sum(widths)).half()
    merged.weight.data = torch.cat([projection.weight.data for projection in projections])
    merged.bias.data = torch.cat([projection.bias.data for projection in projections])
    made: list[Tensor] = []

    def project(embedding: Any, given: Any, output: Tensor) -> None:
        made[:] = embedding.projections(nn.functional.silu(output)).split(widths, dim=-1)

    module.time_embedding.projections = merged
    module.time_embedding.register_forward_hook(project)
    for part in resnets:  # they run in the order in which they are registered, but of the middle, which is not there
        part.time_emb_proj, part.skip_time_act = Given(made), True


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
            part.forward = forward.__get__(part)  # type: ignore[method-assign]


PRODUCT = Choice()
SIDE = Range(256, 512, 768)
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
    "merged-timestep": replace(PRODUCT, change=merge_timestep),
    "channels-last": replace(PRODUCT, channels_last=True),
    "dynamic": replace(PRODUCT, profiles=(Profile(Range(1, 2, 4), SIDE, SIDE),)),
    "dynamic-width": replace(PRODUCT, profiles=(Profile(Range.of(2), Range.of(512), Range(512, 512, 768)),)),
    "two-profiles": replace(PRODUCT, profiles=(Profile.of(SIZES), Profile.of(replace(SIZES, width=768)))),
    **{f"opset-{opset}": replace(PRODUCT, opset=opset) for opset in (14, 16)},
    "dynamo": replace(PRODUCT, exporter="dynamo"),
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


def export(name: str, folder: Path, contract: Contract) -> UNet2DConditionModel:
    """Write a variant's ONNX into its folder; returns what it is of."""
    unet, choice = make_unet(), VARIANTS[name]
    if choice.change is not None:
        choice.change(unet)
    folder.mkdir(parents=True, exist_ok=True)
    write_onnx(
        unet,
        contract,
        folder / "model.onnx",
        exporter=choice.exporter,
        opset=choice.opset or DEFAULT_OPSETS[choice.exporter],
        wide_layers=choice.layers,
        console=Console(),
    )
    if choice.exporter == "dynamo":
        lower_opset(folder / "model.onnx")
    return unet


def spec_of(name: str) -> BuildSpec:
    """The engine that a variant asks for."""
    choice = VARIANTS[name]
    return BuildSpec(
        ExportSpec(ModelSpec("tuning")),
        "tensorrt",
        choice.profiles,
        choice.level,
        norm_plugins=choice.plugins,
        split_attention=choice.split,
        channels_last=choice.channels_last,
    )


def facts_of(folder: Path) -> dict[str, Any] | None:
    """What is known of a variant's engine: what its build measured, or `error`; None before it."""
    file = folder / "build.json"
    return dict(json.loads(file.read_text())) if file.exists() else None


def words_of(error: Exception) -> str:
    """What a row says of a failure."""
    return f"{error.message}; {error.hint}" if isinstance(error, SdtrtError) else f"{type(error).__name__}: {error}"


@contextmanager
def noting_failure(name: str, folder: Path) -> Iterator[None]:
    """Have whatever fails of a variant's export or build stay with it in place of what a build measures."""
    try:
        yield
    except Exception as error:
        print(f"{name}: {words_of(error)}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.json").write_text(json.dumps({"error": words_of(error)}))


def build(name: str, folder: Path, contract: Contract) -> None:
    """Build a variant's engine; what the build measured goes beside it."""
    with noting_failure(name, folder):
        measured = build_plan(
            folder / "model.onnx", folder, contract, spec_of(name), timing_cache=None, console=Console()
        )
        (folder / "build.json").write_text(json.dumps(measured))


def build_all(names: Sequence[str], folder: Path, contract: Contract, builders: int) -> None:
    """Export one by one, for traces don't mix; build some at a time, each in processes of its own."""
    with ThreadPoolExecutor(builders) as pool:
        for name in names:
            if facts_of(folder / name) is None:
                with noting_failure(name, folder / name):
                    export(name, folder / name, contract)
                    pool.submit(build, name, folder / name, contract)


def measure(name: str, folder: Path, contract: Contract, expected: list[Tensor], floor: list[float]) -> dict[str, Any]:
    """One row."""
    built = facts_of(folder) or {"error": "not built"}
    if "error" in built:
        return {"variant": name, "error": built["error"]}
    try:
        return {
            "variant": name,
            **run(folder, contract, expected, floor),
            "build": {key: built[key] for key in KEPT if key in built},
        }
    except Exception as error:
        return {"variant": name, "error": words_of(error)}


def run(folder: Path, contract: Contract, expected: list[Tensor], floor: list[float]) -> dict[str, Any]:
    """A built engine's error, and its time as a whole and by kernels."""
    feeds = feeds_of(contract, SIZES, CUDA, TIMESTEPS)
    with open_plans(folder / "engine.plan", contract, device=CUDA) as session:
        found = errors([session.run(one)["out_sample"] for one in feeds], expected)["relative_l2"]

        def call() -> Any:
            return session.run(feeds[0])

        for _ in range(5):
            call()
        samples = [time_queued_calls(call, 100, CUDA).scaled(1000).median for _ in range(3)]
        work = kernels(call)
    return {
        "step_ms": samples,
        "relative_l2": found,
        "worst_ratio_to_pytorch_fp16": max(one / own for one, own in zip(found, floor, strict=True)),
        "kernels": work,
    }


def pytorch_outputs(contract: Contract) -> tuple[list[Tensor], list[float]]:
    """What PyTorch gives in fp32 for each timestep, and its own error in fp16."""
    unet, feeds = make_unet().to(CUDA), feeds_of(contract, SIZES, CUDA, TIMESTEPS)
    with torch.inference_mode():
        half = [UNetCall(unet)(*one.values()) for one in feeds]
        expected = [UNetCall(unet.float())(*(tensor.float() for tensor in one.values())) for one in feeds]
    return expected, errors(half, expected)["relative_l2"]


def check(name: str, folder: Path, contract: Contract) -> dict[str, Any]:
    """One row of `--check`: the export's error on the CPU, and what 8.6 would be given of it."""
    try:
        unet = export(name, folder, contract)
        parity = check_onnx(folder / "model.onnx", unet, contract, CHECKED_SIZES).worst
    except Exception as error:
        return {"variant": name, "error": words_of(error)}
    onnx = folder / "model.onnx"
    return {
        "variant": name,
        "relative_l2": parity.relative_l2,
        "cosine": parity.cosine,
        "fp32_operators": len(precision.float32_nodes(onnx)),
        "norms_by_plugin": norm_plugin.use_plugin(*onnx_file.load_split(onnx)) if VARIANTS[name].plugins else 0,
        **pieces_of(onnx, contract, VARIANTS[name]),
    }


def pieces_of(onnx: Path, contract: Contract, choice: Choice) -> dict[str, Any]:
    """How many pieces 8.6 would build of a graph, and how many tensors would lie channels last between them."""
    if choice.split == 0 or choice.profiles != PRODUCT.profiles:
        return {"pieces": 1}
    model, weights = onnx_file.load_split(onnx)
    cutting.freeze(model, weights, contract.input_shapes(SIZES))
    facts = GraphIndex(model, weights)
    cuts = cutting.choose(find_attentions(facts), choice.split or SPLIT_TOKENS)
    parts = cutting.split(model, weights, facts, cuts, CONDITIONING) if cuts else ()
    pieces = [Piece(onnx, replace(contract, inputs=one.inputs, outputs=one.outputs), one.cuts) for one in parts]
    last = {"channels_last": len(cutting.channels_last(pieces, contract))} if choice.channels_last else {}
    return {"pieces": max(1, len(pieces)), **last}


def main() -> None:
    """Build and measure, or check, and write the JSON anew with each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--folder", type=Path, required=True, help="where graphs and engines go; kept")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--builders", type=int, default=2, help="how many engines are built at a time (2)")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--build-only", action="store_true", help="measure in a later run with the same --folder")
    modes.add_argument(
        "--no-build", action="store_true", help="measure what is there; what is not is a row that says so"
    )
    modes.add_argument(
        "--check", action="store_true", help="hold the exports against PyTorch on the CPU, and build none"
    )
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    check_folder(args.folder)
    contract = unet_contract(dict(make_unet().config), "fp16")
    if not (args.check or args.no_build):
        build_all(args.variants, args.folder, contract, args.builders)
    if args.build_only:
        return
    command = shlex.join(["python", *sys.argv])
    facts: dict[str, Any] = {"command": command, "host": host.facts(), "versions": host.library_versions()}
    if args.check:
        rows = (check(name, args.folder / name, contract) for name in args.variants)
    else:
        expected, floor = pytorch_outputs(contract)
        facts["pytorch_fp16"] = floor
        rows = (measure(name, args.folder / name, contract, expected, floor) for name in args.variants)
    done: list[dict[str, Any]] = []
    for row in rows:
        done.append(row)
        args.output.write_text(json.dumps({**facts, "rows": done}, indent=1) + "\n")


if __name__ == "__main__":
    main()

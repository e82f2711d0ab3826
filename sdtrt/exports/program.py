"""Component → exported program, which PyTorch's own compilers start from. Its inputs and outputs are the contract's.

Knows diffusers' and transformers' modules. Knows no compiler, and not where programs are kept or weights come from.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor
from torch.export.graph_signature import InputKind

from sdtrt.common.errors import ExportError
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.quantised import SCALES, layers_to_quantise, quantise
from sdtrt.exports.scaled_vae import scaled_stream
from sdtrt.exports.split_norms import split_norms
from sdtrt.exports.tracing import component_call, traceable
from sdtrt.models.components import STEPPING
from sdtrt.models.image_prompts import is_image_prompt
from sdtrt.specs import Component, Profile, Sizes
from sdtrt.specs.contract import IMAGE_HEIGHT, IMAGE_WIDTH, LATENT_HEIGHT, LATENT_WIDTH, Contract, dimension_values

# Of a fused projection: the projections that it is joined from, in their order.
_FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}
_SIDES = {IMAGE_HEIGHT: LATENT_HEIGHT, IMAGE_WIDTH: LATENT_WIDTH}


@dataclass(frozen=True)
class Recipe:
    """How a component is exported: how its weights are laid out before that, and what it computes with.

    Args:
        fused_projections: one product gives an attention's queries, keys and values (keys and values alone, where they
            are of another tensor than the queries).
        channels_last: the weights of convolutions lie channels last in memory, and so do their results.
        split_norms: statistics of group norms are taken in two stages (`split_norms`).
        stream_scale: what the residual stream of half an `AutoencoderKL` is divided by (`scaled_vae`); 1 for nothing.
        quantised: what linear layers of transformers compute in, `int8` or `fp8` (`quantised`); empty for what the rest
            computes in.
        kept: patterns of the names of those that don't.
    """

    fused_projections: bool = True
    channels_last: bool = True
    split_norms: bool = False
    stream_scale: int = 1
    quantised: str = ""
    kept: Sequence[str] = ()


@dataclass(frozen=True)
class Program:
    """An exported component.

    Args:
        exported: takes the contract's inputs in their order, and gives its outputs in theirs.
        sources: by the name of each weight in the program: the tensors of the model's part that it is joined from along
            its first axis, by their own names (`tensor_names`).
        fixed: what is no weight of the model but belongs to the program, by name: a causal mask.
        rows, scales: names of those weights that are a weight's rows in 8 bits, and of those that are the rows' scales
            (`quantised_rows`).
    """

    exported: torch.export.ExportedProgram
    sources: Mapping[str, tuple[str, ...]]
    fixed: Mapping[str, Tensor]
    rows: frozenset[str] = frozenset()
    scales: frozenset[str] = frozenset()

    @property
    def weights(self) -> dict[str, Tensor]:
        """The tensor of each weight, in the layout that the program was exported with."""
        return {name: self.exported.state_dict[name].detach() for name in self.sources}


def export_program(
    module: torch.nn.Module,
    contract: Contract,
    profile: Profile,
    *,
    device: torch.device,
    recipe: Recipe | None = None,
) -> Program:
    """Export a component for one size, or for ranges of sizes.

    Args:
        module: the part of the model that the component is of, in the contract's precision. It is changed for good: it
            moves to the device, and its weights are laid out as the recipe says.
        profile: the sizes that the program takes. A dimension whose bounds are equal is a constant of the program.

    Raises:
        ExportError: where PyTorch can't export it, or not for these ranges, or the recipe is not for it.
    """
    recipe = recipe or Recipe()
    torch.nn.Module.to(module, device)  # diffusers' own `to` warns
    if recipe.fused_projections:
        fuse_projections(module)
    if recipe.channels_last:
        _lay_channels_last(module)
    if recipe.quantised:
        quantise(module, layers_to_quantise(module, recipe.kept), recipe.quantised)
    call = component_call(module, contract).eval().requires_grad_(False)
    _move_loose_tensors(call, device)
    with ExitStack() as stack:
        if recipe.stream_scale != 1 and isinstance(module, AutoencoderKL):
            half = getattr(module, contract.component.removeprefix("vae_"))
            stack.enter_context(scaled_stream(half, recipe.stream_scale))
        if recipe.split_norms:
            stack.enter_context(split_norms(module))
        exported = _export(call, module, contract, profile, device)
    _keep_names(exported)
    scales = frozenset(name for name in exported.state_dict if name.endswith(f".weight{SCALES}"))
    sources = {
        name: _sources(contract.component, name.removesuffix(SCALES) if name in scales else name)
        for name in exported.state_dict
    }
    rows = frozenset(name.removesuffix(SCALES) for name in scales)
    return Program(exported, sources, _fixed(exported), rows, scales)


def fuse_projections(module: torch.nn.Module) -> None:
    """Join the projections of each attention, and drop what they were joined from.

    diffusers' own `fuse_qkv_projections` leaves the originals beside the joined ones, as weights that nothing uses.
    """
    for attention in module.modules():
        if isinstance(attention, Attention) and _may_fuse(attention):
            attention.fuse_projections()
            if not is_image_prompt(attention.processor):  # whose stand-in takes fused ones, too
                attention.set_processor(FusedAttnProcessor2_0())
            for name in _FUSED["to_kv" if attention.is_cross_attention else "to_qkv"]:
                delattr(attention, name)


def _may_fuse(attention: Any) -> bool:
    """Whether an attention is of the plain kind, with three projections of one width that nothing is added to."""
    projections = [getattr(attention, name, None) for name in _FUSED["to_qkv"]]
    plain = all(type(one) is torch.nn.Linear for one in projections) and attention.added_kv_proj_dim is None
    return plain and (type(attention.processor) is AttnProcessor2_0 or is_image_prompt(attention.processor))


def _lay_channels_last(module: torch.nn.Module) -> None:
    """Lay the weights of all convolutions channels last, each in memory of its own."""
    for part in module.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)


def _move_loose_tensors(call: torch.nn.Module, device: torch.device) -> None:
    """Move what a call keeps as a plain attribute: `Module.to` passes it over."""
    for name, value in list(vars(call).items()):
        if isinstance(value, Tensor):
            setattr(call, name, value.to(device))


def _export(
    call: torch.nn.Module, module: torch.nn.Module, contract: Contract, profile: Profile, device: torch.device
) -> torch.export.ExportedProgram:
    """Export a call with PyTorch's own exporter."""
    dynamic = _dynamic_shapes(contract, profile)
    feeds = seeded_feeds(contract, _example(profile))
    inputs = tuple(tensor.to(device) for tensor in feeds.values())
    try:
        with ExitStack() as stack:
            if dynamic is not None:  # branches on sizes must not be kept
                stack.enter_context(traceable(module, wide_layers=0, upcast=False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.device(device))  # the call makes small tensors of its own
            stack.enter_context(_silenced())
            return torch.export.export(call, inputs, dynamic_shapes=dynamic, strict=False)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(
            f"PyTorch can't export the {contract.component} for {contract.describe(profile)}: {lines[0][:300]}",
            hint="build for one size: a single --batch, --height and --width" if dynamic else "use another --backend",
        ) from error


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep back what PyTorch's exporter warns its own developers of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _example(profile: Profile) -> Sizes:
    """Sizes to export with: the optimum, but a batch of at least 2 where it is a range (1 would become a constant)."""
    best = profile.optimum
    batch = profile.batch
    rows = best.batch if batch.min == batch.max else max(2, best.batch)
    return Sizes(rows, best.height, best.width, best.tokens)


def _dynamic_shapes(contract: Contract, profile: Profile) -> tuple[dict[int, Any], ...] | None:
    """The axes of each input that may change, as `torch.export` takes them; None where none may."""
    low, high = dimension_values(profile.minimum), dimension_values(profile.maximum)
    names = {name for spec in contract.inputs for name in spec.dynamic_axes.values()}
    dims: dict[str, Any] = {}
    for name in sorted(names):
        base = _SIDES.get(name, name)
        if low[base] == high[base]:
            continue
        dim = torch.export.Dim(base, min=low[base], max=high[base])
        dims[name] = dim if base == name else (low[name] // low[base]) * dim
    if not dims:
        return None
    return tuple(
        {axis: dims[name] for axis, name in spec.dynamic_axes.items() if name in dims} for spec in contract.inputs
    )


def _sources(component: Component, name: str) -> tuple[str, ...]:
    """The model's own tensors that a weight of the program is joined from."""
    own = _own_names(component, name)
    owner, _, kind = own.rpartition(".")
    parent, _, last = owner.rpartition(".")
    return tuple(f"{parent}.{part}.{kind}" for part in _FUSED[last]) if last in _FUSED else (own,)


def _own_names(component: Component, name: str) -> str:
    """A name in the program → the name in the model's part, less what its library puts before it."""
    if component in STEPPING:
        return name.removeprefix(f"{component}.")
    if component.startswith("text_encoder"):
        return f"text_{name}" if name.startswith("projection.") else name.removeprefix("text.")
    return name  # the call takes the halves of a VAE by their own names


def _keep_names(exported: torch.export.ExportedProgram) -> None:
    """Make buffers of a program's constants: Inductor numbers constants anew, and nobody could tell them apart."""
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.CONSTANT_TENSOR:
            spec.kind, spec.persistent = InputKind.BUFFER, False


def _fixed(exported: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """The tensors of a program that are no weights."""
    found: Iterable[tuple[str, Any]] = exported.constants.items()
    return {name: value.detach() for name, value in found if isinstance(value, Tensor)}

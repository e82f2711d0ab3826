"""What `sdtrt inspect` shows: a model's parts and their sizes, one part's module tree, an engine's inputs and outputs.

Configurations, headers and sidecars are read; no weights are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrt.common.console import print_table
from sdtrt.common.errors import MALFORMED, EngineError, SdtrtError, UsageError
from sdtrt.engines.entry import Entry, stored_contract
from sdtrt.models.loading import empty_part, part_infos
from sdtrt.models.origins import Origin
from sdtrt.models.resolve import Model
from sdtrt.models.weights import WEIGHT_NAMES, TensorInfo
from sdtrt.specs import Component, Precision, Profile, check_choice
from sdtrt.specs.contract import Contract, TensorSpec, is_tiny_vae

if TYPE_CHECKING:
    import torch

# The configuration values that say how large a part is and what it takes, in the order in which they are shown.
MAIN_SIZES: dict[str, tuple[str, ...]] = {
    "unet": (
        "sample_size",
        "in_channels",
        "block_out_channels",
        "layers_per_block",
        "transformer_layers_per_block",
        "cross_attention_dim",
        "attention_head_dim",
        "addition_embed_type",
    ),
    "controlnet": (
        "in_channels",
        "block_out_channels",
        "layers_per_block",
        "cross_attention_dim",
        "conditioning_channels",
    ),
    "vae": ("sample_size", "latent_channels", "block_out_channels", "layers_per_block", "scaling_factor"),
    "tiny vae": ("latent_channels", "decoder_block_out_channels", "num_decoder_blocks", "scaling_factor"),
    "text_encoder": (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "vocab_size",
        "projection_dim",
    ),
    "tokenizer": ("model_max_length",),
    "scheduler": ("prediction_type", "num_train_timesteps", "beta_schedule", "timestep_spacing"),
}


@dataclass(frozen=True)
class PartReport:
    """One part of a model.

    Args:
        parameters: how many numbers its weights are; None for a part without weights.
        size_bytes: of its weights on disk; None where they are not on this machine.
        fetchable: whether the hub has weights that are not on this machine.
        dtypes: of its weights, the most frequent first.
        sizes: the main values of its configuration.
        files: where its weights are stored.
    """

    name: str
    class_name: str
    parameters: int | None
    size_bytes: int | None
    fetchable: bool
    dtypes: tuple[str, ...]
    sizes: Mapping[str, Any]
    files: tuple[Path, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """Its row in the table."""
        absent = "not downloaded" if self.fetchable else "not found"
        size = absent if self.parameters and self.size_bytes is None else human_bytes(self.size_bytes)
        values = ", ".join(f"{name} {_short(value)}" for name, value in self.sizes.items())
        return self.name, self.class_name, human_count(self.parameters), size, ", ".join(self.dtypes), values


@dataclass(frozen=True)
class ModuleReport:
    """One PyTorch module: the parameters of its own by name and shape, and the modules in it."""

    name: str
    class_name: str
    parameters: int
    shapes: Mapping[str, tuple[int, ...]]
    children: tuple[ModuleReport, ...]

    def lines(self, depth: int = 0) -> Iterator[str]:
        """The tree as indented text: name, class, parameters in all, shapes of its own ones."""
        shapes = ", ".join(f"{name} {_short(shape)}" for name, shape in self.shapes.items())
        yield f"{'  ' * depth}{self.name}: {self.class_name}, {human_count(self.parameters) or 'no'} parameters" + (
            f" ({shapes})" if shapes else ""
        )
        for child in self.children:
            yield from child.lines(depth + 1)


@dataclass(frozen=True)
class ModelReport:
    """A model, or the one part of it that was asked for; `height` and `width` in pixels."""

    name: str
    source: Path
    layout: str
    pipeline: str
    height: int
    width: int
    parts: tuple[PartReport, ...]
    tree: ModuleReport | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return _plain(self)

    def print(self) -> None:
        """Show it on stdout."""
        print(f"{self.name}: {self.pipeline}, {self.width}x{self.height} pixels ({self.layout} {self.source})\n")
        columns = ("part", "class", "parameters", "size", "dtype", "main sizes")
        print_table(columns, [part.cells for part in self.parts])
        if self.tree is not None:
            print()
            for line in self.tree.lines():
                print(line)


@dataclass(frozen=True)
class EngineReport:
    """An engine or an ONNX export of the engine directory.

    Args:
        profiles: the sizes that it takes; empty where it takes any.
        host: what it is bound to: the GPU, or the processor.
        kept: of an engine in 8 bits, the layers that are in 16, as patterns of their names.
    """

    name: str
    path: Path
    kind: str
    component: Component
    precision: Precision
    model: str | None
    backend: str | None
    backend_version: str | None
    host: Mapping[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    files: Mapping[str, int]
    kept: tuple[str, ...] = ()

    @property
    def contract(self) -> Contract:
        """Its inputs and outputs."""
        return Contract(self.component, self.precision, self.inputs, self.outputs)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `--json`; each profile with the shapes that it stands for."""
        shapes = [{"shapes": self.contract.profile_shapes(profile)} for profile in self.profiles]
        data = _plain(self)
        data["profiles"] = [profile | shape for profile, shape in zip(data["profiles"], shapes, strict=True)]
        return data

    def print(self) -> None:
        """Show it on stdout."""
        print(f"{self.name}: {self.kind}, {self.component} of {self.model or 'unknown'} in {self.precision}")
        if self.backend is not None:
            host = ", ".join(f"{name} {_short(value)}" for name, value in self.host.items())
            print(f"{self.backend} {self.backend_version or ''} on {host}")
        if self.kept:
            print(f"in 16 bits: {', '.join(self.kept)}, and all that is no linear layer of a transformer")
        print(f"{human_bytes(sum(self.files.values()))} in {self.path}\n")
        rows = [("input", spec) for spec in self.inputs] + [("output", spec) for spec in self.outputs]
        cells = [(way, spec.name, spec.dtype, ", ".join(map(str, spec.dims))) for way, spec in rows]
        print_table(("", "tensor", "dtype", "shape"), cells)
        print("\nprofiles:" if self.profiles else "\nprofiles: none, it takes any size")
        for number, profile in enumerate(self.profiles):
            print(f"  {number}: {self.contract.describe(profile)}")


def inspect_model(model: Model, part: str | None = None, *, tree: bool = False) -> ModelReport:
    """Report on a model's parts, or on one of them.

    Args:
        part: one part's name; None for all.
        tree: add the whole PyTorch module tree of `part`, built without memory for weights.

    Raises:
        UsageError: for a part that the model has not, or a tree of no part or of one that is no module.
    """
    if part is not None:
        check_choice("part", part, tuple(model.origins))
    modules = tuple(name for name in model.origins if name in WEIGHT_NAMES)
    if tree and part not in modules:
        wrong = f"the {part} is no PyTorch module" if part else "a module tree is of one part, and none is named"
        raise UsageError(wrong, hint=f"use --part {modules[0]} --tree (or {', '.join(modules[1:])})")
    height, width = model.default_size()
    return ModelReport(
        name=model.spec.name,
        source=model.source,
        layout=model.layout,
        pipeline=model.pipeline_class,
        height=height,
        width=width,
        parts=tuple(_inspect_part(model, name) for name in ((part,) if part else model.origins)),
        tree=_inspect_module(part, empty_part(model, part)) if tree and part else None,
    )


def _inspect_part(model: Model, part: str) -> PartReport:
    """One part, from its configuration and the headers of its weight files."""
    config = model.config(part)
    names = MAIN_SIZES["tiny vae" if is_tiny_vae(config) else part.removesuffix("_2")]
    files = model.stored_weight_files(part) if part in WEIGHT_NAMES else ()
    infos = part_infos(model, part) if files else {}
    return PartReport(
        name=part,
        class_name=model.class_name(part),
        parameters=_count_parameters(model, part, infos) if part in WEIGHT_NAMES else None,
        size_bytes=_size_on_disk(model.origin(part), files, infos) if files else None,
        fetchable=part in WEIGHT_NAMES and model.origin(part).repo is not None,
        dtypes=_dtypes(infos),
        sizes={name: config[name] for name in names if config.get(name) is not None},
        files=files,
    )


def _count_parameters(model: Model, part: str, infos: Mapping[str, TensorInfo]) -> int:
    """Parameters by the stored tensors; of a part without files of its own, by its architecture."""
    if infos and model.origin(part).file is None:
        return sum(info.elements for info in infos.values() if info.is_floating_point)
    return sum(parameter.numel() for parameter in empty_part(model, part).parameters())


def _size_on_disk(origin: Origin, files: tuple[Path, ...], infos: Mapping[str, TensorInfo]) -> int:
    """Bytes of a part's files, or of its tensors in a file that it shares."""
    if origin.file is not None:
        return sum(info.size_bytes for info in infos.values())
    return sum(file.stat().st_size for file in files)


def _dtypes(infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """The floating-point dtypes, the one of most numbers first."""
    totals: dict[str, int] = {}
    for info in infos.values():
        if info.is_floating_point:
            totals[info.dtype] = totals.get(info.dtype, 0) + info.elements
    return tuple(sorted(totals, key=lambda dtype: -totals[dtype]))


def _inspect_module(name: str, module: torch.nn.Module) -> ModuleReport:
    """A module and all modules in it."""
    return ModuleReport(
        name=name,
        class_name=type(module).__name__,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        shapes={key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)},
        children=tuple(_inspect_module(key, child) for key, child in module.named_children()),
    )


def inspect_engine(entry: Entry) -> EngineReport:
    """Report on an entry of the engine directory, from its sidecar. Raises `EngineError` where that is malformed."""
    contract = stored_contract(entry)
    try:
        profiles = tuple(Profile.from_json(data) for data in entry.key.get("profiles", ()))
    except (SdtrtError, *MALFORMED) as error:
        raise EngineError(f"{entry.name} does not say what sizes it takes", hint=entry.removal) from error
    return EngineReport(
        name=entry.name,
        path=entry.path,
        kind=entry.kind,
        component=contract.component,
        precision=contract.precision,
        model=entry.info.get("model"),
        backend=entry.key.get("backend"),
        backend_version=entry.key.get("backend_version"),
        host=host if isinstance(host := entry.key.get("host"), dict) else {},
        inputs=contract.inputs,
        outputs=contract.outputs,
        profiles=profiles,
        files=entry.files,
        kept=_kept(entry),
    )


def _kept(entry: Entry) -> tuple[str, ...]:
    """The layers that an engine in 8 bits has in 16; none for others, and where the key is not as it should be."""
    options, export = entry.key.get("options"), entry.key.get("export", entry.key)
    places: tuple[Any, Any] = (options, "recipe"), (export, "calibration")
    found = (place.get(name) for place, name in places if isinstance(place, dict))
    kept = next((one.get("kept") for one in found if isinstance(one, dict)), None)
    return tuple(map(str, kept)) if isinstance(kept, list) else ()


def human_bytes(size: int | None) -> str:
    """`1.7 GB`, in powers of 1000; nothing for None."""
    if size is None:
        return ""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def human_count(count: int | None) -> str:
    """`859.5 M`; nothing for None or 0."""
    if not count:
        return ""
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return str(count)


def _short(value: Any) -> str:
    """Lists as `320x640x1280`, as shapes are written; anything else as it is."""
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _plain(report: Any) -> dict[str, Any]:
    """A report's plain data, paths as text."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(report), default=str))
    return data

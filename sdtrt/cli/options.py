"""Options that most commands have, each written once, in groups; a group becomes the part of a spec that it stands for.

Options of single commands lie beside: `build_options`, `image_options`, `report_options`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from typer import Option

from sdtrt.backends import registry
from sdtrt.common.console import Console
from sdtrt.engines.directory import EngineDirectory, default_directory, in_home
from sdtrt.specs import AUTO, DEFAULT_MODEL, PRECISIONS, LoraSpec, ModelSpec


@dataclass(frozen=True)
class OutputOptions:
    """These options say how a command speaks."""

    as_json: Annotated[bool, Option("--json", help="print one JSON document on stdout")] = False
    quiet: Annotated[bool, Option("--quiet", "-q", help="no progress, no notes")] = False
    verbose: Annotated[bool, Option("--verbose", help="more details on stderr")] = False

    def console(self) -> Console:
        """The console for stderr."""
        return Console(quiet=self.quiet, verbose=self.verbose)


@dataclass(frozen=True)
class DirectoryOptions:
    """These options say where engines are kept."""

    engine_dir: Annotated[
        Path | None,
        Option(metavar="FOLDER", help="where engines are kept; else $SDTRT_ENGINE_DIR, ./engines, or the user's cache"),
    ] = None
    trust_engine_dir: Annotated[
        bool, Option("--trust-engine-dir", help="use it even if other users can change it (engines run code)")
    ] = False

    def directory(self) -> EngineDirectory:
        """The engine directory. Shells leave the `~` of `--engine-dir=~/x` to us: it is a home directory, too."""
        folder = default_directory() if self.engine_dir is None else in_home(self.engine_dir)
        return EngineDirectory(folder, trust_others=self.trust_engine_dir)


@dataclass(frozen=True)
class ModelOptions:
    """These options name the model."""

    model: Annotated[
        str, Option("--model", "-m", help="tiny (built in), a diffusers folder, a hub id, or a .safetensors checkpoint")
    ] = DEFAULT_MODEL
    revision: Annotated[str | None, Option(help="hub revision: branch, tag or commit")] = None
    variant: Annotated[str | None, Option(help="weight variant, such as fp16")] = None
    config: Annotated[str | None, Option(help="folder or hub id with a single-file checkpoint's configuration")] = None
    allow_pickle: Annotated[
        str | None, Option(metavar="FILE", help="trust the pickle file of this name (reading it runs its code)")
    ] = None
    offline: Annotated[bool, Option("--offline", help="never ask the hub")] = False
    vae: Annotated[
        str | None,
        Option(metavar="FILE|FOLDER|ID", help="a VAE in the place of the model's own, full or tiny (such as TAESD)"),
    ] = None

    def spec(self) -> ModelSpec:
        """The model that is asked for."""
        named = (self.model, self.revision, self.variant, self.config, self.allow_pickle)
        return ModelSpec(*named, self.offline, self.vae)


@dataclass(frozen=True)
class LoraOptions:
    """These options name what is merged into the model."""

    lora: Annotated[
        list[str] | None,
        Option("--lora", metavar="FILE|FOLDER|ID[:WEIGHT]", help="a LoRA, and how much it counts; again for more"),
    ] = None

    def into(self, model: ModelSpec) -> ModelSpec:
        """The model with them."""
        return replace(model, loras=tuple(map(LoraSpec.parse, self.lora or ())))


@dataclass(frozen=True)
class BackendOptions:
    """These options say what computes, and in which precision."""

    backend: Annotated[str, Option("--backend", "-b", help=f"one of {', '.join(registry.names())}")] = AUTO
    precision: Annotated[
        str | None, Option(help=f"one of {', '.join(PRECISIONS)}; by default fp16 on a GPU, fp32 on a CPU")
    ] = None
    device: Annotated[
        str | None, Option(metavar="NAME", help="a device of OpenVINO's, with --backend openvino: CPU, GPU.0, NPU")
    ] = None

    def check(self, components: Sequence[str] = ()) -> None:
        """Refuse what no backend does, before anything heavy is loaded."""
        if self.device is not None:  # first: it decides which precisions there are
            registry.choose_device(self.backend, self.device)
        registry.check_request(self.backend, self.precision, components)

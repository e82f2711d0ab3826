"""Component → compiled package, in a process of its own (`worker`): what is asked of it, and how it is started.

PyTorch's compiler keeps caches, intermediate files and processes; all of it lies in folders inside the entry's draft,
or ends with the process, and nothing that this process's own PyTorch has set up gets into the engine.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from sdtrt.backends.child import crash, run_worker
from sdtrt.common.console import Console
from sdtrt.common.errors import BuildError, SdtrtError
from sdtrt.common.files import private_folder
from sdtrt.models.architecture import Blueprint
from sdtrt.models.components import VAE_HALVES
from sdtrt.specs import QUANTISED, ExportSpec, Profile
from sdtrt.specs.contract import Contract

LOG_FILE = "build.log"
WORKER = "sdtrt.backends.inductor.worker"  # the module that the process serves by
DEFAULT_CXX = "g++"  # the C++ compiler that Inductor calls, unless $CXX names another

# How a package is compiled, beside what is PyTorch's default; a part of an engine's key.
OPTIONS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,  # weights stay outside ...
    "always_keep_tensor_constants": True,  # ... also those of few elements, which would be compiled in
    "aot_inductor.use_runtime_constant_folding": False,  # or what is made of weights would not follow them
    "freezing": False,
    "conv_1x1_as_mm": True,
}
# How weights are laid out before that (`exports.program.Recipe`); a part of it too.
RECIPE: dict[str, Any] = {"fused_projections": True, "channels_last": True, "split_norms": False}
# What is otherwise for a VAE's halves. Norms in two stages make a decoder a fifth faster on an H200, and a UNet's step
# 6 % slower: there they are fused with what joins tensors, which then is read badly (benchmarks/recipe-sd15-h200.json).
VAE_RECIPE = {"split_norms": True}
# Of a VAE's halves in fp16, which SDXL's leaves, what their residual stream is divided by (`exports.scaled_vae`). All
# have it: one engine serves the VAEs of Stable Diffusion 1.x and of XL, which differ in their weights alone.
STREAM_SCALE = 64
# Of a quantised UNet's or ControlNet's linear layers those that stay in 16 bits, by patterns of their names. What
# self-attention gives costs the most error for its work, and keys and values of a text are of too few rows to gain
# (benchmarks/quantised-layers-cpu.json; `benchmarks/quantised_layers.py` measures a model).
_KEPT = ("*.attn1.to_out.0", "*.attn2.to_kv")
KEPT: dict[str, tuple[str, ...]] = {"int8": _KEPT, "fp8": _KEPT}
# What a user's environment would change of it, unseen by the key.
_SETTINGS = ("TORCHINDUCTOR_", "AOT_INDUCTOR_", "AOTINDUCTOR_", "TORCHDYNAMO_", "TORCH_COMPILE_", "TRITON_")


def recipe_of(export: ExportSpec) -> dict[str, Any]:
    """The recipe of a component's engines in a precision."""
    if export.precision in QUANTISED:
        return {**RECIPE, "quantised": export.precision, "kept": list(KEPT[export.precision])}
    if export.component not in VAE_HALVES:
        return dict(RECIPE)
    return {**RECIPE, **VAE_RECIPE, **({"stream_scale": STREAM_SCALE} if export.precision == "fp16" else {})}


@dataclass(frozen=True)
class Request:
    """What the building process needs to know.

    Args:
        device: what is compiled for, `cuda` or `cpu`.
        blueprint: of the module, where it lives in a pipeline: it is compiled and checked with seeded random weights,
            as no weights are in an engine, and a live model's would have to be written to the disk for this alone.
        options: of the compiler.
        recipe: the fields of an `exports.program.Recipe`.
    """

    export: ExportSpec
    profile: Profile
    contract: Contract
    folder: Path
    device: str
    blueprint: Blueprint | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: dict(OPTIONS))
    recipe: Mapping[str, Any] = field(default_factory=lambda: dict(RECIPE))

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the pipe."""
        export, contract = asdict(replace(self.export, output=None)), self.contract.to_json()
        how = {"device": self.device, "options": dict(self.options), "recipe": dict(self.recipe)}
        return {
            "export": export,
            "contract": contract,
            "profile": asdict(self.profile),
            "folder": str(self.folder),
            "blueprint": self.blueprint and asdict(self.blueprint),
            **how,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(
            export=ExportSpec.from_json(data["export"]),
            profile=Profile.from_json(data["profile"]),
            contract=Contract.from_json(data["contract"]),
            folder=Path(data["folder"]),
            device=data["device"],
            blueprint=data["blueprint"] and Blueprint(**data["blueprint"]),
            options=data["options"],
            recipe=data["recipe"],
        )

    @property
    def log(self) -> Path:
        """Where what the compilers print goes."""
        return self.folder / LOG_FILE


def compiler() -> str:
    """The name of the C++ compiler that PyTorch calls."""
    return os.environ.get("CXX") or DEFAULT_CXX


def require_compiler() -> None:
    """Raise `BuildError` where there is no C++ compiler, or where PyTorch can't call one."""
    if shutil.which(compiler()) is None:
        raise BuildError(
            f"there is no C++ compiler {compiler()}, which PyTorch compiles engines with",
            hint="install g++ (apt install g++), or name another one: CXX=/path/to/compiler",
        )
    if find_spec("setuptools") is None:
        raise BuildError(
            "setuptools is not installed, with which PyTorch calls the C++ compiler", hint="pip install setuptools"
        )


def build_package(request: Request, console: Console) -> dict[str, Any]:
    """Compile a component into `folder/engine.pt2`, its constants' list beside it, and check what was made.

    Returns:
        What is known of the engine: `parity` with the component in fp32, `step_ms` at the profile's optimum,
        `export_seconds`, `compile_seconds`, `package_bytes`, and what a session takes of the GPU's memory:
        `plan_bytes` (of weights) and `scratch_bytes`; with which weights it was checked, `checked_with`.

    Raises:
        BuildError, EngineError, ExportError: where it can't be built or is not right. `folder` is to be thrown away.
    """
    require_compiler()
    sizes = request.contract.describe(request.profile)
    console.note(f"inductor {request.export.precision} engine of the {request.contract.component} for {sizes}")
    with private_folder(request.folder, ".compiling-") as work, console.activity("building the engine") as show:

        def report(message: Mapping[str, Any]) -> None:
            show(message["show"]) if "show" in message else console.warn(message["warn"])

        try:
            died = partial(crash, who="PyTorch's compiler")
            return run_worker(request, report, worker=WORKER, environment=_environment(work), crashed=died)
        except SdtrtError:
            _keep_log(request.log, console)
            raise


def _environment(work: Path) -> dict[str, str]:
    """The environment of the building process: the user's, but for what would change the engine or leave files."""
    folders = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "TMPDIR": "tmp"}
    ours = {name: str(work / place) for name, place in folders.items()}
    (work / folders["TMPDIR"]).mkdir()
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_SETTINGS) or name.endswith("_PATH")  # where Triton finds its assembler, say
    }
    return kept | ours


def _keep_log(log: Path, console: Console) -> None:
    """Save the log of a failed build from the folder that is about to go, and say where it is."""
    with suppress(OSError):  # a full disk may be why the build failed, and that is what is to be told
        with tempfile.NamedTemporaryFile("wb", prefix="sdtrt-build-", suffix=".log", delete=False) as kept:
            kept.write(log.read_bytes())
        console.warn(f"the build failed; what PyTorch's compiler said is in {kept.name}")

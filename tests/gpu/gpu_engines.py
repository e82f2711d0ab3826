"""The engines that the GPU tests run, built once.

They lie in $SDTRT_GPU_TEST_ENGINE_DIR (a temporary folder without it), and are found there by their keys like any
others. A build keeps one processor core busy for minutes, so build them beforehand, side by side, doing other work
meanwhile: `python tests/gpu/gpu_engines.py [--large]`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdtrt.backends import registry
from sdtrt.backends.build import build_engine
from sdtrt.common.console import QUIET, Console
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.models.resolve import Model, resolve_model
from sdtrt.specs import BuildSpec, ExportSpec, ModelSpec, Precision, Profile, Range, Sizes

# What every GPU test needs, and most need besides.
NEEDS_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that PyTorch can use"),
)
NEEDS_INDUCTOR = pytest.mark.skipif(
    registry.get("inductor").why_not() is not None, reason=str(registry.get("inductor").why_not())
)
NEEDS_TENSORRT = pytest.mark.skipif(importlib.util.find_spec("tensorrt") is None, reason="TensorRT is not installed")

DIRECTORY_VARIABLE = "SDTRT_GPU_TEST_ENGINE_DIR"
LARGE_VARIABLE = "SDTRT_GPU_TEST_LARGE"

DYNAMIC = Profile(Range(1, 2, 4), Range(96, 128, 192), Range(96, 128, 192))
STATIC = Profile.of(Sizes(2, 128, 128))
LARGE = Profile.of(Sizes(2, 512, 512))


def _tiny(precision: Precision, profiles: tuple[Profile, ...], *, compatible: bool = False) -> BuildSpec:
    export = ExportSpec(ModelSpec("tiny"), precision=precision)
    return BuildSpec(export, "tensorrt", profiles, optimization_level=0, version_compatible=compatible)


# The dynamic engine has a second profile, so that choosing one is tested too. The split one is large enough for its
# self-attentions over 64x64 latents to be PyTorch's.
SPECS = {
    "dynamic": _tiny("fp16", (DYNAMIC, STATIC)),
    "fp32": _tiny("fp32", (STATIC,)),
    "split": _tiny("fp16", (LARGE,)),
    "compatible": _tiny("fp16", (STATIC,), compatible=True),
}


def large_spec(directory: EngineDirectory) -> BuildSpec:
    """Of a UNet of Stable Diffusion 1.x's size (860 M parameters) with random weights, static: 6.5 minutes on 8.6."""
    export = ExportSpec(ModelSpec(str(large_model(directory.path.parent / "gpu-test-models" / "sd1-random"))))
    return BuildSpec(export, "tensorrt", (LARGE,))


def large_model(folder: Path) -> Path:
    """Write the model once: SD 1.x's own UNet configuration, seeded random weights in fp16 (1.7 GB)."""
    if (folder / "model_index.json").is_file():
        return folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import factories

    widths = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
    draft = folder.with_name(f"{folder.name}.{os.getpid()}")
    factories.sd1_folder(draft, sample_size=64, **widths)
    draft.rename(folder)
    return folder


def spec_of(name: str, directory: EngineDirectory) -> BuildSpec:
    """What an engine of the tests is built from."""
    return large_spec(directory) if name == "large" else SPECS[name]


def engine(name: str, directory: EngineDirectory, console: Console = QUIET) -> tuple[Model, Entry]:
    """An engine of the tests, found or built, and its model."""
    spec = spec_of(name, directory)
    model = resolve_model(spec.export.model)
    return model, build_engine(model, spec, directory, console)


def main() -> None:
    """Build all, each in a process of its own; exports of one model wait for each other."""
    folder = os.environ.get(DIRECTORY_VARIABLE)
    if folder is None:
        sys.exit(f"set {DIRECTORY_VARIABLE} to the folder that the tests will read")
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        print(engine(sys.argv[2], EngineDirectory(Path(folder)), Console())[1].path)
        return
    names = [*SPECS, *(["large"] if "--large" in sys.argv else [])]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(":")}
    children = [subprocess.Popen([sys.executable, __file__, "--one", name], env=environment) for name in names]
    failed = [name for name, child in zip(names, children, strict=True) if child.wait() != 0]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

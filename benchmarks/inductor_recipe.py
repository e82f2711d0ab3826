"""What each choice of the Inductor backend's recipe is worth: one component, compiled in variants, then timed.

    python benchmarks/inductor_recipe.py build --model FOLDER --variants product flash --folder /tmp/recipe
    python benchmarks/inductor_recipe.py time --model FOLDER --variants product flash --folder /tmp/recipe \\
        --output benchmarks/recipe-h200.json

`build` compiles variants side by side, each in a process of its own; `time` runs those that are there, one after the
other, and compares their outputs with the component in fp32. What a variant changes beside the product's own recipe
stands in `VARIANTS`. A variant that fails is a row with its error.
"""

from __future__ import annotations

import sdtrt  # noqa: F401  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from fidelity import errors, kernels
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdtrt.backends.inductor.build import OPTIONS, Request, recipe_of
from sdtrt.backends.inductor.session import InductorSession
from sdtrt.backends.inductor.weights import CONSTANTS_FILE, FIXED_FILE, PACKAGE_FILE, read_constants, read_fixed
from sdtrt.backends.inductor.worker import build_here
from sdtrt.common import host
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.tracing import reference
from sdtrt.models.components import contract_of, load_component, profile_of
from sdtrt.models.resolve import Model, resolve_model
from sdtrt.reports.meters import synchronize, time_queued_calls
from sdtrt.specs import ExportSpec, ModelSpec, Profile, Sizes

BUILT = "built.json"
ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Variant:
    """What differs from the product's recipe.

    Args:
        options: of the compiler.
        recipe: fields of an `exports.program.Recipe`.
        attention: the kernels that attention is to be computed by, the preferred one first; none for PyTorch's choice.
        cudnn_benchmark: cuDNN tries its convolutions when they first run.
        fp16_accumulation: products of the libraries may add up in fp16.
        like: the variant whose package this one runs, as it only changes how it is run.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    attention: tuple[str, ...] = ()
    cudnn_benchmark: bool = False
    fp16_accumulation: bool = False
    like: str | None = None


_PRODUCTS = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON"}
VARIANTS: dict[str, Variant] = {
    "product": Variant(),
    "attention-cudnn": Variant(attention=("cudnn", "flash", "efficient")),
    "attention-flash": Variant(attention=("flash", "efficient")),
    "attention-efficient": Variant(attention=("efficient",)),
    "separate-projections": Variant(recipe={"fused_projections": False}),
    "channels-first": Variant(recipe={"channels_last": False}),
    "stream-as-it-is": Variant(recipe={"stream_scale": 1}),  # of a VAE's half: what its scaling costs
    "convolutions-1x1": Variant(options={"conv_1x1_as_mm": False}),
    "split-norms": Variant(recipe={"split_norms": True}),
    "whole-norms": Variant(recipe={"split_norms": False}),
    "no-epilogues": Variant(options={"epilogue_fusion": False}),
    "tuned-products": Variant(options={**_PRODUCTS, "max_autotune_conv_backends": "ATEN"}),
    "tuned-convolutions": Variant(
        options={
            "max_autotune_gemm": True,
            "max_autotune_gemm_backends": "ATEN",
            "max_autotune_conv_backends": "ATEN,TRITON",
        }
    ),
    "tuned-tma": Variant(
        options={**_PRODUCTS, "max_autotune_conv_backends": "ATEN", "triton.enable_persistent_tma_matmul": True}
    ),
    "tuned-pointwise": Variant(options={"max_autotune_pointwise": True}),
    "coordinate-descent": Variant(options={"coordinate_descent_tuning": True}),
    "combo-kernels": Variant(options={"combo_kernels": True}),
    "embedded-kernels": Variant(options={"aot_inductor.embed_kernel_binary": True}),
    "cudnn-benchmark": Variant(cudnn_benchmark=True, like="product"),
    "fp16-accumulation": Variant(fp16_accumulation=True, like="product"),
    "attention-cudnn+benchmark": Variant(cudnn_benchmark=True, like="attention-cudnn"),
}


@dataclass(frozen=True)
class Case:
    """What is compiled: a component of a model, for one size."""

    model: Model
    component: Any
    precision: Any
    sizes: Sizes

    def request(self, variant: Variant, folder: Path) -> Request:
        """The product's own request for it, as a variant changes it."""
        spec = ExportSpec(self.model.spec, self.component, self.precision)
        profile = profile_of(self.component, Profile.of(self.sizes))
        contract = contract_of(self.model, self.component, self.precision)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        request = Request(spec, profile, contract, folder, device)
        recipe = recipe_of(spec) | dict(variant.recipe)
        return replace(request, options=dict(OPTIONS) | dict(variant.options), recipe=recipe)

    def module(self) -> torch.nn.Module:
        """The part of the model that the component is of, on the CPU."""
        dtype = getattr(torch, contract_of(self.model, self.component, self.precision).outputs[0].dtype)
        return load_component(self.model, self.component, dtype)


@contextmanager
def compiling_as(variant: Variant) -> Iterator[None]:
    """Within, attention is compiled to a variant's kernels."""
    kinds = [ATTENTION[name] for name in variant.attention]
    with sdpa_kernel([*kinds, SDPBackend.MATH], set_priority=True) if kinds else nullcontext():
        yield


@contextmanager
def running_as(variant: Variant) -> Iterator[None]:
    """Within, the libraries' own choices are a variant's."""
    torch.backends.cudnn.benchmark = variant.cudnn_benchmark
    torch.backends.cuda.matmul.allow_fp16_accumulation = variant.fp16_accumulation
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_fp16_accumulation = False


def build_one(case: Case, name: str, folder: Path) -> None:
    """Compile a variant into its folder, in this process; what is known of it goes beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    variant, begin = VARIANTS[name], time.perf_counter()
    try:
        with compiling_as(variant):
            facts = build_here(case.request(variant, folder), lambda message: None)
    except Exception as error:
        facts = {"error": " ".join(str(error).split())[:500]}
    (folder / BUILT).write_text(json.dumps(facts | {"build_s": round(time.perf_counter() - begin, 1)}))


def build_all(names: list[str], arguments: list[str], folder: Path) -> None:
    """Compile variants side by side, each in a process with caches of its own."""
    running = []
    for name in (one for one in names if VARIANTS[one].like is None):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(place / "cache"), "TRITON_CACHE_DIR": str(place / "triton")}
        command = [sys.executable, __file__, "build-one", *arguments, "--variants", name]
        log = (place / "build.log").open("w")
        running.append(subprocess.Popen(command, env=os.environ | caches, stdout=log, stderr=log))
    for process in running:
        process.wait()


@dataclass(frozen=True)
class Exact:
    """What a component gives in fp32 for seeded inputs, and how far PyTorch itself is off in the case's precision."""

    feeds: Mapping[str, torch.Tensor]
    outputs: list[torch.Tensor]
    pytorch: float

    @property
    def device(self) -> torch.device:
        """Where the inputs lie."""
        return next(iter(self.feeds.values())).device


def exact_outputs(case: Case, device: torch.device) -> Exact:
    """Compute a case in PyTorch, plainly and in fp32 without TF32."""
    request = case.request(Variant(), Path())
    feeds = {name: one.to(device) for name, one in seeded_feeds(request.contract, request.profile.optimum).items()}
    module = torch.nn.Module.to(case.module(), device)

    def outputs() -> list[torch.Tensor]:
        dtype = next(module.parameters()).dtype
        inputs = [one.to(dtype) if one.is_floating_point() else one for one in feeds.values()]
        with torch.inference_mode():
            found = reference(module, request.contract)(*inputs)
        return [one.float().clone() for one in ((found,) if isinstance(found, torch.Tensor) else found)]

    plain = outputs()
    torch.nn.Module.to(module, torch.float32)
    wanted = outputs()
    return Exact(feeds, wanted, errors(plain, wanted)["relative_l2"][0])


def time_one(case: Case, name: str, folder: Path, exact: Exact, repeats: int) -> dict[str, Any]:
    """One row: the build, a step from the CUDA graph, its error, and where the GPU's time goes."""
    variant = VARIANTS[name]
    folder = folder / (variant.like or name)
    built = json.loads((folder / BUILT).read_text()) if (folder / BUILT).exists() else {"error": "not built"}
    row = {"variant": name, "build_s": built.get("build_s"), "compile_s": built.get("compile_seconds")}
    if "error" in built:
        return row | {"error": built["error"]}
    try:
        with running_as(variant), opened(case, variant, folder, exact.device) as session:
            return row | run(session, exact, repeats) | {"package_bytes": (folder / PACKAGE_FILE).stat().st_size}
    except Exception as error:
        return row | {"error": " ".join(str(error).split())[:500]}


@contextmanager
def opened(case: Case, variant: Variant, folder: Path, device: torch.device) -> Iterator[InductorSession]:
    """A variant's package with the model's weights."""
    request = case.request(variant, folder)
    constants = read_constants(folder / CONSTANTS_FILE)
    fixed = read_fixed(folder / FIXED_FILE, constants)
    package = folder / PACKAGE_FILE
    with InductorSession(package, constants, fixed, request.contract, request.profile, device=device) as session:
        session.set_weights(case.module())
        yield session


def run(session: InductorSession, exact: Exact, repeats: int) -> dict[str, Any]:
    """The figures of an open session."""
    begin = time.perf_counter()
    found = [one.float().clone() for one in session.run(exact.feeds).values()]
    synchronize(exact.device)
    first_run_s = round(time.perf_counter() - begin, 3)
    session.run(exact.feeds)  # is captured
    step = time_queued_calls(lambda: session.run(exact.feeds), repeats, exact.device).scaled(1e3)
    work = kernels(lambda: session.run(exact.feeds), 3) if exact.device.type == "cuda" else []
    error = errors(found, exact.outputs)["relative_l2"][0]
    figures = {"step_ms": step.median, "first_run_s": first_run_s, "relative_l2": error}
    return figures | {"of_pytorch": error / exact.pytorch if exact.pytorch else None, "kernels": work}


def main() -> None:
    """Build or time variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("build", "build-one", "time"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--component", default="unet")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=100)
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    case = Case(
        resolve_model(ModelSpec(args.model)), args.component, args.precision, Sizes(args.batch, args.height, args.width)
    )
    if args.action == "build-one":
        build_one(case, args.variants[0], args.folder / args.variants[0])
    elif args.action == "build":
        shared = ["model", "component", "precision", "batch", "height", "width", "folder"]
        build_all(
            args.variants, [word for one in shared for word in (f"--{one}", str(getattr(args, one)))], args.folder
        )
    else:
        if len(args.variants) > 1 and any(VARIANTS[name].cudnn_benchmark for name in args.variants):
            parser.error("cuDNN keeps what it has chosen once: time a variant with cudnn_benchmark alone")
        time_all(case, args)


def time_all(case: Case, args: argparse.Namespace) -> None:
    """Time variants, and write the report after each."""
    exact = exact_outputs(case, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "host": host.facts(),
        "versions": host.library_versions(),
    }
    report |= {"component": args.component, "precision": args.precision, "sizes": str(case.sizes)}
    report |= {"pytorch_relative_l2": exact.pytorch, "rows": []}
    for name in args.variants:
        row = time_one(case, name, args.folder, exact, args.repeats)
        report["rows"].append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "kernels"}), flush=True)
        if args.output:
            args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

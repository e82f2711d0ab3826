"""A TensorRT engine that was just built, loaded and run against its ONNX before anyone may use it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdtrt.backends.tensorrt.build import Report, Request
from sdtrt.backends.tensorrt.versions import libraries, running
from sdtrt.backends.tensorrt.versions.libraries import Library
from sdtrt.backends.tensorrt86.pieces import read_pieces
from sdtrt.common import host
from sdtrt.common.errors import BuildError
from sdtrt.specs import BuildSpec, Profile

if TYPE_CHECKING:
    import torch

    from sdtrt.backends.tensorrt.session import TensorRTSession

LAYERS_FILE = "layers.json"  # the engine inspector's words
# What an engine may differ from its ONNX by, as relative L2 error: a wrong engine is far beyond, rounding far below.
# fp16: 0.007 was measured for Stable Diffusion 1.5's UNet on 8.6. fp32 is without TF32.
TOLERANCES = {"fp32": 1e-3, "fp16": 5e-2}
FEW_LAYERS = 8  # of a piece that may be in another precision than was asked for: none need stand out among so few


def why_not_runnable(library: Library, spec: BuildSpec) -> str | None:
    """Why an engine that was built here can't be run here; None if it can."""
    gpus = host.gpus()
    if not gpus:
        return "there is no NVIDIA GPU here"
    target, here = spec.compute_capability, gpus[0].compute_capability
    if target is not None and target != here:
        return f"it is for compute capability {target[0]}.{target[1]}, and this GPU has {here[0]}.{here[1]}"
    if not libraries.serves(library, here):
        return f"{library.name} does not serve {gpus[0].name}"
    return None


def check(library: Library, request: Request, report: Report, precision: Mapping[str, Any]) -> dict[str, Any]:
    """Load the plan, read its precision back, run it once at each profile's optimum against the ONNX.

    Raises:
        BuildError: where it computes in another precision than was asked for, or something else than its ONNX.
        EngineError: where it can't be loaded or run.
    """
    reason = why_not_runnable(library, request.spec)
    if reason is not None:
        report({"warn": f"the engine was built but not run: {reason}"})
        check_precision(library, request.spec, precision.get("layers", {}))
        return {"unchecked": reason, "parity": []}
    from sdtrt.backends.tensorrt.session import TensorRTSession

    spec, device = request.spec, _current_gpu()
    compatible = spec.version_compatible
    with TensorRTSession(
        request.plan, request.contract, backend=spec.backend, device=device, allow_host_code=compatible
    ) as session:
        parity = [_run_once(request, session, profile) for profile in spec.profiles]
        layers = _read_precision(library, request, session.information())
        scratch = session.scratch_bytes
    if spec.export.precision == "bf16":
        report({"warn": "the engine runs, but ONNX Runtime's CPU kernels have no bf16 to compare it with"})
    found = {"layers": layers, "read_from": "inspector"}
    return {"unchecked": None, "parity": parity, "precision": found, "scratch_bytes": scratch}


def _current_gpu() -> torch.device:
    import torch

    return torch.device("cuda")


def _read_precision(library: Library, request: Request, information: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many computing layers of the built engine have each precision; the inspector's words are kept in a file.

    The engine must compute in what was asked for, and so must each piece of it, but for one that runs once for a text
    and those of few layers: these may be no more than a few products or one convolution, whose precision the builder
    chooses by itself.
    """
    told = information[0] if len(information) == 1 else information
    (request.folder / LAYERS_FILE).write_text(json.dumps(told, indent=1))
    layers = [running.layer_precisions(one) for one in information]
    whole = dict(sum(map(Counter, layers), Counter()))
    check_precision(library, request.spec, whole)
    for piece, found in zip(read_pieces(request.plan, request.contract), layers, strict=True):
        if sum(found.values()) > FEW_LAYERS and not piece.is_of_conditioning:
            check_precision(library, request.spec, found)
    return whole


def check_precision(library: Library, spec: BuildSpec, layers: Mapping[str, int]) -> None:
    """Raise `BuildError` for an engine that does not compute in what it was built for.

    fp16 quietly becoming fp32 is a known failure elsewhere; this is what finds it.
    """
    wanted, found = spec.export.precision, ", ".join(f"{count} {name}" for name, count in sorted(layers.items()))
    if not layers.get(wanted) or (wanted == "fp32" and any(layers.get(name) for name in ("fp16", "bf16"))):
        by_timings = "end what else uses the GPU and build again, as this TensorRT chooses by timings; else "
        hint = f"export it again: sdtrt export --precision {wanted} --force"
        raise BuildError(
            f"an engine in {wanted} was asked for, and its computing layers are: {found or 'unknown'}",
            hint=by_timings + hint if library.has("weak typing") else hint,
        )


def _run_once(request: Request, session: TensorRTSession, profile: Profile) -> dict[str, Any]:
    """Run the engine on seeded inputs and compare with ONNX Runtime on the CPU."""
    from sdtrt.exports.feeds import seeded_feeds

    sizes = profile.optimum
    feeds = seeded_feeds(request.contract, sizes)
    outputs = {name: tensor.cpu() for name, tensor in session.run(feeds).items()}
    for name, tensor in outputs.items():
        if not bool(tensor.isfinite().all()):
            raise BuildError(
                f"the engine's {name} has values that are not finite at {sizes}", hint="use --precision fp32"
            )
    return {"sizes": str(sizes), **_compare(request, feeds, outputs)}


def _compare(
    request: Request, feeds: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Worst figures over all outputs, against ONNX Runtime; nothing for bf16, which its CPU kernels lack."""
    from sdtrt.backends.onnxruntime.session import OnnxRuntimeSession
    from sdtrt.common.metrics import cosine, max_abs, relative_l2

    if request.spec.export.precision == "bf16":
        return {}
    try:
        with OnnxRuntimeSession(request.onnx, request.contract, optimized=False) as session:
            expected = session.run(feeds)
    except MemoryError as error:
        raise BuildError(
            "too little memory on the CPU to check the engine against its ONNX",
            hint="end other programs, or build for a smaller --batch, --height and --width",
        ) from error
    pairs = [(outputs[name].float().numpy(), expected[name].float().numpy()) for name in expected]
    figures = {
        "relative_l2": max(relative_l2(*pair) for pair in pairs),
        "cosine": min(cosine(*pair) for pair in pairs),
        "max_abs": max(max_abs(*pair) for pair in pairs),
    }
    check_parity(request.spec, figures)
    return figures


def check_parity(spec: BuildSpec, figures: Mapping[str, float]) -> None:
    """Raise `BuildError` for an engine that computes something else than its ONNX."""
    allowed = TOLERANCES[spec.export.precision]
    if not figures["relative_l2"] <= allowed:  # also where it is not a number
        raise BuildError(
            f"the engine differs from its ONNX: relative L2 error {figures['relative_l2']:.2e}, {allowed} is allowed",
            hint="try --precision fp32 or another --optimization-level, and report the model and TensorRT version",
        )

"""A TensorRT engine that was just built, loaded and run against its ONNX before anyone may use it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdtrt.backends import checking
from sdtrt.backends.checking import Reference
from sdtrt.backends.child import Report
from sdtrt.backends.tensorrt.build import Request
from sdtrt.backends.tensorrt.versions import libraries, running
from sdtrt.backends.tensorrt.versions.libraries import Library
from sdtrt.common import host
from sdtrt.common.errors import BuildError
from sdtrt.exports.parity import IN_BF16
from sdtrt.specs import BuildSpec

if TYPE_CHECKING:
    import torch

    from sdtrt.backends.tensorrt.session import InspectedSession

LAYERS_FILE = "layers.json"  # the engine inspector's words
# What an engine may differ from its ONNX by, as relative L2 error: a wrong engine is far beyond, rounding far below.
# fp16: 0.007 was measured for Stable Diffusion 1.5's UNet on 8.6. fp32 is without TF32.
TOLERANCES = {"fp32": 1e-3, "fp16": 5e-2}

Layers = Mapping[str, int]  # computing layers by precision


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


def open_built(request: Request) -> InspectedSession:
    """A session on the plan that a request has made."""
    import torch

    from sdtrt.backends.tensorrt.session import TensorRTSession

    spec, device = request.spec, torch.device("cuda")
    return TensorRTSession(
        request.plan, request.contract, backend=spec.backend, device=device, allow_host_code=spec.version_compatible
    )


def read_precision(library: Library, request: Request, information: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many computing layers of the built engine have each precision; the inspector's words are kept in a file.

    Args:
        information: what the inspector tells of each plan.

    Raises:
        BuildError: where the engine computes in another precision than was asked for.
    """
    told = information[0] if len(information) == 1 else information
    (request.folder / LAYERS_FILE).write_text(json.dumps(told, indent=1))
    whole = dict(sum((Counter(running.layer_precisions(one)) for one in information), Counter()))
    check_precision(library, request.spec, whole)
    return whole


def check(
    library: Library,
    request: Request,
    report: Report,
    precision: Mapping[str, Any],
    *,
    open_engine: Callable[[Request], InspectedSession] = open_built,
    read: Callable[[Library, Request, Sequence[Mapping[str, Any]]], dict[str, int]] = read_precision,
) -> dict[str, Any]:
    """Load the engine, read its precision back, run it once at each profile's optimum against the ONNX, and time it.

    Args:
        precision: what is known of it from the network.
        open_engine: opens a session on what was built.
        read: reads the precision of what the session's `information` tells.

    Raises:
        BuildError: where it computes in another precision than was asked for, or something else than its ONNX.
        EngineError: where it can't be loaded or run.
    """
    spec, reason = request.spec, why_not_runnable(library, request.spec)
    if reason is not None:
        report({"warn": f"the engine was built but not run: {reason}"})
        check_precision(library, spec, precision.get("layers", {}))
        return {"unchecked": reason, "parity": []}
    reference = reference_of(request)
    with open_engine(request) as session:
        parity = [checking.run_once(request.contract, session, one.optimum, reference) for one in spec.profiles]
        step = checking.measure_step(request.contract, session, spec.profiles[0].optimum)
        layers = read(library, request, session.information())
        scratch = session.scratch_bytes
    if reference is None:
        report({"warn": "the engine runs, but ONNX Runtime's CPU kernels have no bf16 to compare it with"})
    found = {"layers": layers, "read_from": "inspector"}
    return {"unchecked": None, "parity": parity, "precision": found, "scratch_bytes": scratch, **step}


def check_precision(library: Library, spec: BuildSpec, layers: Layers) -> None:
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


def reference_of(request: Request) -> Reference | None:
    """ONNX Runtime on the CPU, with what a request was built from; None for bf16, which its CPU kernels lack.

    An engine in 8 bits has bf16 beside them.
    """
    if request.spec.export.precision in IN_BF16:
        return None
    return Reference(
        name="its ONNX",
        compute=lambda feeds: _computed_by_onnx(request, feeds),
        allowed=TOLERANCES[request.spec.export.precision],
        hint="try --precision fp32 or another --optimization-level, and report the model and TensorRT version",
    )


def _computed_by_onnx(request: Request, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the ONNX gives. It is loaded for each size anew: no memory is held while the engine runs."""
    import torch

    from sdtrt.exports.onnx_run import load_model, run_model

    names = [spec.name for spec in request.contract.outputs]
    try:
        session = load_model(request.onnx, as_it_is=False, threads=torch.get_num_threads())
        return run_model(session, request.onnx, feeds, names)
    except MemoryError as error:
        raise BuildError(
            "too little memory on the CPU to check the engine against its ONNX",
            hint="end other programs, or build for a smaller --batch, --height and --width",
        ) from error

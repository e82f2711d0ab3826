"""The process that compiles a package: load, export, compile, check; a request on its stdin, reports in JSON lines."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from sdtrt.backends import checking
from sdtrt.backends.checking import Reference
from sdtrt.backends.child import Report, answer
from sdtrt.backends.inductor.build import Request
from sdtrt.backends.inductor.package import Package
from sdtrt.backends.inductor.session import InductorSession
from sdtrt.backends.inductor.weights import PACKAGE_FILE, Constant, write_constants, write_fixed
from sdtrt.common.errors import BuildError, BuildMemoryShortage, first_line
from sdtrt.exports.computed import computed
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.program import Program, Recipe, export_program
from sdtrt.exports.tracing import reference
from sdtrt.models.architecture import SEED
from sdtrt.models.components import load_component
from sdtrt.models.image_prompts import complete
from sdtrt.models.resolve import resolve_model
from sdtrt.specs import QUANTISED, Profile, Sizes

# What an engine may differ from the component in fp32 by, as relative L2 error: a wrong engine is far beyond, rounding
# far below. fp16: 0.001 was measured for Stable Diffusion 1.5's UNet.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.1, "fp8": 0.2}
OWN_RUNS = 3  # of PyTorch itself, which a quantised engine is timed beside

Tensors = Mapping[str, torch.Tensor]


def serve() -> None:
    """Answer one request for a package (`child.answer`)."""
    answer(lambda data, report: build_here(Request.from_json(data), report))


def build_here(request: Request, report: Report) -> dict[str, Any]:
    """Build and check a package in this process."""
    torch.backends.cudnn.allow_tf32 = False  # the reference is in fp32; engines in fp16 don't ask
    report({"show": f"loading the {request.contract.component}"})
    times: dict[str, Any] = {}
    start = time.perf_counter()
    program = _export(request, report)
    times["export_seconds"] = round(time.perf_counter() - start, 3)
    start = time.perf_counter()
    constants = compile_program(program, request, report)
    times["compile_seconds"] = round(time.perf_counter() - start, 3)
    fixed = dict(program.fixed)
    del program
    gc.collect()
    if request.device == "cuda":
        torch.cuda.empty_cache()
    report({"show": "checking"})
    start = time.perf_counter()
    found = _check(request, constants, fixed)
    times["check_seconds"] = round(time.perf_counter() - start, 3)
    size = (request.folder / PACKAGE_FILE).stat().st_size
    checked_with = "the model's weights" if request.blueprint is None else f"random weights of the seed {SEED}"
    return times | {"package_bytes": size, "versions": _versions(), "checked_with": checked_with} | found


def _versions() -> dict[str, str]:
    import diffusers

    return {"torch": torch.__version__, "diffusers": diffusers.__version__}


def _load(request: Request) -> torch.nn.Module:
    """The part of the model that the component is of, in its precision; one like it for a live pipeline's."""
    dtype = getattr(torch, request.contract.outputs[0].dtype)
    if request.blueprint is not None:
        module = request.blueprint.with_seeded_weights(dtype)
    else:
        module = load_component(resolve_model(request.export.model), request.export.component, dtype)
    complete(module, request.contract)
    return module


def _export(request: Request, report: Report) -> Program:
    """Load the component and export it."""
    module = _load(request)
    report({"show": f"exporting the {request.contract.component}"})
    device = torch.device(request.device)
    return export_program(module, request.contract, request.profile, device=device, recipe=Recipe(**request.recipe))


def compile_program(program: Program, request: Request, report: Report) -> tuple[Constant, ...]:
    """Compile a program into the request's folder; returns the constants that the package takes.

    Raises:
        BuildError: where the compiler fails, or has compiled a weight in.
    """
    from torch._inductor import aoti_compile_and_package

    report({"show": "compiling"})
    path = request.folder / PACKAGE_FILE
    try:
        aoti_compile_and_package(program.exported, package_path=str(path), inductor_configs=_configured(request))
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise BuildMemoryShortage(
            f"too little memory to compile the {request.contract.component}: {first_line(error)}",
            hint="end other programs, or build for a smaller --batch, --height and --width",
        ) from error
    except Exception as error:  # the compiler's exceptions share no base class of their own
        raise BuildError(
            f"PyTorch can't compile the {request.contract.component}: {first_line(error)[:300]}",
            hint="build.log has the compiler's words; try another C++ compiler by CXX, or another --backend",
        ) from error
    return _list_constants(program, request)


def _configured(request: Request) -> dict[str, Any]:
    """The compiler's options, and one that changes no package: PyTorch's headers are not compiled beforehand.

    That takes longer than it saves where one package is compiled with them: they go with the build's folders.
    """
    from torch._inductor import config

    knows = hasattr(config.aot_inductor, "precompile_headers")  # of some later version than the oldest that serves
    return {**request.options, **({"aot_inductor.precompile_headers": False} if knows else {})}


def _list_constants(program: Program, request: Request) -> tuple[Constant, ...]:
    """Write down what a package takes, and what of it is no weight."""
    package = Package(request.folder / PACKAGE_FILE, torch.device(request.device))
    names = set(package.constants)
    package.close()
    if lost := program.sources.keys() - names:
        raise BuildError(
            f"PyTorch has compiled {len(lost)} weights into the engine, as {min(lost)}", hint="use another --backend"
        )
    if odd := names - program.sources.keys() - program.fixed.keys():
        raise BuildError(
            f"the engine takes {min(odd)}, which is no tensor of the program", hint="use another --backend"
        )
    constants = tuple(
        _constant(program, request, name, tensor)
        for name, tensor in sorted((program.weights | dict(program.fixed)).items())
        if name in names
    )
    write_constants(request.folder, constants)
    write_fixed(request.folder, {name: program.fixed[name] for name in names & program.fixed.keys()})
    return constants


def _constant(program: Program, request: Request, name: str, tensor: torch.Tensor) -> Constant:
    """What the package takes under a name."""
    one = Constant.of(name, tensor, program.sources.get(name, ()))
    if name not in program.rows | program.scales:
        return one
    return one.made_of(request.contract.outputs[0].dtype, scales=name in program.scales)


def _check(request: Request, constants: tuple[Constant, ...], fixed: Tensors) -> dict[str, Any]:
    """Run the engine with the model's weights, against the component in fp32; measure time and memory of a run."""
    device, module = torch.device(request.device), _load(request)
    package = request.folder / PACKAGE_FILE
    with InductorSession(package, constants, fixed, request.contract, request.profile, device=device) as session:
        session.set_weights(module)
        wanted = Reference(
            name=f"the {request.contract.component} in fp32",
            compute=_reference(module, request),
            allowed=TOLERANCES[request.contract.precision],
            hint="use --precision fp32, and report the model and the version of PyTorch",
        )
        memory = _measure_memory(session, request)
        own = _measure_own(module, request)
        step = checking.measure_step(request.contract, session, request.profile.optimum)
        parity = [
            checking.run_once(request.contract, session, sizes, wanted) for sizes in _sizes_to_check(request.profile)
        ]
        return {"parity": parity, "plan_bytes": session.weights_bytes, **step, **memory, **own}


def _sizes_to_check(profile: Profile) -> list[Sizes]:
    """The optimum of a profile, and its ends."""
    return list(dict.fromkeys((profile.optimum, profile.minimum, profile.maximum)))


def _reference(module: torch.nn.Module, request: Request) -> checking.Compute:
    """What computes a component's outputs in fp32, with the module's own rounded weights."""

    def compute(feeds: Tensors) -> Tensors:
        return computed(torch.nn.Module.to(module, request.device, torch.float32), request.contract, feeds)

    return compute


def _measure_own(module: torch.nn.Module, request: Request) -> dict[str, float]:
    """Beside a quantised engine: how long PyTorch itself takes for a step in its 16 bits, not compiled."""
    if request.contract.precision not in QUANTISED:
        return {}
    module.to(request.device)
    call = reference(module, request.contract)
    feeds = [one.to(request.device) for one in seeded_feeds(request.contract, request.profile.optimum).values()]
    times = []
    with torch.inference_mode():
        for _ in range(OWN_RUNS + 1):
            start = time.perf_counter()
            call(*feeds)
            if request.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return {"torch_step_ms": round(1000 * statistics.median(times[1:]), 4)}


def _measure_memory(session: InductorSession, request: Request) -> dict[str, int]:
    """What a run takes of the GPU's memory beside its weights, at the largest size; nothing for a CPU."""
    if request.device != "cuda":
        return {}
    feeds = seeded_feeds(request.contract, request.profile.maximum)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    session.run(feeds)
    torch.cuda.synchronize()
    return {"scratch_bytes": torch.cuda.max_memory_allocated() - before}

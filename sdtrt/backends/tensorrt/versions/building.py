"""ONNX → plan: the network as it is parsed, the builder's configuration, and what each version must be told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtrt.backends.tensorrt.versions import weak_typing
from sdtrt.backends.tensorrt.versions.libraries import (
    Library,
    ShapeRange,
    capability_name,
    compute_capabilities,
)
from sdtrt.backends.tensorrt.versions.messages import explain
from sdtrt.backends.tensorrt.versions.network import Draft
from sdtrt.common import host
from sdtrt.common.errors import BuildError
from sdtrt.common.files import read_small_file
from sdtrt.specs import BuildSpec


def parse_onnx(library: Library, onnx: Path) -> Draft:
    """Read an ONNX file (external data beside it) into a network.

    Raises:
        BuildError: when the library can't read it, with the node, its operator and the reason.
    """
    trt = library.module
    mark = library.log.mark()
    try:
        builder = trt.Builder(library.logger)
    except TypeError as error:  # what pybind makes of a null pointer
        raise explain(library, library.log.errors(mark), "the TensorRT builder can't start") from error
    network = builder.create_network(_network_flags(library))
    parser = trt.OnnxParser(network, library.logger)
    if library.has("parser flags"):
        parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)  # norm statistics in fp32; needed for portable plans
    else:
        weak_typing.NEVER_FREED.append(parser)
    if not parser.parse_from_file(str(onnx)):
        problems = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = [_describe_problem(library, problem, onnx) for problem in problems] or library.log.errors(mark)
        raise BuildError(
            f"{library.name} can't read {onnx.name}: {'; '.join(reasons[:3]) or 'no reason given'}",
            hint=_parse_hint(library, onnx),
        )
    return Draft(library, builder, network, parser)


def _network_flags(library: Library) -> int:
    """Explicit batch on 8.6, where it must be asked for; strong typing wherever it exists (11 knows no other)."""
    trt = library.module
    if library.has("strong typing"):
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)


def _describe_problem(library: Library, problem: Any, onnx: Path) -> str:
    """One parse error: node, operator, reason. 8.6 knows the node's number only; the ONNX file has the rest."""
    if library.has("parser node names"):
        name, operator = problem.node_name(), problem.node_operator()
    else:
        name, operator = weak_typing.onnx_node(onnx, problem.node())
    node = f"node {name or problem.node()}" + (f" ({operator})" if operator else "")
    return f"{node}: {problem.desc()}"


def _parse_hint(library: Library, onnx: Path) -> str:
    """What may help against a parse error."""
    hint = "export it again: sdtrt export --force, or use --exporter torchscript"
    return hint if library.has("strong typing") else weak_typing.parse_hint(library, onnx) or hint


TIMINGS_BYTES = 2**28  # at most, of a timing cache


def configure(
    draft: Draft,
    spec: BuildSpec,
    profiles: Sequence[Mapping[str, ShapeRange]],
    fp32_nodes: Collection[str] = (),
) -> Any:
    """The builder's configuration for a build.

    Args:
        profiles: input name → range, one mapping a profile.
        fp32_nodes: the ONNX nodes that compute in fp32; a weakly typed fp16 network must be told.

    Raises:
        BuildError: for what this version can't do.
    """
    library, builder = draft.library, draft.builder
    trt = library.module
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector then tells precisions; runs as fast
    if spec.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_bytes)
    if spec.optimization_level is not None:
        config.builder_optimization_level = spec.optimization_level
    if spec.export.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and not what was asked for
    if spec.version_compatible:
        _make_version_compatible(library, config)
    if library.has("named compute capability"):
        _set_compute_capability(library, config, spec.compute_capability)
    if spec.export.precision == "bf16" and not library.has("bfloat16"):
        raise BuildError(f"{library.name} has no bf16", hint="use --precision fp16")
    if library.has("weak typing"):  # else the ONNX's own types say what is computed in which
        weak_typing.configure(draft, config, spec, fp32_nodes)
    for shapes in profiles:
        _add_profile(builder, config, shapes)
    return config


def _make_version_compatible(library: Library, config: Any) -> None:
    """Ask for a plan that later versions can load."""
    trt = library.module
    if not library.has("version-compatible plans"):
        raise BuildError(
            f"{library.name} has no version-compatible plans", hint="leave --version-compatible out, or use tensorrt"
        )
    config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)


def _set_compute_capability(library: Library, config: Any, wanted: tuple[int, int] | None) -> None:
    """Build for a named GPU generation, or for the GPU of this machine."""
    trt = library.module
    capability = wanted or (host.gpus()[0].compute_capability if host.gpus() else None)
    if capability is None:
        raise BuildError("there is no GPU to build for", hint="name one: --compute-capability 8.9")
    name = capability_name(capability)
    if name not in compute_capabilities(library):
        raise BuildError(
            f"{library.name} can't build for compute capability {capability[0]}.{capability[1]}",
            hint=f"it builds for {', '.join(compute_capabilities(library))}",
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)


def _add_profile(builder: Any, config: Any, shapes: Mapping[str, ShapeRange]) -> None:
    """Add one optimisation profile."""
    optimization = builder.create_optimization_profile()
    for name, (smallest, best, largest) in shapes.items():
        optimization.set_shape(name, smallest, best, largest)
    if config.add_optimization_profile(optimization) < 0:
        raise BuildError(f"TensorRT refuses the profile {dict(shapes)}", hint="check --batch, --height and --width")


def read_timing_cache(config: Any, file: Path | None) -> bool:
    """Start from the kernel timings of earlier builds; False where the file is another version's or GPU's.

    The cache is always attached, empty at worst, so that `timing_cache_bytes` has something to give.
    """
    timing = config.create_timing_cache(kept_timings(file) if file is not None else b"")
    fits = timing is not None and config.set_timing_cache(timing, False)
    if not fits:
        config.set_timing_cache(config.create_timing_cache(b""), False)
    return bool(fits)


def kept_timings(file: Path) -> bytes:
    """What earlier builds have kept; nothing where that can't be read, is no file, or reached through a link."""
    try:
        return read_small_file(file, TIMINGS_BYTES, follow=False)
    except OSError:
        return b""


def timing_cache_bytes(config: Any, kept: bytes = b"") -> bytes:
    """The kernel timings that a build has gathered, to be kept for the next one.

    Args:
        kept: timings that others have kept since; all are together then, but for those of another TensorRT or GPU.
    """
    timing = config.get_timing_cache()
    if timing is None:
        return b""
    others = config.create_timing_cache(kept) if kept else None
    if others is not None:
        timing.combine(others, False)
    return bytes(timing.serialize())


def watch_progress(library: Library, config: Any, show: Callable[[str], bool]) -> Any:
    """Call `show` with the builder's current step; the build stops when that returns False.

    Returns:
        The monitor, which must live as long as the build; None where this version has none (8.6).
    """
    if not library.has("progress monitor"):
        return None
    trt = library.module

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            show(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return show(f"{phase_name} {step + 1}/{self.steps.get(phase_name, step + 1)}")

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    monitor = Monitor()
    config.progress_monitor = monitor
    return monitor


def serialize(draft: Draft, config: Any) -> Any:
    """Build the plan: minutes.

    Returns:
        Its bytes, as an object with the buffer protocol.

    Raises:
        BuildError: when it fails, with TensorRT's last errors.
    """
    library, builder = draft.library, draft.builder
    mark = library.log.mark()
    plan = builder.build_serialized_network(draft.network, config)
    if plan is None:
        raise explain(library, library.log.errors(mark), f"{library.name} can't build the engine", BuildError)
    return plan

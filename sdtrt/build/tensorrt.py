"""ONNX → TensorRT plan: parse, build, then load it and run it against its ONNX before anyone may use it.

The build runs in a process of its own. TensorRT's builder is one C++ call of minutes, which 8.6 can't be asked to
leave: there, a process can be ended at once (Ctrl-C) and all its memory comes back; and should the builder crash, it
takes nothing with it. The parent sends the request through the child's stdin and keeps that open: when the parent
dies, however it dies, the child sees the end of stdin and goes too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sdtrt import errors, host, onnx_graph, trt_api
from sdtrt.build import group_norm, splitting
from sdtrt.components import CONDITIONING, Contract
from sdtrt.console import Console
from sdtrt.errors import BuildError, SdtrtError
from sdtrt.parts import VAE_HALVES
from sdtrt.runtime import TENSORRT_FILE
from sdtrt.runtime.pieces import Piece, list_file, piece_file, write_pieces
from sdtrt.specs import BuildSpec, ExportSpec, ModelSpec, Profile
from sdtrt.trt_api import Draft, Library

if TYPE_CHECKING:
    import torch

    from sdtrt.runtime.tensorrt import TensorRTSession

LOG_FILE = "build.log"
LAYERS_FILE = "layers.json"  # the engine inspector's words
SHOW_SECONDS = 0.2  # between two lines of progress
# What an engine may differ from its ONNX by, as relative L2 error: a wrong engine is far beyond, rounding far below.
# fp16: 0.007 was measured for Stable Diffusion 1.5's UNet on 8.6. fp32 is without TF32.
TOLERANCES = {"fp32": 1e-3, "fp16": 5e-2}

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Request:
    """What the building process needs to know."""

    onnx: Path
    folder: Path
    contract: Contract
    spec: BuildSpec
    timing_cache: Path | None
    verbose: bool

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the pipe."""
        paths = {name: str(getattr(self, name)) for name in ("onnx", "folder")}
        cache = None if self.timing_cache is None else str(self.timing_cache)
        spec = asdict(replace(self.spec, export=replace(self.spec.export, output=None)))
        contract = self.contract.to_json()
        return {**paths, "contract": contract, "spec": spec, "timing_cache": cache, "verbose": self.verbose}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Request:
        """The inverse of `to_json`."""
        spec, capability = data["spec"], data["spec"]["compute_capability"]
        export = ExportSpec(**spec["export"] | {"model": ModelSpec(**spec["export"]["model"])})
        profiles = tuple(Profile.from_json(profile) for profile in spec["profiles"])
        tuples = {"profiles": profiles, "compute_capability": capability and tuple(capability)}
        return cls(
            onnx=Path(data["onnx"]),
            folder=Path(data["folder"]),
            contract=Contract.from_json(data["contract"]),
            spec=BuildSpec(**spec | tuples | {"export": export}),
            timing_cache=data["timing_cache"] and Path(data["timing_cache"]),
            verbose=data["verbose"],
        )

    @property
    def plan(self) -> Path:
        """Where the plan goes."""
        return self.folder / TENSORRT_FILE

    @property
    def log(self) -> Path:
        """Where TensorRT's messages go."""
        return self.folder / LOG_FILE


def build_plan(
    onnx_path: Path,
    folder: Path,
    contract: Contract,
    spec: BuildSpec,
    *,
    timing_cache: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Build a plan into `folder/engine.plan`, TensorRT's messages into `folder/build.log`, and check the plan.

    Where attention is left to PyTorch these are several (`runtime.pieces`).

    Args:
        onnx_path: the exported ONNX model; external data lies beside it.
        folder: an entry's folder.
        contract: of the model.
        timing_cache: kernel timings of earlier builds, read and then replaced; None for none.

    Returns:
        What is known of the engine: `precision` (computing layers by precision, and where that was read), `parity`
        with the ONNX for each profile, `pieces` (how many plans), `unchecked` (why the engine was not run, else None),
        `plan_bytes` and `scratch_bytes` (what a session takes of the GPU's memory; the latter only where the engine
        was run), ...

    Raises:
        BuildError, EngineError: where it can't be built or is not right. `folder` is then to be thrown away.
    """
    request = Request(onnx_path.resolve(), folder.resolve(), contract, spec, timing_cache, console.verbose)
    check_request(request)
    sizes = "; ".join(map(contract.describe, spec.profiles))
    console.note(f"{spec.backend} {spec.export.precision} engine of the {contract.component} for {sizes}")
    with console.activity("building the engine") as show:
        return _build_in_child(request, console, show)


def check_request(request: Request) -> None:
    """Raise what can be known before any work: no GPU, a precision that the library lacks."""
    spec = request.spec
    library = trt_api.open_library(spec.backend)
    trt_api.require_builder(library)
    if spec.export.precision == "bf16" and not library.has("bfloat16"):
        raise BuildError(f"{library.name} has no bf16", hint="use --precision fp16")
    if spec.split_attention and not library.has("weak typing"):
        raise BuildError(
            f"{library.name} does not leave attention to PyTorch: only 8.6 gains by it",
            hint="leave --split-attention out",
        )
    if not library.has("named compute capability"):
        trt_api.require_gpu(library)


def _build_in_child(request: Request, console: Console, show: Callable[[str], None]) -> dict[str, Any]:
    """Run `serve` in a process of its own and follow it; end it whenever this function is left."""
    code = "from sdtrt.build.tensorrt import serve; serve()"
    paths = os.pathsep.join(path for path in sys.path if path)  # the child finds what this process finds
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    with (
        request.log.open("ab") as log,
        subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path[:] = [p for p in sys.path if p]; {code}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # a Ctrl-C at the terminal is for the parent to handle
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            _send(request, child.stdin)
            result = _follow(child.stdout, console, show)
        except SdtrtError:
            _keep_log(request.log, console)
            raise
        finally:
            child.kill()
    if result is None:
        _keep_log(request.log, console)
        raise _crash(child.returncode, request.log)
    return result


def _keep_log(log: Path, console: Console) -> None:
    """Save the log of a failed build from the folder that is about to go, and say where it is."""
    with suppress(OSError):  # a full disk may be why the build failed, and that is what is to be told
        with tempfile.NamedTemporaryFile("wb", prefix="sdtrt-build-", suffix=".log", delete=False) as kept:
            kept.write(log.read_bytes())
        console.warn(f"the build failed; TensorRT's log is in {kept.name}")


def _send(request: Request, pipe: IO[bytes]) -> None:
    """Give the child its request; a child that has died already tells why on its stderr."""
    try:
        pipe.write(json.dumps(request.to_json()).encode() + b"\n")
        pipe.flush()
    except BrokenPipeError:
        with suppress(BrokenPipeError):
            pipe.close()  # now: what is left in its buffer would fail again when `Popen` closes it


def _follow(pipe: IO[bytes], console: Console, show: Callable[[str], None]) -> dict[str, Any] | None:
    """Show what the child reports; returns its result, None if it ends without one."""
    for line in pipe:
        message = json.loads(line)
        if "show" in message:
            show(message["show"])
        elif "warn" in message:
            console.warn(message["warn"])
        elif "error" in message:
            raise getattr(errors, message["error"])(message["message"], hint=message["hint"])
        elif "bug" in message:
            raise RuntimeError(f"the build process failed:\n{message['bug']}")
        elif "result" in message:
            return dict(message["result"])
    return None


def _crash(code: int, log: Path) -> BuildError:
    """The error for a build process that ended without a word."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = " | ".join(lines[-3:])[-600:]
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    killed = " (the system ends processes that use too much memory this way)" if name == "SIGKILL" else ""
    return BuildError(
        f"TensorRT's builder died ({name}){killed}; its last words: {last or 'none'}",
        hint="try a lower --batch, --height or --optimization-level, or update TensorRT and the driver",
    )


# ------------------------------------------------------------------------------------------------- the child's side


def serve() -> None:
    """Read a request from stdin, build, and report in JSON lines on stdout. What libraries print goes to stderr."""
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lock = threading.Lock()

    def report(message: Mapping[str, Any]) -> None:
        with lock:
            reports.write(json.dumps(message) + "\n")

    try:
        request = Request.from_json(json.loads(sys.stdin.buffer.readline()))
        threading.Thread(target=_die_with_parent, daemon=True).start()
        report({"result": build_here(request, report)})
    except SdtrtError as error:
        report({"error": type(error).__name__, "message": error.message, "hint": error.hint})
    except Exception:
        report({"bug": traceback.format_exc()})
    reports.flush()
    os._exit(0)  # the result is out: no tidying by TensorRT's and CUDA's destructors, which crash at times


def _die_with_parent() -> None:
    """End this process when stdin ends: the parent is gone."""
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(1)


def build_here(request: Request, report: Report) -> dict[str, Any]:
    """Build and check a plan in this process."""
    library = trt_api.open_library(request.spec.backend)
    with request.log.open("a") as file, library.log.copied_to(file, verbose=request.verbose):
        info = _build(library, request, report)
        report({"show": "checking"})
        start = time.perf_counter()
        info |= _check(library, request, report, info["precision"])
        return info | {"check_seconds": round(time.perf_counter() - start, 3)}


def _build(library: Library, request: Request, report: Report) -> dict[str, Any]:
    """Parse and build; write the plan files and the timing cache. The builder's memory is free again after this."""
    report({"show": "reading the ONNX"})
    list_file(request.plan).unlink(missing_ok=True)  # of an earlier build, in a folder that is kept
    with tempfile.TemporaryDirectory(prefix=".pieces-", dir=request.folder) as folder:
        sources = _sources(request, Path(folder), report)
        measured = [_build_piece(library, request, source, report) for source in sources]
    if len(sources) > 1:
        write_pieces(request.plan, [source.piece for source in sources])
    return {
        "library": library.name,
        "profiles": [str(profile) for profile in request.spec.profiles],
        "pieces": len(sources),
        "plan_bytes": sum(source.piece.plan.stat().st_size for source in sources),
        "build_seconds": round(sum(seconds for seconds, _ in measured), 3),
        "precision": measured[0][1],
    }


@dataclass(frozen=True)
class _Source:
    """One piece of an engine, or the whole, and the ONNX that it is built from."""

    onnx: Path
    piece: Piece


def _sources(request: Request, folder: Path, report: Report) -> tuple[_Source, ...]:
    """What to build: the exported model, or its parts between attentions that are PyTorch's, written to a folder."""
    whole = (_Source(request.onnx, Piece(request.plan, request.contract)),)
    tokens, asked = trt_api.split_tokens(request.spec), bool(request.spec.split_attention)
    if not tokens:
        return whole
    model, weights = onnx_graph.load_split(request.onnx)
    splitting.freeze(model, weights, request.contract.input_shapes(request.spec.profiles[0].optimum))
    facts = splitting.Facts(model, weights)
    attentions = splitting.choose(splitting.find_attentions(facts), tokens)
    if not attentions:
        if asked:
            report({"warn": f"no self-attention is of {tokens} tokens or more: none is left to PyTorch"})
        return whole
    try:
        parts = list(splitting.split(model, weights, facts, attentions, CONDITIONING))
        splitting.check_fixed(parts)
    except ValueError as error:
        if asked:
            raise BuildError(str(error), hint="leave attention to TensorRT: --split-attention 0") from error
        report({"warn": f"attention is left to TensorRT, which is slower here: {error}"})
        return whole
    found: list[_Source] = []
    while parts:  # one at a time: saving a part copies its weights
        part, number = parts.pop(0), len(found)
        onnx = folder / f"{number}.onnx"
        onnx_graph.save(part.model, part.weights, onnx)
        contract = Contract(request.contract.component, request.contract.precision, part.inputs, part.outputs)
        found.append(_Source(onnx, Piece(piece_file(request.plan, number), contract, part.attentions)))
    return tuple(found)


def _build_piece(
    library: Library, request: Request, source: _Source, report: Report
) -> tuple[float, Mapping[str, Any]]:
    """Build one plan; the seconds that took, and what is known of its precision."""
    spec, contract = request.spec, source.piece.contract
    draft = _parse(library, request, source.onnx)
    _check_inputs(draft, contract)
    shapes = [contract.profile_shapes(profile) for profile in spec.profiles]
    precisions = _fp32_nodes(draft, request, source.onnx), _fp16_nodes(draft, request, source.onnx)
    config = trt_api.configure(draft, spec, shapes, *precisions)
    for warning in draft.warnings:
        report({"warn": warning})
    if not trt_api.read_timing_cache(config, request.timing_cache):
        report({"warn": f"{request.timing_cache} is of another TensorRT or GPU: starting a new timing cache"})
    report({"show": "optimising"})  # all that 8.6 tells until it is done
    monitor = trt_api.watch_progress(library, config, _throttled(report))
    start = time.perf_counter()
    plan = trt_api.serialize(draft, config)
    seconds = time.perf_counter() - start
    del monitor
    with source.piece.plan.open("wb") as file:
        file.write(plan)
    _keep_timings(request.timing_cache, trt_api.timing_cache_bytes(config))
    return seconds, _network_precision(draft)


def _parse(library: Library, request: Request, onnx: Path) -> Draft:
    """The network of an ONNX; on 8.6 with group normalisations by its plugin, where that is asked for and serves."""
    spec = request.spec
    fits = all(profile.batch.max <= group_norm.MAX_BATCH for profile in spec.profiles)
    wanted = spec.norm_plugins and spec.export.precision == "fp16" and not spec.version_compatible
    if not (wanted and fits) or not trt_api.has_plugin(library, group_norm.OPERATOR):
        return trt_api.parse_onnx(library, onnx)
    model, weights = onnx_graph.load_split(onnx)
    if group_norm.use_plugin(model, weights) == 0:
        return trt_api.parse_onnx(library, onnx)
    with tempfile.TemporaryDirectory(prefix=".plugins-", dir=request.folder) as folder:
        changed = Path(folder) / onnx.name
        onnx_graph.save(model, weights, changed)
        del model, weights
        return trt_api.parse_onnx(library, changed)  # the network has its own copy of the weights then


def _fp32_nodes(draft: Draft, request: Request, onnx: Path) -> frozenset[str]:
    """The ONNX's nodes that compute in fp32, where the network's types don't say so by themselves."""
    if draft.library.has("strong typing") or request.spec.export.precision == "fp32":
        return frozenset()
    return onnx_graph.float32_nodes(onnx)


def _fp16_nodes(draft: Draft, request: Request, onnx: Path) -> frozenset[str]:
    """The ONNX's nodes that a weakly typed network must not take from memory, and give to it, in fp32.

    They are the ends of a VAE's group normalisations. Left to itself, 8.6 read and wrote the largest, 256 channels of
    512x512 pixels, in fp32: more than half of all memory that decoding took. Statistics are in fp32 all the same.
    """
    if draft.library.has("strong typing") or request.contract.component not in VAE_HALVES:
        return frozenset()
    return group_norm.ends(*onnx_graph.load_split(onnx))


def _throttled(report: Report) -> Callable[[str], bool]:
    """Report the builder's steps, at most a few a second. Never asks it to stop: the parent ends the process."""
    last = 0.0

    def show(text: str) -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last >= SHOW_SECONDS:
            last = now
            report({"show": text})
        return True

    return show


def _check_inputs(draft: Draft, contract: Contract) -> None:
    """Hold the network's inputs against the contract."""
    wanted = {spec.name: spec.dtype for spec in contract.inputs}
    found = trt_api.network_inputs(draft)
    if found != wanted:
        raise BuildError(f"the ONNX takes {found}, and not {wanted}", hint="export it again: sdtrt export --force")


def _network_precision(draft: Draft) -> dict[str, Any]:
    """What a strongly typed network computes in; nothing is known of a weakly typed one before it is built."""
    if not draft.library.has("strong typing"):
        return {}
    return {"layers": trt_api.network_precisions(draft), "read_from": "network"}


def _keep_timings(file: Path | None, data: bytes) -> None:
    """Replace the timing cache in one step; one that can't be written costs time, nothing else."""
    if file is None or not data:
        return
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        draft.write_bytes(data)
        draft.replace(file)
    except OSError:
        draft.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------- checking


def why_not_runnable(library: Library, spec: BuildSpec) -> str | None:
    """Why an engine that was built here can't be run here; None if it can."""
    gpus = host.gpus()
    if not gpus:
        return "there is no NVIDIA GPU here"
    target, here = spec.compute_capability, gpus[0].compute_capability
    if target is not None and target != here:
        return f"it is for compute capability {target[0]}.{target[1]}, and this GPU has {here[0]}.{here[1]}"
    if not trt_api.serves(library, here):
        return f"{library.name} does not serve {gpus[0].name}"
    return None


def _check(library: Library, request: Request, report: Report, precision: Mapping[str, Any]) -> dict[str, Any]:
    """Load the plan, read its precision back, run it once at each profile's optimum against the ONNX."""
    reason = why_not_runnable(library, request.spec)
    if reason is not None:
        report({"warn": f"the engine was built but not run: {reason}"})
        check_precision(request.spec, precision.get("layers", {}))
        return {"unchecked": reason, "parity": []}
    from sdtrt.runtime.tensorrt import TensorRTSession

    spec, device = request.spec, _current_gpu()
    compatible = spec.version_compatible
    with TensorRTSession(
        request.plan, request.contract, backend=spec.backend, device=device, allow_host_code=compatible
    ) as session:
        parity = [_run_once(request, session, profile) for profile in spec.profiles]
        layers = _read_precision(request, session.information())
        scratch = session.scratch_bytes
    if spec.export.precision == "bf16":
        report({"warn": "the engine runs, but ONNX Runtime's CPU kernels have no bf16 to compare it with"})
    found = {"layers": layers, "read_from": "inspector"}
    return {"unchecked": None, "parity": parity, "precision": found, "scratch_bytes": scratch}


def _current_gpu() -> torch.device:
    import torch

    return torch.device("cuda")


def _read_precision(request: Request, information: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many computing layers of the built engine have each precision; the inspector's words are kept in a file.

    Each piece must compute in what was asked for.
    """
    told = information[0] if len(information) == 1 else information
    (request.folder / LAYERS_FILE).write_text(json.dumps(told, indent=1))
    layers = [trt_api.layer_precisions(one) for one in information]
    for found in layers:
        check_precision(request.spec, found)
    return dict(sum(map(Counter, layers), Counter()))


def check_precision(spec: BuildSpec, layers: Mapping[str, int]) -> None:
    """Raise `BuildError` for an engine that does not compute in what it was built for.

    fp16 quietly becoming fp32 is a known failure elsewhere; this is what finds it.
    """
    wanted, found = spec.export.precision, ", ".join(f"{count} {name}" for name, count in sorted(layers.items()))
    if not layers.get(wanted) or (wanted == "fp32" and any(layers.get(name) for name in ("fp16", "bf16"))):
        raise BuildError(
            f"an engine in {wanted} was asked for, and its computing layers are: {found or 'unknown'}",
            hint=f"export it again: sdtrt export --precision {wanted} --force",
        )


def _run_once(request: Request, session: TensorRTSession, profile: Profile) -> dict[str, Any]:
    """Run the engine on seeded inputs and compare with ONNX Runtime on the CPU."""
    from sdtrt.build.onnxruntime import seeded_feeds

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
    from sdtrt.metrics import cosine, max_abs, relative_l2
    from sdtrt.runtime.onnxruntime import OnnxRuntimeSession

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

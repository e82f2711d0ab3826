"""ONNX → TensorRT plan, in a process of its own (`worker`): what is asked of it, and what it tells.

TensorRT's builder is one C++ call of minutes, which 8.6 can't be asked to
leave: there, a process can be ended at once (Ctrl-C) and all its memory comes back; and should the builder crash, it
takes nothing with it. How the two processes talk is of `backends.child`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from sdtrt.backends.child import crash, run_worker
from sdtrt.backends.tensorrt.plan import TENSORRT_FILE
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.backends.tensorrt.versions.messages import OUT_OF_MEMORY
from sdtrt.common.console import Console
from sdtrt.common.errors import BuildError, SdtrtError
from sdtrt.specs import QUANTISED, BuildSpec, ExportSpec, Profile
from sdtrt.specs.contract import Contract

LOG_FILE = "build.log"
WORKER = "sdtrt.backends.tensorrt.worker"  # the module that a child serves by


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
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        spec, capability = data["spec"], data["spec"]["compute_capability"]
        export = ExportSpec.from_json(spec["export"])
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

    Args:
        onnx_path: the exported ONNX model; external data lies beside it.
        folder: an entry's folder.
        contract: of the model.
        timing_cache: kernel timings of earlier builds, read and then added to; None for none.

    Returns:
        What is known of the engine: `precision` (computing layers by precision, and where that was read), `parity`
        with the ONNX for each profile, `pieces` (how many plans: 1), `build_seconds`, `unchecked` (why the engine was
        not run, else None), `plan_bytes` and `scratch_bytes` (what a session takes of the GPU's memory; the latter only
        where the engine was run), ...

    Raises:
        BuildError, EngineError: where it can't be built or is not right. `folder` is then to be thrown away.
    """
    request = Request(onnx_path.resolve(), folder.resolve(), contract, spec, timing_cache, console.verbose)
    check_request(request)
    announce(request, console)
    with console.activity("building the engine") as show:
        return build_in_child(request, console, show)


def announce(request: Request, console: Console) -> None:
    """Say what is going to be built."""
    spec, contract = request.spec, request.contract
    sizes = "; ".join(map(contract.describe, spec.profiles))
    console.note(f"{spec.backend} {spec.export.precision} engine of the {contract.component} for {sizes}")


def check_request(request: Request) -> None:
    """Raise what can be known before any work: no GPU, a precision that the library lacks."""
    spec = request.spec
    library = libraries.open_library(spec.backend)
    libraries.require_builder(library)
    if spec.export.precision in ("bf16", *QUANTISED) and not library.has("bfloat16"):
        raise BuildError(f"{library.name} has no bf16", hint="use --precision fp16")
    if not library.has("named compute capability"):
        libraries.require_gpu(library)


def build_in_child(
    request: Request, console: Console, show: Callable[[str], None], worker: str = WORKER
) -> dict[str, Any]:
    """Build in a process of its own, and tell the console what that tells.

    Args:
        show: gets what the process does just now.
        worker: the module that serves there.

    Raises:
        SdtrtError: the process's own. The log is kept then, and the console told where.
    """

    def report(message: Mapping[str, Any]) -> None:
        show(message["show"]) if "show" in message else console.warn(message["warn"])

    try:
        return run_worker(request, report, worker=worker, crashed=crashed)
    except SdtrtError:
        _keep_log(request.log, console)
        raise


def _keep_log(log: Path, console: Console) -> None:
    """Save the log of a failed build from the folder that is about to go, and say where it is."""
    with suppress(OSError):  # a full disk may be why the build failed, and that is what is to be told
        with tempfile.NamedTemporaryFile("wb", prefix="sdtrt-build-", suffix=".log", delete=False) as kept:
            for file in sorted(log.parent.glob(f"{log.name}*")):  # and of pieces, where nobody was left to join them
                kept.write(file.read_bytes())
        console.warn(f"the build failed; TensorRT's log is in {kept.name}")


def crashed(code: int, log: Path) -> BuildError:
    """The error for a build process that ended without a word."""
    return crash(
        code,
        log,
        who="TensorRT's builder",
        hint="try a lower --batch, --height or --optimization-level, or update TensorRT and the driver",
        out_of_memory=rf"{OUT_OF_MEMORY}|bad_alloc",
    )

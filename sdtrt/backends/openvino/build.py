"""ONNX → a model compiled by OpenVINO for one processor and one range of sizes, saved, and checked against its ONNX."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrt.backends import checking
from sdtrt.backends.checking import Reference
from sdtrt.backends.openvino import library
from sdtrt.backends.openvino.compiling import compile_to_file
from sdtrt.backends.openvino.session import OPENVINO_FILE, OpenVinoSession
from sdtrt.common.console import Console
from sdtrt.common.errors import BuildError, EngineError
from sdtrt.exports.onnx_run import load_model, run_model
from sdtrt.exports.parity import runnable
from sdtrt.specs import Precision, Profile, Sizes
from sdtrt.specs.contract import Contract

if TYPE_CHECKING:
    import torch

# Largest relative L2 error against the ONNX in fp32: sums are added in another order, fp16 has 11 bits, bf16 8.
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
MARGIN_BYTES = 2**20  # where not even so much can be written, the disk is taken to be full
REPORT = "use --backend onnxruntime, and report this model and your openvino version"


def build(source: Path, folder: Path, contract: Contract, profile: Profile, console: Console) -> dict[str, Any]:
    """Write `folder/engine.blob`, compiled for this machine's processor, and check it.

    Args:
        source: the exported ONNX model.
        folder: an entry's folder.
        contract: of the model.
        profile: the sizes that the engine is to take.

    Returns:
        What was measured: `parity` with the ONNX at each size that was checked, and `step_ms` at the profile's optimum,
        `step_sizes`.

    Raises:
        BuildError: where OpenVINO can't compile or run it, or the result differs from the original.
        OSError: where the disk is full.
    """
    target = folder / OPENVINO_FILE
    try:
        with console.stage(f"compiling with OpenVINO for {contract.describe(profile)}"):
            compile_model(source, target, contract, profile)
        with console.stage("checking the engine against its ONNX"):
            return _check(source, target, contract, profile)
    except MemoryError as error:
        raise BuildError(
            f"too little memory to compile {source}", hint="end other programs, or build for a smaller size"
        ) from error
    except EngineError as error:  # its hint names the draft, which is gone by then
        require_room(target)
        raise BuildError(f"the compiled model can't be used: {error.message}", hint=REPORT) from error


def require_room(file: Path) -> None:
    """Raise `OSError` where nothing more can be written to a file: OpenVINO leaves a part of one, and says nothing."""
    with file.open("ab") as stream:
        stream.write(bytes(MARGIN_BYTES))
        stream.flush()
        os.fsync(stream.fileno())


def compile_model(source: Path, target: Path, contract: Contract, profile: Profile) -> None:
    """Compile a model for a range of sizes and save it, with its weights, in one file.

    Raises:
        BuildError, MemoryError: where it can't be compiled.
    """
    import torch

    settings = library.settings(torch.get_num_threads())
    try:
        with tempfile.TemporaryDirectory(prefix=".plain-", dir=target.parent) as place:
            plain = Path(place) / "model.xml"
            model = library.core().read_model(str(source))
            model.reshape(_shapes(model, contract, profile))
            library.load().save_model(model, str(plain), compress_to_fp16=False)
            del model
            compile_to_file(plain, target, library.device(), settings)
    except OSError:
        raise
    except Exception as error:  # OpenVINO's are RuntimeErrors without a type of their own
        if library.is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        require_room(target)
        reason, hint = library.reason_of(error), library.mend_of(error, source)
        raise BuildError(f"OpenVINO can't compile {source}: {reason}", hint=hint) from error


def _shapes(model: Any, contract: Contract, profile: Profile) -> dict[Any, Any]:
    """The shape of each input of a model: fixed where the profile has one value, and a range where it has several."""
    openvino, shapes = library.load(), {}
    bounds = contract.profile_shapes(profile)
    for port in model.inputs:
        low, _, high = next(shape for name, shape in bounds.items() if name in port.names)
        dims = [openvino.Dimension(*pair) for pair in zip(low, high, strict=True)]
        shapes[port] = openvino.PartialShape(dims)
    return shapes


def _check(source: Path, target: Path, contract: Contract, profile: Profile) -> dict[str, Any]:
    """Compare the engine with its ONNX, at the ends of its profile and the optimum, and measure a step.

    The ONNX runs first and is closed: no memory holds the weights twice.
    """
    sizes = list(dict.fromkeys((profile.optimum, profile.minimum, profile.maximum)))
    reference = _reference(source, contract, sizes)
    with OpenVinoSession(target, contract) as session:
        parity = [checking.run_once(contract, session, one, reference) for one in sizes]
        return {"parity": parity, **checking.measure_step(contract, session, profile.optimum)}


def _reference(source: Path, contract: Contract, sizes: list[Sizes]) -> Reference:
    """What ONNX Runtime computes of the ONNX in fp32, at some sizes, with seeded inputs."""
    import torch

    from sdtrt.exports.feeds import seeded_feeds

    names = [spec.name for spec in contract.outputs]
    with runnable(source, contract) as (path, dtypes):
        session = load_model(path, as_it_is=False, threads=torch.get_num_threads())
        known: dict[tuple[tuple[int, ...], ...], Mapping[str, torch.Tensor]] = {}
        for one in sizes:
            feeds = seeded_feeds(contract, one)
            given = {name: tensor.to(getattr(torch, dtypes[name])) for name, tensor in feeds.items()}
            known[_shape_key(feeds)] = run_model(session, path, given, names)
        del session
    return Reference("its ONNX", lambda feeds: known[_shape_key(feeds)], TOLERANCES[contract.precision], REPORT)


def _shape_key(feeds: Mapping[str, torch.Tensor]) -> tuple[tuple[int, ...], ...]:
    """What tells the inputs of one size from those of another."""
    return tuple(tuple(tensor.shape) for tensor in feeds.values())

"""Component → ONNX: written by either PyTorch exporter, made plain, checked, and only then published."""

from __future__ import annotations

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import onnx
import torch

from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import ExportError
from sdtrt.common.files import sha256_file
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.engines.keys import Sight, export_key, steadily
from sdtrt.exports import onnx_file, onnx_simplify
from sdtrt.exports.calibration import check_calibration, largest_inputs
from sdtrt.exports.fp16_recipe import WIDE_LAYERS
from sdtrt.exports.onnx_file import Weights
from sdtrt.exports.parity import ParityReport, check_onnx
from sdtrt.exports.quantised import layers_to_quantise
from sdtrt.exports.quantised_graph import add_pairs
from sdtrt.exports.tracing import component_call, example_inputs, traceable
from sdtrt.models.components import contract_of, load_component, part_of
from sdtrt.models.live import weights_digest
from sdtrt.models.source import ModelSource
from sdtrt.specs import QUANTISED, SIZE_MULTIPLE, Exporter, ExportSpec
from sdtrt.specs.contract import IMAGE_HEIGHT, IMAGE_WIDTH, LATENT_HEIGHT, LATENT_WIDTH, Contract

FILE_NAME = "model.onnx"
OTHER: dict[Exporter, Exporter] = {"torchscript": "dynamo", "dynamo": "torchscript"}


def export_component(
    model: ModelSource, spec: ExportSpec, directory: EngineDirectory, console: Console = QUIET
) -> Entry:
    """Find or make the ONNX export of a component.

    Returns:
        The entry of kind `onnx`: `model.onnx`, with `model.onnx.data` beside it where the weights take 2 GiB or more.
        Its `info` has the contract, the parity report, and the versions that made it.

    Raises:
        ExportError: the component can't be exported, or the graph does not compute what the component computes.
    """
    return steadily(partial(_obtain, model, spec, directory, console), console)


def _obtain(model: ModelSource, spec: ExportSpec, directory: EngineDirectory, console: Console) -> Entry:
    """One attempt of `export_component`. Raises `ModelChangedError` where the key is not of what was read."""
    sight = Sight(model, (part_of(spec.component),))
    key = export_key(model, spec, directory.file_digest).to_json()

    def make(folder: Path) -> Mapping[str, Any]:
        with sight.steady():  # from the fingerprint, and not from here: others' locks may have been waited for
            return _make(model, spec, console, folder)

    return directory.obtain("onnx", key, make, console, force=spec.force)


def _make(
    model: ModelSource, spec: ExportSpec, console: Console, folder: Path, *, name: str = FILE_NAME
) -> Mapping[str, Any]:
    """Write and check `folder/name`; returns what is known of it."""
    start = time.perf_counter()
    contract = contract_of(model, spec.component, spec.precision, spec.groups)
    path = folder / name
    if spec.precision in QUANTISED:
        check_calibration(model, spec.groups, spec.precision)
    with console.stage(f"loading {spec.component}"):
        module = load_component(model, spec.component, getattr(torch, contract.outputs[0].dtype))
    largest = _calibrate(model, spec, module, console)
    how: dict[str, Any] = {"exporter": spec.exporter, "opset": spec.resolved_opset, "largest": largest}
    write_onnx(module, contract, path, **how, console=console)
    parity = check_onnx(path, module, contract, console=console)
    digest = {"weights_digest": weights_digest(module, spec.component, spec.precision)}
    return _info(model, contract, path, parity) | digest | {"seconds": round(time.perf_counter() - start, 3)}


def _calibrate(model: ModelSource, spec: ExportSpec, module: torch.nn.Module, console: Console) -> dict[str, float]:
    """How large the inputs get of those layers that are to compute in 8 bits; of no layer in other precisions."""
    if spec.precision not in QUANTISED:
        return {}
    layers = layers_to_quantise(module, spec.calibration.kept)
    return largest_inputs(model, module, layers, spec.calibration, console)


def _info(model: ModelSource, contract: Contract, path: Path, parity: ParityReport) -> dict[str, Any]:
    return {
        "contract": contract.to_json(),
        "model": model.spec.name,
        "parity": parity.to_json(),
        "sha256": {file.name: sha256_file(file) for file in sorted(path.parent.iterdir())},
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def write_onnx(
    module: torch.nn.Module,
    contract: Contract,
    path: Path,
    *,
    exporter: Exporter = "torchscript",
    opset: int = 17,
    wide_layers: int = WIDE_LAYERS,
    largest: Mapping[str, float] | None = None,
    console: Console = QUIET,
) -> None:
    """Write a component as ONNX. The same module gives the same bytes each time.

    Args:
        module: the part of the model that the component is of, on the CPU, in the contract's precision.
        contract: names, dtypes and axes of the graph.
        path: the file to write; where protobuf's 2 GiB limit asks for it, also that name + `.data`.
        wide_layers: of how many layers an fp16 UNet's convolutions compute in fp32 (see `fp16_recipe`).
        largest: by the names of those layers that are to compute in 8 bits: how large their inputs get.

    Raises:
        ExportError: the module's weights are not finite, or the exporter fails.
    """
    _check_weights(module, contract)
    with (
        console.stage(f"exporting {contract.component} as {contract.precision} ONNX ({exporter}, opset {opset})"),
        tempfile.TemporaryDirectory(prefix=".raw-", dir=path.parent) as folder,
    ):
        raw = Path(folder) / FILE_NAME
        model, weights = _trace(module, contract, raw, exporter, opset, wide_layers)
        onnx_simplify.simplify(model, weights)
        if largest:
            add_pairs(model, weights, largest, contract.precision)
        onnx_file.apply_contract(model, contract, metadata(contract))
        onnx_file.save(model, weights, path)


def metadata(contract: Contract) -> dict[str, str]:
    """What an ONNX file says of itself (`metadata_props`)."""
    return {
        "sdtrt.component": contract.component,
        "sdtrt.precision": contract.precision,
        "sdtrt.contract": json.dumps(contract.to_json(), sort_keys=True, separators=(",", ":")),
    }


def _check_weights(module: torch.nn.Module, contract: Contract) -> None:
    """Refuse weights that are not in the contract's dtype, or not finite (an fp32 checkpoint that overflows fp16)."""
    dtype = getattr(torch, contract.outputs[0].dtype)
    for name, parameter in module.named_parameters():
        if parameter.dtype != dtype or parameter.device.type != "cpu":
            raise ValueError(f"{name} is {parameter.dtype} on {parameter.device}, not {dtype} on the CPU")
        if not torch.isfinite(parameter.detach().sum(dtype=torch.float64)):
            raise ExportError(
                f"the weight {name} has infinite or NaN values in {contract.precision}",
                hint="use --precision fp32; if that fails too, the model's weights are damaged: download it again",
            )


def _trace(
    module: torch.nn.Module, contract: Contract, path: Path, exporter: Exporter, opset: int, wide_layers: int
) -> tuple[onnx.ModelProto, Weights]:
    """The raw graph, as one of PyTorch's exporters writes it; `path` is a temporary file."""
    call = component_call(module, contract).eval()
    write = _torchscript if exporter == "torchscript" else _dynamo
    try:
        with traceable(module, wide_layers=wide_layers), _silenced(), torch.no_grad():
            return write(call, contract, path, opset)
    except (MemoryError, OSError):
        raise
    except Exception as error:
        raise ExportError(
            f"the {exporter} exporter failed: {_root_cause(error)}", hint=f"try --exporter {OTHER[exporter]}"
        ) from error


def _torchscript(call: torch.nn.Module, contract: Contract, path: Path, opset: int) -> tuple[onnx.ModelProto, Weights]:
    """The graph alone by the exporter, the weights straight from the module: none is copied, all keep their names."""
    torch.onnx.export(
        call,
        example_inputs(contract),
        str(path),
        dynamo=False,
        export_params=False,
        do_constant_folding=False,
        opset_version=opset,
        input_names=[spec.name for spec in contract.inputs],
        output_names=[spec.name for spec in contract.outputs],
        dynamic_axes=contract.dynamic_axes,
    )
    model, weights = onnx_file.load_split(path)
    onnx_file.attach(model, weights, {name: _array(parameter) for name, parameter in call.named_parameters()})
    return model, weights


def _array(parameter: torch.Tensor) -> tuple[tuple[int, ...], npt.NDArray[np.uint8]]:
    """A parameter's shape and bytes, not copied."""
    return tuple(parameter.shape), parameter.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _dynamo(call: torch.nn.Module, contract: Contract, path: Path, opset: int) -> tuple[onnx.ModelProto, Weights]:
    import onnxscript.optimizer  # a fifth of a second, which every picture would pay for

    dims = _dimensions(contract)
    program = torch.onnx.export(
        call,
        example_inputs(contract),
        dynamo=True,
        opset_version=opset,
        input_names=[spec.name for spec in contract.inputs],
        output_names=[spec.name for spec in contract.outputs],
        dynamic_shapes=tuple({axis: dims[dim] for axis, dim in spec.dynamic_axes.items()} for spec in contract.inputs),
        optimize=False,  # most of the time would go there; `simplify` does what the rest of it does
        verbose=False,
    )
    # Resolves sequences of tensors, which `simplify` does not know. Kept off the weights: it would lose their names.
    onnxscript.optimizer.fold_constants(
        program.model, should_fold=lambda node: False if node.op_type in ("Transpose", "Cast") else None
    )
    program.save(path, external_data=True)
    return onnx_file.load_split(path)


def _dimensions(contract: Contract) -> dict[str, Any]:
    """Dimension name → what `torch.export` knows it as: an image's sides are multiples of its latents'."""
    names = {name for spec in contract.inputs for name in spec.dynamic_axes.values()}
    sides = {IMAGE_HEIGHT: LATENT_HEIGHT, IMAGE_WIDTH: LATENT_WIDTH}
    dims = {name: torch.export.Dim(name, min=1) for name in sorted(sides.get(name, name) for name in names)}
    return dims | {name: SIZE_MULTIPLE * dims[side] for name, side in sides.items() if name in names}


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep back what the exporters say to developers: that a trace keeps branches (those are dealt with, and the result
    is checked), that an exporter is old, that torchvision is missing, that axes share a name."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.onnx\.")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _root_cause(error: BaseException) -> str:
    """The first line of the first error in a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__

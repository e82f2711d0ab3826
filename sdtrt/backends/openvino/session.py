"""Sessions on OpenVINO: a compiled model, mapped from its file, that takes and gives torch tensors on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdtrt.backends.gradients import refuse_gradients
from sdtrt.backends.openvino import library
from sdtrt.backends.openvino.mapped import MappedModel
from sdtrt.backends.session import Session, check_tensors, shapes_of
from sdtrt.common.errors import EngineError
from sdtrt.specs.contract import Contract, TensorSpec

OPENVINO_FILE = "engine.blob"


class OpenVinoSession(Session[torch.Tensor]):
    """Runs a compiled model on the CPU.

    Args:
        model: the file that a compiled model was exported to.
        contract: its inputs and outputs; tensors are on the CPU.
        threads: None for as many as PyTorch uses (`OMP_NUM_THREADS` says how many).

    Raises:
        EngineError: where OpenVINO can't load the file, or there is too little memory for it.
    """

    def __init__(self, model: Path, contract: Contract, *, threads: int | None = None) -> None:
        self.contract = contract
        self._model = model
        settings = library.settings(threads or torch.get_num_threads())
        self._request, self._mapped = _open(model, settings)
        ports = self._request.model_inputs
        self._ports = {spec.name: _port(ports, spec) for spec in contract.inputs}
        self._results = {spec.name: _port(self._request.model_outputs, spec) for spec in contract.outputs}

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the engine on CPU tensors; the outputs are new tensors.

        Raises:
            EngineError: for inputs that don't fit the contract or the engine's sizes, a closed session, or a model
                that fails.
            MemoryError: where they need more memory than there is.
        """
        if self._request is None:
            raise EngineError("the session is closed", hint="open a new one")
        refuse_gradients(self.contract.component, feeds)
        check_tensors(self.inputs, feeds)
        self._check_sizes(feeds)
        kept = {name: tensor.detach().contiguous() for name, tensor in feeds.items()}  # the request has addresses only
        try:
            for name, tensor in kept.items():
                self._request.set_tensor(self._ports[name], _given(tensor))
            self._request.infer()
        except Exception as error:  # OpenVINO's are RuntimeErrors without a type of their own
            raise self._failure(error, feeds) from error
        return {spec.name: self._result(spec) for spec in self.outputs}

    def _check_sizes(self, feeds: Mapping[str, torch.Tensor]) -> None:
        """Raise `EngineError` for a size that the engine was not compiled for."""
        for name, tensor in feeds.items():
            shape = self._ports[name].get_partial_shape()
            if not all(
                dim.get_min_length() <= size <= _most(dim) for dim, size in zip(shape, tensor.shape, strict=True)
            ):
                raise EngineError(
                    f"the engine takes {name} of {shape}, got {list(tensor.shape)}",
                    hint="build an engine for this size: sdtrt build --height --width --batch",
                )

    def _result(self, spec: TensorSpec) -> torch.Tensor:
        """A copy of one output: the next run writes into the same memory."""
        found = self._request.get_tensor(self._results[spec.name])
        raw = np.array(found.data, copy=True).reshape(-1).view(np.uint8)
        return torch.from_numpy(raw).view(getattr(torch, spec.dtype)).reshape(tuple(found.shape))

    def _failure(self, error: Exception, feeds: Mapping[str, torch.Tensor]) -> Exception:
        """The error for a run that failed."""
        shapes = shapes_of(feeds)
        if library.is_out_of_memory(error):
            return MemoryError(f"OpenVINO has too little memory at {shapes}")
        return EngineError(
            f"OpenVINO failed at {shapes}: {library.reason_of(error)}", hint=library.mend_of(error, self._model)
        )

    def close(self) -> None:
        """Free the model."""
        self._request = None
        self._ports, self._results = {}, {}
        self._mapped = None
        self.let_go()


def _open(model: Path, settings: Mapping[str, str]) -> tuple[Any, MappedModel | None]:
    """A request of a compiled model, and its file, which must stay mapped as long as there is the request.

    Weights are held once, as OpenVINO lays them out.
    """
    try:
        mapped = MappedModel(model)
        with mapped.read_once():
            compiled = library.core().import_model(mapped.tensor, library.device(), settings)
            return compiled.create_infer_request(), mapped
    except Exception as error:
        raise library.load_error(error, model) from error


def _port(ports: Any, spec: TensorSpec) -> Any:
    """The input or output of a name. Raises `EngineError` where there is none."""
    for port in ports:
        if spec.name in port.names:
            return port
    raise EngineError(f"the engine has no {spec.name}", hint="build it again: sdtrt build --force")


def _most(dim: Any) -> int:
    """The largest value of a dimension; a huge one where there is no bound."""
    most: int = dim.get_max_length()
    return most if most >= 0 else 2**62


def _given(tensor: torch.Tensor) -> Any:
    """A tensor as OpenVINO takes it: the same memory. NumPy has no bf16, so its bits pass as those of integers."""
    openvino = library.load()
    if tensor.dtype == torch.bfloat16:
        return openvino.Tensor(tensor.view(torch.uint16).numpy(), list(tensor.shape), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)

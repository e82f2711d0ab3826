"""Sessions on ONNX Runtime's CPU provider: torch tensors in and out, no copies of contiguous memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from sdtrt.components import Contract
from sdtrt.errors import EngineError
from sdtrt.runtime.session import Session, check_feeds

REBUILD = "build it again: sdtrt build --backend onnxruntime --force"


class OnnxRuntimeSession(Session[torch.Tensor]):
    """Runs an optimised ONNX model on the CPU.

    Args:
        model: the ONNX file.
        contract: its inputs and outputs; tensors are on the CPU.
        threads: for one operator; None for one a core that this process may use.
        optimized: the file is a saved optimised model, which needs no second optimisation.

    Raises:
        EngineError: when ONNX Runtime can't load the file.
    """

    def __init__(self, model: Path, contract: Contract, *, threads: int | None = None, optimized: bool = True) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: they reach the user as exceptions
        if optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise EngineError(f"ONNX Runtime can't load {model}: {error}", hint=REBUILD) from error
        self.contract = contract

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the engine on CPU tensors; the outputs are new tensors."""
        if self._session is None:
            raise EngineError("the session is closed", hint="open a new one")
        shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
        check_feeds(self.inputs, shapes, {name: str(t.dtype).removeprefix("torch.") for name, t in feeds.items()})
        arrays = {name: tensor.detach().contiguous().numpy() for name, tensor in feeds.items()}
        names = [spec.name for spec in self.outputs]
        try:
            results = self._session.run(names, arrays)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed at {shapes}: {error}", hint=REBUILD) from error
        return {name: torch.from_numpy(array) for name, array in zip(names, results, strict=True)}

    def close(self) -> None:
        """Free the model."""
        self._session = None

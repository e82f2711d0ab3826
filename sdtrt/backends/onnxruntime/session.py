"""Sessions on ONNX Runtime's CPU provider: torch tensors in and out, no copies of contiguous memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from sdtrt.backends.gradients import refuse_gradients
from sdtrt.backends.session import Session, check_tensors
from sdtrt.common.errors import EngineError
from sdtrt.exports.onnx_run import load_model, run_model
from sdtrt.specs.contract import Contract

ONNXRUNTIME_FILE = "engine.onnx"


class OnnxRuntimeSession(Session[torch.Tensor]):
    """Runs an optimised ONNX model on the CPU.

    Args:
        model: the ONNX file.
        contract: its inputs and outputs; tensors are on the CPU.
        threads: for one operator; None for as many as PyTorch uses (`OMP_NUM_THREADS` says how many).
        optimized: the file is a saved optimised model, which needs no second optimisation.

    Raises:
        EngineError: when ONNX Runtime can't load the file, or there is too little memory for it.
    """

    def __init__(
        self,
        model: Path,
        contract: Contract,
        *,
        threads: int | None = None,
        optimized: bool = True,
    ) -> None:
        self._session = load_model(model, as_it_is=optimized, threads=threads or torch.get_num_threads())
        self.contract = contract
        self._model = model

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the engine on CPU tensors; the outputs are new tensors.

        Raises:
            EngineError: for inputs that don't fit the contract, a closed session, or a model that fails.
            MemoryError: where they need more memory than there is.
        """
        if self._session is None:
            raise EngineError("the session is closed", hint="open a new one")
        refuse_gradients(self.contract.component, feeds)
        check_tensors(self.inputs, feeds)
        return run_model(self._session, self._model, feeds, [spec.name for spec in self.outputs])

    def close(self) -> None:
        """Free the model."""
        self._session = None
        self.let_go()

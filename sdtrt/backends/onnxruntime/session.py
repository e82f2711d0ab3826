"""Sessions on ONNX Runtime's CPU provider: torch tensors in and out, no copies of contiguous memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from sdtrt.backends.gradients import refuse_gradients
from sdtrt.backends.session import Session, check_feeds
from sdtrt.common.errors import EngineError
from sdtrt.common.files import RAISE_LIMITS
from sdtrt.engines.entry import verification_of
from sdtrt.exports.onnx_run import is_out_of_memory, open_model
from sdtrt.specs.contract import Contract

ONNXRUNTIME_FILE = "engine.onnx"

# ... and that there is no thread or file to spare.
OUT_OF_LIMITS = ("pthread_create", "Resource temporarily unavailable", "Too many open files", "thread constructor")


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
        try:
            self._session = open_model(model, as_it_is=optimized, threads=threads or torch.get_num_threads())
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            if is_out_of_memory(error):
                raise EngineError(
                    f"too little memory to load {model}", hint="end other programs, or use --precision fp16"
                ) from error
            raise EngineError(f"ONNX Runtime can't load {model}: {error}", hint=mend_of(error, model)) from error
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
        shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
        check_feeds(self.inputs, shapes, {name: str(t.dtype).removeprefix("torch.") for name, t in feeds.items()})
        arrays = {name: tensor.detach().contiguous().numpy() for name, tensor in feeds.items()}
        names = [spec.name for spec in self.outputs]
        try:
            results = self._session.run(names, arrays)
        except Exception as error:
            if is_out_of_memory(error):
                raise MemoryError(f"ONNX Runtime has too little memory at {shapes}") from error
            raise EngineError(f"ONNX Runtime failed at {shapes}: {error}", hint=mend_of(error, self._model)) from error
        return {name: torch.from_numpy(array) for name, array in zip(names, results, strict=True)}

    def close(self) -> None:
        """Free the model."""
        self._session = None
        self.let_go()


def mend_of(error: BaseException, model: Path) -> str:
    """What to do about an exception of ONNX Runtime's over a file of an entry.

    The file's content was proven before: it is not advised to remove it.
    """
    if any(text in str(error) for text in OUT_OF_LIMITS):
        return f"{RAISE_LIMITS}, or use fewer threads: OMP_NUM_THREADS=1"
    return f"use --backend torch; {verification_of(model.parent.parent)} says whether it is damaged"

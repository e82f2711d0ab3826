"""A compiled package loaded by PyTorch's own loader, which unpacks it into a folder: that goes, at the latest with it.

`torch._inductor.aoti_load_package` calls the same loader, after a test of what vector instructions the C++ compiler
makes, for a warning: that takes most of a minute where nothing of it is cached, and needs a compiler.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdtrt.backends.inductor.weights import REBUILD
from sdtrt.common.errors import EngineError, first_line
from sdtrt.common.interrupts import held, undoing

MODEL = "model"  # the name of the one model in a package

_UNPACKING = threading.Lock()  # the loader unpacks to $TMPDIR, which the whole process has one of


class Package:
    """A package in memory; its weights are bound by `bind`.

    Args:
        path: the file, whose content is proven: it is code.
        device: what it was compiled for.

    Raises:
        EngineError: where it can't be loaded here.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path = path
        self._stack = ExitStack()
        index = device.index if device.type == "cuda" and device.index is not None else -1
        try:
            with self._stack, _unpacking_into(self._stack):
                # One thread at a time: else it asks for events, which no CUDA graph may be captured over.
                self._loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(path), MODEL, True, 1, index)
                self._stack = self._stack.pop_all()
        except (RuntimeError, OSError) as error:
            raise EngineError(f"PyTorch can't load {path}: {first_line(error)[:300]}", hint=REBUILD) from error
        if device.type == "cpu":
            self._stack.close()  # all of it is in memory; for a GPU, kernels are read when they first run
        self._bound: Mapping[str, torch.Tensor] = {}

    @property
    def constants(self) -> list[str]:
        """The names of the tensors that it takes."""
        names: list[str] = self._loader.get_constant_fqns()
        return names

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give it the addresses of its constants, which are kept alive. They have been checked: this checks no more."""
        self._loader.load_constants(dict(tensors), False, True, True)
        self._bound = tensors

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run it on the current stream; `inputs` are contiguous, in the contract's order.

        Raises:
            EngineError: where it fails.
        """
        try:
            outputs: list[torch.Tensor] = self._loader.run(list(inputs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise EngineError(f"{self._path} fails: {first_line(error)[:300]}", hint=REBUILD) from error
        return outputs

    def close(self) -> None:
        """Free it, and delete what was unpacked."""
        self._loader, self._bound = None, {}
        self._stack.close()


@contextmanager
def _unpacking_into(stack: ExitStack) -> Iterator[None]:
    """Within, the loader unpacks into a folder of this user's own, which is deleted when `stack` is closed."""
    with held():
        folder = Path(tempfile.mkdtemp(prefix="sdtrt-"))
        remove = partial(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(remove)
        stack.enter_context(undoing(remove))
    with _UNPACKING:
        before = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = str(folder)
        try:
            yield
        finally:
            del os.environ["TMPDIR"]
            if before is not None:
                os.environ["TMPDIR"] = before
